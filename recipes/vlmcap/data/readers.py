"""How each corpus is read and split: functions of PublishArguments that return `CorpusRows`, named in `corpora`."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmcap.data import clean, sources, splits, titles
from vlmcap.data.arguments import PublishArguments
from vlmcap.data.corpora import CORPORA
from vlmcap.data.errors import DataError
from vlmcap.data.picture_files import Picture
from vlmcap.data.sources import SourceFile

DRAWN = 5_000  # validation and test images each, as in Karpathy's splits


@dataclass
class CorpusRows:
    """A corpus as read: rows not yet cleaned, by split, and where they come from.

    `overlap` says, of the splits as they are published, what is known of images that YJ Captions has too. `more` goes
    into the report as it is. `pictures`: image id -> picture, where the reader knows; None: they are looked for in
    --images, by file_name. `embed`: whether they go into the dataset without --images too. `license`: of corpora that
    were joined; None: `find_license` knows.
    """

    by_split: dict[str, list[dict]]
    split_origin: str
    overlap: Callable[[dict[str, list[dict]]], str]
    files: list[SourceFile]
    yj_files: list[SourceFile] = field(default_factory=list)
    more: dict = field(default_factory=dict)
    pictures: dict[int | str, Picture] | None = None
    embed: bool = False
    license: str | None = None


def find_license(args: PublishArguments, source: str, files: list[SourceFile]) -> str:
    """--license, else the Creative Commons licence that the annotation files state, else the release's.

    Raises DataError when the files state several.
    """
    if args.license:
        return args.license
    stated = {
        "-".join(re.split("[ -]", found[0].lower())): file.name
        for file in files
        if (found := re.search(r"CC[ -]BY(-(NC|ND|SA))*[ -]\d\.\d", file.license))
    }
    if len(stated) > 1:
        raise DataError(f"The annotation files state different licences ({stated}). Say which it is with --license.")
    return next(iter(stated), CORPORA[source].license)


# STAIR Captions ----------------------------------------------------------------------------------------------------
def read_stair(args: PublishArguments) -> CorpusRows:
    rows, files = read_or_download("stair", args.annotations, args.latest_archives)
    yj_rows, yj_files = read_or_download("yj", args.yj_annotations, args.latest_archives)
    yj_ids = {row["image_id"] for row in yj_rows}
    splits.flag_yj(rows, yj_ids)
    held_out, origin = held_out_or_drawn(args, rows)
    splits.check_yj_overlap(yj_ids, *held_out)

    def overlap(by_split: dict[str, list[dict]]) -> str:
        flagged = sum(row["in_yj"] for row in by_split["train"])
        text = (
            f"{flagged:,} of the {len(by_split['train']):,} training images are also in YJ Captions (in_yj is true); "
            "no validation or test image is."
        )
        return text + _incomplete_yj(len(yj_rows))

    return CorpusRows(splits.split_rows(rows, *held_out), origin, overlap, files, yj_files)


# YJ Captions -------------------------------------------------------------------------------------------------------
def read_yj(args: PublishArguments) -> CorpusRows:
    rows, files = read_or_download("yj", args.annotations, args.latest_archives)
    held_out, origin = _held_out_ids(args)
    text = "Not compared with the validation and test images of STAIR Captions in this build."
    if held_out:
        splits.check_yj_overlap({row["image_id"] for row in rows}, *held_out)
        text = (
            f"None of the {len(rows):,} images is among the {len(held_out[0]):,} validation and {len(held_out[1]):,} "
            f"test images of {origin}."
        )
    return CorpusRows({"test": rows}, "one held-out test split", lambda by_split: text, files)


# COCO Captions -----------------------------------------------------------------------------------------------------
def read_coco(args: PublishArguments) -> CorpusRows:
    rows, files = sources.read_rows(args.annotations, "coco")
    yj_rows, yj_files = sources.read_rows(args.yj_annotations, "yj") if args.yj_annotations else ([], [])
    if yj_rows:
        splits.flag_yj(rows, {row["image_id"] for row in yj_rows})
    held_out, origin = held_out_or_drawn(args, rows)
    return CorpusRows(splits.split_rows(rows, *held_out), origin, yj_counts(yj_rows), files, yj_files)


# UIT-ViIC ----------------------------------------------------------------------------------------------------------
def read_uit_viic(args: PublishArguments) -> CorpusRows:
    """The official files, by train, val or test in their names; of a training file alone, a seeded share is test."""
    names = {"train": "train", "val": "validation", "test": "test"}
    by_split, files, place = {}, [], {}
    for path in args.annotations:
        found = [split for part, split in names.items() if part in Path(path).name]
        if len(found) != 1 or found[0] in by_split:
            raise DataError(
                f"{path}: the name of the file must say which split it is, by one of train, val and test, and each "
                "split has one file."
            )
        rows, read = sources.read_rows([path], "uit_viic")
        for caption_id in (id for row in rows for id in row["caption_ids"]):
            if caption_id in place:
                raise DataError(f"{path}: annotation id {caption_id} is also in {place[caption_id]}. Ids are unique.")
            place[caption_id] = Path(path).name
        by_split[found[0]] = rows
        files += read
    if len(by_split) == len(names):
        by_split = {split: by_split[split] for split in names.values()}
        origin = "those of the three annotation files"
    elif set(by_split) == {"train"}:
        shares = {"test": args.holdout}
        by_split = splits.draw_shares(by_split["train"], shares, args.seed, key=lambda row: row["image_id"])
        origin = (
            f"{args.holdout:.0%} of the images of the training file, drawn by this build (seed {args.seed}), are the "
            "test split: scores on it do not compare with scores on the official test file"
        )
    else:
        raise DataError(
            f"--annotations: files of {', '.join(by_split)}. Give the three official files, or the training file "
            "alone."
        )
    yj_rows, yj_files = sources.read_rows(args.yj_annotations, "yj") if args.yj_annotations else ([], [])
    if yj_rows:
        for rows in by_split.values():
            splits.flag_yj(rows, {row["image_id"] for row in yj_rows})
    return CorpusRows(by_split, origin, yj_counts(yj_rows), files, yj_files)


# Dish titles -------------------------------------------------------------------------------------------------------
def read_food_titles(args: PublishArguments) -> CorpusRows:
    """The CSV, 80/10/10 by default; dishes of the same title stay in one split."""
    if len(args.annotations) > 1:
        raise DataError(f"--annotations: {len(args.annotations)} files; the titles are one CSV.")
    rows, left_out, file = titles.read_titles(args.annotations[0], args.images)
    shares = {"validation": args.holdout, "test": args.holdout}
    # The key is of the clean title: what cleaning makes equal must not be separated.
    by_split = splits.draw_shares(rows, shares, args.seed, key=_title_key)
    counts = Counter(row["rule"] for row in left_out)
    rules = dict(titles.ROW_RULES)
    if not args.images:
        del rules["no_image_file"]
    report = {
        "rules": [{"name": name, "description": text, "count": counts[name]} for name, text in rules.items()],
        "rows": left_out,
    }
    kept = 1 - 2 * args.holdout
    origin = (
        f"{kept:.0%} / {args.holdout:.0%} / {args.holdout:.0%} of the rows, drawn by this build (seed {args.seed}); "
        "rows of the same title stay in one split"
    )
    return CorpusRows(
        by_split, origin, lambda by_split: "None: the photographs are not COCO's.", [file], more={"left_out": report}
    )


def _title_key(row: dict) -> str:
    return clean.duplicate_key(clean.clean_text(row["captions"][0], titles.TEXT_RULES))


def read_or_download(source: str, annotations: list[str] | None, latest: bool) -> tuple[list[dict], list[SourceFile]]:
    if annotations:
        return sources.read_rows(annotations, source)
    path, url = sources.download_archive(source, latest)
    rows, files = sources.read_rows([path], source)
    return rows, [replace(file, name=url) for file in files]


def held_out_or_drawn(args: PublishArguments, rows: list[dict]) -> tuple[tuple[list[int], list[int]], str]:
    """((validation ids, test ids), where they come from): of the lists given, or drawn from the rows."""
    held_out, origin = _held_out_ids(args)
    if held_out:
        return held_out, origin
    sizes = [DRAWN if size is None else int(size) for size in (args.val_size, args.test_size)]
    origin = (
        f"a Karpathy-style partition drawn by this build (seed {args.seed}), not Karpathy's own: scores on it do "
        "not compare with scores on the Karpathy splits"
    )
    return splits.draw_ids(rows, *sizes, args.seed), origin


def _held_out_ids(args: PublishArguments) -> tuple[tuple[list[int], list[int]] | None, str]:
    """((validation ids, test ids), where they come from) of the lists given, or (None, "")."""
    if args.karpathy:
        held_out, lists = splits.read_karpathy(args.karpathy), Path(args.karpathy).name
    elif args.val_ids:
        held_out = splits.read_ids(args.val_ids), splits.read_ids(args.test_ids)
        lists = f"{Path(args.val_ids).name} and {Path(args.test_ids).name}"
    else:
        return None, ""
    if splits.is_karpathy(*held_out):
        return held_out, f"the Karpathy splits (image ids from {lists})"
    return held_out, f"the image ids in {lists}, which are not the Karpathy splits"


def yj_counts(yj_rows: list[dict]) -> Callable[[dict[str, list[dict]]], str]:
    """The text of `CorpusRows.overlap` from the column in_yj, where a build can do without YJ Captions."""

    def overlap(by_split: dict[str, list[dict]]) -> str:
        if not yj_rows:
            return "Not compared with YJ Captions in this build: `in_yj` is empty."
        counts = ", ".join(f"{sum(row['in_yj'] for row in rows):,} of {split}" for split, rows in by_split.items())
        return f"Also in YJ Captions (in_yj is true): {counts}.{_incomplete_yj(len(yj_rows))}"

    return overlap


def _incomplete_yj(images: int) -> str:
    release = CORPORA["yj"].images
    if images == release:
        return ""
    return (
        f" The YJ file given to the build names {images:,} images, the release has {release:,}: in_yj covers the "
        "images named only."
    )
