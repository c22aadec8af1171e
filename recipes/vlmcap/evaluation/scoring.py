"""Scores of captions: a document of scores, signatures, intervals and counts (metrics.json).

idf.json            {"tokenizer": "tok:...", "images": 5000, "ngrams": {"犬 が": 17, ...}}

The idf file fixes CIDEr-D's document frequencies: "images" is how many images' references they were counted in,
"tokenizer" how these were tokenised, and "ngrams" holds every 1- to 4-gram of two images or more, its tokens joined by
spaces (one of a single image weighs as much as one of none).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np

from vlmcap.atomic_write import write_atomically
from vlmcap.evaluation import external
from vlmcap.evaluation.bootstrap import LEVEL, interval, p_value, resampled_scores, scores_of
from vlmcap.evaluation.caption_files import ScoreError, parse_object, read_predictions
from vlmcap.evaluation.metrics import (
    METRICS_VERSION,
    DocumentFrequencies,
    bleu,
    caption_statistics,
    corpus_scores,
    document_frequencies,
)
from vlmcap.evaluation.register import to_plain
from vlmcap.evaluation.tokenise import JAPANESE_TOKENIZERS, tokenise, tokenizer_signature
from vlmcap.strict_parsing import shown

# How people read the names of scores, in every table and plot.
SCORE_LABELS = {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "chrf": "chrF",
    "meteor": "METEOR",
    "spice": "SPICE",
    "jaspice": "JaSPICE",
}


# How whole JSON files begin: a list of COCO results; COCO's annotations, recognised by the first key.


@dataclass
class ScoreOptions:
    """What is computed beside BLEU, ROUGE-L, CIDEr-D and chrF, and how."""

    idf: str | None = field(
        default=None,
        metadata={"help": "idf file for CIDEr-D, made by --write_idf; without it the idf is that of the references."},
    )
    resamples: int = field(
        default=1000, metadata={"help": "Bootstrap resamples for the intervals; 0 leaves intervals out."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})
    register_normalised: bool = field(
        default=True,
        metadata={"help": "Score a second time with polite endings made plain on both sides (Japanese)."},
    )
    meteor: bool = field(
        default=True, metadata={"help": "METEOR 1.5 (English) in Java, if Java and the jar are there."}
    )
    meteor_timeout: float = field(default=300, metadata={"help": "Seconds after which METEOR is stopped."})
    spice_url: str | None = field(
        default=None,
        metadata={"help": "SPICE service; vlmcap/evaluation/external.py describes its protocol. It parses English."},
    )
    spice_dir: str | None = field(
        default=None, metadata={"help": "Or a local SPICE: folder with spice-1.0.jar and the CoreNLP jars in lib/."}
    )
    jaspice_url: str | None = field(
        default=None, metadata={"help": "JaSPICE's server, for Japanese: its container, e.g. http://127.0.0.1:2115."}
    )
    spice_timeout: float = field(
        default=1800,
        metadata={"help": "Seconds after which SPICE is stopped, or a service without an answer is left out."},
    )


def quick_scores(
    predictions: dict[str, str], references: dict[str, list[str]], tokenizer: str = "unidic-lite"
) -> dict[str, float]:
    """`bleu_1` .. `bleu_4`, `rouge_l` and `cider_d` alone, the same numbers as of `score`, for use during training.

    Raises as `score` does.
    """
    return corpus_scores(caption_statistics(*_tokens(predictions, references, tokenizer)))


def score(
    predictions: dict[str, str],
    references: dict[str, list[str]],
    tokenizer: str = "unidic-lite",
    options: ScoreOptions | None = None,
) -> dict:
    """Scores of one caption per image against its references.

    Args:
        predictions: image id -> caption; an empty caption is scored as one.
        references: image id -> captions, at least one per image and each with at least one token.
        tokenizer: one of vlmcap.evaluation.tokenise.TOKENIZERS.
        options: None stands for ScoreOptions().

    Returns:
        The scorer's part of metrics.json:

        scores               bleu_1 .. bleu_4, rouge_l, chrf, meteor, spice, jaspice in 0..1, cider_d in 0..10; one
                             that could not be computed is absent, and "notices" says why
        signatures           of each score: what must be equal for two scores to be comparable
        intervals            of each score, [low, high]; empty when options.resamples is 0
        bootstrap            {"resamples", "seed", "level"}
        register_normalised  {"scores", "signatures", "intervals"} with polite endings made plain on both sides; for
                             Japanese tokenizers, without SPICE, CIDEr-D always with the idf of these references
        counts               {"images", "references", "empty_predictions", "mean_caption_tokens",
                             "mean_reference_tokens", "type_token_ratio", "reference_type_token_ratio"}; empty
                             predictions are those without a token
        notices              list of str
        per_image            {"image_id": list, a list for every score that has a value per image, "statistics":
                             {"bleu": rows of 4 counts of n-grams in common, 4 of the hypothesis, reference length;
                             "chrf", "meteor": rows as in vlmcap.evaluation.external}}, in the order of "image_id"

    Raises:
        ScoreError: no images, ids that are only on one side, an image without references or a reference without a
            token; the message names the ids. An idf file that is malformed or was made with another tokenizer.
        TokenizerError: no such tokenizer.
    """
    options = options or ScoreOptions()
    if options.resamples < 0:
        raise ScoreError(f"resamples={options.resamples}: choose 0 for no intervals, or a number above it")
    if options.seed < 0:
        raise ScoreError(f"seed={options.seed}: choose a number from 0")
    hypotheses, reference_tokens = _tokens(predictions, references, tokenizer)
    idf = read_idf(options.idf, tokenizer) if options.idf else None
    variants = {"": (predictions, references)}
    statistics = {"": _statistics(*variants[""], hypotheses, reference_tokens, idf)}
    if options.register_normalised and tokenizer in JAPANESE_TOKENIZERS:
        variants["plain"] = (
            {image_id: to_plain(caption) for image_id, caption in predictions.items()},
            {image_id: [to_plain(caption) for caption in captions] for image_id, captions in references.items()},
        )
        statistics["plain"] = _statistics(*variants["plain"], *_tokens(*variants["plain"], tokenizer), None)

    notices = []
    if options.meteor:
        try:
            _add_meteor(statistics, variants, tokenizer, options.meteor_timeout)
        except external.ScorerUnavailable as error:
            notices.append(f"METEOR is left out: {error}")
    by = {}
    for name, compute in _spices(tokenizer, options).items():
        try:
            statistics[""][name], by[name] = compute(_items(predictions, references))
        except external.ScorerUnavailable as error:
            notices.append(f"{SCORE_LABELS[name]} is left out: {error}")
    if "spice" in by and tokenizer == "vietnamese":
        notices.append(
            "SPICE parses English alone: of Vietnamese captions it compares what an English parser makes of them, as"
            " the published figure of UIT-ViIC does."
        )

    describe = _Signatures(tokenizer, [len(captions) for captions in references.values()], by)
    df = f"df:{_digest(options.idf)}-{idf.images}" if idf else "df:refs"
    document = _scored(statistics[""], describe, df, "", options)
    if options.resamples:
        document["bootstrap"] = {"resamples": options.resamples, "seed": options.seed, "level": LEVEL}
    if "plain" in statistics:
        document["register_normalised"] = _scored(statistics["plain"], describe, "df:refs", "|reg:plain", options)
    return document | {
        "counts": _counts(hypotheses, reference_tokens),
        "notices": notices,
        "per_image": _per_image(list(references), statistics[""]),
    }


def check_references(references: dict[str, list[str]], tokenizer: str, place: str) -> None:
    """Raises ScoreError, naming `place` and image ids, if `score` could take no prediction for these references: there
    is no image, or one without references or with a reference without any token."""
    if not references:
        raise ScoreError(f"{place}: there is no image, so nothing can be scored")
    variants = [references]
    if tokenizer in JAPANESE_TOKENIZERS:
        variants.append({image_id: list(map(to_plain, captions)) for image_id, captions in references.items()})
    try:
        for texts in variants:
            for name in {tokenizer, _meteor_tokenizer(tokenizer)}:
                _reference_tokens(texts, name)
    except ScoreError as error:
        raise ScoreError(f"{place}: {error}") from error


def _tokens(
    predictions: dict[str, str], references: dict[str, list[str]], tokenizer: str
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of hypothesis and references of each image, in the order of `references`, checked."""
    _check_same_images(predictions, references)
    _check_text(predictions, references)
    hypotheses = tokenise([predictions[image_id] for image_id in references], tokenizer)
    return hypotheses, _reference_tokens(references, tokenizer)


def _reference_tokens(references: dict[str, list[str]], tokenizer: str) -> list[list[list[str]]]:
    flat = iter(tokenise(chain.from_iterable(references.values()), tokenizer))
    reference_tokens = [[next(flat) for _ in captions] for captions in references.values()]
    _check_references(list(references), reference_tokens, tokenizer)
    return reference_tokens


def _statistics(
    predictions: dict[str, str],
    references: dict[str, list[str]],
    hypotheses: list[list[str]],
    reference_tokens: list[list[list[str]]],
    idf: DocumentFrequencies | None,
) -> dict[str, np.ndarray]:
    """What vlmcap.evaluation.bootstrap takes: rows or one number an image, in the order of `references`."""
    words = caption_statistics(hypotheses, reference_tokens, idf)
    return {
        "bleu": np.hstack([words.correct, words.guess, words.reference_length[:, None]]),
        "rouge_l": words.rouge_l,
        "cider_d": words.cider_d,
        "chrf": external.chrf_statistics(
            [predictions[image_id] for image_id in references], list(references.values())
        ),
    }


def _meteor_tokenizer(tokenizer: str) -> str:
    """METEOR does not know Japanese. Only its exact matches work: of characters, the same for all tokenizers."""
    return "characters" if tokenizer in JAPANESE_TOKENIZERS else tokenizer


def _add_meteor(statistics: dict[str, dict], variants: dict[str, tuple], tokenizer: str, timeout: float) -> None:
    """Adds METEOR's statistics to those of every variant, from one run of Java, which takes seconds to start."""
    tokens = [_tokens(*texts, _meteor_tokenizer(tokenizer)) for texts in variants.values()]
    rows = external.meteor_statistics(
        [hypothesis for hypotheses, _ in tokens for hypothesis in hypotheses],
        [refs for _, reference_tokens in tokens for refs in reference_tokens],
        timeout,
    )
    for variant, share in zip(variants, np.split(rows, len(variants)), strict=True):
        statistics[variant]["meteor"] = share


def _items(predictions: dict[str, str], references: dict[str, list[str]]) -> list[dict]:
    return [{"candidate": predictions[image_id], "references": captions} for image_id, captions in references.items()]


def _spices(tokenizer: str, options: ScoreOptions) -> dict[str, Callable[[list[dict]], tuple[np.ndarray, str]]]:
    """The SPICE-like scores that are configured: name -> items to scores per image and what computed them."""
    if options.spice_url and options.spice_dir:
        raise ScoreError(f"--spice_url {options.spice_url} and --spice_dir {options.spice_dir}: give one of the two")

    def spice(items: list[dict]) -> tuple[np.ndarray, str]:
        return external.service_scores(options.spice_url, items, options.spice_timeout), "by:service"

    def jaspice(items: list[dict]) -> tuple[np.ndarray, str]:
        scores = external.service_scores(options.jaspice_url, items, options.spice_timeout, spaces=False)
        return scores, "space:no|by:service"

    def local(items: list[dict]) -> tuple[np.ndarray, str]:
        return external.local_spice_scores(options.spice_dir, items, options.spice_timeout), "by:spice-1.0"

    def wrong_language(language: str, items: list[dict]) -> tuple[np.ndarray, str]:
        raise external.ScorerUnavailable(f"it is for {language} alone, and the tokenizer is {tokenizer}")

    spices = {}
    if options.spice_url or options.spice_dir:
        spices["spice"] = spice if options.spice_url else local
        if tokenizer in JAPANESE_TOKENIZERS:
            spices["spice"] = partial(wrong_language, "English")
    if options.jaspice_url:
        spices["jaspice"] = jaspice
        if tokenizer not in JAPANESE_TOKENIZERS:
            spices["jaspice"] = partial(wrong_language, "Japanese")
    return spices


@dataclass(frozen=True)
class _Signatures:
    tokenizer: str
    reference_counts: list[int]
    by: dict[str, str]

    def __call__(self, name: str, df: str, register: str) -> str:
        fewest, most = min(self.reference_counts), max(self.reference_counts)
        end = f"nref:{most if fewest == most else f'{fewest}-{most}'}|v:{METRICS_VERSION}"
        tokens = tokenizer_signature(self.tokenizer) + register
        if name == "cider_d":
            return f"{name}|{tokens}|{df}|{end}"
        if name == "chrf":
            how = f"norm:nfkc|punct:keep|case:mixed{register}|nc:6|nw:0|space:no|eff:yes|scale:1"
            return f"{name}|{how}|sacrebleu:{metadata.version('sacrebleu')}|{end}"
        if name == "meteor":
            characters = tokenizer_signature(_meteor_tokenizer(self.tokenizer)) + register
            return f"{name}|{characters}|meteor:1.5|lang:en|{end}"
        if name in self.by:
            return f"{name}|norm:none|{self.by[name]}|{end}"
        return f"{name}|{tokens}|{end}"


def _scored(
    statistics: dict[str, np.ndarray], signature: _Signatures, df: str, register: str, options: ScoreOptions
) -> dict:
    images = len(statistics["bleu"])
    scores = {name: float(value[0]) for name, value in scores_of(statistics, np.ones((1, images))).items()}
    resampled = resampled_scores(statistics, options.resamples, options.seed) if options.resamples else {}
    return {
        "scores": {name: scores[name] for name in SCORE_LABELS if name in scores},
        "signatures": {name: signature(name, df, register) for name in SCORE_LABELS if name in scores},
        "intervals": {name: interval(resampled[name]) for name in SCORE_LABELS if name in resampled},
    }


def _counts(hypotheses: list[list[str]], reference_tokens: list[list[list[str]]]) -> dict:
    references = list(chain.from_iterable(reference_tokens))

    def mean_length(texts: list[list[str]]) -> float:
        return sum(map(len, texts)) / len(texts)

    def type_token_ratio(texts: list[list[str]]) -> float:
        words = list(chain.from_iterable(texts))
        return len(set(words)) / len(words) if words else 0.0

    return {
        "images": len(hypotheses),
        "references": len(references),
        "empty_predictions": sum(not tokens for tokens in hypotheses),
        "mean_caption_tokens": mean_length(hypotheses),
        "mean_reference_tokens": mean_length(references),
        "type_token_ratio": type_token_ratio(hypotheses),
        "reference_type_token_ratio": type_token_ratio(references),
    }


# Names of rows that are summed over images -> the score of single images, and its name in per_image.
_OF_SUMS = {
    "bleu": ("bleu_4", lambda rows: bleu(rows[:, 0:4], rows[:, 4:8], rows[:, 8])[:, 3]),
    "chrf": ("chrf", external.chrf),
    "meteor": ("meteor", external.meteor),
}


def _per_image(ids: list[str], statistics: dict[str, np.ndarray]) -> dict:
    columns = {"image_id": [str(image_id) for image_id in ids]}
    for name, rows in statistics.items():
        column, compute = _OF_SUMS.get(name, (name, lambda values: values))
        columns[column] = compute(rows).tolist()
    # METEOR's numbers are whole ones too.
    return columns | {
        "statistics": {name: statistics[name].astype(int).tolist() for name in _OF_SUMS if name in statistics}
    }


def paired_comparison(a: dict, b: dict, resamples: int = 1000, seed: int = 0) -> dict[str, dict]:
    """Differences of two systems' scores, with interval and p-value, by the paired bootstrap over images.

    Args:
        a, b: metrics documents of the same images and references. Scores that only one of them has are left out.

    Returns:
        score -> {"difference": a - b, "interval": [low, high] of it, "p_value": two-sided}; small differences of
        many scores or many systems reach p < 0.05 by chance, and no correction for that is made.

    Raises:
        ScoreError: no per_image in a document, other images or references, or a score of another signature.
    """
    for name, document in (("first", a), ("second", b)):
        if "per_image" not in document:
            raise ScoreError(f"the {name} metrics document has no per_image: score its predictions again")
    place = {image_id: i for i, image_id in enumerate(b["per_image"]["image_id"])}
    ids = a["per_image"]["image_id"]
    if place.keys() != set(ids):
        differ = sorted(place.keys() ^ set(ids))
        raise ScoreError(f"the two systems were scored on different images: {len(differ):,} differ ({_few(differ)})")
    if a["counts"]["references"] != b["counts"]["references"]:
        raise ScoreError(
            f"the two systems were scored against different references: {a['counts']['references']:,} and "
            f"{b['counts']['references']:,}"
        )
    names = [name for name in a["scores"] if name in b["scores"]]
    for name in names:
        if a["signatures"][name] != b["signatures"][name]:
            raise ScoreError(
                f"{name} was computed in different ways: {a['signatures'][name]} and {b['signatures'][name]}"
            )
    order = [place[image_id] for image_id in ids]
    resampled_a = resampled_scores(_stored_statistics(a, names), resamples, seed)
    resampled_b = resampled_scores(
        {name: rows[order] for name, rows in _stored_statistics(b, names).items()}, resamples, seed
    )
    comparison = {}
    for name in names:
        difference, resampled = a["scores"][name] - b["scores"][name], resampled_a[name] - resampled_b[name]
        comparison[name] = {
            "difference": difference,
            "interval": interval(resampled),
            "p_value": p_value(difference, resampled),
        }
    return comparison


def _stored_statistics(document: dict, names: list[str]) -> dict[str, np.ndarray]:
    """`_statistics` of the scores `names`, back from a metrics document."""
    per_image = document["per_image"]
    summed = {name: rows for name, rows in per_image["statistics"].items() if _OF_SUMS[name][0] in names}
    means = {name: per_image[name] for name in ("rouge_l", "cider_d", "spice", "jaspice") if name in names}
    return {name: np.array(rows, dtype=np.float64) for name, rows in (summed | means).items()}


def write_idf(
    references: dict[str, list[str]], path: str | Path, tokenizer: str = "unidic-lite"
) -> DocumentFrequencies:
    """Writes the document frequencies of all references to an idf file; the same references give the same bytes.

    Raises ScoreError without references and on empty ones.
    """
    _, tokens = _tokens(dict.fromkeys(references, ""), references, tokenizer)
    frequencies = document_frequencies(tokens)
    save_idf(frequencies, path, tokenizer)
    return frequencies


def save_idf(frequencies: DocumentFrequencies, path: str | Path, tokenizer: str) -> None:
    """Writes document frequencies that were counted in words of `tokenizer` as an idf file."""
    document = {
        "tokenizer": tokenizer_signature(tokenizer),
        "images": frequencies.images,
        "ngrams": frequencies.ngrams,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), json.dumps(document, ensure_ascii=False, indent=0) + "\n")


def read_idf(path: str | Path, tokenizer: str) -> DocumentFrequencies:
    """Document frequencies of an idf file.

    Raises ScoreError, naming the file, when it is not one or was made with another tokenizer.
    """
    document = parse_object(Path(path).read_bytes(), str(path))
    images, ngrams = document.get("images"), document.get("ngrams")
    if type(images) is not int or not 1 <= images < 2**53 or not isinstance(ngrams, dict):
        raise ScoreError(f'{path} is not an idf file: it needs "images", a number above 0, and "ngrams", an object')
    for ngram, count in ngrams.items():
        if type(count) is not int or not 1 <= count <= images:
            raise ScoreError(f"{path}: {ngram!r:.80} is said to be in {shown(count)} of {images:,} images")
    if document.get("tokenizer") != tokenizer_signature(tokenizer):
        raise ScoreError(
            f"{path} was made with another tokenizer: {shown(document.get('tokenizer'))} instead of "
            f"{tokenizer_signature(tokenizer)!r}. Make it again with --write_idf and --tokenizer {tokenizer}"
        )
    return DocumentFrequencies(images, ngrams)


def _digest(path: str | Path) -> str:
    """The first 8 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


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


def _check_text(predictions: dict[str, str], references: dict[str, list[str]]) -> None:
    """Half of a surrogate pair is not a character: tokenizers cannot take it and no file of UTF-8 can hold it."""
    for image_id, captions in references.items():
        for text in (predictions[image_id], *captions):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ScoreError(
                    f"image {image_id}: half of a surrogate pair, {text[error.start]!a}, in {text!a:.80}. Decode the"
                    " caption again, or replace what cannot be decoded by U+FFFD"
                ) from error


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


def write_metrics(
    predictions_path: str | Path,
    references: dict[str, list[str]],
    output: str | Path,
    tokenizer: str = "unidic-lite",
    more: dict | None = None,
    options: ScoreOptions | None = None,
) -> dict:
    """Score a predictions file and write metrics.json: what `score` returns, the keys of the run record and of `more`.

    The run record (model, dataset, decoding, hardware, versions, ...) is `<stem>.run.json` beside the predictions, as
    `scripts/infer_baseline.py` leaves it; without one the scores have no run record. Every column of per_image is one
    line of the file. Returns what was written.

    Raises ScoreError as `score` and `read_predictions` do, and on a malformed run record.
    """
    predictions_path, output = Path(predictions_path), Path(output)
    metrics = score(read_predictions(predictions_path), references, tokenizer, options)
    record = predictions_path.with_suffix(".run.json")
    if record.exists():
        made = parse_object(record.read_bytes(), str(record))
        if both := sorted(metrics.keys() & made.keys()):
            raise ScoreError(f"{record}: {', '.join(both)} are what the scorer measures and no run record says")
        metrics |= made
    metrics |= more or {}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, _metrics_text(metrics))
    return metrics


def _metrics_text(metrics: dict) -> str:
    """JSON, indented, but with every column of per_image on one line, and at the end."""

    def columns(named: dict, indent: str) -> str:
        lines = [
            f"{indent}{json.dumps(name)}: {json.dumps(values, ensure_ascii=False)}" for name, values in named.items()
        ]
        return ",\n".join(lines)

    per_image = dict(metrics["per_image"])
    statistics = per_image.pop("statistics")
    rest = {name: value for name, value in metrics.items() if name != "per_image"}
    return (
        json.dumps(rest, ensure_ascii=False, indent=2).removesuffix("\n}")
        + ',\n  "per_image": {\n'
        + columns(per_image, "    ")
        + ',\n    "statistics": {\n'
        + columns(statistics, "      ")
        + "\n    }\n  }\n}\n"
    )


def score_table(metrics: dict) -> str:
    """The scores of a metrics document as lines of text, each with its interval and signature."""
    lines = _score_lines(metrics)
    if "register_normalised" in metrics:
        lines += ["with polite endings made plain on both sides:", *_score_lines(metrics["register_normalised"])]
    counts = metrics["counts"]
    lines.append(
        f"{counts['images']:,} images, {counts['references']:,} references, "
        f"{counts['empty_predictions']:,} empty predictions"
    )
    for side, prefix in (("caption", ""), ("reference", "reference_")):
        mean, ratio = counts[f"mean_{side}_tokens"], counts[f"{prefix}type_token_ratio"]
        lines.append(f"{mean:.1f} tokens a {side}, type-token ratio {ratio:.3f}")
    return "\n".join(lines)


def _score_lines(scored: dict) -> list[str]:
    lines = []
    for name, value in scored["scores"].items():
        low_high = "[{:.4f}, {:.4f}]".format(*scored["intervals"][name]) if scored["intervals"] else ""
        lines.append(f"{SCORE_LABELS[name]:<8} {value:8.4f}  {low_high:<18} {scored['signatures'][name]}")
    return lines
