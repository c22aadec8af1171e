"""Pages of images with their captions: single HTML files that need neither network nor server."""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from markupsafe import Markup

from vlmcap.atomic_write import write_atomically
from vlmcap.reporting.html import PHOTO_SIDE, embed, template
from vlmcap.reporting.plots import INK, SOFT

THUMBNAIL_SIDE = 400  # px; of photographs on a page that has hundreds of them


def write_sample_page(
    path: str | Path, title: str, items: list[dict], tables: dict[str | None, list[list[str]]], note: str = ""
) -> Path:
    """Writes one self-contained HTML page and returns its path; folders on the way are made.

    Args:
        path: where the page goes.
        title: heading and title of the page.
        items: `{"image": PIL.Image, "image_id", "captions"}`, in their order; captions is key ->
            `{"references": [str], "base": str, "adapter": str}`.
        tables: key -> the table above the images, header first, as `vlmcap.reporting.cards.score_rows` gives it. Where
            captions have no keys, the only one is None.
        note: a sentence or two under the title, plain text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cards = [item | embed(item["image"], PHOTO_SIDE) for item in items]
    page = template("samples.html.j2").render(title=title, note=note, tables=tables, cards=cards)
    write_atomically(path, page)
    return path


def write_comparison_page(
    path: str | Path,
    title: str,
    tables: Sequence,
    notes: Sequence[str],
    signatures: dict[str, str],
    plots: Sequence[Path],
    systems: Sequence[str],
    cards: Iterable[dict],
    disagreements: dict[str, float],
    audited: bool,
    remarks: Sequence[str],
) -> Path:
    """Writes one self-contained HTML page with tables, plots and every system's captions side by side.

    Images can be sorted by disagreement, worst score and id, filtered by text, score and flag, and walked through with
    the keyboard; the settings are in the address. Without scripts the page shows everything, in the order given.

    Args:
        path: where the page goes; its folder exists.
        title: heading and title of the page.
        tables: scores and systems (vlmcap.reporting.tables.Table).
        notes, signatures: the legend of the tables; signatures by label of their score.
        plots: SVG files of vlmcap.reporting.plots.
        systems: their names.
        cards: `{"image_id": str, "image": PIL.Image | None, "references": [str], "captions": [...]}`; captions in the
            order of `systems`, each `{"text": str | None, "score": float, "flags": [str]}`. They are taken one by one,
            so that a generator keeps one picture in memory.
        disagreements: image id -> `disagreement`.
        audited: whether some captions have flags, so that a filter for them makes sense.
        remarks: what is shown of the images and what is not, as sentences of plain text.
    """
    path = Path(path)
    page = template("gallery.html.j2").render(
        title=title,
        tables=tables,
        notes=notes,
        signatures=signatures,
        plots=[_inline(plot) for plot in plots],
        systems=systems,
        cards=_with_pictures(cards, disagreements),
        audited=audited,
        remarks=remarks,
    )
    write_atomically(path, page)
    return path


def similarity(a: str, b: str) -> float:
    """How alike two captions are, from 0 to 1: Dice's coefficient of their character bigrams,

        s(a, b) = 2 |B(a) n B(b)| / (|B(a)| + |B(b)|),

    where B is the multiset of bigrams of the NFKC text without white space, with a mark at both ends (so that texts of
    one character or none have bigrams too). It needs no tokenizer, and so treats all languages alike.
    """
    return _dice(_bigrams(a), _bigrams(b))


def disagreement(captions: Sequence[str]) -> float:
    """How far the captions of one image differ, from 0 (all the same) to 1 (nothing in common):

        d = 1 - 2 / (n (n - 1)) sum over i < j of s(c_i, c_j)

    with the `similarity` s of captions c_1 .. c_n; 0 for fewer than two.
    """
    bigrams = [_bigrams(caption) for caption in captions]
    pairs = [_dice(a, b) for a, b in combinations(bigrams, 2)]
    return 1 - sum(pairs) / len(pairs) if pairs else 0.0


def select_images(disagreements: dict[str, float], maximum: int, seed: int) -> tuple[list[str], str]:
    """Image ids for the page, in their order, and a sentence on how they were chosen; all of them if `maximum` allows.

    Else half are those with the greatest disagreement; the other half is drawn at random from the rest.
    """
    ids = list(disagreements)
    if len(ids) <= maximum:
        return ids, f"All {len(ids):,} images are shown."
    top = sorted(ids, key=lambda image: (-disagreements[image], image))[: maximum // 2]
    rest = sorted(set(ids) - set(top))
    drawn = random.Random(seed).sample(rest, maximum - len(top))
    chosen = {*top, *drawn}
    sentence = (
        f"{maximum:,} of {len(ids):,} images are shown: the {len(top):,} with the greatest disagreement and "
        f"{len(drawn):,} drawn at random from the rest (seed {seed}). Tables and plots are of all images."
    )
    return [image for image in ids if image in chosen], sentence


def _with_pictures(cards: Iterable[dict], disagreements: dict[str, float]) -> Iterator[dict]:
    for card in cards:
        best = max(caption["score"] for caption in card["captions"])
        yield {
            "image_id": card["image_id"],
            "references": card["references"],
            "disagreement": disagreements[card["image_id"]],
            "captions": [caption | {"best": 0 < caption["score"] == best} for caption in card["captions"]],
            "flagged": [number for number, caption in enumerate(card["captions"]) if caption["flags"]],
            **(embed(card["image"], THUMBNAIL_SIDE) if card["image"] else {"uri": None}),
        }


def _inline(plot: Path) -> Markup:
    """An SVG of vlmcap.reporting.plots as a part of a page: in the page's colours, with ids that are its own."""
    svg = plot.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.stem}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(SOFT, "var(--soft)").replace("fill: #ffffff", "fill: none")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{plot.stem.replace("_", " ")}"', 1))


def _bigrams(text: str) -> Counter:
    text = "\x02" + "".join(unicodedata.normalize("NFKC", text).split()) + "\x03"
    return Counter(map(str.__add__, text, text[1:]))


def _dice(a: Counter, b: Counter) -> float:
    return 2 * (a & b).total() / (a.total() + b.total())
