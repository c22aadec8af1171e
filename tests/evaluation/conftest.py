from tests.captioning.conftest import environments  # noqa: F401
