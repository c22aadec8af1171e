"""Losses and captions do not depend on what the libraries choose by the processor, or on the number of threads.

torch, MKL, oneDNN and, through torch, bitsandbytes choose kernels by the processor. MeCab and the tokenizers do not,
but the tokenizers may use several threads. Libraries choose once, so that each choice needs a process.
"""

import json
import os
import subprocess
import sys

import pytest

OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, repo_root):
    """run({"ATEN_CPU_CAPABILITY": "avx2"}, 1, 2): the result of `processors.py` for each number of threads."""

    def start(variables: dict[str, str], *threads: int) -> list[dict]:
        folder = tmp_path_factory.mktemp("processors")
        unset = {*OLD, "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # beside other tests, two threads that spin take minutes
        done = subprocess.run(
            [sys.executable, "-m", "tests.invariants.processors", str(folder), *map(str, threads)],
            cwd=repo_root,
            env=environment | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((folder / f"{number}.json").read_text(encoding="utf-8")) for number in threads]

    return start


@pytest.fixture(scope="module")
def one_and_two_threads(run):
    return run({"TOKENIZERS_PARALLELISM": "true"}, 1, 2)


def assert_same(found, expected):
    """Losses to the four digits that training prints; captions and scores are equal."""
    assert len(expected["losses"]) == 4 and expected["losses"][-1] < expected["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert len(set(expected["captions"])) > 1
    assert found["captions"] == expected["captions"]
    assert found["scores"] == expected["scores"]


def test_two_threads(one_and_two_threads):
    one, two = one_and_two_threads
    assert_same(two, one)


def test_a_processor_with_less(run, one_and_two_threads):
    """As on one without AVX; and, where the machine has AVX512, as on one with AVX2. Arm has no such choice."""
    expected, _ = one_and_two_threads
    (old,) = run(OLD, 1)
    assert_same(old, expected)
    if expected["capability"] in ("AVX2", "AVX512"):
        assert old["capability"] == "DEFAULT"
    if expected["capability"] == "AVX512":
        (avx2,) = run(AVX2, 1)
        assert avx2["capability"] == "AVX2"
        assert_same(avx2, expected)
