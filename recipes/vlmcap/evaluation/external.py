"""Scores that other programs compute: chrF (sacreBLEU), METEOR (Java), SPICE and JaSPICE (a service, or Java).

What cannot be computed raises ScorerUnavailable with the reason; no score is 0 because a program is missing. The
reasons go into metrics.json, which may be published: they name no folder of the machine, no user and no key of a URL.

A service is any HTTP server that answers as JaSPICE's own does (`server.py` of the package jaspice; its container
listens on port 2115). SPICE has none; one for English may speak the same protocol:

    POST  {"references": [["...", "..."], ...], "candidates": ["...", ...]}
    200   [0.25, ...]      one number from 0 to 1 a candidate
"""

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import requests
from sacrebleu.metrics import CHRF
from tqdm.auto import tqdm

METEOR_JAR_VARIABLE = "VLMCAP_METEOR_JAR"
# alpha, beta, gamma, delta and the weights of exact, stem, synonym and paraphrase matches of METEOR 1.5's English
# ranking task, its default (Denkowski and Lavie 2014; Parameters.java).
METEOR_PARAMETERS = (0.85, 0.2, 0.6, 0.75)
METEOR_STAGES = (1.0, 0.6, 0.8, 0.6)
METEOR_NUMBERS = 23
REQUEST_IMAGES = 256  # JaSPICE's server scores 16 at once; no answer comes before the last
SPICE_JAR = "spice-1.0.jar"
# What FST 2.47, with which SPICE stores its parses, looks into: from version 16 on Java must be told to allow it.
# Java 8 does not know the option, and ignores it when told to.
SPICE_OPENS = [
    "-XX:+IgnoreUnrecognizedVMOptions",
    *(
        f"--add-opens=java.base/{package}=ALL-UNNAMED"
        for package in ("java.lang", "java.math", "java.util", "java.util.concurrent", "java.net", "java.text")
    ),
]
CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class ScorerUnavailable(RuntimeError):
    """A score cannot be computed here: a program is missing, failed, or took too long. The message says what to do."""


def chrf_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(images, 18) float64: for character 1- to 6-grams of the text in NFKC, those of the hypothesis, those of the
    reference with the highest chrF, and those in common (sacreBLEU's CHRF, any number of references an image)."""
    scorer = CHRF()
    cache = {text: unicodedata.normalize("NFKC", text) for texts in (hypotheses, *references) for text in texts}
    most = max(map(len, references))
    # sacreBLEU takes a list of documents, one for each reference, with None where an image has fewer.
    documents = [[cache[refs[i]] if i < len(refs) else None for refs in references] for i in range(most)]
    rows = scorer._extract_corpus_statistics([cache[text] for text in hypotheses], documents)
    return np.array(rows, dtype=np.float64)


def chrf(statistics: np.ndarray) -> np.ndarray:
    """chrF2, from 0 to 1, of statistics (..., 18): sums over the images of a corpus, or single images.

    Popovic 2015 with sacreBLEU's effective order: n-grams longer than the text do not count.
    """
    hypothesis, reference, match = np.moveaxis(statistics.reshape(*statistics.shape[:-1], -1, 3), -1, 0)
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(1, counted.sum(-1))
    precision = np.divide(match, hypothesis, out=np.zeros_like(match), where=counted).sum(-1) / orders
    recall = np.divide(match, reference, out=np.zeros_like(match), where=counted).sum(-1) / orders
    factor = CHRF.BETA**2
    denominator = factor * precision + recall
    return np.divide(
        (1 + factor) * precision * recall, denominator, out=np.zeros_like(denominator), where=denominator > 0
    )


def meteor_jar() -> Path:
    """meteor-1.5.jar: $VLMCAP_METEOR_JAR, else the one that an installed pycocoevalcap brings.

    Raises ScorerUnavailable when there is none.
    """
    named = os.environ.get(METEOR_JAR_VARIABLE)
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = spec.submodule_search_locations if spec else []
    candidates = [Path(named)] if named else [Path(folder) / "meteor" / "meteor-1.5.jar" for folder in folders]
    for jar in candidates:
        if jar.is_file():
            return jar.resolve()
    if named:
        raise ScorerUnavailable(f"${METEOR_JAR_VARIABLE} names {jar.name}, which is not a file")
    raise ScorerUnavailable(
        f"no meteor-1.5.jar: `pip install pycocoevalcap` brings it, ${METEOR_JAR_VARIABLE} names another"
    )


def check_meteor() -> None:
    """Raises ScorerUnavailable when METEOR's jar or Java is missing."""
    meteor_jar()
    _find_java()


def meteor_statistics(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], timeout: float
) -> np.ndarray:
    """(images, 23) float64: what METEOR 1.5 counts in each image (lengths, matches by stage, chunks).

    Runs `java -jar meteor-1.5.jar -l en -norm` once, as pycocoevalcap does, with tokens joined by spaces and the
    separator `|||` taken out of them.

    Args:
        timeout: seconds after which METEOR is stopped; it needs about 8 to start and 15 for 25,000 references.

    Raises:
        ScorerUnavailable: no Java, no jar, an error of METEOR, or the time limit.
    """
    jar = meteor_jar()
    lines = [
        " ||| ".join(["SCORE", *(_neutral(tokens) for tokens in refs), _neutral(hypothesis)])
        for hypothesis, refs in zip(hypotheses, references, strict=True)
    ]
    output = _java(
        ["-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"],
        "\n".join(lines) + "\n",
        jar.parent,
        timeout,
    )
    rows = [line.split() for line in output.splitlines()]
    if len(rows) != len(lines) or any(len(row) != METEOR_NUMBERS for row in rows):
        raise ScorerUnavailable(
            f"{jar.name} answered {len(rows):,} lines to {len(lines):,} captions, the last of them {output[-200:]!r}: "
            "it is not METEOR 1.5, or it stopped"
        )
    return np.array(rows, dtype=np.float64)


def _neutral(tokens: Sequence[str]) -> str:
    return " ".join(" ".join(tokens).replace("|||", "").split())


def meteor(statistics: np.ndarray) -> np.ndarray:
    """METEOR 1.5, from 0 to 1, of statistics (..., 23): sums over the images of a corpus, or single images.

    What the jar's EVAL answers to the same numbers (Denkowski and Lavie 2014; MeteorScorer.java).
    """
    alpha, beta, gamma, delta = METEOR_PARAMETERS
    lengths, functions = statistics[..., 0:2], statistics[..., 2:4]
    # Content and function words that match, of hypothesis and reference, by stage.
    stages = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)
    content, function = stages[..., 0:2], stages[..., 2:4]
    weights = np.array(METEOR_STAGES)[:, None]
    matched = ((delta * content + (1 - delta) * function) * weights).sum(-2)
    length = delta * (lengths - functions) + (1 - delta) * functions
    precision, recall = np.moveaxis(np.divide(matched, length, out=np.zeros_like(length), where=length > 0), -1, 0)
    denominator = (1 - alpha) * recall + alpha * precision
    mean = np.divide(precision * recall, denominator, out=np.zeros_like(denominator), where=denominator > 0)

    words = (content + function).sum(-2)
    chunks, matches = statistics[..., 20], words.mean(-1)
    fragmentation = np.divide(chunks, matches, out=np.zeros_like(matches), where=matches > 0)
    whole = (words == lengths).all(-1) & (chunks == 1)
    return mean * (1 - gamma * np.where(whole, 0, fragmentation) ** beta)


def service_scores(url: str, items: list[dict], timeout: float, spaces: bool = True) -> np.ndarray:
    """Scores (images,) that a SPICE or JaSPICE service answers, some images a request.

    Args:
        items: {"candidate", "references"} of each image.
        timeout: seconds without an answer after which the score is left out.
        spaces: whether spaces stay in the texts. JaSPICE's own client takes them out.

    Raises:
        ScorerUnavailable: the service cannot be reached, or answers anything but one number from 0 to 1 an image.
    """

    def sent(text: str) -> str:
        return text if spaces else text.replace(" ", "")

    scores = []
    with tqdm(total=len(items), desc=_without_secrets(url), unit=" images") as bar:
        for begin in range(0, len(items), REQUEST_IMAGES):
            part = items[begin : begin + REQUEST_IMAGES]
            body = {
                "references": [[sent(text) for text in item["references"]] for item in part],
                "candidates": [sent(item["candidate"]) for item in part],
            }
            scores += _ask(url, body, timeout)
            bar.update(len(part))
    return np.array(scores, dtype=np.float64)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _ask(url: str, body: dict, timeout: float) -> list[float]:
    shown, count = _without_secrets(url), len(body["candidates"])
    try:
        answer = requests.post(url, json=body, timeout=timeout)
        answer.raise_for_status()
        scores = answer.json()
    except (requests.RequestException, ValueError, RecursionError) as error:
        parts, reason = urlsplit(url), str(error)
        user, at, _ = parts.netloc.rpartition("@")
        for secret in filter(None, (user + at, parts.query and f"?{parts.query}")):
            reason = reason.replace(secret, "")
        raise ScorerUnavailable(f"{shown}: {reason}") from error
    if not isinstance(scores, list) or len(scores) != count:
        raise ScorerUnavailable(
            f"{shown} must answer a list of {count:,} numbers, as JaSPICE's server does, but answered"
            f" {answer.text[:200]!r}"
        )
    wrong = [score for score in scores if type(score) not in (int, float) or not 0 <= score <= 1]
    if wrong:
        raise ScorerUnavailable(f"{shown} answered the score {wrong[0]!r}, which is not a number from 0 to 1")
    return scores


def check_local_spice(folder: str | Path) -> None:
    """Raises ScorerUnavailable when `folder` lacks a jar of `local_spice_scores`, or there is no Java."""
    folder = Path(folder).resolve()
    missing = [name for name in (SPICE_JAR, *(f"lib/{jar}" for jar in CORENLP_JARS)) if not (folder / name).is_file()]
    if missing:
        raise ScorerUnavailable(
            f"the folder {folder.name} lacks {', '.join(missing)}: SPICE comes from https://panderson.me/spice, "
            "CoreNLP 3.6.0 from https://stanfordnlp.github.io/CoreNLP/history.html"
        )
    _find_java()


def local_spice_scores(folder: str | Path, items: list[dict], timeout: float) -> np.ndarray:
    """SPICE of each image, (images,) in 0..1, by spice-1.0.jar with its CoreNLP jars in `folder/lib`.

    Raises:
        ScorerUnavailable: no Java, a jar is missing, an error of SPICE, or the time limit.
    """
    check_local_spice(folder)
    folder = Path(folder).resolve()
    asked = [{"image_id": i, "test": item["candidate"], "refs": item["references"]} for i, item in enumerate(items)]
    with tempfile.TemporaryDirectory() as temporary:
        questions, answers = Path(temporary) / "in.json", Path(temporary) / "out.json"
        questions.write_text(json.dumps(asked), encoding="utf-8")
        arguments = ["-Xmx8G", *SPICE_OPENS, "-jar", SPICE_JAR, str(questions), "-out", str(answers), "-silent"]
        _java(arguments, "", folder, timeout)
        if not answers.is_file():
            raise ScorerUnavailable(f"{SPICE_JAR} wrote no scores")
        found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answers.read_bytes())}
    scores = np.array([found.get(i, np.nan) for i in range(len(items))], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ScorerUnavailable(f"{SPICE_JAR} left {np.isnan(scores).sum():,} images without a score")
    return scores


def _find_java() -> str:
    java = shutil.which("java")
    if java is None:
        raise ScorerUnavailable("there is no Java (`java` on the PATH; any version from 8 on)")
    return java


def _java(arguments: list[str], text: str, folder: Path, timeout: float) -> str:
    """Standard output of `java` with `text` on its standard input. Raises ScorerUnavailable."""
    java = _find_java()
    # Before version 18 Java reads and writes in the encoding of the machine's locale.
    command = [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]
    try:
        done = subprocess.run(command, input=text, cwd=folder, timeout=timeout, capture_output=True, encoding="utf-8")
    except subprocess.TimeoutExpired as error:
        raise ScorerUnavailable(f"it was not done after the time limit of {timeout:g} seconds") from error
    if done.returncode != 0:
        raise ScorerUnavailable(f"java ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
