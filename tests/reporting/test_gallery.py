"""The page of samples: complete in itself, safe with any text, right for both kinds of image."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageDraw

from vlmcap.reporting.gallery import write_sample_page

ROWS = [["", "base", "adapter"], ["CIDEr-D", "0.0100", "2.3400"]]
SAID = {"references": ["赤い四角がある", "四角は赤い"], "base": "a red square", "adapter": "赤い四角がある"}


class Page(HTMLParser):
    """Tags with their attributes, and the text inside each element with a class."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if data.strip():
            self.texts.append((*self.stack[-1], data.strip()))

    def text(self, css_class: str) -> list[tuple[str, str]]:
        return [(data, attrs.get("lang")) for _, attrs, data in self.texts if attrs.get("class") == css_class]


def scene() -> Image.Image:
    image = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(image).rectangle((10, 10, 40, 40), fill=(220, 30, 30))
    return image


@pytest.fixture
def item():
    return {"image": scene(), "image_id": 7, "captions": {None: SAID}}


def written(tmp_path, items, **kwargs) -> tuple[str, Page]:
    path = write_sample_page(tmp_path / "new" / "samples.html", "Samples", items, {None: ROWS}, **kwargs)
    text = path.read_text("utf-8")
    return text, Page(text)


def embedded(parsed: Page) -> list[tuple[dict, Image.Image]]:
    images = [attrs for tag, attrs in parsed.tags if tag == "img"]
    return [(a, Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1])))) for a in images]


def test_captions_and_scores_are_on_the_page_in_their_language(tmp_path, item):
    _, parsed = written(tmp_path, [item], note="Never trained on.")
    assert not parsed.stack
    assert parsed.text("adapter") == [("赤い四角がある", "ja")]
    assert parsed.text("base") == [("a red square", "en")]
    assert parsed.text("reference") == [("赤い四角がある", "ja"), ("四角は赤い", "ja")]
    assert parsed.text("match") == [("same as a reference", None)]
    cells = [data for tag, _, data in parsed.texts if tag in ("th", "td")]
    assert cells == ["base", "adapter", "CIDEr-D", "0.0100", "2.3400"]
    assert ("p", {}, "Never trained on.") in parsed.texts


def test_nothing_is_fetched(tmp_path, item):
    text, parsed = written(tmp_path, [item])
    addresses = [a[key] for _, a in parsed.tags for key in ("src", "href") if key in a]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"https?://|url\(|@import|<script", text)


def test_any_text_is_text(tmp_path, item):
    nasty = "<script>alert(\"x\")</script> & <b lang='ja'>"
    said = {"base": nasty, "adapter": nasty, "references": [nasty]}
    item |= {"captions": {nasty: said}, "image_id": '"><i>'}
    path = write_sample_page(tmp_path / "page.html", nasty, [item], {nasty: [[nasty] * 3] * 2}, note=nasty)
    parsed = Page(path.read_text("utf-8"))
    assert parsed.text("key") == [(nasty, None)]
    assert not {"script", "b", "i"} & {tag for tag, _ in parsed.tags}
    assert parsed.text("base") == parsed.text("adapter") == parsed.text("reference") == [(nasty, "en")]


def test_scenes_keep_their_pixels_and_photographs_are_bounded(tmp_path, item):
    photograph = item | {"image": Image.effect_noise((1280, 960), 50), "image_id": 8}
    _, parsed = written(tmp_path, [item, photograph])
    (small, drawing), (large, photo) = embedded(parsed)
    assert drawing.format == "PNG" and drawing.convert("RGB").tobytes() == scene().tobytes()
    assert small["class"] == "drawing"
    assert photo.format == "JPEG" and photo.size == (640, 480) == (int(large["width"]), int(large["height"]))
    assert "class" not in large


def test_captions_are_headed_and_marked_by_language_as_the_table_is(tmp_path, item):
    said = {"base": "a red square", "adapter": "Hình vuông màu đỏ.", "references": ["Một hình vuông màu đỏ."]}
    item["captions"] = {None: said}
    rows = [["", "before training", "model"], ["BLEU-1", "0.1000", "0.9000"]]
    text = write_sample_page(tmp_path / "page.html", "Samples", [item], {None: rows}).read_text("utf-8")
    assert "<dt>Before training</dt>" in text and "<dt>Model</dt>" in text
    assert [Page(text).text(name)[0][1] for name in ("base", "adapter", "reference")] == ["en", "vi", "vi"]


def test_an_empty_caption_is_said_to_be_empty(tmp_path, item):
    _, parsed = written(tmp_path, [item | {"captions": {None: SAID | {"base": ""}}}])
    assert [data for data, _ in parsed.text("empty")] == ["(empty)"]
    assert not parsed.text("base") and len(parsed.text("adapter")) == 1


def test_captions_of_every_key_are_under_its_name_and_one_that_a_picture_lacks_is_left_out(tmp_path, item):
    english = {"references": ["a red square"], "base": "a square", "adapter": "a red square"}
    both = item | {"captions": {"ja/plain": SAID, "en": english}}
    alone = item | {"captions": {"ja/plain": SAID}, "image_id": 8}
    tables = {"ja/plain": ROWS, "en": [ROWS[0], ["CIDEr-D", "1.0000", "2.0000"]]}
    parsed = Page(write_sample_page(tmp_path / "page.html", "Samples", [both, alone], tables).read_text("utf-8"))
    assert not parsed.stack
    assert [key for key, _ in parsed.text("key")] == ["ja/plain", "en", "ja/plain"]
    assert [data for tag, _, data in parsed.texts if tag == "caption"] == ["ja/plain", "en"]
    assert [text for text, _ in parsed.text("adapter")] == ["赤い四角がある", "a red square", "赤い四角がある"]
