"""Files that are whole or not there."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) that a reader, a crash or a full disk finds either as it was or whole and new.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Raises OSError unless a file can be made in the folder or, where it does not exist, in the nearest that does."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    with tempfile.TemporaryFile(dir=there):
        pass


def check_output(path: Path) -> None:
    """Raises OSError unless a file can be written there: before work whose result it will hold."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    check_writable(path.parent)


def git_blob_id(content: bytes) -> str:
    """What git calls a file of this content (`git hash-object`): the SHA-1 of `blob SIZE\\0` and the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
