"""Rows with one picture each, in the forms that TRL knows, from a file of rows or from a dataset.

The picture is in a column `image` or `images` (embedded, or a path, alone in a list or not). What else a row has is
for `preferences` and `instructions` to read.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import datasets

from vlmcap.data.errors import DataError
from vlmcap.data.images import check_paths, is_plain_path, null_rows, whole_reason
from vlmcap.data.picture_files import is_picture_file, picture_finder
from vlmcap.strict_parsing import parse_json, shown

FILES = (".jsonl", ".json")
SHOWN = 10  # faults in a message
HEX = 16  # digits of a picture's hash that are its id, where a row gives none
PICTURE = datasets.Features({"image": datasets.Image(decode=False)})
NO_PICTURE = {"bytes": None, "path": ""}


class RowForm(NamedTuple):
    """What rows are called, the columns that they need, those where a picture may be, and all of that in words."""

    name: str
    needs: tuple[str, ...]
    pictures: tuple[str, ...]
    text: str


# What rows say, their pictures (a column `image`, undecoded), and how a message names row 0, 1, ...
Rows = tuple[Iterable[dict], datasets.Dataset, Callable[[int], str]]


def read_picture_rows(source: str, form: RowForm, image_dir: str | None, split: str, revision: str | None) -> Rows:
    """Rows and their pictures, NO_PICTURE where there is not exactly one. No picture is opened.

    Args:
        source: a .jsonl or .json file, or a dataset as `load_dataset` takes it.
        image_dir: folder or zip file of the pictures, where rows name files, see `picture_finder`. Without it a name
            in a file of rows is a path as seen from the working folder, or else from the folder of that file.
        split, revision: of a dataset.

    Raises:
        DataError: there is no such source, it holds something else than rows, or the columns are missing.
    """
    if Path(source).suffix.lower() in FILES:
        return _of_file(source, form, image_dir)
    return _of_dataset(source, form, image_dir, split, revision)


def check_faults(faults: list[str], count: int, source: str, form: RowForm) -> None:
    """Raises DataError naming the faults, of `count` rows, where there are any."""
    if faults:
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(
            f"{len(faults)} of {count} {form.name} in {source} cannot be used: correct or remove them.\n  "
            + "\n  ".join(faults[:SHOWN])
            + more
        )


def no_picture(form: RowForm) -> str:
    """What to say of a row with NO_PICTURE."""
    columns = " or ".join(f'"{name}"' for name in form.pictures)
    return f"there must be exactly one picture in {columns}; image_dir says where the files are that a dataset names"


def message_text(content: object, what: str) -> str:
    """The text of a message in TRL's form, a text or parts; parts that are pictures are skipped.

    Raises:
        ValueError: naming `what`; it has no text.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what}: the content of a message must be a text or parts with one, but is {shown(content)}")
    return "".join(texts)


def _of_file(source: str, form: RowForm, image_dir: str | None) -> Rows:
    path = Path(source)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): name a file of {form.name}") from error
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    records, where = [], []
    try:
        if path.suffix.lower() == ".json":
            records = parse_json(content)
            if not isinstance(records, list):
                raise ValueError("a list of rows is needed")
            where = [f"{source}, row {number}" for number in range(1, len(records) + 1)]
        for number, line in lines if path.suffix.lower() == ".jsonl" else ():
            where.append(f"{source}, line {number}")
            records.append(parse_json(line))
    except ValueError as error:
        place = where[-1] if where else source
        raise DataError(f"{place}: no {form.name} in JSON ({error}). {form.text}") from error
    for place, record in zip(where, records, strict=True):
        if not isinstance(record, dict):
            raise DataError(f"{place}: a row must be an object, but is {shown(record)}. {form.text}")
    find = picture_finder(image_dir) if image_dir else None

    def cell(record: dict) -> dict:
        """A name becomes the path of a file, in the first folder that has it."""
        name = _only(record, form)
        if not isinstance(name, str):
            return NO_PICTURE
        if find:
            return {"bytes": None, "path": find(name) or str(Path(image_dir) / name)}
        places = [str(folder / name) for folder in (Path(), path.parent)]
        return {"bytes": None, "path": next((place for place in places if is_picture_file(place)), places[0])}

    cells = {"image": [cell(record) for record in records]}
    return records, datasets.Dataset.from_dict(cells, features=PICTURE), where.__getitem__


def _of_dataset(source: str, form: RowForm, image_dir: str | None, split: str, revision: str | None) -> Rows:
    try:
        rows = datasets.load_dataset(source, split=split, revision=None if Path(source).exists() else revision)
    except Exception as error:  # any error of the libraries under datasets, as in `load_rows`
        raise DataError(f"{source} ({split}) cannot be loaded as {form.name}: {whole_reason(error)}") from error
    column = next((name for name in form.pictures if name in rows.column_names), None)
    if column is None or not set(form.needs) <= set(rows.column_names):
        raise DataError(f"{source} ({split}) has the columns {', '.join(rows.column_names)}. {form.text}")
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        rows = rows.cast_column(column, PICTURE["image"])
    elif isinstance(getattr(feature, "feature", None), datasets.Image):
        rows = rows.cast_column(column, datasets.List(PICTURE["image"]))
    find = picture_finder(image_dir) if image_dir else None

    def cell(record: dict) -> dict:
        """A name must stay in image_dir: a dataset may name any file of this machine."""
        found = _only(record, form)
        if isinstance(found, str):
            plain = find and is_plain_path(found)
            found = plain and {"bytes": None, "path": find(found) or str(Path(image_dir) / found)}
        return {"image": found or NO_PICTURE}

    images = rows.select_columns(column)
    if rows.features[column] != PICTURE["image"] or null_rows(rows, column):
        images = images.map(cell, remove_columns=[column], features=PICTURE)
    if not image_dir:
        check_paths(images, f"{source} ({split})", source)
    return rows.remove_columns(column), images, lambda number: f"{source} ({split}), row {number}"


def _only(record: dict, form: RowForm) -> object:
    """What a row has as its picture, of a list of one that one; None where it has none or several."""
    found = next((record[name] for name in form.pictures if record.get(name)), None)
    if isinstance(found, list):
        return found[0] if len(found) == 1 else None
    return found
