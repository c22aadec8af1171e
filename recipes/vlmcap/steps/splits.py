"""The data of a run, checked before hours are spent."""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from accelerate import PartialState

from vlmcap.data.errors import DataError
from vlmcap.data.images import (
    check_images,
    check_no_overlap,
    dataset_record,
    load_captions,
    references_of,
    without_empty_captions,
)
from vlmcap.evaluation.scoring import check_references
from vlmcap.training import checkpoints
from vlmcap.training.arguments import SplitArguments
from vlmcap.training.collator import BadImages, drop_missing


@dataclass(frozen=True)
class Splits:
    """Rows as `load_captions` returns them; no `validation` without validation.

    `record`, `test_record`: "dataset" of a run record, for the training and the test split. `empty`: {"captions",
    "images"} of the training split that were left out, see `without_empty_captions`.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset
    record: dict
    test_record: dict
    validation_split: str | None
    bad_images: BadImages
    empty: dict = field(default_factory=lambda: {"captions": 0, "images": 0})


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
        DataError: no such dataset or split, an image in two splits, unreadable pictures, no training caption.
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
        raise DataError(f"{args.dataset} ({args.train_split}) has no image with a caption to train on")
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
    test_record = record | {"split": args.test_split}
    return Splits(train, validation, test, record, test_record, splits.get("validation"), bad_images, empty)


def _first(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    return rows.select(range(min(count or len(rows), len(rows))))
