"""With the same samples, rewards and weights, CaptionGRPOTrainer has the losses and gradients of TRL's GRPOTrainer."""

import random

import datasets
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.invariants import rewarded, tiny
from tests.invariants.rewarded import TwoRewards
from vlmcap.models.load import lora_config
from vlmcap.training.collator import BadImages
from vlmcap.training.features import cache_features

SAMPLES, LONGEST = 3, 9
# What both log under one name.
COMPARED = {"reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "kl"}
COMPARED |= {f"clip_ratio/{name}_mean" for name in ("low", "high", "region")}


def texts_of(completions) -> list[str]:
    return [" ".join(completion[0]["content"].split()) for completion in completions]


def trl_length(completions, **kwargs):
    return [rewarded.length(caption) for caption in texts_of(completions)]


def trl_letters(completions, **kwargs):
    return [rewarded.letters(caption) for caption in texts_of(completions)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and an adapter."""
    folder = tmp_path_factory.mktemp("grpo")
    tiny.write_pictures(folder)
    rewarded.write_adapter(folder)
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


def give(trainer, samples) -> None:
    """Lets it train on these samples of its images instead of drawing some."""
    trainer.sampler.draw = lambda pictures, rows, step: [samples[row] for row in rows]


class GivenToTRL(GRPOTrainer):
    given: list

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        assert len(prompt_ids) == len(self.given) * num_generations
        return [sample for image in self.given for sample in image], None


def ours(folder, rows, samples, **settings):
    trainer = rewarded.build(folder, rows, folder / "adapter", **settings)
    give(trainer, samples)
    return trained(trainer)


def trls(folder, rows, samples, gradient_accumulation_steps=1, **settings):
    """TRL's own trainer on the same images, which trains the same adapter further."""
    examples = [
        {
            "image": Image.open(row["image"]["path"]).convert("RGB"),
            "prompt": [{"role": "user", "content": row["prompts"][0][0] if "prompts" in row else tiny.PROMPT}],
        }
        for row in rows
    ]
    model = tiny.build_model("qwen2_vl")
    model = get_peft_model(model, lora_config(model, rewarded.ARGUMENTS))
    tiny.randomise_adapter(model)
    processor = tiny.build_processor("qwen2_vl")
    processor.tokenizer.padding_side = "left"  # as Qwen publishes it; TRL's prompts of different lengths need it
    common = {"optim": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0, "logging_steps": 1, "max_steps": 1}
    common |= {"save_strategy": "no", "seed": 5, "num_generations": SAMPLES, "max_completion_length": LONGEST}
    common |= {"loss_type": "grpo", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    common |= {"gradient_checkpointing": False, "bf16": False, "shuffle_dataset": False}
    common |= {"per_device_train_batch_size": len(rows) * SAMPLES // gradient_accumulation_steps}
    common |= {"gradient_accumulation_steps": gradient_accumulation_steps, "reward_weights": TwoRewards.weights}
    trainer = GivenToTRL(
        model,
        [trl_length, trl_letters],
        GRPOConfig(str(folder / "trl"), **common | settings),
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
        *({"gradient_accumulation_steps": 3, "loss_type": name, "beta": 0.1} for name in ("grpo", "dr_grpo", "dapo")),
    ],
    ids=str,
)
def test_settings(folder, rows, samples, settings):
    assert_same(ours(folder, rows, samples, **settings), trls(folder, rows, samples, **settings))


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("how", ["cached", "checkpointed", "in small batches"])
def test_however_it_is_computed(tmp_path, rows, samples, architecture, how):
    """Cached image features, gradient checkpointing and accumulated batches change neither loss nor gradients."""
    adapter = rewarded.write_adapter(tmp_path, architecture)
    settings = {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2, "max_steps": 2}

    def run(**changes):
        trainer = rewarded.build(tmp_path, rows, adapter, architecture, **settings | changes)
        give(trainer, samples)
        return trained(trainer)

    if how == "cached":
        model, processor = tiny.build_model(architecture), tiny.build_processor(architecture)
        bad_images = BadImages(tmp_path / "bad_images.jsonl", limit=0)
        features = cache_features(tmp_path / "features", model, processor, rows, "tiny", None, bad_images)
        found = run(features=features, model=model)
    elif how == "checkpointed":
        found = run(gradient_checkpointing=True)
    else:
        found = run(gradient_accumulation_steps=3)
    assert_same(found, run())


def test_a_prompt_of_each_image_is_trl(folder, rows, samples):
    """Images asked in three languages, in one batch: prompts of several lengths before their samples."""
    asked = [tiny.PROMPT, *tiny.OTHERS]
    prompts = [[[asked[number % 3]]] * len(texts) for number, texts in enumerate(rows["captions"])]
    prompted = rows.add_column("prompts", prompts)
    assert_same(ours(folder, prompted, samples), trls(folder, prompted, samples))
