"""Two processes (gloo on the CPU) train as one does, under DistributedDataParallel and under FSDP."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.invariants.tiny import assert_same_step
from tests.invariants.two_processes import train


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    return train(pictures, tmp_path_factory.mktemp("alone"))


@pytest.fixture
def in_two_processes(repo_root, pictures, tmp_path):
    def run(**settings) -> dict:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "tests.invariants.two_processes", str(pictures), str(tmp_path), json.dumps(settings)]
        environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "result.pt")

    return run


def assert_equal(two, alone):
    steps = len(two["losses"])
    assert two["losses"] == pytest.approx(alone["losses"][:steps], rel=1e-5)
    first = ((run["losses"][0], run["gradients"]) for run in (two, alone))
    assert_same_step(*first, loss_tolerance=1e-5)


def test_ddp_is_one_process(in_two_processes, alone):
    """Three images a process, one by one, each with its own number of captions and lengths: the loss is a mean over
    the tokens of all of them, in every one of three steps."""
    two = in_two_processes(per_device_train_batch_size=1, gradient_accumulation_steps=3)
    assert two["wrapper"] == "DistributedDataParallel" and len(two["losses"]) == 3
    assert_equal(two, alone)


def test_fsdp_is_one_process(in_two_processes, alone):
    """The forward goes through the wrapped model, so that FSDP gathers what it needs and scatters the gradients."""
    two = in_two_processes()
    assert two["wrapper"] == "FSDPPeftModelForCausalLM"
    assert_equal(two, alone)
