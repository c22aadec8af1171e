"""BLEU-1..4, ROUGE-L and CIDEr-D of captions, equal to pycocoevalcap 1.2 on the same tokens.

`caption_statistics` reduces every image to a few numbers; a score of any set of images is a function of their sums or
means (`bleu`, `corpus_scores`). pycocoevalcap's choices are kept where papers leave room: the closest reference length
in BLEU; in ROUGE-L the best precision and the best recall, of possibly different references; in CIDEr-D the clipping,
the length penalty, the factor 10, and document frequencies from the references given, so that a subset of the images
scores differently from the whole and a single image always 0. `DocumentFrequencies` of a fixed set of references, such
as a training split, make CIDEr-D of any set of images comparable instead.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

# Is part of every signature. Raise it with any edit of this file or of tokenise.py that can move a score.
METRICS_VERSION = "0.1"

MAX_ORDER = 4
# Keep the division defined without matches; values of pycocoevalcap/bleu/bleu_scorer.py.
BLEU_TINY = 1e-15
BLEU_SMALL = 1e-9
# Weight of recall against precision in ROUGE-L; pycocoevalcap/rouge/rouge.py.
ROUGE_BETA = 1.2
# Width of the length penalty in tokens, and the scale; Vedantam et al. 2015, pycocoevalcap/cider/cider_scorer.py.
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0


@dataclass(frozen=True)
class CaptionStatistics:
    """What the corpus scores need of each image; the first axis of every array is the image.

    correct           (images, 4) float64: n-grams of the hypothesis that a reference has too, clipped, for n = 1..4
    guess             (images, 4) float64: n-grams of the hypothesis; `guess[:, 0]` is its length in tokens
    reference_length  (images,) float64: tokens of the reference closest in length; of two equally close, the shorter
    rouge_l           (images,) float64: ROUGE-L of the image, 0 to 1
    cider_d           (images,) float64: CIDEr-D of the image, 0 to 10
    """

    correct: np.ndarray
    guess: np.ndarray
    reference_length: np.ndarray
    rouge_l: np.ndarray
    cider_d: np.ndarray


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references an n-gram occurs, for CIDEr-D with a fixed idf.

    images   number of images counted over
    ngrams   n-gram, its tokens joined by single spaces, -> number of images, of those in two images or more: one that
             is in a single image weighs as much as one that is in none (pycocoevalcap/cider/cider_scorer.py)
    """

    images: int
    ngrams: dict[str, int]


def document_frequencies(references: Iterable[Sequence[Sequence[str]]]) -> DocumentFrequencies:
    """Document frequencies of the n-grams, n = 1..4, in the references of each image, given as lists of tokens."""
    images, counts = 0, Counter()
    for refs in references:
        images += 1
        counts.update(
            {
                " ".join(tokens[start : start + n])
                for tokens in refs
                for n in range(1, MAX_ORDER + 1)
                for start in range(len(tokens) - n + 1)
            }
        )
    return DocumentFrequencies(images, {ngram: count for ngram, count in sorted(counts.items()) if count > 1})


def caption_statistics(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    idf: DocumentFrequencies | None = None,
) -> CaptionStatistics:
    """Statistics of each image from the tokens of its hypothesis and of its references, in the order given.

    Every image needs at least one reference; hypotheses and references may be empty lists of tokens. Tokens must hold
    no white space (pycocoevalcap would split them). CIDEr-D takes document frequencies from all `references` given,
    or from `idf`.
    """
    correct, guess, cider = _ngram_statistics(hypotheses, references, idf)
    closest = [
        min((abs(len(ref) - len(hypothesis)), len(ref)) for ref in refs)[1]
        for hypothesis, refs in zip(hypotheses, references, strict=True)
    ]
    return CaptionStatistics(
        correct=correct,
        guess=guess,
        reference_length=np.array(closest, dtype=np.float64),
        rouge_l=np.array([rouge_l(*pair) for pair in zip(hypotheses, references, strict=True)]),
        cider_d=cider,
    )


def corpus_scores(statistics: CaptionStatistics) -> dict[str, float]:
    """`bleu_1` .. `bleu_4`, `rouge_l` and `cider_d` of all images together."""
    bleus = bleu(statistics.correct.sum(0), statistics.guess.sum(0), statistics.reference_length.sum())
    return {f"bleu_{n}": float(value) for n, value in enumerate(bleus, 1)} | {
        "rouge_l": float(statistics.rouge_l.mean()),
        "cider_d": float(statistics.cider_d.mean()),
    }


def bleu(correct: np.ndarray, guess: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """BLEU-1..4 as (..., 4) from counts summed over the images of a corpus, or from those of single images.

    Papineni et al. 2002, with the constants of pycocoevalcap/bleu/bleu_scorer.py.

    Args:
        correct, guess: (..., 4), fields of CaptionStatistics.
        reference_length: (...).
    """
    precision = (correct + BLEU_TINY) / (guess + BLEU_SMALL)
    mean = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    length_ratio = (guess[..., 0] + BLEU_TINY) / (reference_length + BLEU_SMALL)
    return mean * np.exp(np.minimum(0, 1 - 1 / length_ratio))[..., None]


def rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of one hypothesis, 0 to 1: Lin 2004 with beta 1.2, as pycocoevalcap/rouge/rouge.py.

    Precision and recall are each the best over the references. A text without tokens counts as one empty token there
    (`"".split(" ")`), so it is kept so here: two empty texts agree fully.
    """
    hypothesis = hypothesis or [""]
    # Bit i of positions[token]: token is at place i of the hypothesis.
    positions = {}
    for place, token in enumerate(hypothesis):
        positions[token] = positions.get(token, 0) | 1 << place

    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = _common_subsequence(positions, len(hypothesis), reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(positions: dict[str, int], length: int, reference: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the dynamic programme at a time in the bits of an integer.

    Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    full = (1 << length) - 1
    row = full
    for token in reference:
        match = row & positions.get(token, 0)
        row = ((row + match) | (row - match)) & full
    return length - row.bit_count()


def _ngram_statistics(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    idf_of: DocumentFrequencies | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`correct`, `guess` and `cider_d` of CaptionStatistics.

    CIDEr-D: Vedantam et al. 2015, as pycocoevalcap/cider/cider_scorer.py. All sentences follow one another in
    one array of tokens, each image's hypothesis followed by its references.
    """
    images = len(hypotheses)
    sentences = [
        tokens for hypothesis, refs in zip(hypotheses, references, strict=True) for tokens in (hypothesis, *refs)
    ]
    per_image = np.array([1 + len(refs) for refs in references])
    image_of = np.repeat(np.arange(images), per_image)
    hypothesis_of = np.repeat(np.cumsum(per_image) - per_image, per_image)
    is_hypothesis = hypothesis_of == np.arange(len(sentences))

    words = list(chain.from_iterable(sentences))
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokens = np.fromiter((vocabulary[word] for word in words), np.int64, len(words))
    lengths = np.array([len(sentence) for sentence in sentences])
    sentence_of = np.repeat(np.arange(len(sentences)), lengths)
    tokens_left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))

    correct = np.zeros((images, MAX_ORDER))
    guess = np.maximum(0, lengths[is_hypothesis, None] - np.arange(MAX_ORDER)).astype(np.float64)
    cosine = np.zeros(len(sentences))
    documents = idf_of.images if idf_of else images
    start, ngram, names = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64), [""]
    for n in range(MAX_ORDER):
        # An n-gram is the (n-1)-gram at the same start and the token after it; the two become one number.
        fits = tokens_left[start] > n
        start = start[fits]
        kinds, ngram = np.unique(ngram[fits] * len(vocabulary) + tokens[start + n], return_inverse=True)

        # An entry is an n-gram and a sentence that has it. Sorted by both, those of one image are together: a run.
        entries, count = np.unique(ngram * len(sentences) + sentence_of[start], return_counts=True)
        kind, sentence = np.divmod(entries, len(sentences))
        run_start = np.flatnonzero(np.diff(kind * images + image_of[sentence], prepend=-1))
        run_length = np.diff(run_start, append=len(entries))
        in_hypothesis = np.add.reduceat(np.where(is_hypothesis[sentence], count, 0), run_start)
        in_references = np.maximum.reduceat(np.where(is_hypothesis[sentence], 0, count), run_start)
        correct[:, n] = np.bincount(image_of[sentence[run_start]], np.minimum(in_hypothesis, in_references), images)

        # One logarithm, not a difference of two: an n-gram that every image has must weigh exactly 0, or its rounding
        # error would be normalised into a full match.
        if idf_of:
            names = _ngram_names(names, list(vocabulary), kinds)
            document_frequency = np.array([idf_of.ngrams.get(name, 0) for name in names], dtype=np.float64)
        else:
            document_frequency = np.bincount(kind[run_start], in_references > 0, len(kinds))
        idf = np.log(documents / np.maximum(1, document_frequency))[kind]
        weight = count * idf
        hypothesis_weight = np.repeat(in_hypothesis, run_length) * idf
        dot = np.bincount(sentence, np.minimum(hypothesis_weight, weight) * weight, len(sentences))
        norm = np.sqrt(np.bincount(sentence, weight**2, len(sentences)))
        norms = norm[hypothesis_of] * norm
        cosine += np.divide(dot, norms, out=np.zeros(len(sentences)), where=norms > 0)

    # pycocoevalcap compares numbers of bigrams: the same difference, except for empty sentences, which match nothing.
    similarity = cosine / MAX_ORDER * np.exp(-((lengths[hypothesis_of] - lengths) ** 2) / (2 * CIDER_SIGMA**2))
    to_references = np.bincount(image_of, np.where(is_hypothesis, 0, similarity))
    return correct, guess, CIDER_SCALE * to_references / (per_image - 1)


def _ngram_names(shorter: list[str], vocabulary: list[str], kinds: np.ndarray) -> list[str]:
    """Tokens joined by spaces of the n-grams `kinds`, from those of the (n-1)-grams they begin with."""
    begin, last = np.divmod(kinds, len(vocabulary))
    return [f"{shorter[b]} {vocabulary[t]}".lstrip(" ") for b, t in zip(begin, last, strict=True)]
