"""Pages of pictures with their captions: self-contained, several of them for many pictures, safe with hostile text."""

import re

import pytest
from PIL import Image

from vlmcap.data.images import BadImageError
from vlmcap.reporting.caption_pages import write_caption_pages

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def read(name: str) -> Image.Image:
    if name == "gone.jpg":
        raise BadImageError(name, "no such file")
    return Image.new("RGB", (800, 600), "red")


def test_many_pictures_are_on_several_pages(tmp_path):
    entries = [(f"{number}.jpg", [f"caption {number}", "another"]) for number in range(7)]
    pages = write_caption_pages(tmp_path / "a b.html", "Captions", entries, read, on_a_page=3)
    assert [page.name for page in pages] == ["a b.html", "a b-2.html", "a b-3.html"]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    assert [text.count("<figure>") for text in texts] == [3, 3, 1]
    assert [int(n) for text in texts for n in re.findall(r'"best" lang="en">caption (\d)', text)] == list(range(7))
    for number, text in enumerate(texts):
        links = re.findall(r'<a href="([^"]+)"', text)
        addresses = ["./a%20b.html", "./a%20b-2.html", "./a%20b-3.html"]
        assert links == [address for address in addresses if address != addresses[number]]
        assert "7 pictures, page" in text and 'width="320"' in text


@pytest.mark.parametrize("name", ["a.jpg", HOSTILE])
def test_nothing_of_a_name_or_caption_is_markup(tmp_path, name):
    (page,) = write_caption_pages(tmp_path / "c.html", HOSTILE, [(name, [HOSTILE, HOSTILE])], read)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and text.count("<img") == 1 and "script-src 'none'" in text


def test_a_picture_that_is_gone_and_no_pictures(tmp_path):
    (page,) = write_caption_pages(tmp_path / "c.html", "Captions", [("gone.jpg", ["", "x"])], read)
    text = page.read_text(encoding="utf-8")
    assert "<img" not in text and "cannot be read any more (no such file)" in text and "(empty)" in text
    (page,) = write_caption_pages(tmp_path / "none.html", "Captions", [], read)
    assert "0 pictures." in page.read_text(encoding="utf-8")
