"""Which checkpoint a run resumes from: the newest that is whole, and never one that is not."""

import json
import os
from pathlib import Path

import pytest

from vlmcap.steps.begin import find_checkpoint
from vlmcap.training import checkpoints
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.collator import BadImages

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def write(output_dir: Path, step: int, best: str | None = None, files=FILES) -> Path:
    written, folder = output_dir / "unfinished" / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
    written.mkdir(parents=True, exist_ok=True)
    for name in files:
        (written / name).write_text(f"{name} of {step}" * 9)
    checkpoints.complete(written, folder, {"best": best, "must_match": {}, "may_change": {}, "since_log": {}})
    os.utime(folder, (step, step))
    return folder


def change(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    text = weights.read_text()
    match how:
        case "missing":
            weights.unlink()
        case "cut off":
            weights.write_text(text[:-1])
        case "altered":
            weights.write_text(text[:-1] + "?")
        case "no manifest":
            (folder / "checkpoint.json").unlink()
        case "half a manifest":
            (folder / "checkpoint.json").write_text((folder / "checkpoint.json").read_text()[:50])
        case "no manifest at all":
            (folder / "checkpoint.json").write_text("3")
        case "another version's":
            manifest = json.loads((folder / "checkpoint.json").read_text())
            order, course = manifest.pop("must_match"), manifest.pop("may_change")
            (folder / "checkpoint.json").write_text(json.dumps(manifest | {"order": order, "course": course}))
        case "altered manifest":
            manifest = json.loads((folder / "checkpoint.json").read_text())
            (folder / "checkpoint.json").write_text(json.dumps(manifest | {"files": [], "best": 3}))
        case "pickled weights":
            (folder / "adapter_model.bin").write_text("")


REASONS = {
    "missing": "adapter_model.safetensors is missing",
    "cut off": "has 278 bytes, not the 279 that were written",
    "altered": "adapter_model.safetensors is not what was written",
    "no manifest": "it has no checkpoint.json, so it was never completed",
    "half a manifest": "checkpoint.json cannot be read",
    "no manifest at all": "checkpoint.json cannot be read",
    "another version's": "checkpoint.json lacks must_match, may_change: another version of this code wrote it",
    "altered manifest": "checkpoint.json lacks files, best: another version of this code wrote it, or it was altered",
    "pickled weights": "adapter_model.bin holds pickled weights",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_is_not_whole_is_named_and_skipped(tmp_path, capsys, how):
    whole, broken = write(tmp_path, 6), write(tmp_path, 12)
    change(broken, how)
    assert find_checkpoint(tmp_path, "latest") == str(whole)
    passed, said = capsys.readouterr().out.splitlines()
    assert passed.startswith(f"Skipped {broken}: ") and REASONS[how] in passed
    assert said == f"Continuing from {whole}"
    assert broken.exists()  # it may be of use to its owner
    with pytest.raises(CheckpointError, match=f"--resume_from_checkpoint {broken}: .*{REASONS[how]}.* `latest`"):
        find_checkpoint(tmp_path, str(broken))


def test_a_checkpoint_whose_best_one_is_missing_is_not_whole(tmp_path, capsys):
    write(tmp_path, 3), write(tmp_path, 6, best="checkpoint-6"), write(tmp_path, 9, best="checkpoint-6")
    assert find_checkpoint(tmp_path, "latest") == str(tmp_path / "checkpoint-9")
    change(tmp_path / "checkpoint-6", "cut off")
    assert find_checkpoint(tmp_path, "latest") == str(tmp_path / "checkpoint-3")
    assert "checkpoint-6, the best so far, which it refers to, cannot be used" in capsys.readouterr().out


def test_weights_alone_are_not_enough_to_resume_from(tmp_path):
    folder = write(tmp_path, 6, files=("adapter_model.safetensors", "trainer_state.json"))
    with pytest.raises(CheckpointError, match="weights alone .save_only_model."):
        find_checkpoint(tmp_path, str(folder))


def test_what_a_crash_left_is_named_and_deleted(tmp_path, capsys):
    whole = write(tmp_path, 6)
    (tmp_path / "unfinished/checkpoint-12").mkdir()
    (tmp_path / "unfinished/checkpoint-12/optimizer.pt").write_bytes(bytes(3 << 20))
    assert find_checkpoint(tmp_path, "latest") == str(whole)
    assert "unfinished (checkpoint-12; 3.0 MiB), which an interrupted run left" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6"]
    assert find_checkpoint(tmp_path, "latest") == str(whole)
    assert capsys.readouterr().out == f"Continuing from {whole}\n"


def test_a_run_is_neither_overwritten_nor_taken_for_another(tmp_path, capsys):
    assert find_checkpoint(tmp_path / "new", None) is None
    assert find_checkpoint(tmp_path / "new", "latest") is None
    assert capsys.readouterr().out == f"No checkpoint in {tmp_path / 'new'}: from the start\n"
    write(tmp_path, 6)
    with pytest.raises(CheckpointError, match="holds checkpoint-6 of an earlier run. Continue it with"):
        find_checkpoint(tmp_path, None)
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    assert find_checkpoint(tmp_path, "latest") == str(tmp_path / "checkpoint-6")


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    folder = write(tmp_path, 6)
    (folder / "more").write_text("of the first")
    write(tmp_path, 6, best="checkpoint-6")
    assert checkpoints.damage(folder) is None and not (folder / "more").exists()
    assert json.loads((folder / "checkpoint.json").read_text())["best"] == "checkpoint-6"


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (1, None, [12]),
        (1, 3, [3, 12]),
        (1, 12, [12]),
        (2, 3, [3, 12]),
        (3, 3, [3, 9, 12]),
        (None, None, [3, 6, 9, 12]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, limit, best, left):
    for step in (3, 6, 9, 12):
        write(tmp_path, step)
    checkpoints.rotate(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name.split("-")[1]) for path in checkpoints.checkpoints(tmp_path)) == left


def test_the_list_of_bad_pictures_continues_after_its_last_whole_line(tmp_path):
    bad = BadImages(tmp_path / "bad_images.jsonl", limit=9)
    bad.add(1, "a\u2028b.jpg", "cut off")
    with bad.path.open("a") as file:
        file.write('{"image_id": 2, "file')  # the machine went away here
    assert bad.count() == 1
    bad.begin(keep=True)
    bad.add(3, "c.jpg", "cut off")
    assert bad.count() == 2 and len(bad.path.read_text().split("\n")) == 3
    bad.begin(keep=False)
    assert bad.count() == 0 and not bad.path.exists()
