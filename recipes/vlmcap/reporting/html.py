"""What the pages share: templates that escape everything, and pictures inside the file."""

import base64
import io
import re
from pathlib import Path

import jinja2
from PIL import Image

PAGES = Path(__file__).parent / "pages"
PIXEL_ART = 256  # px; images with no side longer than this are the miniature's scenes, scaled up with hard edges
PHOTO_SIDE = 640  # px; the longer side of COCO's photographs, at which larger ones are embedded
JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
VIETNAMESE = re.compile(r"[ăđơư\u1ea0-\u1ef9]", re.IGNORECASE)


def template(name: str) -> jinja2.Template:
    """A template of `pages/`, with the filter `lang`: "ja" for a text in Japanese script, "vi" for one with letters of
    Vietnamese alone, else "en"."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["lang"] = lambda text: (
        "ja" if JAPANESE.search(text) else "vi" if VIETNAMESE.search(text) else "en"
    )
    return environment.get_template(name)


def embed(image: Image.Image, side: int = PHOTO_SIDE) -> dict:
    """`{"uri", "width", "height", "drawing"}`: a data URI, PNG for small drawings, JPEG of `side` px for photographs.

    `drawing`: to be scaled with hard edges. Width and height are px.
    """
    image = image.convert("RGB")
    drawing = max(image.size) <= PIXEL_ART
    if not drawing:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG", "optimize": True} if drawing else {"format": "JPEG", "quality": 85}))
    data = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/{'png' if drawing else 'jpeg'};base64,{data}"
    return {"uri": uri, "width": image.width, "height": image.height, "drawing": drawing}
