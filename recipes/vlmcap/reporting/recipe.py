"""How every recipe begins, and how it ends: captions of base and trained model, scored, on a card and a page."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from vlmcap.data.images import open_image, references_of
from vlmcap.evaluation.generate import BeamArguments, check_predictions, generate, model_record
from vlmcap.evaluation.scoring import ScoreOptions, read_predictions, write_metrics
from vlmcap.provenance import public_name
from vlmcap.reporting.cards import is_miniature, score_rows, write_adapter_card
from vlmcap.reporting.gallery import write_sample_page
from vlmcap.reporting.hub import push_adapter
from vlmcap.training.captioner import CaptionerDataArguments, saw_records
from vlmcap.training.report import settings_report
from vlmcap.training.start import Splits, find_checkpoint

SAMPLES = 24
Loader = Callable[[], tuple[PreTrainedModel | PeftModel, ProcessorMixin]]


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
    """Finds the checkpoint to resume from and prints every setting; `vlmcap.training.early` has asked the Hub before.

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


def check_base_captions(
    run: Run,
    data_args: CaptionerDataArguments,
    beam_args: BeamArguments,
    splits: Splits,
    processor: ProcessorMixin,
    base: dict,
) -> None:
    """Asks before training whether `finish_captioner` can take or continue captions that are in `output_dir/base`.

    Args:
        processor, base: of the untrained model; "model" of its run record.

    Raises:
        PredictionsError: they were started with other settings, or are damaged.
    """
    record = {"model": base, "dataset": splits.record | {"split": data_args.test_split}}
    check_predictions(processor, run.output_dir / "base/predictions.jsonl", beam_args, record)


def finish_captioner(
    run: Run,
    recipe: str,
    data_args: CaptionerDataArguments,
    beam_args: BeamArguments,
    splits: Splits,
    trained_dir: Path,
    load_base: Loader,
    load_trained: Loader,
    base_record: Callable[[PreTrainedModel], dict],
) -> None:
    """Captions the test images with the untrained and the trained model, scores both, writes card and page, pushes.

    Args:
        recipe: its name, e.g. "sft_blip_vi".
        trained_dir: folder of the trained weights, with training.json.
        load_base, load_trained: the models as they are on the Hub or on disk, each with its processor.
        base_record: "model" of the run record of the untrained model.
    """
    base_dir = run.output_dir / "base"
    test_set = splits.record | {"split": data_args.test_split}
    base_saw, saw = saw_records(data_args, splits)
    model, processor = load_base()
    base = base_record(model)
    record = {"model": base, "dataset": test_set, "saw": base_saw}
    generate(model, processor, splits.test, base_dir / "predictions.jsonl", beam_args, record)

    del model  # a Llama twice would not fit
    gc.collect()
    torch.cuda.empty_cache()
    model, processor = load_trained()
    trained = base | model_record(model, base["id"], base["revision"], adapter=str(trained_dir))
    record = {"model": trained, "dataset": test_set, "saw": saw}
    generate(model, processor, splits.test, trained_dir / "predictions.jsonl", beam_args, record)
    if not PartialState().is_main_process:
        return

    options = ScoreOptions(spice_url=data_args.spice_url, spice_dir=data_args.spice_dir)
    more = {"recipe": recipe}
    metrics = write_both_metrics(base_dir, trained_dir, splits.test, data_args.tokenizer, more, options)
    write_adapter_card(trained_dir, run.push_to)
    show_results(run.output_dir, metrics, splits.test, base_dir, trained_dir, data_args.test_split, run.seed)
    if run.push_to:
        print(f"Pushed to {push_adapter(trained_dir, run.push_to)}")


def write_both_metrics(
    base_dir: Path,
    trained_dir: Path,
    rows: datasets.Dataset,
    tokenizer: str,
    more: dict | None = None,
    options: ScoreOptions | None = None,
) -> dict:
    """Scores the predictions in both folders, writes metrics.json into each and returns the trained model's.

    It holds the base's whole document under "base" (except for its scores of single images), training.json under
    "training", and `more`.

    Raises as `write_metrics` does.
    """
    references = references_of(rows)

    def scored(folder: Path, more: dict | None = None) -> dict:
        files = (folder / "predictions.jsonl", references, folder / "metrics.json")
        return write_metrics(*files, tokenizer, more, options)

    base = scored(base_dir)
    del base["per_image"]  # as large as the rest together, and in the base's own file
    training = json.loads((trained_dir / "training.json").read_text(encoding="utf-8"))
    return scored(trained_dir, (more or {}) | {"training": training, "base": base})


def show_results(
    output_dir: Path, metrics: dict, rows: datasets.Dataset, base_dir: Path, trained_dir: Path, split: str, seed: int
) -> None:
    """Writes `output_dir/samples.html` and prints the scores of base and trained model.

    Args:
        metrics: as `write_both_metrics` returns them.
        rows: the test images; the page shows some of them, drawn with `seed`.
    """
    said = {
        "base": read_predictions(base_dir / "predictions.jsonl"),
        "adapter": read_predictions(trained_dir / "predictions.jsonl"),
    }
    samples = [
        {"image": open_image(row), "image_id": row["image_id"], "references": row["captions"]}
        | {system: captions[str(row["image_id"])] for system, captions in said.items()}
        for row in rows.shuffle(seed=seed).select(range(min(SAMPLES, len(rows))))
    ]
    note = f"{len(samples)} of {len(rows)} images of {split}, drawn at random."
    if is_miniature(metrics):
        note += " Drawn scenes and a miniature model: a demonstration, no evidence about the real one."
    page = write_sample_page(output_dir / "samples.html", "Before and after", samples, score_rows(metrics), note)
    print()
    for name, *values in score_rows(metrics):
        print(f"{name:<12}" + "".join(f"{value:>18}" for value in values))
    print(f"\nWeights and model card: {trained_dir}\nSample captions:        {page}")
