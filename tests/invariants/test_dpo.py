"""Training on preferences is TRL's DPOTrainer: the same loss and gradients with the same pairs and weights."""

import json

import datasets
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from trl import DPOConfig, DPOTrainer

from tests.invariants.tiny import (
    PROMPT,
    assert_same_step,
    build_model,
    build_processor,
    loss_and_gradients,
    randomise_adapter,
    write_pictures,
)
from vlmcap.data.preferences import read_preferences
from vlmcap.models.load import ModelArguments, lora_config
from vlmcap.models.weights import read_adapter
from vlmcap.training.collator import BadImages
from vlmcap.training.dpo import CaptionDPOTrainer
from vlmcap.training.trainer_arguments import CaptionDPOConfig

SETTINGS = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5, "max_steps": 1, "logging_steps": 1}
SETTINGS |= {"save_strategy": "no", "gradient_checkpointing": False, "beta": 0.3}
PAIRS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of six sizes, preferences.jsonl with one to three pairs of each, and the adapter of the start."""
    folder = tmp_path_factory.mktemp("preferences")
    write_pictures(folder)
    rows = datasets.Dataset.from_parquet(str(folder / "data/train-00000-of-00001.parquet"))
    lines = []
    for row in rows.filter(lambda row: len(row["captions"]) > 1):
        texts = row["captions"]
        # Captions of unequal lengths; one of an image in two of its pairs, chosen and rejected.
        pairs = [(texts[0], texts[1]), (texts[-1] + "。", texts[0]), (texts[1], texts[0] + "と" + texts[1])]
        for chosen, rejected in pairs[: 1 + row["image_id"] % 3]:
            lines.append({"prompt": PROMPT, "chosen": chosen, "rejected": rejected, "image": row["file_name"]})
    assert len(lines) == PAIRS
    (folder / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = start_model()
    start.peft_config["default"].base_model_name_or_path = "tiny"
    start.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


def configuration(model):
    return lora_config(model, ModelArguments(model_name_or_path="tiny", lora_dropout=0.1, lora_top_layers=2))


def start_model():
    torch.manual_seed(1)
    model = build_model("qwen2_vl")
    model = get_peft_model(model, configuration(model))
    randomise_adapter(model)
    return model


def move_on(model) -> None:
    """Away from the reference, so that margins are not zero: the same way for every model of the same weights."""
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def ours(folder, tmp_path, **settings) -> CaptionDPOTrainer:
    rows = read_preferences(str(folder / "preferences.jsonl"), PROMPT)
    model = build_model("qwen2_vl")
    settings = {"per_device_train_batch_size": len(rows), "output_dir": str(tmp_path / "ours")} | SETTINGS | settings
    trainer = CaptionDPOTrainer(
        model,
        CaptionDPOConfig(**settings),
        rows,
        rows,
        build_processor("qwen2_vl"),
        PROMPT,
        BadImages(tmp_path / "bad_images.jsonl", limit=0),
        configuration(model),
        read_adapter(str(folder / "adapter")),
    )
    trainer._find_reference()
    move_on(trainer.model)
    return trainer


def theirs(folder, tmp_path, **settings) -> DPOTrainer:
    """TRL keeps the start as a second adapter, "ref", of its own."""
    lines = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    examples = [
        {
            "images": [Image.open(folder / line["image"]).convert("RGB")],
            "prompt": [{"role": "user", "content": PROMPT}],
            "chosen": [{"role": "assistant", "content": line["chosen"]}],
            "rejected": [{"role": "assistant", "content": line["rejected"]}],
        }
        for line in lines
    ]
    settings = {"per_device_train_batch_size": PAIRS, "max_length": None, "bf16": False} | SETTINGS | settings
    trainer = DPOTrainer(
        model=start_model(),
        args=DPOConfig(output_dir=str(tmp_path / "theirs"), **settings),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=build_processor("qwen2_vl"),
    )
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = parameter.requires_grad and ".ref." not in name
    move_on(trainer.model)
    return trainer


def assert_same_preferences(one, *others) -> None:
    """Losses and gradients to 1e-5: a margin is a difference of four log-probabilities of whole captions, about -100
    each, of which float32 keeps seven digits."""
    step = loss_and_gradients(one)
    for other in others:
        assert_same_step(step, loss_and_gradients(other), loss_tolerance=1e-5)


@pytest.mark.parametrize("loss", [{}, {"loss_type": "robust", "label_smoothing": 0.2}], ids=["sigmoid", "robust"])
def test_a_step_is_that_of_trl(folder, tmp_path, loss):
    """Several pairs of an image, captions in two of them, pictures of six sizes; the reference is another adapter."""
    assert_same_preferences(ours(folder, tmp_path, **loss), theirs(folder, tmp_path, **loss))


def test_accumulated_is_batched_and_trl(folder, tmp_path):
    """Micro-batches of one image with one to three pairs, against one batch of all."""
    accumulated = ours(folder, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=5)
    assert_same_preferences(accumulated, ours(folder, tmp_path, pairs_per_image=9), theirs(folder, tmp_path))


def test_pairs_of_an_image_in_several_examples(folder, tmp_path):
    split = ours(folder, tmp_path, pairs_per_image=1, per_device_train_batch_size=PAIRS)
    assert len(split.train_dataset) == PAIRS
    assert_same_preferences(split, ours(folder, tmp_path))


def test_checkpointing_on_is_off(folder, tmp_path):
    assert_same_preferences(ours(folder, tmp_path, gradient_checkpointing=True), ours(folder, tmp_path))
