"""Published datasets with their pictures: embedded in the dataset, or in a folder named by `file_name`."""

import hashlib
import io
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import httpx2
import numpy as np
import pyarrow as pa
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from tqdm.auto import tqdm

from vlmcap.data.columns import OF_CAPTION, keep_captions, with_columns
from vlmcap.data.corpora import CORPORA, LANGUAGE, STYLE, card_names
from vlmcap.data.errors import DataError
from vlmcap.data.keys import check_columns_of_keys, rows_of_key
from vlmcap.data.lookup import a_file, find_dataset, no_such_dataset
from vlmcap.data.picture_files import is_picture_file, open_picture, picture_finder
from vlmcap.data.pictures import BadImageError, picture_size, read_picture
from vlmcap.errors import notice
from vlmcap.provenance import public_name
from vlmcap.strict_parsing import parse_json, shown


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_list_of_texts(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


# Column: what its type must be, in pyarrow and in words.
TYPES = {
    "image_id": (lambda kind: pa.types.is_integer(kind) or _is_text(kind), "whole numbers or texts"),
    "file_name": (_is_text, "texts"),
    "coco_url": (_is_text, "texts"),
    "captions": (_is_list_of_texts, "lists of texts"),
    "languages": (_is_list_of_texts, "lists of texts"),
    "styles": (_is_list_of_texts, "lists of texts"),
    "image": (lambda kind: pa.types.is_struct(kind) or pa.types.is_binary(kind) or _is_text(kind), "pictures"),
}
REQUIRED = ("image_id", "captions", "file_name")
# What a dataset may say of each of its captions: what it must be, as a pattern and in words.
OF_EACH = {
    "languages": (re.compile(LANGUAGE), "a language such as ja or en, of two or three small letters"),
    "styles": (re.compile(f"({STYLE})?"), 'a style of small letters, digits, - and _, or "" for none'),
}
OWN_LANGUAGES = CORPORA["own"].languages  # what --language of publish_datasets.py own knows
# What rows of one image must agree in.
OF_IMAGE = ("file_name", "coco_url", "license", "in_yj", "image")
UNSEEN = ("Cc", "Cf")  # Unicode's categories of control and format characters, such as the zero-width space
CACHES = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)  # where datasets from the Hub are


def load_captions(
    dataset: str, split: str, image_dir: str | None = None, revision: str | None = None
) -> datasets.Dataset:
    """Loads one split of a published caption dataset with pictures that can be opened.

    Args:
        dataset: Hub id or local folder, as `load_dataset` takes it.
        split: e.g. "train".
        image_dir: folder or zip file that holds the `file_name`s, see `picture_finder`; used when the dataset has no
            embedded images.
        revision: of a dataset on the Hub.

    Returns:
        Rows of `load_rows` with the column `image`.

    Raises:
        DataError: as `load_rows`; the dataset has neither embedded images nor an image_dir; a file_name leads out
            of image_dir.
    """
    rows = load_rows(dataset, split, revision)
    if "image" in rows.column_names:
        return rows
    if not image_dir:
        raise DataError(_no_pictures(f"{dataset} ({split})", dataset, rows.column_names, split))
    find, paths = picture_finder(image_dir), []
    for name in rows["file_name"]:
        if not is_plain_path(name):
            raise DataError(f"{dataset} ({split}): the file_name {name!r} does not stay in --image_dir {image_dir}")
        paths.append({"bytes": None, "path": find(name) or str(Path(image_dir) / name)})
    return rows.add_column("image", paths, feature=datasets.Image(decode=False))


def load_rows(dataset: str, split: str, revision: str | None = None) -> datasets.Dataset:
    """Loads one split of a published caption dataset as it is, with or without pictures.

    Args:
        dataset: Hub id or local folder, as `load_dataset` takes it.
        split: e.g. "train".
        revision: of a dataset on the Hub.

    Returns:
        One row per image with the columns of a published dataset (image_id, captions, ...; see recipes/README.md),
        whatever rows the dataset has (`one_row_per_image`).
        Embedded pictures are in the column `image`, undecoded, {"bytes": bytes | None, "path": str | None};
        `open_image` reads them.

    Raises:
        DataError: the dataset cannot be loaded or has no such split; a column is missing, of another type or has
            empty places (null captions are empty ones); `languages` or `styles` are not one for each caption; rows of
            one image disagree; a picture's path leads out of the dataset.
    """
    revision = None if Path(dataset).exists() else revision
    info = _info(dataset, split, revision)
    if split not in info.splits:
        raise DataError(_no_split(dataset, split, info, "--split"))
    try:
        rows = datasets.load_dataset(dataset, split=split, revision=revision)
    except Exception as error:  # as in `_info`
        raise DataError(f"{dataset} ({split}) cannot be loaded: {whole_reason(error)}") from error
    check_columns(rows, f"{dataset} ({split})", REQUIRED)
    _check_of_each(rows, f"{dataset} ({split})")
    if "image" in rows.column_names:
        try:
            rows = rows.cast_column("image", datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{dataset} ({split}): the column image holds no images ({error})") from error
        if null_rows(rows, "image"):
            raise DataError(f"{dataset} ({split}): the column image has empty places (null)")
        check_paths(rows, f"{dataset} ({split})", dataset)
    return one_row_per_image(_without_nulls(rows), f"{dataset} ({split})")


def check_splits(
    dataset: str,
    splits: dict[str, str],
    image_dir: str | None,
    revision: str | None = None,
    keys: Sequence[str] = (),
) -> None:
    """Asks before a run, and without torch, for what it will need of a dataset. No row is read: of parquet files the
    schema says which columns there are; of others nobody asks for them here.

    Args:
        splits: option that names a split -> the split, e.g. {"--test_split": "test"}.
        keys: of captions that will be told apart (`vlmcap.data.keys`).

    Raises:
        DataError: as `dataset_record`; and as `load_captions` where a split or a column is missing or is of another
            type, or where there are no pictures.
    """
    language = _card(dataset, revision)[1].get("language")
    revision = None if Path(dataset).exists() else revision
    info = _info(dataset, next(iter(splits.values())), revision)
    for option, split in splits.items():
        place = f"{dataset} ({split})"
        if split not in info.splits:
            raise DataError(_no_split(dataset, split, info, option, image_dir, language))
        if info.features is None:
            continue
        if missing := [name for name in REQUIRED if name not in info.features]:
            command = _own_command(dataset, info, image_dir, language)
            raise DataError(
                f"{place} has no column {missing[0]}; it has {', '.join(info.features)}. Build a dataset of it with"
                f" all columns, and give that folder as --dataset:\n  {command}"
            )
        _check_types(info.features, place, [name for name in TYPES if name in info.features])
        check_columns_of_keys(info.features, keys)
        if "image" not in info.features:
            if not image_dir:
                raise DataError(_no_pictures(place, dataset, info.features, split))
            picture_finder(image_dir)


def _info(dataset: str, split: str, revision: str | None) -> datasets.DatasetInfo:
    """The splits of a dataset and, of parquet files, its features."""
    if Path(dataset).is_file():
        raise a_file(dataset)
    try:
        return datasets.get_dataset_config_info(dataset, revision=revision)
    # Any error of the libraries under datasets: its own, pyarrow's, the Hub's, httpx's, those of YAML and JSON.
    except Exception as error:
        raise DataError(f"{dataset} ({split}) cannot be loaded: {whole_reason(error)}") from error


def _no_split(
    dataset: str,
    split: str,
    info: datasets.DatasetInfo,
    option: str,
    image_dir: str | None = None,
    language: object = None,
) -> str:
    """What to say of a split that a dataset does not have."""
    without = (
        ", train without validation (--eval_strategy no --load_best_model_at_end false --early_stopping_patience 0)"
    )
    without = without if option == "--validation_split" else ""
    return (
        f"{dataset} has no split {split!r}; it has {', '.join(info.splits)}. Name one of them with {option}{without},"
        " or draw new splits of all its pictures and give that folder as --dataset:\n "
        f" {_own_command(dataset, info, image_dir, language)}"
    )


def _own_command(dataset: str, info: datasets.DatasetInfo, image_dir: str | None, language: object) -> str:
    """The command that makes a dataset with all columns and splits of one that lacks some.

    Args:
        language: of its card, one or a list.
    """
    languages = [language] if isinstance(language, str) else language or []
    pictures = ["--image_column", "image"] if "image" in (info.features or ()) else ["--images", image_dir or "FOLDER"]
    words = ["python", "scripts/publish_datasets.py", "own", "--annotations", dataset, *pictures]
    words += ["--language", next((name for name in languages if name in OWN_LANGUAGES), "none")]
    words += ["--output_dir", f"data/{Path(dataset).name}_split", "--val_size", "0.1", "--test_size", "0.1"]
    return shlex.join(words)


def _no_pictures(place: str, dataset: str, columns: Iterable[str], split: str) -> str:
    """What to say where no picture is embedded and no folder was named."""
    fix = (
        f"Fetch the photographs with `python scripts/fetch_images.py --dataset {dataset} --split {split} --output_dir"
        " images` and add `--image_dir images`"
        if "coco_url" in columns
        else "Name the folder of the pictures with --image_dir"
    )
    return (
        f"{place} holds captions but no images. {fix}, or build the dataset with --images DIR of publish_datasets.py."
    )


def references_of(rows: datasets.Dataset) -> dict[str, list[str]]:
    """Image id -> captions of rows of `load_captions`."""
    return dict(zip(map(str, rows["image_id"]), rows["captions"], strict=True))


def dataset_references(
    dataset: str, split: str, revision: str | None = None, key: str | None = None, keys: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Image id -> captions of a split of a published dataset, a Hub id or a local folder of parquet files.

    Reads no picture, and takes ids that are texts too. Null captions are empty ones.

    Args:
        key: of a dataset with languages; the captions of this key alone, and the images that have any: `rows_of_key`.
        keys: those of the run; `key` alone where there are no others.

    Raises:
        DataError: the dataset cannot be loaded or has no such split; a column is missing; rows of one image have
            different file names; with a key, what `rows_of_key` raises, and `languages` or `styles` that are not one
            for each caption.
    """
    revision = None if Path(dataset).exists() else revision
    info = _info(dataset, split, revision)
    if split not in info.splits:
        raise DataError(_no_split(dataset, split, info, "--split"))
    source = {"path": dataset, "split": split, "revision": revision, "streaming": True}
    place, of_key = f"{dataset} ({split})", tuple(OF_EACH) if key else ()
    try:
        there = datasets.load_dataset(**source).column_names
        # Streaming reads these columns alone: no photograph is downloaded or decoded.
        columns = [name for name in (*REQUIRED, *of_key) if name in there]
        rows = list(datasets.load_dataset(columns=columns, **source))
    except Exception as error:  # as in `_info`
        raise DataError(f"{place} cannot be loaded: {whole_reason(error)}") from error
    if missing := [name for name in ("image_id", "captions") if name not in there]:
        raise DataError(f"{place} has no column {', '.join(missing)}; it has {', '.join(there)}")
    if key:
        checked = datasets.Dataset.from_list(rows)
        _check_of_each(checked, place)
        rows = rows_of_key(_without_nulls(checked), key, keys or (key,)).to_list()
    return {
        str(image_id): [caption or "" for number in numbers for caption in rows[number]["captions"] or []]
        for image_id, numbers in group_by_image(rows, place).items()
    }


def one_row_per_image(rows: datasets.Dataset, place: str) -> datasets.Dataset:
    """The first row of every image, with the captions of all its rows (and the other columns of OF_CAPTION), in the
    order of the rows.

    Rows that are one per image are returned as they are. Else a line says how many rows became how many images.

    Raises:
        DataError: naming `place`; rows of one image disagree, see `group_by_image`.
    """
    if len(set(rows["image_id"])) == len(rows):
        return rows
    of_image = rows.select_columns([name for name in ("image_id", *OF_IMAGE) if name in rows.column_names])
    members = list(group_by_image(of_image, place).values())
    for name in [name for name in OF_CAPTION if name in rows.column_names]:
        lists, joined = rows[name][:], [[]] * len(rows)
        for numbers in members:
            joined[numbers[0]] = [item for number in numbers for item in lists[number] or []]
        rows = with_columns(rows, {name: joined})
    return rows.select([numbers[0] for numbers in members])


def group_by_image(rows: Iterable[dict], place: str) -> dict[int | str, list[int]]:
    """Image id -> numbers of its rows. Prints how many rows are of how many images, when there are more of them.

    Raises:
        DataError: naming `place` and the image; its rows differ in one of OF_IMAGE that they have.
    """
    known, members = {}, {}
    number = -1
    for number, row in enumerate(rows):
        image_id, facts = row["image_id"], {name: _fact(row[name]) for name in OF_IMAGE if name in row}
        first = known.setdefault(image_id, facts)
        if differs := [name for name in facts if facts[name] != first[name]]:
            raise DataError(
                f"{place}: rows {members[image_id][0]} and {number} both have the image_id {image_id} and differ in"
                f" {', '.join(differs)}. Give every image an id of its own, and all rows of an image the same picture"
                " and file_name."
            )
        members.setdefault(image_id, []).append(number)
    if number + 1 > len(members):
        notice(f"{place}: {number + 1:,} rows of {len(members):,} images, grouped by image_id")
    return members


def _fact(value: object) -> object:
    """What is compared: of a picture the hash of its bytes, or its path."""
    if not isinstance(value, dict):
        return value
    return value["path"] if value["bytes"] is None else hashlib.sha256(value["bytes"]).hexdigest()


def _without_nulls(rows: datasets.Dataset) -> datasets.Dataset:
    """Null captions as empty ones: whoever reads them counts or refuses those."""
    for name in ("captions", *OF_EACH):
        if name in rows.column_names and _has_nulls(rows, name):
            rows = with_columns(rows, {name: [[text or "" for text in texts or []] for texts in rows[name]]})
    return rows


def without_empty_captions(rows: datasets.Dataset) -> tuple[datasets.Dataset, dict[str, int]]:
    """Rows without captions that show nothing (empty, white space, characters that cannot be seen), and without images
    that have no other; and how many {"captions", "images"} were left out. Captions of ordinary rows stay as they are.
    """
    texts_of = rows["captions"][:]
    kept = [[place for place, caption in enumerate(texts) if _shows_something(caption)] for texts in texts_of]
    empty = sum(map(len, texts_of)) - sum(map(len, kept))
    left_out = {"captions": empty, "images": kept.count([])}
    if any(left_out.values()):
        rows = keep_captions(rows, kept)
    return rows, left_out


def _shows_something(caption: str) -> bool:
    return any(not character.isspace() and unicodedata.category(character) not in UNSEEN for character in caption)


def is_plain_path(name: str) -> bool:
    """Whether a name out of somebody else's file is a path that stays below the folder it is joined to.

    Looks at the name only: a symbolic link that the user has put into the folder is followed.
    """
    long = len(os.fsencode(name)) > 1_000 or any(len(os.fsencode(part)) > 250 for part in name.split("/"))
    return not long and not re.search(r"^$|^/|^[A-Za-z]:|[\\\x00-\x1f\x7f]|(^|/)\.\.(/|$)", name)


def whole_reason(error: BaseException) -> str:
    """The error with the one that it hides: of a damaged file, datasets says that it failed to generate a dataset."""
    reasons = [f"{type(error).__name__}: {str(error).strip()}"]
    if error.__cause__:
        reasons.append(whole_reason(error.__cause__))
    return "; ".join(dict.fromkeys(reasons))


def check_columns(rows: datasets.Dataset, place: str, names: Iterable[str]) -> None:
    """Raises DataError when a column is missing, has another type than in `TYPES`, or holds null (captions may)."""
    _check_types(rows.features, place, names)
    for name in names:
        if name != "captions" and _has_nulls(rows, name):
            raise DataError(f"{place}: the column {name} has empty places (null)")


def _check_of_each(rows: datasets.Dataset, place: str) -> None:
    """Raises DataError where `languages` or `styles` are not one for each caption, or hold something else."""
    for name, (pattern, wanted) in OF_EACH.items():
        if name not in rows.column_names:
            continue
        _check_types(rows.features, place, [name])
        known = set()  # there are few, and many captions
        for number, (captions, values) in enumerate(zip(rows["captions"][:], rows[name][:], strict=True)):
            captions, values = captions or [], values or []
            if len(values) != len(captions):
                raise DataError(
                    f"{_row(rows, place, number)} has {len(captions)} captions and {len(values)} {name}: there must be"
                    " one for each caption"
                )
            for value in set(values) - known:
                if value is None or not pattern.fullmatch(value):
                    raise DataError(
                        f"{_row(rows, place, number)}: the column {name} holds {shown(value)}, expected {wanted}"
                    )
                known.add(value)


def _row(rows: datasets.Dataset, place: str, number: int) -> str:
    return f"{place}: row {number} (image_id {rows['image_id'][number]})"


def _check_types(features: datasets.Features, place: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in features:
            raise DataError(f"{place} has no column {name}; it has {', '.join(features)}")
        kind, (test, wanted) = features.arrow_schema.field(name).type, TYPES[name]
        if not test(kind):
            raise DataError(f"{place}: the column {name} is {kind}, expected {wanted}")


def _has_nulls(rows: datasets.Dataset, name: str) -> bool:
    """Whether a column, or a list in it, has empty places."""
    chunks = rows.select_columns(name).with_format("arrow")[:][name].chunks
    return any(chunk.null_count or _is_list(chunk.type) and chunk.flatten().null_count for chunk in chunks)


def check_paths(rows: datasets.Dataset, place: str, dataset: str, column: str = "image") -> None:
    """Raises DataError when a picture is neither embedded nor a file of the dataset: a path in a dataset may name any
    file of this machine. Empty places are skipped."""
    roots = [folder.resolve() for folder in (Path(dataset), *map(Path, CACHES)) if folder.is_dir()]
    for _, path in _outside(rows, column):
        if path and ("\0" in path or not any(Path(path).resolve().is_relative_to(root) for root in roots)):
            raise DataError(
                f"{place}: the picture {path!r} is not in the dataset but a path out of it. Embed the pictures, or"
                " leave the column image out and give --image_dir."
            )


def open_image(row: dict) -> Image.Image:
    """Reads the picture of a row of `load_captions` as 8-bit RGB, upright, on white; of an animation the first frame.

    Upright by its EXIF orientation, as datasets.Image shows it. 16-bit grey is scaled to 8 bits. What is transparent
    becomes white, as in Qwen's own utilities (qwen_vl_utils) and vLLM: `Image.convert` would show what is under it,
    mostly black.

    Raises:
        BadImageError: the file is missing, cut off or no image of `FORMATS`; it has no pixels, more than MAX_PIXELS,
            or an aspect ratio above MAX_RATIO; or its numbers have no range (32-bit and floating-point TIFF).
    """
    return _with_file(row, read_picture)


def image_size(row: dict) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` returns for a row, from the header of the file.

    Raises:
        BadImageError: as `open_image`, except for damage after the header.
    """
    return _with_file(row, picture_size)


def _with_file(row: dict, use: Callable[[BinaryIO, str], Any]) -> Any:
    """`use(file, name)`, the name for messages."""
    cell = row["image"]
    name = row.get("file_name") or cell["path"] or str(row["image_id"])
    if cell["bytes"] is not None:
        return use(io.BytesIO(cell["bytes"]), name)
    try:
        file = open_picture(cell["path"])
    except FileNotFoundError as error:
        raise BadImageError(name, f"no such file: {cell['path']}") from error
    except OSError as error:
        raise BadImageError(name, str(error)) from error
    with file:
        return use(file, name)


def dataset_record(dataset: str, split: str, revision: str | None = None) -> dict:
    """What a run record says of a dataset: id, revision, split, licence, corpus.

    The revision is the commit on the Hub; for a folder of publish_datasets.py, the fingerprint of its build. The
    corpus is one of `corpora.card_names` by the tags of its card, None for a dataset of other origin. Of corpora that
    were joined it has "training_corpora" too, those of CORPORA with captions in the training split.

    Raises:
        DataError: there is no such folder and no such dataset on the Hub, or it has no card.
    """
    commit, data = _card(dataset, revision)
    tags = data.get("tags") if isinstance(data.get("tags"), list) else []
    corpus = next((name for name in card_names() if f"{name}-captions" in tags), None)
    joined = [name for name in CORPORA if f"{name}-training-captions" in tags]
    record = {
        "id": public_name(dataset),
        "revision": commit,
        "split": split,
        "license": data.get("license"),
        "corpus": corpus,
    }
    return record | {"training_corpora": joined} if joined else record


def _card(dataset: str, revision: str | None) -> tuple[str | None, DatasetCardData]:
    """(revision, metadata of the card), as `dataset_record` has them."""
    if Path(dataset).is_file():
        raise a_file(dataset)
    if Path(dataset).exists():
        card, report = Path(dataset) / "README.md", Path(dataset) / "cleaning_report.json"
        try:
            revision = f"build {parse_json(report.read_bytes())['fingerprint']}" if report.exists() else None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{report} is not a report of a build ({type(error).__name__}: {error}). Build the dataset again."
            ) from error
    else:
        revision = find_dataset(dataset, revision)
        try:
            card = Path(hf_hub_download(dataset, "README.md", repo_type="dataset", revision=revision))
        except RemoteEntryNotFoundError:
            card = Path(dataset) / "README.md"
        except (httpx2.HTTPError, OSError) as error:
            raise no_such_dataset(dataset, error) from error
    if not card.exists():
        raise DataError(
            f"{dataset} has no README.md, the card that says its licence and corpus: build the dataset with"
            " scripts/publish_datasets.py, or write one that begins with the lines `---`, `license: NAME`, `---`"
        )
    try:
        return revision, DatasetCard.load(card).data
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{card}: no dataset card with metadata that can be read ({error})") from error


def check_no_overlap(train: datasets.Dataset, other: datasets.Dataset, split: str = "test") -> None:
    """Raises DataError when an image is trained on and is in the other split too. Ids may be numbers or texts."""
    both = set(map(str, train["image_id"])) & set(map(str, other["image_id"]))
    if both:
        first = min(both, key=lambda image_id: (len(image_id), image_id))
        raise DataError(
            f"{len(both)} images are in the training and in the {split} split (image_id {first}, ...). Scores on"
            " them would mean nothing: publish the dataset again with disjoint splits, or name other splits."
        )


def missing_files(rows: datasets.Dataset) -> list[int]:
    """Indices of the rows whose picture is neither embedded nor a file. Looks at names only."""
    return [row for row, path in _outside(rows) if not path or not is_picture_file(path)]


def null_rows(rows: datasets.Dataset, column: str) -> set[int]:
    """Indices of the rows without a value in a column."""
    chunks = rows.select_columns(column).with_format("arrow")[:][column]
    return set(np.flatnonzero(chunks.is_null()).tolist())


def _outside(rows: datasets.Dataset, column: str = "image") -> Iterator[tuple[int, str | None]]:
    """(row, path) of the pictures that are not embedded. Reads no embedded picture."""
    start = 0
    for batch in rows.select_columns(column).with_format("arrow").iter(1_000):
        cells = batch[column].combine_chunks()
        paths = cells.field("path")
        for row in np.flatnonzero(cells.field("bytes").is_null()):
            yield start + int(row), paths[int(row)].as_py()
        start += len(cells)


def check_images(rows: datasets.Dataset, split: str) -> None:
    """Decodes every picture of a split, with a progress bar, before a run that will need all of them.

    Raises:
        DataError: naming the pictures that cannot be read.
    """
    bad = []
    for row in tqdm(rows.select_columns(["image", "image_id", "file_name"]), desc=f"checking images of {split}"):
        try:
            open_image(row)
        except BadImageError as error:
            bad.append(str(error))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} pictures of the {split} split cannot be read, so it cannot be scored:\n  "
            + "\n  ".join(bad[:20])
            + ("\n  ..." if len(bad) > 20 else "")
            + "\nFetch them again with scripts/fetch_images.py."
        )
