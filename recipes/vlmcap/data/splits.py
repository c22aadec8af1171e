"""Which image belongs to which split: Karpathy's lists, a partition of the same shape, seeded shares; the YJ overlap.

The Karpathy splits of COCO 2014 (Karpathy and Fei-Fei, CVPR 2015, "Deep Visual-Semantic Alignments"): validation and
test are 5,000 val2014 images each; the other 30,504 val2014 images ("restval") join train2014, 113,287 in all.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Hashable, Iterable
from pathlib import Path

from vlmcap.data.errors import DataError
from vlmcap.data.sources import parse_source, read_source

# sha256 of the sorted ids, one a line; the lists are those of github.com/peteanderson80/bottom-up-attention.
KARPATHY_SHA256 = (
    "47164ec8e9a973fe67d97bcea616ce5fe707b347275d0e0ce4dbaed01a84a55f",  # 5,000 validation ids
    "0f892ba2fcb97da20443b3ce06d6bc972adb0e41ee6d338c22fa644350b3e2f7",  # 5,000 test ids
)


def read_ids(path: str | Path) -> list[int]:
    """Image ids from a text file, one a line; of a line with several words the last counts, so that the usual
    `val2014/COCO_val2014_000000184613.jpg 184613` lists can be given as they are.

    Raises DataError on a line that holds no number, on an id listed twice and on a file without ids.
    """
    data = read_source(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start:,} of {len(data):,}: {error.reason}. Save the list as UTF-8."
        ) from error
    ids: dict[int, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        word = line.split()[-1]
        if not re.fullmatch("[0-9]{1,18}", word):
            raise DataError(
                f"{path}, line {number}: {word[:100]!r} is not an image id (one whole number of at most 18 digits a "
                "line)."
            )
        if int(word) in ids:
            raise DataError(f"{path}, line {number}: image id {word} is already on line {ids[int(word)]}.")
        ids[int(word)] = number
    if not ids:
        raise DataError(f"{path}: holds no image id (one whole number a line).")
    return list(ids)


def read_karpathy(path: str | Path) -> tuple[list[int], list[int]]:
    """(validation ids, test ids) of Karpathy's `dataset_coco.json` (its images hold `cocoid` and `split`).

    Raises DataError on a file that is not of that form or names an image twice.
    """
    document = parse_source(path, read_source(path))
    form = "Karpathy's dataset_coco.json has a list `images`, each with a number `cocoid` and a text `split`"
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DataError(f"{path}: holds no such list. {form}.")
    splits: dict[int, str] = {}
    for index, image in enumerate(document["images"]):
        if not isinstance(image, dict) or type(image.get("cocoid")) is not int or type(image.get("split")) is not str:
            raise DataError(f"{path}: images[{index}] is not one of its images. {form}.")
        if image["cocoid"] in splits:
            raise DataError(f"{path}: images[{index}] has cocoid {image['cocoid']}, which an earlier one has.")
        splits[image["cocoid"]] = image["split"]
    return tuple([cocoid for cocoid, split in splits.items() if split == part] for part in ("val", "test"))


def is_karpathy(val_ids: Iterable[int], test_ids: Iterable[int]) -> bool:
    """Whether these are Karpathy's validation and test images of COCO, so that scores compare with published ones."""
    return KARPATHY_SHA256 == tuple(
        hashlib.sha256("\n".join(map(str, sorted(ids))).encode()).hexdigest() for ids in (val_ids, test_ids)
    )


def draw_ids(rows: Iterable[dict], val_size: int, test_size: int, seed: int) -> tuple[list[int], list[int]]:
    """A Karpathy-style partition: validation and test ids drawn from the val2014 images that YJ does not have.

    The draw takes the images in the order of sha256("{seed}:{image_id}"): the same on every machine, and when an image
    joins or leaves the data, at most one image of each split changes its place.
    `rows` need `image_id`, `file_name` and `in_yj`.

    Raises DataError when there are too few val2014 images.
    """
    candidates = [row["image_id"] for row in rows if "val2014" in row["file_name"] and not row["in_yj"]]
    if len(candidates) < val_size + test_size:
        raise DataError(
            f"{val_size:,} validation and {test_size:,} test images are wanted, but the annotations hold only "
            f"{len(candidates):,} val2014 images outside YJ Captions (by file_name). Add the annotations of val2014, "
            "lower --val_size and --test_size, or give the splits with --karpathy or --val_ids and --test_ids."
        )
    candidates.sort(key=lambda image_id: hashlib.sha256(f"{seed}:{image_id}".encode()).digest())
    return candidates[:val_size], candidates[val_size : val_size + test_size]


def draw_shares(
    rows: list[dict], shares: dict[str, float], seed: int, key: Callable[[dict], Hashable]
) -> dict[str, list[dict]]:
    """{"train", **shares}: rows in their order; what `shares` does not draw trains. Rows of one key stay together.

    The draw takes the keys in the order of sha256("{seed}:{key}"), like `draw_ids`. A split is full when its share of
    the rows, rounded, is reached; the last key may take it over that.

    Raises DataError when a split would hold no row.
    """
    groups: dict[Hashable, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    place: dict[Hashable, str] = {}
    for split, share in shares.items():
        drawn = 0
        while drawn < round(share * len(rows)) and order:
            drawn += len(groups[order[0]])
            place[order.pop(0)] = split
    splits: dict[str, list[dict]] = {split: [] for split in ("train", *shares)}
    for row in rows:
        splits[place.get(key(row), "train")].append(row)
    for split, members in splits.items():
        if not members:
            raise DataError(
                f"The {split} split would hold no row: {len(rows):,} rows are too few, or a share is 0 or 1."
            )
    return splits


def flag_yj(rows: Iterable[dict], yj_ids: Collection[int]) -> None:
    """Sets `in_yj` of every row, in place."""
    for row in rows:
        row["in_yj"] = row["image_id"] in yj_ids


def check_yj_overlap(yj_ids: Collection[int], val_ids: Collection[int], test_ids: Collection[int]) -> None:
    """Raises DataError when a YJ image is a validation or test image: YJ counts as held out from those splits."""
    for split, ids in (("validation", val_ids), ("test", test_ids)):
        shared = sorted(set(ids) & set(yj_ids))
        if shared:
            raise DataError(
                f"Image ids of the {split} split that YJ Captions has too ({len(shared):,}): {some(shared)}. YJ "
                "Captions may share images with training only; take these ids out of the list."
            )


def split_rows(rows: list[dict], val_ids: Collection[int], test_ids: Collection[int]) -> dict[str, list[dict]]:
    """{"train", "validation", "test"}: rows in their order; an image in neither list trains.

    Raises DataError on an id in both lists, on one that `rows` lacks and on a split without images.
    """
    val_ids, test_ids = set(val_ids), set(test_ids)
    both = sorted(val_ids & test_ids)
    if both:
        raise DataError(f"Image ids in both the validation and the test split ({len(both):,}): {some(both)}.")
    known = {row["image_id"] for row in rows}
    for split, ids in (("validation", val_ids), ("test", test_ids)):
        missing = sorted(ids - known)
        if missing:
            raise DataError(
                f"Image ids of the {split} split that the annotations lack ({len(missing):,}): {some(missing)}. Give "
                "the annotation files of all images (STAIR: train and val), or id lists of images that they hold."
            )
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        image_id = row["image_id"]
        splits["validation" if image_id in val_ids else "test" if image_id in test_ids else "train"].append(row)
    for split, members in splits.items():
        if not members:
            raise DataError(f"The {split} split would hold no image; the id lists or sizes leave nothing for it.")
    return splits


def check_disjoint(splits: dict[str, list[dict]]) -> None:
    """Raises DataError on any image id that is in two splits, or twice in one."""
    place: dict[int, str] = {}
    for split, rows in splits.items():
        for row in rows:
            if row["image_id"] in place:
                raise DataError(f"Image id {row['image_id']} is in {place[row['image_id']]} and again in {split}.")
            place[row["image_id"]] = split


def some(ids: list[int], limit: int = 10) -> str:
    """The first ids for a message, and how many more there are."""
    return ", ".join(map(str, ids[:limit])) + (f" and {len(ids) - limit:,} more" if len(ids) > limit else "")
