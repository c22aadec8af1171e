"""Preferences: of two captions of a picture, the chosen one and the rejected one, in the forms that TRL knows.

A row holds `chosen` and `rejected`, each a text or a list of messages, and one picture in `image` or `images`
(embedded, or a path). `prompt`, a text or messages, may be a column, or the turn in front of both answers, or missing:
then the rows are of the prompt that they are used with. Rows of the same picture become one row with all its pairs.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path

import datasets
from accelerate import PartialState
from tqdm.auto import tqdm

from vlmcap.data.errors import DataError
from vlmcap.data.images import open_image
from vlmcap.data.lookup import find_dataset
from vlmcap.data.picture_files import PictureFile
from vlmcap.data.picture_rows import HEX, RowForm, check_faults, message_text, no_picture, read_picture_rows
from vlmcap.data.pictures import BadImageError
from vlmcap.provenance import public_name
from vlmcap.strict_parsing import shown

PREFERENCES = RowForm(
    "preferences",
    ("chosen", "rejected"),
    ("image", "images"),
    'Each row needs "chosen" and "rejected" (texts or messages) and one picture in "image" or "images".',
)


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
    records, images, place = read_picture_rows(source, PREFERENCES, image_dir, split, revision)
    faults, pairs = [], []
    for number, record in enumerate(records):
        try:
            pairs.append(_pair(record, [prompt, *others]))
        except ValueError as error:
            faults.append(f"{place(number)}: {error}")
            pairs.append(None)
    if not pairs:
        raise DataError(f"{source} holds no preferences. {PREFERENCES.text}")
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
    check_faults(faults, len(pairs), source, PREFERENCES)
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


# Pictures -----------------------------------------------------------------------------------------------------------
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
                raise BadImageError("", no_picture(PREFERENCES))
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
    """{"chosen", "rejected", "asked", "image_id"} of a row. Raises ValueError where it is not a preference."""
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
    return value[:-1], message_text(value[-1].get("content"), side)


def _prompt(turns: object, prompts: list[str]) -> str:
    """The text of a prompt, one of `prompts`."""
    if isinstance(turns, str):
        asked = turns
    elif isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict) and turns[0].get("role") == "user":
        asked = message_text(turns[0].get("content"), "prompt")
    else:
        raise ValueError(f"the prompt must be a text or one turn of the user, but is {shown(turns)}")
    if asked not in prompts:
        raise ValueError(
            f"its prompt is {shown(asked)}, and the adapter is asked {' or '.join(map(shown, prompts))}: what is"
            " preferred as an answer to one says nothing of the other. Write the adapter's prompt, or leave the column"
            " out"
        )
    return asked
