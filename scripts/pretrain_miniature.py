"""Pretrain the miniature Qwen2-VL on English scene captions: the base model of `make demo` and of the tests.

The checkpoint in recipes/miniatures/qwen2_vl was written by

    python scripts/pretrain_miniature.py --output_dir recipes/miniatures/qwen2_vl

(20 minutes on one CPU core, seeded). It is a demonstration model of 3.4 million parameters and no evidence about
the quality of Qwen2-VL.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import parse
from vlmcap.models.miniature import pretrain


@dataclass
class Arguments:
    output_dir: str = field(
        metadata={"help": "Folder for the model and its processor, e.g. recipes/miniatures/qwen2_vl."}
    )
    steps: int = field(default=1800, metadata={"help": "Optimizer steps of 48 captions each."})
    seed: int = field(default=0, metadata={"help": "Seed of scenes, weights and batches."})


if __name__ == "__main__":
    (args,) = parse(__doc__, Arguments)
    pretrain(Path(args.output_dir), steps=args.steps, seed=args.seed)
