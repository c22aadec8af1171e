"""Settings of a build of a dataset. Imports nothing heavy: command lines are read with it."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from vlmcap.data.corpora import CORPORA, Corpus, taken_by
from vlmcap.data.errors import DataError


def _names(has: Callable[[Corpus], object]) -> str:
    """The corpora of which something is true, for a help text."""
    return " and ".join(name for name, corpus in CORPORA.items() if has(corpus))


def _of_some(option: str, text: str) -> dict[str, str]:
    """The help of a setting that not all corpora have."""
    return {"help": f"{', '.join(taken_by(option))}: {text}"}


@dataclass
class PublishArguments:
    """What to build, from which files, and where to; `build.publish` does it."""

    source: Literal[*CORPORA] = field(
        metadata={"help": "Caption corpus; `publish_datasets.py uit_viic ...` is the same as --source uit_viic."}
    )
    output_dir: str = field(metadata={"help": "Folder to write the dataset to; load_dataset(FOLDER) reads it."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the model's tokenizer, for the length limit. "
            f"{_names(lambda corpus: 'tokenizer' in corpus.needs)} need it; the others can do without: then lengths "
            "are counted in words and nothing is cut."
        },
    )
    annotations: list[str] | None = field(
        default=None,
        metadata={
            "help": "Annotation files: COCO-format .json, official .tar.gz or .zip; for food_titles the CSV; for "
            "own a folder, a table, or the id of a dataset. "
            f"Default for {_names(lambda corpus: corpus.archive)}: download them."
        },
    )
    images: str | None = field(
        default=None,
        metadata={
            "help": "Folder or zip file of the photographs (directly; also in COCO's folders train2014/, val2014/, "
            "train2017/, val2017/, or its zip files), which are then embedded in the dataset; without it the dataset "
            "holds no pictures."
        },
    )
    karpathy: str | None = field(
        default=None,
        metadata=_of_some("karpathy", "Karpathy's dataset_coco.json, which names the validation and test images."),
    )
    val_ids: str | None = field(
        default=None, metadata=_of_some("val_ids", "file of validation image ids, one a line.")
    )
    test_ids: str | None = field(default=None, metadata=_of_some("test_ids", "file of test image ids, one a line."))
    val_size: float | None = field(
        default=None,
        metadata=_of_some(
            "val_size",
            "validation images to draw, for stair when no ids are given; for own also their share, e.g. 0.1. "
            "Default: 5000; of own a tenth.",
        ),
    )
    test_size: float | None = field(
        default=None, metadata=_of_some("test_size", "test images to draw, as val_size. own takes 0, no such split.")
    )
    holdout: float = field(
        default=0.1,
        metadata=_of_some(
            "holdout",
            "share of the images drawn as the test split: of uit_viic with the training file alone; of food_titles, "
            "and as many for validation.",
        ),
    )
    seed: int = field(default=0, metadata={"help": "Seed of whatever is drawn."})
    yj_annotations: list[str] | None = field(
        default=None,
        metadata=_of_some(
            "yj_annotations",
            "the YJ Captions files, for the in_yj column. Default for stair: download them; for uit_viic the column "
            "then stays empty.",
        ),
    )
    latest_archives: bool = field(
        default=False,
        metadata=_of_some(
            "latest_archives",
            "download the archives as their repositories hold them today. Without it the known ones are downloaded, "
            "and compared with their git blob ids.",
        ),
    )
    language: Literal["ja", "en", "vi", "none"] | None = field(
        default=None,
        metadata=_of_some("language", "of the captions; it chooses the cleaning rules. none: rules for any language."),
    )
    image_column: str | None = field(
        default=None, metadata=_of_some("image_column", "column of the picture. Default: one with a usual name.")
    )
    caption_column: list[str] | None = field(
        default=None, metadata=_of_some("caption_column", "columns of captions. Default: one with a usual name.")
    )
    author: str | None = field(default=None, metadata=_of_some("author", "who made the dataset, for its card."))
    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Captions are cut to this many tokens of the tokenizer. Default: 64 for "
            f"{_names(lambda corpus: corpus.max_tokens)}; for the others what 99.9%% of the training captions keep "
            "to, rounded up to a multiple of 8."
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
            f"files states, else the release's: {', '.join(f'{c.license} for {name}' for name, c in CORPORA.items())}."
        },
    )
    card: str | None = field(
        default=None, metadata={"help": "Card template CARD_captions.md.j2 in dataset_cards/. Default: by source."}
    )
    pretty_name: str | None = field(default=None, metadata={"help": "Title of the card. Default: by source."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the folder to the Hub as well."})
    repo_id: str | None = field(default=None, metadata={"help": "Hub dataset to push to, e.g. user/stair-captions."})
    public: bool = field(default=False, metadata={"help": "Create the Hub dataset as a public one."})


def facts(args: PublishArguments) -> Corpus:
    """The entry of the corpus, with the language and the rules that were asked for where it has several."""
    corpus = CORPORA[args.source]
    if not corpus.languages:
        return corpus
    language = "" if args.language == "none" else args.language
    # Spaces separate no Japanese words: nothing to count.
    return replace(corpus, language=language, rules=corpus.languages[args.language], lengths=language != "ja")


def check_arguments(args: PublishArguments) -> None:
    """Raises DataError on arguments that the corpus needs or has no use for."""
    corpus = CORPORA[args.source]
    if args.push_to_hub and not args.repo_id:
        raise DataError("--push_to_hub needs --repo_id USER/NAME.")
    if args.karpathy and (args.val_ids or args.test_ids):
        raise DataError("Give --karpathy or --val_ids and --test_ids, not both.")
    if bool(args.val_ids) != bool(args.test_ids):
        raise DataError("--val_ids and --test_ids go together.")
    for option in fields(args):
        takers = taken_by(option.name)
        if takers and args.source not in takers and getattr(args, option.name) != option.default:
            raise DataError(
                f"--{option.name} has no meaning with --source {args.source}: it goes with {' and '.join(takers)}."
            )
    for option, example in corpus.needs.items():
        if not getattr(args, option):
            raise DataError(f"--source {args.source} needs --{option}, e.g. --{option} {example}.")
    if not args.annotations and not corpus.archive:
        raise DataError(f"--source {args.source} needs --annotations: {corpus.annotations}.")
    own = args.source == "own"
    for option in ("val_size", "test_size"):
        size = getattr(args, option)
        if size is not None and not float(size).is_integer() and not (own and 0 < size < 1):
            share = ", or their share, between 0 and 1" if own else ""
            raise DataError(f"--{option} {size:g}: expected a number of images{share}.")
    if not 0 < args.holdout < 0.5:
        raise DataError(f"--holdout {args.holdout}: expected a share between 0 and 0.5.")
