"""Prediction files: captions a line each, whole or resumable, with a record of how they were made."""

import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import datasets
from accelerate import PartialState
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from vlmcap import provenance
from vlmcap.atomic_write import write_atomically
from vlmcap.data.images import BadImageError
from vlmcap.errors import UserError
from vlmcap.models.load import base_model, count_parameters

# Keys of a run record: captions are continued only if these are the same.
ASKED = ("model", "dataset", "prompt", "decoding")


class PredictionsError(UserError):
    """Captions cannot be made or continued as asked. The message names the file and the fix."""


def run_record_path(predictions: Path) -> Path:
    """predictions.jsonl -> predictions.run.json, which records how the predictions were made."""
    return predictions.with_suffix(".run.json")


def shares(predictions: Path) -> list[Path]:
    """predictions.rank0.jsonl, ...: where the processes of an unfinished run keep their captions."""
    return sorted(predictions.parent.glob(f"{glob.escape(predictions.stem)}.rank*.jsonl"))


def delete_predictions(predictions: Path) -> None:
    """Deletes predictions and what an unfinished run left of them."""
    for path in (predictions, *shares(predictions)):
        path.unlink(missing_ok=True)


def read_done(predictions: Path, asked: dict) -> tuple[dict[int | str, dict], dict]:
    """Lines by image id, of finished predictions and of the shares of an unfinished run, and the run record of them.

    A half-written last line is left out. An image in two files counts once: a run was killed when it had joined them.

    Raises:
        PredictionsError: a file was started with another model, dataset, prompt or decoding than `asked`, or is
            damaged.
    """
    files = [path for path in (predictions, *shares(predictions)) if path.exists()]
    done = {}
    for path in files:
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            entry = _read_object(line, f"{path}, line {number}", predictions)
            if not isinstance(entry.get("image_id"), int | str) or not isinstance(entry.get("caption"), str):
                raise PredictionsError(f'{path}, line {number} has no "image_id" and "caption". {_fix(predictions)}')
            done[entry["image_id"]] = entry
    if not done:
        return {}, {}
    path = run_record_path(predictions)
    record = _read_object(path.read_bytes(), str(path), predictions) if path.exists() else {}
    differs = [key for key in asked if record.get(key) != json.loads(json.dumps(asked[key]))]
    if differs:
        raise PredictionsError(
            f"{files[0]} was started with another {', '.join(differs)}: {[record.get(k) for k in differs]} instead of"
            f" {[asked[k] for k in differs]}. {_fix(predictions)}"
        )
    return done, record


def _read_object(text: bytes, where: str, predictions: Path) -> dict:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{where} is damaged, no JSON in UTF-8 ({error}). {_fix(predictions)}") from error
    if not isinstance(entry, dict):
        raise PredictionsError(f"{where} is damaged, no JSON object: {entry!r:.80}. {_fix(predictions)}")
    return entry


def _fix(predictions: Path) -> str:
    names = " and ".join(path.name for path in (predictions, *shares(predictions)) if path.exists())
    return f"Delete {names} in {predictions.parent}, or choose another --output."


def cut_half_line(path: Path) -> None:
    """Cuts off what a killed process left after the last whole line of a file, if it is there."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


ImageId = int | str


@dataclass(frozen=True)
class PredictionsFile:
    """Captions to be written.

    Attributes:
        record: "model", "dataset", "saw", "prompt" and "decoding" of the run record.
        image_ids: of the images that it holds, in their order; None: of all rows.
    """

    path: Path
    record: dict
    image_ids: Sequence[ImageId] | None = None


@dataclass(frozen=True)
class OpenPredictions:
    """A predictions file in work: the images that have no caption yet, and how one is written."""

    todo: list[ImageId]
    write: Callable[[ImageId, str], None]


@contextmanager
def open_predictions(
    image_ids: Sequence[ImageId], output: Path, record: dict, peak_memory: Callable[[], int | None]
) -> Iterator[OpenPredictions]:
    """Predictions (JSON lines) and their run record, continued where an earlier run stopped.

    Every process captions its share of the images, in any order, and appends each caption to a file of its own
    (`shares`). When all are done process 0 writes `output` in the order of `image_ids`, whole or not at all, and
    removes the shares. It may be killed at any moment, and continued by another number of processes.

    Args:
        record: "model", "dataset", "saw", "prompt" and "decoding" of the run record.
        peak_memory: bytes of device memory that were held at most, None on a CPU; asked at the end.

    Raises:
        BadImageError: a picture cannot be read; a score over fewer images than its split would be no score of the
            split.
        PredictionsError: `output` was started with other settings, is damaged, or cannot be written (a full disk).
    """
    try:
        yield from _open_predictions(image_ids, output, record, peak_memory)
    except BadImageError:  # an OSError too
        raise
    except OSError as error:
        raise PredictionsError(
            f"{error.filename or output.parent} cannot be read or written: {error.strerror or error}. The captions so"
            " far are kept: fix it (make room), then run the same command again."
        ) from error


def _open_predictions(
    image_ids: Sequence[ImageId], output: Path, record: dict, peak_memory: Callable[[], int | None]
) -> Iterator[OpenPredictions]:
    state = PartialState()
    output.parent.mkdir(parents=True, exist_ok=True)
    asked = {key: record[key] for key in ASKED}
    run_record = run_record_path(output)
    done, earlier = read_done(output, asked)
    todo = [image_id for image_id in image_ids if image_id not in done]
    before, start = earlier.get("seconds", 0.0), time.perf_counter()
    finished = not todo and output.exists() and "created" in earlier

    def write_record(**more) -> None:
        seconds = before + time.perf_counter() - start
        if state.is_main_process:
            text = json.dumps(record | {"seconds": seconds} | more, ensure_ascii=False, indent=2)
            write_atomically(run_record, text)

    state.wait_for_everyone()  # all have read the same before one writes
    if finished:
        yield OpenPredictions([], lambda image_id, caption: None)
    else:
        write_record()
        state.wait_for_everyone()  # no share without the record that says what it is of
        share = output.with_suffix(f".rank{state.process_index}.jsonl")
        cut_half_line(share)
        with share.open("ab") as file:
            written = count(1)

            def write(image_id: ImageId, caption: str) -> None:
                file.write(_lines([{"image_id": image_id, "caption": caption}]))
                file.flush()
                if next(written) % record["decoding"]["batch_size"] == 0:
                    write_record()  # with the time so far, so that a continued run reports all of it

            yield OpenPredictions(todo, write)
        state.wait_for_everyone()
        if state.is_main_process:
            done = read_done(output, asked)[0]
            write_atomically(output, _lines(({i: done[i] for i in image_ids} | done).values()))
        seconds = before + time.perf_counter() - start
        write_record(
            hardware=provenance.hardware(),
            images_per_second=len(image_ids) / seconds,
            peak_memory_bytes=peak_memory(),
            versions=provenance.versions(),
            commit=provenance.git_commit(),
            created=provenance.now(),
        )
    if state.is_main_process:
        for path in shares(output):
            path.unlink()
    state.wait_for_everyone()


# Numbers of rows, and numbers of files that they are for -> captions of each row, one for each of these files.
Captions = Callable[[list[int], list[int]], Iterable[Sequence[str]]]


def write_captions(
    caption: Captions,
    rows: datasets.Dataset,
    files: Sequence[PredictionsFile],
    peak_memory: Callable[[], int | None],
) -> None:
    """Captions rows and writes predictions and run record of each file, as `open_predictions` does.

    Rows that the same files still need are captioned together.

    Args:
        rows: as `load_captions` returns them.

    Raises as `open_predictions`.
    """
    state, all_ids = PartialState(), list(rows["image_id"])
    with ExitStack() as stack:
        opened = []
        for file in files:
            image_ids = all_ids if file.image_ids is None else file.image_ids
            opened.append(stack.enter_context(open_predictions(image_ids, file.path, file.record, peak_memory)))
        todo = [set(one.todo) for one in opened]
        needed = [row for row, image_id in enumerate(all_ids) if any(image_id in one for one in todo)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in needed[state.process_index :: state.num_processes]:
            its_files = tuple(number for number, one in enumerate(todo) if all_ids[row] in one)
            groups.setdefault(its_files, []).append(row)
        names = ", ".join(dict.fromkeys(file.path.parent.name for file in files))
        with tqdm(
            total=len(rows),
            initial=len(rows) - len(needed),
            desc=f"captions ({names})",
            disable=not state.is_main_process,
        ) as bar:
            for its_files, its_rows in groups.items():
                for row, said in zip(its_rows, caption(its_rows, list(its_files)), strict=True):
                    for number, text in zip(its_files, said, strict=True):
                        opened[number].write(all_ids[row], text)
                    bar.update(min(state.num_processes, bar.total - bar.n))


def _lines(entries: Iterable[dict]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode("utf-8")


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of the weights in the folder of an adapter or of a whole model; None when there are none."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return None


def model_record(
    model: PreTrainedModel | PeftModel,
    name: str,
    revision: str | None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> dict:
    """The "model" part of the run record.

    Args:
        revision: the commit that was loaded, see `resolve_revision`; None for a folder.
        adapter: the trained weights, also where they are a whole model's.
        adapter_revision: their commit on the Hub, see `read_adapter`. Of a folder the hash of the weights is recorded.
    """
    base = base_model(model)
    if adapter and Path(adapter).exists():
        adapter_revision = weights_hash(Path(adapter))
    return {
        "id": provenance.public_name(name),
        "revision": revision,
        "adapter": adapter and provenance.public_name(adapter),
        "adapter_revision": adapter_revision,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": "nf4" if getattr(base, "is_loaded_in_4bit", False) else None,
        "parameters": count_parameters(model),
    }
