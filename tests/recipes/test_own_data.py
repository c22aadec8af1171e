"""Pictures of one's own, with ids that are texts, from a folder through training to scores, audit and card."""

import json

import pytest

from tests.recipes.files import captions, read
from vlmcap.miniature.scenes import scenes, write_scene_dataset

SETTINGS = "--max_steps 2 --save_steps 2 --eval_steps 2 --load_best_model_at_end false --max_new_tokens 12".split()


def test_own_pictures_through_the_recipe(run_script, repo_root, tmp_path):
    """The demo's settings without its annotations of what is in a picture: references say it."""
    write_scene_dataset(tmp_path, train=12, validation=2, test=2)
    document = json.loads((tmp_path / "stair_train.json").read_text(encoding="utf-8"))
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for image_id, name in names.items():
        texts = [entry["caption"] for entry in document["annotations"] if entry["image_id"] == image_id]
        (tmp_path / "images" / name).with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
    publish = ["own", "--annotations", tmp_path / "images", "--language", "ja", "--overwrite"]
    publish += ["--output_dir", tmp_path / "dataset", "--val_size", 2]
    lines = (repo_root / "recipes/configs/sft_qwen2vl_jp/demo.yaml").read_text(encoding="utf-8").splitlines()
    (tmp_path / "own.yaml").write_text("\n".join(line for line in lines if not line.startswith("instances")))
    recipe = [
        "recipes/sft_qwen2vl_jp.py",
        "--config",
        tmp_path / "own.yaml",
        *SETTINGS,
        "--dataset",
        tmp_path / "dataset",
    ]
    recipe += ["--image_dir", tmp_path / "images", "--output_dir", tmp_path / "run"]

    run_script("publish_datasets.py", *publish, "--test_size", 0)
    done = run_script(*recipe, expect=1)
    assert "has no split 'test'; it has train, validation" in done.stderr

    run_script("publish_datasets.py", *publish, "--test_size", 3)

    run_script(*recipe)
    metrics = read(tmp_path / "run/adapter/metrics.json")
    assert set(metrics["per_image"]["image_id"]) <= set(names.values()) and metrics["dataset"]["corpus"] == "own"
    assert metrics["saw"]["STAIR"] == "no" and read(tmp_path / "run/adapter/audit.json")["flagged"] is not None
    assert (tmp_path / "run/samples.html").exists() and (tmp_path / "run/adapter/README.md").exists()


@pytest.fixture(scope="module")
def english(run_script, tmp_path_factory):
    """A dataset with embedded pictures and ids that are texts; nobody says its licence."""
    folder = tmp_path_factory.mktemp("english")
    for number, scene in enumerate(scenes(14, seed=5, held_out=None)):
        scene.draw().save(folder / f"scene {number}.png")
        (folder / f"scene {number}.txt").write_text("\n".join(scene.english()[:2]), encoding="utf-8")
    publish = ["own", "--annotations", folder, "--images", folder, "--language", "en", "--output_dir", folder / "out"]
    run_script("publish_datasets.py", *publish, "--val_size", 2, "--test_size", 3)
    return folder / "out"


RELATIVES = {"sft_blip_vi": "adapter", "sft_vit_gpt2_food": "model", "sft_vit_llama_food": "adapter"}


@pytest.mark.parametrize("recipe", RELATIVES)
def test_own_pictures_through_the_relatives(run_script, english, without_meteor, tmp_path, recipe):
    """Two steps each: through training, captions, scores and card."""
    config = ["--config", f"recipes/configs/{recipe}/demo.yaml", "--tokenizer", "english"]
    config += ["--early_stopping_patience", 0]
    settings = [*SETTINGS[:-1], 24]  # no caption is cut
    run_script(f"recipes/{recipe}.py", *config, *settings, "--dataset", english, "--output_dir", tmp_path / "run")
    trained = tmp_path / "run" / RELATIVES[recipe]
    metrics, said = read(trained / "metrics.json"), captions(trained / "predictions.jsonl")
    assert metrics["dataset"]["corpus"] == "own" and metrics["training"]["images"] == 9
    assert len(said) == 3 and all(name.startswith("scene ") for name in said)
    assert set(metrics["per_image"]["image_id"]) == set(said)
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert not [name for name in ("UIT-ViIC", "dish", "YJ Captions") if name in card]
    assert "COCO" not in card.replace("saw COCO in training", "")
    (picture,) = english.parent.glob("scene 3.png")
    assert run_script("caption.py", picture, "--adapter", trained).stdout.startswith(f"{picture}\t")
