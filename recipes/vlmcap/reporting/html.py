"""What the pages share: templates that escape everything, and pictures inside the file."""

import base64
import hashlib
import io
import re
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

PAGES = Path(__file__).parent / "pages"
PIXEL_ART = 256  # px; images with no side longer than this are the miniature's scenes, scaled up with hard edges
PHOTO_SIDE = 640  # px; the longer side of COCO's photographs, at which larger ones are embedded
JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
VIETNAMESE = re.compile(r"[ăđơư\u1ea0-\u1ef9]", re.IGNORECASE)


def template(name: str) -> jinja2.Template:
    """A template of `pages/`, with the filter `lang`: "ja" for a text in Japanese script, "vi" for one with letters of
    Vietnamese alone, else "en"; and with `policy` and `script`, of files of `pages/`.

    A page escapes whatever it is given. If something gets through anyway, its policy lets the browser run no
    script but the named ones, known by their hash, and load nothing from anywhere.
    """
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
    environment.globals |= {"policy": _policy, "script": _script}
    return environment.get_template(name)


def _policy(*scripts: str) -> Markup:
    """The Content-Security-Policy of a page with these scripts. Styles are inline (the plots are full of them) and can
    load nothing either."""
    allowed = " ".join(f"'sha256-{_digest(_source(name))}'" for name in scripts) or "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; "
        "form-action 'none'"
    )
    return Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">')


def _script(name: str) -> Markup:
    return Markup(f"<script>{_source(name)}</script>")


def _source(name: str) -> str:
    return "\n" + (PAGES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
