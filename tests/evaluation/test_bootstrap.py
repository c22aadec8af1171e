"""Resamples computed from sums must be what scoring the resampled images would give; intervals must cover."""

import numpy as np
import pytest

from vlmcap.evaluation.bootstrap import BLOCK, interval, p_value, resampled_scores, scores_of
from vlmcap.evaluation.external import chrf_statistics
from vlmcap.evaluation.metrics import caption_statistics, corpus_scores


def statistics_of(hypotheses: list[list[str]], references: list[list[list[str]]]) -> dict[str, np.ndarray]:
    words = caption_statistics(hypotheses, references)
    return {
        "bleu": np.hstack([words.correct, words.guess, words.reference_length[:, None]]),
        "rouge_l": words.rouge_l,
        "cider_d": words.cider_d,
        "chrf": chrf_statistics(
            ["".join(tokens) for tokens in hypotheses], [["".join(ref) for ref in refs] for refs in references]
        ),
    }


@pytest.fixture(scope="module")
def corpus():
    generator = np.random.default_rng(1)

    def sentence():
        return list(generator.choice(list("犬猫が走る赤い車を見た上で"), generator.integers(1, 12)))

    return [sentence() for _ in range(60)], [[sentence() for _ in range(3)] for _ in range(60)]


def test_a_row_of_ones_gives_the_corpus_scores(corpus):
    scores = scores_of(statistics_of(*corpus), np.ones((1, 60)))
    expected = corpus_scores(caption_statistics(*corpus))
    assert {name: scores[name][0] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_a_resample_is_the_corpus_of_the_images_drawn(corpus):
    hypotheses, references = corpus
    drawn = np.random.default_rng(2).integers(60, size=60)
    scores = scores_of(statistics_of(*corpus), np.bincount(drawn, minlength=60)[None].astype(float))
    picked = [hypotheses[i] for i in drawn], [references[i] for i in drawn]
    expected = corpus_scores(caption_statistics(*picked))
    for name in ("bleu_1", "bleu_4", "rouge_l"):
        assert scores[name][0] == pytest.approx(expected[name], rel=1e-12)
    chrf = scores_of({"chrf": statistics_of(*picked)["chrf"]}, np.ones((1, 60)))["chrf"][0]
    assert scores["chrf"][0] == pytest.approx(chrf, rel=1e-12)
    # CIDEr-D keeps the document frequencies of all references.
    whole = caption_statistics(*corpus).cider_d
    assert scores["cider_d"][0] == pytest.approx(whole[drawn].mean(), rel=1e-12)
    assert scores["cider_d"][0] != pytest.approx(expected["cider_d"], rel=1e-3)


def test_seeds_decide_and_blocks_do_not(corpus):
    rows = statistics_of(*corpus)
    first, again, other = (resampled_scores(rows, 2 * BLOCK + 30, seed)["bleu_4"] for seed in (7, 7, 8))
    assert len(first) == 2 * BLOCK + 30 and len(set(first)) > 200
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_interval_of_a_mean_is_that_of_its_normal_approximation():
    values = np.random.default_rng(0).normal(0.4, 0.2, size=2000)
    low, high = interval(resampled_scores({"rouge_l": values}, 2000, 0)["rouge_l"])
    error = values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = interval(resampled_scores({"x": generator.exponential(1.0, size=80)}, 300, 0)["x"])
        covered += low <= 1 <= high
    assert 175 <= covered <= 198


def test_p_values_of_equal_and_of_different_systems():
    assert p_value(0.0, np.zeros(99)) == 1.0
    shifted = np.random.default_rng(0).normal(0.5, 0.01, size=999)
    assert p_value(0.5, shifted) == 1 / 1000
    # A difference of one standard error: 32% of a normal distribution are beyond it, on both sides.
    assert p_value(0.01, np.random.default_rng(0).normal(0.01, 0.01, size=4999)) == pytest.approx(0.317, abs=0.03)


def test_p_values_of_systems_that_differ_by_chance_are_uniform():
    generator, low = np.random.default_rng(5), 0
    for _ in range(200):
        a, b = generator.normal(size=(2, 100))
        resampled = resampled_scores({"a": a, "b": b}, 200, 0)
        low += p_value(a.mean() - b.mean(), resampled["a"] - resampled["b"]) < 0.1
    assert 8 <= low <= 36
