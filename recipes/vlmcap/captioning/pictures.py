"""Which pictures are meant by names, folders and patterns, and their pixels, read by threads ahead of the model."""

import glob
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from PIL import Image

from vlmcap.captioning.stream import CaptionStream
from vlmcap.data.images import BadImageError, open_image
from vlmcap.data.picture_files import ENDINGS
from vlmcap.errors import UserError

READ_AHEAD = 8  # pictures that wait for the model,
WAITING_PIXELS = 200_000_000  # and their pixels: 0.6 GB as RGB, 16 photographs of 12 megapixels

T = TypeVar("T")


class PictureError(UserError):
    """Some pictures were not captioned, or none was found. The message names them, each with its reason."""


def find_pictures(names: Iterable[str]) -> list[str]:
    """Paths of the pictures that are meant, each once, in the order of the names; those of a folder sorted.

    A name is a file, a folder (with everything in it and in its subfolders), a pattern with * ? [ ] and ** (unless
    there is a file of this name), or - for names on stdin, files and folders, one a line or separated by NUL. Files
    that are not there are among them: reading them says so. A folder that several symbolic links lead to is walked
    once, and by its own path where that is below the folder too.

    Raises:
        PictureError: no picture is found.
    """
    found: dict[str, str] = {}  # absolute path -> as it was named
    visited: set[tuple[int, int]] = set()
    for name in names:
        for path in _listed(sys.stdin.buffer.read()) if name == "-" else _matching(name):
            for file in _files(path, visited) if os.path.isdir(path) else [path]:
                found.setdefault(os.path.abspath(file), file)
    if not found:
        raise PictureError(
            f"there is no picture in {', '.join(map(shown_name, names))} (files ending in {', '.join(ENDINGS)})"
        )
    return list(found.values())


def _listed(data: bytes) -> list[str]:
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


def _matching(name: str) -> list[str]:
    if not glob.has_magic(name) or os.path.lexists(name):
        return [name]
    matches = sorted(glob.glob(name, recursive=True))
    return [path for path in matches if os.path.isdir(path) or is_picture_name(os.path.basename(path))] or [name]


def _files(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Pictures below a folder. Links to folders wait until all real ones are walked."""
    waiting, links = [folder], []
    while waiting or links:
        path = waiting.pop() if waiting else links.pop(0)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            yield path if error.filename is None else error.filename  # reading it says what is wrong
            continue
        folders = [entry for entry in entries if os.path.isdir(entry)]
        yield from (entry.path for entry in entries if entry not in folders and is_picture_name(entry.name))
        links += [entry.path for entry in folders if entry.is_symlink()]
        waiting += [entry.path for entry in reversed(folders) if not entry.is_symlink()]


def is_picture_name(name: str) -> bool:
    """Whether a file in a folder is taken for a picture: by its ending; ._x.jpg is what macOS notes about x.jpg."""
    return name.lower().endswith(ENDINGS) and not name.startswith("._")


def shown_name(path: str) -> str:
    """A path as it is written into files and messages: bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """A text on one line of a terminal: control characters, which could move its cursor, are escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], text)


def read_picture(path: str) -> Image.Image:
    """The picture as 8-bit RGB, upright, on white, as `open_image` reads it everywhere.

    Raises:
        BadImageError: it is not a file, or not a picture that can be read.
    """
    name = shown_name(path)
    if not os.path.isfile(path):  # opening a pipe would wait without end
        reason = "no such file" if not os.path.exists(path) else "a folder" if os.path.isdir(path) else "not a file"
        if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
            reason = "a folder that may not be read"
        raise BadImageError(name, reason)
    return open_image({"image": {"bytes": None, "path": path}, "file_name": name})


def read_ahead(
    paths: Iterable[str], read: Callable[[str], T], workers: int, ahead: int
) -> Iterator[tuple[str, T | Exception]]:
    """(path, what `read` returns or the OSError or ValueError that it raises), in order, read by threads.

    At most `ahead` + `workers` results wait; of pictures fewer, if they have more than WAITING_PIXELS together.
    """
    waiting: deque[tuple[str, Future]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for path in paths:
            waiting.append((path, pool.submit(read, path)))
            while len(waiting) >= ahead + workers or (len(waiting) > workers and _pixels(waiting) > WAITING_PIXELS):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(path: str, future: Future) -> tuple[str, object]:
    try:
        return path, future.result()
    except (OSError, ValueError) as error:
        return path, error


def _pixels(waiting: Iterable[tuple[str, Future]]) -> int:
    results = [future.result() for _, future in waiting if future.done() and not future.exception()]
    return sum(result.width * result.height for result in results if isinstance(result, Image.Image))


def caption_pictures(
    paths: Iterable[str], stream: CaptionStream, workers: int, read: Callable[[str], Image.Image] = read_picture
) -> Iterator[tuple[str, list[str] | Exception]]:
    """(path, captions of the picture, or why it cannot be read), in order.

    Memory does not grow with the number of pictures.
    """
    waiting: deque[tuple[str, Exception | None]] = deque()  # those that `stream` took, and those that cannot be read

    def readable() -> Iterator:
        for path, prepared in read_ahead(paths, lambda path: stream.prepare(read(path)), workers, READ_AHEAD):
            if isinstance(prepared, Exception):
                waiting.append((path, prepared))
            else:
                waiting.append((path, None))
                yield prepared
            del prepared

    def failed() -> Iterator[tuple[str, Exception]]:
        while waiting and waiting[0][1] is not None:
            yield waiting.popleft()

    for captions in stream.run(readable()):
        yield from failed()
        yield waiting.popleft()[0], captions
    yield from failed()
