"""Training on preferences is TRL's DPOTrainer: the same loss and gradients with the same pairs and weights."""

import json

import datasets
import pytest
import torch
from PIL import Image
from trl import DPOConfig, DPOTrainer

from tests.invariants import tiny
from tests.invariants.tiny import PAIRS, assert_same_step, loss_and_gradients


def move_on(model) -> None:
    """Away from the reference, so that margins are not zero: the same way for every model of the same weights."""
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def ours(pictures, tmp_path, **settings):
    trainer = tiny.build_preference_trainer(pictures, tmp_path / "ours", **settings)
    trainer.find_reference()
    move_on(trainer.model)
    return trainer


def theirs(pictures, tmp_path, source="preferences.jsonl", **settings) -> DPOTrainer:
    """TRL keeps the start as a second adapter, "ref", of its own."""
    lines = [json.loads(line) for line in (pictures / source).read_text(encoding="utf-8").splitlines()]
    examples = [
        {
            "images": [Image.open(pictures / line["image"]).convert("RGB")],
            "prompt": [{"role": "user", "content": line["prompt"]}],
            "chosen": [{"role": "assistant", "content": line["chosen"]}],
            "rejected": [{"role": "assistant", "content": line["rejected"]}],
        }
        for line in lines
    ]
    settings = {
        "output_dir": str(tmp_path / "theirs"),
        "per_device_train_batch_size": len(examples),
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_length": None,
        "beta": 0.3,
    } | settings
    trainer = DPOTrainer(
        model=tiny.build_start(),
        args=DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=tiny.build_processor("qwen2_vl"),
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
def test_a_step_is_that_of_trl(pictures, tmp_path, loss):
    """Several pairs of an image, captions in two of them, pictures of six sizes; the reference is another adapter."""
    assert_same_preferences(ours(pictures, tmp_path, **loss), theirs(pictures, tmp_path, **loss))


def test_a_step_with_several_prompts_is_that_of_trl(pictures, tmp_path):
    """Pairs of an image in three languages: each caption is a branch with its own prompt."""
    one = ours(pictures, tmp_path, source="prompted.jsonl", others=tiny.OTHERS)
    assert any(len({said for (said,) in prompts}) == 3 for prompts in one.train_dataset["prompts"])
    assert_same_preferences(one, theirs(pictures, tmp_path, source="prompted.jsonl"))


def test_accumulated_is_batched_and_trl(pictures, tmp_path):
    """Micro-batches of one image with two or three pairs, against one batch of all."""
    accumulated = ours(pictures, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=5)
    assert_same_preferences(accumulated, ours(pictures, tmp_path), theirs(pictures, tmp_path))


def test_pairs_of_an_image_in_several_examples(pictures, tmp_path):
    split = ours(pictures, tmp_path, pairs_per_image=1, per_device_train_batch_size=PAIRS)
    assert len(split.train_dataset) == PAIRS
    assert_same_preferences(split, ours(pictures, tmp_path))


def test_checkpointing_on_is_off(pictures, tmp_path):
    assert_same_preferences(ours(pictures, tmp_path, gradient_checkpointing=True), ours(pictures, tmp_path))
