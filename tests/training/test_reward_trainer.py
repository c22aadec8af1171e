"""Training on rewards: samples, resuming, what is logged, what ends a run. Losses: tests/invariants/test_grpo.py."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig

from tests.invariants import rewarded, tiny
from tests.invariants.rewarded import TwoRewards, trained_weights
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.errors import UserError
from vlmcap.evaluation.tasks import one_task
from vlmcap.rewards.arguments import RewardError
from vlmcap.rewards.combined import Rewarded
from vlmcap.training import checkpoints
from vlmcap.training.arguments import CaptionGRPOFields, TrainerFields
from vlmcap.training.reward_trainer import grpo_report
from vlmcap.training.sampling import RepeatingSampler
from vlmcap.training.trainer_arguments import CaptionGRPOConfig
from vlmcap.training.validation import CaptionValidation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewarded")
    tiny.write_pictures(folder)
    rewarded.write_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return tiny.read_pictures(folder)


@pytest.fixture
def build(folder, rows, tmp_path):
    """build(name="run", ...): see `rewarded.build`."""

    def build(name="run", rows=rows, **settings):
        return rewarded.build(tmp_path / name, rows, folder / "adapter", **settings)

    return build


def keep_samples(trainer) -> list[dict]:
    """The samples of every step that it will take, by row."""
    kept, draw = [], trainer.sampler.draw

    def keep(pictures, rows, step):
        found = draw(pictures, rows, step)
        kept.append(dict(zip(rows, found, strict=True)))
        return found

    trainer.sampler.draw = keep
    return kept


# Samples -------------------------------------------------------------------------------------------------------------
def test_samples_depend_on_seed_step_and_image_alone(build):
    whole = build("whole", max_steps=2)
    in_whole = keep_samples(whole)
    whole.train()
    parts = build("parts", max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    parts.sampler.at_once = 1
    in_parts = keep_samples(parts)
    parts.train()
    assert in_whole == in_parts
    assert in_whole[0] != in_whole[1]
    other = build("other", seed=6)
    in_other = keep_samples(other)
    other.train()
    assert in_other[0] != in_whole[0]
    samples = [sample for images in in_whole[0].values() for sample in images]
    assert len({tuple(sample) for sample in samples}) > 12, "samples of one image should differ"


def test_no_special_token_is_sampled_but_the_end(build):
    """At this temperature all tokens are about as likely. Without the bar a third of these samples would hold one."""
    trainer = build(temperature=1000.0, num_generations=30, max_completion_length=30)
    tokenizer = trainer.processing_class.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = set(trainer.sampler.config.eos_token_id)
    kept = keep_samples(trainer)
    trainer.train()
    samples = [sample for images in kept[0].values() for sample in images]
    assert len(special - ends) > 5
    assert not any(special & set(sample[:-1]) or (special - ends) & set(sample) for sample in samples)
    assert any(sample[-1] in ends for sample in samples) and any(len(sample) == 30 for sample in samples)


def test_the_order_repeats_the_images_of_a_step():
    order = list(RepeatingSampler([0] * 11, batch_size=2, seed=3, step=4, times=3))
    assert len(order) == len(RepeatingSampler([0] * 11, 2, 3, 4, 3)) == 24
    assert order[:4] == order[4:8] == order[8:12] and order[12:16] == order[16:20] == order[20:]
    assert len(set(order)) == 8


# Resuming ------------------------------------------------------------------------------------------------------------
class Stop(TrainerCallback):
    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.stop_on_signal.ask(signal.SIGTERM, None)


RUN = {"max_steps": 6, "learning_rate": 0.02, "optim": "adamw_torch", "num_iterations": 2, "beta": 0.1}
RUN |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 99}
RUN |= {"logging_steps": 4}


def logged(trainer) -> list[dict]:
    """The log except for what a clock says."""
    timed = ("seconds", "wait", "runtime", "per_second")
    log = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in log]


@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_run_resumes_to_the_last_bit(build, tmp_path, step):
    """Also between two steps on the same samples, which another model drew, and between two lines of the log."""
    whole = build("whole", **RUN)
    whole.train()
    stopped = build("stopped", **RUN)
    stopped.callback_handler.callbacks.insert(0, Stop(stopped, step))
    with pytest.raises(SystemExit) as end:
        stopped.train()
    assert end.value.code == 128 + signal.SIGTERM
    folder = tmp_path / f"stopped/run/checkpoint-{step}"
    assert checkpoints.damage(folder) is None
    assert (json.loads((folder / "samples_0.json").read_bytes())["samples"] is None) == (step == 4)
    resumed = build("stopped", **RUN)
    resumed.train(str(folder))
    expected = trained_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained_weights(resumed).items())
    start = trained_weights(build("start", **RUN))
    assert not any(torch.equal(value, start[name]) for name, value in expected.items() if "lora" in name)
    for entry, wanted in zip(logged(resumed)[:-1], logged(whole)[:-1], strict=True):
        assert entry == wanted
    assert (
        resumed.summary()["sampled"]
        == whole.summary()["sampled"]
        == {
            "samples": 18,
            "images": 6,
            "images_alike": whole.totals["images_alike"],
        }
    )


# Rewards -------------------------------------------------------------------------------------------------------------
class Constant:
    """Some images' captions are all worth the same; from a number of calls on, something is wrong."""

    names, weights = ["constant"], [1.0]

    def __init__(self, alike, fails_at=None):
        self.alike, self.fails_at, self.calls = alike, fails_at, 0

    def __call__(self, captions, references, rows):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RewardError("the reward constant returned nan")
        values = [3.0 if row["image_id"] in self.alike else len(c) for c, row in zip(captions, rows, strict=True)]
        return Rewarded(np.array(values)[:, None], np.array(values))


def test_images_whose_samples_score_alike_teach_nothing_and_are_counted(build):
    trainer = build(rewards=Constant(range(6)), learning_rate=0.1, weight_decay=0.0)
    before = trained_weights(trainer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trained_weights(trainer).items())
    some = build("some", rewards=Constant([1, 4]))
    some.train()
    log = some.state.log_history[0]
    assert log["frac_reward_zero_std"] == pytest.approx(some.totals["images_alike"] / 6)
    assert some.totals["images_alike"] >= 2 and some.totals["images"] == 6 and some.totals["samples"] == 18


def test_after_a_failed_reward_the_last_checkpoint_is_whole(build, tmp_path):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(RewardError, match="returned nan"):
        build(rewards=Constant([], fails_at=3), **settings).train()
    checkpoint = checkpoints.newest(tmp_path / "run/run")
    assert checkpoint.name == "checkpoint-2"
    resumed = build(rewards=Constant([]), **settings)
    resumed.train(str(checkpoint))
    assert resumed.state.global_step == 5


# Validation and log --------------------------------------------------------------------------------------------------
def test_validation_rewards_captions_and_warns_once(build, rows, capsys):
    """The held-out reward is logged before the first step too; figures that get worse while it rises are told."""
    processor = tiny.build_processor("qwen2_vl")
    beams = GenerationArguments(prompt=tiny.PROMPT, num_beams=2, max_new_tokens=6)
    calls = []

    class Rising(TwoRewards):
        def __call__(self, captions, references, rows):
            found = super().__call__(captions, references, rows)
            return Rewarded(found.per_function, found.total + len(calls))

    def figures(captions, references, tokenizer):
        assert tokenizer == "unidic-lite" and captions.keys() == references.keys() == {"0", "1", "2"}
        calls.append(captions)
        return {"chair_s": 0.1 * len(calls), "chair_i": 0.0, "distinct": 1.0, "words": 5.0}

    trainer = build(
        rewards=Rising(),
        figures=figures,
        validation=CaptionValidation(rows.select(range(3)), processor, beams),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 1, 2, 3]
    assert {"eval_cider_d", "eval_rewards/length", "eval_rewards/letters", "eval_chair_s"} <= set(evaluated[0])
    assert capsys.readouterr().err.count("The reward rose") == 1


def test_validation_rewards_each_key(build, rows):
    """Captions of two prompts, each compared with the captions of its key."""
    processor, seen = tiny.build_processor("qwen2_vl"), []
    beams = GenerationArguments(prompt=tiny.PROMPT, num_beams=2, max_new_tokens=6)
    few = rows.select(range(3))
    tasks = [
        one_task(dataclasses.replace(beams, prompt=prompt), "unidic-lite", few)
        for prompt in (tiny.PROMPT, "Describe.")
    ]
    english = {image: texts[:1] for image, texts in tasks[1].references.items() if image != "1"}
    tasks = [
        dataclasses.replace(tasks[0], key="ja"),
        dataclasses.replace(tasks[1], key="en", references=english, tokenizer="english"),
    ]

    class Seen(TwoRewards):
        def __call__(self, captions, references, rows):
            seen.append([(row["key"], str(row["image_id"]), refs) for row, refs in zip(rows, references, strict=True)])
            return super().__call__(captions, references, rows)

    def figures(captions, references, tokenizer):
        return {"distinct": len(captions) / 2}

    validation = CaptionValidation(few, processor, beams, tasks=tasks)
    trainer = build(rewards=Seen(), figures=figures, validation=validation)
    scores = trainer.validate(trainer.model.eval())
    assert sorted(seen[-1]) == sorted(
        [("ja", image, refs) for image, refs in tasks[0].references.items()]
        + [("en", image, refs) for image, refs in english.items()]
    )
    assert scores["distinct"] == pytest.approx((3 / 2 + 2 / 2) / 2) and {"cider_d_ja", "cider_d_en"} <= set(scores)


def test_what_is_logged(build):
    trainer = build(loss_type="dapo", beta=0.1)
    trainer.train()
    names = set(trainer.state.log_history[0])
    assert {
        "reward",
        "reward_std",
        "rewards/length/mean",
        "rewards/letters/std",
        "kl",
        "frac_reward_zero_std",
    } <= names
    assert {"completions/mean_length", "completions/clipped_ratio", "completions/distinct"} <= names
    assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "seconds/sampling"} <= names


def test_report(build):
    text = grpo_report(build(beta=0.1, num_iterations=2, max_steps=-1, num_train_epochs=2), "a/b", 7056, 16)
    assert "Rewards and their weights: length 1, letters 0.5" in text
    assert "Samples: 3 of each image, at temperature 1, of 9 tokens" in text
    assert "2 steps an epoch, 4 steps in all" in text and "beta 0.1" in text


# Settings ------------------------------------------------------------------------------------------------------------
def test_more_images_a_step_than_there_are(build, rows):
    with pytest.raises(UserError, match="there are 5 images to train on, and a step takes 6"):
        build(rows=rows.select(range(5)), per_device_train_batch_size=6)


def test_names_and_defaults_are_those_of_trl():
    theirs = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    own = {field.name for field in dataclasses.fields(TrainerFields)} | {"cache_image_features"}
    ours = [field for field in dataclasses.fields(CaptionGRPOFields) if field.name not in own]
    assert len(ours) == 14
    for field in ours:
        if field.name != "max_completion_length":
            assert field.default == theirs[field.name].default, field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations: 1: choose 2 or more"),
        ({"temperature": 0.0}, "temperature: 0.0: choose a number above 0"),
        ({"top_p": 0.0}, "top_p: 0.0: choose a number above 0, 1 at most"),
        ({"beta": -0.1}, "beta: -0.1: choose 0 or more"),
        ({"label_smoothing_factor": 0.1}, "samples are no labels"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CaptionGRPOConfig(str(tmp_path), **settings)
