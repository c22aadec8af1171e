"""Settings of a build of a dataset. Imports nothing heavy: command lines are read with it."""

from dataclasses import dataclass, field
from typing import Literal

from vlmcap.errors import UserError


class DataError(UserError):
    """The data cannot be built as asked; the message names the file, the value and the fix."""


@dataclass
class PublishArguments:
    """What to build, from which files, and where to; `build.publish` does it."""

    source: Literal["stair", "yj", "uit_viic", "food_titles"] = field(
        metadata={"help": "Caption corpus; `publish_datasets.py uit_viic ...` is the same as --source uit_viic."}
    )
    output_dir: str = field(metadata={"help": "Folder to write the dataset to; load_dataset(FOLDER) reads it."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the model's tokenizer, for the length limit. uit_viic and food_titles can do "
            "without: then lengths are counted in words and nothing is cut."
        },
    )
    annotations: list[str] | None = field(
        default=None,
        metadata={
            "help": "Annotation files: COCO-format .json, official .tar.gz or .zip; for food_titles the CSV. Default "
            "for stair and yj: download them."
        },
    )
    images: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the photographs (directly; COCO's also in train2014/ and val2014/, for uit_viic in "
            "train2017/), which are then embedded in the dataset; without it the dataset holds no pictures."
        },
    )
    karpathy: str | None = field(
        default=None,
        metadata={"help": "stair, yj: Karpathy's dataset_coco.json, which names the validation and test images."},
    )
    val_ids: str | None = field(
        default=None, metadata={"help": "stair, yj: file of validation image ids, one a line."}
    )
    test_ids: str | None = field(default=None, metadata={"help": "stair, yj: file of test image ids, one a line."})
    val_size: int = field(default=5000, metadata={"help": "stair: validation images to draw when no ids are given."})
    test_size: int = field(default=5000, metadata={"help": "stair: test images to draw when no ids are given."})
    holdout: float = field(
        default=0.1,
        metadata={
            "help": "uit_viic with the training file alone: share of its images drawn as the test split. food_titles: "
            "share of validation and of test each."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of whatever is drawn."})
    yj_annotations: list[str] | None = field(
        default=None,
        metadata={
            "help": "stair, uit_viic: the YJ Captions files, for the in_yj column. Default for stair: download them; "
            "for uit_viic the column then stays empty."
        },
    )
    latest_archives: bool = field(
        default=False,
        metadata={
            "help": "stair, yj: download the archives as their repositories hold them today. Without it the known "
            "ones are downloaded, and compared with their git blob ids."
        },
    )
    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Captions are cut to this many tokens of the tokenizer. Default: 64 for stair and yj; for the "
            "others what 99.9%% of the training captions keep to, rounded up to a multiple of 8."
        },
    )
    skip_bad_images: bool = field(
        default=False,
        metadata={"help": "Leave out missing and unreadable photographs (listed in the report) instead of stopping."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the dataset that output_dir holds."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the captions, as the Hub writes it. Default: the one that `info` of the annotation "
            "files states, else the release's: cc-by-4.0 for stair and yj, unknown for uit_viic, cc-by-sa-3.0 for "
            "food_titles."
        },
    )
    card: str | None = field(
        default=None, metadata={"help": "Card template CARD_captions.md.j2 in dataset_cards/. Default: by source."}
    )
    pretty_name: str | None = field(default=None, metadata={"help": "Title of the card. Default: by source."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the folder to the Hub as well."})
    repo_id: str | None = field(default=None, metadata={"help": "Hub dataset to push to, e.g. user/stair-captions."})
    public: bool = field(default=False, metadata={"help": "Create the Hub dataset as a public one."})


def check_arguments(args: PublishArguments) -> None:
    """Raises DataError on arguments that the corpus needs or has no use for."""
    if args.push_to_hub and not args.repo_id:
        raise DataError("--push_to_hub needs --repo_id USER/NAME.")
    if args.karpathy and (args.val_ids or args.test_ids):
        raise DataError("Give --karpathy or --val_ids and --test_ids, not both.")
    if bool(args.val_ids) != bool(args.test_ids):
        raise DataError("--val_ids and --test_ids go together.")
    if args.yj_annotations and args.source not in ("stair", "uit_viic"):
        raise DataError(
            "--yj_annotations goes with --source stair or uit_viic; with --source yj the files are --annotations."
        )
    if args.latest_archives and args.source not in ("stair", "yj"):
        raise DataError("--latest_archives goes with --source stair or yj: nothing else is downloaded.")
    if args.source in ("stair", "yj"):
        if not args.tokenizer:
            raise DataError(f"--source {args.source} needs --tokenizer, e.g. --tokenizer Qwen/Qwen2-VL-2B-Instruct.")
        return
    if args.karpathy or args.val_ids:
        raise DataError(f"--karpathy, --val_ids and --test_ids have no meaning with --source {args.source}.")
    if not args.annotations:
        what = "the three files uitviic_captions_{train,val,test}2017.json, or the training file alone"
        what = what if args.source == "uit_viic" else "the CSV with the columns Image_Name and Title"
        raise DataError(f"--source {args.source} needs --annotations: {what}. This script does not download them.")
    if not 0 < args.holdout < 0.5:
        raise DataError(f"--holdout {args.holdout}: expected a share between 0 and 0.5.")
