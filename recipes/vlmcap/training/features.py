"""Cached image features: what the frozen vision tower hands to the projector, computed once and kept on disk.

A cache is a folder named by a hash of all that the features depend on but the picture (settings.json says what):

    features.bin   the features of one picture after the other, a row of numbers a patch; read through a memory map
    index.jsonl    one line a picture: {"image": sha256 of its file, "offset": rows before it, "patches": rows, "grid"}
                   and "more": true, unless it is the last of those that went through the tower together

Pictures are known by their contents: renamed ones are found again, changed ones are computed again. Features are kept
in the dtype in which the tower computes (bfloat16 on compute capability 8.0 and later, float16 on older GPUs, float32
on a CPU), so that training on them is training on the pictures, to the last digit wherever the tower's result does
not depend on which pictures share a batch (tests/invariants).
"""

import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin

from vlmcap.atomic_write import write_atomically
from vlmcap.data.errors import DataError
from vlmcap.data.images import BadImageError, image_size, open_image
from vlmcap.data.picture_files import PictureFile
from vlmcap.data.pictures import READING
from vlmcap.models.tower import projector_blocks, projector_inputs, tower_hash
from vlmcap.threads import map_ahead
from vlmcap.training.collator import BadImages

BATCH = 16  # pictures a forward; at 1,600 patches each, 120 MB of pixels
READ_AHEAD = 4  # batches that are read, a thread each, while the tower works


class FeatureCache:
    """Features of the pictures of `rows`, a dataset; `batch` takes indices into it. Made by `cache_features`."""

    def __init__(self, path: Path, rows: datasets.Dataset, entries: list[dict], width: int, dtype: torch.dtype):
        self.path, self.rows, self.dtype = path, rows, dtype
        self.offsets = [entry["offset"] for entry in entries]
        self.grids = torch.tensor([entry["grid"] for entry in entries])
        patches = max((entry["offset"] + entry["patches"] for entry in entries), default=0)
        self.shape = (patches, width * dtype.itemsize)
        self.bytes = None

    def __getstate__(self):
        return self.__dict__ | {"bytes": None}  # pickled, a memory map would be a copy of the whole file

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """What the image processor returns for the pictures, with features in place of pixels.

        Returns:
            pixel_values: of the cache's dtype, (patches, projector inputs * tower width).
            image_grid_thw: int64, (B, 3).
        """
        if self.bytes is None:
            # Not torch.from_file: it maps for writing, which Linux refuses for files larger than the memory.
            self.bytes = np.memmap(self.path, mode="r", shape=self.shape)
        grids = self.grids[rows]
        ends = zip([self.offsets[row] for row in rows], grids.prod(1).tolist(), strict=True)
        pictures = np.concatenate([self.bytes[start : start + patches] for start, patches in ends])
        return {"pixel_values": torch.from_numpy(pictures).view(self.dtype), "image_grid_thw": grids}


def cache_features(
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    model_name: str,
    model_revision: str | None,
    bad_images: BadImages,
) -> FeatureCache:
    """Computes the features that are not in `folder` yet, in batches, on the model's device; prints their size first.

    An interrupted run continues, with the batches of an uninterrupted one. Pictures that cannot be read are listed in
    `bad_images` and left out of the result's `rows`. Of several processes or runs, one computes and the others wait
    for it at a file lock: a barrier of torch.distributed would give up after minutes.

    Args:
        model: of `models.load.MODEL_TYPES`, before `tower.feed_features`.
        rows: as `load_captions` returns them.

    Raises:
        DataError: the disk is too small, or too many pictures cannot be read.
    """
    tower, image_processor, state = model.model.visual.eval(), processor.image_processor, PartialState()
    width = len(projector_blocks(tower)) * tower.blocks[0].norm1.weight.numel()
    text = settings_text(tower, image_processor, width, model_name, model_revision)
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    with state.split_between_processes(list(range(len(rows)))) as share, ThreadPoolExecutor() as pool:
        found = pool.map(partial(identify, rows, image_processor), share)
        bar = tqdm(found, total=len(share), desc="hashing pictures", disable=not state.is_main_process)
        pictures = gather_object(list(bar))
    with FileLock(folder / "lock"):
        write_atomically(folder / "settings.json", text)
        row_bytes = width * tower.dtype.itemsize
        index = resume(folder, row_bytes)
        new, patches = defaultdict(list), {}
        for row, (image, size) in enumerate(pictures):
            if image is None:
                bad_images.add(rows[row]["image_id"], rows[row]["file_name"], size)
            elif image not in index:
                new[image].append(row)
                patches[image] = size
        check_space(folder, len(rows), len(new), sum(patches.values()) * row_bytes)
        compute(folder, tower, image_processor, rows, new, index, bad_images)
    usable = [row for row, (image, _) in enumerate(pictures) if image in index]
    entries = [index[pictures[row][0]] for row in usable]
    return FeatureCache(folder / "features.bin", rows.select(usable), entries, width, tower.dtype)


def settings_text(
    tower: PreTrainedModel,
    image_processor: BaseImageProcessor,
    width: int,
    model_name: str,
    model_revision: str | None,
) -> str:
    """All that the features depend on but the picture, as settings.json has it."""
    settings = {
        "model": model_name,
        "revision": model_revision,
        "tower_sha256": tower_hash(tower),
        "blocks": projector_blocks(tower),
        "width": width,
        "dtype": str(tower.dtype),
        "pictures": READING,
        "image_processor": image_processor.to_dict(),
    }
    return json.dumps(settings, indent=2, sort_keys=True)


def check_space(folder: Path, pictures: int, new: int, need: int) -> None:
    """Prints how many bytes the features need of those of the `pictures` that are `new`.

    Raises:
        DataError: `folder` has fewer.
    """
    free = shutil.disk_usage(folder).free
    if new or PartialState().is_main_process:
        print(
            f"Image features: {pictures:,} pictures, {new:,} of them new; {need / 2**30:,.2f} GiB to write"
            f" to {folder}, which has {free / 2**30:,.2f} GiB free",
            other_features(folder),
            sep="",
            flush=True,
        )
    if need > free:
        raise DataError(
            f"the features of {new:,} pictures need {need / 2**30:,.2f} GiB, and {folder} has"
            f" {free / 2**30:,.2f} GiB free. Name a folder on a larger disk, lower max_pixels, or train without"
            " cached features (cache_image_features)."
        )


def compute(
    folder: Path,
    tower: PreTrainedModel,
    image_processor: BaseImageProcessor,
    rows: datasets.Dataset,
    new: dict[str, list[int]],
    index: dict[str, dict],
    bad_images: BadImages,
) -> None:
    """Appends the features of the pictures `new` (hash: rows) to the files and to `index`, features before lines."""

    def read(images: list[str]) -> list[dict]:
        pictures = []
        for image in images:
            try:
                picture = image_processor(open_image(rows[new[image][0]]), return_tensors="pt")
                pictures.append({"image": image, **picture})
            except BadImageError as error:
                for row in new[image]:
                    bad_images.add(rows[row]["image_id"], rows[row]["file_name"], error.reason)
        return pictures

    end = max((entry["offset"] + entry["patches"] for entry in index.values()), default=0)
    images = list(new)
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    bar = tqdm(
        map_ahead(read, batches, READ_AHEAD, READ_AHEAD), total=len(batches), desc="image features", disable=not new
    )
    for pictures in filter(None, bar):
        pixel_values, grids = (
            torch.cat([p[key] for p in pictures]).to(tower.device) for key in ("pixel_values", "image_grid_thw")
        )
        append(
            folder / "features.bin", projector_inputs(tower, pixel_values, grids).cpu().view(torch.uint8).numpy().data
        )
        lines = ""
        for image, grid in zip([p["image"] for p in pictures], grids.tolist(), strict=True):
            index[image] = {"image": image, "offset": end, "patches": math.prod(grid), "grid": grid}
            more = {} if image == pictures[-1]["image"] else {"more": True}
            lines += json.dumps(index[image] | more) + "\n"
            end += math.prod(grid)
        append(folder / "index.jsonl", lines.encode())


def append(path: Path, content: bytes | memoryview) -> None:
    """Adds to the end of a file and waits until the disk has it.

    Raises:
        DataError: the disk is full, or fails.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); {shutil.disk_usage(path.parent).free:,} bytes are free. The"
            " features that are there are kept: free space and start again, or name a folder on a larger disk"
            " (cache_image_features)."
        ) from error


def other_features(folder: Path) -> str:
    """A line about the features of other models or settings beside `folder`, which nothing deletes; or nothing."""
    others = {
        path.parent: sum(file.stat().st_size for file in path.parent.iterdir())
        for path in sorted(folder.parent.glob("*/settings.json"))
        if path.parent != folder
    }
    if not others:
        return ""
    names = ", ".join(f"{path.name} ({size / 2**30:,.2f} GiB)" for path, size in others.items())
    return (
        f"\nFeatures of other models or settings are in {folder.parent}: {names}. Their settings.json says which"
        " ones. Delete what no run needs."
    )


def identify(rows: datasets.Dataset, image_processor: BaseImageProcessor, row: int) -> tuple[str | None, int | str]:
    """Hash of a picture's file and number of its patches, from the header; or None and why it cannot be read."""
    record = rows[row]
    try:
        width, height = image_size(record)
        patches = image_processor.get_number_of_image_patches(height, width, {})
    except BadImageError as error:
        return None, str(error)
    inside, path = record["image"]["bytes"], record["image"]["path"]
    return hashlib.sha256(PictureFile(path).read() if inside is None else inside).hexdigest(), patches


def resume(folder: Path, row_bytes: int) -> dict[str, dict]:
    """The index by image. Cuts off what an interrupted run left half-written in the files, and the whole of its last
    batch: with it the batches that follow are those of an uninterrupted run, and so are the features."""
    features, lines = folder / "features.bin", folder / "index.jsonl"
    features.touch()
    lines.touch()
    index, batch, end, kept, size = {}, {}, 0, 0, features.stat().st_size
    position = 0
    for line in lines.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # a block of zeros, where the machine lost power
            break
        if entry is None or (entry["offset"] + entry["patches"]) * row_bytes > size:
            break
        position += len(line)
        more = entry.pop("more", False)
        batch[entry["image"]] = entry
        if not more:
            index |= batch
            batch, end, kept = {}, entry["offset"] + entry["patches"], position
    os.truncate(lines, kept)
    os.truncate(features, end * row_bytes)
    return index
