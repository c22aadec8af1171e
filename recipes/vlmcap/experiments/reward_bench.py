"""What scripts/bench_training.py measures of training on rewards: a step of TRL's GRPOTrainer against one here.

`args` is the script's BenchArguments, `preset` the widths and depths of the model. A step is all of it: reading the
pictures, sampling, rewards, losses and the optimizer. Weights are random, so captions would end anywhere: no sample
ends before its last token. All engines start every step from the same adapter, with the same settings of sampling
and loss; what they draw differs, so that losses cannot be compared here (tests/invariants/test_grpo.py does).
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from transformers import SuppressTokensLogitsProcessor
from trl import GRPOConfig, GRPOTrainer

from vlmcap.data.images import open_image
from vlmcap.experiments import bench
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.models.weights import read_adapter
from vlmcap.rewards.combined import Rewarded
from vlmcap.training.collator import BadImages
from vlmcap.training.reward_trainer import CaptionGRPOTrainer
from vlmcap.training.trainer_arguments import CaptionGRPOConfig

SAMPLES, TOKENS = 5, 16


class WholeStep(bench.Watch):
    """From the beginning of a run of one step: samples are drawn before what transformers calls a step begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        pass


class Letters:
    """A reward that costs nothing: how many different characters a caption has."""

    names, weights = ["letters"], [1.0]

    def __call__(self, captions, references, rows) -> Rewarded:
        values = np.array(letters(captions), dtype=np.float64)
        return Rewarded(values[:, None], values)


def letters(captions: list[str]) -> list[int]:
    return [len(set(caption)) for caption in captions]


def letters_of(completions, **kwargs) -> list[int]:
    """The same for TRL, which has turns of a conversation."""
    return letters([completion[0]["content"] for completion in completions])


def measure(args, preset: dict, folder: Path, processor, rows: datasets.Dataset) -> Iterator[dict]:
    """The JSON document after each round; arguments as of `bench.measure`."""
    weights = bench.write_adapter(args, preset, folder)
    trainers = {engine: _build(engine, args, preset, folder, processor, rows) for engine in args.engines}
    watches = bench.watch_all(trainers, WholeStep, args)
    for engine, trainer in trainers.items():
        bench.step(trainer, weights)  # the first is slower: what is compiled and cached is made in it
        watches[engine].forget()
    for _ in bench.rounds(args, trainers, watches, weights):
        found = bench.step_rows(trainers, watches, {"samples": SAMPLES * len(rows)})
        yield {
            "rows": found,
            "speedup_vs_trl": bench.speedups(found, "trl_grpo"),
            "speedup_vs_trl_lean": bench.speedups(found, "trl_grpo_lean"),
            "batch": {"images": len(rows), "samples_an_image": SAMPLES, "tokens_a_sample": TOKENS},
        } | bench.machine(args, preset, next(iter(trainers.values())).model)


def _build(engine: str, args, preset: dict, folder: Path, processor, rows: datasets.Dataset):
    """A trainer, one optimizer step an epoch: all pictures, five samples of each."""
    settings = bench.one_step(engine, args, folder) | {
        "num_generations": SAMPLES,
        "max_completion_length": TOKENS,
        "learning_rate": 1e-6,
    }
    ours = CaptionGRPOConfig(**settings, per_device_train_batch_size=len(rows))
    if engine == "grpo":
        model = bench.load_base(args, preset, folder)
        trainer = CaptionGRPOTrainer(
            model=model,
            args=ours,
            rows=rows,
            processing_class=processor,
            prompt=JAPANESE_PROMPT,
            bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
            peft_config=bench.adapter_config(args, model),
            adapter=read_adapter(str(folder / "adapter")),
            rewards=Letters(),
        )
        ends = trainer.sampler.config.eos_token_id
        trainer.sampler.limits.append(SuppressTokensLogitsProcessor(ends, device=str(trainer.args.device)))
        return trainer
    prompt = [{"role": "user", "content": JAPANESE_PROMPT}]
    trainer = GRPOTrainer(
        model=bench.load_adapted(args, preset, folder),
        reward_funcs=letters_of,
        args=GRPOConfig(
            **settings,
            per_device_train_batch_size=SAMPLES * len(rows),
            gradient_checkpointing=engine == "trl_grpo",  # GRPOConfig's default
            generation_kwargs={"min_new_tokens": TOKENS},
            bf16=ours.bf16,
            fp16=ours.fp16,
        ),
        train_dataset=datasets.Dataset.from_list([{"image": open_image(row), "prompt": prompt} for row in rows]),
        processing_class=processor,
    )
    bench.train_in_float32(trainer.model)
    return trainer
