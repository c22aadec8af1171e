"""The Vietnamese BLIP recipe: its configurations, and a run of the miniature from drawn scenes to the hub and back."""

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from tests.recipes.files import assert_describes_itself, captions, read
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.generate import caption_without_prompt
from vlmcap.miniature.scenes import write_vietnamese_scenes
from vlmcap.models.blip import BlipArguments, load_blip_adapter

STEPS = 120
SETTINGS = (
    f"--config recipes/configs/sft_blip_vi/demo.yaml --max_steps {STEPS} --save_steps {STEPS} --eval_steps {STEPS}"
    " --max_validation_images 8"
).split()


@pytest.fixture
def parse(parser_of):
    return parser_of("sft_blip_vi")


@pytest.mark.parametrize("name", ["base", "demo"])
def test_configurations_parse_and_say_what_they_do(repo_root, parse, name):
    path = repo_root / f"recipes/configs/sft_blip_vi/{name}.yaml"
    assert_describes_itself(path)
    data, model, beams, training = parse(path)
    assert data.tokenizer == "vietnamese" and beams.num_beams == 3
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 32, 0.05)
    assert model.lora_target_modules == BlipArguments().lora_target_modules
    assert (training.per_device_train_batch_size, training.label_smoothing_factor) == (8, 0.05)
    assert training.load_best_model_at_end and training.metric_for_best_model == "cider_d"
    assert training.early_stopping_patience == 5 and training.save_steps % training.eval_steps == 0
    assert not (training.bf16 or training.fp16)  # chosen by the device: float32 on a CPU
    if name == "base":
        assert (training.learning_rate, training.num_train_epochs) == (5e-5, 30)
        assert training.gradient_accumulation_steps > 1
        assert model.model_name_or_path == BlipArguments().model_name_or_path


def test_drawn_scenes_are_described_in_vietnamese_and_the_adapter_goes_to_the_hub_and_back(
    hub, run_script, without_meteor, tmp_path
):
    write_vietnamese_scenes(tmp_path / "scenes", train=240, validation=8, test=24)
    files = [tmp_path / f"scenes/uitviic_captions_{split}2017.json" for split in ("train", "val", "test")]
    publish = ["publish_datasets.py", "uit_viic", "--images", tmp_path / "scenes/images", "--card", "scenes_vi"]
    publish += ["--output_dir", tmp_path / "dataset", "--pretty_name", "Scenes", "--license", "cc0-1.0"]
    run_script(*publish, "--push_to_hub", "--repo_id", "user/scenes-vi", "--annotations", *files)

    run = tmp_path / "run"
    command = ["recipes/sft_blip_vi.py", *SETTINGS, "--dataset", "user/scenes-vi", "--output_dir", run]
    done = run_script(*command, "--push_to_hub", "--hub_model_id", "user/miniature-vi")
    assert "crossattention" in done.stdout and "240 images, 1,200 captions" in done.stdout
    metrics = read(run / "adapter/metrics.json")
    assert read(run / "adapter/captioning.json")["recipe"] == "sft_blip_vi"
    assert metrics["recipe"] == "sft_blip_vi" and metrics["prompt"] is None
    assert metrics["model"]["id"] == metrics["base"]["model"]["id"] == "recipes/miniatures/blip"
    assert metrics["training"]["best"] == {
        "step": STEPS,
        "metric": "cider_d",
        "score": pytest.approx(metrics["training"]["log"][-1]["eval_cider_d"]),
    }
    # The base answers in English; the adapter in Vietnamese, with the marks.
    assert metrics["base"]["scores"]["cider_d"] < 0.05 < 1 < metrics["scores"]["cider_d"]
    assert metrics["base"]["scores"]["bleu_1"] < 0.1 < 0.5 < metrics["scores"]["bleu_1"]
    said = captions(run / "adapter/predictions.jsonl")
    assert all("màu" in caption for caption in said.values())
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == metrics["training"]["trainable_parameters"]

    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "README.md"} <= set(
        HfApi().list_repo_files("user/miniature-vi")
    )
    card = ModelCard.load("user/miniature-vi")
    card.validate()
    assert f"{metrics['scores']['cider_d']:.4f}" in card.text
    model, processor = load_blip_adapter("user/miniature-vi")
    rows = load_dataset("user/scenes-vi", split="test")
    beams = BeamArguments(num_beams=3, max_new_tokens=40)
    assert caption_without_prompt(model, processor, rows["image"][:], beams) == [said[i] for i in rows["image_id"]]

    # Continued: LoRA, new rows and the optimizer's state come back, or two steps on it would speak no Vietnamese.
    run_script(*command, "--resume_from_checkpoint", "latest", "--max_steps", str(STEPS + 2))
    continued = read(run / "adapter/metrics.json")
    last = continued["training"]["log"][-1]
    assert continued["training"]["steps"] == last["step"] == STEPS + 2
    assert last["eval_cider_d"] == pytest.approx(metrics["training"]["best"]["score"], rel=0.2)
    assert continued["base"]["created"] == metrics["base"]["created"]
