r"""Compare runs that were scored on the same images: tables, plots, and a page with every caption.

    python scripts/compare_runs.py outputs/qwen2vl_stair outputs/sft_qwen2vl_jp/base outputs/sft_qwen2vl_jp/adapter

    # with names of your own, tested against another run than the first, with photographs for the page
    python scripts/compare_runs.py zero-shot=outputs/base/metrics.json r8=outputs/r8 r32=outputs/r32 --reference r32 \
        --dataset data/stair --split test --image_dir data/images --output_dir outputs/comparison

Every RUN, given before any option, is a metrics.json (scripts/eval_captioning.py, scripts/infer_baseline.py and the
recipe write them) or a folder that holds one, and may be named: NAME=PATH. Captions for the page are read from
predictions.jsonl beside it, flags from audit.json (scripts/audit_captions.py). Runs of other images, another dataset
or other metric signatures than the first are refused.

Output, in --output_dir:

    metrics.csv       one row a run, all numbers in full, p values, prompt, decoding, signatures
    metrics.md, .tex  scores with 95 % intervals and significance marks, what each model saw, parameters, peak memory,
                      captions/s
    scores.svg, quality_against_memory.svg, training_curves.svg
    comparison.html   all of it, and each image with its references and every system's caption; needs no network

Where the dataset that was scored is a folder that is still there, as after `make demo`, pictures and references come
from it; else --dataset (and --image_dir, or --references) say where they are. Five runs on 5,000 images take 13
seconds on one CPU core, reading the photographs not included.
"""

import sys
from dataclasses import dataclass, field

from vlmcap.arguments import parse
from vlmcap.data.images import DatasetError
from vlmcap.evaluation.scoring import ScoreError
from vlmcap.reporting.compare import read_runs, write_comparison


@dataclass
class CompareArguments:
    runs: list[str] = field(metadata={"help": "The runs; RUN... before all options is short for --runs RUN..."})
    output_dir: str = field(default="outputs/comparison", metadata={"help": "Folder for tables, plots and the page."})
    reference: str | None = field(
        default=None, metadata={"help": "Name of the run that the others are tested against; default: the first."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Published dataset with references and pictures: Hub id or local folder."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of --dataset; default: the one scored."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of photographs, for a --dataset without."})
    references: str | None = field(
        default=None, metadata={"help": 'References, JSONL lines {"image_id", "captions"}, instead of the dataset\'s.'}
    )
    max_gallery_images: int = field(
        default=500,
        metadata={"help": "Images on the page; of more, those with the greatest disagreement and a random half."},
    )
    seed: int = field(default=0, metadata={"help": "Of the random half."})
    resamples: int = field(default=1000, metadata={"help": "Resamples of the paired bootstrap."})


def main(args: CompareArguments) -> None:
    options = {name: value for name, value in vars(args).items() if name != "runs"}
    for path in write_comparison(read_runs(args.runs), **options).values():
        print(path)


if __name__ == "__main__":
    command_line = sys.argv[1:]
    if command_line and not command_line[0].startswith("-"):
        command_line.insert(0, "--runs")
    try:
        main(*parse(__doc__, CompareArguments, command_line=command_line))
    except (OSError, DatasetError, ScoreError) as error:
        sys.exit(f"error: {error}")
