from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@pytest.fixture
def fault(request):
    """`with fault("kill -9 in step 3"): ...` counts a fault; it is survived when the block passes.

    The counts of a run are printed at its end (tests/conftest.py).
    """

    @contextmanager
    def injected(name: str) -> Iterator[None]:
        entry = {"fault": name, "survived": False}
        request.node.user_properties.append(("fault", entry))
        yield
        entry["survived"] = True

    return injected
