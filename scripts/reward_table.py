"""Print scores beside audit figures, of runs that were trained on rewards and of others.

    python scripts/reward_table.py base=outputs/demo/base SFT=outputs/demo/adapter GRPO=outputs/demo_grpo/adapter

    # three seeds each, with the differences and their intervals, and a plot
    python scripts/reward_table.py SFT=outputs/a/adapter SFT=outputs/b/adapter GRPO=outputs/c/adapter \\
        GRPO=outputs/d/adapter --reference SFT --plot outputs/trade_off.svg

    # the finished cells of a grid (scripts/run_ablation.py), means over their seeds
    python scripts/reward_table.py --grid recipes/configs/grpo_qwen2vl_jp/weights_demo.yaml

A FOLDER holds metrics.json, audit.json and predictions.jsonl, as every recipe leaves them. CHAIRs is the share of
captions with a thing that is not in the image, CHAIRi the share of such mentions. A score can rise while captions get
worse: read the columns together.
"""

import sys
from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class TableArguments:
    runs: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER; a name that occurs again is another seed of it."}
    )
    grid: str | None = field(default=None, metadata={"help": "Grid file whose finished cells are rows too."})
    reference: str | None = field(default=None, metadata={"help": "Name of the run that the others are compared to."})
    plot: str | None = field(default=None, metadata={"help": "File for a plot of the trade-off, .svg or .png."})
    markdown: bool = field(default=False, metadata={"help": "Print Markdown tables."})


def main(args: TableArguments) -> None:
    from vlmcap.experiments.reward_table import difference_rows, plot, read_settings, table_rows
    from vlmcap.markdown import markdown_table, text_table

    settings = read_settings(args.runs, args.grid)
    tables = [table_rows(settings)]
    if args.reference:
        tables.append(difference_rows(settings, args.reference))
    for rows in tables:
        print(markdown_table(rows) if args.markdown else text_table(rows) + "\n")
    if args.plot:
        print(plot(settings, args.plot))


if __name__ == "__main__":
    words = sys.argv[1:]
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    run_main(main, __doc__, TableArguments, command_line=(["--runs"] if first else []) + words)
