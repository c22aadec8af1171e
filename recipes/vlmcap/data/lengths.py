"""How long the captions of a dataset are, and the length limit that follows from it."""

import math

import numpy as np

from vlmcap.data.clean import CaptionCleaner, clean_text

PERCENTILE = 99.9
MULTIPLE = 8  # what tensor cores like, and a little room


def token_limit(cleaner: CaptionCleaner, rows: list[dict]) -> int:
    """What 99.9% of the captions, cleaned, keep to, in tokens without special ones, rounded up to a multiple of 8."""
    texts = [clean_text(caption, cleaner.rules) for row in rows for caption in row["captions"]]
    return MULTIPLE * math.ceil(np.percentile(cleaner.token_counts(texts), PERCENTILE, method="higher") / MULTIPLE)


def caption_lengths(cleaner: CaptionCleaner, by_split: dict[str, list[dict]]) -> dict[str, dict[str, dict]]:
    """{split: {"words": figures, "tokens": figures}} of the captions as published; tokens with a tokenizer only.

    Figures are {"mean", "median", "p99", "p99.9", "max"}. Words are what spaces separate: in Vietnamese, syllables.
    """
    lengths = {}
    for split, rows in by_split.items():
        captions = [caption for row in rows for caption in row["captions"]]
        lengths[split] = {"words": _figures([len(caption.split()) for caption in captions])}
        if cleaner.tokenizer_name:
            lengths[split]["tokens"] = _figures(cleaner.token_counts(captions))
    return lengths


def _figures(counts: list[int]) -> dict[str, float]:
    quantiles = {f"p{share:g}": int(np.percentile(counts, share, method="higher")) for share in (99, PERCENTILE)}
    return {
        "mean": round(float(np.mean(counts)), 2),
        "median": int(np.median(counts)),
        **quantiles,
        "max": max(counts),
    }
