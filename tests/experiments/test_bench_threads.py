"""What scripts/bench_threads.py makes of its times. Its processes are not started: what they measure is speed."""

import runpy

import pytest


@pytest.fixture(scope="module")
def bench_threads(repo_root):
    return runpy.run_path(str(repo_root / "scripts/bench_threads.py"))


def times(quiet: float, busy: float) -> dict:
    return {kind: {"quiet": [quiet, quiet, 9.0], "busy": [busy, 0.0, busy]} for kind in ("train", "test", "score")}


def test_the_fastest_setting_that_is_never_bad_is_chosen(bench_threads):
    """Twice as fast on a quiet machine does not make good for 18 times slower on a busy one."""
    made_up = {"two": times(0.2, 3.6), "one": times(0.3, 0.6), "two, passive": times(0.4, 0.8)}
    result = bench_threads["summary"](made_up)
    assert result["chosen"] == "one"
    assert result["worst_slowdown"] == pytest.approx({"two": 18, "one": 2, "two, passive": 2})
    row = result["seconds"]["one"]["train"]
    assert row.pop("units") == {"quiet": 3, "busy": 3}
    assert row == pytest.approx({"quiet": 0.3, "busy": 0.6, "slowdown": 2})
    assert result["time_by_best"]["one"] == pytest.approx(1.5**0.5)
    bench_threads["print_result"](result)


def test_one_kind_of_work_can_make_a_setting_bad(bench_threads):
    bad = times(0.2, 0.3) | {"score": {"quiet": [1.0], "busy": [3.1]}}
    result = bench_threads["summary"]({"two": bad})
    assert result["chosen"] is None and result["worst_slowdown"]["two"] == pytest.approx(3.1)


def test_unknown_settings_are_refused(run_script):
    done = run_script("bench_threads.py", "--settings", "three", expect=1)
    assert "'three' is none of one, two, two, spin 20000" in done.stderr
