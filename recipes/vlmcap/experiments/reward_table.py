"""What scripts/reward_table.py prints and draws: scores beside audit figures, of settings with a run for each seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy as np

from vlmcap.errors import UserError
from vlmcap.evaluation.audit_document import read_object
from vlmcap.evaluation.bootstrap import interval
from vlmcap.evaluation.caption_files import read_predictions
from vlmcap.experiments.ablation import cells, read_grid
from vlmcap.reporting.plots import house_style, style_of

# Column -> how its number is printed. Of the differences, these are tested.
FIGURES = {
    "CIDEr-D": "{:.3f}",
    "BLEU-4": "{:.3f}",
    "ROUGE-L": "{:.3f}",
    "CHAIRs": "{:.1%}",
    "CHAIRi": "{:.1%}",
    "distinct": "{:.0f}",
    "words": "{:.1f}",
}
TESTED = ("CIDEr-D", "ROUGE-L", "CHAIRs", "CHAIRi")
RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True)
class Run:
    """One evaluated model: a folder with metrics.json, audit.json and predictions.jsonl."""

    folder: Path

    @cached_property
    def metrics(self) -> dict:
        return read_object(self.folder / "metrics.json", "the scores")

    @cached_property
    def per_image(self) -> dict[str, np.ndarray]:
        """`ids`, and of each image CIDEr-D, ROUGE-L, things named, those that are not there, whether there is one."""
        details = read_object(self.folder / "audit.json", "the audit")["hallucination"]["per_image"]
        scores = self.metrics["per_image"]
        ids = list(map(str, scores["image_id"]))
        wrong = np.array([len(details[image_id]["hallucinated"]) for image_id in ids])
        return {
            "ids": np.array(ids),
            "CIDEr-D": np.array(scores["cider_d"]),
            "ROUGE-L": np.array(scores["rouge_l"]),
            "named": np.array([len(details[image_id]["mentioned"]) for image_id in ids]),
            "wrong": wrong,
            "CHAIRs": wrong > 0,
        }

    @cached_property
    def figures(self) -> dict[str, float]:
        """A number for each of FIGURES."""
        scores, rows = self.metrics["scores"], self.per_image
        return {
            "CIDEr-D": scores["cider_d"],
            "BLEU-4": scores["bleu_4"],
            "ROUGE-L": scores["rouge_l"],
            "CHAIRs": float(rows["CHAIRs"].mean()),
            "CHAIRi": float(rows["wrong"].sum() / max(1, rows["named"].sum())),
            "distinct": len(set(read_predictions(self.folder / "predictions.jsonl").values())),
            "words": self.metrics["counts"]["mean_caption_tokens"],
        }

    @property
    def seconds(self) -> float | None:
        """Of training; None for a model that was not trained."""
        return self.metrics.get("training", {}).get("seconds")


def read_settings(runs: Sequence[str], grid: str | None = None) -> dict[str, list[Run]]:
    """Setting -> its runs, of words NAME=FOLDER (a name again is another seed) and of a grid's finished cells.

    Raises:
        UserError: a word without a name, a folder without the files, nothing given, or runs of different images.
    """
    folders = []
    for word in runs:
        name, sign, folder = word.partition("=")
        if not sign:
            raise UserError(f"{word}: give each run as NAME=FOLDER")
        folders.append((name, Path(folder)))
    if grid:
        folders += [(cell.varied, cell.metrics.parent) for cell in cells(read_grid(grid)) if cell.finished()]
    settings: dict[str, list[Run]] = {}
    for name, folder in folders:
        for file in ("metrics.json", "audit.json", "predictions.jsonl"):
            if not (folder / file).is_file():
                raise UserError(f"{folder} has no {file}: name a folder that a recipe evaluated, such as .../adapter")
        settings.setdefault(name, []).append(Run(folder))
    if not settings:
        raise UserError("no runs: give NAME=FOLDER, or a grid with finished cells")
    every = [run for seeds in settings.values() for run in seeds]
    for run in every:
        if not np.array_equal(run.per_image["ids"], every[0].per_image["ids"]):
            raise UserError(f"{run.folder} and {every[0].folder} were evaluated on different images")
    return settings


def table_rows(settings: dict[str, list[Run]]) -> list[list[str]]:
    """A row for each setting, header first: means over its seeds; CIDEr-D with the least and the most."""
    rows = [["", *FIGURES, "least", "most", "seeds", "seconds of training"]]
    for name, runs in settings.items():
        cider = [run.figures["CIDEr-D"] for run in runs]
        seconds = [run.seconds for run in runs if run.seconds is not None]
        rows.append(
            [
                name,
                *(form.format(mean(run.figures[key] for run in runs)) for key, form in FIGURES.items()),
                f"{min(cider):.3f}",
                f"{max(cider):.3f}",
                str(len(runs)),
                f"{mean(seconds):.0f}" if seconds else "-",
            ]
        )
    return rows


def difference_rows(settings: dict[str, list[Run]], reference: str) -> list[list[str]]:
    """Each setting minus the reference, with 95% intervals; header first.

    Images, the same for both, and seeds, of each apart, are drawn with replacement (a bootstrap of two levels: it
    covers the choice of images and the scatter of seeds). Distinct captions cannot be resampled, because an image
    that is drawn twice has one caption: the means of the seeds are compared.

    Raises:
        UserError: there is no such setting.
    """
    if reference not in settings:
        raise UserError(f"--reference {reference}: there is no such run; choose one of {', '.join(settings)}")
    rows = [[f"minus {reference}", *TESTED, "distinct"]]
    for name, runs in settings.items():
        if name == reference:
            continue
        ours, theirs = _resampled(runs, settings[reference], SEED)
        cells = []
        for key in TESTED:
            low, high = interval(ours[key] - theirs[key])
            point = _mean(runs, key) - _mean(settings[reference], key)
            scale, sign = (100, "%") if key.startswith("CHAIR") else (1, "")
            digits = 1 if sign else 3
            cells.append(f"{scale * point:+.{digits}f}{sign} [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]")
        cells.append(f"{_mean(runs, 'distinct') - _mean(settings[reference], 'distinct'):+.1f}")
        rows.append([name, *cells])
    return rows


def _mean(runs: list[Run], key: str) -> float:
    return mean(run.figures[key] for run in runs)


def _resampled(ours: list[Run], theirs: list[Run], seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Figure -> its value in each resample, (RESAMPLES,), of both settings on the same images."""
    generator = np.random.default_rng(seed)
    images = len(ours[0].per_image["ids"])
    draws = generator.integers(images, size=(RESAMPLES, images))
    counts = np.stack([np.bincount(draw, minlength=images) for draw in draws]).astype(np.float64)
    return tuple(_of_draws(runs, counts, generator) for runs in (ours, theirs))


def _of_draws(runs: list[Run], counts: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    seeds = generator.integers(len(runs), size=(RESAMPLES, len(runs)))

    def sums(key: str) -> np.ndarray:
        of_seeds = np.stack([counts @ run.per_image[key] for run in runs], axis=1)  # (RESAMPLES, seeds)
        return np.take_along_axis(of_seeds, seeds, axis=1).mean(1)

    images = counts.shape[1]
    of_images = {key: sums(key) / images for key in ("CIDEr-D", "ROUGE-L", "CHAIRs")}
    return of_images | {"CHAIRi": sums("wrong") / np.maximum(1, sums("named"))}


def plot(settings: dict[str, list[Run]], path: str | Path) -> Path:
    """CIDEr-D against CHAIRs and against distinct captions: a point a setting, small ones its seeds."""
    from matplotlib.figure import Figure

    panels = {"CHAIRs": "captions with a thing that is not there", "distinct": "distinct captions"}
    with house_style(path) as save:
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        drawn = []
        for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            drawn = []
            for number, runs in enumerate(settings.values()):
                style = style_of(number)
                for run in runs if len(runs) > 1 else ():
                    axes.plot(run.figures[key], run.figures["CIDEr-D"], markersize=3, alpha=0.5, **style)
                drawn += axes.plot(_mean(runs, key), _mean(runs, "CIDEr-D"), markersize=8, linestyle="none", **style)
            axes.set_xlabel(label)
            axes.locator_params(nbins=6, steps=[1, 2, 5, 10])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if key == "CHAIRs":
                axes.xaxis.set_major_formatter("{x:.0%}")
                axes.set_ylabel("CIDEr-D")
            else:
                axes.locator_params(axis="x", integer=True)
        figure.legend(drawn, list(settings), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
        return save(figure)
