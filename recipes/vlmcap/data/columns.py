"""Columns of published rows that say something of each caption, changed without a look at the pictures."""

from collections.abc import Sequence

import datasets

# Lists with one item a caption. A dataset has captions, and the others or not.
OF_CAPTION = ("captions", "caption_ids", "languages", "styles")


def with_column(rows: datasets.Dataset, name: str, values: list) -> datasets.Dataset:
    """The rows with other values in a column that they have. Before rows are selected: afterwards datasets would copy
    all that are left, pictures too."""
    names, feature = rows.column_names, rows.features[name]
    return rows.remove_columns(name).add_column(name, values, feature=feature).select_columns(names)


def keep_captions(rows: datasets.Dataset, kept: Sequence[Sequence[int]]) -> datasets.Dataset:
    """The rows that keep a caption, with these captions alone, in all columns of OF_CAPTION.

    Args:
        kept: for each row the places of the captions to keep; none leaves the row out.
    """
    counts = list(map(len, rows["captions"][:]))
    for name in [name for name in OF_CAPTION if name in rows.column_names]:
        values = rows[name][:]
        for number, places in enumerate(kept):
            # Of others' datasets caption_ids may be null or of another length: they stay as they are.
            if values[number] is not None and len(values[number]) == counts[number]:
                values[number] = [values[number][place] for place in places]
        rows = with_column(rows, name, values)
    return rows.select([number for number, places in enumerate(kept) if places])
