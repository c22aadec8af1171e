"""Where the pictures of a dataset are: in a folder, in COCO's folders or zip files, which are read as they are."""

import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol

from vlmcap.data.errors import DataError

# How names of pictures end (vlmcap.data.pictures.FORMATS). In folders they choose files; a file that is named itself
# is opened whatever its name is. HEIC is among them without pillow-heif too: reading it says what is missing.
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".mpo")
ENDINGS += (".avif", ".heic", ".heif")
# COCO's official folders; its zip files have the same names and hold these folders.
COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017")
# The same photograph is COCO_val2014_000000391895.jpg in COCO 2014 and 000000391895.jpg in COCO 2017.
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)")
MAX_BYTES = 2**28  # of a picture in a zip file
IN_ZIP = re.compile(r"(.+?\.zip)/(.+)", re.I | re.S)


class Picture(Protocol):
    """A picture that has not been read."""

    @property
    def size(self) -> int: ...  # bytes

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class PictureFile:
    """A picture by its path, which may be in a zip file."""

    path: str

    @property
    def size(self) -> int:
        inside = _in_zip(self.path)
        return os.path.getsize(self.path) if inside is None else inside[0].getinfo(inside[1]).file_size

    def read(self) -> bytes:
        with open_picture(self.path) as file:
            return file.read()


def picture_finder(image_dir: str | Path) -> Callable[[str], str | None]:
    """A function from the file name in a dataset to the path of the picture, None where it is not there.

    Looks in the folder, in COCO's folders below it and in the zip files directly in it; a COCO photograph is found
    under its other name too. A picture in a zip file has the path FILE.zip/MEMBER, for `open_picture`.

    Args:
        image_dir: a folder, or a zip file.

    Raises:
        DataError: there is no such folder or zip file, or a zip file in it is damaged.
    """
    folder = Path(image_dir)
    if not folder.is_dir() and not zipfile.is_zipfile(folder):
        raise DataError(f"--image_dir {image_dir} is not a folder, nor a zip file.")
    zips = sorted(folder.glob("*.zip")) if folder.is_dir() else [folder]
    members: dict[str, str] = {}
    for path in zips:
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name: f"{path}/{name}" for name in archive.namelist()} | members
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a whole zip file ({error}). Download it again, or move it away.") from error

    def find(name: str) -> str | None:
        for candidate in _places(name):
            if candidate in members:
                return members[candidate]
            if os.path.isfile(folder / candidate):
                return str(folder / candidate)
        return None

    return find


def _places(name: str) -> Iterator[str]:
    """Where a picture may be below the folder, the likeliest first."""
    yield name
    yield from (f"{part}/{name}" for part in COCO_FOLDERS)
    if found := COCO_NAME.fullmatch(name):
        for part in COCO_FOLDERS:
            other = f"COCO_{part}_{found[1]}" if part.endswith("2014") else found[1]
            yield from (other, f"{part}/{other}")


@cache
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """The zip file, opened once in each process: one inherited by a fork would share its place in the file."""
    return zipfile.ZipFile(path)


def _in_zip(path: str) -> tuple[zipfile.ZipFile, str] | None:
    """The archive and the member that a path names; None for an ordinary file."""
    found = None if os.path.exists(path) else IN_ZIP.fullmatch(path)
    if not found or not os.path.isfile(found[1]):
        return None
    return _archive(found[1], os.getpid()), found[2]


def is_picture_file(path: str) -> bool:
    """Whether there is a file, or a member of a zip file. Reads no picture."""
    inside = _in_zip(path)
    return os.path.isfile(path) if inside is None else inside[1] in inside[0].NameToInfo


def open_picture(path: str) -> BinaryIO:
    """The file of a picture, or the member of a zip file (FILE.zip/MEMBER), open for reading.

    Raises:
        OSError: it is not there, or the zip file is damaged.
    """
    inside = _in_zip(path)
    if inside is None:
        return open(path, "rb")
    archive, member = inside
    try:
        if archive.getinfo(member).file_size > MAX_BYTES:
            raise OSError(f"unpacked it has more than the {MAX_BYTES:,} bytes that are read here")
        return io.BytesIO(archive.read(member))
    except KeyError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise OSError(f"the zip file is damaged ({error})") from error
