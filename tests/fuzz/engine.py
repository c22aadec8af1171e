"""Runs targets in processes of their own, with hypothesis and with atheris, and counts (see __main__)."""

import contextlib
import hashlib
import importlib.util
import io
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed

from tests.fuzz.strategies import texts

INPUT_SECONDS = 10
MEMORY = 2**30
# A process dies of the signal when an input takes that much of the processor, in C code too; this long after its time
# it is killed whatever it waits for.
GRACE = 20
FORK = multiprocessing.get_context("fork")


@dataclass
class Failure:
    """One kind of failure: the place it comes from, the text of the exception, and an input that shows it."""

    target: str
    kind: str
    message: str
    input: object
    file: Path | None = None


@dataclass
class Result:
    target: str
    tried: int = 0
    failures: list[Failure] = field(default_factory=list)


class Watch:
    """Counts the inputs of a target, and remembers the one that is being tried, across the death of its process."""

    SIZE = 1 << 20

    def __init__(self):
        self.tried = FORK.Value("Q", 0, lock=False)
        self.length = FORK.Value("Q", 0, lock=False)
        self.memory = FORK.RawArray("c", self.SIZE)

    def begin(self, value: object) -> None:
        data = pickle.dumps(value)[: self.SIZE]
        self.memory[: len(data)] = data
        self.length.value = len(data)
        self.tried.value += 1

    def current(self) -> object:
        try:
            return pickle.loads(self.memory[: self.length.value])
        except Exception:  # longer than SIZE, or the process died as it wrote
            return self.memory[: self.length.value]


def kind_of(error: BaseException) -> str:
    """Type of an exception and the last line of this project that it passed: what makes two failures the same."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    ours = [f for f in frames if "vlmcap" in f.filename] or [f for f in frames if "/fuzz/" in f.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"


def fuzz(
    seconds: float,
    names: list[str] | None,
    jobs: int,
    output_dir: str | Path,
    guided: bool = True,
    inputs: float = math.inf,
) -> int:
    """Fuzzes targets, prints a table, and returns the exit status.

    Args:
        seconds: for all targets together, about.
        inputs: after which each engine is done with a target, also before its time is over.
    """
    guided = guided and importlib.util.find_spec("atheris") is not None
    targets = _load(guided)
    unknown = [name for name in names or () if name not in targets]
    if unknown:
        sys.exit(f"error: no target {unknown[0]}; there are {', '.join(targets)}")
    chosen = names or list(targets)
    _warm_up()
    engines = ("hypothesis", "atheris") if guided else ("hypothesis",)
    share = seconds * jobs / len(chosen) / len(engines)
    print(f"{len(chosen)} targets, {' and '.join(engines)}, {share:.0f} s each, {jobs} at once", flush=True)
    start = time.monotonic()
    results = {name: Result(name) for name in chosen}
    with tempfile.TemporaryDirectory(prefix="vlmcap-fuzz-") as scratch:
        waiting = [(name, engine) for name in chosen for engine in engines]
        running: list[_Run] = []
        while waiting or running:
            while waiting and len(running) < jobs:
                name, engine = waiting.pop(0)
                running.append(_Run(targets[name], engine, share, inputs, Path(scratch) / f"{name}-{engine}"))
            time.sleep(0.1)
            for run in [run for run in running if run.done()]:
                running.remove(run)
                result = results[run.target.name]
                result.tried += run.watch.tried.value
                known = {failure.kind for failure in result.failures}
                result.failures += [f for f in run.failures() if f.kind not in known]
    for result in results.values():
        for failure in result.failures:
            failure.file = _save(failure, Path(output_dir))
    print(table(list(results.values()), time.monotonic() - start))
    return int(any(result.failures for result in results.values()))


def table(results: list[Result], seconds: float) -> str:
    """Inputs tried and failures of each target, the sum, and every failure with the file that holds its input."""
    width = max(len(result.target) for result in results)
    lines = [f"{'target':<{width}} {'inputs tried':>14} {'failures':>9}"]
    lines += [f"{result.target:<{width}} {result.tried:>14,} {len(result.failures):>9}" for result in results]
    tried, failed = sum(result.tried for result in results), sum(len(result.failures) for result in results)
    lines.append(f"{'all':<{width}} {tried:>14,} {failed:>9}  in {seconds:.0f} s")
    for result in results:
        for failure in result.failures:
            lines += ["", f"{failure.target}: {failure.kind}", f"    {failure.message[:500]}", f"    {failure.file}"]
    return "\n".join(lines)


def repeat(path: str | Path) -> None:
    """Tries a saved input once more; its exception comes through."""
    path = Path(path)
    name, given_input = pickle.loads(path.read_bytes())
    with tempfile.TemporaryDirectory(prefix="vlmcap-fuzz-") as scratch:
        _load(False)[name].check(given_input, Path(scratch))
    print(f"{name}: the input passes")


def _load(guided: bool) -> dict:
    """The targets, imported with coverage of the project's code for atheris."""
    warnings.simplefilter("ignore")
    if guided:
        import atheris

        with atheris.instrument_imports(include=["vlmcap", "yaml"]), contextlib.redirect_stderr(io.StringIO()):
            from tests.fuzz.targets import TARGETS
    else:
        from tests.fuzz.targets import TARGETS
    return TARGETS


def _warm_up() -> None:
    """What takes seconds: hypothesis's table of Unicode and its look at our modules, pyvi. Not in every process."""
    from vlmcap.evaluation.tokenise import TOKENIZERS, tokenise

    settings(database=None, max_examples=5, deadline=None)(given(texts())(lambda text: None))()
    for tokenizer in TOKENIZERS:
        tokenise(["猫"], tokenizer)


def _save(failure: Failure, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{failure.target}-{hashlib.sha256(failure.kind.encode()).hexdigest()[:8]}.input"
    path.write_bytes(pickle.dumps((failure.target, failure.input)))
    shown = f"{failure.target}: {failure.kind}\n{failure.message}\n\n{failure.input!r}\n"
    path.with_suffix(".txt").write_text(shown, encoding="utf-8", errors="backslashreplace")
    return path


class _Run:
    """One target with one engine, for its share of the time; started again when its process dies."""

    def __init__(self, target, engine: str, seconds: float, inputs: float, folder: Path):
        self.target, self.engine, self.inputs, self.folder, self.watch = target, engine, inputs, folder, Watch()
        self.deadline = time.monotonic() + seconds
        self.deaths: list[Failure] = []
        folder.mkdir(parents=True)
        self._start()

    def _start(self) -> None:
        left = max(1.0, self.deadline - time.monotonic())
        self.killed_at = time.monotonic() + left + INPUT_SECONDS + GRACE
        known = [failure.kind for failure in self.failures()]
        self.process = FORK.Process(
            target=_work, args=(self.target, self.engine, left, self.inputs, self.folder, self.watch, known)
        )
        self.process.start()

    def done(self) -> bool:
        if self.process.is_alive():
            if time.monotonic() < self.killed_at:
                return False
            self.process.kill()
        self.process.join()
        code = self.process.exitcode
        if code == 0:
            return True
        slow = code == -signal.SIGPROF
        what = f"more than {INPUT_SECONDS} seconds" if slow else f"the process died (status {code})"
        end = _tail(self.folder / "log.txt")
        self.deaths.append(Failure(self.target.name, what, end, self.watch.current()))
        over = time.monotonic() > self.deadline - 1 or self.watch.tried.value >= self.inputs
        if over or len(self.deaths) > 5:
            return True
        self._start()
        return False

    def failures(self) -> list[Failure]:
        """Of this run so far, one of a kind."""
        found = {failure.kind: failure for failure in self.deaths}
        for path in sorted(self.folder.glob("failure-*.pickle")):
            failure = pickle.loads(path.read_bytes())
            found.setdefault(failure.kind, failure)
        return list(found.values())


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-400:] if path.exists() else ""


def _work(target, engine: str, seconds: float, inputs: float, folder: Path, watch: Watch, known: list[str]) -> None:
    """The body of the process: limits, then the engine until the time is over."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (started_with + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work = folder / "work"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    kinds = set(known)

    def check(value: object) -> Failure | None:
        watch.begin(value)
        signal.setitimer(signal.ITIMER_PROF, INPUT_SECONDS)
        try:
            target.check(value, work)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except Exception as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            kind = kind_of(error)
            return None if kind in kinds else Failure(target.name, kind, f"{type(error).__name__}: {error}", value)

    def keep(failure: Failure) -> None:
        kinds.add(failure.kind)
        (folder / f"failure-{engine}-{len(kinds):03d}.pickle").write_bytes(pickle.dumps(failure))

    end = time.monotonic() + seconds
    if engine == "atheris":
        _with_atheris(target, check, keep, end, inputs)
    else:
        _with_hypothesis(target, check, keep, lambda: time.monotonic() > end or watch.tried.value >= inputs)


class _Found(Exception):
    """A new kind of failure: stops hypothesis, which then looks for a smaller input."""


class _Over(BaseException):
    """The time is over, or the inputs."""


def _with_hypothesis(target, check, keep, over: Callable[[], bool]) -> None:
    while not over():
        if failure := _hunt(target, check, over):
            keep(failure)


def _hunt(target, check, over: Callable[[], bool]) -> Failure | None:
    """Draws a thousand inputs, or until one fails; of that kind of failure the smallest input found in a while."""
    smallest: Failure | None = None
    until = math.inf

    @hypothesis_seed(random.getrandbits(64))
    @settings(
        max_examples=1000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(target.inputs)
    def one(value):
        nonlocal smallest, until
        if over() or time.monotonic() > until:
            raise _Over
        failure = check(value)
        if failure and (smallest is None or smallest.kind == failure.kind):
            if smallest is None:
                until = time.monotonic() + INPUT_SECONDS
            smallest = failure
            raise _Found

    with contextlib.suppress(_Found, _Over):
        one()
    return smallest


def _with_atheris(target, check, keep, end: float, inputs: float) -> None:
    import atheris

    def keep_if_new(value: object) -> None:
        if failure := check(value):
            keep(failure)

    options = [f"-max_total_time={max(1, round(end - time.monotonic()))}", f"-timeout={INPUT_SECONDS + GRACE}"]
    options += ["-rss_limit_mb=0", "-artifact_prefix=./", "-verbosity=0"]
    options += [f"-runs={inputs}"] if inputs < math.inf else []
    if target.seeds:
        # Bytes as they are: libFuzzer changes files.
        Path("corpus").mkdir(exist_ok=True)
        for number, seed in enumerate(target.seeds):
            Path(f"corpus/{number}").write_bytes(seed)
        atheris.Setup([sys.argv[0], "corpus", "-max_len=8192", *options], keep_if_new)
    else:
        # Bytes as the choices of hypothesis: libFuzzer changes what is drawn.
        drawn = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))(
            given(target.inputs)(lambda value: keep_if_new(value))
        )
        drawn.hypothesis.fuzz_one_input(b"")  # compiles the strategies, which libFuzzer's clock should not count
        atheris.Setup([sys.argv[0], *options], drawn.hypothesis.fuzz_one_input)
    atheris.Fuzz()
