"""Time to quality on the miniature: CIDEr-D against seconds of training, for both engines and several batches.

    python scripts/bench_time_to_quality.py --output_dir outputs/time_to_quality    # two CPU cores, 70 minutes

The miniature learns to caption drawn scenes in Japanese, with the settings of recipes/configs/sft_qwen2vl_jp/demo.yaml
except for those of `GRID` in recipes/vlmcap/experiments/time_to_quality.py: engine, images a step, captions of an
image in one step, learning rate, number of steps. Between steps the first `--test_images` test scenes are captioned
and scored; that time is not counted.

Two questions, two panels. Left, the same learning settings: every configuration trains on 15 captions a step, of 15, 9
or 3 images, at one learning rate for one number of steps. What a curve loses against another at the same step is what
less diverse captions cost; what it gains in seconds is what sharing saves. Right, every configuration at the learning
rate that gave it the highest final score, for every number of steps tried.

Scores of single trainings scatter by some tenths of a point, so trainings are repeated: all learning rates are tried
with the first of its `SEEDS`, the best one and those of the left panel are repeated with the others. Lines are means
over the seeds, bands go from the lowest to the highest.

Learning and time are measured apart. What a model has learned after k steps does not depend on the clock, but seconds
do, on all else the machine does. So trainings run side by side, each on one core (`--workers`), and seconds a step
are measured when all of them are done: one process, all cores, all configurations in turns of some steps each, reading
of pictures included, and the median over the turns counts. A curve is drawn as step x median seconds. Give this last
part (3 minutes) a machine with nothing else to do.

Run again, the same command continues where it was stopped: trainings that are in runs.jsonl are not repeated (delete
the file after a change of settings), so that on a finished folder only the timing is. `--timing_rounds 0` keeps the
timing too and only draws the plots again.

Output: runs.jsonl, timing.json, results.json (everything: curves, seconds a step, best learning rates, seconds to
reach a score, versions, commit, hardware), time_to_quality.svg, a table. It is the miniature: the machinery is what is
measured here, and nothing is evidence about Qwen2-VL.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main


@dataclass
class BenchArguments:
    output_dir: str = field(default="outputs/time_to_quality", metadata={"help": "Folder for data and results."})
    test_images: int = field(default=100, metadata={"help": "Test scenes captioned for every point of a curve."})
    points: int = field(default=10, metadata={"help": "Points of a curve."})
    workers: int = field(default=2, metadata={"help": "Trainings side by side, each on one core."})
    timing_rounds: int = field(default=7, metadata={"help": "Turns of every configuration; 0: keep earlier timings."})
    timing_steps: int = field(default=20, metadata={"help": "Steps a turn."})


def main(args: BenchArguments) -> None:
    timings = Path(args.output_dir) / "timing.json"
    if not args.timing_rounds and not timings.exists():
        sys.exit(f"error: --timing_rounds 0 keeps earlier timings, but {timings} does not exist")

    from vlmcap.experiments.time_to_quality import measure

    measure(args)


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments, interrupted="The same command continues where this one ended.")
