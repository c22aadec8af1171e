import importlib.util
import json
from statistics import median

import pytest


def test_the_bench_prints_and_writes_its_ratio(repo_root, tmp_path, monkeypatch, capsys):
    """On a small corpus. How fast it must be is for the bench to say, on a quiet machine."""
    spec = importlib.util.spec_from_file_location("bench_metrics", repo_root / "scripts/bench_metrics.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "bench.json"
    arguments = script.BenchArguments(images=300, rounds=2, json=str(path))

    monkeypatch.setattr(script, "LEAST_SPEEDUP", 0)
    monkeypatch.setattr(script, "MAX_BOOTSTRAP_SECONDS", float("inf"))
    script.main(arguments)
    assert "speedup_vs_pycocoevalcap" in capsys.readouterr().out
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["largest_difference"] < 1e-9
    rounds = figures["rounds"]
    assert figures["speedup_vs_pycocoevalcap"] == pytest.approx(
        median(rounds["pycocoevalcap"]) / median(rounds["ours"])
    )
    assert len(rounds["ours"]) == 2 and figures["bootstrap_1000_seconds"] > 0
    assert figures["images"] == 300 and figures["versions"]["pycocoevalcap"] and figures["hardware"]["cores"]

    monkeypatch.setattr(script, "LEAST_SPEEDUP", 10**9)
    with pytest.raises(SystemExit, match="^error: less than 1000000000 times as fast as pycocoevalcap$"):
        script.main(arguments)
