import pytest


@pytest.fixture
def without_meteor(monkeypatch):
    """METEOR's Java takes eight seconds for each file of scores; the Qwen2-VL round trip has it."""
    monkeypatch.setenv("VLMCAP_METEOR_JAR", "none.jar")
