"""The tests' world: no network, a hub of our own, no trace in the user's caches.

huggingface_hub, datasets and transformers read their endpoint and cache paths when they are imported, so the
environment is set here, before any of them is. Child processes inherit it and so talk to the same hub.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.local_hub import Hub

REPO_ROOT = Path(__file__).resolve().parent.parent
WORLD = Path(tempfile.mkdtemp(prefix="vlmcap-tests-"))
atexit.register(shutil.rmtree, WORLD, ignore_errors=True)
HUB = Hub(WORLD / "hub").start()

imported = {"huggingface_hub", "datasets", "transformers"} & set(sys.modules)
if imported:
    raise RuntimeError(f"{sorted(imported)} imported before tests/conftest.py: they would not see its HF_ENDPOINT")

# A user's own settings of these would win over HF_HOME or switch the hub off.
OVERRIDES = (
    "HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_ASSETS_CACHE HF_XET_CACHE HF_TOKEN_PATH HF_DATASETS_CACHE HF_MODULES_CACHE "
    "HF_DATASETS_DOWNLOADED_DATASETS_PATH HF_DATASETS_EXTRACTED_DATASETS_PATH HF_HUB_OFFLINE HF_DATASETS_OFFLINE "
    "TRANSFORMERS_OFFLINE TRANSFORMERS_CACHE HUGGING_FACE_HUB_TOKEN HUGGINGFACE_CO_STAGING"
).split()
for name in OVERRIDES:
    os.environ.pop(name, None)
os.environ |= {
    "HF_HOME": str(WORLD / "hf_home"),
    "HF_ENDPOINT": HUB.endpoint,
    "HF_TOKEN": "hf_user_write",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": "127.0.0.1,localhost",  # a proxy of the machine must not stand between a client and the hub
    "no_proxy": "127.0.0.1,localhost",
}


def processor_flags() -> set[str]:
    """Instruction sets of an x86 processor under Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def pytest_terminal_summary(terminalreporter):
    """The sum of what tests/faults counted, in whichever processes its tests ran."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    finished = [report for report in reports if getattr(report, "when", None) == "teardown"]
    faults = [entry for report in finished for kind, entry in report.user_properties if kind == "fault"]
    if faults:
        survived = sum(entry["survived"] for entry in faults)
        terminalreporter.write_line(f"Faults injected: {len(faults)}, survived: {survived}")


@pytest.fixture
def hub():
    """The running hub: no repositories, no faults, an empty log at the start of the test."""
    HUB.reset()
    yield HUB
    HUB.faults.clear()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def miniature_dir(repo_root) -> Path:
    """The committed small Qwen2-VL and its processor."""
    return repo_root / "recipes" / "miniatures" / "qwen2_vl"


@pytest.fixture(scope="session")
def data_dir(repo_root) -> Path:
    """Real third-party data, which the repository does not hold."""
    folder = Path(os.environ.get("VLMCAP_DATA_DIR") or repo_root.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs real data, and there is no {folder}: set VLMCAP_DATA_DIR to a folder that holds it")
    return folder


@pytest.fixture(scope="session")
def qwen2vl_dir(data_dir) -> Path:
    """Tokenizer, chat template, processor settings and config of Qwen2-VL-2B-Instruct; no weights."""
    return data_dir / "qwen2_vl_2b"


# What a processor with AVX512-BF16 says of itself to bitsandbytes; one that has it runs such tests with its own answer
# as well, and so with the real kernels.
@pytest.fixture(params=["flag set", *(["real kernels"] if "avx512_bf16" in processor_flags() else [])])
def repacking_processor(request, monkeypatch) -> None:
    """bitsandbytes repacks 4-bit weights, here and in child processes, where the project does not keep it from it."""
    if request.param == "flag set":
        import bitsandbytes as bnb

        monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
        monkeypatch.setenv("PYTHONPATH", str(REPO_ROOT / "tests/avx512_bf16"))


@pytest.fixture(scope="session")
def run_script(repo_root):
    """run_script("eval_captioning.py", "--output", path): a script in a process of its own, as a user starts it.

    The name is a file of scripts/, or a path from the repository's root. Fails, with what the script printed,
    unless it exits with `expect`.
    """

    def run(name: str, *args, expect: int = 0, timeout: float = 300, env: dict | None = None):
        path = name if "/" in name else f"scripts/{name}"
        command = [sys.executable, path, *map(str, args)]
        environment = os.environ | (env or {})
        done = subprocess.run(
            command, cwd=repo_root, env=environment, timeout=timeout, capture_output=True, text=True, errors="replace"
        )
        if done.returncode != expect:
            output = f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
            pytest.fail(f"{' '.join(command)}\nexited with {done.returncode}, not {expect}\n{output}", pytrace=False)
        return done

    return run
