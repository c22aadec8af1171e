"""Pictures and trainers for the invariants; `tests.invariants.tiny` builds them."""

from functools import partial

import pytest

from tests.invariants import tiny


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariants")
    tiny.write_pictures(folder)
    tiny.write_preferences(folder)
    return folder


@pytest.fixture
def rows(pictures):
    return tiny.read_pictures(pictures)


@pytest.fixture
def trainer_of(rows, tmp_path):
    """trainer_of("qwen2_vl", shared_prefix=False): see `tiny.build_trainer`."""
    return partial(tiny.build_trainer, tmp_path, rows)


@pytest.fixture
def stock_trainer_of(rows, tmp_path):
    return partial(tiny.build_stock_trainer, tmp_path, rows)
