"""Dish titles: the CSV of the Food Ingredients and Recipes dataset to rows, rules for its rows and texts, word counts.

The CSV has a column `Image_Name` (a file name without its ending) and a column `Title`; a row is one dish. Rules were
decided on 2,000 of its 13,501 rows. Titles stay as they are written: accents (Gruyère), capitals (with or With),
brackets, numbers, brand names.
"""

import csv
import hashlib
import html
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import regex
from wordcloud import WordCloud

from vlmcap.data.clean import MARKUP, TextRule, drop_control
from vlmcap.data.errors import DataError
from vlmcap.data.images import is_plain_path
from vlmcap.data.sources import SourceFile, read_source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Crafts, care of house and body, food for animals: recipe sites have them between their dishes.
NOT_FOOD = regex.compile(
    r"(?i)\b(napkins?|tablecloths?|vases?|cardboard|centerpieces?|place cards?|potpourri|candle ?holders?|votives?|"
    r"soaps?|shampoo|(face|hair) masks?|(body|hand|foot|face) scrubs?|lip balms?|bath (salts?|bombs?)|air fresheners?|"
    r"(all-purpose|window|oven) cleaners?|play-?(dough|doh)|(dog|cat) (biscuits?|treats?|food)|bird ?feeders?|"
    r"gift wrap)\b"
)

# What is left out, in the order of the checks; one reason a row.
ROW_RULES = {
    "no_title": "rows without a title",
    "no_image_name": "rows without an image name (empty, or the #NAME? that a spreadsheet leaves)",
    "duplicate_image": "rows whose image an earlier row has",
    "not_food": "titles of things that nobody eats or drinks, by words such as vase, soap, cardboard",
    "no_image_file": "rows whose image the folder does not hold",
}


def _decode_cp1252(text: str) -> str:
    """U+0080 to U+009F are the bytes of Windows-1252 read as Latin-1: 0x96 was a dash."""
    return regex.sub(r"[\x80-\x9f]", lambda char: char[0].encode("latin-1").decode("cp1252", "ignore"), text)


def _unescape(text: str) -> str:
    # PB&J became the entity-like PB&J; when HTML was fixed.
    decoded = regex.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text)
    return regex.sub(r"(?<=\p{L}&\p{L}{1,2});", "", decoded)


def _space(text: str) -> str:
    return regex.sub(r"(?<=\() | (?=[),.;:!?]|-\p{L})", "", regex.sub(r"\s+", " ", text).strip(" "))


TEXT_RULES = (
    TextRule("cp1252", "control characters that were signs of Windows-1252 become those signs", _decode_cp1252),
    TextRule("control", "other control, zero-width and broken characters removed", drop_control),
    TextRule("unicode", "letters and accents composed (NFC)", lambda text: unicodedata.normalize("NFC", text)),
    TextRule("entity", "HTML entities decoded, the ; of a seeming one (PB&J;) removed", _unescape),
    MARKUP,
    TextRule(
        "quotes", "curly quotation marks become straight", lambda text: text.translate(str.maketrans("‘’“”", "''\"\""))
    ),
    TextRule("spacing", "one space between words, none before , . ) or a hyphen's word, none at the ends", _space),
)


def read_titles(path: str | Path, image_folder: str | Path | None) -> tuple[list[dict], list[dict], SourceFile]:
    """Reads the CSV into rows of the usual shape, one title an image.

    `image_id` and the only caption id are the number of the CSV row, 1 for the first below the header. `file_name` is
    the image's in `image_folder` (any of .jpg, .jpeg, .png, .webp), without a folder Image_Name with .jpg; `in_yj` is
    None. Columns other than Image_Name and Title are ignored.

    Returns (rows, the rows left out as {"row", "image_name", "title", "rule"} with a rule of ROW_RULES, the file).

    Raises DataError on a file that is missing, not UTF-8, no CSV or without these columns, on a row with too few or
    too many values, and when no row is left.
    """
    path = Path(path)
    data = read_source(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start:,} of {len(data):,}: {error.reason}. Save the CSV as UTF-8."
        ) from error
    files = None
    if image_folder:
        found = sorted(file for file in Path(image_folder).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        files = {file.stem: file.name for file in found}

    rows, left_out, names = [], [], set()
    for number, (name, title) in enumerate(_records(path, text), start=1):
        file_name = f"{name}.jpg" if files is None else files.get(name)
        rule = None
        if not title:
            rule = "no_title"
        elif not name or name == "#NAME?":
            rule = "no_image_name"
        elif name in names:
            rule = "duplicate_image"
        elif NOT_FOOD.search(title):
            rule = "not_food"
        elif file_name is None:
            rule = "no_image_file"
        if rule:
            left_out.append({"row": number, "image_name": name, "title": title, "rule": rule})
            continue
        if not is_plain_path(file_name):
            raise DataError(f"{path}: row {number} has Image_Name {name!r:.200}, expected the plain name of a file.")
        names.add(name)
        rows.append(
            {
                "image_id": number,
                "file_name": file_name,
                "coco_url": "",
                "license": "",
                "captions": [title],
                "caption_ids": [number],
                "in_yj": None,
            }
        )
    if not rows:
        reasons = ", ".join(f"{rule} {count:,}" for rule, count in Counter(row["rule"] for row in left_out).items())
        raise DataError(f"{path}: no row is left ({reasons or 'it has none'}). Look at the file and at --images.")
    total = len(rows) + len(left_out)
    return rows, left_out, SourceFile(path.name, hashlib.sha256(data).hexdigest(), total, total, "", "")


def _records(path: Path, text: str) -> Iterable[tuple[str, str]]:
    """(Image_Name, Title) of every row, without spaces around them."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = {"Image_Name", "Title"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(
                f"{path}: has the columns {reader.fieldnames}, expected Image_Name and Title in the first line."[
                    :1_000
                ]
            )
        twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
        if twice:
            raise DataError(f"{path}: the first line has the column {twice[0]!r:.100} twice.")
        for number, record in enumerate(reader, start=1):
            values = len(record) + len(record.get(None, ())) - (None in record) - list(record.values()).count(None)
            if values != len(reader.fieldnames):
                raise DataError(
                    f"{path}: row {number} (line {reader.line_num}) has {values} values for {len(reader.fieldnames)} "
                    "columns. Put a title that holds a comma in double quotes."
                )
            yield record["Image_Name"].strip(), record["Title"].strip()
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.reader.line_num}: {error}. A double quote in a title is written twice."
        ) from error


# Words that say nothing about a dish.
_STOP_WORDS = set("a an and at au by con de di for from in la le of on or over the to with without".split())


def word_counts(captions: Iterable[str]) -> Counter:
    """How often each word occurs in the captions: small letters, hyphenated words in parts, without stop words."""
    words = Counter(
        word for caption in captions for word in regex.findall(r"[\p{L}\p{M}][\p{L}\p{M}']*", caption.lower())
    )
    return Counter({word: count for word, count in words.items() if word not in _STOP_WORDS and len(word) > 1})


def write_word_cloud(counts: Counter, path: Path) -> None:
    """Draws the 150 most frequent words as a PNG of 1600 x 800 pixels; the same counts make the same picture."""
    cloud = WordCloud(
        width=800,
        height=400,
        scale=2,
        max_words=150,
        background_color="white",
        color_func=_colour,
        font_path=Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf",
        prefer_horizontal=1,
        max_font_size=90,
        relative_scaling=0.6,
        margin=3,
        random_state=0,
    )
    cloud.generate_from_frequencies(counts).to_file(path)


def _colour(word: str, **_) -> str:
    """One of a kitchen's colours, always the same for a word."""
    return ("#7a2e1d", "#b5482a", "#d98324", "#5f7331", "#3f4f2f", "#8c6239")[sum(word.encode()) % 6]
