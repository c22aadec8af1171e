"""Columns of published rows that say something of each caption, changed without a look at the pictures."""

from collections.abc import Sequence

import datasets
from datasets.fingerprint import generate_random_fingerprint

# Lists with one item a caption. A dataset has captions, and the others or not.
OF_CAPTION = ("captions", "caption_ids", "languages", "styles")


def with_columns(
    rows: datasets.Dataset, values: dict[str, list], features: dict[str, object] | None = None
) -> datasets.Dataset:
    """The rows with other values in columns, or with more columns, after those they have.

    The other columns are not copied, also not of rows that were selected or shuffled, of which `Dataset.add_column`
    writes all again, pictures too. (Rows that are there several times are written.)

    Args:
        features: of columns that the rows do not have.
    """
    features = {**rows.features, **(features or {})}
    names = list(dict.fromkeys([*rows.column_names, *values]))
    places = None if rows._indices is None else rows._indices.column(0).to_pylist()
    if places is not None and len(set(places)) < len(places):
        rows, places = rows.flatten_indices(), None
    if places is not None:  # all rows of the files
        fingerprint = generate_random_fingerprint()
        rows = datasets.Dataset(rows.data, info=rows.info.copy(), split=rows.split, fingerprint=fingerprint)
    rows = rows.remove_columns([name for name in values if name in rows.column_names])
    for name, column in values.items():
        if places is not None:
            whole = [None] * len(rows)
            for place, value in zip(places, column, strict=True):
                whole[place] = value
            column = whole
        rows = rows.add_column(name, column, feature=features[name])
    rows = rows.select_columns(names)
    return rows if places is None else rows.select(places)


def keep_captions(rows: datasets.Dataset, kept: Sequence[Sequence[int]]) -> datasets.Dataset:
    """The rows that keep a caption, with these captions alone, in all columns of OF_CAPTION.

    Args:
        kept: for each row the places of the captions to keep; none leaves the row out.
    """
    counts = list(map(len, rows["captions"][:]))
    columns = {name: rows[name][:] for name in OF_CAPTION if name in rows.column_names}
    for values in columns.values():
        for number, places in enumerate(kept):
            # Of others' datasets caption_ids may be null or of another length: they stay as they are.
            if values[number] is not None and len(values[number]) == counts[number]:
                values[number] = [values[number][place] for place in places]
    return with_columns(rows, columns).select([number for number, places in enumerate(kept) if places])
