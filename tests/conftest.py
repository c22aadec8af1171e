"""The tests' world: no network, a hub of our own, no trace in the user's caches.

huggingface_hub, datasets and transformers read their endpoint and cache paths when they are imported, so the
environment is set here, before any of them is. Child processes inherit it and so talk to the same hub.
"""

import atexit
import multiprocessing.forkserver
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.faults import ranks
from tests.local_hub import Hub
from vlmcap.errors import UserError
from vlmcap.places import find_uv

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
    "HF_HUB_ETAG_TIMEOUT": "600",  # seconds; the hub of the tests may share a busy machine
    "HF_HUB_DOWNLOAD_TIMEOUT": "600",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": "127.0.0.1,localhost",  # a proxy of the machine must not be between a client and the hub
    "no_proxy": "127.0.0.1,localhost",
}


def processor_flags() -> set[str]:
    """Instruction sets of an x86 processor under Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


# What `make test` leaves out (--quick): tests below a place in tests/ that use a fixture ("": all there), and why.
SLOW = [
    ("", "browser", "Chromium"),
    ("", "java", "Java"),
    ("", "compiler", "a C++ compiler"),
    ("", "environments", "a package index"),
    ("", "data_dir", "real data"),
    ("", "overlay", "a package index"),
    ("", "fresh_python", "Python started anew"),
    ("", "grid_to_run", "launched recipes"),
    ("data/", "run_script", "Python started anew"),
    ("evaluation/", "run_script", "Python started anew"),
    ("human/", "run_script", "Python started anew"),
    ("captioning/test_baselines_script.py", "run_script", "Python started anew"),
    ("steps/test_export.py", "run_script", "Python started anew"),
    ("captioning/test_caption_script.py", "run_script", "Python started anew"),
    ("recipes/", "run_script", "launched recipes"),
    ("recipes/test_wheel.py", "python", "launched recipes"),
    ("recipes/test_notebook.py", "", "launched recipes"),
    ("test_startup.py", "answers", "Python started anew"),
    ("reporting/test_snippets.py", "adapter", "models that cards load"),
    ("reporting/test_caption_space.py", "adapter", "models that cards load"),
    ("experiments/test_bench.py", "run_script", "a benchmark"),
    ("experiments/test_gpu_check.py", "run_script", "a benchmark"),
    ("experiments/test_serving.py", "server", "Python started anew"),
    ("training/test_validation.py", "", "whole training runs"),
    ("training/test_trackers.py", "make", "whole training runs"),
    ("invariants/test_precision.py", "", "whole training runs"),
    ("data/test_fetch.py", "", "processes killed or stopped"),
    ("invariants/test_processes.py", "", "training in several processes"),
    ("invariants/test_processors.py", "", "training in several processes"),
    ("faults/test_hub.py", "", "every fault of the Hub"),
    ("faults/test_training.py", "", "processes killed or stopped"),
    ("faults/test_processes.py", "", "processes killed or stopped"),
    ("faults/test_predictions.py", "", "processes killed or stopped"),
    ("faults/test_builds.py", "", "processes killed or stopped"),
    ("faults/test_secrets.py", "", "a search of all files of a run"),
    ("fuzz/", "", "fuzzing"),
]
# `make test-all` (--complete) fails a test that is skipped, except for what nobody can install.
MAY_BE_SKIPPED = ("needs real data", "this kernel ", "this processor ")
LEFT_OUT: Counter[str] = Counter()


def pytest_addoption(parser):
    group = parser.getgroup("vlmcap")
    group.addoption("--quick", action="store_true", help="leave out what takes long or needs more than Python")
    group.addoption("--complete", action="store_true", help="fail a test that is skipped because a tool is missing")


def pytest_collection_modifyitems(config, items):
    why = {item: slow(item) for item in items}
    items.sort(key=lambda item: why[item] is None)  # the longest first: no process waits for another at the end
    if not config.getoption("quick"):
        return
    LEFT_OUT.update(filter(None, why.values()))
    left_out, items[:] = ([item for item in items if (why[item] is None) is kept] for kept in (False, True))
    config.hook.pytest_deselected(items=left_out)


def slow(item) -> str | None:
    """Why a quick run leaves a test out; None if it does not."""
    path = item.path.relative_to(REPO_ROOT / "tests").as_posix()
    rules = (why for place, name, why in SLOW if path.startswith(place) and (not name or name in item.fixturenames))
    return next(rules, None)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Every process of pytest-xdist collects, and leaves out, the same."""
    LEFT_OUT.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - LEFT_OUT)


def pytest_unconfigure(config):
    """The last line of a quick run."""
    if LEFT_OUT and not hasattr(config, "workeroutput"):
        counts = ", ".join(f"{why} ({count})" for why, count in LEFT_OUT.most_common())
        total = sum(LEFT_OUT.values())
        config.get_terminal_writer().line(f"Left out, {total} tests: {counts}. `make test-all` runs everything.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.config.getoption("complete") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(MAY_BE_SKIPPED):
            report.outcome, report.longrepr = "failed", f"--complete, and this would be skipped: {reason}"
    return report


# Hypothesis fails an example that takes 0.2 s, and a draw that takes 1 s: on a busy machine any does.
settings.register_profile("vlmcap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vlmcap")


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
def java() -> str:
    """The path of Java, for METEOR and the PTB tokenizer."""
    return shutil.which("java") or pytest.skip("needs Java: no `java` on the PATH")


@pytest.fixture(scope="session")
def compiler() -> str:
    """The path of a C++ compiler, which FlexAttention needs on a CPU."""
    return shutil.which("c++") or pytest.skip("needs a C++ compiler: no `c++` on the PATH")


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
def overlay(repo_root, tmp_path_factory):
    """overlay("gradio==6.31.0"): a folder for PYTHONPATH with packages that are not in our environment.

    gradio and trackio need an older Pillow than constraints.txt has, wandb is large. What they need beside it has the
    versions of our environment.
    """
    constraints = tmp_path_factory.mktemp("overlays") / "constraints.txt"
    pins = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("pillow==")))

    @cache
    def overlay(*packages: str) -> str:
        folder = constraints.with_name(re.sub(r"\W+", "-", "-".join(packages)))
        try:
            command = [find_uv(), "pip", "install", "--quiet", "--target", folder, "--constraint", constraints]
        except UserError as error:
            pytest.skip(str(error))
        command += ["--python", sys.executable, *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"uv cannot install {packages[0]} here: {done.stderr.strip()[-300:]}")
        return str(folder)

    return overlay


@pytest.fixture(scope="session")
def run_script(repo_root, tmp_path_factory):
    """run_script("eval_captioning.py", "--output", path): a script in a process of its own, as a user starts it.

    The name is a file of scripts/, or a path from the repository's root. Fails, with what the script printed,
    unless it exits with `expect`. The process is a fork of one that has imported torch and the rest; `fresh`
    starts Python again, for variables in `env` that libraries read when they are imported.
    """
    multiprocessing.forkserver.ensure_running()  # before a test changes the environment, which the server inherits

    def run(name: str, *args, expect: int = 0, env: dict | None = None, fresh: bool = False):
        path = repo_root / (name if "/" in name else f"scripts/{name}")
        words, environment = list(map(str, args)), os.environ | (env or {})
        if fresh:
            return finished([path, *words], expect, cwd=repo_root, env=environment)
        out, err = (tmp_path_factory.mktemp("script") / name for name in ("stdout", "stderr"))
        status = ranks.run_file(path, *words, folder=repo_root, environment=environment, out=out, err=err)
        printed = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
        return checked(subprocess.CompletedProcess([path, *words], status, *printed), expect)

    return run


@pytest.fixture(scope="session")
def fresh_python():
    """fresh_python(code, *words): what a new Python prints that runs this code with these words in sys.argv.

    For tests whose subject is that nothing was imported before. They take seconds, and a quick run leaves them out.
    """

    def run(code: str, *words: str, folder: Path | None = None, env: dict | None = None) -> str:
        return finished(["-c", code, *words], 0, cwd=folder, env=os.environ | (env or {})).stdout

    return run


def finished(command: list, expect: int, **where) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *command], **where, capture_output=True, text=True, errors="replace")
    return checked(done, expect)


def checked(done: subprocess.CompletedProcess, expect: int) -> subprocess.CompletedProcess:
    if done.returncode != expect:
        output = f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        message = f"{' '.join(map(str, done.args))}\nexited with {done.returncode}, not {expect}\n{output}"
        pytest.fail(message, pytrace=False)
    return done
