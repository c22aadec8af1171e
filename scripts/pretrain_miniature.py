"""Pretrain a miniature on drawn scenes: the base models of the demos and of the tests.

The committed checkpoints were written by

    python scripts/pretrain_miniature.py --output_dir recipes/miniatures/qwen2_vl
    python scripts/pretrain_miniature.py --model qwen2_vl_languages --output_dir recipes/miniatures/qwen2_vl_languages
    python scripts/pretrain_miniature.py --model blip --output_dir recipes/miniatures/blip
    python scripts/pretrain_miniature.py --model vit --output_dir recipes/miniatures/vit
    python scripts/pretrain_miniature.py --model gpt2 --output_dir recipes/miniatures/gpt2
    python scripts/pretrain_miniature.py --model llama --output_dir recipes/miniatures/llama

(on one CPU core 20 minutes for the first, 36, 5, 3, 1 and 1 for the others; seeded). They are demonstration models of
1 to 3.4 million parameters and no evidence about the quality of the models that they stand for.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main

MODELS = ("qwen2_vl", "qwen2_vl_languages", "blip", "vit", "gpt2", "llama")


@dataclass
class Arguments:
    output_dir: str = field(
        metadata={"help": "Folder for the model and its processor or tokenizer, e.g. recipes/miniatures/blip."}
    )
    model: str = field(default="qwen2_vl", metadata={"help": f"One of {', '.join(MODELS)}.", "choices": list(MODELS)})
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps; default each model's own."})
    seed: int = field(default=0, metadata={"help": "Seed of scenes, weights and batches."})


def main(args: Arguments) -> None:
    from vlmcap.miniature import family, qwen2_vl

    pretrain = {"qwen2_vl": qwen2_vl.pretrain, "qwen2_vl_languages": qwen2_vl.pretrain_languages} | family.PRETRAIN
    steps = {} if args.steps is None else {"steps": args.steps}
    if measured := pretrain[args.model](Path(args.output_dir), seed=args.seed, **steps):
        print("on held-out scenes: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
