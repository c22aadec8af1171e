"""Tries inputs on every target for a while, and says how many were tried and what failed.

    python -m tests.fuzz --seconds 600                                  make fuzz
    python -m tests.fuzz --targets lexicon grid --seconds 60
    python -m tests.fuzz --repeat outputs/fuzz/lexicon-0123abcd.input   a failing input once more, with its traceback

Hypothesis draws inputs of the right shape; where atheris is installed (Linux, `pip install atheris`), half of the time
goes to libFuzzer, which changes inputs so that they reach new lines of vlmcap and PyYAML. Every target runs in a
process of its own with 1 GiB of memory above what it starts with and 10 seconds of a processor for an input, so that a
hang, a crash and a blow-up are failures too. A failure is reported once for each place it comes from, with the
smallest input that hypothesis found, and is in outputs/fuzz. The exit status is 1 when there is any.
"""

import argparse
import os
import sys

# Offline and alone: before anything of Hugging Face is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=600, help="for all targets together (default: 600)")
    arguments.add_argument("--inputs", type=int, help="stop after so many for each target and engine, if time is left")
    arguments.add_argument("--targets", nargs="+", help="names of targets (default: all)")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at once (default: the cores)")
    arguments.add_argument("--output_dir", default="outputs/fuzz", help="for failing inputs (default: outputs/fuzz)")
    arguments.add_argument("--no_atheris", action="store_true", help="hypothesis alone, also where atheris is there")
    arguments.add_argument("--repeat", help="run one failing input again")
    args = arguments.parse_args()

    from tests.fuzz import engine

    if args.repeat:
        engine.repeat(args.repeat)
        return
    limit = float("inf") if args.inputs is None else args.inputs
    sys.exit(engine.fuzz(args.seconds, args.targets, args.jobs, args.output_dir, not args.no_atheris, limit))


if __name__ == "__main__":
    main()
