"""Injected faults: what goes wrong on the wire, for which request, how often."""

import dataclasses
import re
from collections.abc import Callable


@dataclasses.dataclass
class Fault:
    """What to do instead of (or around) a request whose method and path match.

    Of the matching requests the first `skip` pass unharmed, the next `times` are hit. Actions:

    status    answer `status` with `headers` and `body`; the request is not handled
    drop      break the connection (RST) after reading `after` bytes of the request's body
    lost      handle the request, then break the connection instead of answering
    truncate  promise the whole answer, send `after` bytes of its body, close (FIN)
    cut       the same, but break the connection (RST)
    delay     wait `seconds`, then handle the request
    partial   handle the request without the last line of its body: a commit that loses a file
    pass      handle the request

    `before` is called first, in the hub's process: another machine's commit, say, or `hub.go_down`.
    """

    method: str = ".*"
    path: str = ".*"
    action: str = "status"
    status: int = 500
    headers: dict = dataclasses.field(default_factory=dict)
    body: dict | bytes | None = None
    times: int = 1
    skip: int = 0
    after: int = 0
    seconds: float = 0.0
    before: Callable[[], None] | None = None
    hits: int = 0  # how many requests it has hit so far

    def take(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if self.times <= 0 or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        self.hits += 1
        return True
