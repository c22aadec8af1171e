"""Measure training speed against TRL's stock SFTTrainer, all in one run.

    python scripts/bench_training.py --preset cpu_proxy --json out.json                     # two CPU cores, 6 minutes
    python scripts/bench_training.py --preset qwen2vl_2b --device cuda --json out.json      # real size, random weights
    python scripts/bench_training.py --preset qwen2vl_2b --device cuda --engines shared_prefix \\
        --images 4 --precision fp16 --max_pixels 200704 --memory_gib 14.5             # would it fit a T4?
    python scripts/bench_training.py --preset cpu_proxy --method dpo --json out.json      # against DPOTrainer
    python scripts/bench_training.py --preset cpu_proxy --method grpo --json out.json     # GRPOTrainer, 5 minutes
    python scripts/bench_training.py --preset cpu_proxy --languages ja en vi --json out.json  # a prompt a caption

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

`--languages ja en vi` gives each of the five captions the prompt of its language. The stock trainer sees a picture, a
prompt and a caption in each of its sequences as before. Here the captions share the picture alone, and each brings its
prompt.

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
from vlmcap.atomic_write import write_atomically
from vlmcap.experiments.presets import ENGINES, PRESETS, PROMPTS

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class BenchArguments:
    preset: str = field(default="cpu_proxy", metadata={"help": "cpu_proxy (106M parameters), qwen2vl_2b, or tiny."})
    method: Literal["sft", "dpo", "grpo"] = field(
        default="sft",
        metadata={"help": "Training on captions, on preferences (a pair of each image) or on rewards (five samples)."},
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    model: str | None = field(
        default=None, metadata={"help": "Folder of a checkpoint of that size; left out, random weights are drawn."}
    )
    json: str | None = field(
        default=None, metadata={"help": "File to write the figures to, after every round those until then."}
    )
    engines: list[str] | None = field(
        default=None,
        metadata={
            "help": "Some of those of the method; default: the first three. "
            + "; ".join(f"{method}: {', '.join(names)}" for method, names in ENGINES.items())
            + ". shared_prefix_flex needs CUDA."
        },
    )
    languages: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"With --method sft: captions in each of these languages in turn, of {', '.join(PROMPTS)}, each"
            " with the prompt of its language. Default: Japanese, one prompt."
        },
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


def main(args: BenchArguments) -> None:
    args.engines = args.engines or list(ENGINES[args.method])[:3]
    asked = [(args.preset, PRESETS), *((engine, ENGINES[args.method]) for engine in args.engines)]
    for value, known in asked + [(language, PROMPTS) for language in args.languages]:
        if value not in known:
            sys.exit(f"error: {value!r} is none of {', '.join(known)}")
    if args.languages and args.method != "sft":
        sys.exit(f"error: --method {args.method} is measured with one prompt: leave --languages out")
    if args.memory_gib and args.device != "cuda":
        sys.exit("error: --memory_gib bounds a GPU's memory: add --device cuda")

    import torch

    from vlmcap.experiments import bench, preference_bench, reward_bench
    from vlmcap.models.load import load_processor

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device")
    if args.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_gib * 2**30 / total)
    preset = PRESETS[args.preset]
    measure = {"sft": bench, "dpo": preference_bench, "grpo": reward_bench}[args.method].measure
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        miniature = REPOSITORY / "recipes/miniatures" / ("qwen2_vl_languages" if args.languages else "qwen2_vl")
        processor = load_processor(str(miniature), max_pixels=args.max_pixels)
        if args.model is None:
            bench.build_checkpoint(preset, processor, folder / "model", args.seed)
        rows = bench.build_rows(args.images, folder, args.seed, args.languages)
        for result in measure(args, preset, folder, processor, rows):
            if args.json:
                write_atomically(Path(args.json), json.dumps(result, indent=2) + "\n")
    print(f"\n{bench.table(result)}")


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments)
