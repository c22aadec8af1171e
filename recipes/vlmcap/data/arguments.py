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
            "and of YJ's with --yj_split drawn, and as many for validation.",
        ),
    )
    seed: int = field(default=0, metadata={"help": "Seed of whatever is drawn."})
    yj_annotations: list[str] | None = field(
        default=None,
        metadata=_of_some(
            "yj_annotations",
            "the YJ Captions files, for the in_yj column; multi joins them. Default for stair, and for multi with yj: "
            "download them; for the others the column then stays empty.",
        ),
    )
    corpora: list[str] | None = field(
        default=None,
        metadata=_of_some(
            "corpora", f"what to join, in this order, of {', '.join(CORPORA['multi'].joins)}; an image is one row."
        ),
    )
    stair_annotations: list[str] | None = field(
        default=None, metadata=_of_some("stair_annotations", "the files of STAIR Captions. Default: download them.")
    )
    coco_annotations: list[str] | None = field(
        default=None,
        metadata=_of_some("coco_annotations", "COCO's captions_*.json, English, of 2014 or 2017."),
    )
    uit_viic_annotations: list[str] | None = field(
        default=None, metadata=_of_some("uit_viic_annotations", "the files of UIT-ViIC, as its own --annotations.")
    )
    own_annotations: list[str] | None = field(
        default=None,
        metadata=_of_some(
            "own_annotations",
            "captions of COCO's images in other languages or styles, each in a form that own reads; image_id, or else "
            "the name of the picture, is COCO's.",
        ),
    )
    own_key: list[str] | None = field(
        default=None,
        metadata=_of_some("own_key", "language or language/style of each of own_annotations, e.g. en/alt or de."),
    )
    yj_split: Literal["test", "lists", "drawn"] = field(
        default="test",
        metadata=_of_some(
            "yj_split",
            "what YJ's images are. test: all are a test split; lists: what the lists say, so that nearly all train; "
            "drawn: a share (--holdout) validation, as many test, the others train.",
        ),
    )
    drop_held_out: bool = field(
        default=False,
        metadata=_of_some(
            "drop_held_out",
            "of an image that some corpora hold out and others train on, keep the captions of the former, in the held-"
            "out split, instead of stopping.",
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
    if corpus.joins:
        _check_joined(args, corpus)
    elif not args.annotations and not corpus.archive:
        raise DataError(f"--source {args.source} needs --annotations: {corpus.annotations}.")
    own = args.source == "own"
    for option in ("val_size", "test_size"):
        size = getattr(args, option)
        if size is not None and not float(size).is_integer() and not (own and 0 < size < 1):
            share = ", or their share, between 0 and 1" if own else ""
            raise DataError(f"--{option} {size:g}: expected a number of images{share}.")
    if not 0 < args.holdout < 0.5:
        raise DataError(f"--holdout {args.holdout}: expected a share between 0 and 0.5.")


def _check_joined(args: PublishArguments, corpus: Corpus) -> None:
    """Raises DataError where corpora to join are unknown, or have no files, or files are of a corpus not joined."""
    known, asked = ", ".join(corpus.joins), args.corpora
    if odd := [name for name in asked if name not in corpus.joins or asked.count(name) > 1]:
        raise DataError(f"--corpora {' '.join(asked)}: {odd[0]} is not one of {known}, or is there twice.")
    if args.annotations:
        option = f"--{asked[0]}_annotations"
        raise DataError(
            f"--annotations has no meaning with --source {args.source}: give each corpus its files, e.g. {option} "
            f"{' '.join(args.annotations)}."
        )
    for name in corpus.joins:
        files = getattr(args, f"{name}_annotations")
        if name in asked and not files and not CORPORA[name].archive:
            raise DataError(f"--corpora {name} needs --{name}_annotations: {CORPORA[name].annotations}.")
        if name not in asked and files and name != "yj":  # YJ's are for the column in_yj too
            raise DataError(f"--{name}_annotations has no meaning without {name} in --corpora.")
    if len(args.own_annotations or []) != len(args.own_key or []):
        raise DataError("--own_key needs a language, or language/style, for each of --own_annotations, e.g. en/alt.")
    if len(set(args.own_key or [])) < len(args.own_key or []):
        raise DataError(f"--own_key {' '.join(args.own_key)}: one is there twice. Join these files to one.")
    if args.yj_split != "test" and "yj" not in asked:
        raise DataError(f"--yj_split {args.yj_split} has no meaning without yj in --corpora.")
