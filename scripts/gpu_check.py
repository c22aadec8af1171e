"""Measure on a GPU, in one command, what the READMEs say of GPUs: speed, memory, precision, resuming, FSDP.

    make gpu-check                                            # a data center's GPU; writes outputs/gpu_check.json
    python scripts/gpu_check.py --json out.json               # the same without make: 9 minutes at most
    python scripts/gpu_check.py --minutes 30                  # a T4
    python scripts/gpu_check.py --parts t4 memory             # some parts
    python scripts/gpu_check.py --preset tiny --device cpu    # whether it runs, in miniature, on a CPU: 4 minutes

It needs no network, no git and no data: the model has Qwen2-VL-2B's size and random weights, the pictures are drawn.
scripts/README.md says how packages get to a machine without a package index. Parts, in this order:

    model        draws and writes the random model, loads it in NF4; always runs, the others load it too
    training     a step of TRL's stock trainer, of the lean one, and of this recipe (scripts/bench_training.py)
    dpo          a step on preferences: TRL's DPOTrainer and this recipe (scripts/bench_training.py --method dpo)
    grpo         a step on rewards, sampling included: TRL's GRPOTrainer and this recipe (--method grpo)
    captioning   `generate` and this project's engine (scripts/bench_captioning.py)
    t4           steps with t4.yaml in float16, allowed 14.5 GiB
    memory       steps with base.yaml: the estimate of the start report against what was needed
    flex         FlexAttention against a dense mask in training
    precision    captions that differ by engine and batch size, in float32, float16 and bfloat16
    resume       a run that is killed and resumed, against one that is not
    fsdp         a step with accelerate_configs/fsdp_qlora.yaml; two processes where there are two GPUs

Each part is a process of its own. It may take twice its share of the minutes that are left, and is stopped then. A
part that fails stops no other, and keeps the rows that it has found. What the device cannot do is skipped. At the end
come tables in Markdown and, of parts that failed, the last lines; the status is then 1.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.experiments.gpu_check import PARTS
from vlmcap.experiments.presets import PRESETS
from vlmcap.places import ROOT, check_miniature


@dataclass
class CheckArguments:
    preset: str = field(default="qwen2vl_2b", metadata={"help": f"One of {', '.join(PRESETS)}."})
    device: str = field(default="cuda", metadata={"help": "cuda or cpu."})
    minutes: float = field(default=9, metadata={"help": "Time for everything."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Of {', '.join(PARTS)}."})
    json: str | None = field(
        default=None, metadata={"help": "File to write the figures to, after every part those until then."}
    )


def main(args: CheckArguments) -> None:
    start = time.monotonic()
    known = {args.preset: PRESETS, args.device: ("cuda", "cpu")} | dict.fromkeys(args.parts, PARTS)
    for value, names in known.items():
        if value not in names:
            sys.exit(f"error: {value!r} is none of {', '.join(names)}")
    check_miniature(str(ROOT / "recipes/miniatures/qwen2_vl"))
    if args.json:
        Path(args.json).absolute().parent.mkdir(parents=True, exist_ok=True)

    import torch

    from vlmcap.experiments.gpu_check import check, report

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device")
    result = check(args, start)
    print(f"\n{report(result)}")
    if result["failures"]:
        sys.exit(f"error: {len(result['failures'])} of {len(result['parts'])} parts failed")


if __name__ == "__main__":
    run_main(main, __doc__, CheckArguments)
