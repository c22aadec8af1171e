import json


def test_the_bench_prints_and_writes_its_ratio(run_script, tmp_path):
    """On a small corpus; the bound is for 5,000 images, but even here nothing comes near it."""
    path = tmp_path / "bench.json"
    done = run_script("bench_metrics.py", "--images", 300, "--rounds", 3, "--json", path)
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["largest_difference"] < 1e-9
    assert figures["speedup_vs_pycocoevalcap"] > 4
    assert figures["bootstrap_1000_seconds"] < 20
    assert figures["images"] == 300 and figures["versions"]["pycocoevalcap"] and figures["hardware"]["cores"]
    assert "speedup_vs_pycocoevalcap" in done.stdout
