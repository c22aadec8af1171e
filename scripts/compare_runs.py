r"""Compare runs that were scored on the same images: tables, plots, and a page with every caption.

    python scripts/compare_runs.py outputs/qwen2vl_stair outputs/sft_qwen2vl_jp/base outputs/sft_qwen2vl_jp/adapter

    # with names of your own, tested against another run than the first, with photographs for the page
    python scripts/compare_runs.py zero-shot=outputs/base/metrics.json r8=outputs/r8 r32=outputs/r32 --reference r32 \
        --dataset data/stair --split test --image_dir data/images --output_dir outputs/comparison

    # some of the scores; and runs on different datasets, in one table
    python scripts/compare_runs.py --scores bleu_1 bleu_2 rouge_l meteor outputs/r8 outputs/r32
    python scripts/compare_runs.py --overview BLIP=outputs/sft_blip_vi/adapter ViT=outputs/sft_vit_gpt2_food/model

Every RUN, before or after options, is a metrics.json (scripts/eval_captioning.py, scripts/infer_baseline.py and the
recipes write them) or a folder that holds one, and may be named: NAME=PATH. Captions for the page are read from
predictions.jsonl beside it, flags from audit.json (scripts/audit_captions.py). Runs of other images, another dataset
or other metric signatures than the first are refused; --overview takes runs of several datasets and writes overview.md
alone, rows of one dataset together.

Output, in --output_dir:

    metrics.csv       one row a run, all numbers in full, p values, prompt, decoding, signatures
    metrics.md, .tex  scores with 95 % intervals and significance marks, what each model saw, parameters, peak memory,
                      captions/s
    scores.svg, quality_against_memory.svg, training_curves.svg (loss and validation, of runs trained here)
    comparison.html   all of it, and each image with its references and every system's caption; needs no network

Runs of a recipe with several prompts are compared by key, such as ja/polite or en: each key has a folder with all of
this, and metrics.md beside them has the tables of all keys.

Where the dataset that was scored is a folder that is still there, as after `make demo`, pictures and references come
from it; else --dataset (and --image_dir, or --references) say where they are. Five runs on 5,000 images take 13
seconds on one CPU core, reading the photographs not included.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.evaluation.scoring import SCORE_LABELS


@dataclass
class CompareArguments:
    runs: list[str] = field(metadata={"help": "The runs; RUN... is short for --runs RUN..."})
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
        default=None,
        metadata={
            "help": 'References, JSONL lines {"image_id", "captions"} or COCO\'s captions_*.json, instead of the'
            " dataset's."
        },
    )
    max_gallery_images: int = field(
        default=500,
        metadata={"help": "Images on the page; of more, those with the greatest disagreement and a random half."},
    )
    seed: int = field(default=0, metadata={"help": "Of the random half."})
    scores: list[str] | None = field(
        default=None,
        metadata={"help": f"Scores in the table and its plot; default: all. Of: {', '.join(SCORE_LABELS)}."},
    )
    overview: bool = field(
        default=False,
        metadata={
            "help": "One table of runs on different datasets, and nothing else; of the rest --output_dir counts."
        },
    )
    resamples: int = field(default=1000, metadata={"help": "Resamples of the paired bootstrap."})


def main(args: CompareArguments) -> None:
    from vlmcap.reporting.compare import write_comparison
    from vlmcap.reporting.runs import read_runs
    from vlmcap.reporting.tables import write_overview

    if args.overview:
        path, text = write_overview(read_runs(args.runs), args.output_dir)
        print(f"{text}\n\n{path}")
        return
    options = {name: value for name, value in vars(args).items() if name not in ("runs", "overview")}
    for path in write_comparison(read_runs(args.runs), **options).values():
        print(path)


def name_runs(words: list[str]) -> list[str]:
    """The command line with all runs after --runs, wherever they were in it.

    They are the words that are neither an option nor the value of one: --overview has no value, --scores has all words
    up to one that is a file or has a = in it, every other option has one.
    """
    runs, rest, option = [], [], "--runs"
    for word in words:
        is_run = "=" in word or word not in SCORE_LABELS and Path(word).exists()
        if word.startswith("-"):
            option = "--runs" if "=" in word or word == "--overview" else word
            rest += [word] if word != "--runs" else []
        elif option == "--runs" or option == "--scores" and is_run:
            runs.append(word)
        else:
            rest.append(word)
            option = option if option == "--scores" else "--runs"
    return ["--runs", *runs, *rest] if runs else rest


if __name__ == "__main__":
    run_main(main, __doc__, CompareArguments, command_line=name_runs(sys.argv[1:]))
