"""Tables of several runs, in CSV, Markdown and LaTeX.

tabulate lays out Markdown and pandas LaTeX. Cells are escaped here, because tabulate escapes nothing in Markdown and
pandas leaves out LaTeX's `|`, `<`, `>` and `"`; CSV is left to the standard library, because pandas would print whole
numbers as fractions in a column with an empty cell.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vlmcap.atomic_write import write_atomically
from vlmcap.data.corpora import SEEN_CORPORA
from vlmcap.evaluation.scoring import SCORE_LABELS
from vlmcap.markdown import code_span, markdown_escape, markdown_table, text_table, visible
from vlmcap.reporting.runs import ScoredRun, by_key, check_comparable, shared_signatures
from vlmcap.reporting.significance import SIGNIFICANT

PLAIN = "register_normalised"
SYSTEM_WORDS = 3 + len(SEEN_CORPORA)  # columns of the table of systems that hold words, before those of numbers
OVERVIEW = ("bleu_1", "bleu_2", "bleu_4", "meteor", "rouge_l", "cider_d")


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


def score_table(runs: Sequence[ScoredRun], tests: dict[str, dict[str, dict]], scores: Sequence[str]) -> Table:
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


def system_table(runs: Sequence[ScoredRun]) -> Table:
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


def legend(runs: Sequence[ScoredRun], reference: str, resamples: int, scores: Sequence[str]) -> list[str]:
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


def write_overview(runs: Sequence[ScoredRun], output_dir: str | Path) -> tuple[Path, str]:
    """Writes `output_dir/overview.md`, one table of runs on different datasets, and returns its path and the same for
    a terminal.

    A row is a run, with its score where it has one; rows of one dataset, and of one key of its captions, are together,
    in the order of their first.

    Raises:
        ScoreError: runs of one dataset that were not scored on the same images in the same way.
    """
    groups = {}
    for run in chain.from_iterable(by_key(runs).values()):
        dataset = run.metrics.get("dataset")
        # The place of the first run without a record keeps it apart from all others.
        key = tuple(dataset[part] for part in ("id", "revision", "split")) if dataset else (run.name,)
        key += (run.metrics.get("key"),)
        groups.setdefault(key, []).append(run)
    columns = ["", *(SCORE_LABELS[key] for key in OVERVIEW), "trained parameters", "seconds of training"]
    markdown, text = [["", "dataset", "images", *columns[1:]]], []
    for key, group in groups.items():
        check_comparable(group)
        name = visible(f"{key[0]}, {key[2]}") if len(key) > 2 else "not recorded"
        name += f", {visible(key[-1])}" if key[-1] else ""
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


def _score_columns(runs: Sequence[ScoredRun], scores: Sequence[str]) -> list[tuple[str | None, str, str]]:
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


def write_csv(path: Path, runs: Sequence[ScoredRun], tests: dict[str, dict[str, dict]]) -> None:
    """One row a run, numbers in full; a cell is empty where a document has no such value."""
    scores = list(shared_signatures(runs))
    rows = [_csv_row(run, tests.get(run.name, {}), scores) for run in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(run: ScoredRun, tests: dict[str, dict], scores: list[str]) -> dict:
    metrics, model, dataset = run.metrics, run.metrics.get("model") or {}, run.metrics.get("dataset") or {}
    row = {"run": run.name, "model": model.get("id"), "model_revision": model.get("revision")}
    row |= {key: model.get(key) for key in ("adapter", "adapter_revision", "dtype", "quantization", "parameters")}
    row |= {key: metrics.get(key) for key in ("peak_memory_bytes", "images_per_second", "seconds")}
    row |= {"device": (metrics.get("hardware") or {}).get("device")}
    row |= {f"saw_{corpus}": (metrics.get("saw") or {}).get(corpus) for corpus in (*SEEN_CORPORA, "note")}
    row |= {"dataset": dataset.get("id"), "dataset_revision": dataset.get("revision")}
    row |= {"split": dataset.get("split")} | metrics["counts"]
    for part, prefix in ((metrics, ""), (metrics.get(PLAIN) or {}, f"{PLAIN}_")):
        for key in scores:
            low, high = part.get("intervals", {}).get(key, (None, None))
            row |= {f"{prefix}{key}": part.get("scores", {}).get(key)}
            row |= {f"{prefix}{key}_low": low, f"{prefix}{key}_high": high}
            row |= {f"{prefix}{key}_signature": part.get("signatures", {}).get(key)}
    for key in scores:
        row |= {f"{key}_{what}": tests.get(key, {}).get(what) for what in ("difference", "p_value", "p_holm")}
    row |= {"prompt": metrics.get("prompt")}
    row |= {"decoding": json.dumps(metrics["decoding"], ensure_ascii=False) if "decoding" in metrics else None}
    return row | {key: metrics.get(key) for key in ("commit", "created")}


def markdown_tables(scores: Table, systems: Table, notes: list[str], signatures: dict[str, str]) -> str:
    """Both tables with their legend as Markdown."""

    def cell(c: Cell) -> str:
        text = markdown_escape(c.text)
        interval = f"<br>{markdown_escape(c.interval)}" if c.interval else ""
        return (f"**{text}**" if c.best else text) + markdown_escape(c.mark) + interval

    def table(t: Table, left: int) -> str:
        return markdown_table([[*map(markdown_escape, t.columns)], *([cell(c) for c in row] for row in t.rows)], left)

    lines = [table(scores, 1), table(systems, SYSTEM_WORDS)]
    lines += [f"- {markdown_escape(note)}" for note in notes]
    lines += ["- Signatures:", *(f"  - {label}: {code_span(signature)}" for label, signature in signatures.items())]
    return "\n".join(lines) + "\n"


def latex_tables(scores: Table, systems: Table, notes: list[str], signatures: dict[str, str]) -> str:
    """Both tables with their legend as a LaTeX float, for the package booktabs."""
    signed = "; ".join(rf"\texttt{{{latex_escape(signature)}}}" for signature in signatures.values())
    signed = signed.replace(r"\textbar{}", r"\textbar{}\allowbreak{}")
    return "\n".join(
        [
            r"% \usepackage{booktabs} and, for names in Japanese, LuaLaTeX",
            r"\begin{table*}",
            r"\caption{Scores with intervals, and what was scored.}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            _latex_table(scores, 1),
            r"\medskip",
            _latex_table(systems, SYSTEM_WORDS) + r"\medskip",
            rf"{{\footnotesize\raggedright {' '.join(map(latex_escape, notes))} Signatures: {signed}.\par}}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_table(table: Table, left: int) -> str:
    """A row of a table and, where it has intervals, one with these; `left` columns are aligned left, others right."""
    import pandas

    rows = []
    for name, *cells in table.rows:
        bodies = [rf"\textbf{{{latex_escape(c.text)}}}" if c.best else latex_escape(c.text) for c in cells]
        marks = [f"$^{{{c.mark}}}$" if c.mark else "" for c in cells]
        # Braces around the first cell: a row that begins with [ or * would be read as an argument of \\.
        rows.append([f"{{{latex_escape(name.text)}}}", *map(str.__add__, bodies, marks)])
        if any(c.interval for c in cells):
            intervals = [latex_escape(c.interval) for c in cells]
            rows.append(["{}", *(rf"{{\scriptsize {text}}}" if text else "" for text in intervals)])
    styler = pandas.DataFrame(rows, columns=[*map(latex_escape, table.columns)]).style.hide(axis="index")
    sides = "l" * left + "r" * (len(table.columns) - left)
    return styler.to_latex(hrules=True, column_format=f"@{{}}{sides}@{{}}")


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
