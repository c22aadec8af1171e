"""What was trained to the Hub: weights, processor, metrics and card in one commit."""

import shlex
from pathlib import Path

from huggingface_hub import hf_hub_download

from vlmcap.atomic_write import write_atomically
from vlmcap.models.weights import PICKLES
from vlmcap.reporting.card_facts import LLAMA, built_with_llama, is_hub_id, model_parts, recipe_of
from vlmcap.reporting.cards import read_metrics, write_adapter_card
from vlmcap.upload import FAILURES, PushError, patiently, push_folder, reason

WEIGHTS = {
    "adapter": [("adapter_config.json",), ("adapter_model.safetensors",)],
    "model": [("config.json",), ("generation_config.json",), ("model.safetensors",)],
}
# One of each tuple must be there: transformers 5 writes processor_config.json, version 4 preprocessor_config.json.
NEEDED = [
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer_config.json",),
    ("metrics.json",),
]
# What stays here: the trainer's own state, pickles, captions of an unfinished run, and sample pages, which carry
# photographs that are not ours to publish.
PRIVATE = [
    "checkpoint-*/*",
    "global_step*/*",
    "runs/*",
    "events.out.tfevents.*",
    "optimizer_*/*",
    "trainer_state.json",
    *(f"*{ending}" for ending in PICKLES),
    "*.rank*.jsonl",
    "*.html",
]


# What the Llama 3.2 Community License asks of a derivative that is passed on (section 1.b): this notice, a copy of the
# licence, "Built with Llama" (the card has it), a name that begins with "Llama".
LLAMA_NOTICE = (
    "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. All Rights"
    " Reserved.\n"
)


def push_adapter(adapter_dir: str | Path, repo_id: str, private: bool = True) -> str:
    """Pushes the folder of an adapter or a trained model to `repo_id` in one commit; returns the repository's URL.

    Checks the folder, writes its card again with `repo_id` in it, and publishes everything but the trainer's state and
    sample pages, as `vlmcap.upload.push_folder` does. An existing repository whose visibility is not the one asked for
    is refused, so that a private adapter does not become public. What was trained on Llama 3.2 needs a repository
    whose name begins with "Llama"; its licence, fetched from the base's repository, and a notice are added.

    Raises:
        FileNotFoundError: the folder lacks a file; the message says which and what writes it.
        CardError: metrics.json is not the document of a trained model.
        PushError: the Hub could not be reached or refused; the folder is unchanged except for the card. `repo_id`
            is not a name for a Llama, or its licence cannot be fetched.
    """
    adapter_dir = Path(adapter_dir)
    check_adapter_folder(adapter_dir)
    metrics = read_metrics(adapter_dir)
    decoder = model_parts(metrics["model"]).get("decoder", {"id": ""})
    check_llama_name(repo_id, decoder["id"])
    write_adapter_card(adapter_dir, repo_id)
    command = ["python", "scripts/push_adapter.py", "--adapter_dir", str(adapter_dir), "--repo_id", repo_id]
    command = shlex.join(command if private else [*command, "--public"])
    if built_with_llama(metrics):
        _add_llama_licence(adapter_dir, decoder, command)
    message = f"Upload {recipe_of(metrics).trained}, processor, metrics and model card"
    url, _ = push_folder(adapter_dir, repo_id, "model", private, message, command, ignore=PRIVATE)
    return url


def check_adapter_folder(adapter_dir: Path) -> None:
    """Raises FileNotFoundError when a file that the published adapter or model needs is not in the folder.

    Which of the two it is says the recipe in metrics.json. Weights are safetensors, never pickles.
    """
    if not adapter_dir.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {adapter_dir}. {_WRITTEN_BY}")
    if (adapter_dir / "metrics.json").is_file():
        trained = recipe_of(read_metrics(adapter_dir)).trained
    else:
        trained = "model" if (adapter_dir / "model.safetensors").is_file() else "adapter"
    needed = [*WEIGHTS[trained], *NEEDED]
    missing = [" or ".join(names) for names in needed if not any((adapter_dir / name).is_file() for name in names)]
    if missing:
        raise FileNotFoundError(f"{adapter_dir} lacks {', '.join(missing)}. {_WRITTEN_BY}")


_WRITTEN_BY = (
    "The recipe writes the whole folder, weights, processor and metrics.json, at its end:\n"
    "  accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/sft_qwen2vl_jp.py\n"
    "(add --resume_from_checkpoint latest to continue a run that was interrupted); it is OUTPUT_DIR/adapter, and\n"
    "OUTPUT_DIR/model of recipes/sft_vit_gpt2_food.py."
)


def check_llama_name(repo_id: str | None, decoder: str) -> None:
    """Raises PushError when what was trained on `decoder`, a Llama 3.2, is to be published under another name.

    Its licence requires the name of a derivative to begin with "Llama". None is not published.
    """
    if repo_id and LLAMA in decoder.lower() and not repo_id.split("/")[-1].startswith("Llama"):
        raise PushError(
            f"{repo_id} cannot be the name of what is trained on {decoder}: the licence of Llama 3.2 requires a name"
            ' that begins with "Llama", such as Llama-3.2-1B-dish-titles'
        )


def _add_llama_licence(adapter_dir: Path, decoder: dict, command: str) -> None:
    """Writes NOTICE and, unless it is there, LICENSE.txt into the folder; LLAMA_NOTICE says why."""
    write_atomically(adapter_dir / "NOTICE", LLAMA_NOTICE)
    licence = adapter_dir / "LICENSE.txt"
    if licence.is_file():
        return
    try:
        if not is_hub_id(decoder["id"]):
            raise ValueError("it must go with the model, and there is no repository to fetch it from")
        source = {"repo_id": decoder["id"], "filename": licence.name, "revision": decoder["revision"]}
        fetched = patiently(lambda: hf_hub_download(**source))
        write_atomically(licence, Path(fetched).read_bytes())
    except FAILURES as error:
        raise PushError(
            f"pushing {adapter_dir} failed while adding the licence of {decoder['id']}: {reason(error)}.\n"
            f"Nothing was sent to the Hub, and nothing was lost here. Put LICENSE.txt of {decoder['id']} into the"
            f" folder, or log in (`hf auth login`) as someone who accepted that licence; then this finishes it:\n"
            f"  {command}"
        ) from error
