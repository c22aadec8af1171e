"""Checkpoints that are whole or not there: completed, found, checked, told apart from what a crash left.

A checkpoint is written in `output_dir/unfinished/`, brought to the disk, described by a manifest (size and sha256 of
each file, and what the run needs to continue with the same digits), and then renamed to `output_dir/checkpoint-N`. A
checkpoint that is deleted is renamed first, too. So what is in `unfinished/` is never whole, and what has the name of
a checkpoint was whole when it got it; the manifest tells whether it still is.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from vlmcap.errors import UserError

MANIFEST = "checkpoint.json"
# What a manifest holds; recipes/README.md says what each is.
KINDS = {"files": dict, "best": str | None, "must_match": dict, "may_change": dict, "since_log": dict}
UNFINISHED = "unfinished"
# transformers and PEFT read these where there are no safetensors. The trainers here never write them.
PICKLED_WEIGHTS = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


class CheckpointError(UserError):
    """A checkpoint cannot be written or resumed from. The message names the folder, the reason and the fix."""


def complete(written: Path, folder: Path, record: dict) -> None:
    """Brings the files in `written` to the disk, adds the manifest with `record`, and renames `written` to `folder`.

    A checkpoint that has the name already is replaced.

    Raises:
        OSError: the disk is full, or fails; `folder` is as it was, or gone if it was to be replaced.
    """
    files = {}
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(written).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    with (written / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(record | {"files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(written)
    if folder.exists():
        delete(folder)
    written.rename(folder)
    _sync_folder(folder.parent)


def delete(folder: Path) -> None:
    """Deletes a checkpoint of an output folder so that at no moment half of it has the name of a checkpoint."""
    going = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    going.parent.mkdir(exist_ok=True)
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints except for `limit`, the newest and the best among them.

    As `transformers.trainer_utils.rotate_checkpoints`, but each is whole until it is gone.
    """
    if not limit:
        return
    checkpoints = sort_checkpoints(str(output_dir), use_mtime=True, best_model_checkpoint=best)
    keep = max(limit, 2 if best and Path(best).name != Path(checkpoints[-1]).name else 1)
    for folder in checkpoints[:-keep]:
        delete(Path(folder))


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it lacks one of `KINDS`.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        wrong = [key for key, kind in KINDS.items() if key not in manifest or not isinstance(manifest[key], kind)]
        if not wrong:
            return manifest
        reason = f"{path} lacks {', '.join(wrong)}: another version of this code wrote it, or it was altered"
    except FileNotFoundError:
        reason = f"it has no {MANIFEST}, so it was never completed, or an older version of this code wrote it"
    except (OSError, ValueError, TypeError) as error:
        reason = f"{path} cannot be read ({error or type(error).__name__})"
    raise CheckpointError(reason)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a missing, cut off or altered file, or that its best model is; None if nothing.

    Reads every file once.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes, not the {expected['size']:,} that were written"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} is not what was written (its sha256 has changed)"
    for name in PICKLED_WEIGHTS:
        if (folder / name).exists():
            return f"{name} holds pickled weights, which are not loaded here"
    if not any(name.startswith("scheduler") for name in manifest["files"]):
        return "it holds weights alone (save_only_model), and no optimizer to continue with"
    best = manifest["best"]
    if best is not None and best != folder.name and (reason := damage(folder.parent / best)):
        return f"{best}, the best so far, which it refers to, cannot be used: {reason}"
    return None


def newest(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole. Those that are not are named in a line and left where they are.

    What was being written or deleted when an earlier run ended is deleted, and named.
    """
    leftovers = output_dir / UNFINISHED
    if leftovers.exists() and (names := ", ".join(sorted(path.name for path in leftovers.iterdir()))):
        size = sum(path.stat().st_size for path in leftovers.rglob("*") if path.is_file())
        print(
            f"Deleted {leftovers} ({names}; {size / 2**20:.1f} MiB), which an interrupted run left half-written.",
            flush=True,
        )
        shutil.rmtree(leftovers)
    for folder in sorted(checkpoints(output_dir), key=_step, reverse=True):
        reason = damage(folder)
        if reason is None:
            return folder
        print(f"Skipped {folder}: {reason}.", flush=True)
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of an output folder that have the name of a checkpoint."""
    return [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]


@contextmanager
def reported(what: str, folder: Path, fix: str) -> Iterator[None]:
    """Turns what a full or failing disk raises while `what` is written to `folder` into one clear sentence.

    Raises:
        CheckpointError: with the reason, the bytes that are free, and `fix`.
    """
    try:
        yield
    # torch.save raises RuntimeError where its writer fails, safetensors SafetensorError.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{what} could not be written: {reason}. {folder} has {free:,} bytes free. {fix}"
        ) from error


def _step(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
