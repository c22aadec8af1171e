"""Published datasets with their pictures: embedded in the dataset, or in a folder named by `file_name`."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import httpx2
from huggingface_hub import DatasetCard, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from vlmcap.provenance import public_name

# Cards of publish_datasets.py have the tag NAME-captions.
CORPORA = ("stair", "yj", "scenes", "uit_viic", "scenes_vi", "food_titles", "scene_titles")


class DatasetError(ValueError):
    """A dataset cannot be used as asked. The message names the dataset, the value and the mend."""


class BadImageError(OSError):
    """A picture is missing or cannot be decoded. `name` is its file name (or image id), the message says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def load_captions(
    dataset: str, split: str, image_dir: str | None = None, revision: str | None = None
) -> datasets.Dataset:
    """Loads one split of a published caption dataset with pictures that can be opened.

    Args:
        dataset: Hub id or local folder, as `load_dataset` takes it.
        split: e.g. "train".
        image_dir: folder that holds the `file_name`s; used when the dataset has no embedded images.
        revision: of a dataset on the Hub.

    Returns:
        One row per image (see DESIGN: image_id, captions, ...). Column `image` is undecoded,
        {"bytes": bytes | None, "path": str | None}; `open_image` reads it.

    Raises:
        DatasetError: no such split, or the dataset has neither embedded images nor an image_dir.
    """
    revision = None if Path(dataset).exists() else revision
    splits = datasets.get_dataset_split_names(dataset, revision=revision)
    if split not in splits:
        raise DatasetError(f"{dataset} has no split {split!r}; it has {', '.join(splits)}")
    rows = datasets.load_dataset(dataset, split=split, revision=revision)
    if "image" in rows.column_names:
        return rows.cast_column("image", datasets.Image(decode=False))
    if not image_dir:
        raise DatasetError(
            f"{dataset} ({split}) holds captions but no images. Fetch the photographs with `python"
            f" scripts/fetch_images.py --dataset {dataset} --split {split} --output_dir images` and add `--image_dir"
            " images`, or build the dataset with `publish_datasets.py --images DIR`."
        )
    folder = Path(image_dir)
    if not folder.is_dir():
        raise DatasetError(f"--image_dir {image_dir} is not a folder")
    paths = [{"bytes": None, "path": str(folder / name)} for name in rows["file_name"]]
    return rows.add_column("image", paths, feature=datasets.Image(decode=False))


def open_image(row: dict) -> Image.Image:
    """Reads the picture of a row of `load_captions` as RGB.

    Raises:
        BadImageError: the file is missing, truncated or no image.
    """
    with _opened(row) as image:
        return image.convert("RGB")


def image_size(row: dict) -> tuple[int, int]:
    """Width and height in pixels of the picture of a row, from its header.

    Raises:
        BadImageError: the file is missing or no image.
    """
    with _opened(row) as image:
        return image.size


@contextmanager
def _opened(row: dict) -> Iterator[Image.Image]:
    cell = row["image"]
    name = row.get("file_name") or cell["path"] or str(row["image_id"])
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
            yield image
    except FileNotFoundError as error:
        raise BadImageError(name, f"no such file: {cell['path']}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(name, str(error)) from error


def dataset_record(dataset: str, split: str, revision: str | None = None) -> dict:
    """What a run record says of a dataset: id, revision, split, licence, corpus.

    The revision is the commit on the Hub; for a folder of publish_datasets.py, the fingerprint of its build. The
    corpus is one of CORPORA by the tags of its card, None for a dataset of other origin.

    Raises:
        DatasetError: there is no such folder and no such dataset on the Hub.
    """
    if Path(dataset).exists():
        card, report = Path(dataset) / "README.md", Path(dataset) / "cleaning_report.json"
        built = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        revision = f"build {built['fingerprint']}" if built else None
    else:
        try:
            revision = HfApi().dataset_info(dataset, revision=revision).sha
            card = hf_hub_download(dataset, "README.md", repo_type="dataset", revision=revision)
        except (httpx2.HTTPError, OSError, HFValidationError) as error:
            raise DatasetError(
                f"{dataset} is no folder, and the Hub does not have it as a dataset ({str(error).splitlines()[0]})."
                " Build it with: python scripts/publish_datasets.py --source stair --tokenizer"
                f" Qwen/Qwen2-VL-2B-Instruct --output_dir {dataset}"
            ) from error
    data = DatasetCard.load(card).data
    corpus = next((name for name in CORPORA if f"{name}-captions" in (data.get("tags") or [])), None)
    return {
        "id": public_name(dataset),
        "revision": revision,
        "split": split,
        "license": data.get("license"),
        "corpus": corpus,
    }


def check_no_overlap(train: datasets.Dataset, other: datasets.Dataset, split: str = "test") -> None:
    """Raises DatasetError when an image is trained on and is in the other split too."""
    both = sorted(set(train["image_id"]) & set(other["image_id"]))
    if both:
        raise DatasetError(
            f"{len(both)} images are in the training and in the {split} split (image_id {both[0]}, ...). Scores on"
            " them would mean nothing: publish the dataset again with disjoint splits, or name other splits."
        )


def missing_files(rows: datasets.Dataset) -> list[int]:
    """Indices of the rows whose picture is neither embedded nor a file. Looks at names only."""
    cells = rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks()
    embedded = cells.field("bytes").is_valid().to_pylist()
    paths = cells.field("path").to_pylist()
    cells = zip(embedded, paths, strict=True)
    return [i for i, (inside, path) in enumerate(cells) if not inside and not Path(path).is_file()]


def check_images(rows: datasets.Dataset, split: str) -> None:
    """Decodes every picture of a split, with a progress bar, before a run that will need all of them.

    Raises:
        DatasetError: naming the pictures that cannot be read.
    """
    bad = []
    for row in tqdm(rows.select_columns(["image", "image_id", "file_name"]), desc=f"checking images of {split}"):
        try:
            open_image(row)
        except BadImageError as error:
            bad.append(str(error))
    if bad:
        raise DatasetError(
            f"{len(bad)} of {len(rows)} pictures of the {split} split cannot be read, so it cannot be scored:\n  "
            + "\n  ".join(bad[:20])
            + ("\n  ..." if len(bad) > 20 else "")
            + "\nFetch them again with scripts/fetch_images.py."
        )
