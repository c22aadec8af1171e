"""Training that ends at any moment and resumes: its result is that of the uninterrupted run, bit for bit.

The runs are in tests/faults/training_runs.py: ten steps of two micro-batches, four steps an epoch, checkpoints after
steps 3, 6, 9 and 10 of which one is kept, a log line every other step (so that some checkpoints are between two).
"""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.faults import ranks, training_runs
from tests.invariants import tiny
from vlmcap.training import checkpoints

VALIDATED = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
}
# What is trained, and how.
RUNS = {
    "shared prefix": {"kind": "shared prefix"},
    "one caption a sequence": {"kind": "one caption a sequence"},
    "cached features": {"kind": "cached features"},
    "GradScaler": {"kind": "shared prefix", "scaler": True},
    "early stopping, best checkpoint": {"kind": "cached features"} | VALIDATED,
    "captioner": {"kind": "captioner"},
    "captioner, best by loss": {"kind": "captioner", "metric_for_best_model": "loss"} | VALIDATED,
    "preferences": {"kind": "preferences", "eval_strategy": "steps", "eval_steps": 3},
    "two workers": {"kind": "shared prefix", "dataloader_num_workers": 2},
}


@pytest.fixture(scope="module")
def start():
    """start(function, *args, **kwargs): a process that runs it, forked from one that has imported everything."""

    def start(function, *args, **kwargs):
        process = ranks.FORKS.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder)
    tiny.write_preferences(folder)
    return folder


@pytest.fixture(scope="module")
def run(start, pictures):
    """run(kind, folder, ...): exit status of a recipe."""

    def run(kind: str, folder: Path, **more) -> int:
        process = start(training_runs.recipe, kind, pictures, folder, **more)
        process.join()
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """whole(kind, ...): folder of the uninterrupted run."""
    folders = {}

    def whole(kind: str, **more) -> Path:
        key = json.dumps([kind, more], sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole")
            assert run(kind, folders[key], **more) == 0, said(folders[key])
        return folders[key]

    return whole


def said(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in training_runs.tree(folder).items() if name.endswith(".safetensors")}


def batches(folder: Path) -> dict[int, list[str]]:
    """Batches of each step, as it was taken last: those of a step that was not finished come again."""
    lines = [line.split() for line in (folder / "trace.txt").read_text().splitlines()]
    steps = {}
    for number, (step, digest) in enumerate(lines):
        if number and int(lines[number - 1][0]) > int(step):
            steps = {earlier: found for earlier, found in steps.items() if earlier < int(step)}
        steps.setdefault(int(step), []).append(digest)
    return steps


def assert_same_run(folder: Path, expected: Path) -> None:
    result, wanted = (json.loads((path / "result.json").read_text()) for path in (folder, expected))
    assert result["log"] == wanted["log"]
    assert result == wanted
    assert weights(folder / "run/trained") == weights(expected / "run/trained") != {}
    assert batches(folder) == batches(expected)


@pytest.mark.parametrize("name", RUNS)
def test_killed_twice_and_the_same_to_the_last_bit(run, whole, tmp_path, fault, name):
    """In step 6, after checkpoint-3 inside the first epoch, and in step 9, after checkpoint-6 inside the second."""
    expected = whole(**RUNS[name])
    steps = json.loads((expected / "result.json").read_text())["steps"]
    assert steps == (9 if name == "early stopping, best checkpoint" else 10)
    with fault(f"kill -9 in steps 6 and 9: {name}"):
        assert run(folder=tmp_path, kill_in=5, **RUNS[name]) == -signal.SIGKILL
        assert run(folder=tmp_path, kill_in=8, resume="latest", **RUNS[name]) == -signal.SIGKILL
        assert (tmp_path / "run/checkpoint-6").exists()
        assert run(folder=tmp_path, resume="latest", **RUNS[name]) == 0, said(tmp_path)
        assert_same_run(tmp_path, expected)
    # And what is done stays done, though max_steps is inside an epoch.
    shutil.rmtree(tmp_path / "run/trained")
    assert run(folder=tmp_path, resume="latest", **RUNS[name]) == 0, said(tmp_path)
    assert weights(tmp_path / "run/trained") == weights(expected / "run/trained")


def test_killed_before_the_first_checkpoint(run, whole, tmp_path, fault):
    with fault("kill -9 in step 2"):
        assert run("shared prefix", tmp_path, kill_in=1, resume="latest") == -signal.SIGKILL
        assert run("shared prefix", tmp_path, resume="latest") == 0
        assert "No checkpoint in" in said(tmp_path)
        assert_same_run(tmp_path, whole("shared prefix"))


def test_killed_at_every_write(start, run, pictures, tmp_path, fault):
    """Of a step with its checkpoint, the deletion of the one before, and `save_trained`. Two workers share it."""
    changes = {"max_steps": 6, "save_steps": 5}
    expected, base = tmp_path / "whole", tmp_path / "base"
    assert run("shared prefix", expected, **changes) == 0
    assert run("shared prefix", tmp_path / "half", kill_in=5, **changes) == -signal.SIGKILL
    (tmp_path / "half/run").rename(base)
    # Captions of other weights are there, from an earlier run.
    (base / "trained").mkdir()
    (base / "trained/predictions.jsonl").write_text("{}")
    workers = [
        start(training_runs.kill_in_every_write, pictures, tmp_path / str(first), base, first, 2, **changes)
        for first in (1, 2)
    ]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    reports = [(tmp_path / str(first) / "report.jsonl").read_text().splitlines() for first in (1, 2)]
    killed = sorted((json.loads(line) for lines in reports for line in lines), key=lambda line: line["write"])
    told = " ".join(line["told"] for line in killed)
    for moment in (
        "os.mkdir checkpoint-6",
        "os.rename checkpoint-6",
        "os.rename checkpoint-5",
        "os.rmdir",
        "training",
    ):
        assert moment in told
    wanted = json.loads((expected / "result.json").read_text())
    trained = weights(expected / "run/trained")
    assert {line["from"] for line in killed} == {"checkpoint-5", "checkpoint-6"}
    for line in killed:
        with fault(f"kill -9 before write {line['write']}: {line['told']}"):
            assert (line["kill"], line["status"]) == (-signal.SIGKILL, 0)
            assert line["result"] == wanted
            files = line["files"]
            # Killed between rename and deletion, the old checkpoint is left to the next deletion.
            between = (
                line["told"] in ("os.mkdir unfinished", "os.rename checkpoint-5") and line["from"] != "checkpoint-5"
            )
            left = {"checkpoint-6", "trained"} | ({"checkpoint-5"} if between else set())
            assert {name.split("/")[0] for name in files} == left
            assert trained.items() <= {name.removeprefix("trained/"): files[name] for name in files}.items()
            assert "trained/training.json" in files and "trained/predictions.jsonl" not in files
            assert not [name for name in files if "training_args" in name]


@pytest.mark.parametrize("kill", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "tokenizer.json"])
def test_a_file_that_is_cut_off(run, whole, tmp_path, fault, name, kill):
    """The kernel ends the process in the middle of the file's write, or lets that fail, as where the disk is full."""
    expected = whole("shared prefix", disable_tqdm=True, report_to="none")
    assert run("shared prefix", tmp_path, kill_in=5) == -signal.SIGKILL
    size = (tmp_path / "run/checkpoint-3" / name).stat().st_size
    shutil.copytree(tmp_path / "run/checkpoint-3", tmp_path / "before")
    with fault(f"{'kill -9' if kill else 'no space'} in the middle of {name}"):
        status = run("shared prefix", tmp_path, resume="latest", size_limit=size * 2 // 3, kill=kill)
        assert status == (-signal.SIGXFSZ if kill else 1), said(tmp_path)
        if not kill:
            line = said(tmp_path).splitlines()[-1]
            assert line.startswith("error: checkpoint-6 could not be written: ")
            assert "bytes free. Earlier ones are as they were: free space, then continue with --resume_from" in line
            assert not list((tmp_path / "run/unfinished").iterdir())
        assert training_runs.tree(tmp_path / "run/checkpoint-3") == training_runs.tree(tmp_path / "before")
        assert run("shared prefix", tmp_path, resume="latest") == 0, said(tmp_path)
        assert_same_run(tmp_path, expected)
        assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-10", "trained"]


def test_a_full_disk(start, pictures, whole, tmp_path, fault):
    """A real one: a file system in memory with room for one checkpoint and a half."""
    expected = whole("shared prefix")
    size = sum(path.stat().st_size for path in (expected / "run/checkpoint-10").iterdir())
    folder = tmp_path / "small"
    process = start(training_runs.on_small_disk, pictures, folder, size * 3 // 2)
    process.join()
    if process.exitcode == 77:
        pytest.skip("this kernel lets no user mount; test_a_file_that_is_cut_off has writes that fail")
    with fault("ENOSPC in a checkpoint"):
        assert process.exitcode == 0, said(folder)
        full = json.loads((folder / "full.json").read_text())
        assert full["status"] == 1 and full["left"] == {"checkpoint-3": None}
        assert full["said"].startswith("error: checkpoint-6 could not be written: ")
        assert "bytes free. Earlier ones are as they were: free space, then" in full["said"]
        assert json.loads((folder / "result.json").read_text()) == json.loads((expected / "result.json").read_text())
        assert weights(folder / "trained") == weights(expected / "run/trained")


@pytest.mark.parametrize(
    ("name", "when", "step", "stop"),
    [
        ("shared prefix", {"stop_at": 4}, 5, signal.SIGTERM),
        ("captioner, best by loss", {"stop_at": 4}, 5, signal.SIGINT),
        ("captioner, best by loss", {"stop_in_validation": 6}, 6, signal.SIGTERM),
        ("preferences", {"stop_in_validation": 6}, 6, signal.SIGTERM),
    ],
)
def test_sigterm_and_ctrl_c(run, whole, tmp_path, fault, name, when, step, stop):
    with fault(f"{stop.name}: {name}, {when}"):
        assert run(folder=tmp_path, stops=(stop,), **when, **RUNS[name]) == 128 + stop
        message = f"checkpoint-{step} after step {step} of 10. The same command with --resume_from_checkpoint latest"
        assert message in said(tmp_path)
        assert not (tmp_path / "run/trained").exists()
        assert run(folder=tmp_path, resume="latest", **RUNS[name]) == 0
        assert_same_run(tmp_path, whole(**RUNS[name]))


def test_a_second_ctrl_c_ends_at_once(run, tmp_path, fault):
    with fault("Ctrl-C twice in step 5"):
        twice = (signal.SIGINT, signal.SIGINT)
        assert run("shared prefix", tmp_path, stop_at=4, stops=twice) == -signal.SIGINT
        assert said(tmp_path).count("Ctrl-C: saving at the end of this step; a second Ctrl-C") == 1
        assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-3"]


def test_a_run_resumes_in_another_folder(run, whole, tmp_path, fault):
    """The best model so far stays where it was made, and is found from there."""
    name = "early stopping, best checkpoint"
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    with fault("SIGTERM, continued in another folder, SIGTERM, continued there"):
        assert run(folder=begun, stop_at=6, **RUNS[name]) == 143
        assert run(folder=moved, resume=str(begun / "run/checkpoint-7"), stop_at=7, **RUNS[name]) == 143
        assert "checkpoint-8 after step 8" in said(moved)
        assert run(folder=moved, resume="latest", **RUNS[name]) == 0
        assert "Skipped" not in said(moved)
        assert weights(moved / "run/trained") == weights(whole(**RUNS[name]) / "run/trained") != {}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_too(start, pictures, run, whole, tmp_path, fault, stop):
    """As schedulers and scripts/run_ablation.py send SIGTERM, and a terminal Ctrl-C: to every process of a job."""
    settings, hold = RUNS["two workers"], tmp_path / "hold"
    hold.touch()
    process = start(training_runs.recipe, pictures=pictures, folder=tmp_path, hold=hold, **settings)
    with fault(f"{stop.name} to training and its data workers"):
        trace = tmp_path / "trace.txt"
        while not trace.exists() or len(trace.read_text().splitlines()) < 3:
            assert process.is_alive()
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        for member in [*family, psutil.Process(process.pid)]:
            member.send_signal(stop)
        hold.unlink()
        process.join()
        assert process.exitcode == 128 + stop, said(tmp_path)
        assert not [member for member in family if member.is_running()]
        assert run(folder=tmp_path, resume="latest", **settings) == 0
        assert_same_run(tmp_path, whole(**settings))


def test_two_processes_stop_at_one_step_and_resume(start, pictures, tmp_path, fault):
    """Ctrl-C reaches one of them alone; the run that resumes is bit for bit that of two that nobody disturbed."""

    def both(folder: Path, stop_at: int | None = None, **more) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            start(
                training_runs.recipe,
                "shared prefix",
                pictures,
                folder,
                rank=(rank, 2, port),
                stop_at=stop_at if rank == 1 else None,
                stops=(signal.SIGINT,),
                gradient_accumulation_steps=1,
                **more,
            )
            for rank in (0, 1)
        ]
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    assert both(tmp_path / "whole") == [0, 0], said(tmp_path / "whole")
    with fault("Ctrl-C to one of two processes"):
        folder = tmp_path / "stopped"
        assert both(folder, stop_at=4) == [130, 130], said(folder)
        assert both(folder, resume="latest") == [0, 0], said(folder)
        result, wanted = (json.loads((path / "result.json").read_text()) for path in (folder, tmp_path / "whole"))
        assert result == wanted
        assert weights(folder / "run/trained") == weights(tmp_path / "whole/run/trained") != {}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_pickle_that_is_not_a_tensor_is_not_loaded(run, whole, tmp_path, fault, name):
    """Even one whose manifest was written to fit."""
    shutil.copytree(whole("shared prefix", scaler=True) / "run/checkpoint-10", tmp_path / "run/checkpoint-10")
    folder, touched = tmp_path / "run/checkpoint-10", tmp_path / "touched"
    (folder / name).write_bytes(f"cos\nsystem\n(S'touch {touched}'\ntR.".encode())
    manifest = checkpoints.read_manifest(folder)
    (folder / checkpoints.MANIFEST).unlink()
    checkpoints.complete(folder, tmp_path / "run/checkpoint-11", manifest)
    with fault(f"a program as {name}"):
        assert run("shared prefix", tmp_path, scaler=True, resume="latest", max_steps=14) == 1
        assert "holds a pickle of more than tensors and numbers" in said(tmp_path).splitlines()[-1]
        assert not touched.exists()


def test_features_killed_at_every_write(start, pictures, tmp_path, fault):
    process = start(training_runs.kill_in_every_write_of_features, pictures, tmp_path / "cache")
    process.join()
    assert process.exitcode == 0
    lines = (tmp_path / "cache/report.jsonl").read_text().splitlines()
    *killed, uninterrupted = map(json.loads, lines)
    assert len(killed) > 8 and any("index.jsonl" in line["told"] for line in killed)
    for line in killed:
        with fault(f"kill -9 before write {line['write']}: {line['told']}"):
            assert (line["kill"], line["status"]) == (-signal.SIGKILL, 0)
            files = {name: digest for name, digest in line["files"].items() if not name.endswith(".new")}
            assert files == uninterrupted["files"]


def test_no_space_for_features(run, whole, tmp_path, fault):
    expected = whole("cached features")
    size = next((expected / "features").glob("*/features.bin")).stat().st_size
    with fault("no space in the middle of features.bin"):
        assert run("cached features", tmp_path, size_limit=size // 2) == 1
        line = said(tmp_path).splitlines()[-1]
        assert "features.bin cannot be written (File too large)" in line and "are kept: free space" in line
        assert run("cached features", tmp_path) == 0
        assert_same_run(tmp_path, expected)
        assert training_runs.tree(tmp_path / "features") == training_runs.tree(expected / "features")
