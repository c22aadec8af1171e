"""Grids of runs: what is run, skipped, continued, survived. The recipe is a small script, launched as a real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from vlmcap.experiments.ablation import (
    AblationError,
    cells,
    read_grid,
    run_cells,
    run_grid,
    summary_rows,
)
from vlmcap.markdown import markdown_table, text_table

# Writes what a recipe leaves: a checkpoint first, then a score that depends on its settings. Rank 13 fails; with a
# file `hang` beside the script it waits after its checkpoint.
RECIPE = """
import argparse, json, pathlib, time, yaml
parser = argparse.ArgumentParser()
for name in ("config", "output_dir", "lora_r", "train_projector", "seed", "resume_from_checkpoint"):
    parser.add_argument("--" + name)
args = parser.parse_args()
settings = yaml.safe_load(open(args.config)) | {k: v for k, v in vars(args).items() if v is not None}
output = pathlib.Path(args.output_dir)
print("resumed from", args.resume_from_checkpoint, flush=True)
if int(settings["lora_r"]) == 13:
    raise ValueError("rank 13 brings bad luck")
(output / "checkpoint-1").mkdir(exist_ok=True)
(output / "checkpoint-1/trainer_state.json").write_text("{}")
while (pathlib.Path(__file__).parent / "hang").exists():
    time.sleep(0.1)
trained = settings.get("trained", "adapter")
training = {"trainable_parameters": 10 * int(settings["lora_r"]), "seconds": 2.0, "peak_memory_bytes": None}
score = int(settings["lora_r"]) / 100 + int(settings["seed"]) / 1000
(output / trained).mkdir(exist_ok=True)
scores = {"cider_d": score, "bleu_1": 0.5, "rouge_l": 2 * score}
(output / trained / "metrics.json").write_text(json.dumps({"scores": scores, "training": training}))
"""


@pytest.fixture
def grid_file(tmp_path) -> Path:
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "base.yaml").write_text("lora_r: 32\ntrain_projector: true\nseed: 1\n")
    grid = {
        "recipe": str(tmp_path / "recipe.py"),
        "config": str(tmp_path / "base.yaml"),
        "output_dir": str(tmp_path / "out"),
        "launch": ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"],
        "vary": {"lora_r": [13, 32], "train_projector": [True, False]},
        "grid": {"seed": [1, 2]},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


@pytest.fixture
def grid_to_run(grid_file) -> Path:
    """For tests that start its cells: each is a launcher that imports torch, and a recipe."""
    return grid_file


def test_cells_are_the_reference_and_one_change_at_a_time(grid_file):
    found = cells(read_grid(grid_file))
    # 32 and true are the config's own: the reference, and no cells of their own.
    assert [cell.name for cell in found] == [
        "reference, seed=1",
        "reference, seed=2",
        "lora_r=13, seed=1",
        "lora_r=13, seed=2",
        "train_projector=false, seed=1",
        "train_projector=false, seed=2",
    ]
    assert found[-1].changes == {"train_projector": False, "seed": 2}
    assert len({cell.folder for cell in found}) == 6


def test_a_grid_survives_a_failure_and_skips_what_is_finished(grid_to_run, capsys):
    document = yaml.safe_load(grid_to_run.read_text()) | {"vary": {"lora_r": [13, 32]}}
    grid_to_run.write_text(yaml.safe_dump(document))
    grid = read_grid(grid_to_run)
    ran = run_grid(grid)
    assert [cell.name for cell in ran if not cell.finished()] == ["lora_r=13, seed=1", "lora_r=13, seed=2"]
    assert "rank 13 brings bad luck" in capsys.readouterr().err
    rows = summary_rows(ran)
    assert [row[:5] for row in rows[1:]] == [
        ["reference", "0.3215", "0.3210", "0.3220", "2 of 2"],
        ["lora_r=13", "-", "-", "-", "0 of 2"],
    ]
    assert markdown_table(rows).count("\n") == 4

    finished = [cell for cell in ran if cell.finished()]
    before = [cell.metrics.stat().st_mtime_ns for cell in finished]
    run_grid(grid)
    assert [cell.metrics.stat().st_mtime_ns for cell in finished] == before
    failed = next(cell for cell in ran if not cell.finished())
    assert (failed.folder / "log.txt").read_text().count("brings bad luck\n") == 2, "a failed cell is tried again"

    # The configuration changed: what is there is of another experiment.
    Path(grid.config).write_text("lora_r: 16\ntrain_projector: true\nseed: 1\n")
    with pytest.raises(AblationError, match="other settings.*another output_dir"):
        run_grid(grid)


def test_a_grid_says_what_is_trained_and_which_scores_count(grid_to_run):
    Path(grid_to_run.parent / "base.yaml").write_text("lora_r: 32\ntrained: model\nseed: 1\n")
    grid = {"vary": {}, "grid": {"seed": [1, 2]}, "trained": "model", "scores": ["rouge_l", "bleu_1", "meteor"]}
    grid_to_run.write_text(yaml.safe_dump(yaml.safe_load(grid_to_run.read_text()) | grid))
    grid = read_grid(grid_to_run)
    ran = run_grid(grid)
    assert [cell.metrics.parent.name for cell in ran if cell.finished()] == ["model", "model"]
    header, row = summary_rows(ran, grid.scores)
    assert header[:7] == ["", "ROUGE-L", "least", "most", "BLEU-1", "METEOR", "runs"]
    assert row[:7] == ["reference", "0.6430", "0.6420", "0.6440", "0.5000", "-", "2 of 2"]
    assert len(header) == len(row)
    first, second = text_table([header, row]).splitlines()
    assert len(first) == len(second) and first.index("least") + len("least") == second.index("0.6420") + len("0.6420")


def test_cells_run_at_once(grid_to_run):
    """Two that wait for each other, and a third after them."""
    meet = """
(output.parent / output.name.replace("=", "")).touch()
start = time.monotonic()
while len(list(output.parent.iterdir())) < 4:  # two folders and two files
    assert time.monotonic() < start + 60, "no other cell runs"
    time.sleep(0.1)
"""
    begin, end = RECIPE.split('print("resumed')
    recipe = grid_to_run.parent / "recipe.py"
    recipe.write_text(f'{begin}{meet}print("resumed{end}')
    document = yaml.safe_load(grid_to_run.read_text()) | {"vary": {}, "grid": {"seed": [1, 2, 3]}}
    grid_to_run.write_text(yaml.safe_dump(document))
    grid = read_grid(grid_to_run)
    run_cells(grid, cells(grid), at_once=2)
    assert all(cell.finished() for cell in cells(grid))


def test_sigterm_ends_the_cell_too(grid_to_run, repo_root, tmp_path):
    """As Ctrl-C does: the launcher, the recipe that it started, and the script."""
    grid_to_run.write_text(yaml.safe_dump(yaml.safe_load(grid_to_run.read_text()) | {"vary": {}, "grid": {}}))
    (cell,) = cells(read_grid(grid_to_run))
    (grid_to_run.parent / "hang").touch()
    command = [sys.executable, "scripts/run_ablation.py", "--config", str(grid_to_run)]
    process = subprocess.Popen(command, cwd=repo_root, stderr=subprocess.PIPE, text=True)
    while not (cell.folder / "checkpoint-1/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2  # launcher and recipe
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip().endswith("Interrupted. The same command continues from the last checkpoint.")
    assert "Traceback" not in said
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_an_interrupted_cell_continues_from_its_checkpoint(grid_to_run, repo_root):
    document = yaml.safe_load(grid_to_run.read_text()) | {"vary": {}, "grid": {}}
    grid_to_run.write_text(yaml.safe_dump(document))
    (cell,) = cells(read_grid(grid_to_run))
    hang = grid_to_run.parent / "hang"
    hang.touch()
    code = f"from vlmcap.experiments.ablation import *; run_grid(read_grid({str(grid_to_run)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repo_root, start_new_session=True)
    while not (cell.folder / "checkpoint-1/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert cell.state()["status"] == "running"
    hang.unlink()
    run_grid(read_grid(grid_to_run))
    assert cell.finished()
    log = (cell.folder / "log.txt").read_text()
    assert "resumed from None" in log and log.rstrip().endswith("resumed from latest")
    assert json.loads((cell.folder / "cell.json").read_text())["returncode"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vari": {}}, r"grid.yaml: \['vari'\] is not known"),
        ({"vary": {"lora_r": 8}}, "vary.lora_r must be a list of values, but is 8"),
        ({"grid": None}, "grid must be a mapping, but is None"),
        ({"config": "nowhere.yaml"}, "config nowhere.yaml is not a file"),
        ({"scores": ["bleu_9"]}, r"scores must be a list of some of bleu_1, .*, but is \['bleu_9'\]"),
        ({"scores": "bleu_1"}, "scores must be a list of some of bleu_1, .*, but is 'bleu_1'"),
        ({"trained": ["model"]}, r"trained must be the name of a folder, but is \['model'\]"),
        ({"config": 3}, "config must be the name of a file, but is 3"),
        ({"output_dir": None}, "output_dir must be the name of a folder, but is None"),
        ({"scores": [["bleu_1"]]}, r"scores must be a list of some of"),
        ({"launch": "--cpu"}, "launch must be a list of words, but is '--cpu'"),
        ({"settings": {3: 4}}, "settings must be a mapping, but is {3: 4}"),
        ({7: 8}, r"grid.yaml: \[7\] is not known"),
    ],
)
def test_a_wrong_grid_is_named(grid_file, change, message):
    grid_file.write_text(yaml.safe_dump(yaml.safe_load(grid_file.read_text()) | change))
    with pytest.raises(AblationError, match=message):
        read_grid(grid_file)


@pytest.mark.parametrize("name", ["ablation", "ablation_demo"])
def test_the_grids_of_the_project_vary_keys_of_their_config(repo_root, monkeypatch, name):
    monkeypatch.chdir(repo_root)
    grid = read_grid(f"recipes/configs/sft_qwen2vl_jp/{name}.yaml")
    assert set(grid.vary) == {
        "lora_r",
        "lora_top_layers",
        "train_projector",
        "label_smoothing_factor",
        "max_pixels",
    }
    config = yaml.safe_load(Path(grid.config).read_text(encoding="utf-8"))
    assert set(grid.vary) | set(grid.grid) <= set(config)
    assert len(cells(grid)) == len(grid.grid["seed"]) * (1 + sum(map(len, grid.vary.values())))


def test_cells_that_would_share_a_folder_are_refused(grid_file):
    document = yaml.safe_load(grid_file.read_text())
    for values in (["a b", "a,b"], [7, 7]):
        grid_file.write_text(yaml.safe_dump(document | {"vary": {"note": values}}))
        with pytest.raises(AblationError, match="would share .*note=.*run them in grids of their own"):
            cells(read_grid(grid_file))


def test_a_long_value_gives_a_folder_that_can_be_made(grid_file):
    document = yaml.safe_load(grid_file.read_text()) | {"vary": {"note": ["犬" * 300, "猫" * 300]}}
    grid_file.write_text(yaml.safe_dump(document))
    folders = [cell.folder for cell in cells(read_grid(grid_file))]
    for folder in folders:
        folder.mkdir(parents=True)
    assert len(set(folders)) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": "finished"}'])
def test_a_damaged_state_of_a_cell_is_named(grid_file, content):
    cell = cells(read_grid(grid_file))[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(content)
    with pytest.raises(AblationError, match="cell.json.*Delete .* to run the cell again"):
        run_grid(read_grid(grid_file))
