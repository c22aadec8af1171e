"""A page of sample images with their captions: one HTML file that needs neither network nor server."""

import base64
import io
import re
from pathlib import Path

import jinja2
from PIL import Image

PIXEL_ART = 256  # px; images with no side longer than this are the miniature's scenes, scaled up with hard edges
PHOTO_SIDE = 640  # px; the longer side of COCO's photographs, at which larger ones are embedded
JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


def write_sample_page(
    path: str | Path, title: str, items: list[dict], intro_rows: list[list[str]], note: str = ""
) -> Path:
    """Writes one self-contained HTML page and returns its path; folders on the way are made.

    Args:
        path: where the page goes.
        title: heading and title of the page.
        items: `{"image": PIL.Image, "image_id", "references": [str], "base": str, "adapter": str}`, in their order.
        intro_rows: the table above the images, header first, as `vlmcap.reporting.cards.score_rows` gives it.
        note: a sentence or two under the title, plain text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["lang"] = lambda text: "ja" if JAPANESE.search(text) else "en"
    cards = [item | _embedded(item["image"]) for item in items]
    header, *rows = intro_rows
    page = environment.from_string(PAGE).render(title=title, note=note, header=header, rows=rows, cards=cards)
    path.write_text(page, encoding="utf-8")
    return path


def _embedded(image: Image.Image) -> dict:
    """Data URI, size in px and whether to scale with hard edges: PNG for small drawings, JPEG for photographs."""
    image = image.convert("RGB")
    drawing = max(image.size) <= PIXEL_ART
    if not drawing:
        image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG", "optimize": True} if drawing else {"format": "JPEG", "quality": 85}))
    data = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/{'png' if drawing else 'jpeg'};base64,{data}"
    return {"uri": uri, "width": image.width, "height": image.height, "drawing": drawing}


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #fff; --ink: #1c1c1a; --soft: #62625c; --line: #deded8; --frame: #c8c8c1;
  --good: #17663a; --mark: #e2f3e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161715; --card: #20221f; --ink: #ecece6; --soft: #a3a49c; --line: #383a36; --frame: #30322e;
    --good: #86d9a5; --mark: #1d3a29;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere;
}
:lang(ja) {
  font-family: "Hiragino Sans", "Hiragino Kaku Gothic ProN", "Noto Sans JP", "Noto Sans CJK JP", "Yu Gothic", Meiryo,
    system-ui, sans-serif;
  line-break: strict;
}
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 .5rem; }
p { margin: 0 0 1rem; max-width: 46rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); }
td:last-child { font-weight: 600; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden;
}
.frame { background: var(--frame); display: flex; justify-content: center; }
.frame img { display: block; width: 100%; height: auto; aspect-ratio: 4 / 3; object-fit: contain; }
.frame img.drawing { width: 15.75rem; aspect-ratio: auto; image-rendering: pixelated; }
figcaption { padding: .8rem 1rem 1rem; }
dl { margin: 0; }
dt { font-size: .78rem; color: var(--soft); margin-top: .6rem; }
dt:first-child { margin-top: 0; }
dd { margin: 0; }
dd.adapter { font-size: 1.1rem; font-weight: 600; }
dd.reference { color: var(--soft); padding-left: 1rem; position: relative; }
dd.reference::before { content: "–"; position: absolute; left: 0; }
.empty { color: var(--soft); font-style: italic; font-weight: 400; }
.match { color: var(--good); background: var(--mark); border-radius: .3rem; padding: 0 .4rem; margin-left: .4rem; }
.id { font-size: .78rem; color: var(--soft); margin: .7rem 0 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if note %}
<p>{{ note }}</p>
{% endif %}
<table>
<thead><tr>{% for text in header %}<th scope="col">{{ text }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
<main>
{% set empty %}<span class="empty">(empty)</span>{% endset %}
{% for card in cards %}
<figure>
<div class="frame"><img{% if card.drawing %} class="drawing"{% endif %} src="{{ card.uri }}" width="{{ card.width }}" \
height="{{ card.height }}" alt="sample {{ card.image_id }}"></div>
<figcaption>
<dl>
<dt>Adapter{% if card.adapter in card.references %}<span class="match">same as a reference</span>{% endif %}</dt>
<dd class="adapter" lang="{{ card.adapter | lang }}">{{ card.adapter or empty }}</dd>
<dt>Base, zero-shot</dt>
<dd class="base" lang="{{ card.base | lang }}">{{ card.base or empty }}</dd>
<dt>{{ "References" if card.references | length > 1 else "Reference" }}</dt>
{% for reference in card.references %}
<dd class="reference" lang="{{ reference | lang }}">{{ reference }}</dd>
{% endfor %}
</dl>
<p class="id">image {{ card.image_id }}</p>
</figcaption>
</figure>
{% endfor %}
</main>
</body>
</html>
"""
