"""Work that threads do ahead of the model: reading and resizing pictures.

Threads, not processes: Pillow and torch let other threads run while they work, a picture needs no copy between
processes, and a DataLoader's workers need shared memory, of which Docker gives 64 MB.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

In, Out = TypeVar("In"), TypeVar("Out")


def map_ahead(function: Callable[[In], Out], items: Iterable[In], ahead: int = 8, workers: int = 4) -> Iterator[Out]:
    """`map` in threads: at most `ahead` results are in work or wait."""
    items = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = deque(pool.submit(function, item) for item in islice(items, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
