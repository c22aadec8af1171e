"""Pictures with their captions as pages: single HTML files that need neither network nor server."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from vlmcap.atomic_write import write_atomically
from vlmcap.data.images import BadImageError
from vlmcap.reporting.html import embed, template

ON_A_PAGE = 1_000  # pictures; at 20 kB each, a page has 20 MB
THUMBNAIL_SIDE = 320  # px


def write_caption_pages(
    path: str | Path,
    title: str,
    entries: Sequence[tuple[str, list[str]]],
    read: Callable[[str], Image.Image],
    on_a_page: int = ON_A_PAGE,
) -> list[Path]:
    """Writes self-contained pages of `on_a_page` pictures each, and returns their paths.

    The first is `path`, the others have -2, -3, ... in their names. One picture at a time is in memory.

    Args:
        title: heading and title of the pages.
        entries: (name of the picture, its captions, the best first).
        read: name -> picture; one that cannot be read any more has no thumbnail.
    """
    path, number = Path(path), max(1, math.ceil(len(entries) / on_a_page))
    pages = [path, *(path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(2, number + 1))]
    links = [{"name": page.name, "address": f"./{quote(page.name)}"} for page in pages]
    for current, page in enumerate(pages):
        cards = _cards(entries[current * on_a_page : (current + 1) * on_a_page], read)
        text = template("captions.html.j2").render(
            title=title, count=len(entries), links=links, current=current, cards=cards
        )
        write_atomically(page, text)
    return pages


def _cards(entries: Iterable[tuple[str, list[str]]], read: Callable[[str], Image.Image]) -> Iterator[dict]:
    for name, captions in entries:
        try:
            picture = embed(read(name), THUMBNAIL_SIDE)
        except BadImageError as error:
            picture = {"uri": None, "reason": error.reason}
        yield {"name": name, "captions": captions} | picture
