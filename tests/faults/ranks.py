"""Processes that start in milliseconds: forks of a server that has imported the slow libraries once."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trl", "tests.invariants.tiny", "vlmcap.evaluation.isolated"])


def start(function: Callable, *args, log: Path, rank: int = 0, ranks: int = 1, port: int | None = None):
    """A process that calls `function(*args)`, as one of `ranks` when they are several; it prints into `log`."""
    process = FORKS.Process(target=_run, args=(function, args, log, rank, ranks, port, dict(os.environ)))
    process.start()
    return process


def run(function: Callable, *args, log: Path, timeout: float = 120) -> int:
    """Exit status of a process that calls `function(*args)`, negative for a signal."""
    process = start(function, *args, log=log)
    process.join(timeout)
    return process.exitcode


def run_ranks(ranks: int, function: Callable, *args, log: Path, timeout: float = 120) -> list[int | None]:
    """Exit statuses of the processes of a gloo group that each call `function(*args)`.

    When one of them fails the others are killed, as a launcher does.
    """
    port = free_port()
    processes = [start(function, *args, log=log, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    waiting = list(processes)
    while waiting:
        ready = multiprocessing.connection.wait([process.sentinel for process in waiting], timeout)
        waiting = [process for process in waiting if process.sentinel not in ready]
        if not ready or any(process.exitcode for process in processes):
            for process in waiting:
                process.kill()
                process.join()
            break
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
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ |= {name: str(value) for name, value in place.items()}
    function(*args)


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
