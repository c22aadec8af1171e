"""A grid of training runs: each cell a process of its own, finished ones are skipped, a failed one stops no other.

A grid is a YAML file:

    recipe: recipes/sft_qwen2vl_jp.py                        what is launched
    config: recipes/configs/sft_qwen2vl_jp/base.yaml         its settings
    output_dir: outputs/ablation
    launch: [--config_file, accelerate_configs/cpu.yaml]     optional, for `accelerate launch`
    settings: {max_steps: 300}                               optional, changes that hold for every cell
    vary: {lora_r: [8, 64], train_projector: [false]}        one at a time, beside the unchanged reference
    grid: {seed: [42, 43]}                                   optional, every combination of these, with each of `vary`
    trained: model                                           optional, folder of a cell with what was trained: adapter
    scores: [bleu_1, rouge_l]                                optional, columns of the summary and of the comparison
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import psutil
from tqdm.auto import tqdm

from vlmcap.atomic_write import write_atomically
from vlmcap.errors import UserError
from vlmcap.evaluation.scoring import SCORE_LABELS
from vlmcap.places import own_file
from vlmcap.strict_parsing import parse_json, parse_yaml, shown

REFERENCE = "reference"
STATE = "cell.json"
LONGEST_NAME = 200  # bytes; file systems allow 255
PATIENCE = 20  # seconds that an interrupted cell has to end before it is killed
POLL = 0.2  # seconds between two looks at what is running


class AblationError(UserError):
    """A grid that cannot be run; the message names the file, the key and the fix."""


@dataclass(frozen=True)
class Grid:
    """What the YAML file says; see the docstring of the module."""

    recipe: str
    config: str
    output_dir: str
    launch: list[str] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    vary: dict[str, list] = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    trained: str = "adapter"
    scores: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GridCell:
    """One run. `varied`: what of `vary` it changes, or "reference"; `changes`: every setting beside the config's;
    `metrics`: the document of what it trained."""

    name: str
    varied: str
    changes: dict
    folder: Path
    metrics: Path

    def state(self) -> dict:
        """What is known of the cell's last run: "status" is new, running, finished or failed.

        Raises:
            AblationError: the folder's cell.json is not such a state.
        """
        path = self.folder / STATE
        if not path.exists():
            return {"status": "new"}
        try:
            state = parse_json(path.read_bytes())
        except ValueError as error:
            raise AblationError(f"{path}: not JSON ({error}). Delete {self.folder} to run the cell again.") from error
        if not isinstance(state, dict) or not {"status", "fingerprint", "seconds"} <= state.keys():
            raise AblationError(f"{path} is not the state of a cell. Delete {self.folder} to run the cell again.")
        return state

    def finished(self) -> bool:
        return self.state()["status"] == "finished"


def read_grid(path: str | Path, **overrides) -> Grid:
    """Reads a grid file; `overrides` that are not None replace its keys.

    Raises:
        AblationError: the file is missing or no mapping, has an unknown or no needed key, or a list is none; there is
            no such score.
    """
    document = read_mapping(path)
    extra = [key for key in document if key not in Grid.__dataclass_fields__]
    if extra:
        raise AblationError(
            f"{path}: {shown(extra)} is not known; a grid has the keys {', '.join(Grid.__dataclass_fields__)}"
        )
    document |= {key: value for key, value in overrides.items() if value is not None}
    missing = [key for key in ("recipe", "config", "output_dir") if key not in document]
    if missing:
        raise AblationError(f"{path} lacks {', '.join(missing)}")
    for part in ("settings", "vary", "grid"):
        settings = document.get(part, {})
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise AblationError(f"{path}: {part} must be a mapping, but is {shown(settings)}")
    for part in ("vary", "grid"):
        for key, values in document.get(part, {}).items():
            if not isinstance(values, list) or not values:
                raise AblationError(f"{path}: {part}.{key} must be a list of values, but is {shown(values)}")
    scores = document.get("scores", [])
    if not isinstance(scores, list) or not all(isinstance(s, str) and s in SCORE_LABELS for s in scores):
        raise AblationError(
            f"{path}: scores must be a list of some of {', '.join(SCORE_LABELS)}, but is {shown(scores)}"
        )
    launch = document.get("launch", [])
    if not isinstance(launch, list) or not all(isinstance(word, str | int) for word in launch):
        raise AblationError(f"{path}: launch must be a list of words, but is {shown(launch)}")
    document["launch"] = [own_file(str(word)) for word in launch]
    for key, kind in {"recipe": "file", "config": "file", "output_dir": "folder", "trained": "folder"}.items():
        if not isinstance(document.get(key, ""), str) or "\0" in document.get(key, ""):
            raise AblationError(f"{path}: {key} must be the name of a {kind}, but is {shown(document[key])}")
    for key in ("recipe", "config"):
        document[key] = own_file(document[key])
        if not os.path.isfile(document[key]):
            raise AblationError(
                f"{path}: {key} {document[key]:.200} is not a file (paths are relative to the working folder)"
            )
    config = read_mapping(document["config"])
    if not all(isinstance(key, str) for key in config):
        raise AblationError(f"{document['config']}: its keys must be names of settings")
    return Grid(**document)


def read_mapping(path: str | Path) -> dict:
    """A YAML file of settings. Raises AblationError where it cannot be read, or is not a mapping."""
    try:
        document = parse_yaml(Path(own_file(str(path))).read_bytes())
    except (OSError, ValueError) as error:
        raise AblationError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise AblationError(f"{path}: a mapping is needed, but this is {shown(document)}")
    return document


def cells(grid: Grid) -> list[GridCell]:
    """The reference and every value of `vary` alone, for each combination of `grid`; the reference comes first.

    A value that the config or `settings` has already is the reference and no cell of its own.

    Raises:
        AblationError: two cells would share a folder: a value occurs twice, or the names differ in signs alone.
    """
    config = read_mapping(grid.config) | grid.settings
    one_at_a_time = [{}] + [
        {key: value} for key, values in grid.vary.items() for value in values if config.get(key) != value
    ]
    combinations = [dict(zip(grid.grid, values, strict=True)) for values in itertools.product(*grid.grid.values())]
    found = []
    for change, combination in itertools.product(one_at_a_time, combinations):
        varied = _name(change) or REFERENCE
        name = ", ".join(filter(None, [varied, _name(combination)]))
        folder_name = "".join(c if c.isalnum() or c in "=.-_" else "_" for c in name)
        if len(folder_name.encode()) > LONGEST_NAME:
            folder_name = f"{varied.partition('=')[0][:60]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        folder = Path(grid.output_dir) / "cells" / folder_name
        metrics = folder / grid.trained / "metrics.json"
        found.append(GridCell(name, varied, grid.settings | combination | change, folder, metrics))
    in_folder: dict[Path, str] = {}
    for cell in found:
        if other := in_folder.get(cell.folder):
            raise AblationError(f"{other} and {cell.name} would share {cell.folder}: run them in grids of their own")
        in_folder[cell.folder] = cell.name
    return found


def run_grid(grid: Grid) -> list[GridCell]:
    """Runs what is not finished, and returns all cells. Raises as `run_cells` does."""
    todo = cells(grid)
    run_cells(grid, todo)
    return todo


def run_cells(grid: Grid, todo: Sequence[GridCell], at_once: int = 1) -> None:
    """Runs what is not finished, in this order, `at_once` of them at a time.

    An interrupted or failed cell continues from its last checkpoint, if it has one; a failure stops no other cell.
    What a cell prints goes into `log.txt` of its folder.

    Raises:
        AblationError: a folder holds a cell that was run with other settings.
    """
    for cell in todo:
        before = cell.state()
        if before["status"] != "new" and before["fingerprint"] != _fingerprint(grid, cell):
            raise AblationError(
                f"{cell.folder} was run with other settings ({grid.config}, settings or vary have changed since)."
                " Delete it or choose another output_dir."
            )
    waiting, running = [cell for cell in todo if not cell.finished()], []
    with tqdm(total=len(todo), initial=len(todo) - len(waiting), desc="cells") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(_Running(grid, waiting.pop(0)))
                    bar.set_postfix_str("; ".join(one.cell.name for one in running))
                time.sleep(POLL)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    one.end()
                    bar.update()
                    if not one.cell.finished():
                        log = one.cell.folder / "log.txt"
                        bar.write(f"{one.cell.name} failed, the others continue. End of {log}:", sys.stderr)
                        bar.write("\n".join(f"    {line}" for line in _last_words(log)), sys.stderr)
        except BaseException:
            for one in running:
                _end(one.process.pid)  # the launcher would leave the recipe running
            raise


def summary_rows(grid_cells: list[GridCell], scores: Sequence[str] = ()) -> list[list[str]]:
    """The grid as rows of text, header first: a row for each of `vary`, means over the combinations of `grid`.

    `scores`: CIDEr-D if there are none. Least and most are of the first of them.
    """
    first, *others = scores or ["cider_d"]
    about = ["trained parameters", "seconds of training", "peak memory, GiB"]
    header = ["", SCORE_LABELS[first], "least", "most", *(SCORE_LABELS[key] for key in others), "runs", *about]
    rows = [header]
    for varied in dict.fromkeys(cell.varied for cell in grid_cells):
        runs_of = [cell for cell in grid_cells if cell.varied == varied]
        documents = [json.loads(cell.metrics.read_text(encoding="utf-8")) for cell in runs_of if cell.finished()]
        runs = f"{len(documents)} of {len(runs_of)}"
        if not documents:
            rows.append([varied, *["-"] * (3 + len(others)), runs, "-", "-", "-"])
            continue
        values = {key: [d["scores"][key] for d in documents if key in d["scores"]] for key in (first, *others)}
        training = [document["training"] for document in documents]
        peaks = [t["peak_memory_bytes"] for t in training if t["peak_memory_bytes"] is not None]
        rows.append(
            [
                varied,
                *(f"{of(values[first]):.4f}" if values[first] else "-" for of in (mean, min, max)),
                *(f"{mean(values[key]):.4f}" if values[key] else "-" for key in others),
                runs,
                f"{training[0]['trainable_parameters']:,}",
                f"{mean(t['seconds'] for t in training):.0f}",
                f"{max(peaks) / 2**30:.2f}" if peaks else "not measured",
            ]
        )
    return rows


class _Running:
    """A cell that has been started: its process, and the state that is written when this ends."""

    def __init__(self, grid: Grid, cell: GridCell):
        self.cell, self.start = cell, time.monotonic()
        self.earlier = cell.state().get("seconds", 0.0)
        cell.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "accelerate.commands.launch", *grid.launch, grid.recipe]
        command += ["--config", grid.config, "--output_dir", str(cell.folder)]
        for key, value in cell.changes.items():
            command += [f"--{key}", *(_argument(v) for v in (value if isinstance(value, list) else [value]))]
        if any(cell.folder.glob("checkpoint-*/trainer_state.json")):
            command += ["--resume_from_checkpoint", "latest"]
        self.state = {"fingerprint": _fingerprint(grid, cell), "changes": cell.changes, "command": command[1:]}
        self.write(status="running", seconds=self.earlier)
        with (cell.folder / "log.txt").open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def end(self) -> None:
        code, seconds = self.process.returncode, self.earlier + time.monotonic() - self.start
        done = code == 0 and self.cell.metrics.exists()
        self.write(status="finished" if done else "failed", returncode=code, seconds=round(seconds, 1))

    def write(self, **more) -> None:
        text = json.dumps(self.state | more, ensure_ascii=False, indent=2, default=str)
        write_atomically(self.cell.folder / STATE, text)


def _end(pid: int) -> None:
    """Ends a process and all that it started; what does not go when it is asked to is killed."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        family = [*launcher.children(recursive=True), launcher]
        for ask in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    ask(process)
            _, family = psutil.wait_procs(family, timeout=PATIENCE)


def _last_words(log: Path, lines: int = 5) -> list[str]:
    """The end of what a recipe printed, without the launcher's own traceback after it."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    before, _, launcher = text.rpartition("Traceback (most recent call last):")
    return (before if "CalledProcessError" in launcher else text).strip().splitlines()[-lines:]


def _fingerprint(grid: Grid, cell: GridCell) -> str:
    settings = {"recipe": grid.recipe} | read_mapping(grid.config) | cell.changes
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _name(changes: dict) -> str:
    return ", ".join(f"{key}={_argument(value)}" for key, value in changes.items())


def _argument(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
