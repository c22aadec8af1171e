"""What scripts/bench_training.py measures of training on rewards: a step of TRL's GRPOTrainer against one here.

`args` is the script's BenchArguments, `preset` the widths and depths of the model. A step is all of it: reading the
pictures, sampling, rewards, losses and the optimizer. Weights are random, so captions would end anywhere: no sample
ends before its last token. All engines start every step from the same adapter, with the same settings of sampling
and loss; what they draw differs, so that losses cannot be compared here (tests/invariants/test_grpo.py does).
"""

import statistics
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import get_peft_model
from transformers import SuppressTokensLogitsProcessor
from trl import GRPOConfig, GRPOTrainer

from vlmcap import provenance
from vlmcap.data.images import open_image
from vlmcap.experiments import bench
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.models.load import ModelArguments, count_parameters, load_model, lora_config
from vlmcap.models.weights import read_adapter
from vlmcap.rewards.combined import Rewarded
from vlmcap.training.collator import BadImages
from vlmcap.training.reward_trainer import CaptionGRPOTrainer
from vlmcap.training.trainer_arguments import CaptionGRPOConfig

# Steps a round.
ENGINES = {"trl_grpo": 1, "trl_grpo_lean": 1, "grpo": 3}
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


def measure(args, preset: dict, folder: Path, processor, rows: datasets.Dataset) -> dict:
    """The JSON document, after a line for each engine and round.

    Args:
        rows: as `bench.build_rows` returns them, with the checkpoint in `folder` / "model".
    """
    start = _with_adapter(args, preset, folder)
    weights = bench.random_adapter(start, args.seed)
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])
    start.save_pretrained(folder / "adapter", save_embedding_layers=False)
    del start
    trainers = {engine: _build(engine, args, preset, folder, processor, rows) for engine in ENGINES}
    watches = {engine: WholeStep(args.device) for engine in trainers}
    for engine, trainer in trainers.items():
        trainer.add_callback(watches[engine])
        bench.step(trainer, weights)  # the first is slower: what is compiled and cached is made in it
        watches[engine].seconds.clear()
        watches[engine].peak.clear()
    for number in range(args.rounds):
        for engine, trainer in trainers.items():
            for _ in range(ENGINES[engine]):
                bench.step(trainer, weights)
            print(f"round {number + 1}: {engine:<16}{watches[engine].seconds[-1]:9.3f} s a step", flush=True)
    return _document(args, preset, trainers, watches, len(rows))


def _with_adapter(args, preset: dict, folder: Path):
    model = load_model(str(folder / "model"), load_in_4bit=preset["load_in_4bit"])
    torch.manual_seed(args.seed)
    return get_peft_model(model, _configuration(args, model))


def _configuration(args, model):
    return lora_config(model, ModelArguments(model_name_or_path=args.preset, lora_dropout=0.0))


def _build(engine: str, args, preset: dict, folder: Path, processor, rows: datasets.Dataset):
    """A trainer, one optimizer step an epoch: all pictures, five samples of each."""
    settings = {
        "output_dir": str(folder / engine),
        "num_generations": SAMPLES,
        "max_completion_length": TOKENS,
        "max_steps": 1,
        "learning_rate": 1e-6,
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": args.seed,
    }
    resolved = CaptionGRPOConfig(output_dir=str(folder), use_cpu=settings["use_cpu"])  # the precision of the device
    if engine == "grpo":
        model = load_model(str(folder / "model"), load_in_4bit=preset["load_in_4bit"])
        trainer = CaptionGRPOTrainer(
            model=model,
            args=CaptionGRPOConfig(**settings, per_device_train_batch_size=len(rows)),
            rows=rows,
            processing_class=processor,
            prompt=JAPANESE_PROMPT,
            bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
            peft_config=_configuration(args, model),
            adapter=read_adapter(str(folder / "adapter")),
            rewards=Letters(),
        )
        ends = trainer.sampling.eos_token_id
        trainer.limits.append(SuppressTokensLogitsProcessor(ends, device=str(trainer.args.device)))
        return trainer
    prompt = [{"role": "user", "content": JAPANESE_PROMPT}]
    model = _with_adapter(args, preset, folder)
    model.load_adapter(str(folder / "adapter"), "default", is_trainable=True)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=letters_of,
        args=GRPOConfig(
            **settings,
            per_device_train_batch_size=SAMPLES * len(rows),
            gradient_checkpointing=engine == "trl_grpo",  # GRPOConfig's default
            generation_kwargs={"min_new_tokens": TOKENS},
            bf16=resolved.bf16,
            fp16=resolved.fp16,
        ),
        train_dataset=datasets.Dataset.from_list([{"image": open_image(row), "prompt": prompt} for row in rows]),
        processing_class=processor,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # in float32 as here; the GradScaler of float16 fails on TRL's bfloat16
            parameter.data = parameter.data.float()
    return trainer


def _document(args, preset: dict, trainers: dict, watches: dict, images: int) -> dict:
    rows = []
    for engine, watch in watches.items():
        weights = sum(p.numel() * p.element_size() for p in trainers[engine].model.parameters())
        rows.append(
            {
                "engine": engine,
                "samples_per_s": SAMPLES * images / statistics.median(watch.seconds),
                "step_s_median": statistics.median(watch.seconds),
                "step_s": watch.seconds,
                "peak_mem_bytes": weights + max(watch.peak),
            }
        )
    seconds = {row["engine"]: row["step_s_median"] for row in rows}
    return {
        "rows": rows,
        "speedup_vs_trl": {engine: seconds["trl_grpo"] / value for engine, value in seconds.items()},
        "speedup_vs_trl_lean": {engine: seconds["trl_grpo_lean"] / value for engine, value in seconds.items()},
        "settings": asdict(args),
        "model": {
            "parameters": count_parameters(trainers["grpo"].model),
            "weights": "random",
            "quantization": "nf4" if preset["load_in_4bit"] else None,
        },
        "batch": {"images": images, "samples_an_image": SAMPLES, "tokens_a_sample": TOKENS},
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def table(document: dict) -> str:
    """The rows as lines of text."""
    heads = ["step", "samples/s", "vs TRL", "vs lean", "peak GiB"]
    lines = [f"{'':<16}" + "".join(f"{head:>12}" for head in heads)]
    for row in document["rows"]:
        cells = [f"{row['step_s_median']:.3f} s", f"{row['samples_per_s']:.2f}"]
        cells += [f"{document[key][row['engine']]:.2f}x" for key in ("speedup_vs_trl", "speedup_vs_trl_lean")]
        cells.append(f"{row['peak_mem_bytes'] / 2**30:.2f}")
        lines.append(f"{row['engine']:<16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
