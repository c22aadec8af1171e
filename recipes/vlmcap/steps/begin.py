"""How every recipe begins: a run that starts or resumes, all its settings printed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from vlmcap.provenance import public_name
from vlmcap.training import checkpoints
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.report import settings_report


@dataclass(frozen=True)
class Run:
    """What `begin` found: where the run is, where it resumes from, where it is pushed to, its reported settings."""

    output_dir: Path
    checkpoint: str | None
    push_to: str | None
    settings: dict
    seed: int

    def config(self, model_args) -> dict:
        """The settings that the model card prints; `model_args` is the dataclass of what is loaded and trained."""
        settings = asdict(model_args)
        names = [key for key in settings if key.endswith("name_or_path") or (key == "adapter" and settings[key])]
        return settings | self.settings | {key: public_name(settings[key]) for key in names}


def begin(args: TrainingArguments, reported: Sequence[str], **groups: dict) -> Run:
    """Finds the checkpoint to resume from and prints every setting; `vlmcap.steps.early` has asked the Hub before.

    Args:
        reported: names of the trainer's settings that the model card prints.
        groups: the other settings.

    Raises:
        CheckpointError: the checkpoint to resume from is not whole, or one would be overwritten.
    """
    # The trainer's own push would run in the background at every checkpoint, hiding failures, and without our card.
    push_to = args.hub_model_id if args.push_to_hub else None
    args.push_to_hub = False
    output_dir = Path(args.output_dir)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    everything = args.to_dict() | {"world_size": args.world_size}
    settings = {key: everything[key] for key in reported}
    if PartialState().is_main_process:
        print(settings_report(**groups, training=settings), flush=True)
    return Run(output_dir, checkpoint, push_to, settings, args.seed)


def find_checkpoint(output_dir: Path, resume: str | None) -> str | None:
    """The checkpoint to continue from: a folder, or `latest` for the newest in output_dir that is whole.

    `latest` without one is a run from the start: the command of a job that is started again and again stays the same.
    One process looks, and all of them return what it found.

    Raises:
        CheckpointError: the folder is not whole; or nothing was asked for and output_dir holds checkpoints.
    """
    found = [None, None]  # folder, what is wrong
    if PartialState().is_main_process:
        try:
            found[0] = _find_checkpoint(output_dir, resume)
        except CheckpointError as error:
            found[1] = str(error)
    folder, wrong = broadcast_object_list(found)
    if wrong:
        raise CheckpointError(wrong)
    return folder


def _find_checkpoint(output_dir: Path, resume: str | None) -> str | None:
    if resume not in (None, "latest"):
        if reason := checkpoints.damage(Path(resume)):
            raise CheckpointError(
                f"--resume_from_checkpoint {resume}: {reason}. Name another checkpoint, or `latest` for the newest in"
                " output_dir that is whole."
            )
        return resume
    present = checkpoints.checkpoints(output_dir)
    if present and resume is None:
        raise CheckpointError(
            f"{output_dir} holds {max(present, key=lambda path: path.stat().st_mtime).name} of an earlier run."
            " Continue it with --resume_from_checkpoint latest, choose another --output_dir, or delete it."
        )
    folder = checkpoints.newest(output_dir)
    if resume == "latest":
        print(f"Continuing from {folder}" if folder else f"No checkpoint in {output_dir}: from the start", flush=True)
    return folder and str(folder)
