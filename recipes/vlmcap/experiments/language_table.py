"""What scripts/language_table.py does: trainings with one, two and three languages, and with two styles; their tables.

A configuration of the SFT recipe has the prompts of all of them. Each training takes some, has as many steps as the
others, and scores what it leaves out before and after.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy as np

from vlmcap.captioning.arguments import PromptArguments
from vlmcap.errors import UserError
from vlmcap.evaluation.audit_document import read_object
from vlmcap.evaluation.bootstrap import interval
from vlmcap.evaluation.caption_files import read_predictions
from vlmcap.evaluation.register import is_polite
from vlmcap.evaluation.tasks import folder_name
from vlmcap.experiments.ablation import Grid, GridCell, read_mapping
from vlmcap.places import own_file

RECIPE = "recipes/sft_qwen2vl_jp.py"
LAUNCH = ["--config_file", "accelerate_configs/cpu.yaml", "--num_cpu_threads_per_process", "1"]
JAPANESE, POLITE, ENGLISH, VIETNAMESE = "ja/plain", "ja/polite", "en", "vi"
LANGUAGES = {JAPANESE: "Japanese", ENGLISH: "English", VIETNAMESE: "Vietnamese"}
# Training -> keys of its prompts.
TRAININGS = {
    "Japanese": (JAPANESE,),
    "Japanese, English": (JAPANESE, ENGLISH),
    "Japanese, English, Vietnamese": (JAPANESE, ENGLISH, VIETNAMESE),
}
ALL = "Japanese, English, Vietnamese"
ONE_BY_ONE, STYLES = "one prompt a sequence", "plain and polite Japanese"
# Of the training that only its speed is looked at.
FEW = {"max_steps": 60, "max_test_images": 3}
RESAMPLES, SEED = 2000, 0


# Trainings -----------------------------------------------------------------------------------------------------------
def grid_of(config: str, output_dir: str) -> Grid:
    recipe, launch = own_file(RECIPE), list(map(own_file, LAUNCH))
    return Grid(recipe=recipe, config=own_file(config), output_dir=output_dir, launch=launch)


def trainings(grid: Grid, seeds: Sequence[int]) -> dict[str, list[GridCell]]:
    """Training -> a cell for each seed; of the one by which the speed is compared, one cell.

    Raises:
        UserError: the configuration cannot be read, or lacks a prompt.
    """
    try:
        wordings = PromptArguments(prompts=read_mapping(grid.config).get("prompts")).wordings
    except ValueError as error:
        raise UserError(f"{grid.config}: {error}") from error
    if missing := [key for key in (*LANGUAGES, POLITE) if key not in wordings]:
        raise UserError(f"{grid.config}: prompts has no {missing[0]}: name the prompt of these captions")

    def cell(name: str, keys: Sequence[str], also: Sequence[str], seed: int, more: dict) -> GridCell:
        asked = {
            "prompts": {key: wordings[key] for key in keys},
            "also_score": {key: wordings[key][0] for key in also},
        }
        texts = {name: json.dumps(value, ensure_ascii=False) for name, value in asked.items() if value}
        folder = Path(grid.output_dir) / f"{name.lower().replace(', ', '_').replace(' ', '_')}_{seed}"
        metrics = folder / grid.trained / "metrics.json"
        return GridCell(f"{name}, seed {seed}", name, texts | {"seed": seed} | more, folder, metrics)

    found = {
        name: [cell(name, keys, [key for key in LANGUAGES if key not in keys], seed, {}) for seed in seeds]
        for name, keys in TRAININGS.items()
    }
    found[STYLES] = [cell(STYLES, (JAPANESE, POLITE), (), seed, {}) for seed in seeds]
    found[ONE_BY_ONE] = [cell(ONE_BY_ONE, TRAININGS[ALL], (), seeds[0], {"shared_prefix": False} | FEW)]
    return found


# What they leave -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, with base/ and adapter/."""

    folder: Path

    @cached_property
    def metrics(self) -> dict:
        return read_object(self.folder / "adapter/metrics.json", "the scores")

    @property
    def steps_a_second(self) -> float:
        return self.metrics["training"]["steps"] / self.metrics["training"]["seconds"]

    def cider_d(self, key: str, model: str = "adapter") -> np.ndarray:
        """CIDEr-D of each image's caption of this key: float64, (images,)."""
        document = read_object(self._place(key, model) / "metrics.json", "the scores")
        return np.array(document["per_image"]["cider_d"])

    def captions(self, key: str) -> list[str]:
        return list(read_predictions(self._place(key, "adapter") / "predictions.jsonl").values())

    def _place(self, key: str, model: str) -> Path:
        folder = self.folder / model
        return folder if self.metrics["key"] == key else folder / "languages" / folder_name(key)


def finished(cells: dict[str, list[GridCell]]) -> dict[str, list[Trained]]:
    """Training -> what is there of it, where there is anything."""
    found = {name: [Trained(cell.folder) for cell in of_seeds if cell.finished()] for name, of_seeds in cells.items()}
    return {name: runs for name, runs in found.items() if runs}


# Tables: rows of text, header first ----------------------------------------------------------------------------------
def language_rows(runs: dict[str, list[Trained]]) -> list[list[str]]:
    """CIDEr-D in each language, of the base and after each training; and how much of the base's English is left; empty
    if no training is there.

    Intervals are of 95%. Images, the same for all, and seeds are drawn with replacement (a bootstrap of two levels: it
    covers the choice of images and the scatter of seeds).
    """
    done = [name for name in TRAININGS if name in runs]
    if not done:
        return []
    kept = f"{LANGUAGES[ENGLISH]} kept"
    rows = [["trained on", *(f"CIDEr-D, {label}" for label in LANGUAGES.values()), kept, "seeds", "steps/s"]]
    base = {key: np.stack([runs[done[0]][0].cider_d(key, "base")]) for key in LANGUAGES}
    rows.append(["nothing (the base)", *(_with_interval(values) for values in base.values()), "-", "-", "-"])
    for name in done:
        of_seeds = {key: np.stack([run.cider_d(key) for run in runs[name]]) for key in LANGUAGES}
        rows.append(
            [
                name,
                *(_with_interval(values) for values in of_seeds.values()),
                _with_interval(of_seeds[ENGLISH], base[ENGLISH]),
                str(len(runs[name])),
                f"{mean(run.steps_a_second for run in runs[name]):.2f}",
            ]
        )
    return rows


def style_rows(runs: dict[str, list[Trained]]) -> list[list[str]]:
    """Of the training with two styles: how many captions are in the style that was asked for, with intervals as above;
    empty if it is not there."""
    if STYLES not in runs:
        return []
    rows = [["asked for", "captions in this style", "CIDEr-D", "captions", "seeds"]]
    for key, wanted in {JAPANESE: False, POLITE: True}.items():
        right = np.stack([in_style(run.captions(key), wanted) for run in runs[STYLES]])
        scores = np.stack([run.cider_d(key) for run in runs[STYLES]])
        share = _with_interval(right, form="{:.1%}")
        seeds, count = right.shape
        rows.append([key, share, _with_interval(scores), str(count), str(seeds)])
    return rows


def speed_rows(runs: dict[str, list[Trained]]) -> list[list[str]]:
    """Steps a second of the training with all languages, shared and one prompt a sequence; empty without both."""
    if not {ALL, ONE_BY_ONE} <= set(runs):
        return []
    speeds = {name: mean(run.steps_a_second for run in runs[name]) for name in (ALL, ONE_BY_ONE)}
    rows = [["", "steps/s", "against one prompt a sequence"]]
    for name, label in {ALL: "captions share their picture", ONE_BY_ONE: ONE_BY_ONE}.items():
        rows.append([label, f"{speeds[name]:.2f}", f"{speeds[name] / speeds[ONE_BY_ONE]:.2f}"])
    return rows


def in_style(captions: Sequence[str], polite: bool) -> np.ndarray:
    """1 for each caption that is Japanese and in polite, or plain, form; else 0: float64, (captions,)."""
    return np.array([has_kana(text) and is_polite(text) == polite for text in captions], dtype=np.float64)


def has_kana(text: str) -> bool:
    return any("぀" <= letter <= "ヿ" for letter in text)


def _with_interval(of_seeds: np.ndarray, base: np.ndarray | None = None, form: str = "{:.3f}") -> str:
    """The mean of (seeds, images), or its share of the mean of `base` on the same images, with its interval."""
    generator = np.random.default_rng(SEED)
    seeds, images = of_seeds.shape
    drawn = generator.integers(images, size=(RESAMPLES, images))
    point, resampled = of_seeds.mean(), _resampled(of_seeds, drawn, generator)
    if base is not None:
        if not base.mean():
            return "-"
        point, resampled = point / base.mean(), resampled / _resampled(base, drawn, generator)
    low, high = interval(resampled)
    return f"{form.format(point)} [{form.format(low)}, {form.format(high)}]"


def _resampled(of_seeds: np.ndarray, drawn: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means over drawn images and seeds: (RESAMPLES,)."""
    by_seed = np.stack([values[drawn].mean(1) for values in of_seeds], axis=1)  # (RESAMPLES, seeds)
    seeds = generator.integers(by_seed.shape[1], size=by_seed.shape)
    return np.take_along_axis(by_seed, seeds, axis=1).mean(1)
