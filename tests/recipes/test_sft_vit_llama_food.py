"""The ViT + Llama recipe: its configurations, and a run of the miniatures from drawn scenes to the hub and back."""

from dataclasses import replace

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from tests.recipes.files import assert_describes_itself, captions, read
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.generate import caption_without_prompt
from vlmcap.experiments.ablation import cells, read_grid
from vlmcap.miniature.scenes import write_title_scenes
from vlmcap.models.vit_llama import VitLlamaArguments, load_vit_llama

STEPS = 200
SETTINGS = (
    f"--config recipes/configs/sft_vit_llama_food/demo.yaml --max_steps {STEPS} --save_steps {STEPS}"
    f" --eval_steps {STEPS} --max_validation_images 8 --metric_for_best_model bleu_2"
).split()


@pytest.fixture
def parse(parser_of):
    return parser_of("sft_vit_llama_food")


@pytest.mark.parametrize("name", ["base", "demo", "smollm2", "smollm2_demo"])
def test_configurations_parse_and_say_what_they_do(repo_root, parse, name):
    path = repo_root / f"recipes/configs/sft_vit_llama_food/{name}.yaml"
    assert_describes_itself(path)
    data, model, beams, training = parse(path)
    assert data.tokenizer == "english" and beams.num_beams == 3
    assert model.image_prefix == ("patches" if name == "smollm2_demo" else "pooled")
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert model.lora_alpha == 2 * model.lora_r and model.lora_dropout == 0.05
    assert training.load_best_model_at_end and training.metric_for_best_model == "loss_and_bleu"
    assert training.early_stopping_patience == 5 and training.save_steps % training.eval_steps == 0
    assert not (training.bf16 or training.fp16)  # chosen by the device: float32 on a CPU
    if name == "base":
        assert replace(model, encoder_revision=None, decoder_revision=None) == VitLlamaArguments()


@pytest.mark.parametrize(("name", "count"), [("grid", 2 * 8), ("grid_demo", 2 * 5)])
def test_grids_vary_what_the_recipe_knows(repo_root, parse, name, count):
    grid = read_grid(repo_root / f"recipes/configs/sft_vit_llama_food/{name}.yaml")
    assert grid.recipe == "recipes/sft_vit_llama_food.py"
    assert {"lora_r", "lora_alpha", "image_prefix"} <= grid.vary.keys()
    assert grid.grid["lora_dropout"] == [0.05, 0.1]
    found = cells(grid)
    assert len(found) == count
    for cell in found:
        changes = [str(word) for key, value in cell.changes.items() for word in (f"--{key}", value)]
        model = parse(repo_root / grid.config, *changes)[1]
        assert model.lora_dropout == cell.changes["lora_dropout"]


def test_drawn_scenes_get_titles_and_the_adapter_goes_to_the_hub_and_back(hub, run_script, without_meteor, tmp_path):
    write_title_scenes(tmp_path / "scenes", 1000, seed=0)
    publish = ["publish_datasets.py", "food_titles", "--annotations", tmp_path / "scenes/titles.csv"]
    publish += ["--images", tmp_path / "scenes/images", "--card", "scene_titles", "--pretty_name", "Scenes"]
    publish += ["--license", "cc0-1.0", "--output_dir", tmp_path / "dataset"]
    run_script(*publish, "--push_to_hub", "--repo_id", "user/scene-titles")

    run = tmp_path / "run"
    command = ["recipes/sft_vit_llama_food.py", *SETTINGS, "--dataset", "user/scene-titles", "--output_dir", run]
    done = run_script(*command, "--push_to_hub", "--hub_model_id", "user/miniature-titles")
    assert "image_projection" in done.stdout and "encoder.layers" not in done.stdout
    metrics = read(run / "adapter/metrics.json")
    assert read(run / "adapter/captioning.json")["recipe"] == "sft_vit_llama_food"
    assert metrics["recipe"] == "sft_vit_llama_food" and metrics["prompt"] is None
    parts = {"encoder": "recipes/miniatures/vit", "decoder": "recipes/miniatures/llama"}
    assert {part: found["id"] for part, found in metrics["model"]["parts"].items()} == parts
    assert metrics["training"]["best"]["metric"] == "bleu_2" and metrics["training"]["best"]["step"] == STEPS
    # Before training the Llama describes scenes it does not see; after, most words are those of the title.
    assert metrics["base"]["scores"]["bleu_2"] < 0.3 < 0.45 < metrics["scores"]["bleu_2"]
    said = captions(run / "adapter/predictions.jsonl")
    assert len(set(said.values())) > len(said) / 4  # not one title for all
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == metrics["training"]["trainable_parameters"]
    assert all("encoder" not in name and "embed" not in name for name in tensors)

    files = {"adapter_model.safetensors", "adapter_config.json", "config.json", "processor_config.json", "README.md"}
    assert files <= set(HfApi().list_repo_files("user/miniature-titles"))
    card = ModelCard.load("user/miniature-titles")
    card.validate()
    assert f"{metrics['scores']['bleu_1']:.4f}" in card.text
    model, processor = load_vit_llama("user/miniature-titles")
    rows = load_dataset("user/scene-titles", split="test").select(range(len(said)))
    beams = BeamArguments(num_beams=3, max_new_tokens=24)
    sample = rows.select(range(20))
    assert caption_without_prompt(model, processor, sample["image"][:], beams) == [said[i] for i in sample["image_id"]]

    assert "--resume_from_checkpoint latest" in run_script(*command, expect=1).stderr
    run_script(*command, "--resume_from_checkpoint", "latest", "--max_steps", str(STEPS + 2))
    continued = read(run / "adapter/metrics.json")
    assert continued["training"]["steps"] == STEPS + 2
    assert continued["base"]["created"] == metrics["base"]["created"]  # not captioned with again
