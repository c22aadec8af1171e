"""The adapter that training started from, captioning the same test images: the middle column of a card."""

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.predictions import model_record
from vlmcap.captioning.split import caption_split
from vlmcap.evaluation.audit_document import audit_rates
from vlmcap.evaluation.scoring import ScoreOptions
from vlmcap.evaluation.tasks import CaptionTask
from vlmcap.models.weights import Adapter
from vlmcap.provenance import public_name
from vlmcap.steps.splits import Splits
from vlmcap.steps.tasks import score_task, task_file


def score_start(
    folder: Path,
    trained_dir: Path,
    adapter: Adapter,
    load_start: Callable[[], tuple[PreTrainedModel | PeftModel, ProcessorMixin]],
    tasks: Sequence[CaptionTask],
    splits: Splits,
    base_record: dict,
    audit: Callable[[Path, CaptionTask], dict],
    options: ScoreOptions,
) -> None:
    """Captions the test images with the starting adapter, scores and audits them, and adds what the card shows of it
    to training.json as "start": {"adapter", "scores", "intervals", "audit" (rates by their paths), "languages" (key ->
    {"scores", "intervals"} of each other task)}.

    After `save_trained` and before `finish`.

    Args:
        folder: of its predictions.jsonl, metrics.json and audit.json.
        trained_dir: of the trained weights, with training.json.
        load_start: the base with the starting adapter.
        tasks: what it is asked for, the main task first.
        base_record: "model", "dataset" and "saw" of the base's run record.
        audit: audits the captions in a folder, and returns the audit.
        options: of the scores.
    """
    PartialState().wait_for_everyone()
    gc.collect()
    torch.cuda.empty_cache()
    model, processor = load_start()
    base, saw = base_record["model"], {"note": f"What {public_name(adapter.name)} saw is on its own card."}
    start = base | model_record(model, base["id"], base["revision"], adapter.name, adapter.revision)
    record = {"model": start, "dataset": splits.test_record, "saw": saw}
    caption_split(model, processor, splits.test, *(task_file(task, folder, record) for task in tasks))
    if not PartialState().is_main_process:
        return
    languages, shown = {}, ("scores", "intervals")
    for task in tasks[1:]:
        metrics = score_task(task, folder, options=options)
        languages[task.key] = {name: metrics[name] for name in shown}
        audit(folder, task)
    metrics = score_task(tasks[0], folder, options=options)
    found = {name: metrics[name] for name in shown}
    found |= {"adapter": public_name(adapter.name), "audit": audit_rates(audit(folder, tasks[0]))}
    found |= {"languages": languages} if languages else {}
    path = trained_dir / "training.json"
    training = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(path, json.dumps(training | {"start": found}, ensure_ascii=False, indent=2))
