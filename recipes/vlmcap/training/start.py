"""How every recipe begins and what it leaves of training: data checked before hours are spent, a run to continue."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from vlmcap import provenance
from vlmcap.data.images import (
    DatasetError,
    check_images,
    check_no_overlap,
    dataset_record,
    load_captions,
    references_of,
    without_empty_captions,
)
from vlmcap.evaluation.generate import delete_predictions, weights_hash
from vlmcap.evaluation.scoring import check_references
from vlmcap.files import write_atomically
from vlmcap.training import checkpoints
from vlmcap.training.arguments import SplitArguments
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.collator import BadImages, drop_missing


@dataclass(frozen=True)
class Splits:
    """Rows as `load_captions` returns them; no `validation` without validation. `record`: of the training split.
    `empty`: {"captions", "images"} of the training split that were left out, see `without_empty_captions`."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset
    record: dict
    validation_split: str | None
    bad_images: BadImages
    empty: dict = field(default_factory=lambda: {"captions": 0, "images": 0})


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


def load_splits(
    args: SplitArguments, output_dir: Path, validates: bool, seed: int, include_yj_images: bool = True
) -> Splits:
    """Loads the splits of a run and checks them: what cannot be read is found now, what overlaps ends the run.

    Empty training captions are left out, and the number is printed. Test and validation captions must be references
    that can be scored. Training pictures that are missing are left out and listed in `output_dir/bad_images.jsonl`,
    up to `max_bad_images`; every picture of the test and validation images is decoded. The list of a run that has
    checkpoints is kept: it continues with them.

    Args:
        validates: whether validation rows are wanted.
        seed: of the choice of validation images.
        include_yj_images: False leaves out training images that YJ Captions describes too. A dataset without the
            column in_yj is taken as not compared with YJ Captions (null).

    Raises:
        DatasetError: no such dataset or split, an image in two splits, unreadable pictures, no training caption.
        ScoreError: test or validation captions without any word; the message names the images.
    """
    is_main = PartialState().is_main_process
    record = dataset_record(args.dataset, args.train_split, args.dataset_revision)
    source = {"image_dir": args.image_dir, "revision": record["revision"]}
    splits = {"train": args.train_split, "test": args.test_split}
    if validates:
        splits["validation"] = args.validation_split
    with PartialState().local_main_process_first():
        rows = {name: load_captions(args.dataset, split, **source) for name, split in splits.items()}
    train, test, validation = rows["train"], rows["test"], rows.get("validation")
    for name in [name for name in splits if name != "train"]:
        check_no_overlap(train, rows[name], splits[name])
    if "in_yj" not in train.column_names:
        train = train.add_column("in_yj", [None] * len(train), feature=datasets.Value("bool"))
    train, empty = without_empty_captions(train)
    if is_main and any(empty.values()):
        print(
            f"Left out of {args.train_split}: {empty['captions']:,} empty captions, and {empty['images']:,} images"
            " without any other",
            flush=True,
        )
    if not include_yj_images:
        train = train.select([i for i, in_yj in enumerate(train["in_yj"]) if not in_yj])
    train, test = _first(train, args.max_train_images), _first(test, args.max_test_images)
    if not len(train):
        raise DatasetError(f"{args.dataset} ({args.train_split}) has no image with a caption to train on")
    if validates:
        validation = _first(validation.shuffle(seed=seed), args.max_validation_images)
    bad_images = BadImages(output_dir / "bad_images.jsonl", int(args.max_bad_images * len(train)))
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        bad_images.begin(keep=bool(checkpoints.checkpoints(output_dir)))
        scored = [(args.test_split, test), *([(args.validation_split, validation)] if validates else [])]
        for split, rows in scored:
            check_references(references_of(rows), args.tokenizer, f"{args.dataset} ({split})")
        for split, rows in scored:
            check_images(rows, split)
    train = drop_missing(train, bad_images, write=is_main)
    return Splits(train, validation, test, record, splits.get("validation"), bad_images, empty)


def _first(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    return rows.select(range(min(count or len(rows), len(rows))))


def save_trained(trainer: Trainer, folder: Path, splits: Splits, config: dict) -> None:
    """Saves what was trained and, beside it, training.json: what was trained on, with which settings, and the results.

    The files are written beside `folder` and renamed into it, training.json last: without it the folder is not
    whole. Captions that are there are deleted before different weights come.

    Args:
        trainer: a MeasuredTrainer.
        config: the settings that the model card prints.

    Raises:
        CheckpointError: the disk is full; what was in `folder` is unchanged.
    """
    new = folder.with_name(f"{folder.name}.new")
    if PartialState().is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    fix = "The checkpoints are whole: free space, then continue with --resume_from_checkpoint latest."
    with checkpoints.reported(str(folder), folder.parent, fix):
        try:
            trainer.save_model(str(new))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    if not PartialState().is_main_process:
        return
    training = {
        "config": config,
        "dataset": splits.record,
        "images": len(splits.train),
        "captions": sum(map(len, splits.train["captions"])),
        "in_yj_images": sum(map(bool, splits.train["in_yj"])),
        "validation_split": splits.validation_split,
        "bad_images": splits.bad_images.count(),
        "empty_captions": splits.empty,
        "hardware": provenance.hardware(),
        "seed": trainer.args.seed,
    }
    text = json.dumps(training | trainer.summary(), ensure_ascii=False, indent=2)
    with checkpoints.reported(str(folder), folder.parent, fix):
        folder.mkdir(exist_ok=True)
        if weights_hash(folder) != weights_hash(new):
            delete_predictions(folder / "predictions.jsonl")
        (folder / "training.json").unlink(missing_ok=True)
        name_special_tokens(new)
        for path in [path for path in new.rglob("*") if path.is_file()]:
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        shutil.rmtree(new)
        write_atomically(folder / "training.json", text)


def name_special_tokens(folder: Path) -> None:
    """Writes a saved tokenizer's list of further special tokens under the name that transformers 4 and 5 read.

    transformers 5 writes `extra_special_tokens`, for which 4.57 needs a mapping and fails; 5 reads the older name too.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        write_atomically(path, json.dumps(settings, ensure_ascii=False, indent=2))
