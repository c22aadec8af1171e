"""Bootstrap over images: 95% intervals of one system, the difference of two.

A score is a function of sums (BLEU, chrF, METEOR) or of the mean (ROUGE-L, CIDEr-D, SPICE) of what was counted in each
image. A resample draws as many images as there are, with replacement: how often each was drawn, times the per-image
statistics, are the sums. CIDEr-D keeps the document frequencies of all references in every resample: they belong to
the metric, not to the sample.
"""

from collections.abc import Iterator

import numpy as np

from vlmcap.evaluation.external import chrf, meteor
from vlmcap.evaluation.metrics import MAX_ORDER, bleu

LEVEL = 0.95
# Resamples drawn at once: bounds the memory to 8 bytes * 100 * images.
BLOCK = 100


def scores_of(statistics: dict[str, np.ndarray], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Every score of every resample, each as (resamples,) float64.

    Args:
        statistics: "bleu" (images, 9), "chrf" (images, 18) and "meteor" (images, 23) as in metrics.json, and any
            per-image scores whose mean is the score, (images,), under their own names.
        counts: (resamples, images) float64, how often each image was drawn. A row of ones gives the corpus scores.
    """
    scores = {}
    for name, rows in statistics.items():
        sums = counts @ rows
        if name == "bleu":
            values = bleu(sums[:, :MAX_ORDER], sums[:, MAX_ORDER : 2 * MAX_ORDER], sums[:, -1])
            scores |= {f"bleu_{n}": values[:, n - 1] for n in range(1, MAX_ORDER + 1)}
        elif name == "chrf":
            scores[name] = chrf(sums)
        elif name == "meteor":
            scores[name] = meteor(sums)
        else:
            scores[name] = sums / len(rows)
    return scores


def resampled_scores(statistics: dict[str, np.ndarray], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Scores of bootstrap resamples, each as (resamples,) float64.

    What is drawn depends on the number of images, `resamples` and `seed` alone, so that two systems are drawn alike.
    """
    images = len(next(iter(statistics.values())))
    blocks = [scores_of(statistics, counts) for counts in _draws(images, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def interval(resampled: np.ndarray) -> list[float]:
    """The percentile interval [low, high] of a score's resamples (Efron 1979), at LEVEL."""
    tail = 100 * (1 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(resampled, [tail, 100 - tail])]


def p_value(difference: float, resampled: np.ndarray) -> float:
    """Two-sided p-value of the paired bootstrap (Koehn 2004): how often chance alone gives a difference this large.

    Chance is the resampled differences, shifted to a mean of zero (Riezler and Maxwell 2005, as in sacreBLEU and
    Moses): p = (1 + #{|d_i - mean(d)| >= |d|}) / (1 + resamples). sacreBLEU 2.6 counts only the tail beyond the
    difference, which halves p; two equal systems have p = 1 here.
    """
    extreme = np.abs(resampled - resampled.mean()) >= abs(difference)
    return float((1 + extreme.sum()) / (1 + len(resampled)))


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for begin in range(0, resamples, BLOCK):
        rows = min(BLOCK, resamples - begin)
        drawn = generator.integers(images, size=(rows, images))
        yield np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.float64)
