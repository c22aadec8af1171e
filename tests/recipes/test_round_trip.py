"""The main path with real clients over HTTP: publish, train, push, and use what was pushed from other processes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard

from tests.recipes.files import captions, read
from vlmcap.miniature.scenes import write_scene_dataset

SETTINGS = (
    "--config recipes/configs/sft_qwen2vl_jp/demo.yaml --max_steps 6 --save_steps 3 --eval_steps 3"
    " --load_best_model_at_end false --max_new_tokens 24"
).split()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_dataset(folder, train=40, validation=4, test=6)
    return folder


def publish(run_script, scenes, miniature_dir, output_dir, *more):
    files = [scenes / "stair_train.json", scenes / "stair_val.json"]
    ids = ["--val_ids", scenes / "val_ids.txt", "--test_ids", scenes / "test_ids.txt"]
    arguments = ["--source", "stair", "--tokenizer", miniature_dir, "--output_dir", output_dir]
    arguments += ["--annotations", *files, "--yj_annotations", scenes / "yj.json", *ids]
    return run_script("publish_datasets.py", *arguments, *more)


def test_publish_train_push_load(hub, run_script, scenes, miniature_dir, repo_root, tmp_path):
    images = ["--images", scenes / "images"]
    publish(
        run_script, scenes, miniature_dir, tmp_path / "dataset", *images, "--push_to_hub", "--repo_id", "user/scenes"
    )
    assert HfApi().dataset_info("user/scenes").private
    rows = load_dataset("user/scenes", split="test", cache_dir=tmp_path / "clean")
    assert len(rows) == 6 and rows[0]["image"].size == (84, 84) and len(rows[0]["captions"]) == 5

    run = tmp_path / "run"
    publication = ["--push_to_hub", "--hub_model_id", "user/miniature-ja"]
    recipe = ["recipes/sft_qwen2vl_jp.py", *SETTINGS, "--dataset", "user/scenes", "--output_dir", run]
    recipe += ["--instances", scenes / "instances.json"]
    done = run_script(*recipe, *publication)
    assert "language_model.layers.7.mlp.up_proj (LoRA)" in done.stdout and "36 images, 180 captions" in done.stdout
    metrics = read(run / "adapter/metrics.json")
    assert metrics["training"]["steps"] == 6 and metrics["training"]["in_yj_images"] == 0
    assert [entry["step"] for entry in metrics["training"]["log"] if "eval_cider_d" in entry] == [3, 6]
    assert metrics["counts"]["images"] == metrics["base"]["counts"]["images"] == 6
    assert set(metrics["intervals"]) == set(metrics["scores"]) and len(metrics["per_image"]["image_id"]) == 6
    assert metrics["dataset"]["revision"] == HfApi().dataset_info("user/scenes").sha
    base = read(run / "base/metrics.json")
    del base["per_image"]  # the base's own file has it
    assert base == metrics["base"]
    assert metrics["saw"]["STAIR"] == "train" and metrics["base"]["saw"]["STAIR"] == "no"
    assert "extra_special_tokens" not in read(run / "adapter/tokenizer_config.json")  # transformers 4 fails on it
    # What is published names no folder of this machine.
    assert not [path.name for path in (run / "adapter").glob("*.json*") if str(tmp_path) in path.read_text("utf-8")]
    assert (run / "samples.html").stat().st_size > 10_000

    # On the Hub: adapter, processor, card and scores, and nothing of the trainer's own.
    files = set(HfApi().list_repo_files("user/miniature-ja"))
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "README.md"} <= files
    assert {"metrics.json", ".eval_results/captioning.yaml"} <= files
    assert not [name for name in files if "optimizer" in name or "training_args" in name or "checkpoint" in name]
    card = ModelCard.load("user/miniature-ja")
    card.validate()
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.datasets == ["user/scenes"]
    assert f"{metrics['scores']['cider_d']:.4f}" in card.text

    # Another process, a clean cache: the pushed adapter and processor say what was said before the push.
    again = tmp_path / "again/predictions.jsonl"
    model = ["--model", "recipes/miniatures/qwen2_vl", "--adapter", "user/miniature-ja", "--load_in_4bit"]
    data = ["--dataset", "user/scenes", "--output", again, "--generation_batch_size", 50, "--max_new_tokens", 24]
    run_script("infer_baseline.py", *model, *data, env={"HF_HOME": str(tmp_path / "clean_home")}, fresh=True)
    assert captions(again) == captions(run / "adapter/predictions.jsonl")
    references = ["--dataset", "user/scenes", "--split", "test"]
    run_script("eval_captioning.py", "--predictions", again, *references, "--output", tmp_path / "again/metrics.json")
    scores = read(tmp_path / "again/metrics.json")["scores"]
    assert scores == metrics["scores"]

    # The card's quick start, pasted after the line that the miniature needs on AVX512: it says what was scored.
    code = "import vlmcap.models.nf4\n" + re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    rows[0]["image"].save(tmp_path / "photo.jpg", "PNG")
    code = code.replace('"recipes/miniatures/qwen2_vl"', repr(str(miniature_dir)))
    pasted = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert pasted.stdout.strip() == captions(again)[rows[0]["image_id"]], pasted.stderr
    # So does scripts/caption.py, with nothing but the adapter's name: the rest is in captioning.json beside it.
    assert "captioning.json" in files
    captioned = run_script("caption.py", tmp_path / "photo.jpg", "--adapter", "user/miniature-ja")
    assert captioned.stdout == f"{tmp_path / 'photo.jpg'}\t{pasted.stdout}"

    # A run on other data begins where the pushed adapter ended: with a learning rate of zero it says the same.
    further = tmp_path / "further"
    start = ["--adapter", "user/miniature-ja", "--output_dir", further, "--max_steps", 1, "--learning_rate", 0]
    run_script(*recipe, *start, "--eval_strategy", "no", "--early_stopping_patience", 0)
    assert captions(further / "adapter/predictions.jsonl") == captions(run / "adapter/predictions.jsonl")
    head = HfApi().model_info("user/miniature-ja").sha
    card_text = (further / "adapter/README.md").read_text(encoding="utf-8")
    assert f"Training started from the adapter `user/miniature-ja` (commit `{head}`)" in card_text
    overwritten = run_script(*recipe, "--adapter", run / "adapter", expect=1)
    assert "would be overwritten by this run: choose another --output_dir" in overwritten.stderr

    # The same command again does not overwrite the run; asked to, it continues it.
    assert "--resume_from_checkpoint latest" in run_script(*recipe, expect=1).stderr
    run_script(*recipe, "--resume_from_checkpoint", "latest", "--max_steps", "8")
    continued = read(run / "adapter/metrics.json")
    assert continued["training"]["steps"] == 8
    # It continues from the time of its checkpoint: that of the first run, except for what came after its last step.
    before, after = (
        {
            entry["step"]: entry["elapsed_seconds"]
            for entry in run_metrics["training"]["log"]
            if "elapsed_seconds" in entry
        }
        for run_metrics in (metrics, continued)
    )
    assert before[6] == after[6] <= after[8] <= continued["training"]["seconds"]
    # The longer-trained adapter captioned again; the base, which did not change, was not.
    assert continued["model"]["adapter_revision"] != metrics["model"]["adapter_revision"]
    assert continued["created"] > metrics["created"] and continued["base"]["created"] == metrics["base"]["created"]


def test_recipe_stops_before_training(run_script, scenes, miniature_dir, tmp_path):
    """Captions without photographs: the message names the fix, and nothing was written."""
    publish(run_script, scenes, miniature_dir, tmp_path / "captions")
    recipe = [
        "recipes/sft_qwen2vl_jp.py",
        *SETTINGS,
        "--dataset",
        tmp_path / "captions",
        "--output_dir",
        tmp_path / "run",
    ]
    assert "fetch_images.py" in run_script(*recipe, expect=1).stderr
    assert not (tmp_path / "run").exists()

    # What is read only after training is looked for before it.
    publish(run_script, scenes, miniature_dir, tmp_path / "pictures", "--images", scenes / "images")
    recipe[recipe.index(tmp_path / "captions")] = tmp_path / "pictures"
    stopped = run_script(*recipe, "--instances", tmp_path / "nowhere.json", expect=1)
    assert "nowhere.json: the annotations cannot be read" in stopped.stderr
    assert "unknown tokenizer 'mecab'" in run_script(*recipe, "--tokenizer", "mecab", expect=1).stderr
    (tmp_path / "run/base").mkdir()
    (tmp_path / "run/base/predictions.jsonl").write_text('{"image_id": 1, "caption": "a"}\n')
    stopped = run_script(*recipe, "--instances", scenes / "instances.json", expect=1)
    assert "base/predictions.jsonl was started with another model, dataset, prompt, decoding" in stopped.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))
