"""scripts/rehearse.py, from publish to card, with the miniature's configuration instead of the real one's."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.recipes.files import captions, read
from vlmcap.experiments.rehearsal import (
    RehearsalError,
    check_room,
    fetch_small_files,
    planned_parameters,
    rehearse,
    write_pictures,
    write_random_weights,
)
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.models.weights import read_header

PARAMETERS = 3_379_808  # of the miniature


def test_rehearsal_from_publish_to_card(run_script, miniature_dir, without_meteor, tmp_path):
    """Own pictures with captions; the drawn ones of a default rehearsal take the same way after `write_pictures`."""
    write_scene_dataset(tmp_path / "scenes", train=6, validation=1, test=1)
    out = tmp_path / "out"
    command = ["rehearse.py", "--model", miniature_dir, "--output_dir", out, "--held_out", 1, "--steps", 1]
    command += ["--images", tmp_path / "scenes/images", "--captions", tmp_path / "scenes/stair_train.json"]
    done = run_script(*command, env={"OMP_NUM_THREADS": "1"})
    assert "Rehearsal: 6 pictures of images" in (out / "dataset/README.md").read_text(encoding="utf-8")

    found = read(out / "rehearsal.json")
    assert found["parameters"] == PARAMETERS and found["images_per_step"] == 2
    assert 0 < found["estimated_memory_gib"] < 2 and "activations" in found["estimated_parts"]
    # More than the libraries take, less than a machine has: the process that is looked at is the recipe's.
    assert all(2**28 < peak < 2**33 for peak in found["peak_memory_bytes"].values())
    assert set(found["seconds"]) >= {"publishing", "loading", "training"} and found["seconds_a_step"] > 0
    metrics = read(out / "run/adapter/metrics.json")
    assert metrics["training"]["steps"] == 1 == len(found["losses"])
    assert metrics["training"]["images"] == 4 and len(captions(out / "run/base/predictions.jsonl")) == 1
    assert found["trained_parameters"] == metrics["training"]["trainable_parameters"]
    assert Path(found["card"]).read_text(encoding="utf-8").startswith("---")
    summary = done.stdout[done.stdout.index("memory, estimated") :]
    assert f"{found['estimated_memory_gib']:.1f} GiB" in summary and found["card"] in summary

    assert "is not empty" in run_script(*command, expect=1).stderr


def test_random_weights_are_those_of_the_configuration_and_of_the_seed(miniature_dir, tmp_path):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        fetch_small_files(str(miniature_dir), None, folder)
        assert not (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
        assert planned_parameters(folder) == PARAMETERS
        write_random_weights(folder, seed)
    one, same, other = (load_file(folder / "model.safetensors") for folder in folders)
    real = load_file(miniature_dir / "model.safetensors")
    name = next(key for key in one if key.endswith("layers.0.mlp.up_proj.weight"))
    assert one.keys() == real.keys() and one[name].equal(same[name])
    assert not one[name].equal(other[name]) and not one[name].equal(real[name])
    assert str(one[name].dtype) == "torch.bfloat16"
    header = read_header(folders[0] / "model.safetensors", "one")
    assert sum(map(math.prod, header.values())) == PARAMETERS
    files = read(folders[0] / "generation_config.json"), read(miniature_dir / "generation_config.json")
    assert files[0]["eos_token_id"] == files[1]["eos_token_id"]


def test_what_cannot_be_rehearsed_is_said_first(hub, miniature_dir, tmp_path):
    with pytest.raises(RehearsalError, match=r"needs about [\d,.]+ GiB of disk.*free some"):
        check_room(10**15, tmp_path)
    with pytest.raises(ValueError, match="user/nothing is not a folder, and the Hub does not have it as a model"):
        fetch_small_files("user/nothing", None, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RehearsalError, match="has no config.json"):
        fetch_small_files(str(tmp_path / "empty"), None, tmp_path / "model")
    assert not (tmp_path / "model").exists()

    few = {"images": [{"id": 1}, {"id": 2}], "annotations": [{"id": 1, "image_id": 1, "caption": "猫"}]}
    (tmp_path / "few.json").write_text(json.dumps(few))
    with pytest.raises(RehearsalError, match=r"has captions of 1 pictures; 6 are needed"):
        write_pictures(tmp_path, tmp_path / "few.json", tmp_path / "lists", 2, 0)
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(RehearsalError, match="none.json is not a file of captions in COCO format"):
        write_pictures(tmp_path, tmp_path / "none.json", tmp_path / "more", 2, 0)


def test_what_does_not_fit_leaves_room_for_the_same_command(miniature_dir, repo_root, tmp_path):
    fetch_small_files(str(miniature_dir), None, tmp_path / "huge")
    config = read(tmp_path / "huge/config.json")
    config["text_config"]["vocab_size"] = 10**10
    (tmp_path / "huge/config.json").write_text(json.dumps(config))
    args = SimpleNamespace(
        output_dir=str(tmp_path / "out"),
        model=str(tmp_path / "huge"),
        model_revision=None,
        images=None,
        captions=None,
        drawn_scenes=True,
        recipe_config="recipes/configs/sft_qwen2vl_jp/base.yaml",
        held_out=1,
        seed=0,
    )
    for _ in range(2):
        with pytest.raises(RehearsalError, match="needs about .* GiB of disk"):
            rehearse(args, repo_root)


def test_configuration_and_tokenizer_come_from_the_hub_without_weights(hub, miniature_dir, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("user/base")
    api.upload_folder(repo_id="user/base", folder_path=miniature_dir)
    fetch_small_files("user/base", None, tmp_path / "model")
    fetched = {path.name for path in (tmp_path / "model").iterdir()}
    assert fetched == {path.name for path in miniature_dir.iterdir()} - {"model.safetensors"}
    assert planned_parameters(tmp_path / "model") == PARAMETERS
