"""What a recipe asks before it imports what takes seconds: is all installed, and is there what it will need later?"""

import os
from importlib.util import find_spec
from pathlib import Path

from vlmcap.atomic_write import check_writable
from vlmcap.captioning.arguments import PromptArguments
from vlmcap.data.lookup import find_dataset
from vlmcap.errors import UserError, notice
from vlmcap.evaluation.external import ScorerUnavailable, check_local_spice, check_meteor
from vlmcap.evaluation.tokenise import tokenizer_of, tokenizer_signature
from vlmcap.training.arguments import ScoredSplitArguments, TrainerFields
from vlmcap.upload import check_push_rights

# Trackers of transformers (`report_to`) and the modules of which each needs one; Kubeflow's needs none.
TRACKERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
# Those that show captions too (vlmcap.training.trackers), which setup.cfg has as extras.
EXTRAS = ("tensorboard", "trackio", "wandb")
# Ways of `accelerate launch` to train that the recipes do not know, by the variable that it sets.
UNFIT_LAUNCHES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def check_early(
    settings: TrainerFields, data_args: ScoredSplitArguments, prompts: PromptArguments | None = None
) -> None:
    """Needs no torch, and comes before it: with `use_cpu`, also of accelerate, torch sees no GPU.

    Says whether METEOR will be left out.

    Raises:
        PushError: with `push_to_hub`, the Hub's token may not push to `hub_model_id`, or what is there is public.
        DataError: there is no such folder and no such dataset on the Hub; it lacks a split, a column, a card or the
            pictures that the run will need.
        TokenizerError: there is no such tokenizer for the scores, or none for a language of `prompts`.
        UserError: `spice_dir` holds no SPICE, or there is no Java for it; a tracker of `report_to` is not known or not
            installed; `accelerate launch` was configured for DeepSpeed or Megatron-LM.
        OSError: a folder that the run writes into cannot be written.
    """
    if settings.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_trackers(settings.report_to)
    for variable, launch in UNFIT_LAUNCHES.items():
        if os.environ.get(variable) == "true":
            raise UserError(f"accelerate is configured for {launch}, which the recipes do not know: use DDP or FSDP")
    if settings.push_to_hub:
        check_push_rights(settings.hub_model_id)
    revision = find_dataset(data_args.dataset, data_args.dataset_revision)
    tokenizer_signature(data_args.tokenizer)
    keys = list(prompts.first_wordings) if prompts else []
    for key in keys:
        tokenizer_of(key.split("/")[0])
    settings_of_some = vars(data_args)
    if settings_of_some.get("spice_dir"):
        try:
            check_local_spice(data_args.spice_dir)
        except ScorerUnavailable as error:
            raise UserError(f"spice_dir {data_args.spice_dir}: {error}") from error
    for folder in (settings.output_dir, settings_of_some.get("base_dir")):
        if folder:
            check_writable(Path(folder))
    if settings_of_some.get("meteor", True):
        try:
            check_meteor()
        except ScorerUnavailable as error:
            notice(f"METEOR will be left out: {error}")
    from vlmcap.data.images import check_splits  # takes a second: after all that is checked at once

    needed = ["train_split", "test_split", *["validation_split"] * (settings.eval_strategy != "no")]
    splits = {f"--{name}": settings_of_some[name] for name in needed if name in settings_of_some}
    check_splits(data_args.dataset, splits, data_args.image_dir, revision, keys)


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises UserError where a tracker is none that transformers knows, or its package is not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all", "kubeflow"):
            continue
        if name not in TRACKERS:
            raise UserError(f"report_to: {name!r} is none of none, all, kubeflow, {', '.join(TRACKERS)}")
        if not any(map(find_spec, TRACKERS[name])):
            raise UserError(
                f"report_to: {name} needs the Python package {TRACKERS[name][0]}, which is not installed: install it"
                f"{f' with `pip install {name}`' if name in EXTRAS else ''}, or leave report_to at none"
            )


def adapter_folder(output_dir: str, start: str | None, needs_start: bool = True) -> Path:
    """Where a run leaves its adapter; `start` is the adapter that training starts from.

    Raises:
        UserError: the run would overwrite `start`, or there is none and it needs one.
    """
    folder = Path(output_dir) / "adapter"
    if needs_start and not start:
        raise UserError("--adapter is needed: the adapter that training starts from, of recipes/sft_qwen2vl_jp.py")
    if start and Path(start).resolve() == folder.resolve():
        raise UserError(f"--adapter {start} would be overwritten by this run: choose another --output_dir")
    return folder
