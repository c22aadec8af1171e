"""Real photographs, captions, tokenizer, chat template and processor settings; random weights of real widths.

Nothing here says anything about quality: the weights are random, and only as many layers as the machinery needs.
"""

import json
import shutil

import pytest
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.recipes.files import read


@pytest.fixture(scope="module")
def random_qwen2vl(qwen2vl_dir, tmp_path_factory):
    """Qwen2-VL-2B with its real ViT, projector, language-layer and vocabulary shapes, two layers of each stack."""
    folder = tmp_path_factory.mktemp("qwen2vl")
    config = AutoConfig.from_pretrained(qwen2vl_dir)
    config.vision_config.depth = 2
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(folder)
    for name in (
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.json",
    ):
        shutil.copy(qwen2vl_dir / name, folder)
    return folder


def test_yj_captions_with_photographs(run_script, data_dir, qwen2vl_dir, tmp_path):
    photographs = data_dir / "coco_yj_images"
    arguments = ["--source", "yj", "--annotations", photographs / "captions.json", "--images", photographs]
    run_script("publish_datasets.py", *arguments, "--tokenizer", qwen2vl_dir, "--output_dir", tmp_path / "yj")
    rows = load_dataset(str(tmp_path / "yj"), split="test")
    assert len(rows) == 21 and sum(len(row["captions"]) for row in rows) == 44
    for row in rows:
        assert row["image"].mode == "RGB" and min(row["image"].size) >= 200


def test_recipe_trains_on_photographs(run_script, data_dir, qwen2vl_dir, random_qwen2vl, tmp_path):
    """The same photographs, with id lists for three splits, through publish and the recipe."""
    photographs = data_dir / "coco_yj_images"
    ids = [image["id"] for image in read(photographs / "captions.json")["images"]]
    (tmp_path / "val").write_text(f"{ids[0]}\n")
    (tmp_path / "test").write_text(f"{ids[1]}\n{ids[2]}\n")
    (tmp_path / "yj.json").write_text(
        json.dumps({"images": [{"id": ids[5]}], "annotations": [{"id": 1, "image_id": ids[5], "caption": "犬です。"}]})
    )
    arguments = ["--annotations", photographs / "captions.json", "--yj_annotations", tmp_path / "yj.json"]
    arguments += ["--val_ids", tmp_path / "val", "--test_ids", tmp_path / "test", "--images", photographs]
    arguments += ["--tokenizer", qwen2vl_dir, "--output_dir", tmp_path / "dataset"]
    run_script("publish_datasets.py", "--source", "stair", *arguments)

    run = tmp_path / "run"
    settings = [
        "--config",
        "recipes/configs/sft_qwen2vl_jp/base.yaml",
        "--dataset",
        tmp_path / "dataset",
        "--output_dir",
        run,
    ]
    settings += ["--model_name_or_path", random_qwen2vl, "--lora_top_layers", 2, "--dataloader_num_workers", 0]
    settings += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--max_steps", 1]
    settings += ["--max_new_tokens", 4, "--max_pixels", 100_352, "--image_dir", photographs]
    done = run_script("recipes/sft_qwen2vl_jp.py", *settings)
    assert "visual.merger.mlp.0" in done.stdout and "14 linear layers in NF4" in done.stdout
    metrics = read(run / "adapter/metrics.json")
    training = metrics["training"]
    assert (training["images"], training["steps"], training["bad_images"]) == (17, 1, 0)
    assert 0 < training["train_loss"] < 20
    assert metrics["decoding"]["max_pixels"] == 100_352 and metrics["counts"]["images"] == 2
