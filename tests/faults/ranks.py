"""Processes that start in milliseconds: forks of a server that has imported the slow libraries once."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["trl", "matplotlib.pyplot", "tests.faults.training_runs", "vlmcap.captioning.isolated", "vlmcap.reporting.cards"]
)


def start(function: Callable, *args, log: Path, rank: int = 0, ranks: int = 1, port: int | None = None):
    """A process that calls `function(*args)`, as one of `ranks` when they are several; it prints into `log`."""
    process = FORKS.Process(target=_run, args=(function, args, log, rank, ranks, port, dict(os.environ)))
    process.start()
    return process


def run(function: Callable, *args, log: Path) -> int:
    """Exit status of a process that calls `function(*args)`, negative for a signal."""
    process = start(function, *args, log=log)
    process.join()
    return process.exitcode


def run_file(path: Path, *words: str, folder: Path, environment: dict, out: Path, err: Path) -> int:
    """Exit status of the Python file `path`, started in `folder` as `python path words` would start it.

    Its output goes into the files `out` and `err`. What the slow libraries read from the environment when they are
    imported is that of the tests.
    """
    process = FORKS.Process(target=_run_file, args=(path, words, folder, environment, out, err))
    process.start()
    process.join()
    return process.exitcode


def run_ranks(ranks: int, function: Callable, *args, log: Path) -> list[int | None]:
    """Exit statuses of the processes of a gloo group that each call `function(*args)`.

    When one of them fails the others are killed, as a launcher does. `log` gets what they printed, one after another.
    """
    port = free_port()
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(ranks)]
    processes = [start(function, *args, log=logs[rank], rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    waiting = list(processes)
    while waiting:
        ready = multiprocessing.connection.wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.sentinel not in ready]
        if any(process.exitcode for process in processes):
            for process in waiting:
                process.kill()
                process.join()
            break
    with log.open("ab") as whole:
        for part in logs:
            whole.write(part.read_bytes() if part.exists() else b"")
            part.unlink(missing_ok=True)
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _run(function, args, log, rank, ranks, port, environment):
    os.environ.clear()
    os.environ.update(environment)  # the server's is of the time of its start
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(
        line_buffering=True
    )  # else a full buffer ends in the middle of a line, before a progress bar
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ |= {name: str(value) for name, value in place.items()}
    function(*args)


def _run_file(path, words, folder, environment, out, err):
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        with file.open("ab") as opened:
            os.dup2(opened.fileno(), number)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # Python's own choice again, not that of this process
    sys.argv, sys.path[:0] = [str(path), *words], [str(path.parent)]
    runpy.run_path(str(path), run_name="__main__")


def kill_at_line(count: int, *names: str) -> None:
    """Lets this process end by SIGKILL before the `count`-th line that it executes in the named source files."""
    left = count

    def trace(frame, event, arg):
        nonlocal left
        if not frame.f_code.co_filename.endswith(names):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def kill_at_call(count: int, function: str, name: str) -> None:
    """Lets this process end by SIGKILL at the `count`-th call of a function of the named source file."""
    calls = itertools.count(1)

    def trace(frame, event, arg):
        code = frame.f_code
        if code.co_name == function and code.co_filename.endswith(name) and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.settrace(trace)


def record_lines(*names: str) -> list[str]:
    """A list that grows by "file:line" with every line that this process executes in the named source files."""
    executed = []

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.endswith(names):
            return None
        if event == "line":
            executed.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return trace

    sys.settrace(trace)
    return executed


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:] if log.exists() else ""


def processes_of(text: str) -> list[str]:
    """Command lines of running processes that hold `text`."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if text in line and " ps -eo" not in line]
