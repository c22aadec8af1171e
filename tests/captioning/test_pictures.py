"""Which pictures are meant, how they are read, and how many wait in memory."""

import io
import os
import sys
import threading
import unicodedata
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
from PIL import Image

from vlmcap.captioning import pictures
from vlmcap.captioning.pictures import (
    PictureError,
    caption_pictures,
    find_pictures,
    printable,
    read_ahead,
    read_picture,
    shown_name,
)
from vlmcap.data.images import BadImageError

NAMES = ["a b.jpg", "100%.PNG", "写真 😀.webp", unicodedata.normalize("NFD", "がぎ.jpeg"), "-dash.gif"]
NAMES += ["phone.HEIC", "new.avif"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(*paths, size=(4, 3)):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            Image.new("RGB", size, "red").save(file, format="PNG")


def test_a_folder_with_its_subfolders(folder):
    draw(*(folder / "photos" / name for name in NAMES), folder / "photos/one/same.jpg", folder / "photos/two/same.jpg")
    (folder / "photos/notes.txt").write_text("no picture")
    draw(folder / "photos/._a b.jpg")  # macOS's notes on a picture
    found = find_pictures(["photos"])
    assert found[:7] == [f"photos/{name}" for name in sorted(NAMES)]
    assert found[7:] == ["photos/one/same.jpg", "photos/two/same.jpg"]
    assert all(read_picture(path).size == (4, 3) for path in found)


def test_a_picture_counts_once_however_it_is_named(folder):
    draw(folder / "photos/a.jpg", folder / "b.jpg")
    names = ["b.jpg", "photos", "./photos/a.jpg", str(folder / "photos"), "photos/*.jpg", "b.jpg"]
    assert find_pictures(names) == ["b.jpg", "photos/a.jpg"]


def test_links_are_followed_once_and_end(folder):
    draw(folder / "photos/z/a.jpg", folder / "elsewhere/b.jpg")
    (folder / "photos/again").symlink_to(folder / "photos/z")
    (folder / "photos/z/up").symlink_to(folder / "photos")
    (folder / "photos/out").symlink_to(folder / "elsewhere")
    (folder / "photos/link.jpg").symlink_to(folder / "elsewhere/b.jpg")
    (folder / "photos/loop.jpg").symlink_to("loop.jpg")
    (folder / "photos/broken.jpg").symlink_to("nothing")
    found = find_pictures(["photos"])
    assert found == [
        "photos/broken.jpg",
        "photos/link.jpg",
        "photos/loop.jpg",
        "photos/z/a.jpg",
        "photos/out/b.jpg",
    ]
    for path, message in (("photos/loop.jpg", "no such file"), ("photos/broken.jpg", "no such file")):
        with pytest.raises(BadImageError, match=message):
            read_picture(path)


def test_patterns(folder):
    draw(folder / "photos/a.jpg", folder / "photos/deep/er/b.png", folder / "photos/[1].jpg")
    (folder / "photos/notes.md").write_text("no picture")
    assert find_pictures(["photos/*.jpg"]) == ["photos/[1].jpg", "photos/a.jpg"]
    assert find_pictures(["photos/[1].jpg"]) == ["photos/[1].jpg"]  # a file of this name comes before the pattern
    assert find_pictures(["photos/**"]) == ["photos/[1].jpg", "photos/a.jpg", "photos/deep/er/b.png"]
    assert find_pictures(["none*.jpg"]) == ["none*.jpg"]  # reading it says that there is none


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_a_list_on_stdin(folder, monkeypatch, separator):
    draw(folder / "a b.jpg", folder / "photos/c.jpg", folder / "*.jpg")
    data = separator.join([b"a b.jpg", b"photos", b"*.jpg", b"none\xff.jpg", b""])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    found = find_pictures(["-"])
    assert found[:3] == ["a b.jpg", "photos/c.jpg", "*.jpg"]
    assert shown_name(found[3]) == "none\\xff.jpg"


def test_nothing_found(folder):
    (folder / "empty").mkdir()
    with pytest.raises(PictureError, match="there is no picture in empty"):
        find_pictures(["empty"])


def test_what_is_not_a_picture_file(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "empty.jpg").touch()
    for name, reason in (("pipe", "not a file"), ("folder", "a folder"), ("empty", "not an image"), ("x", "no such")):
        with pytest.raises(BadImageError, match=f"{name}.jpg: {reason}"):
            read_picture(f"{name}.jpg")


def test_names_cannot_move_the_cursor_of_a_terminal():
    assert printable("a\x1b[2Jb\nc\td") == "a\\x1b[2Jb\\nc\\td"
    assert printable("写真 😀") == "写真 😀"


def test_order_and_errors_of_reading_ahead():
    def read(path):
        if path == "3":
            raise BadImageError(path, "broken")
        return int(path)

    found = list(read_ahead(map(str, range(50)), read, workers=4, ahead=5))
    assert [path for path, _ in found] == [str(number) for number in range(50)]
    assert [value for path, value in found if path != "3"] == [number for number in range(50) if number != 3]
    assert isinstance(found[3][1], BadImageError)


class Stream:
    """In place of CaptionStream: says what `say` makes of a picture, three pictures after it took it."""

    def __init__(self, say):
        self.say = say

    def prepare(self, image):
        return image

    def run(self, images):
        waiting = deque()
        for image in images:
            waiting.append(self.say(image))
            if len(waiting) > 3:
                yield waiting.popleft()
        yield from waiting


@pytest.mark.parametrize("count", [100, 1000])
def test_few_pictures_are_alive_whatever_their_number(count):
    workers = 3
    lock, alive, most = threading.RLock(), 0, 0  # a finalizer may run while the lock is held

    def gone():
        nonlocal alive
        with lock:
            alive -= 1

    def read(path):
        nonlocal alive
        image = Image.new("RGB", (8, 8))
        with lock:
            alive += 1
        weakref.finalize(image, gone)
        return image

    def say(image):
        nonlocal most
        most = max(most, alive)
        return ["a caption"]

    found = list(caption_pictures(map(str, range(count)), Stream(say), workers, read))
    assert [path for path, _ in found] == list(map(str, range(count)))
    assert 2 <= most <= pictures.READ_AHEAD + workers + 3  # three: on their way from one place to the other


@pytest.mark.parametrize("broken", ["x..y", "xx..", "..xx", "x", "xxxx", "....."])
def test_captions_are_those_of_their_pictures_whatever_cannot_be_read(broken):
    def read(path):
        if broken[int(path)] == "x":
            raise BadImageError(path, "broken")
        return Image.new("RGB", (1 + int(path), 1))

    found = list(caption_pictures(map(str, range(len(broken))), Stream(lambda image: [image.width]), 2, read))
    assert [path for path, _ in found] == list(map(str, range(len(broken))))
    for path, said in found:
        assert isinstance(said, BadImageError) if broken[int(path)] == "x" else said == [1 + int(path)]
