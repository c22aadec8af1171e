"""The data of a run, checked before hours are spent."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from accelerate import PartialState

from vlmcap.captioning.arguments import GenerationArguments, PromptArguments
from vlmcap.data.columns import keep_captions
from vlmcap.data.errors import DataError
from vlmcap.data.images import (
    check_images,
    check_no_overlap,
    dataset_record,
    load_captions,
    without_empty_captions,
)
from vlmcap.data.keys import caption_keys
from vlmcap.data.preferences import preferences_record
from vlmcap.errors import notice
from vlmcap.evaluation.audit_checks import picture_hashes
from vlmcap.evaluation.scoring import check_references
from vlmcap.evaluation.tasks import caption_tasks
from vlmcap.steps.arguments import NO_PROMPTS
from vlmcap.training import checkpoints
from vlmcap.training.arguments import PreferenceArguments, ScoredSplitArguments, SplitArguments
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

    def trained_on(self, rows: datasets.Dataset) -> "Splits":
        """The splits without training images that are not in `rows`, since their pictures cannot be read."""
        kept = set(map(str, rows["image_id"]))
        places = [place for place, image_id in enumerate(self.train["image_id"]) if str(image_id) in kept]
        return replace(self, train=self.train.select(places))


def load_splits(
    args: SplitArguments,
    output_dir: Path,
    validates: bool,
    seed: int,
    include_yj_images: bool = True,
    prompts: PromptArguments = NO_PROMPTS,
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
        prompts: where they have keys, rows are images with a caption of one, and training captions are those of the
            trained keys alone; the number of those left out is printed. `max_test_images` and `max_validation_images`
            count the images of each key, so that one with few of them is scored too. Validation is of trained keys.

    Raises:
        DataError: no such dataset or split, an image in two splits, unreadable pictures, no training caption, no
            caption of a key.
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
    if prompts.prompts:
        train, unasked = _of_trained_keys(train, prompts)
        if is_main and any(unasked.values()):
            print(
                f"Left out of {args.train_split}: {unasked['captions']:,} captions of no trained key, and"
                f" {unasked['images']:,} images without any other",
                flush=True,
            )
    train, empty = without_empty_captions(train)
    if is_main and any(empty.values()):
        print(
            f"Left out of {args.train_split}: {empty['captions']:,} empty captions, and {empty['images']:,} images"
            " without any other",
            flush=True,
        )
    if not include_yj_images:
        train = train.select([i for i, in_yj in enumerate(train["in_yj"]) if not in_yj])
    train, test = _first(train, args.max_train_images), _first(test, args.max_test_images, prompts)
    if not len(train):
        raise DataError(f"{args.dataset} ({args.train_split}) has no image with a caption to train on")
    if validates:
        validation = _first(validation.shuffle(seed=seed), args.max_validation_images, prompts, only_trained=True)
    bad_images = BadImages(output_dir / "bad_images.jsonl", int(args.max_bad_images * len(train)))
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        bad_images.begin(keep=bool(checkpoints.checkpoints(output_dir)))
        _check_scored(args, test, validation, prompts)
    train = drop_missing(train, bad_images, write=is_main)
    test_record = record | {"split": args.test_split}
    return Splits(train, validation, test, record, test_record, splits.get("validation"), bad_images, empty)


def load_scored_splits(
    args: PreferenceArguments,
    output_dir: Path,
    validates: bool,
    seed: int,
    preferences: datasets.Dataset,
    prompts: PromptArguments = NO_PROMPTS,
) -> tuple[Splits, dict[str, int]]:
    """Loads and checks the splits that a model trained on preferences is scored with, as `load_splits` does.

    Images that are trained on, the same by image_id or by their file, are left out of them, and counted: people judge
    captions of test images.

    Args:
        preferences: those to train on, as `read_preferences` returns them.

    Returns:
        The splits, in which `train` is the preferences with their chosen captions; and split -> images left out.

    Raises:
        DataError, ScoreError: as `load_splits`; or every image of a split is trained on.
    """
    record = dataset_record(args.dataset, args.test_split, args.dataset_revision)
    source = {"image_dir": args.image_dir, "revision": record["revision"]}
    ids, files = set(preferences["image_id"]), set(preferences["sha256"])
    rows, left_out = {}, {}
    for split in [args.test_split, *([args.validation_split] if validates else [])]:
        with PartialState().local_main_process_first():
            found = load_captions(args.dataset, split, **source)
        hashes = dict(picture_hashes(found, f"pictures of {split}"))
        places = enumerate(map(str, found["image_id"]))
        kept = [place for place, image_id in places if image_id not in ids and hashes.get(image_id) not in files]
        rows[split], left_out[split] = found.select(kept), len(found) - len(kept)
        if not kept:
            raise DataError(
                f"all {len(found)} images of {args.dataset} ({split}) are in the preferences: trained on them, the"
                " model cannot be scored with them. Name another split (--test_split, --validation_split)."
            )
        if left_out[split]:
            notice(f"Left out of {split}: {left_out[split]:,} of {len(found):,} images, which preferences are about")
    test, validation = _first(rows[args.test_split], args.max_test_images, prompts), None
    if validates:
        shuffled = rows[args.validation_split].shuffle(seed=seed)
        validation = _first(shuffled, args.max_validation_images, prompts, only_trained=True)
    bad_images = BadImages(output_dir / "bad_images.jsonl", limit=0)
    if PartialState().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        bad_images.begin(keep=False)
        _check_scored(args, test, validation, prompts)
    train = preferences.remove_columns(["chosen", "rejected"])
    train = train.add_column("captions", [list(dict.fromkeys(texts)) for texts in preferences["chosen"]])
    train = train.add_column("in_yj", [None] * len(train), feature=datasets.Value("bool"))
    preferences_of = preferences_record(args.preferences, args.preferences_split, args.preferences_revision)
    split_of = args.validation_split if validates else None
    return Splits(train, validation, test, preferences_of, record, split_of, bad_images), left_out


def _check_scored(
    args: ScoredSplitArguments, test: datasets.Dataset, validation: datasets.Dataset | None, prompts: PromptArguments
) -> None:
    scored = [(args.test_split, test), *([(args.validation_split, validation)] if validation is not None else [])]
    for split, rows in scored:
        place = f"{args.dataset} ({split})"
        asked = (prompts, GenerationArguments(), args.tokenizer, rows, place)
        for task in caption_tasks(*asked, only_trained=rows is validation):
            check_references(task.references, task.tokenizer, task.named(place))
    for split, rows in scored:
        check_images(rows, split)


def _of_trained_keys(rows: datasets.Dataset, prompts: PromptArguments) -> tuple[datasets.Dataset, dict[str, int]]:
    """Rows with captions of the trained keys alone; and how many {"captions", "images"} are left out."""
    keys = caption_keys(rows, list(prompts.first_wordings))
    kept = [[place for place, key in enumerate(of) if key in prompts.wordings] for of in keys]
    found = keep_captions(rows, kept)
    return found, {"captions": sum(map(len, keys)) - sum(map(len, kept)), "images": len(rows) - len(found)}


def _first(
    rows: datasets.Dataset, count: int | None, prompts: PromptArguments = NO_PROMPTS, only_trained: bool = False
) -> datasets.Dataset:
    """The first `count` rows; with keys the first of each key, so that rows without a caption of one are left out."""
    if not prompts.prompts:
        return rows.select(range(min(count or len(rows), len(rows))))
    count, taken = count or len(rows), []
    found = dict.fromkeys(prompts.wordings if only_trained else prompts.first_wordings, 0)
    for number, keys in enumerate(caption_keys(rows, list(prompts.first_wordings))):
        wanted = found.keys() & set(keys)
        if any(found[key] < count for key in wanted):
            taken.append(number)
            for key in wanted:
                found[key] += 1
    return rows.select(taken)
