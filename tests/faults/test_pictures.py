"""Pictures of every kind that exists (vlmcap.data.images): one outcome, wherever a picture is read."""

import base64
import io
import json
import re
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from transformers import AutoImageProcessor, AutoProcessor

from tests.reporting.documents import PARTS, adapter_document, family_document
from vlmcap.captioning.isolated_runners.loading import open_png
from vlmcap.data import pictures
from vlmcap.data.errors import DataError
from vlmcap.data.fetch import _flaw
from vlmcap.data.images import (
    BadImageError,
    check_images,
    dataset_record,
    image_size,
    load_captions,
    missing_files,
    open_image,
)
from vlmcap.data.picture_files import PictureFile
from vlmcap.data.publish import _check_images
from vlmcap.reporting.cards import render_adapter_card
from vlmcap.reporting.html import PIXEL_ART, embed
from vlmcap.training.collator import BadImages, read_example
from vlmcap.training.features import identify


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(width: int = 40, height: int = 24) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, across * 0 + 90], 2).astype(np.uint8))


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG that states any size, with further chunks and one pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(b"\0\0\0\0")), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def frames(format: str) -> bytes:
    rest = [Image.new("RGB", (40, 24), colour) for colour in ("blue", "green")]
    return encoded(Image.new("RGB", (40, 24), "red"), format, save_all=True, append_images=rest, duration=100)


GREY16 = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
# Pillow writes TIFF in this machine's order alone: a header, 0x8000 0x80ff, nine entries of a directory.
BIG_ENDIAN = b"MM\0*\0\0\0\x0c" + b"\x80\0\x80\xff" + struct.pack(">H", 9) + b"".join(
    struct.pack(">HHLHH", tag, 3, 1, value, 0) if tag != 273 else struct.pack(">HHLL", tag, 4, 1, value)
    for tag, value in ((256, 2), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 4))
) + bytes(4)  # fmt: skip
PALETTE = Image.new("P", (40, 24), 1)
PALETTE.putpalette([0, 0, 0, 255, 0, 0])
JPEG = encoded(photo(), "JPEG")
WHITE = (255, 255, 255)
TEXTS = PngImagePlugin.PngInfo()
TEXTS.add_text("Comment", "x" * 900_000, zip=True)

# name: (file, size, the first pixel or None where it is not of interest)
READ = {
    "JPEG": (JPEG, (40, 24), None),
    "CMYK JPEG": (encoded(Image.new("CMYK", (40, 24), (0, 255, 255, 0)), "JPEG"), (40, 24), (255, 0, 0)),
    "grey": (encoded(Image.new("L", (40, 24), 7), "PNG"), (40, 24), (7, 7, 7)),
    "bilevel": (encoded(Image.new("1", (40, 24), 1), "PNG"), (40, 24), (255, 255, 255)),
    "16-bit grey PNG": (encoded(GREY16.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"), (4, 1), (255, 255, 255)),
    "16-bit grey TIFF": (encoded(GREY16.crop((2, 0, 4, 1)), "TIFF"), (2, 1), (128, 128, 128)),
    "16-bit grey TIFF, big-endian": (BIG_ENDIAN, (2, 1), (128, 128, 128)),
    "palette": (encoded(PALETTE, "PNG"), (40, 24), (255, 0, 0)),
    "palette with transparency": (encoded(PALETTE, "PNG", transparency=bytes([0, 51])), (40, 24), (255, 204, 204)),
    "palette with a transparent colour": (encoded(PALETTE, "GIF", transparency=1), (40, 24), WHITE),
    "LA": (encoded(Image.new("LA", (40, 24), (9, 0)), "PNG"), (40, 24), WHITE),
    "RGBA": (encoded(Image.new("RGBA", (40, 24), (1, 2, 3, 0)), "PNG"), (40, 24), WHITE),
    "RGBA TIFF": (encoded(Image.new("RGBA", (40, 24), (0, 0, 0, 51)), "TIFF"), (40, 24), (204, 204, 204)),
    "RGB with a transparent colour": (encoded(photo(), "PNG", transparency=(0, 0, 90)), (40, 24), WHITE),
    "grey with a transparent value": (encoded(Image.new("L", (40, 24), 7), "PNG", transparency=7), (40, 24), WHITE),
    "bilevel with a transparent value": (encoded(Image.new("1", (40, 24)), "PNG", transparency=0), (40, 24), WHITE),
    "16-bit grey with a transparent value": (encoded(GREY16, "PNG", transparency=0), (4, 1), WHITE),
    "transparent and sideways": (
        encoded(Image.new("RGBA", (24, 40), (9, 9, 9, 0)), "PNG", exif=exif(6)),
        (40, 24),
        WHITE,
    ),
    "RGBA WebP": (
        encoded(Image.new("RGBA", (40, 24), (0, 0, 255, 255)), "WEBP", lossless=True),
        (40, 24),
        (0, 0, 255),
    ),
    "BMP": (encoded(Image.new("RGB", (40, 24), "red"), "BMP"), (40, 24), (255, 0, 0)),
    "animated GIF": (frames("GIF"), (40, 24), (255, 0, 0)),
    "animated WebP": (frames("WEBP"), (40, 24), None),
    "animated PNG": (frames("PNG"), (40, 24), (255, 0, 0)),
    "TIFF of several pages": (frames("TIFF"), (40, 24), (255, 0, 0)),
    "MPO": (encoded(Image.new("RGB", (40, 24)), "MPO", save_all=True, append_images=[photo()]), (40, 24), (0, 0, 0)),
    "1x1": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), (1, 1), (255, 0, 0)),
    "1x3": (encoded(Image.new("RGB", (1, 3), "red"), "PNG"), (1, 3), (255, 0, 0)),
    "sides of 200 to 1": (encoded(Image.new("RGB", (2_000, 10), "red"), "PNG"), (2_000, 10), (255, 0, 0)),
    "broken EXIF": (encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), (40, 24), None),
    "EXIF that is none": (encoded(photo(), "PNG", exif=b"Exif\0\0garbage"), (40, 24), None),
    "an orientation of 99": (encoded(photo(), "JPEG", exif=exif(99)), (40, 24), None),
    "an orientation in words": (
        encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"),
        (40, 24),
        None,
    ),
    "EXIF of 60 KB": (encoded(photo(), "JPEG", exif=b"Exif\0\0" + bytes(60_000)), (40, 24), None),
    "a colour profile of 2 MB": (encoded(photo(), "JPEG", icc_profile=bytes(2_000_000)), (40, 24), None),
    "text of 900 KB in a PNG": (encoded(photo(), "PNG", pnginfo=TEXTS), (40, 24), None),
}
BOMB = zlib.compress(bytes(3_000_000))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
# name: (file, why it is not read, whether the header says so)
REFUSED = {
    "an empty file": (b"", "not an image of a kind", True),
    "a page": (b"<!DOCTYPE html><title>Sign in</title>", "not an image of a kind", True),
    "SVG": (SVG, "not an image of a kind", True),
    "EPS, for which Pillow starts Ghostscript": (encoded(photo(), "EPS"), "not an image of a kind", True),
    "PDF": (encoded(photo(), "PDF"), "not an image of a kind", True),
    "ICO": (encoded(photo(), "ICO"), "not an image of a kind", True),
    "a header alone": (JPEG[:20], "not an image of a kind|truncated|cannot", True),
    "cut off": (JPEG[:-60], "truncated", False),
    "a cut PNG": (encoded(photo(), "PNG")[:-30], "truncated|broken|unrecognized", False),
    "a cut GIF": (encoded(photo(), "GIF")[:-200], "truncated|not enough|cannot", False),
    "no width": (png(0, 24), "no pixels|not an image of a kind", True),
    "no height": (png(40, 0), "no pixels|not an image of a kind", True),
    "a bomb of 20000x20000": (png(20_000, 20_000), "bomb|more than the 89,478,485", True),
    "a bomb of 10000x10000": (png(10_000, 10_000), "10000x10000 pixels are more than the 89,478,485", True),
    "10000x10": (
        encoded(Image.new("RGB", (10_000, 10)), "PNG"),
        "10000x10 pixels: the aspect ratio is above 200",
        True,
    ),
    "10x10000": (encoded(Image.new("RGB", (10, 10_000)), "JPEG"), "10x10000 pixels: the aspect ratio is", True),
    "a text bomb in a PNG": (png(1, 1, (b"zTXt", b"Comment\0\0" + BOMB)), "too large|MAX_TEXT_CHUNK", True),
    "a profile bomb in a PNG": (png(1, 1, (b"iCCP", b"profile\0\0" + BOMB)), "too large|MAX_TEXT_CHUNK", True),
    "32-bit TIFF": (encoded(Image.new("I", (40, 24)), "TIFF"), "mode I: 32-bit numbers", True),
    "floating-point TIFF": (encoded(Image.new("F", (40, 24)), "TIFF"), "mode F: 32-bit numbers", True),
}


def record(content: bytes, number: int = 1) -> dict:
    image = {"bytes": content, "path": None}
    return {"image": image, "image_id": number, "file_name": f"{number}.jpg", "captions": ["空"]}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name):
    content, size, pixel = READ[name]
    image = open_image(record(content))
    assert (image.mode, image.size, image_size(record(content))) == ("RGB", size, size)
    assert pixel is None or image.getpixel((0, 0)) == pixel


@pytest.fixture(scope="module")
def snippets() -> list[str]:
    """The lines of every card's code that open a picture."""
    cards = [adapter_document(), *map(family_document, PARTS)]
    found = [re.findall(r"^photo = .*?^image\.paste.*?$", render_adapter_card(card), re.S | re.M) for card in cards]
    assert all(found)
    return [code for codes in found for code in codes]


@pytest.mark.parametrize("name", READ)
def test_cards_runners_and_pages_show_the_same_picture(name, snippets, tmp_path):
    expected = open_image(record(READ[name][0]))
    shown = base64.b64decode(embed(expected)["uri"].split(",")[1])
    assert "icc_profile" not in Image.open(io.BytesIO(shown)).info
    assert max(expected.size) > PIXEL_ART or np.array_equal(Image.open(io.BytesIO(shown)), expected)
    if name.startswith("16-bit") or name == "EXIF that is none":  # Pillow alone makes them white, or fails
        return
    assert np.array_equal(open_png(READ[name][0]), expected)
    (tmp_path / "photo.jpg").write_bytes(READ[name][0])
    for code in snippets:
        seen = {"Image": Image, "ImageOps": ImageOps}
        exec(code.replace("photo.jpg", str(tmp_path / "photo.jpg")), seen)
        assert seen["image"].mode == "RGB" and np.array_equal(seen["image"], expected)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused(fault, name):
    content, reason, by_header = REFUSED[name]
    with fault(name):
        with pytest.raises(BadImageError, match=f"(?i)^1.jpg: .*({reason})"):
            open_image(record(content))
        if by_header:
            with pytest.raises(BadImageError):
                image_size(record(content))


def test_16_bits_keep_their_greys():
    values = [open_image(record(encoded(GREY16, "PNG"))).getpixel((x, 0))[0] for x in range(4)]
    assert values == [0, 1, 128, 255]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(format, orientation):
    file = encoded(photo(), format, exif=exif(orientation), **({"lossless": True} if format == "WEBP" else {}))
    with Image.open(io.BytesIO(file)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(open_image(record(file)), expected) and np.array_equal(open_png(file), expected)
    assert image_size(record(file)) == expected.size


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    file = encoded(photo(), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert image_size(record(file)) == (40, 24)


@pytest.fixture
def folder(tmp_path):
    """All pictures of the tables above as files, named by number: those that are read, then the others."""
    contents = [content for content, *_ in (*READ.values(), *REFUSED.values())]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    return tmp_path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_publishing_fetching_training_and_checking_agree(fault, folder, miniature_dir):
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: int(name.split(".")[0]))
    bad = set(range(len(READ), len(names)))
    with fault("bad pictures in publishing"):
        rows = [{"image_id": number, "file_name": name} for number, name in enumerate(names)]
        pictures = {number: PictureFile(str(folder / name)) for number, name in enumerate(names)}
        reasons = _check_images(rows, pictures)
        assert {entry["image_id"] for entry in reasons} == bad
        assert not any(str(folder) in entry["reason"] for entry in reasons)
    with fault("bad pictures in fetching"):
        assert {number for number, name in enumerate(names) if _flaw(folder / name)} == bad

    contents = [(folder / name).read_bytes() for name in names]
    columns = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "image_id": list(range(len(names))),
        "file_name": names,
        "captions": [[f"{number}"] for number in range(len(names))],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    with fault("bad pictures in training"):
        bad_images = BadImages(folder / "bad_images.jsonl", limit=len(names))
        for number in range(len(names)):
            _, example = read_example(rows, {"row": number, "captions": ["?"]}, bad_images)
            (caption,) = example["captions"]
            assert caption == ("0" if number in bad else "?")  # the next picture that can be read has its own caption
        lines = (folder / "bad_images.jsonl").read_text().splitlines()
        assert {json.loads(line)["image_id"] for line in lines} == bad
    with fault("bad pictures in the feature cache"):
        processor = AutoProcessor.from_pretrained(miniature_dir).image_processor
        found = {number: identify(rows, processor, number)[0] for number in range(len(names))}
        by_header = [says for *_, says in REFUSED.values()]
        assert {number for number in found if found[number] is None} == {n for n in bad if by_header[n - len(READ)]}
    with fault("bad pictures before a score"), pytest.raises(DataError, match=rf"^{len(bad)} of {len(names)} pict"):
        check_images(rows, "test")


def test_what_is_read_is_what_every_model_takes(repo_root):
    """1x1 and 200:1 too: nothing that `open_image` returns makes an image processor fail."""
    for name in ("qwen2_vl", "blip", "vit"):
        processor = AutoImageProcessor.from_pretrained(repo_root / "recipes" / "miniatures" / name)
        for content, *_ in READ.values():
            assert len(processor(open_image(record(content)), return_tensors="pt")["pixel_values"])


# Datasets of strangers -----------------------------------------------------------------------------------------------


def write(folder, **columns):
    columns = {"image_id": [1], "captions": [["空"]], "file_name": ["a.jpg"]} | columns
    columns = {name: values for name, values in columns.items() if values is not None}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "dataset/data/test-00000-of-00001.parquet")
    return str(folder / "dataset")


STRANGE = {
    "a path out of the folder": (
        {"file_name": ["../../etc/passwd"]},
        r"file_name '../../etc/passwd' does not stay in",
    ),
    "an absolute path": ({"file_name": ["/etc/passwd"]}, "file_name '/etc/passwd' does not stay in --image_dir"),
    "a NUL in a path": ({"file_name": ["a\0.jpg"]}, r"file_name 'a\\x00.jpg' does not stay in"),
    "no file name": ({"file_name": [None]}, "column file_name is null, expected texts"),
    "no captions": ({"captions": None}, "has no column captions; it has image_id, file_name"),
    "captions that are texts": ({"captions": ["空"]}, "column captions is string, expected lists of texts"),
    "ids that are fractions": ({"image_id": [1.5]}, "column image_id is double, expected whole numbers or texts"),
    "ids that are null": ({"image_id": [1, None], "captions": [["空"]] * 2, "file_name": ["a", "b"]}, "empty places"),
    "pictures that are numbers": ({"image": [3]}, "column image holds no images"),
    "a picture elsewhere": (
        {"image": [{"bytes": None, "path": "/etc/passwd"}]},
        "'/etc/passwd' is not in the dataset",
    ),
    "a picture beside": (
        {"image": [{"bytes": None, "path": "../secret.png"}]},
        "'../secret.png' is not in the dataset",
    ),
    "a picture with NUL": ({"image": [{"bytes": None, "path": "\0"}]}, r"'\\x00' is not in the dataset"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_datasets_that_are_not_what_they_should_be(fault, tmp_path, name):
    columns, message = STRANGE[name]
    with fault(name), pytest.raises(DataError, match=message):
        load_captions(write(tmp_path, **columns), "test", image_dir=str(tmp_path))


def test_a_picture_that_is_a_file_of_the_dataset_is_read(tmp_path):
    (tmp_path / "dataset" / "data").mkdir(parents=True)
    photo().save(tmp_path / "dataset/data/a.png")
    cells = [{"bytes": None, "path": str(tmp_path / "dataset/data/a.png")}, {"bytes": None, "path": None}]
    columns = {"image": cells, "image_id": [1, 2], "captions": [["空"]] * 2, "file_name": ["a", "b"]}
    rows = load_captions(write(tmp_path, **columns), "test")
    assert open_image(rows[0]).size == (40, 24)
    assert missing_files(rows) == [1]


def test_a_link_that_the_user_made_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    photo().save(tmp_path / "disk/a.jpg")
    (tmp_path / "images").symlink_to(tmp_path / "disk")
    (rows,) = load_captions(write(tmp_path), "test", image_dir=str(tmp_path / "images"))
    assert open_image(rows).size == (40, 24)


@pytest.mark.parametrize("content", [b"", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_dataset_is_named_with_the_reason(fault, tmp_path, content):
    dataset = write(tmp_path)
    (tmp_path / "dataset/data/test-00000-of-00001.parquet").write_bytes(content)
    with (
        fault("damaged parquet"),
        pytest.raises(DataError, match=r"dataset \(test\) cannot be loaded: .*; (OSError|ArrowI)"),
    ):
        load_captions(dataset, "test")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cleaning_report.json", b"[" * 100_000, "cleaning_report.json is not a report .*nesting"),
        ("cleaning_report.json", b"{}", "cleaning_report.json is not a report .*KeyError: 'fingerprint'"),
        ("cleaning_report.json", b"\xff\xfe", "cleaning_report.json is not a report .*UnicodeDecodeError"),
        ("README.md", b"---\na: [\n---\n", "README.md: no dataset card"),
        ("README.md", b"---\n!!python/object:os.system x\n---\n", "README.md: no dataset card"),
        ("README.md", b"\xff", "README.md: no dataset card"),
        ("README.md", b"---\n" + b"[" * 5_000 + b"\n---\n", "README.md: no dataset card"),
        ("README.md", None, "has no README.md, the card that says its licence and corpus: build the dataset with"),
    ],
)
def test_a_report_or_card_that_cannot_be_read_is_named(fault, tmp_path, file, content, message):
    (tmp_path / "README.md").write_text("---\ntags: 3\n---\n")  # tags that are no list are nobody's corpus
    assert dataset_record(str(tmp_path), "test")["corpus"] is None
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with fault(f"{file} {content and content[:20]}"), pytest.raises(DataError, match=message):
        dataset_record(str(tmp_path), "test")


def test_the_caps_are_those_of_the_documentation():
    assert (pictures.MAX_PIXELS, pictures.MAX_RATIO) == (Image.MAX_IMAGE_PIXELS, 200)
