"""One's own pictures and captions, as people have them, to rows of the usual shape.

| --annotations                                           | captions                                               |
|---------------------------------------------------------|--------------------------------------------------------|
| folder with metadata.jsonl or metadata.csv (imagefolder)| of its columns                                         |
| .csv, .tsv, .jsonl, .json (a list)                      | of its columns                                         |
| .json of COCO's form (`images`, `annotations`)          | of `annotations`                                       |
| folder of pictures x.jpg beside texts x.txt             | the lines of each text                                 |
| another folder, or an id on the Hub                     | of the columns that datasets.load_dataset finds        |

A caption column holds a text, a list of texts, or a list of records with a text in one of TEXT_FIELDS.
"""

import codecs
import csv
import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import regex
from tqdm.auto import tqdm

from vlmcap.data.arguments import PublishArguments
from vlmcap.data.errors import DataError
from vlmcap.data.images import OF_EACH, check_paths, is_plain_path, null_rows, whole_reason
from vlmcap.data.picture_files import ENDINGS, Picture, PictureFile, picture_finder
from vlmcap.data.readers import CorpusRows
from vlmcap.data.sources import SourceFile, parse_source, read_source
from vlmcap.errors import notice
from vlmcap.strict_parsing import shown

IMAGE_COLUMNS = ("file_name", "image", "image_path", "path", "filename", "file", "img")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "sentences", "sentence", "title")
TEXT_FIELDS = ("caption", "raw", "text", "sentence", "value")
METADATA = ("metadata.jsonl", "metadata.csv")
# What is left out, counted and listed; a row has one reason.
ROW_RULES = {
    "no_caption": "pictures or rows without a caption",
    "no_image_name": "rows without a picture",
    "no_picture_beside": "texts without a picture of their name",
}


@dataclass
class Entry:
    """What one place says of one picture: captions, and the name of its file or the picture itself."""

    place: str
    captions: list[str]
    name: str = ""
    image_id: int | str | None = None
    picture: Picture | None = None
    rule: str | None = None  # why it is left out


@dataclass(frozen=True)
class _InDataset:
    """A picture in a dataset that is on disk: read when it is needed."""

    rows: datasets.Dataset
    number: int
    column: str

    @property
    def size(self) -> int:
        return len(self.read())

    def read(self) -> bytes:
        cell = self.rows[self.number][self.column]
        return PictureFile(cell["path"]).read() if cell["bytes"] is None else cell["bytes"]


def read_own(args: PublishArguments) -> CorpusRows:
    """Reads what --annotations names, groups it by picture (the same id, or the same bytes) and draws the splits.

    Raises DataError on a folder or file that cannot be read, without captions or without the columns, on an id that
    two pictures have, and on sizes that leave nothing to train on.
    """
    if len(args.annotations) > 1:
        raise DataError(
            f"--annotations: {len(args.annotations)} were given; own takes one folder, file or dataset id."
        )
    given = Path(args.annotations[0])
    entries = read_entries(given, args)
    root = Path(args.images) if args.images else given if given.is_dir() else given.parent
    rows, pictures, left_out = _group(entries, root, args)
    if not rows:
        reasons = ", ".join(f"{ROW_RULES[rule]}: {count:,}" for rule, count in Counter(left_out).items())
        raise DataError(f"{given}: no picture with a caption ({reasons or 'it is empty'}). See recipes/README.md.")
    by_split, origin = _split(rows, args)
    more = {"other_language": other_language(rows, args.language)}
    if any(entry.rule for entry in entries):
        more["left_out"] = _left_out_report(entries)
    return CorpusRows(
        by_split,
        origin,
        lambda by_split: "Not compared with other datasets.",
        [source_file(given, rows)],
        more=more,
        pictures=pictures,
        embed=any(entry.picture for entry in entries),
    )


def source_file(given: Path, rows: list[dict]) -> SourceFile:
    """What was read, for the card: of a file the hash of its bytes, of anything else that of its rows."""
    total = sum(len(row["captions"]) for row in rows)
    digest = hashlib.sha256(given.read_bytes() if given.is_file() else repr(rows).encode()).hexdigest()
    return SourceFile(given.name or str(given), digest, len(rows), total, "", "")


def read_entries(given: Path, args: PublishArguments) -> list[Entry]:
    """What a folder, a file or a dataset says of its pictures, in its order; those to be left out have a `rule`.

    Raises DataError on what cannot be read, and where there are no captions or columns of captions and pictures.
    """
    if given.is_dir():
        return list(_from_folder(given, args))
    if given.is_file():
        return list(_from_file(given, args))
    return list(_from_datasets(str(given), args))


# Forms ---------------------------------------------------------------------------------------------------------------
def _from_folder(folder: Path, args: PublishArguments) -> Iterator[Entry]:
    names = list(_files_below(folder).values())
    metadata = [name for name in names if Path(name).name in METADATA]
    pictures = [name for name in names if Path(name).suffix.lower() in ENDINGS]
    texts = {str(Path(name).with_suffix("")) for name in names if name.lower().endswith(".txt")}
    if metadata:
        for name in metadata:
            for entry in _of_records(_records(folder / name, args), folder / name, args):
                entry.name = os.path.join(os.path.dirname(name), entry.name) if entry.name else ""
                yield entry
    elif any(str(Path(name).with_suffix("")) in texts for name in pictures):
        yield from _of_pairs(folder, pictures, [name for name in names if name.lower().endswith(".txt")], args)
    elif any(name.endswith((".parquet", ".arrow", ".tar")) for name in names):
        yield from _from_datasets(str(folder), args)
    else:
        tables = [name for name in names if name.lower().endswith((".csv", ".tsv", ".json", ".jsonl"))]
        hint = f" Give the file itself: --annotations {folder / tables[0]} --images {folder}." if tables else ""
        raise DataError(
            f"{folder}: {len(pictures):,} pictures and no captions that are recognised: metadata.jsonl, metadata.csv,"
            f" or x.txt beside x.jpg.{hint}"
        )


def _from_file(path: Path, args: PublishArguments) -> Iterator[Entry]:
    if path.suffix.lower() == ".json":
        document = parse_source(path, read_source(path))
        if isinstance(document, dict):
            yield from _of_coco(document, path)
            return
    yield from _of_records(_records(path, args), path, args)


def _records(path: Path, args: PublishArguments) -> Iterator[tuple[str, dict]]:
    """(place, record) of every row of a table."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _csv_records(path, _text(path, args.language), args)
        return
    if suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: not a .csv, .tsv, .json or .jsonl file, a folder, or the id of a dataset.")
    if suffix == ".json":
        values = parse_source(path, read_source(path))
        if not isinstance(values, list):
            raise DataError(f"{path}: {shown(values)}, expected a list of rows, or COCO's form.")
        found = [(f"{path}: entry {number}", value) for number, value in enumerate(values, 1)]
    else:
        lines = _text(path, args.language).split("\n")
        found = (
            (f"{path}: line {number}", parse_source(f"{path}: line {number}", line.encode()))
            for number, line in enumerate(lines, 1)
            if line.strip()
        )
    for place, value in found:
        if not isinstance(value, dict):
            raise DataError(f"{place}: {shown(value)}, expected an object with columns.")
        yield place, value


def _csv_records(path: Path, text: str, args: PublishArguments) -> Iterator[tuple[str, dict]]:
    header = text.split("\n", 1)[0]
    delimiter = max("\t" if path.suffix.lower() == ".tsv" else ",", ";", "\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        if twice := [name for name, count in Counter(columns).items() if count > 1]:
            raise DataError(f"{path}: the first line has the column {twice[0]!r:.100} twice.")
        for record in reader:
            place = f"{path}: line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(
                    f"{place}: not {len(columns)} values, as the first line has. Put a caption that holds"
                    f" {delimiter!r} or a line end in double quotes."
                )
            yield place, record
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.reader.line_num}: {error}. Write a double quote in a caption twice."
        ) from error


def _of_records(records: Iterable[tuple[str, dict]], where: object, args: PublishArguments) -> Iterator[Entry]:
    columns = None
    for place, record in records:
        if columns is None:
            columns = _columns(record, where, args)
        image, captions = columns
        name, image_id = record.get(image), record.get("image_id")
        if not isinstance(name, str | None):
            raise DataError(f"{place}: the column {image} is {shown(name)}, expected the name of a file.")
        texts = [text for column in captions for text in _texts(record.get(column), f"{place}: the column {column}")]
        yield _entry(place, texts, name=name or "", image_id=_id(image_id, place) if image != "image_id" else None)


def _columns(record: dict, where: object, args: PublishArguments) -> tuple[str, list[str]]:
    """The column of the picture and those of captions: as asked for, else the first that has a usual name."""
    image = args.image_column or next((name for name in IMAGE_COLUMNS if name in record), None)
    captions = args.caption_column or [name for name in CAPTION_COLUMNS if name in record][:1]
    for names, option in (([image] if image else [], "--image_column"), (captions, "--caption_column")):
        if not names or (missing := [name for name in names if name not in record]):
            what = f"no column {missing[0]!r}" if names else "no column with a usual name"
            raise DataError(
                f"{where}: has {what}; it has {', '.join(map(str, record))[:500]}. Say which: {option} NAME."
            )
    return image, captions


def _texts(value: object, where: str) -> list[str]:
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item, where)]
    if isinstance(value, dict):
        field = next((name for name in TEXT_FIELDS if isinstance(value.get(name), str)), None)
        if field:
            return [value[field]]
    raise DataError(f"{where} holds {shown(value)}, expected a text, texts, or records with {', '.join(TEXT_FIELDS)}.")


def _id(value: object, place: str) -> int | str | None:
    if value is None or value == "":
        return None
    if type(value) not in (int, str) or (type(value) is int and not -(2**63) <= value < 2**63):
        raise DataError(f"{place}: image_id is {shown(value)}, expected a whole number or a text.")
    return value


def _entry(place: str, captions: list[str], **facts) -> Entry:
    entry = Entry(place, [text for text in captions if text.strip()], **facts)
    if not entry.name and entry.picture is None:
        entry.rule = "no_image_name"
    elif not entry.captions:
        entry.rule = "no_caption"
    return entry


def _of_coco(document: dict, path: Path) -> Iterator[Entry]:
    """COCO's form; ids may be texts."""
    captions: dict[int | str, list[str]] = {}
    for key in ("images", "annotations"):
        if not isinstance(document.get(key), list) or not all(isinstance(entry, dict) for entry in document[key]):
            raise DataError(f"{path}: {key!r} is not a list of objects; COCO's form has `images` and `annotations`.")
    for number, image in enumerate(document["images"]):
        image_id = _id(image.get("id"), f"{path}: images[{number}]")
        if image_id is None or not isinstance(image.get("file_name"), str):
            raise DataError(f"{path}: images[{number}] has no `id` or no `file_name`: {shown(image)}.")
        if image_id in captions:
            raise DataError(f"{path}: images[{number}] has the id {image_id!r}, which an earlier one has.")
        captions[image_id] = []
    for number, entry in enumerate(document["annotations"]):
        place = f"{path}: annotations[{number}]"
        if _id(entry.get("image_id"), place) not in captions or not isinstance(entry.get("caption"), str):
            raise DataError(f"{place}: no `caption`, or an `image_id` that `images` does not list: {shown(entry)}.")
        captions[entry["image_id"]].append(entry["caption"])
    for number, image in enumerate(document["images"]):
        place = f"{path}: images[{number}]"
        yield _entry(place, captions[image["id"]], name=image["file_name"], image_id=image["id"])


def _of_pairs(folder: Path, pictures: list[str], texts: list[str], args: PublishArguments) -> Iterator[Entry]:
    beside = {os.path.splitext(name)[0]: name for name in texts}
    used: dict[str, str] = {}
    for name in pictures:
        text = beside.get(os.path.splitext(name)[0])
        if text in used:
            raise DataError(f"{folder / text} is beside {used[text]} and {name}: give each picture a name of its own.")
        if text is not None:
            used[text] = name
        lines = _text(folder / text, args.language).splitlines() if text else []
        yield _entry(str(folder / (text or name)), lines, name=name)
    for name in texts:
        if name not in used:
            yield Entry(str(folder / name), [], name=name, rule="no_picture_beside")


def _from_datasets(name: str, args: PublishArguments) -> Iterator[Entry]:
    """All splits of a dataset, joined: they are drawn again."""
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # any error of the libraries under datasets, as in `images.load_rows`
        raise DataError(
            f"{name}: neither a folder, a file, nor a dataset that load_dataset reads ({whole_reason(error)})."
        ) from error
    for split, rows in loaded.items():
        image, captions = _columns(dict.fromkeys(rows.column_names), f"{name} ({split})", args)
        if of_each := [column for column in OF_EACH if column in rows.column_names]:
            notice(f"{name} ({split}): {' and '.join(of_each)} of its captions are not kept: own has one language")
        embedded = isinstance(rows.features[image], datasets.Image)
        if embedded:
            rows = rows.cast_column(image, datasets.Image(decode=False))
            check_paths(rows, f"{name} ({split})", name, image)
            empty = null_rows(rows, image)
        for number, row in enumerate(rows.remove_columns([image]) if embedded else rows):
            place = f"{name} ({split}): row {number}"
            texts = [text for column in captions for text in _texts(row[column], f"{place}: the column {column}")]
            facts = {"image_id": _id(row.get("image_id"), place)}
            named = row.get("file_name" if embedded else image)
            if embedded and number not in empty:
                plain = isinstance(named, str) and is_plain_path(named)
                facts |= {"picture": _InDataset(rows, number, image), "name": named if plain else ""}
            elif not embedded and not isinstance(named, str | None):
                raise DataError(f"{place}: the column {image} is {shown(named)}, expected pictures or names of files.")
            elif not embedded:
                facts["name"] = named or ""
            yield _entry(place, texts, **facts)


# Files and their texts -----------------------------------------------------------------------------------------------
def _text(path: Path, language: str) -> str:
    """The text of a file: UTF-8, with or without a byte order mark, UTF-16 with one, else Shift-JIS for Japanese."""
    data = read_source(path)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path}: byte {error.start:,} of {len(data):,}: {error.reason}"
        if language != "ja" or marked:
            raise DataError(f"{problem}. Save it as UTF-8 (Shift-JIS is read with --language ja).") from error
    try:
        text = data.decode("cp932")
    except UnicodeDecodeError as error:
        raise DataError(f"{problem}, and it is not Shift-JIS (cp932) either. Save it as UTF-8.") from error
    notice(f"{path}: read as Shift-JIS (cp932)")
    return text


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _files_below(folder: Path) -> dict[str, str]:
    """NFC of the path of every file below the folder, hidden ones left out -> the path as it is (macOS: NFD).

    Symbolic links are followed, each folder once.
    """
    found, seen = {}, set()
    for base, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.relpath(os.path.join(base, name), folder)
            found.setdefault(_nfc(path), path)
    return found


def _file_finder(root: Path) -> Callable[[Entry], tuple[str, PictureFile | None]]:
    """A function from an entry to (name of its file below the root, the picture or None)."""
    find = picture_finder(root)
    below = _files_below(root) if root.is_dir() else {}

    def located(entry: Entry) -> tuple[str, PictureFile | None]:
        name = entry.name
        if os.path.isabs(name):
            name = os.path.relpath(name, root.resolve())
        for candidate in dict.fromkeys((name, name.replace("\\", "/"))):
            candidate = os.path.normpath(candidate)
            path = find(candidate)
            if path is None and _nfc(candidate) in below:
                candidate = below[_nfc(candidate)]
                path = str(root / candidate)
            if path is not None or candidate == name:
                name = candidate
            if path is not None:
                break
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{entry.place}: the file name {name!a:.200} is not UTF-8. Rename the file.") from error
        if not is_plain_path(name):
            raise DataError(
                f"{entry.place}: the picture {entry.name!r:.200} is not below {root}, or has characters that no file"
                " name should have. Rename it, or name its folder with --images."
            )
        return name, path and PictureFile(path)

    return located


# Rows ----------------------------------------------------------------------------------------------------------------
def _group(
    entries: list[Entry], root: Path, args: PublishArguments
) -> tuple[list[dict], dict[int | str, Picture], list[str]]:
    """(one row a picture, pictures by id, the rules by which entries were left out)."""
    kept = [entry for entry in entries if not entry.rule]
    located = _file_finder(root) if any(entry.picture is None for entry in kept) else None
    numbers = all(type(entry.image_id) is int for entry in kept)
    by_id, by_bytes, digests, pictures = {}, {}, {}, {}
    caption_id = same = 0
    for entry in tqdm(kept, desc="reading pictures", unit="row"):
        name, picture = (entry.name, entry.picture) if entry.picture else located(entry)
        try:
            digest = hashlib.sha256(picture.read()).hexdigest() if picture else None
        except OSError:  # it is checked, and named, with all pictures
            digest = None
        code = (digest or hashlib.sha256(entry.place.encode()).hexdigest())[:16]  # of a picture without a name
        name = name or code
        image_id = (code if entry.picture else name) if entry.image_id is None else str(entry.image_id)
        image_id = entry.image_id if numbers else _nfc(image_id)
        row = by_bytes.get(digest) if digest else None
        same += row is not None and row["image_id"] != image_id
        row = row or by_id.get(image_id)
        if row is None:
            row = {"image_id": image_id, "file_name": name, "captions": [], "caption_ids": []}
            digests[image_id], by_id[image_id] = digest, row
            if picture:
                pictures[image_id] = picture
        elif digest and digests[row["image_id"]] not in (None, digest):
            raise DataError(
                f"{entry.place}: the id {image_id!r} has another picture, {row['file_name']}, already. Give every"
                " picture an id of its own."
            )
        if digest:
            by_bytes.setdefault(digest, row)
        for caption in entry.captions:
            caption_id += 1
            row["captions"].append(caption)
            row["caption_ids"].append(caption_id)
    if len(kept) > len(by_id):
        notice(f"{len(kept):,} rows of {len(by_id):,} pictures, grouped by id; {same:,} of them by equal bytes")
    return list(by_id.values()), pictures, [entry.rule for entry in entries if entry.rule]


def _split(rows: list[dict], args: PublishArguments) -> tuple[dict[str, list[dict]], str]:
    """Pictures by split, drawn in the order of sha256("{seed}:{image_id}"), like `splits.draw_ids`."""
    sizes = {"validation": args.val_size, "test": args.test_size}
    sizes = {split: _count(size, len(rows)) for split, size in sizes.items()}
    if min(sizes.values()) < 0 or sum(sizes.values()) >= len(rows):
        raise DataError(
            f"--val_size {sizes['validation']} and --test_size {sizes['test']} leave no picture to train on: there are"
            f" {len(rows):,}. Lower them; 0 makes no such split."
        )
    order = sorted(rows, key=lambda row: hashlib.sha256(f"{args.seed}:{row['image_id']}".encode()).digest())
    place = {}
    for split, size in sizes.items():
        place |= {row["image_id"]: split for row in order[len(place) : len(place) + size]}
    by_split = {split: [] for split in ("train", *(split for split, size in sizes.items() if size))}
    for row in rows:
        by_split[place.get(row["image_id"], "train")].append(row)
    drawn = " and ".join(f"{size:,} for {split}" for split, size in sizes.items())
    return by_split, f"drawn by picture in this build (seed {args.seed}): {drawn}, the others train"


def _count(size: float | None, pictures: int) -> int:
    """How many pictures a size is: itself, or a share of all and then one at least. None: a tenth, perhaps none."""
    if size is None:
        return pictures // 10
    return max(1, round(size * pictures)) if 0 < size < 1 else int(size)


_KANA, _HAN = regex.compile(r"[\p{Hiragana}\p{Katakana}]"), regex.compile(r"\p{Han}")
_LATIN, _LETTER = regex.compile(r"\p{Latin}"), regex.compile(r"\p{L}")


def _looks_like(caption: str, language: str) -> bool:
    """Whether the letters can be of the language. Japanese without kana is a few kanji long; Vietnamese has marks."""
    if language == "ja":
        return bool(_KANA.search(caption)) or 0 < len(_HAN.findall(caption)) <= 8
    latin = len(_LATIN.findall(caption)) * 2 > len(_LETTER.findall(caption))
    return latin and (language == "en" or not caption.isascii())


def other_language(rows: list[dict], language: str) -> dict | None:
    """{"count", "of", "examples"} of captions that do not look like the language; None without a language."""
    if language == "none":
        return None
    captions = [caption for row in rows for caption in row["captions"]]
    other = [caption for caption in captions if not _looks_like(caption, language)]
    return {"count": len(other), "of": len(captions), "examples": other[:10]}


def _left_out_report(entries: list[Entry]) -> dict:
    """As `readers.read_food_titles` has it."""
    counts = Counter(entry.rule for entry in entries if entry.rule)
    rows = [
        {"row": number, "image_name": entry.name, "title": "", "rule": entry.rule}
        for number, entry in enumerate(entries, 1)
        if entry.rule
    ]
    return {
        "rules": [{"name": name, "description": text, "count": counts[name]} for name, text in ROW_RULES.items()],
        "rows": rows,
    }
