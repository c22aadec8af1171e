"""Preferences: of two captions of a picture, the chosen one and the rejected one, in the forms that TRL knows.

A row holds `chosen` and `rejected`, each a text or a list of messages, and one picture in `image` or `images`
(embedded, or a path). `prompt`, a text or messages, may be a column, or the turn in front of both answers, or missing:
then the rows are of the prompt that they are used with. Rows of the same picture become one row with all its pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path

import datasets
from accelerate import PartialState
from tqdm.auto import tqdm

from vlmcap.data.errors import DataError
from vlmcap.data.images import check_paths, is_plain_path, open_image, whole_reason
from vlmcap.data.lookup import find_dataset
from vlmcap.data.picture_files import PictureFile, is_picture_file
from vlmcap.data.pictures import BadImageError
from vlmcap.provenance import public_name
from vlmcap.strict_parsing import parse_json, shown

FILES = (".jsonl", ".json")
SHOWN = 10  # faults in a message
HEX = 16  # digits of a picture's hash that are its id, where a row gives none
PICTURE = datasets.Features({"image": datasets.Image(decode=False)})
NO_PICTURE = {"bytes": None, "path": ""}
FORM = 'Each row needs "chosen" and "rejected" (texts or messages) and one picture in "image" or "images".'


def read_preferences(
    source: str,
    prompt: str,
    image_dir: str | None = None,
    split: str = "train",
    revision: str | None = None,
    others: Sequence[str] = (),
) -> datasets.Dataset:
    """The pairs of a file or dataset by picture. Every picture is decoded once, so that none fails later.

    Args:
        source: a .jsonl or .json file (scripts/human_eval.py writes one), or a dataset as `load_dataset` takes it.
        prompt: the user's text after the image, which the rows must have where they have one.
        image_dir: folder of the pictures, where rows name files. Without it a name in a file of rows is a path as
            seen from the working folder, or else from the folder of that file.
        split, revision: of a dataset.
        others: more prompts that rows may have, in other languages for instance. Every row must then have one.

    Returns:
        One row an image, in the order of their first pairs: `image` (undecoded), `image_id` and `file_name` (texts),
        `chosen`, `rejected` and `asked` (lists of as many texts; the prompts), `sha256` of the picture's file.
        `image_id` is that of the rows, or else the first digits of `sha256`.

    Raises:
        DataError: there is no such source, or no pair in it; naming rows: a text is missing, empty or the same on both
            sides; another prompt; no picture, several, one that is not there or cannot be read; two pictures with one
            image_id.
    """
    if Path(source).suffix.lower() in FILES:
        records, images, place = _of_file(source, image_dir)
    else:
        records, images, place = _of_dataset(source, image_dir, split, revision)
    faults, pairs = [], []
    for number, record in enumerate(records):
        try:
            pairs.append(_pair(record, [prompt, *others]))
        except ValueError as error:
            faults.append(f"{place(number)}: {error}")
            pairs.append(None)
    if not pairs:
        raise DataError(f"{source} holds no preferences. {FORM}")
    pictures = _identify(images, [number for number, pair in enumerate(pairs) if pair], place, faults)
    groups: dict[str, list[int]] = {}
    known: dict[str, str] = {}
    for number, digest in pictures.items():
        image_id = pairs[number]["image_id"] or digest[:HEX]
        if known.setdefault(image_id, digest) != digest:
            first = place(groups[image_id][0])
            faults.append(f"{place(number)}: image_id {image_id} is that of another picture in {first}: number them")
            continue
        groups.setdefault(image_id, []).append(number)
    if faults:
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(
            f"{len(faults)} of {len(pairs)} preferences in {source} cannot be used: correct or remove them.\n  "
            + "\n  ".join(faults[:SHOWN])
            + more
        )
    firsts = [numbers[0] for numbers in groups.values()]
    cells = (images[first]["image"] for first in firsts)
    columns = {
        "image_id": list(groups),
        "file_name": [Path(cell["path"] or "").name or image_id for cell, image_id in zip(cells, groups, strict=True)],
        "chosen": [[pairs[number]["chosen"] for number in numbers] for numbers in groups.values()],
        "rejected": [[pairs[number]["rejected"] for number in numbers] for numbers in groups.values()],
        "asked": [[pairs[number]["asked"] for number in numbers] for numbers in groups.values()],
        "sha256": list(known.values()),
    }
    more = datasets.Dataset.from_dict(columns)
    return datasets.concatenate_datasets([images.select(firsts), more], axis=1)


def preferences_record(source: str, split: str = "train", revision: str | None = None) -> dict:
    """What a run record says of preferences, as `dataset_record` of captions: of a file the hash of its contents."""
    if Path(source).is_file():
        revision = f"sha256:{sha256(Path(source).read_bytes()).hexdigest()}"
    elif not Path(source).exists():
        revision = find_dataset(source, revision)
    return {"id": public_name(source), "revision": revision, "split": split, "license": None, "corpus": None}


def count_pairs(rows: datasets.Dataset) -> int:
    """Pairs in rows of `read_preferences`."""
    return sum(map(len, rows["chosen"]))


def check_unseen(rows: datasets.Dataset, heldout: datasets.Dataset) -> None:
    """Raises DataError where a picture of the held-out preferences is also in those to train on."""
    trained = set(rows["sha256"])
    names = [name for name, digest in zip(heldout["file_name"], heldout["sha256"], strict=True) if digest in trained]
    if names:
        raise DataError(
            f"{len(names)} pictures are in the preferences and in the held-out ones ({names[0]}, ...): what is"
            " measured on them would not be unseen. Remove them from one of the two."
        )


def hold_out(rows: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on, and those of a share of the images (at least one), drawn by `seed`, to look at.

    Raises:
        DataError: nothing is left to train on.
    """
    count = max(1, round(share * len(rows)))
    if not 0 < share < 1 or count >= len(rows):
        raise DataError(
            f"heldout_share {share} of the preferences' {len(rows)} images leaves no pair to train on or none to hold"
            " out: give more preferences, another share between 0 and 1, or a file of its own (heldout_preferences)"
        )
    shuffled = rows.shuffle(seed=seed)
    return shuffled.select(range(count, len(rows))), shuffled.select(range(count))


# Where rows come from -----------------------------------------------------------------------------------------------
# What rows say, their pictures (a column `image`, undecoded), and how a message names row 0, 1, ...
Rows = tuple[Iterable[dict], datasets.Dataset, Callable[[int], str]]


def _of_file(source: str, image_dir: str | None) -> Rows:
    path = Path(source)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): name a file of preferences") from error
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
        raise DataError(f"{where[-1] if where else source}: no preferences in JSON ({error}). {FORM}") from error
    for place, record in zip(where, records, strict=True):
        if not isinstance(record, dict):
            raise DataError(f"{place}: a row must be an object, but is {shown(record)}. {FORM}")

    def cell(record: dict) -> dict:
        """A name becomes the path of a file, in the first folder that has it."""
        name = _only(record)
        if not isinstance(name, str):
            return NO_PICTURE
        folders = [Path(image_dir)] if image_dir else [Path(), path.parent]
        places = [str(folder / name) for folder in folders]
        return {"bytes": None, "path": next((place for place in places if is_picture_file(place)), places[0])}

    cells = {"image": [cell(record) for record in records]}
    return records, datasets.Dataset.from_dict(cells, features=PICTURE), where.__getitem__


def _of_dataset(source: str, image_dir: str | None, split: str, revision: str | None) -> Rows:
    try:
        rows = datasets.load_dataset(source, split=split, revision=None if Path(source).exists() else revision)
    except Exception as error:  # any error of the libraries under datasets, as in `load_rows`
        raise DataError(f"{source} ({split}) cannot be loaded as preferences: {whole_reason(error)}") from error
    column = next((name for name in ("image", "images") if name in rows.column_names), None)
    if column is None or not {"chosen", "rejected"} <= set(rows.column_names):
        raise DataError(f"{source} ({split}) has the columns {', '.join(rows.column_names)}. {FORM}")
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        rows = rows.cast_column(column, PICTURE["image"])
    elif isinstance(getattr(feature, "feature", None), datasets.Image):
        rows = rows.cast_column(column, datasets.List(PICTURE["image"]))

    def cell(record: dict) -> dict:
        """A name must stay in image_dir: a dataset may name any file of this machine."""
        found = _only(record)
        if isinstance(found, str):
            found = image_dir and is_plain_path(found) and {"bytes": None, "path": str(Path(image_dir) / found)}
        return {"image": found or NO_PICTURE}

    images = rows.select_columns(column).map(cell, remove_columns=[column], features=PICTURE)
    if not image_dir:
        check_paths(images, f"{source} ({split})", source)
    return rows.remove_columns(column), images, lambda number: f"{source} ({split}), row {number}"


def _only(record: dict) -> object:
    """What a row has as its picture, of a list of one that one; None where it has none or several."""
    found = record.get("image") or record.get("images")
    if isinstance(found, list):
        return found[0] if len(found) == 1 else None
    return found


def _identify(
    images: datasets.Dataset, numbers: list[int], place: Callable[[int], str], faults: list[str]
) -> dict[int, str]:
    """Row -> sha256 of its picture's file, once it was decoded; what cannot be is added to `faults`."""

    @cache
    def of_file(path: str) -> str:
        return of_bytes(PictureFile(path).read(), path)

    def of_bytes(content: bytes, name: str) -> str:
        open_image({"image": {"bytes": content, "path": None}, "file_name": name})
        return sha256(content).hexdigest()

    def identify(number: int) -> tuple[str, str]:
        cell = images[number]["image"]
        try:
            if cell["bytes"] is None and not cell["path"]:
                raise BadImageError("", 'there must be exactly one picture in "image" or "images"')
            content = cell["bytes"]
            return (of_file(cell["path"]) if content is None else of_bytes(content, "the picture")), ""
        except FileNotFoundError:
            return "", f"there is no picture {cell['path']}; image_dir says where pictures are"
        except OSError as error:
            return "", str(error).removeprefix(": ")

    digests = {}
    bar = {"total": len(numbers), "desc": "pictures of preferences", "disable": not PartialState().is_main_process}
    with ThreadPoolExecutor() as pool:
        for number, (digest, fault) in zip(numbers, tqdm(pool.map(identify, numbers), **bar), strict=True):
            if fault:
                faults.append(f"{place(number)}: {fault}")
            else:
                digests[number] = digest
    return digests


# What a row says ----------------------------------------------------------------------------------------------------
def _pair(record: dict, prompts: list[str]) -> dict:
    """{"chosen", "rejected", "asked", "image_id"} of a row. Raises ValueError where it is no preference."""
    texts, found = {}, set()
    for side in ("chosen", "rejected"):
        turns, texts[side] = _answer(record.get(side), side)
        found |= {_prompt(asked, prompts) for asked in (turns, record.get("prompt")) if asked}
        if not texts[side].strip():
            raise ValueError(f"{side} is an empty text")
    if texts["chosen"].strip() == texts["rejected"].strip():
        raise ValueError(f"chosen and rejected are the same text, {shown(texts['chosen'])}")
    if len(found) > 1:
        raise ValueError(f"chosen and rejected answer different prompts, {' and '.join(map(shown, sorted(found)))}")
    if not found and len(prompts) > 1:
        raise ValueError(f"it has no prompt, and there are several: {', '.join(map(shown, prompts))}")
    texts["asked"] = found.pop() if found else prompts[0]
    image_id = record.get("image_id")
    if image_id is not None and type(image_id) not in (int, str):
        raise ValueError(f"image_id must be a number or a text, but is {shown(image_id)}")
    return texts | {"image_id": None if image_id is None else str(image_id)}


def _answer(value: object, side: str) -> tuple[list, str]:
    """The turns in front of an answer, and its text."""
    if isinstance(value, str):
        return [], value
    if not (
        isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant"
    ):
        raise ValueError(f"{side} must be a text, or messages that end with the assistant's, but is {shown(value)}")
    return value[:-1], _text(value[-1].get("content"), side)


def _prompt(turns: object, prompts: list[str]) -> str:
    """The text of a prompt, one of `prompts`."""
    if isinstance(turns, str):
        asked = turns
    elif isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict) and turns[0].get("role") == "user":
        asked = _text(turns[0].get("content"), "prompt")
    else:
        raise ValueError(f"the prompt must be a text or one turn of the user, but is {shown(turns)}")
    if asked not in prompts:
        raise ValueError(
            f"its prompt is {shown(asked)}, and the adapter is asked {' or '.join(map(shown, prompts))}: what is"
            " preferred as an answer to one says nothing of the other. Write the adapter's prompt, or leave the column"
            " out"
        )
    return asked


def _text(content: object, what: str) -> str:
    """The text of a message; parts that are pictures are skipped."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what}: the content of a message must be a text or parts with one, but is {shown(content)}")
    return "".join(texts)
