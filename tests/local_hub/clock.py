"""Time that passes when a client waits, then at once, and at no other time: minutes of retries take milliseconds."""

import time
from collections.abc import Callable


class Clock:
    """Stands in for the module `time` in those that wait; `slept` has every wait in seconds.

    `at` is called once, when `seconds` of waiting have passed.
    """

    def __init__(self):
        self.slept: list[float] = []
        self.alarm: tuple[float, Callable[[], None]] | None = None

    def at(self, seconds: float, call: Callable[[], None]) -> None:
        self.alarm = (sum(self.slept) + seconds, call)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.alarm and sum(self.slept) >= self.alarm[0]:
            call, self.alarm = self.alarm[1], None
            call()

    def monotonic(self) -> float:
        return sum(self.slept)

    def __getattr__(self, name: str):
        return getattr(time, name)
