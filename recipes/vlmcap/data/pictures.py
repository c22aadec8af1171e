"""A picture of any kind as 8-bit RGB, upright, on white. Needs Pillow and numpy alone: Spaces get a copy.

HEIC, which telephones write, needs the package pillow-heif too.
"""

import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

try:
    import pillow_heif
except ImportError:  # the extra `heic`
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()  # turns pictures upright by itself

# What Pillow may open; it knows 40 kinds more, and for EPS it would start Ghostscript. MPO is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS += ("AVIF",) * features.check("avif") + ("HEIF",) * (pillow_heif is not None)
HEIC = re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.S)  # ISO/IEC 23008-12
MAX_PIXELS = 89_478_485  # where Pillow warns of a decompression bomb: 256 MiB as RGB
MAX_RATIO = 200  # of the sides; more is what the Qwen2-VL image processors refuse (smart_resize in transformers)
# What `read_picture` makes of a file. It is part of the key of cached features: change it with what is returned.
READING = "8-bit RGB, upright, on white"
# By EXIF orientation, as in PIL.ImageOps.exif_transpose.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(OSError):
    """A picture is missing or cannot be decoded. `name` is its file name (or image id), the message says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def read_picture(file: str | BinaryIO, name: str) -> Image.Image:
    """The picture in a file, as `vlmcap.data.images.open_image` describes it.

    Args:
        file: path or open file.
        name: of the picture, for messages.

    Raises:
        BadImageError: it is missing or cannot be read.
    """
    return _read(file, name, _pixels)


def picture_size(file: str | BinaryIO, name: str) -> tuple[int, int]:
    """Width and height in pixels of what `read_picture` returns, from the header; it raises as that does."""
    return _read(file, name, _size)


def _read(file: str | BinaryIO, name: str, use: Callable[[Image.Image], Any]) -> Any:
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check(image)
            return use(image)
    except FileNotFoundError as error:
        raise BadImageError(name, f"no such file: {file}") from error
    except UnidentifiedImageError as error:
        if pillow_heif is None and HEIC.match(_start(file)):
            raise BadImageError(name, 'a HEIC picture: install pillow-heif (pip install "vlmcap[heic]")') from error
        raise BadImageError(name, f"not an image of a kind that is read here ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:  # above twice MAX_PIXELS, from the header
        raise BadImageError(name, f"{error} At most {MAX_PIXELS:,} pixels are read here: scale it down") from error
    # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others, by what is wrong with a file.
    except Exception as error:
        raise BadImageError(name, str(error) or type(error).__name__) from error


def _start(file: str | BinaryIO) -> bytes:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            return opened.read(12)
    file.seek(0)
    return file.read(12)


def _check(image: Image.Image) -> None:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} that are read here: scale it down")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width}x{height} pixels: the aspect ratio is above {MAX_RATIO}")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit numbers have no black and white; save it with 8 or 16 bits")


def _pixels(image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    image = _on_white(_eight_bits(image) if image.mode.startswith("I;16") else image)
    image.info = {}  # a colour profile would go into pages with the picture, where browsers apply it
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits, where Pillow would make all above 255 white; what is transparent is white already."""
    values = np.asarray(image)
    transparent = values == image.info.get("transparency", -1)
    return Image.fromarray(np.where(transparent, 255, values >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _size(image: Image.Image) -> tuple[int, int]:
    turned = _orientation(image) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _orientation(image: Image.Image) -> int | None:
    if image.format == "TIFF":  # Pillow turns it when it decodes it
        return None
    try:
        # The class's own method: a PNG's decodes all pixels to look for EXIF after them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF (SyntaxError, struct.error, ...) says nothing; the pixels may be whole
        return None
