"""Several corpora of COCO's photographs as one: an image is one row, with the captions of all, by COCO's image id.

Every corpus keeps its own splits: UIT-ViIC those of its files, YJ Captions is a test split (--yj_split), the others
those of the lists (Karpathy's, or drawn). An image that one corpus tests or validates on and another one trains on
stops the build; with --drop_held_out it is held out, with the captions of the corpora that hold it out alone. So the
test captions of each language are those of its own corpus, and no picture of them is trained on.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name

from transformers import PreTrainedTokenizerFast

from vlmcap.data import own, sources, splits
from vlmcap.data.arguments import PublishArguments
from vlmcap.data.clean import CaptionCleaner
from vlmcap.data.corpora import CORPORA
from vlmcap.data.errors import DataError
from vlmcap.data.images import is_plain_path
from vlmcap.data.keys import parse_key
from vlmcap.data.picture_files import COCO_NAME
from vlmcap.data.readers import (
    CorpusRows,
    find_license,
    held_out_or_drawn,
    read_or_download,
    read_uit_viic,
    yj_counts,
)
from vlmcap.data.sources import SourceFile
from vlmcap.errors import notice

HELD_OUT_FIRST = ("test", "validation", "train")  # an image is in the first of these that a corpus puts it into


@dataclass
class Part:
    """A corpus to join: its rows, and the split of each image id; None: the lists say that.

    `name`: in messages and in the report. `source`: of CORPORA. `key`: LANGUAGE or LANGUAGE/STYLE of its captions.
    """

    name: str
    source: str
    key: str
    rows: list[dict]
    files: list[SourceFile]
    splits: dict[int, str] | None = None
    origin: str = ""
    left_out: Counter = field(default_factory=Counter)  # images and captions, because others hold the image out


def key_name(language: str, style: str) -> str:
    return f"{language}/{style}" if style else language


def parts_of(args: PublishArguments) -> dict[str, tuple[str, str]]:
    """Name -> (source, key) of what --corpora and --own_key name, in their order."""
    parts = {}
    for source in args.corpora:
        facts = CORPORA[source]
        if source == "own":
            parts |= {f"own {key}": (source, key_name(*parse_key(key))) for key in args.own_key}
        else:
            parts[source] = (source, key_name(facts.language, facts.style))
    return parts


def read_multi(args: PublishArguments) -> CorpusRows:
    """Reads the corpora and joins their rows, which hold, instead of captions, the rows of each corpus in "parts".

    Raises DataError as the readers of the corpora do; on images in different splits of different corpora, without
    --drop_held_out; on one id for two photographs.
    """
    parts = [_read(name, source, key, args) for name, (source, key) in parts_of(args).items()]
    yj_rows, yj_files = next(((part.rows, []) for part in parts if part.source == "yj"), ([], []))
    if args.yj_annotations and "yj" not in args.corpora:
        yj_rows, yj_files = sources.read_rows(args.yj_annotations, "yj")
    yj_ids = {row["image_id"] for row in yj_rows}
    listed, origin = _listed_splits(args, parts, yj_ids)
    by_split = _join(parts, listed, args.drop_held_out)
    for row in (row for rows in by_split.values() for row in rows):
        row["in_yj"] = row["image_id"] in yj_ids if yj_ids else None
    licenses = {part.name: find_license(args, part.source, part.files) for part in parts}
    origins = defaultdict(list)
    for part in parts:
        origins[part.origin or origin].append(part.name)
    return CorpusRows(
        by_split,
        "each corpus keeps its own. " + ". ".join(f"{', '.join(of)}: {text}" for text, of in origins.items()),
        lambda by_split: yj_counts(yj_rows)(by_split) + _untrained_yj(by_split),
        [file for part in parts for file in part.files],
        yj_files,
        more={"corpora": [_report(part, by_split, licenses[part.name]) for part in parts]},
        license=licenses[parts[0].name] if len(set(licenses.values())) == 1 else CORPORA["multi"].license,
    )


def _untrained_yj(by_split: dict[str, list[dict]]) -> str:
    if not any(row["in_yj"] for row in by_split.get("train", ())):
        return ""
    return " The recipes leave these images out of training unless include_yj_images is true."


def _report(part: Part, by_split: dict[str, list[dict]], license: str) -> dict:
    counts = {}
    for split, rows in by_split.items():
        captions = [len(row["parts"][part.name]["captions"]) for row in rows if part.name in row["parts"]]
        counts[split] = {"images": len(captions), "captions": sum(captions)}
    return {
        "name": part.name,
        "source": part.source,
        "title": CORPORA[part.source].title,
        "key": part.key,
        "license": license,
        "splits": counts,
        "left_out": {"images": part.left_out["images"], "captions": part.left_out["captions"]},
    }


# The corpora ---------------------------------------------------------------------------------------------------------
def _read(name: str, source: str, key: str, args: PublishArguments) -> Part:
    if source == "own":
        number = args.own_key.index(key)
        return Part(name, source, key, *_read_own(args.own_annotations[number], parse_key(key)[0], args))
    files = getattr(args, f"{source}_annotations")
    if source == "uit_viic":
        read = read_uit_viic(replace(args, annotations=files, yj_annotations=None))
        return _with_splits(Part(name, source, key, [], read.files), read.by_split, read.split_origin)
    if not CORPORA[source].archive:
        return Part(name, source, key, *sources.read_rows(files, source))
    part = Part(name, source, key, *read_or_download(source, files, args.latest_archives))
    if source == "yj" and args.yj_split == "test":
        return _with_splits(part, {"test": part.rows}, "one held-out test split")
    if source == "yj" and args.yj_split == "drawn":
        shares = {"validation": args.holdout, "test": args.holdout}
        drawn = splits.draw_shares(part.rows, shares, args.seed, key=lambda row: row["image_id"])
        return _with_splits(part, drawn, f"{args.holdout:.0%} for validation and for test, drawn (seed {args.seed})")
    return part


def _with_splits(part: Part, by_split: dict[str, list[dict]], origin: str) -> Part:
    splits.check_disjoint(by_split)
    part.rows = [row for rows in by_split.values() for row in rows]
    part.splits = {row["image_id"]: split for split, rows in by_split.items() for row in rows}
    part.origin = origin
    return part


def _read_own(annotations: str, language: str, args: PublishArguments) -> tuple[list[dict], list[SourceFile]]:
    """One's own captions of COCO's images, a row an image."""
    known = CORPORA["own"].languages
    given = Path(annotations)
    entries = own.read_entries(given, replace(args, language=language if language in known else "none"))
    rows: dict[int, dict] = {}
    number = 0
    for entry in (entry for entry in entries if entry.captions):
        image_id, file_name = _coco_image(entry)
        row = {"image_id": image_id, "file_name": file_name, "coco_url": sources.coco_url(file_name), "license": ""}
        row = rows.setdefault(image_id, row | {"captions": [], "caption_ids": []})
        if not _same_photograph(row["file_name"], file_name):
            raise DataError(f"{entry.place}: image {image_id} is {file_name}, and {row['file_name']} before.")
        row["captions"] += entry.captions
        row["caption_ids"] += range(number + 1, number + len(entry.captions) + 1)
        number += len(entry.captions)
    if not rows:
        raise DataError(f"{annotations}: no caption of a picture. See recipes/README.md, Your own data.")
    if without := sum(not entry.captions for entry in entries):
        notice(f"{annotations}: {without:,} of {len(entries):,} rows have no caption or no picture, and are left out")
    return [rows[image_id] for image_id in sorted(rows)], [own.source_file(given, list(rows.values()))]


def _coco_image(entry: own.Entry) -> tuple[int, str]:
    """(COCO's number, name of the file) of what a place says of a picture."""
    name = Path(entry.name.replace("\\", "/")).name
    found = COCO_NAME.fullmatch(name)
    image_id = str(entry.image_id) if entry.image_id is not None else found[1].removesuffix(".jpg") if found else ""
    if not image_id.isdecimal() or len(image_id) > 18:
        raise DataError(
            f"{entry.place}: image_id {entry.image_id!r:.100} and picture {entry.name!r:.100} name no image of COCO."
            " Corpora are joined by COCO's image ids: give them as image_id, or give COCO's names of files."
        )
    file_name = name if found else entry.name
    if not is_plain_path(file_name):
        raise DataError(f"{entry.place}: the picture {file_name!r:.200} is not a path below a folder. Rename it.")
    return int(image_id), file_name


# Splits --------------------------------------------------------------------------------------------------------------
def _listed_splits(args: PublishArguments, parts: list[Part], yj_ids: set[int]) -> tuple[dict[int, str], str]:
    """(image id -> split by the lists given, or by those drawn from the corpora without splits of their own; where the
    lists come from)."""
    followers = [part for part in parts if part.splits is None]
    lists = bool(args.karpathy or args.val_ids)
    if not followers and not lists:
        return {}, ""
    rows = {}
    for row in (row for part in (parts if lists else followers) for row in part.rows):
        rows.setdefault(row["image_id"], row | {"in_yj": row["image_id"] in yj_ids})
    rows = [rows[image_id] for image_id in sorted(rows)]
    held_out, origin = held_out_or_drawn(args, rows)
    by_split = splits.split_rows(rows, *held_out)
    return {row["image_id"]: split for split, members in by_split.items() for row in members}, origin


def _join(parts: list[Part], listed: dict[int, str], drop_held_out: bool) -> dict[str, list[dict]]:
    """Rows by split, in the order of their ids; {"parts": {name of the part: its row}} instead of captions."""
    found: dict[int, dict[str, list[tuple[Part, dict]]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        place = listed if part.splits is None else part.splits
        for row in part.rows:
            found[row["image_id"]][place[row["image_id"]]].append((part, row))
    conflicts = [image_id for image_id in sorted(found) if len(found[image_id]) > 1]
    if conflicts and not drop_held_out:
        raise DataError(_conflicts_text({image_id: found[image_id] for image_id in conflicts}))
    by_split = {split: [] for split in reversed(HELD_OUT_FIRST)}
    for image_id in sorted(found):
        members = [(part, row) for of_split in found[image_id].values() for part, row in of_split]
        split = next(split for split in HELD_OUT_FIRST if split in found[image_id])
        by_split[split].append(_joined(members, [part.name for part, _ in found[image_id][split]]))
        for part, row in members:
            if part.name not in by_split[split][-1]["parts"]:
                part.left_out.update(images=1, captions=len(row["captions"]))
    return {split: rows for split, rows in by_split.items() if rows}


def _joined(members: list[tuple[Part, dict]], kept: list[str]) -> dict:
    """One row of the rows of an image. The first corpus names its file; where it does not know a licence, another."""
    (part, first), *others = members
    for other, row in others:
        if not _same_photograph(first["file_name"], row["file_name"]):
            raise DataError(
                f"Image id {first['image_id']} is {first['file_name']} in {part.name} and {row['file_name']} in"
                f" {other.name}. Corpora are joined by COCO's image ids: one id must be one photograph."
            )
    row = {name: first[name] for name in ("image_id", "file_name", "coco_url")}
    row["license"] = next((row["license"] for _, row in members if row["license"]), "")
    return row | {"parts": {part.name: row for part, row in members if part.name in kept}}


def _same_photograph(first: str, second: str) -> bool:
    """COCO 2014 and COCO 2017 name the same photograph in two ways."""
    numbers = [found and found[1] for found in map(COCO_NAME.fullmatch, (first, second))]
    return first == second or None not in numbers and numbers[0] == numbers[1]


def _conflicts_text(conflicts: dict[int, dict[str, list[tuple[Part, dict]]]]) -> str:
    pairs = defaultdict(list)
    for image_id, found in conflicts.items():
        places = [(split, part.name) for split in HELD_OUT_FIRST for part, _ in found.get(split, ())]
        for (held, holder), (split, other) in itertools.combinations(places, 2):
            if split != held == places[0][0]:
                pairs[f"{held} of {holder}, {split} of {other}"].append(image_id)
    lines = [f"  {pair}: {len(ids):,} images ({splits.some(ids)})" for pair, ids in pairs.items()]
    return (
        f"{len(conflicts):,} images are in different splits of different corpora:\n" + "\n".join(lines) + "\n"
        "What one corpus tests or validates on must not be trained on. Add --drop_held_out: then such an image is in"
        " the test (or else the validation) split, with the captions of the corpora that hold it out alone."
    )


# Cleaning ------------------------------------------------------------------------------------------------------------
class JoinedCleaner:
    """Cleans the captions of each corpus by its own rules; used as `CaptionCleaner` is, with rows of `read_multi`."""

    def __init__(self, args: PublishArguments, tokenizer: PreTrainedTokenizerFast, max_tokens: int):
        self._counts = Counter()
        self._keys, self._cleaners = {}, {}
        own_rules = CORPORA["own"].languages
        for name, (source, key) in parts_of(args).items():
            language, style = self._keys[name] = parse_key(key)
            rules = own_rules.get(language, own_rules["none"]) if source == "own" else CORPORA[source].rules
            self._cleaners[name] = CaptionCleaner(tokenizer, max_tokens, rules=resolve_name(rules))
        self.max_tokens = max_tokens
        self.tokenizer_name = self._cleaners[name].tokenizer_name

    def clean(self, rows: list[dict], desc: str) -> list[dict]:
        """Rows with the columns captions, caption_ids, languages and styles instead of "parts"."""
        cleaned = [
            {name: value for name, value in row.items() if name != "parts"}
            | {"captions": [], "caption_ids": [], "languages": [], "styles": []}
            for row in rows
        ]
        places = {row["image_id"]: row for row in cleaned}
        for part, cleaner in self._cleaners.items():
            language, style = self._keys[part]
            of_parts = [row["parts"][part] for row in rows if part in row["parts"]]
            for of_part in cleaner.clean(of_parts, f"{desc}, {part}"):
                row, count = places[of_part["image_id"]], len(of_part["captions"])
                row["captions"] += of_part["captions"]
                row["caption_ids"] += of_part["caption_ids"]
                row["languages"] += [language] * count
                row["styles"] += [style] * count
        kept = [row for row in cleaned if row["captions"]]
        self._counts.update(images_in=len(rows), images_out=len(kept))
        return kept

    def report(self) -> dict:
        """As `CaptionCleaner.report`; every rule is named with its corpus."""
        reports = {part: cleaner.report() for part, cleaner in self._cleaners.items()}
        return {
            "tokenizer": self.tokenizer_name,
            "max_tokens": self.max_tokens,
            "images_in": self._counts["images_in"],
            "images_out": self._counts["images_out"],
            **{key: sum(of[key] for of in reports.values()) for key in ("captions_in", "captions_out")},
            "rules": [
                rule | {"name": f"{part}: {rule['name']}"} for part, of in reports.items() for rule in of["rules"]
            ],
        }


# What a dataset holds ------------------------------------------------------------------------------------------------
def key_counts(by_split: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, int]]]:
    """{key: {split: {"images", "captions"}}} of cleaned rows."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for split, rows in by_split.items():
        for row in rows:
            for key, captions in Counter(_keys(row)).items():
                of_split = counts.setdefault(key, {split: {"images": 0, "captions": 0} for split in by_split})[split]
                of_split["images"] += 1
                of_split["captions"] += captions
    return counts


def shared_images(by_split: dict[str, list[dict]], keys: Iterable[str]) -> list[dict]:
    """[{"keys": two of them, "splits": {split: images with captions of both}}] of cleaned rows."""
    counts = {split: Counter() for split in by_split}
    for split, rows in by_split.items():
        for row in rows:
            counts[split].update(map(frozenset, itertools.combinations(set(_keys(row)), 2)))
    return [
        {"keys": list(pair), "splits": {split: counts[split][frozenset(pair)] for split in by_split}}
        for pair in itertools.combinations(keys, 2)
    ]


def _keys(row: dict) -> list[str]:
    return [key_name(language, style) for language, style in zip(row["languages"], row["styles"], strict=True)]
