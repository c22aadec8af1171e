"""Trackers: what they are given is read back with their own readers, and none of them can end a run."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from vlmcap.markdown import prose
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.training.trackers import Trackers, trackers

TRACKED = {"report_to": "tensorboard", "max_steps": 3, "eval_steps": 1, "save_steps": 1, "run_name": "first try"}


def events(folder) -> EventAccumulator:
    """The one TensorBoard run below an output folder, with all that was ever written to it."""
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("first-try-")
    return EventAccumulator(str(run), {"images": 0, "tensors": 0}).Reload()


def scalars(read: EventAccumulator, name: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in read.Scalars(name)]
    assert len(found) == len(dict(found)), "a step was written twice"
    return dict(found)


def texts(read: EventAccumulator, name: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in read.Tensors(f"{name}/text_summary")}


def test_tensorboard_has_losses_scores_and_captions_also_of_a_run_that_resumed(make, tmp_path):
    whole = make(tmp_path, **TRACKED)
    whole.train()
    logged = {
        key: {e["step"]: e[key] for e in whole.state.log_history if key in e} for key in ("loss", "eval_cider_d")
    }
    said = texts(events(tmp_path), "validation/captions")
    assert sorted(said) == [1, 2, 3] and len(events(tmp_path).Images("validation/1000")) == 1
    assert len(events(tmp_path).Tags()["images"]) == len(whole.validation.rows) == 8
    table = re.sub(" +", " ", said[3])
    for row in whole.validation.rows:
        assert f"| {row['image_id']} | {prose(whole.validation.latest[str(row['image_id'])])} |" in table
        assert row["captions"][0] in table

    shutil.rmtree(tmp_path / "checkpoint-3")  # as if the run had been killed before it
    make(tmp_path, **TRACKED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    read = events(tmp_path)
    for key, name in (("loss", "train/loss"), ("eval_cider_d", "eval/cider_d")):
        assert scalars(read, name) == pytest.approx(logged[key], rel=1e-5) and len(logged[key]) == 3
    assert texts(read, "validation/captions") == said

    make(tmp_path / "other", **TRACKED, eval_strategy="no", load_best_model_at_end=False, validate=False).train()
    assert "validation/captions/text_summary" not in events(tmp_path / "other").Tags()["tensors"]


SHORT = TRACKED | {"max_steps": 1}


def course(trainer) -> list[dict]:
    return [{k: e[k] for k in ("loss", "eval_cider_d", "step") if k in e} for e in trainer.state.log_history]


@pytest.fixture(scope="module")
def untracked():
    """The course of a run without trackers, once it is known."""
    return []


@pytest.mark.parametrize("method", ["__init__", "add_text", "add_scalar", "add_image", "close"])
def test_a_tracker_that_fails_is_left_out_and_ends_no_run(make, untracked, tmp_path, monkeypatch, capsys, method):
    """When it begins (twice), logs, shows pictures, ends."""
    if not untracked:
        trainer = make(tmp_path / "untracked", **SHORT | {"report_to": "none"})
        trainer.train()
        untracked += course(trainer)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, method, fail)
    capsys.readouterr()
    tracked = make(tmp_path / "tracked", **SHORT)
    tracked.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "report_to" in line]
    assert lines == [
        "report_to: tensorboard failed and is left out from here on; the training continues"
        " (OSError: [Errno 28] No space left on device)"
    ]
    assert course(tracked) == untracked and len(untracked) > 2


def test_a_tracker_that_cannot_be_made_or_shown_pictures_ends_no_run(make, tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('its library is broken\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setattr("vlmcap.training.trackers.open_image", lambda row: 1 / 0)
    trainer = make(tmp_path / "run", **SHORT | {"report_to": ["wandb", "tensorboard"]})
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "report_to" in line]
    assert [line.split(" failed")[0] for line in lines] == ["report_to: wandb", "report_to: tensorboard"]
    assert lines[0].endswith("(RuntimeError: its library is broken)") and "ZeroDivisionError" in lines[1]


def test_the_main_process_alone_tracks():
    args = SimpleNamespace(report_to=["tensorboard"], process_index=1)
    assert trackers(args, None) == [] and args.report_to == []
    args = SimpleNamespace(report_to=[], process_index=0)
    assert trackers(args, None) == []


def test_trackers_get_the_name_of_the_run_and_make_private_spaces():
    told = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            told.append(args)

    args = SimpleNamespace(run_name="a/b", output_dir="x", hub_private_repo=None)
    callback = Trackers([], args, None)
    callback.callbacks["recorder"] = Recorder()
    callback.on_log(args, None, None)
    assert told[0].hub_private_repo is True and re.fullmatch("a-b-[0-9a-f]{6}", told[0].run_name)
    assert (args.run_name, args.hub_private_repo) == ("a/b", None)


READ_TRACKIO = """
import json, sys, trackio
(run,) = trackio.Api().runs("huggingface")
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("huggingface", run.name)
print(json.dumps({"run": run.name, "logs": logs}, default=str))
"""
READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

def records(data):
    # A log of LevelDB, in blocks of 32 KiB, after a header of 7 bytes. wandb has no reader of it in Python.
    place, whole = 7, b""
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""

history, ids, paths = [], set(), sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb"))
for path in paths:
    for record in records(path.read_bytes()):
        if record.HasField("run"):
            ids.add(record.run.run_id)
        if record.HasField("history"):
            items = record.history.item
            history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
tables = [json.loads(path.read_text()) for path in Path(sys.argv[1]).glob("wandb/offline-run-*/**/*.table.json")]
print(json.dumps({"ids": sorted(ids), "starts": len(paths), "history": history, "tables": tables}))
"""


def test_trackio_and_wandb_offline(overlay, run_script, fresh_python, miniature_dir, repo_root, tmp_path):
    """A whole recipe with both, ended and resumed; their own code reads what they have kept."""
    write_scene_dataset(tmp_path / "scenes", train=24, validation=3, test=3)
    files = ["stair_train.json", "stair_val.json"]
    run_script(
        *("publish_datasets.py", "--source", "stair", "--tokenizer", miniature_dir, "--output_dir"),
        *(tmp_path / "dataset", "--annotations", *(tmp_path / "scenes" / file for file in files), "--yj_annotations"),
        *(tmp_path / "scenes/yj.json", "--images", tmp_path / "scenes/images", "--val_ids"),
        *(tmp_path / "scenes/val_ids.txt", "--test_ids", tmp_path / "scenes/test_ids.txt"),
    )
    demo = yaml.safe_load((repo_root / "recipes/configs/sft_qwen2vl_jp/demo.yaml").read_text(encoding="utf-8"))
    demo |= {"dataset": str(tmp_path / "dataset"), "output_dir": str(tmp_path / "run"), "max_new_tokens": 16}
    demo |= {"instances": [str(tmp_path / "scenes/instances.json")]}
    demo |= {"report_to": ["trackio", "wandb"], "save_steps": 1, "eval_steps": 1, "logging_steps": 1}
    (tmp_path / "tracked.yaml").write_text(yaml.safe_dump(demo), encoding="utf-8")
    path = overlay("trackio==0.43.0", "wandb==0.31.0")
    env = {"PYTHONPATH": path, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    env |= {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("DATA", "CACHE", "CONFIG")}
    env |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "VLMCAP_METEOR_JAR": "none.jar"}
    recipe = ["recipes/sft_qwen2vl_jp.py", "--config", tmp_path / "tracked.yaml"]
    for more in (["--max_steps", 1], ["--max_steps", 2, "--resume_from_checkpoint", "latest"]):
        done = run_script(*recipe, *more, env=env, fresh=True)
        assert "report_to" not in done.stderr, done.stderr
    metrics = json.loads((tmp_path / "run/adapter/metrics.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in metrics["training"]["log"] if "loss" in entry]
    scores = [entry["eval_cider_d"] for entry in metrics["training"]["log"] if "eval_cider_d" in entry]

    kept = json.loads(fresh_python(READ_TRACKIO, env=env).splitlines()[-1])
    assert kept["run"].startswith("run-")
    assert [log["train/loss"] for log in kept["logs"] if "train/loss" in log] == pytest.approx(losses)
    assert [log["eval/cider_d"] for log in kept["logs"] if "eval/cider_d" in log] == pytest.approx(scores)
    tables = [log["validation/captions"] for log in kept["logs"] if "validation/captions" in log]
    assert len(tables) == 2 and len(list((tmp_path / "trackio").rglob("*.png"))) == 6
    assert all(row["references"] and row["picture"] for table in tables for row in table["_value"])

    kept = json.loads(fresh_python(READ_WANDB, str(tmp_path), env=env).splitlines()[-1])
    assert len(kept["ids"]) == 1 and kept["starts"] == 2, "resumed under its id; `wandb sync` joins the two"
    assert [log["train/loss"] for log in kept["history"] if "train/loss" in log] == pytest.approx(losses)
    assert [log["eval/cider_d"] for log in kept["history"] if "eval/cider_d" in log] == pytest.approx(scores)
    assert [(len(t["data"]), t["columns"][2]) for t in kept["tables"]] == [(3, "caption")] * 2
    staged = [path for path in (tmp_path / "DATA").rglob("*") if path.is_file()]
    assert sum(path.read_bytes().startswith(b"\x89PNG") for path in staged) >= 3, "the pictures, for `wandb sync`"
