"""Captions a second: transformers' `generate` against this project's engine, of one model and of base and adapter.

    python scripts/bench_captioning.py --preset cpu_proxy --json out.json    # two CPU cores, 15 minutes
    python scripts/bench_captioning.py --preset qwen2vl_2b --device cuda --images 64 --json out.json

The same pictures go through four engines, in turn, so that other work on the machine slows all of them:

    stock          `generate`, beam 3, batches of 16, as a careful user writes it
    branches       beams as branches of one sequence, continuous batching (vlmcap/captioning/branches.py)
    stock_both     `generate` with the base model, then with the adapter
    branches_both  both in one pass, the vision encoder once for both (vlmcap/captioning/engines.py)

Weights are random. Captions end at lengths that are drawn from real STAIR captions, the same for all engines. Resizing
pictures is part of the time, reading them from disk is not. A speed is that of the fastest round.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.atomic_write import write_atomically
from vlmcap.experiments.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINES = ("stock", "branches", "stock_both", "branches_both")


@dataclass
class BenchArguments:
    preset: str = field(default="cpu_proxy", metadata={"help": f"One of {', '.join(PRESETS)}."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    model: str | None = field(
        default=None, metadata={"help": "Folder of a checkpoint of that size; left out, random weights are drawn."}
    )
    json: str | None = field(
        default=None, metadata={"help": "File to write the figures to, after every round those until then."}
    )
    engines: list[str] = field(default_factory=lambda: list(ENGINES), metadata={"help": f"Of {', '.join(ENGINES)}."})
    images: int = field(default=32, metadata={"help": "Pictures, of 640 x 480 pixels."})
    batch_size: int = field(default=16, metadata={"help": "Pictures at once."})
    max_new_tokens: int = field(default=64, metadata={"help": "A caption is cut after this many tokens."})
    num_beams: int = field(default=3, metadata={"help": "Beam width."})
    rounds: int = field(default=2, metadata={"help": "Rounds; in each, every engine runs in turn."})
    max_pixels: int = field(default=313_600, metadata={"help": "313600 gives 391 image tokens, 200704 gives 247."})
    seed: int = field(default=0, metadata={"help": "Of weights, adapter and caption lengths."})


def table(result: dict) -> str:
    heads = ["images/s", "vs stock", "peak GiB", "same captions"]
    lines = [f"{'':<16}" + "".join(f"{head:>15}" for head in heads)]
    for row in result["rows"]:
        cells = [f"{row['images_per_s']:.2f}", f"{result['speedup_vs_stock'][row['engine']]:.2f}x"]
        cells += [f"{row['peak_mem_bytes'] / 2**30:.2f}", f"{row['identical_captions']} of {row['captions']}"]
        lines.append(f"{row['engine']:<16}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main(args: BenchArguments) -> None:
    for value, known in ((args.preset, PRESETS), *((engine, ENGINES) for engine in args.engines)):
        if value not in known:
            sys.exit(f"error: {value!r} is none of {', '.join(known)}")

    import torch

    from vlmcap.experiments.bench import build_checkpoint
    from vlmcap.experiments.captioning_bench import Bench, draw_lengths, measure, random_model, summarise
    from vlmcap.models.load import load_processor

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device")
    preset = PRESETS[args.preset]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processor = load_processor(str(REPOSITORY / "recipes/miniatures/qwen2_vl"), max_pixels=args.max_pixels)
        if args.model is None:
            build_checkpoint(preset, processor, folder / "model", args.seed)
        model = random_model(args.model or folder / "model", preset, args.seed)
        bench = Bench(args, model, processor, draw_lengths(args.images, args.seed))
        for measured in measure(bench, args.engines, args.rounds, args.device):
            result = summarise(args, bench, measured)
            if args.json:
                write_atomically(Path(args.json), json.dumps(result, indent=2) + "\n")
    print()
    print(table(result))


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments)
