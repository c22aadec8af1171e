"""The check for GPUs: its parts fail alone and in time, its tables say what the rows say, and it runs on a CPU."""

import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from vlmcap.arguments import parse
from vlmcap.experiments import gpu_check
from vlmcap.experiments.gpu_check import PARTS, command, missing, report, run, sizes
from vlmcap.experiments.presets import ENGINES

MACHINE = {
    "hardware": {"device": "NVIDIA H200", "device_memory_bytes": 140 * 2**30},
    "versions": {"python": "3.12.3", "torch": "2.11.0"},
    "created": "2026-12-01T00:00:00+00:00",
    "capability": [9, 0],
}
RESUMED = {"steps": 6, "resumed_after": 3, "largest_change": 1e-4}
RESUMED |= {"resumed_difference": 0.0, "repeated_difference": 2.5e-7}


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """checked({part: program}, ...): what a check finds whose parts are these programs; JSON is the file's name."""

    def checked(programs: dict[str, str], minutes: float = 1) -> dict:
        def command(name, args, folder, sizes) -> list[str]:
            return [sys.executable, "-c", f"JSON = {str(folder / f'{name}.json')!r}\n{programs[name]}"]

        monkeypatch.setattr(gpu_check, "command", command)
        monkeypatch.setattr(gpu_check, "asdict", vars)
        parts = [name for name in programs if name != "model"]
        args = SimpleNamespace(parts=parts, minutes=minutes, device="cuda", json=str(tmp_path / "out.json"))
        result = gpu_check.check(args, time.monotonic())
        assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
        return result

    return checked


def writes(*rows: dict, **more) -> str:
    return f"open(JSON, 'w').write({json.dumps({'rows': rows} | more)!r})\n"


def test_a_part_that_fails_stops_no_other(checked, capsys):
    lines = "import sys\nfor number in range(40): print('line', number, file=sys.stderr)\nprint('to be seen')\n"
    result = checked(
        {
            "model": writes(**MACHINE),
            "precision": f"{lines}raise MemoryError('too large')",
            "resume": writes(RESUMED),
            "fsdp": "raise SystemExit(3)",
        }
    )
    assert {name: part["status"] for name, part in result["parts"].items()} == {
        "model": "ok",
        "precision": "failed",
        "resume": "ok",
        "fsdp": "failed",
    }
    assert result["rows"] == {"model": [], "precision": [], "resume": [RESUMED], "fsdp": []}
    assert result["hardware"] == MACHINE["hardware"] and result["created"] == MACHINE["created"]
    said = result["failures"]["precision"]["last_lines"]
    assert said[-1] == "MemoryError: too large" and "line 39" in said and "line 0" not in said
    assert result["failures"]["fsdp"]["reason"] == "ended with status 3"
    assert "precision: to be seen" in capsys.readouterr().out
    text = report(result)
    assert text.startswith("## GPU check: NVIDIA H200, 140.00 GiB, python 3.12.3, torch 2.11.0, 2026-12-01\n")
    assert "MemoryError: too large" in text and "none, bitwise equal" in text and "2.5e-07" in text


def test_a_part_at_its_limit_ends_with_all_below_it_and_keeps_its_rows(checked):
    """The process below has a session of its own, as those of launchers have, and holds the part's output open."""
    below = "import subprocess, sys, time\n"
    below += (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    )
    below += "print('below', child.pid, flush=True)\n"
    row = RESUMED | {"steps": 1}
    result = checked({"model": writes(), "resume": f"{below}{writes(row)}time.sleep(600)"}, minutes=0.05)
    assert result["failures"]["resume"]["reason"].startswith("stopped at its limit of ")
    assert result["rows"]["resume"] == [row]
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if words and words[-1] == "import time; time.sleep(600)"]


def test_no_time_left(checked):
    result = checked({"model": writes(), "resume": "import time; time.sleep(600)"}, minutes=0)
    assert set(result["failures"]) == {"model", "resume"}


def test_what_the_device_cannot_do_is_skipped(checked):
    assert missing(PARTS["flex"], "cuda", [7, 5]) == "it needs compute capability 8.0"
    assert missing(PARTS["flex"], "cuda", [8, 0]) is None and missing(PARTS["flex"], "cuda", None) is None
    assert missing(PARTS["flex"], "cpu", None) == "it needs a GPU" and missing(PARTS["fsdp"], "cpu", None) is None
    old = MACHINE | {"capability": [7, 5]}
    result = checked({"model": writes(**old), "resume": writes(RESUMED), "fsdp": "raise SystemExit(1)"})
    assert result["parts"]["fsdp"] == {"status": "skipped", "reason": "it needs compute capability 8.0"}
    assert not result["failures"] and "Skipped: it needs compute capability 8.0." in report(result)


def test_sizes_follow_the_memory():
    assert sizes("cpu", None)["max_pixels"] == 12_544
    assert sizes("cuda", {"device_memory_bytes": 15 * 2**30})["images"] == 1
    assert sizes("cuda", MACHINE["hardware"])["images"] == 4 and sizes("cuda", None)["images"] == 1


def test_the_table_of_the_training_benchmark(repo_root):
    """The rows of the README's table."""
    document = (repo_root / "recipes/figures/bench_training_cpu_proxy.json").read_text(encoding="utf-8")
    head, stock, lean, ours = PARTS["training"].table(json.loads(document)["rows"])
    assert head[0] == "one step of 5 captions, five an image" and len({*map(len, (head, stock, lean, ours))}) == 1
    assert stock[1:6] == ["27.098", "0.18", "1.00", "0.50", "4.10 GiB"]
    assert ours[0] == "this recipe (smoothing 0.1)" and ours[3:7] == ["14.84", "7.43", "1.03 GiB", "47%"]


def test_a_benchmark_with_other_engines():
    """Without the stock engine there is no ratio; an engine without a name is called as in the JSON."""
    row = {"engine": "another", "step_s_median": 2.0, "captions_per_s": 2.5, "peak_mem_bytes": 2**30, "mfu": 0.5}
    _, cells = PARTS["flex"].table([row | {"loss": 1.0, "max_grad_rel_diff": None}])
    assert cells == ["another", "2.000", "2.50", "-", "-", "1.00 GiB", "50%", "1.0000", "-"]
    row = {"engine": "branches_both", "images_per_s": 3.0, "peak_mem_bytes": 2**30}
    row |= {"identical_captions": 5, "captions": 6}
    stock = row | {"engine": "stock_both", "images_per_s": 1.5, "identical_captions": 6}
    _, _, cells = PARTS["captioning"].table([stock, row])
    assert cells[1:] == ["3.00", "2.00", "1.00 GiB", "5 of 6"]


def test_the_tables_of_training_further():
    """On preferences and on rewards: against TRL's trainer and against the lean one, if they were measured."""
    row = {"peak_mem_bytes": 3 * 2**30}
    trl, lean, ours = (
        row | {"engine": name, "step_s_median": seconds, "samples_per_s": 20 / seconds}
        for name, seconds in {"trl_grpo": 8.0, "trl_grpo_lean": 4.0, "grpo": 0.5}.items()
    )
    head, *cells = PARTS["grpo"].table([trl, lean, ours])
    assert head[0] == "one step of 20 samples" and len({*map(len, (head, *cells))}) == 1
    assert cells[0][1:] == ["8.000", "2.50", "1.00", "0.50", "3.00 GiB"]
    assert cells[2] == ["this recipe", "0.500", "40.00", "16.00", "8.00", "3.00 GiB"]
    alone = row | {"engine": "dpo", "step_s_median": 2.0, "pairs_per_s": 2.0}
    head, cells = PARTS["dpo"].table([alone])
    assert head[0] == "one step of 4 pairs" and cells[3:5] == ["-", "-"]


def test_the_benchmarks_take_their_options(repo_root):
    """And all that they measure has a name in the tables."""
    args = SimpleNamespace(preset="tiny", device="cpu")
    for name, part in PARTS.items():
        if not part.command:
            continue
        _, script, *words = command(name, args, Path("folder"), sizes("cpu", None))
        (parsed,) = parse("", runpy.run_path(script)["BenchArguments"], command_line=words)
        assert parsed.model == "folder/model" and parsed.json == f"folder/{name}.json" and parsed.rounds == 1
        assert set(parsed.engines or ENGINES[parsed.method]) <= set(gpu_check.ENGINES), name
    assert [name for name, part in PARTS.items() if "bench_training" in part.command] == [
        "training",
        "dpo",
        "grpo",
        "flex",
    ]


def test_the_parts_share_nine_minutes():
    assert sum(part.seconds for part in PARTS.values()) == 9 * 60


def test_settings_that_ran_out_of_memory_are_in_the_table():
    row = {"settings": "base.yaml", "precision": "fp16", "gradient_checkpointing": False, "images": 4, "captions": 20}
    row |= {"caption_tokens": 64, "step_s_median": 1.0, "estimate_bytes": 9 * 2**30, "peak_mem_bytes": 6 * 2**30}
    out = {"settings": "base.yaml", "gradient_checkpointing": True, "out_of_memory": "CUDA out of memory."}
    head, measured, failed = PARTS["memory"].table([row | {"peak_reserved_bytes": None}, out])
    assert len(head) == len(measured) == len(failed)
    assert measured[3:] == ["4 x 5 captions of 64 tokens", "1.000", "9.00 GiB", "6.00 GiB", "-", "1.50"]
    assert failed[-1] == "out of memory: CUDA out of memory."


def test_on_a_cpu(run_script, tmp_path):
    """In miniature, from another folder: the model, a benchmark, a killed and resumed run, and one process under the
    launcher."""
    out = tmp_path / "out.json"
    small = ["--preset", "tiny", "--device", "cpu", "--minutes", 60, "--json", out]
    done = run_script("gpu_check.py", *small, "--parts", "dpo", "resume", "fsdp", "flex")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {name: part["status"] for name, part in result["parts"].items()} == {
        "model": "ok",
        "dpo": "ok",
        "flex": "skipped",
        "resume": "ok",
        "fsdp": "ok",
    }
    (model,), (resumed,), (sharded,) = (result["rows"][name] for name in ("model", "resume", "fsdp"))
    assert [row["engine"] for row in result["rows"]["dpo"]] == ["trl_dpo", "trl_dpo_lean", "dpo"]
    assert model["layers_in_4_bits"] == 8 * 7 and model["preset"] == "tiny"
    assert resumed["resumed_difference"] == resumed["repeated_difference"] == 0 < resumed["largest_change"]
    assert resumed["resumed_after"] == 3 and len(resumed["losses"]) == 6
    assert sharded["loss"] == pytest.approx(sharded["loss_alone"], rel=1e-5)
    assert result["hardware"]["device"] == "CPU" and result["created"] and not result["failures"]
    assert "### Resuming" in done.stdout and "| DistributedDataParallel" in done.stdout


def test_unknown_names_are_refused(run_script):
    refused = run_script("gpu_check.py", "--parts", "model", "speed", expect=1)
    assert "'speed' is none of model, training" in refused.stderr


def test_lines_are_shown_as_they_come(tmp_path):
    shown = []
    wrong, last = run([sys.executable, "-c", "print('one\\n\\ntwo')"], 60, tmp_path / "log", shown.append)
    assert wrong is None and last == [] and shown == ["one", "two"]
