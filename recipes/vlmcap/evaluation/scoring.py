"""Files of predictions and references in, a document of scores out.

predictions.jsonl   {"image_id": 1, "caption": "..."}               one line an image
references.jsonl    {"image_id": 1, "captions": ["...", "..."]}     one line an image, or a published dataset
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmcap.evaluation.metrics import METRICS_VERSION, caption_statistics, corpus_scores
from vlmcap.evaluation.tokenise import tokenise, tokenizer_signature

# How people read the names of scores, in every table and plot.
SCORE_LABELS = {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"}


class ScoreError(ValueError):
    """Predictions or references that cannot be scored; the message names the file and line, or the images."""


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
