"""How every recipe ends: captions of base and trained model, scored, on a card and a page, and pushed."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.captioning.branches import supports_branches
from vlmcap.captioning.engines import ADAPTER, BASE
from vlmcap.captioning.predictions import model_record
from vlmcap.captioning.split import caption_split
from vlmcap.data.corpora import seen_of
from vlmcap.data.images import open_image
from vlmcap.evaluation.caption_files import read_predictions
from vlmcap.evaluation.scoring import ScoreOptions
from vlmcap.evaluation.tasks import CaptionTask
from vlmcap.reporting.card_facts import is_miniature, other_keys
from vlmcap.reporting.cards import score_rows, write_adapter_card
from vlmcap.reporting.gallery import write_sample_page
from vlmcap.reporting.hub import push_adapter
from vlmcap.steps.begin import Run
from vlmcap.steps.splits import Splits
from vlmcap.steps.tasks import score_task, task_file

SAMPLES = 24
Loader = Callable[[], tuple[PreTrainedModel | PeftModel, ProcessorMixin]]


def saw_records(base_saw: dict[str, str], splits: Splits) -> tuple[dict, dict]:
    """The "saw" parts of the run records of the untrained and of the trained model.

    Args:
        base_saw: SEEN_CORPORA -> unknown, no or train, of the untrained model.
    """
    note = "As stated in the configuration (base_saw)."
    trained = dict(base_saw)
    if any(splits.train["in_yj"]):
        trained |= {"YJ": "train images"}
    trained |= seen_of([splits.record["corpus"], *splits.record.get("training_corpora", ())])
    return base_saw | {"note": note}, trained | {"note": f"{note} And what the training split shows."}


def finish(
    run: Run,
    recipe: str,
    tasks: Sequence[CaptionTask],
    splits: Splits,
    *,
    base_dir: Path,
    base_record: dict,
    load_base: Loader,
    trained_dir: Path,
    trained_saw: dict,
    load_trained: Loader,
    options: ScoreOptions | None = None,
    audit: Callable[[], None] | None = None,
) -> None:
    """Captions the test images with the untrained and the trained model, scores both, writes card and page, pushes.

    Args:
        recipe: its name, e.g. "sft_blip_vi".
        tasks: what both are asked for, the main task first; all captions of an image are made in one pass.
        base_dir: folder of the untrained model's captions.
        base_record: "model", "dataset" and "saw" of their run record.
        trained_dir: folder of the trained weights, with training.json.
        trained_saw: "saw" of the trained model's run record.
        load_base, load_trained: the models as they are on the Hub or on disk, each with its processor.
        audit: audits the captions in both folders, for the card.
    """
    PartialState().wait_for_everyone()
    _free_memory()
    model, processor = load_trained()
    base = base_record["model"]
    trained = base | model_record(model, base["id"], base["revision"], adapter=str(trained_dir))
    record = {"model": trained, "dataset": splits.test_record, "saw": trained_saw}
    of_base = [task_file(task, base_dir, base_record, BASE) for task in tasks]
    of_trained = [task_file(task, trained_dir, record) for task in tasks]
    if isinstance(model, PeftModel) and supports_branches(model):
        caption_split(model, processor, splits.test, *of_base, *of_trained)
    else:
        caption_split(model, processor, splits.test, *of_trained)
        del model  # both would not fit
        _free_memory()
        caption_split(*load_base(), splits.test, *(replace(file, which=ADAPTER) for file in of_base))
    if not PartialState().is_main_process:
        return

    metrics = write_both_metrics(base_dir, trained_dir, tasks, {"recipe": recipe}, options)
    if audit:
        audit()
    write_adapter_card(trained_dir, run.push_to)
    show_results(run.output_dir, metrics, tasks, splits.test, base_dir, trained_dir, run.seed)
    if run.push_to:
        print(f"Pushed to {push_adapter(trained_dir, run.push_to)}")


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def write_both_metrics(
    base_dir: Path,
    trained_dir: Path,
    tasks: Sequence[CaptionTask],
    more: dict,
    options: ScoreOptions | None = None,
) -> dict:
    """Scores the predictions in both folders, writes metrics.json into each and returns the trained model's.

    It holds the base's whole document under "base" (except for its scores of single images), training.json under
    "training", and `more`. With keys it holds all of them under "languages": key -> "trained", "prompt" and, unless it
    is the main one, the whole document of the trained model, except for its scores of single images.

    Raises as `write_metrics` does.
    """

    def scored(task: CaptionTask, more: dict) -> dict:
        base = score_task(task, base_dir, options=options)
        del base["per_image"]  # as large as the rest together, and in the base's own file
        return score_task(task, trained_dir, more | {"base": base}, options)

    main, *others = tasks
    documents = {task.key: scored(task, {}) for task in others}
    for document in documents.values():
        del document["per_image"]
    languages = {
        task.key: {"trained": task.trained, "prompt": task.args.prompt} | documents.get(task.key, {})
        for task in tasks
        if task.key
    }
    training = json.loads((trained_dir / "training.json").read_text(encoding="utf-8"))
    return scored(main, more | {"training": training} | ({"languages": languages} if languages else {}))


def show_results(
    output_dir: Path,
    metrics: dict,
    tasks: Sequence[CaptionTask],
    rows: datasets.Dataset,
    base_dir: Path,
    trained_dir: Path,
    seed: int,
) -> None:
    """Writes `output_dir/samples.html` and prints the scores of base and trained model.

    Args:
        metrics: as `write_both_metrics` returns them.
        tasks: the main one first.
        rows: the test images; the page shows some of those of the main task, drawn with `seed`.
    """
    main = tasks[0]
    rows = rows.select([number for number, name in enumerate(rows["image_id"]) if str(name) in main.references])
    shown = rows.shuffle(seed=seed).select(range(min(SAMPLES, len(rows))))
    samples = [{"image": open_image(row), "image_id": row["image_id"], "captions": {}} for row in shown]
    for task in tasks:
        base, adapter = (read_predictions(task.folder(of) / "predictions.jsonl") for of in (base_dir, trained_dir))
        for sample in samples:
            if references := task.references.get(name := str(sample["image_id"])):
                said = {"references": references, "base": base[name], "adapter": adapter[name]}
                sample["captions"][task.key] = said
    note = f"{len(samples)} of {len(rows)} images of {metrics['dataset']['split']}, drawn at random."
    if is_miniature(metrics):
        note += " Drawn scenes and a miniature model: a demonstration, no evidence about the real one."
    tables = {key: score_rows(metrics | one) for key, one in {main.key: metrics, **other_keys(metrics)}.items()}
    page = write_sample_page(output_dir / "samples.html", "Before and after", samples, tables, note)
    for key, table in tables.items():
        print(f"\n{key}" if key else "")
        for name, *values in table:
            print(f"{name:<12}" + "".join(f"{value:>18}" for value in values))
    print(f"\nWeights and model card: {trained_dir}\nSample captions:        {page}")
