"""The benchmarks against the stock trainer and `generate` run, compare like with like, and write what they promise."""

import json

import pytest


def test_bench_training_on_small_pictures(run_script, tmp_path):
    """The CPU proxy on pictures of 12 image tokens; speed is not looked at, that it is the same training is."""
    out = tmp_path / "out.json"
    run_script("bench_training.py", "--max_pixels", 12_544, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["engine"]: row for row in result["rows"]}
    assert list(rows) == ["trl_stock", "trl_stock_lean", "shared_prefix"] == list(result["speedup_vs_stock"])
    for row in rows.values():
        assert row["captions_per_s"] == pytest.approx(5 / row["step_s_median"])
        assert row["images_per_s"] == pytest.approx(1 / row["step_s_median"])
        assert row["max_grad_rel_diff"] < 1e-4 and row["loss_rel_diff"] < 1e-5
        assert 0 < row["mfu"] < 1 and row["peak_mem_bytes"] > 400e6
    assert rows["trl_stock"]["loss"] != rows["trl_stock_lean"]["loss"]  # with and without smoothing
    seconds = {engine: row["step_s_median"] for engine, row in rows.items()}
    assert result["speedup_vs_stock"]["shared_prefix"] == pytest.approx(
        seconds["trl_stock"] / seconds["shared_prefix"]
    )
    assert result["batch"]["captions"] == 5 and result["batch"]["image_tokens"] == 12
    assert 95e6 < result["model"]["parameters"] < 115e6
    assert result["model"]["vision_parameters"] / result["model"]["parameters"] == pytest.approx(0.30, abs=0.005)


def test_bench_training_in_several_languages(run_script, tmp_path):
    """Five captions with three prompts: the same training as with a sequence for each, of other captions."""
    out = tmp_path / "out.json"
    small = ["--preset", "tiny", "--max_pixels", 12_544, "--rounds", 1, "--json", out]
    two = ["--engines", "trl_stock", "shared_prefix"]
    run_script("bench_training.py", *small, *two, "--languages", "ja", "en", "vi")
    result = json.loads(out.read_text(encoding="utf-8"))
    stock, ours = result["rows"]
    assert ours["loss_rel_diff"] < 1e-5 and ours["max_grad_rel_diff"] < 1e-4
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert result["settings"]["languages"] == ["ja", "en", "vi"]
    assert result["batch"]["captions"] == 5 and 15 < result["batch"]["caption_tokens_mean"] < 19
    assert result["batch"]["prefix_tokens"] == result["batch"]["image_tokens"] + 5  # the picture, and no prompt
    assert list(result["speedup_vs_stock"]) == ["trl_stock", "shared_prefix"]


def test_bench_training_on_preferences(run_script, tmp_path):
    out = tmp_path / "out.json"
    run_script("bench_training.py", "--method", "dpo", "--max_pixels", 12_544, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["engine"]: row for row in result["rows"]}
    assert list(rows) == ["trl_dpo", "trl_dpo_lean", "dpo"] == list(result["speedup_vs_trl"])
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["trl_dpo"]["loss"], rel=1e-5)
        assert row["loss"] != pytest.approx(0.6931, abs=1e-4)  # log 2: there are margins
    assert all(rows[engine]["max_grad_rel_diff"] < 1e-4 for engine in ("trl_dpo", "trl_dpo_lean"))
    assert result["speedup_vs_trl"]["trl_dpo"] == 1


def test_bench_training_on_rewards(run_script, tmp_path):
    out = tmp_path / "out.json"
    run_script("bench_training.py", "--method", "grpo", "--max_pixels", 12_544, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["engine"]: row for row in result["rows"]}
    assert list(rows) == ["trl_grpo", "trl_grpo_lean", "grpo"] == list(result["speedup_vs_trl"])
    assert [len(row["step_s"]) for row in rows.values()] == [1, 1, 3]
    for row in rows.values():
        assert row["samples_per_s"] == pytest.approx(5 / row["step_s_median"])
    assert result["batch"] == {"images": 1, "samples_an_image": 5, "tokens_a_sample": 16}


def test_bench_captioning_on_small_pictures(run_script, tmp_path):
    """All four engines on the CPU proxy and pictures of 12 image tokens: the captions are the same."""
    out = tmp_path / "out.json"
    small = ["--images", 3, "--batch_size", 2, "--max_pixels", 12_544, "--rounds", 1, "--json", out]
    run_script("bench_captioning.py", *small)
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["engine"]: row for row in result["rows"]}
    assert list(rows) == ["stock", "branches", "stock_both", "branches_both"] == list(result["speedup_vs_stock"])
    assert [row["captions"] for row in rows.values()] == [3, 3, 6, 6]
    for engine, row in rows.items():
        assert row["identical_captions"] == row["captions"], engine
        assert row["images_per_s"] == pytest.approx(3 / min(row["seconds"])) and row["peak_mem_bytes"] > 400e6
    assert result["speedup_vs_stock"]["stock"] == result["speedup_vs_stock"]["stock_both"] == 1
    assert len(result["caption_tokens"]) == 3 and all(9 <= length <= 34 for length in result["caption_tokens"])


def test_unknown_names_are_refused(run_script):
    assert (
        "'huge' is none of cpu_proxy, qwen2vl_2b"
        in run_script("bench_training.py", "--preset", "huge", expect=1).stderr
    )
    refused = run_script("bench_training.py", "--engines", "shared_prefix", "fast", expect=1)
    assert "'fast' is none of trl_stock, trl_stock_lean" in refused.stderr
    refused = run_script("bench_training.py", "--method", "dpo", "--engines", "shared_prefix", expect=1)
    assert "'shared_prefix' is none of trl_dpo, trl_dpo_lean, dpo" in refused.stderr
    assert "'fr' is none of ja, en, vi" in run_script("bench_training.py", "--languages", "fr", expect=1).stderr
    refused = run_script("bench_training.py", "--method", "grpo", "--languages", "en", expect=1)
    assert "--method grpo is measured with one prompt" in refused.stderr
