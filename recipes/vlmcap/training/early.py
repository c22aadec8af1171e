"""What a recipe asks before it imports what takes seconds: is all installed, may it push, and is there a dataset?"""

import os
from importlib.util import find_spec

from vlmcap.data.lookup import find_dataset
from vlmcap.errors import UserError
from vlmcap.training.arguments import MeasuredFields, SplitArguments
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
# Ways of `accelerate launch` to train that the recipes do not know, by the variable that it sets.
UNFIT_LAUNCHES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def check_early(settings: MeasuredFields, data_args: SplitArguments) -> None:
    """Needs no torch, and comes before it: with `use_cpu`, torch sees no GPU.

    Raises:
        UserError: a tracker of `report_to` is not known or not installed; `accelerate launch` was configured for
            DeepSpeed or Megatron-LM.
        PushError: with `push_to_hub`, the Hub's token may not push to `hub_model_id`.
        DatasetError: there is no such folder and no such dataset on the Hub.
    """
    if settings.use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_trackers(settings.report_to)
    for variable, launch in UNFIT_LAUNCHES.items():
        if os.environ.get(variable) == "true":
            raise UserError(f"accelerate is configured for {launch}, which the recipes do not know: use DDP or FSDP")
    if settings.push_to_hub:
        check_push_rights(settings.hub_model_id)
    find_dataset(data_args.dataset, data_args.dataset_revision)


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises UserError where a tracker is none that transformers knows, or its package is not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all", "kubeflow"):
            continue
        if name not in TRACKERS:
            raise UserError(f"report_to: {name!r} is none of none, all, kubeflow, {', '.join(TRACKERS)}")
        if not any(map(find_spec, TRACKERS[name])):
            raise UserError(
                f"report_to: {name} needs the Python package {TRACKERS[name][0]}, which is not installed: install it,"
                " or leave report_to at none"
            )
