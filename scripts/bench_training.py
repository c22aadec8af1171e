"""Measure training speed against TRL's stock SFTTrainer, all in one run.

    python scripts/bench_training.py --preset cpu_proxy --json out.json                     # two CPU cores, 6 minutes
    python scripts/bench_training.py --preset qwen2vl_2b --device cuda --json out.json      # real size, random weights
    python scripts/bench_training.py --preset qwen2vl_2b --device cuda --engines shared_prefix \\
        --images 4 --precision fp16 --max_pixels 200704 --memory_gib 14.5             # would it fit a T4?
    python scripts/bench_training.py --preset cpu_proxy --method dpo --json out.json      # against DPOTrainer
    python scripts/bench_training.py --preset cpu_proxy --method grpo --json out.json     # GRPOTrainer, 5 minutes

The same images and captions go through three trainers, a step of each in turn, so that other work on the machine
slows all of them:

    trl_stock       SFTTrainer as a user would set it up for this recipe: prompt-completion examples, one caption a
                    sequence, label smoothing 0.1, gradient checkpointing
    trl_stock_lean  the same without smoothing and without checkpointing
    shared_prefix   this recipe's trainer; label smoothing 0.1, no checkpointing unless --gradient_checkpointing
                    (shared_prefix_flex: with FlexAttention in place of a dense mask, if named in --engines)

A step is what `trainer.train()` does between two batches: forward, backward, clipping, optimizer; reading pictures is
left out for all. The loss and the gradients of the first step, from the same weights, are compared with those of the
stock trainer (of the lean one, which has another loss, with this engine without smoothing).

MFU counts the work that must be done, whoever does it: the vision encoder forward once an image, the projector forward
and backward, the language model forward and backward through its activations over prefix and captions once, logits of
caption positions. It is divided by the device's peak: NVIDIA's dense 16-bit figure, or a matrix product timed here.

`--method dpo` compares training on preferences: `trl_dpo`, TRL's DPOTrainer as configured by default (gradient
checkpointing), `trl_dpo_lean`, without that, and `dpo`, this project's.

`--method grpo` compares training on rewards, five samples of 16 tokens an image: `trl_grpo`, TRL's GRPOTrainer as
configured by default, `trl_grpo_lean`, without gradient checkpointing, and `grpo`. A step is all of it here: reading
pictures, sampling, rewards, forward, backward, optimizer.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmcap.arguments import run_main
from vlmcap.experiments.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
# Steps a round.
ENGINES = {"trl_stock": 1, "trl_stock_lean": 1, "shared_prefix": 3, "shared_prefix_flex": 3}


@dataclass
class BenchArguments:
    preset: str = field(default="cpu_proxy", metadata={"help": "cpu_proxy (106M parameters) or qwen2vl_2b."})
    method: Literal["sft", "dpo", "grpo"] = field(
        default="sft",
        metadata={"help": "Training on captions, on preferences (a pair of each image) or on rewards (five samples)."},
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})
    engines: list[str] = field(
        default_factory=lambda: list(ENGINES)[:3], metadata={"help": f"Of {', '.join(ENGINES)} (CUDA only)."}
    )
    images: int = field(default=1, metadata={"help": "Images a step, of 640 x 480 pixels with five captions each."})
    rounds: int = field(default=3, metadata={"help": "Rounds; in each, every engine takes its steps in turn."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Gradient checkpointing in the shared-prefix engine."}
    )
    precision: str | None = field(
        default=None, metadata={"help": "bf16, fp16 or fp32. Default: what the recipe chooses for the device."}
    )
    max_pixels: int = field(default=313_600, metadata={"help": "313600 gives 391 image tokens, 200704 gives 247."})
    memory_gib: float | None = field(
        default=None,
        metadata={"help": "Allow this much GPU memory: a step that needs more fails, as on a smaller GPU."},
    )
    seed: int = field(default=0, metadata={"help": "Of weights, adapters and captions."})


def table(result: dict) -> str:
    heads = ["step", "captions/s", "vs stock", "vs lean", "peak GiB", "MFU", "loss", "gradients differ"]
    lines = [f"{'':<16}" + "".join(f"{head:>12}" for head in heads[:-1]) + f"{heads[-1]:>18}"]
    for row in result["rows"]:
        engine, differ = row["engine"], row["max_grad_rel_diff"]
        ratios = [result[key].get(engine) for key in ("speedup_vs_stock", "speedup_vs_stock_lean")]
        cells = [f"{row['step_s_median']:.3f} s", f"{row['captions_per_s']:.2f}"]
        cells += [f"{ratio:.2f}x" if ratio else "-" for ratio in ratios]
        cells += [f"{row['peak_mem_bytes'] / 2**30:.2f}", f"{row['mfu']:.1%}", f"{row['loss']:.5f}"]
        line = f"{engine:<16}" + "".join(f"{cell:>12}" for cell in cells)
        lines.append(line + f"{'-' if differ is None else f'{differ:.1e}':>18}")
    return "\n".join(lines)


def main(args: BenchArguments) -> None:
    for value, known in ((args.preset, PRESETS), *((engine, ENGINES) for engine in args.engines)):
        if value not in known:
            sys.exit(f"error: {value!r} is none of {', '.join(known)}")
    if args.memory_gib and args.device != "cuda":
        sys.exit("error: --memory_gib bounds a GPU's memory: add --device cuda")

    import torch

    from vlmcap.experiments import bench
    from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
    from vlmcap.models.load import base_model, load_processor
    from vlmcap.training.collator import BadImages
    from vlmcap.training.shared_prefix import SharedPrefixCollator

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device")
    if args.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_gib * 2**30 / total)
    preset = PRESETS[args.preset]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processor = load_processor(str(REPOSITORY / "recipes/miniatures/qwen2_vl"), max_pixels=args.max_pixels)
        bench.build_checkpoint(preset, processor, folder / "model", args.seed)
        rows = bench.build_rows(args.images, folder, args.seed)
        if args.method != "sft":
            return report(*_of_captions_compared(args, preset, folder, processor, rows), args.json)
        trainers = {e: bench.build_trainer(e, args, preset, folder, processor, rows) for e in args.engines}
        watches = {engine: bench.Watch(args.device) for engine in trainers}
        for engine, trainer in trainers.items():
            trainer.add_callback(watches[engine])
        adapter = bench.random_adapter(next(iter(trainers.values())).model, args.seed)
        first = bench.compare_first_steps(trainers, watches, adapter)
        for number in range(args.rounds):
            for engine, trainer in trainers.items():
                for _ in range(ENGINES[engine]):
                    bench.step(trainer, adapter)
                print(f"round {number + 1}: {engine:<16}{watches[engine].seconds[-1]:9.3f} s a step", flush=True)
        examples = [{"row": number, "captions": row["captions"]} for number, row in enumerate(rows)]
        bad_images = BadImages(folder / "bad_images.jsonl", limit=0)
        model = base_model(next(iter(trainers.values())).model)
        batch = SharedPrefixCollator(rows, processor, JAPANESE_PROMPT, bad_images, model)(examples)
        result = bench.summarise(args, preset, trainers, watches, first, batch)
    report(result, table(result), args.json)


def _of_captions_compared(args: BenchArguments, *what) -> tuple[dict, str]:
    from vlmcap.experiments import preference_bench, reward_bench

    bench = {"dpo": preference_bench, "grpo": reward_bench}[args.method]
    result = bench.measure(args, *what)
    return result, bench.table(result)


def report(result: dict, lines: str, path: str | None) -> None:
    print(f"\n{lines}")
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments)
