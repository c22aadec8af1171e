"""With the same samples, rewards and weights, CaptionGRPOTrainer has the losses and gradients of TRL's GRPOTrainer."""

import random

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.invariants import tiny
from vlmcap.models.load import ModelArguments, lora_config
from vlmcap.models.weights import Adapter
from vlmcap.rewards.combined import Rewarded
from vlmcap.training.collator import BadImages
from vlmcap.training.reward_trainer import CaptionGRPOTrainer
from vlmcap.training.trainer_arguments import CaptionGRPOConfig

SAMPLES, LONGEST = 3, 9
# What both log under one name.
COMPARED = {"reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "kl"}
COMPARED |= {f"clip_ratio/{name}_mean" for name in ("low", "high", "region")}
ARGUMENTS = ModelArguments(model_name_or_path="tiny", lora_dropout=0.0, lora_top_layers=2)


class TwoRewards:
    """Rewards that depend on the caption alone: its length, and how often its letters are repeated."""

    names, weights = ["length", "letters"], [1.0, 0.5]

    def __call__(self, captions, references, rows):
        assert all(row["captions"] == texts for row, texts in zip(rows, references, strict=True))
        per_function = np.array([[length(c), letters(c)] for c in captions])
        return Rewarded(per_function, per_function @ np.array(self.weights))


def length(caption: str) -> float:
    return len(caption) / 5


def letters(caption: str) -> float:
    return len(set(caption)) / max(1, len(caption))


def texts_of(completions) -> list[str]:
    return [" ".join(completion[0]["content"].split()) for completion in completions]


def trl_length(completions, **kwargs):
    return [length(caption) for caption in texts_of(completions)]


def trl_letters(completions, **kwargs):
    return [letters(caption) for caption in texts_of(completions)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and an adapter."""
    folder = tmp_path_factory.mktemp("grpo")
    tiny.write_pictures(folder)
    model = get_peft_model(tiny.build_model("qwen2_vl"), lora_config(tiny.build_model("qwen2_vl"), ARGUMENTS))
    tiny.randomise_adapter(model)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return tiny.read_pictures(folder)


@pytest.fixture(scope="module")
def samples(rows) -> list[list[list[int]]]:
    """Three samples an image, of 1 to 9 tokens; some are cut before their end. Those of one image are alike."""
    tokenizer, draw = tiny.build_processor("qwen2_vl").tokenizer, random.Random(3)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pieces = sorted({piece for texts in rows["captions"] for ids in tokenizer(texts)["input_ids"] for piece in ids})

    def sample() -> list[int]:
        whole = draw.choices(pieces, k=draw.randint(0, LONGEST - 1)) + [end]
        return whole if draw.random() < 0.7 else draw.choices(pieces, k=LONGEST)

    found = [[sample() for _ in range(SAMPLES)] for _ in range(len(rows))]
    found[2] = [found[2][0]] * SAMPLES
    return found


class Gradients(TrainerCallback):
    """Of every optimizer step; after each, the weights are moved by the same noise, so that later steps are compared
    from the same weights too, and the ratios of probabilities are not 1."""

    def __init__(self):
        self.steps, self.generator = [], torch.Generator().manual_seed(2)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=self.generator)


class Given(CaptionGRPOTrainer):
    given: list

    def _sample(self, pictures, rows):
        return [self.given[row] for row in rows]


class GivenToTRL(GRPOTrainer):
    given: list

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        assert len(prompt_ids) == len(self.given) * num_generations
        return [sample for image in self.given for sample in image], None


def common(settings: dict) -> dict:
    defaults = {"optim": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0}
    defaults |= {"logging_steps": 1, "max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    defaults |= {"save_strategy": "no", "max_completion_length": LONGEST, "num_generations": SAMPLES, "seed": 5}
    return defaults | {"gradient_checkpointing": False, "loss_type": "grpo"} | settings


def build(kind, folder, rows, model=None, features=None, accumulated=1, **settings):
    model = model or tiny.build_model("qwen2_vl")
    batch = {"per_device_train_batch_size": len(rows) // accumulated, "gradient_accumulation_steps": accumulated}
    return kind(
        model,
        CaptionGRPOConfig(str(folder / "run"), **common(settings) | batch),
        rows,
        tiny.build_processor("qwen2_vl"),
        tiny.PROMPT,
        BadImages(folder / "bad_images.jsonl", limit=0),
        lora_config(model, ARGUMENTS),
        Adapter("adapter", None, folder / "adapter", lora_config(model, ARGUMENTS), {}),
        TwoRewards(),
        features=features,
    )


def ours(folder, rows, samples, **settings):
    trainer = build(Given, folder, rows, **settings)
    trainer.given = samples
    return trained(trainer)


def trls(folder, rows, samples, accumulated=1, **settings):
    """TRL's own trainer on the same images, which trains the same adapter further."""
    examples = [
        {
            "image": Image.open(row["image"]["path"]).convert("RGB"),
            "prompt": [{"role": "user", "content": tiny.PROMPT}],
        }
        for row in rows
    ]
    model = tiny.build_model("qwen2_vl")
    model = get_peft_model(model, lora_config(model, ARGUMENTS))
    tiny.randomise_adapter(model)
    batch = len(rows) * SAMPLES // accumulated
    processor = tiny.build_processor("qwen2_vl")
    processor.tokenizer.padding_side = "left"  # as Qwen publishes it; TRL's prompts of different lengths need it
    trainer = GivenToTRL(
        model,
        [trl_length, trl_letters],
        GRPOConfig(
            str(folder / "trl"),
            bf16=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            shuffle_dataset=False,
            reward_weights=TwoRewards.weights,
            **common(settings),
        ),
        datasets.Dataset.from_list(examples),
        processing_class=processor,
    )
    trainer.given = samples
    return trained(trainer)


def trained(trainer):
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log, gradients.steps


def assert_same(ours, theirs):
    assert len(ours[0]) == len(theirs[0]) and len(ours[1]) == len(theirs[1])
    for one, other in zip(*(run[0] for run in (ours, theirs)), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
        for name in COMPARED & set(other):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for one, other in zip(*(run[1] for run in (ours, theirs)), strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            size = other[name].norm()
            assert size > 0, f"{name} has no gradient"
            assert (gradient - other[name]).norm() <= 1e-5 * size, name


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_losses(folder, rows, samples, loss_type, beta):
    settings = {"loss_type": loss_type, "beta": beta, "num_iterations": 2, "epsilon": 0.02, "max_steps": 3}
    found = ours(folder, rows, samples, **settings)
    expected = trls(folder, rows, samples, **settings)
    assert_same(found, expected)
    assert found[0][0]["frac_reward_zero_std"] == pytest.approx(expected[0][0]["frac_reward_zero_std"]) == 1 / 6
    assert any(entry["clip_ratio/region_mean"] > 0.05 for entry in found[0])
    assert not beta or found[0][-1]["kl"] > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_rewards": "none"},
        {"scale_rewards": "batch", "loss_type": "dapo"},
        {"temperature": 0.7, "beta": 0.1},
        {"epsilon": 0.02, "epsilon_high": 0.05, "num_iterations": 3, "max_steps": 3},
        {"beta": 0.3, "use_bias_correction_kl": False, "num_iterations": 2, "max_steps": 2},
        *({"mask_truncated_completions": True, "loss_type": name} for name in ("grpo", "dr_grpo", "dapo")),
        *({"accumulated": 3, "loss_type": name, "beta": 0.1} for name in ("grpo", "dr_grpo", "dapo")),
    ],
    ids=str,
)
def test_settings(folder, rows, samples, settings):
    assert_same(ours(folder, rows, samples, **settings), trls(folder, rows, samples, **settings))
