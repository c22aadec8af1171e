"""Trainers on rewards, of the tiny models and pictures of `tests.invariants.tiny`."""

from pathlib import Path

import numpy as np
from peft import get_peft_model

from tests.invariants import tiny
from vlmcap.models.load import ModelArguments, lora_config
from vlmcap.models.weights import Adapter
from vlmcap.rewards.combined import Rewarded
from vlmcap.training.collator import BadImages
from vlmcap.training.reward_trainer import CaptionGRPOTrainer
from vlmcap.training.trainer_arguments import CaptionGRPOConfig

ARGUMENTS = ModelArguments(model_name_or_path="tiny", lora_dropout=0.0, lora_top_layers=2)


class TwoRewards:
    """Rewards that depend on the caption alone: its length, and how many of its letters are different."""

    names, weights = ["length", "letters"], [1.0, 0.5]

    def __call__(self, captions, references, rows) -> Rewarded:
        assert all(row["captions"] == texts for row, texts in zip(rows, references, strict=True))
        per_function = np.array([[length(caption), letters(caption)] for caption in captions])
        return Rewarded(per_function, per_function @ np.array(self.weights))


def length(caption: str) -> float:
    return len(caption) / 5


def letters(caption: str) -> float:
    return len(set(caption)) / max(1, len(caption))


def write_adapter(folder: Path, architecture: str = "qwen2_vl") -> Path:
    """An adapter with random weights, in `folder/adapter`."""
    model = tiny.build_model(architecture)
    model = get_peft_model(model, lora_config(model, ARGUMENTS))
    tiny.randomise_adapter(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def build(folder: Path, rows, adapter: Path, architecture="qwen2_vl", model=None, **settings) -> CaptionGRPOTrainer:
    """A trainer that takes one step on all pictures, three samples of nine tokens each. `settings` of the trainer
    (features, validation, figures, rewards) go to it, the others into its arguments."""
    model = model or tiny.build_model(architecture)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    given = {name: settings.pop(name) for name in ("features", "validation", "figures") if name in settings}
    rewards = settings.pop("rewards", None) or TwoRewards()
    defaults = {"optim": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0, "logging_steps": 1, "max_steps": 1}
    defaults |= {"per_device_train_batch_size": len(rows) // accumulated, "save_strategy": "no", "seed": 5}
    defaults |= {"num_generations": 3, "max_completion_length": 9, "loss_type": "grpo", "report_to": "none"}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False}
    return CaptionGRPOTrainer(
        model,
        CaptionGRPOConfig(str(folder / "run"), **defaults | settings),
        rows,
        tiny.build_processor(architecture),
        tiny.PROMPT,
        BadImages(folder / "bad_images.jsonl", limit=0),
        lora_config(model, ARGUMENTS),
        Adapter("adapter", None, adapter, lora_config(model, ARGUMENTS), {}),
        rewards,
        **given,
    )


def trained_weights(trainer) -> dict:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
