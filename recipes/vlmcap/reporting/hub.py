"""An adapter folder to the Hub: adapter, processor, metrics and card in one commit."""

from pathlib import Path

import httpx2
from huggingface_hub import HfApi, ModelCard

from vlmcap.reporting.cards import write_adapter_card

# One of each tuple must be there: transformers 5 writes processor_config.json, version 4 preprocessor_config.json.
NEEDED = [
    ("adapter_config.json",),
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer_config.json",),
    ("metrics.json",),
]
# What stays here: the trainer's own state (training_args.bin pickles the arguments, a Hub token among them if one was
# given) and sample pages, which carry photographs that are not ours to publish.
PRIVATE = [
    "checkpoint-*/*",
    "global_step*/*",
    "runs/*",
    "events.out.tfevents.*",
    "optimizer.*",
    "optimizer_*/*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    "*.html",
]


class PushError(RuntimeError):
    """Nothing was pushed. The message says at which step it failed, why, and how to go on."""


def push_adapter(adapter_dir: str | Path, repo_id: str, private: bool = True) -> str:
    """Pushes an adapter folder to the model repository `repo_id` in one commit; returns the repository's URL.

    Checks the folder, writes its card again with `repo_id` in it, has the Hub validate the card's metadata, creates
    the repository when it does not exist, and uploads everything but the trainer's state and sample pages. An
    existing repository whose visibility is not the one asked for is refused, lest a private adapter land in public.

    Raises:
        FileNotFoundError: the folder lacks a file; the message says which and what writes it.
        ValueError: metrics.json is no adapter's document.
        PushError: the Hub could not be reached or refused; the folder is as it was but for the card.
    """
    adapter_dir = Path(adapter_dir)
    check_adapter_folder(adapter_dir)
    card = ModelCard.load(write_adapter_card(adapter_dir, repo_id))

    api = HfApi()
    step = "validating the card"
    try:
        card.validate()
        step = "creating the repository"
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if api.repo_info(repo_id).private != private:
            there, asked = ("public", "private") if private else ("private", "public")
            raise ValueError(
                f"the repository exists and is {there}, but {asked} was asked for. Change its visibility in its "
                f"settings on the Hub, or {'pass' if private else 'leave out'} --public"
            )
        step = "uploading the files"
        api.upload_folder(
            repo_id=repo_id,
            folder_path=adapter_dir,
            ignore_patterns=PRIVATE,
            commit_message="Upload adapter, processor, metrics and model card",
        )
    # A push fails as HfHubHTTPError (an httpx2.HTTPError), as a bare httpx2 error without connection, as OSError
    # without token or in offline mode, as RuntimeError from an LFS or Xet upload, as ValueError from validation.
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PushError(
            f"pushing {adapter_dir} to {repo_id} failed while {step}: {error}\n"
            "Nothing was lost: the folder is complete and the push can be repeated. Not logged in, or no write "
            "access? `hf auth login` takes a token with the right to write. Then:\n"
            f"  python scripts/push_adapter.py --adapter_dir {adapter_dir} --repo_id {repo_id}"
            f"{'' if private else ' --public'}"
        ) from error
    return str(repo)


def check_adapter_folder(adapter_dir: Path) -> None:
    """Raises FileNotFoundError when a file that the published adapter needs is not in the folder."""
    if not adapter_dir.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {adapter_dir}. {_WRITTEN_BY}")
    missing = [" or ".join(names) for names in NEEDED if not any((adapter_dir / name).is_file() for name in names)]
    if missing:
        raise FileNotFoundError(f"{adapter_dir} lacks {', '.join(missing)}. {_WRITTEN_BY}")


_WRITTEN_BY = (
    "The recipe writes the whole folder, adapter, processor and metrics.json, at its end:\n"
    "  accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/sft_qwen2vl_jp.py\n"
    "(add --resume_from_checkpoint to continue a run that was interrupted); it is OUTPUT_DIR/adapter."
)


def check_push_rights(repo_id: str | None) -> None:
    """Raises PushError unless the Hub's token may write to `repo_id`'s namespace: asked before hours of work."""
    if not repo_id or "/" not in repo_id:
        raise PushError(f"--push_to_hub needs --hub_model_id USER/NAME, not {repo_id!r}")
    try:
        account = HfApi().whoami()
    except (httpx2.HTTPError, OSError) as error:
        raise PushError(f"--push_to_hub: not logged in to the Hub ({error}); `hf auth login` does it") from error
    namespaces = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if repo_id.split("/")[0] not in namespaces:
        raise PushError(f"--hub_model_id {repo_id}: {account['name']} can push to {', '.join(namespaces)} only")
