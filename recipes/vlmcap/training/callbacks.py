"""The clock of a run, and its end on SIGTERM and Ctrl-C."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

# What asks a run to stop. It ends with 128 + the signal, as a shell reports a process that the signal ended.
STOPS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class RunClock(TrainerCallback):
    """Seconds spent training, over all interruptions: log lines carry them, and checkpoints carry the log lines.
    `waited`: seconds of them spent waiting for data."""

    def __init__(self):
        self.begin = self.start = time.perf_counter()
        self.waited = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = [entry["elapsed_seconds"] for entry in state.log_history if "elapsed_seconds" in entry]
        self.begin = time.perf_counter()
        self.start = self.begin - (earlier[-1] if earlier else 0)
        self.waited = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        control.should_log |= last  # the last loss, however few the steps
        control.should_evaluate |= last and args.eval_strategy != "no"  # or the last model could not be the best

    def pause(self, seconds: float) -> None:
        """Leaves out seconds that were no training."""
        self.start += seconds
        self.begin += seconds

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 1)

    def wait_share(self) -> float:
        """Share of the time since the start, or the last continuation, that was spent waiting for data."""
        return round(self.waited / (time.perf_counter() - self.begin), 4)


class Stopped(Exception):
    """Training was asked to stop, and has saved."""


class StopOnSignal(TrainerCallback):
    """Saves and leaves training at the end of the step, or of the validation, in which a process got SIGTERM or
    Ctrl-C, every process at the same one.

    transformers' own (`enable_jit_checkpoint`, 5.23) waits three seconds, may save between backward pass and update,
    which no continued run can repeat, and lets each process decide alone.

    Attributes:
        asked: the signal that this process got; 0 for none.
        stopping: the largest that any process got when they last agreed.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.asked, self.stopping = accelerator, 0, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals of `STOPS`. One that comes after the last step, which has its checkpoint, is sent again
        at the end."""
        if current_thread() is not main_thread():
            print("Training in a thread: SIGTERM and Ctrl-C save no checkpoint; save_steps does.", file=sys.stderr)
            yield
            return
        # Who starts a job in the background lets it ignore the terminal's Ctrl-C.
        heeded = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.ask) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked:
            signal.raise_signal(self.asked)

    def ask(self, number: int, frame) -> None:
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second ends the process
            if self.accelerator.is_main_process:
                os.write(2, b"\nCtrl-C: saving at the end of this step; a second Ctrl-C ends the run at once.\n")

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = self.asked
        if args.world_size > 1:
            asked = torch.tensor(self.asked, device=self.accelerator.device)
            self.stopping = int(self.accelerator.gather(asked[None]).max())
        control.should_save |= bool(self.stopping)

    on_evaluate = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            raise Stopped


def obey_parent_alone(initialise: Callable[[int], None], worker: int) -> None:
    """Begins a worker of a DataLoader that no Ctrl-C ends, and SIGTERM only when its parent sends it.

    Who asks a job to stop sends SIGTERM to all of its processes, and a terminal Ctrl-C. Without its workers training
    could not finish the step. A worker whose parent is gone ends by itself.
    """
    initialise(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process().pid

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=obey, daemon=True).start()
