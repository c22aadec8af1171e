"""Runs to compare: metrics.json files with the files beside them, and the check that they can be in one table.

A run is a metrics document (vlmcap.evaluation.scoring) with predictions.jsonl (captions for the page) and audit.json
(images that scripts/audit_captions.py flagged) beside it. A metrics document of an adapter holds the one of its base,
which is not a run of its own unless it is given as one.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

from vlmcap.evaluation.caption_files import ScoreError, read_predictions
from vlmcap.evaluation.scoring import SCORE_LABELS
from vlmcap.markdown import visible
from vlmcap.strict_parsing import shown

NEEDED = ("scores", "signatures", "intervals", "bootstrap", "counts", "per_image")


@dataclass(frozen=True)
class ScoredRun:
    """One metrics document with the files beside it."""

    name: str
    path: Path
    metrics: dict
    captions: dict[str, str] | None  # image id -> caption; None without a predictions.jsonl
    flagged: dict[str, list[str]]  # image id -> reasons, from audit.json

    @cached_property
    def cider_d(self) -> dict[str, float]:
        """Image id -> CIDEr-D, in the order of the document."""
        columns = self.metrics["per_image"]
        return dict(zip(map(str, columns["image_id"]), columns["cider_d"], strict=True))


def read_runs(runs: Sequence[str | Path]) -> list[ScoredRun]:
    """Reads runs given as PATH or NAME=PATH; PATH is a metrics.json (of any name) or a folder that holds one.

    Without a name, a run is called after its folder (a file of another name than metrics.json: after its stem), with
    as many folders above it as tell it from the others. A name and a path may contain `=`: the path begins after the
    first `=` after which a file or folder of that name exists.

    Raises:
        ScoreError: no such file, no metrics document, one without per-image scores, two runs of the same name, or
            predictions.jsonl is not of the images that were scored. The message names the file.
    """
    if not runs:
        raise ScoreError("no runs given: name at least one metrics.json, or a folder that holds one")
    given = [_name_and_file(str(run)) for run in runs]
    names = _names(given)
    return [_read_run(name, path) for name, (_, path) in zip(names, given, strict=True)]


def by_key(runs: Sequence[ScoredRun]) -> dict[str | None, list[ScoredRun]]:
    """Runs by the key of their captions, those of the same key together; None: of runs with one prompt.

    A run of a recipe with several prompts has the scores of its main key, and in the folder `languages` beside them a
    run of each other key.

    Raises:
        ScoreError: as `read_runs`.
    """
    groups: dict[str | None, list[ScoredRun]] = {}
    for run in runs:
        others = sorted(run.path.parent.glob("languages/*/metrics.json")) if run.metrics.get("key") else []
        for one in [run, *(_read_run(run.name, path) for path in others)]:
            groups.setdefault(one.metrics.get("key"), []).append(one)
    order = [key for run in runs for key in run.metrics.get("languages", ())]
    order += [key for key in groups if key not in order]
    return dict(sorted(groups.items(), key=lambda group: order.index(group[0])))


def check_comparable(runs: Sequence[ScoredRun]) -> None:
    """Raises ScoreError, naming the runs, unless all were scored on the same images, in the same way."""
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = run.metrics.get("dataset"), first.metrics.get("dataset")
        if ours and theirs:
            for key in ("id", "revision", "split"):
                if ours[key] != theirs[key]:
                    _refuse(first, run, f"dataset {key}", theirs[key], ours[key])
        apart = run.cider_d.keys() ^ first.cider_d.keys()
        if apart:
            raise ScoreError(
                f"{first.name} and {run.name} were scored on different images ({len(first.cider_d):,} and "
                f"{len(run.cider_d):,}; only one of them has {visible(', '.join(sorted(apart)[:5]))}): score both on"
                " one split"
            )
        if run.metrics["counts"]["references"] != first.metrics["counts"]["references"]:
            counts = (r.metrics["counts"]["references"] for r in (first, run))
            _refuse(first, run, "number of references", *counts)
    # Against every run before it, because a score may be missing from the first.
    for first, run in combinations(runs, 2):
        for key in first.metrics["signatures"].keys() & run.metrics["signatures"].keys():
            if first.metrics["signatures"][key] != run.metrics["signatures"][key]:
                _refuse(first, run, f"{key}'s signature", *(r.metrics["signatures"][key] for r in (first, run)))


def shared_signatures(runs: Sequence[ScoredRun]) -> dict[str, str]:
    return {
        key: next(run.metrics["signatures"][key] for run in runs if key in run.metrics["signatures"])
        for key in SCORE_LABELS
        if any(key in run.metrics["scores"] for run in runs)
    }


def choose_scores(scores: Sequence[str] | None, runs: Sequence[ScoredRun]) -> list[str]:
    unknown = [key for key in scores or () if key not in SCORE_LABELS]
    if unknown:
        raise ScoreError(f"there is no score {unknown[0]!r}: choose of {', '.join(SCORE_LABELS)}")
    there = list(shared_signatures(runs))
    chosen = [key for key in scores or there if key in there]
    if not chosen:
        raise ScoreError(f"no run has {' or '.join(scores or ['a score'])}; there are {', '.join(there)}")
    return chosen


def _name_and_file(run: str) -> tuple[str | None, Path]:
    splits = [(None, run)] + [(run[: m.start()], run[m.end() :]) for m in re.finditer("=", run) if m.start()]
    for name, place in splits:
        path = Path(place) / "metrics.json" if Path(place).is_dir() else Path(place)
        if place and path.is_file():
            return name, path
    raise ScoreError(
        f"{run}: no such metrics file, and no folder with a metrics.json in it. Give PATH or NAME=PATH; "
        "scripts/eval_captioning.py writes the file"
    )


def _names(given: list[tuple[str | None, Path]]) -> list[str]:
    def parts(path: Path) -> list[str]:
        path = path.resolve()
        return [*path.parent.parts[1:], *([] if path.name == "metrics.json" else [path.stem])]

    names = [name if name is not None else parts(path)[-1] for name, path in given]
    depth = 1
    while len(set(names)) < len(names):
        twice, depth = {name for name, count in Counter(names).items() if count > 1}, depth + 1
        longer = [
            "/".join(parts(path)[-depth:]) if name in twice and own is None else name
            for name, (own, path) in zip(names, given, strict=True)
        ]
        if longer == names:
            raise ScoreError(f"several runs are called {', '.join(sorted(twice))}: name them apart with NAME=PATH")
        names = longer
    for name in names:
        if not name.strip() or not name.isprintable():
            raise ScoreError(f"{name!r} cannot be the name of a run: it must be printable text in one line")
    return names


def _read_run(name: str, path: Path) -> ScoredRun:
    metrics = _read_object(path)
    missing = [key for key in NEEDED if key not in metrics]
    if missing:
        raise ScoreError(
            f"{path} lacks {', '.join(missing)}: score the predictions again with scripts/eval_captioning.py, which "
            "writes intervals (unless --resamples is 0) and per-image scores"
        )
    ids = {str(image) for image in metrics["per_image"]["image_id"]}
    captions, audit = None, path.with_name("audit.json")
    predictions = path.with_name("predictions.jsonl")
    if predictions.is_file():
        captions = read_predictions(predictions)
        if captions.keys() != ids:
            raise ScoreError(
                f"{predictions} has {len(captions):,} images and {path} was scored on {len(ids):,}, or on others: "
                "score these predictions again with scripts/eval_captioning.py"
            )
    flagged = _read_object(audit).get("flagged", {}) if audit.is_file() else {}
    if not isinstance(flagged, dict):
        raise ScoreError(f"{audit}: flagged must be an object (image -> reasons), but is {shown(flagged)}")
    return ScoredRun(name, path, metrics, captions, {str(image): reasons for image, reasons in flagged.items()})


def _read_object(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(document, dict):
        raise ScoreError(f"{path}: a JSON object is needed, but this is {shown(document)}")
    return document


def _refuse(first: ScoredRun, run: ScoredRun, what: str, theirs, ours) -> None:
    raise ScoreError(
        f"{first.name} and {run.name} differ in {what} ({visible(f'{theirs} and {ours}')}) and cannot be in one "
        "table: score both with the same data and settings"
    )
