"""The files of a human evaluation: a page for each rater, the key, the pictures, a note for the experimenter."""

import json
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps

from vlmcap.atomic_write import write_atomically
from vlmcap.data.images import open_image
from vlmcap.data.picture_files import PictureFile
from vlmcap.human.study import ANSWERS_FORMAT, HumanError, blinded_items
from vlmcap.places import as_typed_here
from vlmcap.reporting.html import embed, template

README = """\
Human evaluation of captions

rater_1.html ... rater_{raters}.html
                      one page for each rater: send each to one person. It works offline, on a computer or a phone:
                      keep the file, open it in a browser. The instructions are on the page, in Japanese and English.
                      At the end it gives a file answers_N.json, which the rater sends back.
key.json              says which system wrote which caption. Keep it, and show it to no rater.
images/               the pictures, for the preferences that are written from the answers.

When the answers are back:

    python scripts/human_eval.py import answers_*.json --key key.json --output_dir results

A page belongs to the key.json beside it: do not write another export into this folder.
"""


def write_export(key: dict, rows: dict[str, dict], output_dir: str | Path) -> None:
    """Writes rater_N.html, key.json, images/ and README.txt.

    Args:
        key: as `vlmcap.human.study.draw` gives it; `pictures`, image id -> file, is added.
        rows: image id -> row of `vlmcap.data.images.load_captions`.
        output_dir: is made. The same export may be written again.

    Raises:
        HumanError: the folder holds another export.
        BadImageError: a picture is missing or cannot be decoded.
    """
    folder = Path(output_dir)
    places = {image_id: f"images/{number:05d}" for number, image_id in enumerate(key["images"], 1)}
    key = key | {"pictures": {i: place + _suffix(rows[i]) for i, place in places.items()}}
    text = json.dumps(key, ensure_ascii=False, indent=1) + "\n"
    key_path = folder / "key.json"
    if key_path.exists() and key_path.read_text(encoding="utf-8") != text:
        raise HumanError(
            f"{key_path} is the key of another export. Without it that export's answers cannot be read: choose another"
            " --output_dir, or remove the folder."
        )
    embedded = {image_id: embed(open_image(rows[image_id])) for image_id in key["images"]}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image_id, place in key["pictures"].items():
        cell = rows[image_id]["image"]
        content = cell["bytes"] if cell["bytes"] is not None else PictureFile(cell["path"]).read()
        (folder / place).write_bytes(content)
    for rater in key["raters"]:
        write_atomically(folder / f"rater_{rater}.html", rater_page(key, rater, embedded))
    write_atomically(key_path, text)
    write_atomically(folder / "README.txt", as_typed_here(README.format(raters=len(key["raters"]))))


def rater_page(key: dict, rater: str, pictures: dict[str, dict]) -> str:
    """The page of one rater, complete in itself: nothing of the key but what the rater may see.

    Args:
        pictures: image id -> what `embed` gives.
    """
    items, image_ids = blinded_items(key, rater)
    kinds = {item["kind"] for item in items}
    data = {
        "format": ANSWERS_FORMAT,
        "rater": rater,
        "fingerprint": key["raters"][rater]["fingerprint"],
        "pictures": [pictures[image_id] for image_id in image_ids],
        "items": items,
    }
    return template("human_eval.html.j2").render(
        rater=rater,
        item_count=len(items),
        has_preferences="preference" in kinds,
        has_ratings="rating" in kinds,
        data=htmlsafe_json_dumps(data, ensure_ascii=False),
    )


def _suffix(row: dict) -> str:
    return Path(row.get("file_name") or row["image"]["path"] or "").suffix
