"""BLEU-1..4, ROUGE-L and CIDEr-D of captions, equal to pycocoevalcap 1.2 on the same tokens.

    predictions.jsonl   {"image_id": 1, "caption": "..."}               one line an image
    references.jsonl    {"image_id": 1, "captions": ["...", "..."]}     one line an image, or a published dataset

`caption_statistics` reduces every image to a few numbers; a score of any set of images is a function of their sums or
means (`bleu`, `corpus_scores`). pycocoevalcap's choices are kept where papers leave room: the closest reference length
in BLEU; in ROUGE-L the best precision and the best recall, of possibly different references; in CIDEr-D the clipping,
the length penalty, the factor 10, and document frequencies from the references given, so that a subset of the images
scores differently from the whole and a single image always 0.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from vlmcap.evaluation.tokenise import tokenise, tokenizer_signature

# Stands in every signature: to be raised with any edit of this file or of tokenise.py that can move a score.
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


class ScoreError(ValueError):
    """Predictions or references that cannot be scored; the message names the file and line, or the images."""


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


def score(predictions: dict[str, str], references: dict[str, list[str]], tokenizer: str = "unidic-lite") -> dict:
    """Scores of one caption per image against its references.

    Args:
        predictions: image id -> caption; an empty caption is scored as one.
        references: image id -> captions, at least one per image and each with at least one token.
        tokenizer: `unidic-lite`, `characters` or `none` (see vlmcap.evaluation.tokenise).

    Returns:
        {"scores": {"bleu_1" .. "bleu_4", "rouge_l", "cider_d": float}, "signatures": {the same keys: str},
        "counts": {"images", "references", "empty_predictions": int, "mean_caption_tokens": float}}.
        BLEU and ROUGE-L lie in 0..1, CIDEr-D in 0..10. Empty predictions are those without a token.

    Raises:
        ScoreError: no images, ids that are only on one side, an image without references or a reference without a
            token; the message names the ids.
        TokenizerError: no such tokenizer.
    """
    _check_same_images(predictions, references)
    ids = list(references)
    hypotheses = tokenise([predictions[image_id] for image_id in ids], tokenizer)
    flat = iter(tokenise([caption for image_id in ids for caption in references[image_id]], tokenizer))
    reference_tokens = [[next(flat) for _ in references[image_id]] for image_id in ids]
    _check_references(ids, reference_tokens, tokenizer)

    scores = corpus_scores(caption_statistics(hypotheses, reference_tokens))
    lengths = [len(tokens) for tokens in hypotheses]
    return {
        "scores": scores,
        "signatures": _signatures(scores, [len(refs) for refs in reference_tokens], tokenizer),
        "counts": {
            "images": len(ids),
            "references": sum(len(refs) for refs in reference_tokens),
            "empty_predictions": lengths.count(0),
            "mean_caption_tokens": sum(lengths) / len(ids),
        },
    }


def caption_statistics(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> CaptionStatistics:
    """Statistics of each image from the tokens of its hypothesis and of its references, in the order given.

    Every image needs at least one reference; hypotheses and references may be empty lists of tokens. Tokens must hold
    no white space (pycocoevalcap would split them). CIDEr-D takes document frequencies from all `references` given.
    """
    correct, guess, cider = _ngram_statistics(hypotheses, references)
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
    # Bit i of positions[token]: token stands at place i of the hypothesis.
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
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`correct`, `guess` and `cider_d` of CaptionStatistics.

    CIDEr-D: Vedantam et al. 2015, as pycocoevalcap/cider/cider_scorer.py. All sentences stand behind one another in
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
    start, ngram = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
    for n in range(MAX_ORDER):
        # An n-gram is the (n-1)-gram at the same start and the token after it; the two become one number.
        fits = tokens_left[start] > n
        start = start[fits]
        kinds, ngram = np.unique(ngram[fits] * len(vocabulary) + tokens[start + n], return_inverse=True)

        # An entry is an n-gram and a sentence that has it. Sorted by both, those of one image stand together: a run.
        entries, count = np.unique(ngram * len(sentences) + sentence_of[start], return_counts=True)
        kind, sentence = np.divmod(entries, len(sentences))
        run_start = np.flatnonzero(np.diff(kind * images + image_of[sentence], prepend=-1))
        run_length = np.diff(run_start, append=len(entries))
        in_hypothesis = np.add.reduceat(np.where(is_hypothesis[sentence], count, 0), run_start)
        in_references = np.maximum.reduceat(np.where(is_hypothesis[sentence], 0, count), run_start)
        correct[:, n] = np.bincount(image_of[sentence[run_start]], np.minimum(in_hypothesis, in_references), images)

        # One logarithm, not a difference of two: an n-gram that every image has must weigh exactly 0, or its rounding
        # error would be normalised into a full match.
        document_frequency = np.bincount(kind[run_start], in_references > 0, len(kinds))
        idf = np.log(images / np.maximum(1, document_frequency))[kind]
        weight = count * idf
        hypothesis_weight = np.repeat(in_hypothesis, run_length) * idf
        dot = np.bincount(sentence, np.minimum(hypothesis_weight, weight) * weight, len(sentences))
        norm = np.sqrt(np.bincount(sentence, weight**2, len(sentences)))
        norms = norm[hypothesis_of] * norm
        cosine += np.divide(dot, norms, out=np.zeros(len(sentences)), where=norms > 0)

    # pycocoevalcap compares numbers of bigrams: the same difference, but for empty sentences, which match nothing.
    similarity = cosine / MAX_ORDER * np.exp(-((lengths[hypothesis_of] - lengths) ** 2) / (2 * CIDER_SIGMA**2))
    to_references = np.bincount(image_of, np.where(is_hypothesis, 0, similarity))
    return correct, guess, CIDER_SCALE * to_references / (per_image - 1)


def _signatures(names: Iterable[str], reference_counts: list[int], tokenizer: str) -> dict[str, str]:
    fewest, most = min(reference_counts), max(reference_counts)
    nref = str(most) if fewest == most else f"{fewest}-{most}"
    shared = f"nref:{nref}|v:{METRICS_VERSION}"
    tokens = tokenizer_signature(tokenizer)
    return {name: f"{name}|{tokens}|{'df:refs|' if name == 'cider_d' else ''}{shared}" for name in names}


def _check_same_images(predictions: dict, references: dict) -> None:
    if not predictions and not references:
        raise ScoreError("no predictions and no references: there is nothing to score")
    sides = {
        "references but no prediction": [image_id for image_id in references if image_id not in predictions],
        "a prediction but no references": [image_id for image_id in predictions if image_id not in references],
    }
    wrong = [f"{len(ids):,} images have {side} ({_few(ids)})" for side, ids in sides.items() if ids]
    if wrong:
        raise ScoreError(
            f"predictions and references are not of the same images: {'; '.join(wrong)}. "
            "Score predictions against the references of the split they were made for."
        )


def _check_references(ids: list, reference_tokens: list[list[list[str]]], tokenizer: str) -> None:
    without = [image_id for image_id, refs in zip(ids, reference_tokens, strict=True) if not refs]
    if without:
        raise ScoreError(f"{len(without):,} images have an empty list of references ({_few(without)})")
    empty = [image_id for image_id, refs in zip(ids, reference_tokens, strict=True) if not all(refs)]
    if empty:
        raise ScoreError(
            f"{len(empty):,} images have an empty reference, one without any token for the tokenizer {tokenizer!r} "
            f"({_few(empty)}): remove those captions from the references"
        )


def _few(ids: list) -> str:
    return ", ".join(str(image_id) for image_id in ids[:5]) + (", ..." if len(ids) > 5 else "")


def read_predictions(path: str | Path) -> dict[str, str]:
    """Image id -> caption from JSONL lines {"image_id", "caption", ...}; integer ids become strings.

    Raises ScoreError, naming file and line, on a line that is no such object and on an id that comes twice.
    """
    predictions = {}
    for where, image_id, line in _read_jsonl(path):
        if not isinstance(line.get("caption"), str):
            raise ScoreError(f'{where}: "caption" must be a string, but is {line.get("caption")!r}')
        predictions[image_id] = line["caption"]
    return predictions


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Image id -> captions from JSONL lines {"image_id", "captions", ...}; integer ids become strings.

    Raises ScoreError, naming file and line, on a line that is no such object and on an id that comes twice.
    """
    references = {}
    for where, image_id, line in _read_jsonl(path):
        captions = line.get("captions")
        if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
            raise ScoreError(f'{where}: "captions" must be a list of strings, but is {captions!r}')
        references[image_id] = captions
    return references


def dataset_references(dataset: str, split: str, revision: str | None = None) -> dict[str, list[str]]:
    """Image id -> captions of a split of a published dataset, a Hub id or a local folder of parquet files.

    Raises ScoreError on an image id that comes twice.
    """
    from datasets import load_dataset  # takes 3 s to import, which scoring from files need not wait for

    # Streaming reads these two columns alone: no photograph is downloaded or decoded.
    rows = load_dataset(dataset, split=split, revision=revision, columns=["image_id", "captions"], streaming=True)
    references = {}
    for row in rows:
        image_id = str(row["image_id"])
        if image_id in references:
            raise ScoreError(f"{dataset}, split {split}: image_id {image_id} comes twice")
        references[image_id] = row["captions"]
    return references


def write_metrics(
    predictions_path: str | Path,
    references: dict[str, list[str]],
    output: str | Path,
    tokenizer: str = "unidic-lite",
    more: dict | None = None,
) -> dict:
    """Score a predictions file and write metrics.json: what `score` returns, the keys of the run record and of `more`.

    The run record (model, dataset, decoding, hardware, versions, ...) is `<stem>.run.json` beside the predictions, as
    `scripts/infer_baseline.py` leaves it; without one the scores stand without it. Returns what was written.

    Raises ScoreError as `score` and `read_predictions` do, and on a malformed run record.
    """
    predictions_path, output = Path(predictions_path), Path(output)
    metrics = score(read_predictions(predictions_path), references, tokenizer)
    record = predictions_path.with_suffix(".run.json")
    if record.exists():
        metrics |= _parse_object(record.read_bytes(), str(record))
    metrics |= more or {}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(metrics, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return metrics


def score_table(metrics: dict) -> str:
    """The scores of a metrics document as lines of text, each with its signature."""
    lines = [f"{name:<8} {value:8.4f}   {metrics['signatures'][name]}" for name, value in metrics["scores"].items()]
    counts = "{images:,} images, {references:,} references, {empty_predictions:,} empty predictions, ".format(
        **metrics["counts"]
    )
    return "\n".join([*lines, f"{counts}{metrics['counts']['mean_caption_tokens']:.1f} tokens a caption"])


def _read_jsonl(path: str | Path) -> Iterator[tuple[str, str, dict]]:
    """`file, line n`, the image id and the object of every line that is not blank."""
    seen = {}
    with open(path, "rb") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            line = _parse_object(text, where)
            image_id = line.get("image_id")
            if not isinstance(image_id, int | str):
                raise ScoreError(f'{where}: "image_id" must be an integer or a string, but is {image_id!r}')
            image_id = str(image_id)
            if image_id in seen:
                raise ScoreError(f"{where}: image_id {image_id} is on line {seen[image_id]} already")
            seen[image_id] = number
            yield where, image_id, line


def _parse_object(text: bytes, where: str) -> dict:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ScoreError(f"{where}: not JSON in UTF-8 ({error})") from error
    if not isinstance(parsed, dict):
        raise ScoreError(f"{where}: a JSON object is needed, but this is {parsed!r:.80}")
    return parsed
