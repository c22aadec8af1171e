"""Plots of metrics documents as SVG: scores with intervals, quality against memory, training curves.

Every function takes `runs`, name -> metrics document in the order of the tables, writes one file and returns its path.
A run has the same colour and marker in all plots. The same documents give the same bytes. Text stays text, so that it
can be searched, and a Japanese name is drawn by the reader's own fonts.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from vlmcap.evaluation.scoring import SCORE_LABELS

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is too pale for lines, black is the
# text's. Five markers and seven colours meet again after 35 runs.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7A7A72")
MARKERS = ("o", "s", "^", "D", "v")
INK, SOFT = "#1c1c1a", "#8a8a83"  # a page may replace these two with its own
WIDTH = 10.0  # inches; a README shows 12 of them in its full width
PANELS = 4  # side by side
CURVE_HEIGHT = 3.0  # inches
TITLE = {"fontsize": 10, "loc": "left", "pad": 4}


def plot_scores(runs: dict[str, dict], path: str | Path, scores: Sequence[str] = tuple(SCORE_LABELS)) -> Path:
    """One panel a score, one bar a run, with its 95 % interval. Bars have the gid `bar-<score>-<number of the run>`.

    A score that a run lacks has no bar but a dash, one that all lack no panel. CIDEr-D with polite endings made plain
    follows the raw one.
    """
    panels = _panels(runs, scores)
    columns = min(PANELS, len(panels))
    rows = -(-len(panels) // columns)
    with house_style(path) as save:
        figure = Figure(figsize=(WIDTH, rows * (0.75 + 0.27 * len(runs))), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for place, (key, (label, values)) in zip(axes.flat, panels.items(), strict=False):
            _draw_bars(place, key, values)
            place.set_title(label, **TITLE)
            place.set_yticks(range(len(runs)), list(runs))
        for place in axes.flat[len(panels) :]:
            place.remove()
        axes[0, 0].set_ylim(len(runs) - 0.4, -0.6)
        return save(figure)


def plot_quality_against_memory(runs: dict[str, dict], path: str | Path) -> Path:
    """CIDEr-D with its interval against the peak memory of captioning in GiB.

    Peak memory is measured on GPUs alone. As soon as one run lacks it, all are drawn against the number of their
    parameters instead, and the axis says so: two measures do not share an axis. Runs without a run record, of which
    neither is known, are left out. Points have the gid `point-<number>`.
    """
    sizes, label = _sizes(runs)
    sized = {number: run for number, run in enumerate(runs.values()) if number in sizes}
    with house_style(path) as save:
        figure = Figure(figsize=(WIDTH * 0.75, _height(runs)), layout="constrained")
        axes, points = figure.subplots(), []
        for number, run in sized.items():
            score, (low, high) = run["scores"]["cider_d"], run["intervals"]["cider_d"]
            drawn = axes.errorbar(
                sizes[number],
                score,
                yerr=[[max(0, score - low)], [max(0, high - score)]],
                capsize=3,
                elinewidth=1.2,
                markersize=5.5,
                linestyle="none",
                clip_on=False,  # a score of 0 is a whole point too
                **style_of(number),
            )
            drawn.lines[0].set_gid(f"point-{number}")
            points.append(drawn)
        _finish(axes, label, "CIDEr-D, 95 % interval")
        axes.set_xlim(0, max(sizes.values()) * 1.08)
        axes.set_ylim(bottom=0)
        _legend(figure, points, [list(runs)[number] for number in sized])
        return save(figure)


def plot_training_curves(runs: dict[str, dict], path: str | Path) -> Path:
    """Loss against the step, dashed that of validation captions, and a panel for each of their scores in the logs.

    Only runs with a training log are drawn (`has_curve`). Lines have the gid `<key>-<number>`, with the keys of the
    log: `loss`, `eval_loss`, `eval_cider_d`.
    """
    logs = {number: training_log(run) for number, run in enumerate(runs.values()) if has_curve(run)}
    logged = {key for log in logs.values() for line in log for key in line}
    panels = {f"eval_{score}": label for score, label in SCORE_LABELS.items() if f"eval_{score}" in logged}
    columns = min(PANELS, 1 + len(panels))
    rows = -(-(1 + len(panels)) // columns)
    names = [list(runs)[number] for number in logs]
    legend_columns = max(1, min(PANELS, int(12 * WIDTH) // (8 + max(map(len, names)))))  # 12 characters an inch
    height = rows * (CURVE_HEIGHT if rows == 1 else 0.8 * CURVE_HEIGHT) + 0.2 * -(-len(names) // legend_columns)
    with house_style(path) as save:
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        first, *places = figure.subplots(rows, columns, squeeze=False).flat
        for number, log in logs.items():
            _draw_curve(first, log, "loss", number)
        curves = list(first.lines)
        for number, log in logs.items():
            _draw_curve(first, log, "eval_loss", number, linestyle=(0, (3, 1)), marker="none")
        first.set_title("training loss" + (", dashed: validation" if "eval_loss" in logged else ""), **TITLE)
        losses = [line["loss"] for log in logs.values() for line in log if line.get("loss", 0) > 0]
        if losses and max(losses) > 3 * min(losses):
            # The first steps lose so much more than the last that nothing could be told apart on a linear scale.
            first.set_yscale("log")
            first.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            first.yaxis.set_major_formatter("{x:g}")
            first.yaxis.set_minor_locator(NullLocator())
        for axes, (key, label) in zip(places, panels.items(), strict=False):
            for number, log in logs.items():
                _draw_curve(axes, log, key, number)
            axes.set_title(f"{label}, validation", **TITLE)
            highest = max(line[key] for log in logs.values() for line in log if key in line)
            axes.set_ylim(0, 1.08 * highest or 1)  # the best point is drawn whole
        for axes in places[len(panels) :]:
            axes.remove()
        for axes in (first, *places[: len(panels)]):
            _finish(axes, "step", "")
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
        figure.legend(curves, names, loc="outside lower left", ncols=legend_columns, frameon=False, fontsize=9)
        return save(figure)


def sizes_differ(runs: dict[str, dict]) -> bool:
    """Whether quality can be seen against memory: the largest run is at least a twentieth larger than the smallest."""
    sizes = _sizes(runs)[0].values()
    return bool(sizes) and max(sizes) >= 1.05 * min(sizes)


def training_log(run: dict) -> list[dict]:
    """The lines of a run's training log; of a model that was not trained here, none."""
    return run.get("training", {}).get("log", [])


def has_curve(run: dict) -> bool:
    """Whether a run has a curve to draw: two steps whose loss was logged."""
    return sum("loss" in line for line in training_log(run)) > 1


def _sizes(runs: dict[str, dict]) -> tuple[dict[int, float], str]:
    """Number of a run -> its size, of the runs whose record has one, and what that size is, as a label of an axis."""
    sized = {number: run for number, run in enumerate(runs.values()) if "parameters" in (run.get("model") or {})}
    peaks = {number: run.get("peak_memory_bytes") for number, run in sized.items()}
    if unmeasured := list(peaks.values()).count(None):
        label = f"parameters, millions (peak memory not measured for {unmeasured} of {len(sized)} runs)"
        return {number: run["model"]["parameters"] / 1e6 for number, run in sized.items()}, label
    return {number: peak / 2**30 for number, peak in peaks.items()}, "peak memory while captioning, GiB"


def _panels(runs: dict[str, dict], scores: Sequence[str]) -> dict[str, tuple[str, list]]:
    """Score -> (label, [(value, low, high) or None for every run]), in the order of `scores`."""

    def values(key: str, documents: list[dict]) -> list:
        return [(d["scores"][key], *d["intervals"][key]) if key in d.get("scores", {}) else None for d in documents]

    raw, panels = list(runs.values()), {}
    plain = [run.get("register_normalised") or {} for run in raw]
    for key in scores:
        label = SCORE_LABELS[key]
        if any(values(key, raw)):
            panels[key] = (label, values(key, raw))
        if key == "cider_d" and any(values(key, plain)):
            panels["cider_d_plain"] = (f"{label}, plain endings", values(key, plain))
    return panels


def _draw_bars(axes: Axes, key: str, values: list) -> None:
    top = max(high for _, _, high in filter(None, values)) or 1.0
    for number, value in enumerate(values):
        if value is None:
            axes.text(0.02 * top, number, "–", va="center", color=SOFT)
            continue
        score, low, high = value
        (bar,) = axes.barh(number, score, height=0.68, color=COLOURS[number % len(COLOURS)], alpha=0.85)
        bar.set_gid(f"bar-{key}-{number}")
        # An interval of percentiles need not hold the score of the sample itself.
        error = [[max(0, score - low)], [max(0, high - score)]]
        axes.errorbar(score, number, xerr=error, color=INK, elinewidth=1.2, capsize=2.5)
        axes.text(
            max(high, score) + 0.03 * top,
            number,
            f"{score:.3f}" if score < 10 else f"{score:.1f}",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(0, 1.32 * top)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, log: list[dict], key: str, number: int, **look) -> None:
    points = [(line["step"], line[key]) for line in log if key in line]
    if points:
        look = style_of(number) | look | {"markevery": max(1, len(points) // 12)}
        (curve,) = axes.plot(*zip(*points, strict=True), linewidth=1.6, markersize=4, **look)
        curve.set_gid(f"{key}-{number}")


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _height(runs: dict) -> float:
    """Inches that leave the legend room for one line a run."""
    return max(3.2, 0.5 + 0.2 * len(runs))


def _legend(figure: Figure, drawn: Sequence, names: list[str]) -> None:
    # Artists are not labelled themselves, because Matplotlib leaves out labels that begin with "_".
    figure.legend(drawn, names, loc="outside right upper", frameon=False, fontsize=9)


def style_of(number: int) -> dict:
    """Colour and marker of a run, by its number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}


@contextmanager
def house_style(path: str | Path) -> Iterator:
    """Within it, figures look alike; yields the function that saves one to `path` and returns the path."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": Path(path).stem,
        "text.parse_math": False,  # a run may be called a$b$
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": SOFT,
        "axes.axisbelow": True,
    }

    def save(figure: Figure) -> Path:
        figure.savefig(path, metadata={"Date": None})
        return Path(path)

    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Matplotlib measures text with its own font, which lacks Japanese, and warns; the reader's font draws it.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield save
