"""Every target of the fuzzer on a few inputs, and the fuzzer itself on targets that are broken on purpose."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import engine
from tests.fuzz.targets import TARGETS, Target

# What takes a tenth of a second an input and more.
SLOW = {
    "dataset_card": 5,
    "own": 20,
    "model_card": 20,
    "rater_page": 10,
    "sample_page": 10,
    "form": 20,
    "tokenise": 30,
    "scores": 20,
}


@pytest.mark.parametrize("name", TARGETS)
def test_target_holds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    target = TARGETS[name]
    for seed in target.seeds:
        target.check(seed, tmp_path)

    @settings(
        max_examples=SLOW.get(name, 60),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # `python -m tests.fuzz` makes failing inputs small
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def holds(value):
        target.check(value, tmp_path)

    holds()


def fails_on_long_input(data: bytes, folder: Path) -> None:
    (folder / "x").write_bytes(data)
    if len(data) > 5:
        raise KeyError("too long")
    if data == b"abc":
        raise AssertionError("not abc")


def hangs(data: bytes, folder: Path) -> None:
    while len(data) > 3:
        pass


def swallows_memory(data: bytes, folder: Path) -> None:
    if len(data) > 3:
        bytearray(2 * engine.MEMORY)


def dies(data: bytes, folder: Path) -> None:
    if len(data) > 3:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (fails_on_long_input, "KeyError at test_targets.py"),
        (swallows_memory, "MemoryError at test_targets.py"),
        (hangs, "more than 0.5 seconds"),
        (dies, "the process died (status"),
    ],
)
def test_what_is_broken_is_found(check, kind, tmp_path, monkeypatch, capsys):
    """However slow the machine is: the inputs are counted, and except for the hang no time is short."""
    monkeypatch.setattr(engine, "INPUT_SECONDS", 0.5 if check is hangs else 10**6)
    target = Target("broken", st.binary(max_size=20), check)
    monkeypatch.setattr(engine, "_load", lambda guided: {"broken": target, "ids": TARGETS["ids"]})
    assert engine.fuzz(10**6, ["broken", "ids"], 2, tmp_path / "out", guided=False, inputs=500) == 1
    shown = capsys.readouterr().out
    assert kind in shown and shown.count("ids") == 1
    (saved,) = (tmp_path / "out").glob("broken-*.input")
    if check is fails_on_long_input:  # made small
        with pytest.raises(KeyError):
            engine.repeat(saved)
        assert "b'\\x00\\x00\\x00\\x00\\x00\\x00'" in saved.with_suffix(".txt").read_text()
    elif check is not dies:
        assert str(saved) in shown
