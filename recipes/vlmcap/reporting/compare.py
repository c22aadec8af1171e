"""Several runs side by side: tables in CSV, Markdown and LaTeX, plots, and a page with every caption.

Everything is read from metrics.json files (vlmcap.evaluation.scoring) and from the files beside them:
predictions.jsonl (captions for the page) and audit.json (images that scripts/audit_captions.py flagged). A metrics
document of an adapter holds the one of its base, which is not a run of its own unless it is given as one.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import datasets
from PIL import Image

from vlmcap.atomic_write import write_atomically
from vlmcap.data.corpora import SEEN_CORPORA
from vlmcap.data.errors import DataError
from vlmcap.data.images import (
    BadImageError,
    dataset_record,
    dataset_references,
    load_captions,
    open_image,
    references_of,
)
from vlmcap.evaluation.caption_files import ScoreError, read_predictions, read_references
from vlmcap.evaluation.scoring import SCORE_LABELS, paired_comparison
from vlmcap.markdown import code_span, markdown_escape, markdown_table, text_table, visible
from vlmcap.reporting.gallery import disagreement, select_images, write_comparison_page
from vlmcap.reporting.plots import has_curve, has_size, plot_quality_against_memory, plot_scores, plot_training_curves
from vlmcap.strict_parsing import shown

SIGNIFICANT = 0.05
NEEDED = ("scores", "signatures", "intervals", "bootstrap", "counts", "per_image")
PLAIN = "register_normalised"
OVERVIEW = ("bleu_1", "bleu_2", "bleu_4", "meteor", "rouge_l", "cider_d")


@dataclass(frozen=True)
class Run:
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


@dataclass(frozen=True)
class Cell:
    """A table's cell; `interval` and `mark` are of scores alone."""

    text: str
    interval: str = ""
    mark: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Columns of text and rows of cells; the first column names the system."""

    columns: list[str]
    rows: list[list[Cell]]


def read_runs(runs: Sequence[str | Path]) -> list[Run]:
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


def write_comparison(
    runs: list[Run],
    output_dir: str | Path,
    reference: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    image_dir: str | None = None,
    references: str | Path | None = None,
    max_gallery_images: int = 500,
    seed: int = 0,
    resamples: int = 1000,
    scores: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Writes tables, plots and the page of all runs into `output_dir`.

    Args:
        runs: as `read_runs` returns them; all scored on the same images with the same signatures.
        reference: name of the run that the others are tested against; the first if None.
        dataset, split, image_dir: where the page's references and pictures come from, as for `load_captions`. None:
            the dataset that the runs were scored on, when it is a folder that is still there; else the page shows
            captions without references and pictures.
        references: JSONL of references instead of those of the dataset.
        max_gallery_images: with more, the page shows half of this many with the greatest disagreement and as many
            drawn at random with `seed`.
        resamples: of the paired bootstrap.
        scores: columns of the score table and panels of its plot, in this order; without any, all that there are.
            Those that no run has are left out. metrics.csv holds all of them.

    Returns:
        {"csv", "md", "tex", "scores", "html": path}, "memory" if a run record says how large a model is, and
        "curves" if a run has a training log.

    Raises:
        ScoreError: runs that cannot be in one table, no run named `reference`, references that lack images, no such
            score, or one that no run has and no other beside it.
        DataError: `dataset` cannot be read or is not the build that was scored.
    """
    reference = reference or runs[0].name
    if reference not in [run.name for run in runs]:
        raise ScoreError(f"no run is called {reference!r}: the runs are {', '.join(run.name for run in runs)}")
    check_comparable(runs)
    chosen = _choose(scores, runs)
    captions, picture, remarks = _references_and_pictures(runs, dataset, split, image_dir, references)

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tests = compare_with(reference, runs, resamples)
    table, systems = score_table(runs, tests, chosen), system_table(runs)
    notes = legend(runs, reference, resamples, chosen)
    signatures = {SCORE_LABELS[key]: signature for key, signature in _shared_signatures(runs).items() if key in chosen}

    paths = {"csv": output_dir / "metrics.csv", "md": output_dir / "metrics.md", "tex": output_dir / "metrics.tex"}
    _write_csv(paths["csv"], runs, tests)
    write_atomically(paths["md"], _markdown(table, systems, notes, signatures))
    write_atomically(paths["tex"], _latex(table, systems, notes, signatures))

    documents = {run.name: run.metrics for run in runs}
    paths["scores"] = plot_scores(documents, output_dir / "scores.svg", chosen)
    if any(map(has_size, documents.values())):
        paths["memory"] = plot_quality_against_memory(documents, output_dir / "quality_against_memory.svg")
    if any(map(has_curve, documents.values())):
        paths["curves"] = plot_training_curves(documents, output_dir / "training_curves.svg")

    apart = {
        image: disagreement([run.captions[image] for run in runs if run.captions is not None])
        for image in runs[0].cider_d
    }
    shown, selection = select_images(apart, max_gallery_images, seed)
    paths["html"] = write_comparison_page(
        output_dir / "comparison.html",
        title=f"{len(runs)} {'systems' if len(runs) > 1 else 'system'} on {len(apart):,} images",
        tables=[table, systems],
        notes=notes,
        signatures=signatures,
        plots=[paths[key] for key in ("scores", "memory", "curves") if key in paths],
        systems=[run.name for run in runs],
        cards=_cards(runs, shown, captions, picture),
        disagreements=apart,
        audited=any(run.flagged for run in runs),
        remarks=[selection, *remarks],
    )
    return paths


def write_overview(runs: Sequence[Run], output_dir: str | Path) -> tuple[Path, str]:
    """Writes `output_dir/overview.md`, one table of runs on different datasets, and returns its path and the same for
    a terminal.

    A row is a run, with its score where it has one; rows of one dataset are together, in the order of their first.

    Raises:
        ScoreError: runs of one dataset that were not scored on the same images in the same way.
    """
    groups = {}
    for run in runs:
        dataset = run.metrics.get("dataset")
        # The place of the first run without a record keeps it apart from all others.
        key = tuple(dataset[part] for part in ("id", "revision", "split")) if dataset else (run.name,)
        groups.setdefault(key, []).append(run)
    columns = ["", *(SCORE_LABELS[key] for key in OVERVIEW), "trained parameters", "seconds of training"]
    markdown, text = [["", "dataset", "images", *columns[1:]]], []
    for key, group in groups.items():
        check_comparable(group)
        name = visible(f"{key[0]}, {key[2]}") if len(key) > 1 else "not recorded"
        images = f"{group[0].metrics['counts']['images']:,}"
        rows = [[run.name, *_overview_cells(run.metrics)] for run in group]
        markdown += [[markdown_escape(row[0]), markdown_escape(name), images, *row[1:]] for row in rows]
        text.append((f"{name}: {images} images", rows))
    note = "Only rows of one dataset compare: scores depend on its captions and on their number an image."
    path = Path(output_dir) / "overview.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{markdown_table(markdown)}\n{note}\n")

    lines = text_table([columns, *(row for _, rows in text for row in rows)]).splitlines()
    shown = [lines.pop(0)]
    for title, rows in text:
        shown += ["", title, *(lines.pop(0) for _ in rows)]
    return path, "\n".join([*shown, "", note])


def _overview_cells(metrics: dict) -> list[str]:
    training = metrics.get("training") or {}
    parameters, seconds = training.get("trainable_parameters"), training.get("seconds")
    scores = [metrics["scores"].get(key) for key in OVERVIEW]
    return [
        *("-" if score is None else f"{score:.4f}" for score in scores),
        "-" if parameters is None else f"{parameters:,}",
        "-" if seconds is None else f"{seconds:,.0f}",
    ]


def check_comparable(runs: Sequence[Run]) -> None:
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


def compare_with(reference: str, runs: Sequence[Run], resamples: int = 1000) -> dict[str, dict[str, dict]]:
    """Run -> score -> {"difference", "interval", "p_value", "p_holm"}, each run against the one named `reference`.

    p values are of `paired_comparison`; "p_holm" is Holm's correction over the runs compared, for each score.
    """
    base = next(run for run in runs if run.name == reference)
    tests = {
        run.name: paired_comparison(run.metrics, base.metrics, resamples=resamples)
        for run in runs
        if run.name != reference
    }
    for key in SCORE_LABELS:
        tested = [test[key] for test in tests.values() if key in test]
        for test, adjusted in zip(tested, holm([test["p_value"] for test in tested]), strict=True):
            test["p_holm"] = adjusted
    return tests


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: for p_(1) <= ... <= p_(m), max over j <= i of min(1, (m - j + 1) p_(j)).

    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def score_table(runs: Sequence[Run], tests: dict[str, dict[str, dict]], scores: Sequence[str]) -> Table:
    """Scores with intervals; `*` marks those that differ from the reference run's, the best of a column is `best`."""
    columns = _score_columns(runs, scores)
    rows = [[Cell(run.name)] for run in runs]
    for part, key, _ in columns:
        documents = [run.metrics if part is None else run.metrics.get(part) or {} for run in runs]
        values = [document.get("scores", {}).get(key) for document in documents]
        best = max(value for value in values if value is not None)
        digits = 1 if best >= 10 else 3
        for row, run, document, value in zip(rows, runs, documents, values, strict=True):
            if value is None:
                row.append(Cell("-"))
                continue
            test = tests.get(run.name, {}).get(key) if part is None else None
            low, high = document["intervals"][key]
            row.append(
                Cell(
                    text=f"{value:.{digits}f}",
                    interval=f"{low:.{digits}f}–{high:.{digits}f}",
                    mark="*" if test and test["p_holm"] < SIGNIFICANT else "",
                    best=value == best and len(runs) > 1,
                )
            )
    return Table(["System", *(label for *_, label in columns)], rows)


def system_table(runs: Sequence[Run]) -> Table:
    """What each system is, what it saw in training, and what it costs."""
    columns = ["System", "Model", "Trained weights", *(f"Saw {corpus}" for corpus in SEEN_CORPORA)]
    columns += ["Parameters", "Peak memory", "Captions/s"]
    rows = []
    for run in runs:
        model, saw = run.metrics.get("model") or {}, run.metrics.get("saw") or {}
        parts = (model.get("parts") or {"whole": model}).values()
        texts = [run.name, " + ".join(_at(part.get("id"), part.get("revision")) for part in parts)]
        texts += [_at(model.get("adapter"), model.get("adapter_revision"))]
        texts += [saw.get(corpus) or "-" for corpus in SEEN_CORPORA]
        peak, rate = run.metrics.get("peak_memory_bytes"), run.metrics.get("images_per_second")
        texts += [
            _count(model.get("parameters")),
            "-" if peak is None else f"{peak / 2**30:.2f} GiB",
            "-" if rate is None else f"{rate:.2f}",
        ]
        rows.append([Cell(text) for text in texts])
    return Table(columns, rows)


def legend(runs: Sequence[Run], reference: str, resamples: int, scores: Sequence[str]) -> list[str]:
    """What a reader must know to read the tables, as sentences of plain text."""
    first = runs[0].metrics
    dataset = first.get("dataset")
    counts = first["counts"]
    data = f"{dataset['id']}, revision {dataset['revision']}, split {dataset['split']}" if dataset else "not recorded"
    notes = [f"Dataset: {data}; {counts['images']:,} images, {counts['references']:,} references."]
    drawn = {(b["level"], b["resamples"], b["seed"]) for b in (run.metrics["bootstrap"] for run in runs)}
    notes += [
        f"Below each score: {level:.0%} intervals, percentiles of {number:,} bootstrap resamples over images "
        f"(seed {seed})."
        for level, number, seed in sorted(drawn)
    ]
    others = len(runs) - 1
    if others:
        holm_note = f", Holm-corrected over {others} systems for each score" if others > 1 else ""
        notes.append("Bold: the best of a column.")
        notes.append(
            f"*: differs from {reference}, p < {SIGNIFICANT} by paired bootstrap over images ({resamples:,} "
            f"resamples){holm_note}."
        )
        # The smallest p of a bootstrap is 1 / (1 + resamples).
        if others / (1 + resamples) >= SIGNIFICANT:
            notes.append("So few resamples can mark no difference among so many systems: raise --resamples.")
    if "cider_d" in scores and any(run.metrics.get(PLAIN) for run in runs):
        notes.append("CIDEr-D, plain endings: polite endings made plain in captions and references; not tested.")
    notes.append(
        "Saw: whether the corpus was in the model's training data, as far as is known; COCO: its photographs or "
        "captions in any language."
    )
    if any(run.metrics.get("peak_memory_bytes") is None for run in runs):
        notes.append("Peak memory is measured on GPUs alone.")
    noticed = {}
    for run in runs:
        for notice in run.metrics.get("notices", []):
            noticed.setdefault(notice, []).append(run.name)
    for notice, names in noticed.items():
        who = "All systems" if len(names) == len(runs) else ", ".join(names)
        notes.append(f"{who}: {notice.rstrip('.')}.")
    return notes


LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "–": "--",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def latex_escape(text: str) -> str:
    """Plain text as LaTeX, in one line: the ten special characters, and those that old encodings print as others."""
    return "".join(LATEX_SPECIALS.get(character, character) for character in visible(text))


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


def _read_run(name: str, path: Path) -> Run:
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
    return Run(name, path, metrics, captions, {str(image): reasons for image, reasons in flagged.items()})


def _read_object(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(document, dict):
        raise ScoreError(f"{path}: a JSON object is needed, but this is {shown(document)}")
    return document


def _refuse(first: Run, run: Run, what: str, theirs, ours) -> None:
    raise ScoreError(
        f"{first.name} and {run.name} differ in {what} ({visible(f'{theirs} and {ours}')}) and cannot be in one "
        "table: score both with the same data and settings"
    )


def _shared_signatures(runs: Sequence[Run]) -> dict[str, str]:
    return {
        key: next(run.metrics["signatures"][key] for run in runs if key in run.metrics["signatures"])
        for key in SCORE_LABELS
        if any(key in run.metrics["scores"] for run in runs)
    }


def _choose(scores: Sequence[str] | None, runs: Sequence[Run]) -> list[str]:
    unknown = [key for key in scores or () if key not in SCORE_LABELS]
    if unknown:
        raise ScoreError(f"there is no score {unknown[0]!r}: choose of {', '.join(SCORE_LABELS)}")
    there = list(_shared_signatures(runs))
    chosen = [key for key in scores or there if key in there]
    if not chosen:
        raise ScoreError(f"no run has {' or '.join(scores or ['a score'])}; there are {', '.join(there)}")
    return chosen


def _score_columns(runs: Sequence[Run], scores: Sequence[str]) -> list[tuple[str | None, str, str]]:
    """(part of the document, score, label) of the table's columns."""
    columns = []
    for key in scores:
        columns.append((None, key, SCORE_LABELS[key]))
        if key == "cider_d" and any(run.metrics.get(PLAIN) for run in runs):
            columns.append((PLAIN, key, f"{SCORE_LABELS[key]}, plain endings"))
    return columns


def _at(name: str | None, revision: str | None) -> str:
    if not name:
        return "-"
    return f"{name}@{revision.removeprefix('sha256:')[:8]}" if revision else name


def _count(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _write_csv(path: Path, runs: Sequence[Run], tests: dict[str, dict[str, dict]]) -> None:
    """One row a run, numbers in full; a cell is empty where a document has no such value."""
    keys = list(_shared_signatures(runs))
    rows = []
    for run in runs:
        metrics, model, dataset = run.metrics, run.metrics.get("model") or {}, run.metrics.get("dataset") or {}
        row = {"run": run.name, "model": model.get("id"), "model_revision": model.get("revision")}
        row |= {key: model.get(key) for key in ("adapter", "adapter_revision", "dtype", "quantization", "parameters")}
        row |= {key: metrics.get(key) for key in ("peak_memory_bytes", "images_per_second", "seconds")}
        row |= {"device": (metrics.get("hardware") or {}).get("device")}
        row |= {f"saw_{corpus}": (metrics.get("saw") or {}).get(corpus) for corpus in (*SEEN_CORPORA, "note")}
        row |= {"dataset": dataset.get("id"), "dataset_revision": dataset.get("revision")}
        row |= {"split": dataset.get("split")} | metrics["counts"]
        for part, prefix in ((metrics, ""), (metrics.get(PLAIN) or {}, f"{PLAIN}_")):
            for key in keys:
                low, high = part.get("intervals", {}).get(key, (None, None))
                row |= {f"{prefix}{key}": part.get("scores", {}).get(key)}
                row |= {f"{prefix}{key}_low": low, f"{prefix}{key}_high": high}
                row |= {f"{prefix}{key}_signature": part.get("signatures", {}).get(key)}
        for key in keys:
            test = tests.get(run.name, {}).get(key, {})
            row |= {f"{key}_{what}": test.get(what) for what in ("difference", "p_value", "p_holm")}
        row |= {"prompt": metrics.get("prompt")}
        row |= {"decoding": json.dumps(metrics["decoding"], ensure_ascii=False) if "decoding" in metrics else None}
        row |= {key: metrics.get(key) for key in ("commit", "created")}
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _markdown(scores: Table, systems: Table, notes: list[str], signatures: dict[str, str]) -> str:
    def cell(c: Cell) -> str:
        text = markdown_escape(c.text)
        interval = f"<br>{markdown_escape(c.interval)}" if c.interval else ""
        return (f"**{text}**" if c.best else text) + markdown_escape(c.mark) + interval

    def table(t: Table, left: int) -> list[str]:
        rule = ["---"] * left + ["---:"] * (len(t.columns) - left)
        rows = [[markdown_escape(column) for column in t.columns], rule, *([cell(c) for c in row] for row in t.rows)]
        return ["| " + " | ".join(row) + " |" for row in rows]

    lines = [*table(scores, 1), "", *table(systems, 3 + len(SEEN_CORPORA)), ""]
    lines += [f"- {markdown_escape(note)}" for note in notes]
    lines += ["- Signatures:", *(f"  - {label}: {code_span(signature)}" for label, signature in signatures.items())]
    return "\n".join(lines) + "\n"


def _latex(scores: Table, systems: Table, notes: list[str], signatures: dict[str, str]) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    def table(t: Table, left: int) -> list[str]:
        # Braces around the first cell: a row that begins with [ or * would be read as an argument of \\.
        lines = [rf"\begin{{tabular}}{{@{{}}{'l' * left}{'r' * (len(t.columns) - left)}@{{}}}}", r"\toprule"]
        lines += [line([latex_escape(column) for column in t.columns]), r"\midrule"]
        for name, *cells in t.rows:
            bodies = [rf"\textbf{{{latex_escape(c.text)}}}" if c.best else latex_escape(c.text) for c in cells]
            marks = [f"$^{{{c.mark}}}$" if c.mark else "" for c in cells]
            lines.append(line([f"{{{latex_escape(name.text)}}}", *map(str.__add__, bodies, marks)]))
            if any(c.interval for c in cells):
                intervals = [latex_escape(c.interval) for c in cells]
                lines.append(line(["{}", *(rf"{{\scriptsize {text}}}" if text else "" for text in intervals)]))
        return [*lines, r"\bottomrule", r"\end{tabular}"]

    signed = "; ".join(rf"\texttt{{{latex_escape(signature)}}}" for signature in signatures.values())
    signed = signed.replace(r"\textbar{}", r"\textbar{}\allowbreak{}")
    return "\n".join(
        [
            r"% \usepackage{booktabs} and, for names in Japanese, LuaLaTeX",
            r"\begin{table*}",
            r"\caption{Scores with intervals, and what was scored.}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            *table(scores, 1),
            "",
            r"\medskip",
            *table(systems, 3 + len(SEEN_CORPORA)),
            r"\medskip",
            rf"{{\footnotesize\raggedright {' '.join(map(latex_escape, notes))} Signatures: {signed}.\par}}",
            r"\end{table*}",
            "",
        ]
    )


def _references_and_pictures(
    runs: Sequence[Run], dataset: str | None, split: str | None, image_dir: str | None, references: str | Path | None
) -> tuple[dict[str, list[str]], Callable[[str], Image.Image | None], list[str]]:
    """References by image id, a function from image id to picture, and remarks for the page on what it lacks."""
    scored = runs[0].metrics.get("dataset") or {}
    if dataset is None and scored and Path(scored["id"]).is_dir():
        dataset = scored["id"]
    if dataset is None and image_dir is not None:
        raise DataError("--image_dir needs --dataset: its rows say which file shows which image")
    captions, rows = {}, None
    if dataset is not None:
        captions, rows = _read_dataset(dataset, split or scored.get("split", "test"), image_dir, scored)
    if references is not None:
        captions = read_references(references)
    lacking = [image for image in runs[0].cider_d if image not in captions] if captions else []
    if lacking:
        raise ScoreError(
            f"{references or dataset} lacks {len(lacking):,} of the images that were scored ("
            f"{visible(', '.join(lacking[:5]))}{', ...' if len(lacking) > 5 else ''}): name the references or the"
            " split that they were scored with"
        )

    remarks = [] if captions else ["References are not shown: neither --dataset nor --references was given."]
    if rows is None:
        remarks.append("Pictures are not shown: no --dataset with pictures, and no --image_dir was given.")
    remarks += [
        f"Captions of {run.name} are not shown: there is no predictions.jsonl beside its metrics file."
        for run in runs
        if run.captions is None
    ]
    places = {str(image): place for place, image in enumerate(rows["image_id"])} if rows is not None else {}

    def picture(image: str) -> Image.Image | None:
        try:
            return open_image(rows[places[image]]) if image in places else None
        except BadImageError:  # the page has a place for a picture that is missing
            return None

    return captions, picture, remarks


def _read_dataset(
    dataset: str, split: str, image_dir: str | None, scored: dict
) -> tuple[dict, datasets.Dataset | None]:
    """References by image id; rows with pictures, or None if the dataset has none and no folder was given.

    A dataset that was scored is read as it was then: the Hub's at its revision, a folder only if it is that build.
    """
    revision = scored["revision"] if dataset == scored.get("id") else None
    if revision and Path(dataset).exists() and dataset_record(dataset, split)["revision"] != revision:
        raise DataError(
            f"{dataset} has changed since the runs were scored on its {revision}: score the predictions again, or "
            "name another folder with --dataset"
        )
    revision = None if Path(dataset).exists() else revision
    try:
        rows = load_captions(dataset, split, image_dir, revision)
    except DataError:
        if image_dir is not None:
            raise
        return dataset_references(dataset, split, revision), None
    return references_of(rows), rows


def _cards(
    runs: Sequence[Run], images: Sequence[str], references: dict[str, list[str]], picture: Callable
) -> Iterator:
    """What the page shows of each image, one after the other: pictures are large."""
    for image in images:
        yield {
            "image_id": image,
            "image": picture(image),
            "references": references.get(image, []),
            "captions": [
                {
                    "text": None if run.captions is None else run.captions[image],
                    "score": run.cider_d[image],
                    "flags": run.flagged.get(image, []),
                }
                for run in runs
            ],
        }
