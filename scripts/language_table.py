"""Train a miniature with one, two and three languages, and print what each of them scores, and what English loses.

    make demo-languages                                    # draws and publishes the scenes, then this; one seed
    python scripts/language_table.py --seeds 42 43 44      # intervals over three seeds: the table of the README

Five trainings of recipes/sft_qwen2vl_jp.py, each a process of its own, two at a time:

    Japanese                         English and Vietnamese are scored before and after, and not trained on
    Japanese, English                the same number of steps, and of captions in each
    Japanese, English, Vietnamese    likewise
    plain and polite Japanese        how many captions are in the style that was asked for
    one prompt a sequence            a few steps with `shared_prefix: false`, for the speed

The same command skips what is finished and continues what was interrupted. Runs are in folders of --output_dir, with a
log.txt each. Intervals cover images and, of several seeds, their scatter.
"""

import signal
import sys
from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class TableArguments:
    recipe_config: str = field(
        default="recipes/configs/sft_qwen2vl_jp/languages_demo.yaml",
        metadata={"help": "Settings of the trainings, with prompts for ja/plain, ja/polite, en and vi."},
    )
    output_dir: str = field(default="outputs/demo_languages/runs", metadata={"help": "Folder of the runs."})
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "Of the trainings, each with all."})
    at_once: int = field(default=2, metadata={"help": "Trainings that run at a time, a thread each."})
    markdown: bool = field(default=False, metadata={"help": "Print Markdown tables."})


def main(args: TableArguments) -> None:
    from vlmcap.experiments.ablation import run_cells
    from vlmcap.experiments.language_table import (
        finished,
        grid_of,
        language_rows,
        speed_rows,
        style_rows,
        trainings,
    )
    from vlmcap.markdown import markdown_table, text_table

    grid = grid_of(args.recipe_config, args.output_dir)
    cells = trainings(grid, args.seeds)
    every = [cell for of_seeds in cells.values() for cell in of_seeds]
    every.sort(key=lambda cell: len(cell.changes["prompts"]), reverse=True)  # the longest first
    run_cells(grid, every, args.at_once)
    runs = finished(cells)
    for rows in (language_rows(runs), style_rows(runs), speed_rows(runs)):
        if rows:
            print(markdown_table(rows) if args.markdown else text_table(rows) + "\n")
    if failed := [cell.name for cell in every if not cell.finished()]:
        sys.exit(f"error: {len(failed)} of {len(every)} trainings failed; the same command tries them again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the trainings end too
    run_main(main, __doc__, TableArguments, interrupted="The same command continues from the last checkpoints.")
