"""Keys of captions: LANGUAGE or LANGUAGE/STYLE, such as `ja/plain`, `ja/polite`, `en`.

A dataset of captions in several languages has the columns `languages` and, where styles differ, `styles`, with an item
for each caption. Of the keys that a run is given, a caption belongs to the one of its language and style, else to the
one of its language, else to none. So `en` takes every English caption, unless `en/alt` is a key too.
"""

import re
from collections.abc import Collection, Sequence

import datasets

from vlmcap.data.columns import keep_captions
from vlmcap.data.corpora import KEY
from vlmcap.data.errors import DataError


def parse_key(key: str) -> tuple[str, str]:
    """The language of a key, and its style or "".

    Raises:
        DataError: it is neither LANGUAGE nor LANGUAGE/STYLE.
    """
    language, _, style = key.partition("/")
    if not re.fullmatch(KEY, key):
        raise DataError(
            f"{key!r} is not a key of captions. Write LANGUAGE or LANGUAGE/STYLE, such as ja or ja/polite: a language"
            " of two or three small letters, a style of small letters, digits, - and _."
        )
    return language, style


def key_of(language: str, style: str, keys: Sequence[str]) -> str | None:
    """Which of the keys a caption belongs to; None: to none of them."""
    return next((key for key in (f"{language}/{style}", language) if key in keys), None)


def check_columns_of_keys(columns: Collection[str], keys: Sequence[str]) -> None:
    """Raises DataError where a dataset with these columns does not say the language of its captions, or not the style
    while a key has one; or a key is not one."""
    styled = [key for key in keys if parse_key(key)[1]]
    for column, needed in (("languages", keys), ("styles", styled)):
        if needed and column not in columns:
            raise DataError(
                f"the dataset has no column {column}, so its captions cannot be told apart by {', '.join(needed)}."
                " `python scripts/publish_datasets.py multi` joins corpora to a dataset that has it."
            )


def caption_keys(rows: datasets.Dataset, keys: Sequence[str]) -> list[list[str | None]]:
    """For each row the key of each of its captions, None for a caption of none.

    Args:
        rows: as `load_rows` and `load_captions` return them.
        keys: those of the run.

    Raises:
        DataError: a key is not one; the rows do not say the language of their captions, or not the style while a key
            has one.
    """
    if not keys:
        raise DataError("no key of captions: name one or more, such as ja/plain and en")
    check_columns_of_keys(rows.column_names, keys)
    languages = rows["languages"][:]
    styles = rows["styles"][:] if any(parse_key(key)[1] for key in keys) else [[""] * len(of) for of in languages]
    return [
        [key_of(language, style, keys) for language, style in zip(*of, strict=True)]
        for of in zip(languages, styles, strict=True)
    ]


def rows_of_key(rows: datasets.Dataset, key: str, keys: Sequence[str]) -> datasets.Dataset:
    """The rows with captions of a key, in their order, and with these captions alone (also in the other columns that
    have an item for each caption). Pictures are not read.

    Args:
        rows: as `load_rows` and `load_captions` return them.
        key: one of `keys`.
        keys: those of the run: which captions are `ja` depends on whether `ja/polite` is a key too.

    Raises:
        DataError: as `caption_keys`.
    """
    found = caption_keys(rows, keys)
    return keep_captions(rows, [[i for i, of in enumerate(row) if of == key] for row in found])
