"""One process of several fails: the others end when they are asked to, and the launcher's error has its traceback.

What takes seconds to import is imported where it is needed: every fault starts three processes of this module.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate import PartialState
from filelock import FileLock

from tests.faults import ranks

KILLED = "forcefully exiting via"  # what the launcher says of a process that does not end within 30 s of its SIGTERM


def fail(folder: Path, how: str) -> None:
    """Ends this process, by an exception or by SIGKILL, and says that this line was reached."""
    (folder / "failed").touch()
    if how == "kill -9":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("no such picture")


def rank() -> int:
    return int(os.environ["RANK"])


def before_the_group(folder: Path, how: str) -> None:
    if rank() == 1:
        time.sleep(0.5)
        fail(folder, how)
    PartialState(cpu=True)


def reading_data_first(folder: Path, how: str) -> None:
    with PartialState(cpu=True).main_process_first():
        if rank() == 0:
            time.sleep(0.5)
            fail(folder, how)


def holding_a_lock(folder: Path, how: str) -> None:
    """As features are cached: one computes, the others wait for it at the lock and then for all at a barrier."""
    PartialState(cpu=True)
    if rank() == 1:
        time.sleep(0.3)
    with FileLock(folder / "lock"):
        if rank() == 0:
            time.sleep(0.8)
            fail(folder, how)
    PartialState().wait_for_everyone()


def beside_a_lock(folder: Path, how: str) -> None:
    PartialState(cpu=True)
    if rank() == 1:
        time.sleep(0.8)
        fail(folder, how)
    with FileLock(folder / "lock"):
        time.sleep(100)


def training(folder: Path, how: str) -> None:
    """In the second step, between forward passes that wait for each other's gradients."""
    from transformers import TrainerCallback

    from tests.invariants import tiny

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1 and rank() == 1:
                fail(folder, how)

    trainer = tiny.build_trainer(
        folder, tiny.read_pictures(folder), per_device_train_batch_size=1, max_steps=50, disable_tqdm=True
    )
    trainer.add_callback(Fail())
    trainer.train()


def captioning(folder: Path, how: str) -> None:
    import datasets

    from vlmcap.captioning.predictions import PredictionsFile, write_captions

    PartialState(cpu=True)
    rows = datasets.Dataset.from_dict({"image_id": list(range(9))})

    def caption(numbers, files):
        for number in numbers:
            if rank() == 1 and number == 4:
                fail(folder, how)
            yield ["画像"]

    record = {"model": {}, "dataset": {}, "saw": {}, "prompt": "何?", "decoding": {"batch_size": 1}}
    write_captions(caption, rows, [PredictionsFile(folder / "predictions.jsonl", record)], lambda: None)


# Where one of three processes fails, and how.
FAULTS = [
    (before_the_group, "exception"),
    (reading_data_first, "kill -9"),
    (holding_a_lock, "kill -9"),
    (beside_a_lock, "exception"),
    (training, "exception"),
    (training, "kill -9"),
    (captioning, "kill -9"),
]


@pytest.mark.parametrize(("place", "how"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_others_end(fault, repo_root, tmp_path, place, how):
    """Under the agent that `accelerate launch` and torchrun share."""
    from tests.invariants import tiny

    tiny.write_pictures(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command += ["-m", "tests.faults.test_processes", place.__name__, str(tmp_path), how]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with fault(f"{how} of one process of three: {place.__name__}"):
        done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and (tmp_path / "failed").exists(), done.stderr[-4000:]
        assert KILLED not in done.stderr, done.stderr[-4000:]
        assert not ranks.processes_of(str(tmp_path))
        assert ("RuntimeError: no such picture" if how == "exception" else "Signal 9 (SIGKILL)") in done.stderr


TRAIN = """
import json, os, sys, time
from pathlib import Path
from accelerate import PartialState

state, here = PartialState(cpu=True), Path(sys.argv[0]).parent
assert sys.argv[1:] == ["--config", "a b.yaml", "--resume_from_checkpoint", "latest"], sys.argv
print(f"process {state.process_index} of {state.num_processes}, local {state.local_process_index}", flush=True)
(here / f"ready.{state.process_index}").touch()
if (here / "fail").exists() and state.process_index == 1:
    raise RuntimeError("no such picture")
if (here / "wait").exists():
    import signal
    def stop(*_):
        (here / f"saved.{state.process_index}").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    while True:
        time.sleep(0.05)
state.wait_for_everyone()
"""
# Starts what it is given once a node and hands signals on; the first failure ends all, as --kill-on-bad-exit has it.
SRUN = """
import os, signal, subprocess, sys, time

assert sys.argv[1] == "--kill-on-bad-exit=1"
nodes = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {"SLURM_NODEID": str(node)}, start_new_session=True)
    for node in range(2)
]
def signal_all(number, *_):
    for node in nodes:
        node.send_signal(number)
signal.signal(signal.SIGTERM, signal_all)
while any(node.poll() is None for node in nodes):
    if any(node.poll() for node in nodes):
        signal_all(signal.SIGTERM)
        break
    time.sleep(0.1)
sys.exit(max(abs(node.wait()) for node in nodes))
"""


@pytest.fixture
def slurm(repo_root, tmp_path):
    """slurm(): slurm.sbatch started with two "machines" on this one, one process each, by a stand-in for srun."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "srun.py").write_text(SRUN)
    (tools / "srun").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/srun.py "$@"\n')
    scontrol = f'#!/bin/sh\ncase $1 in show) echo 127.0.0.1; echo other;; *) echo "$@" >> {tmp_path}/scontrol;; esac\n'
    (tools / "scontrol").write_text(scontrol)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = ranks.free_port() - 20000
    place = {"SLURM_JOB_ID": job % 20000, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_GPUS_ON_NODE": 1}
    place |= {"ACCELERATE_USE_CPU": "true", "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start() -> subprocess.Popen:
        command = ["bash", "accelerate_configs/slurm.sbatch", str(tmp_path / "train.py"), "--config", "a b.yaml"]
        environment = os.environ | {name: str(value) for name, value in place.items()}
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=repo_root, env=environment, stdout=log, stderr=log)

    return start


def test_slurm_starts_a_launcher_a_machine(slurm, tmp_path):
    assert slurm().wait() == 0, ranks.tail(tmp_path / "log")
    said = (tmp_path / "log").read_text(
        errors="replace"
    )  # torch may print long warnings when a process ends before another
    assert "process 0 of 2, local 0" in said and "process 1 of 2, local 0" in said
    assert not (tmp_path / "scontrol").exists()


def test_slurm_ends_all_machines_when_one_fails(fault, slurm, tmp_path):
    (tmp_path / "fail").touch()
    with fault("exception on one machine of two under SLURM"):
        assert slurm().wait() != 0
        assert "RuntimeError: no such picture" in (tmp_path / "log").read_text(errors="replace")
        assert not (tmp_path / "scontrol").exists(), "a failed job is not queued again"


def test_slurm_queues_a_stopped_job_again(fault, slurm, tmp_path):
    (tmp_path / "wait").touch()
    with fault("SIGTERM to a SLURM job on two machines"):
        job = slurm()
        while len(list(tmp_path.glob("ready.*"))) < 2:
            assert job.poll() is None, ranks.tail(tmp_path / "log")
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.wait() != 0
        assert len(list(tmp_path.glob("saved.*"))) == 2, ranks.tail(tmp_path / "log")
        assert re.fullmatch(r"requeue \d+\n", (tmp_path / "scontrol").read_text())


def test_skypilot_starts_a_launcher_a_machine(repo_root, tmp_path):
    """Its `run`, with a stand-in for accelerate."""
    task = yaml.safe_load((repo_root / "accelerate_configs/skypilot.yaml").read_text(encoding="utf-8"))
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f"PATH={tools}:$PATH\n")
    (tools / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tools / "accelerate").chmod(0o755)
    place = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}
    place |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"} | task["envs"]
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | place, capture_output=True, text=True, check=True
    )
    words = done.stdout.split()
    assert words[:3] == ["launch", "--config_file", "accelerate_configs/ddp.yaml"]
    options = dict(zip(words[3:13:2], words[4:13:2], strict=True))
    assert options == {
        "--num_machines": "2",
        "--machine_rank": "1",
        "--num_processes": "8",
        "--main_process_ip": "10.0.0.1",
        "--main_process_port": "29500",
    }
    assert words[13:] == [
        *("recipes/sft_qwen2vl_jp.py", "--config", "recipes/configs/sft_qwen2vl_jp/base.yaml"),
        *("--output_dir", "/outputs/run", "--resume_from_checkpoint", "latest"),
    ]


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
