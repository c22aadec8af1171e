"""The files of a task: captions in a folder, and their scores."""

from pathlib import Path

from vlmcap.captioning.engines import ADAPTER
from vlmcap.captioning.split import SplitFile
from vlmcap.evaluation.scoring import ScoreOptions, write_metrics
from vlmcap.evaluation.tasks import CaptionTask


def task_file(task: CaptionTask, place: Path, record: dict, which: str = ADAPTER) -> SplitFile:
    """predictions.jsonl of a task, as `caption_split` writes it.

    Args:
        place: folder of the main task.
        record: "model", "dataset" and "saw" of the run record.
    """
    return SplitFile(task.folder(place) / "predictions.jsonl", record, task.args, which, task.image_ids)


def score_task(task: CaptionTask, place: Path, more: dict | None = None, options: ScoreOptions | None = None) -> dict:
    """Scores the captions of a task, writes metrics.json beside them and returns it.

    Args:
        place: folder of the main task.
        more: goes into the document, beside "key" where the task has one.

    Raises as `write_metrics` does.
    """
    folder, key = task.folder(place), {"key": task.key} if task.key else {}
    files = (folder / "predictions.jsonl", task.references, folder / "metrics.json")
    return write_metrics(*files, task.tokenizer, key | (more or {}), options)
