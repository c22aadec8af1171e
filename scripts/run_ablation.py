"""Train a grid of settings, a process a cell, and compare what came out.

    python scripts/run_ablation.py --config recipes/configs/sft_qwen2vl_jp/ablation.yaml     # Qwen2-VL, one GPU
    make ablation                                                                            # the miniature, on a CPU

The grid file names the recipe, its configuration and what is varied: LoRA rank, number of top layers, projector,
label smoothing, resolution, or any other key of the recipe. Run again, the command skips finished cells and resumes
from the last checkpoint of an interrupted one. A failed cell stops no other; the next call tries it again.

Cells are in OUTPUT_DIR/cells; OUTPUT_DIR/ablation.md and comparison/ (see scripts/compare_runs.py) cover all that are
finished. Scores of one seed scatter: `grid: {seed: [42, 43, 44]}` trains each cell three times, and ablation.md gives
mean, least and most. The grid of a recipe that trains a whole model says `trained: model`; `scores: [bleu_1, meteor]`
chooses the columns of both tables. Ctrl-C and SIGTERM end the running cell, with all of its processes, too.
"""

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.experiments.ablation import (
    cells,
    read_grid,
    run_grid,
    summary_rows,
)
from vlmcap.markdown import markdown_table, text_table


@dataclass
class AblationArguments:
    grid: str = field(metadata={"help": "Grid file, YAML; `--config` is another name for it."})
    output_dir: str | None = field(default=None, metadata={"help": "Instead of the file's output_dir."})
    dry_run: bool = field(default=False, metadata={"help": "List the cells and their state, and run nothing."})


def main(args: AblationArguments) -> None:
    grid = read_grid(args.grid, output_dir=args.output_dir)
    if args.dry_run:
        for cell in cells(grid):
            print(f"{cell.state()['status']:<9} {cell.name}")
        return

    from vlmcap.reporting.compare import write_comparison
    from vlmcap.reporting.runs import read_runs

    all_cells = run_grid(grid)
    finished = [cell for cell in all_cells if cell.finished()]
    output_dir = Path(grid.output_dir)
    rows = summary_rows(all_cells, grid.scores)
    (output_dir / "ablation.md").write_text(markdown_table(rows), encoding="utf-8")
    print(text_table(rows))
    if finished:
        runs = read_runs([f"{cell.name}={cell.metrics}" for cell in finished])
        write_comparison(runs, output_dir / "comparison", scores=grid.scores)
        print(f"\nComparison: {output_dir / 'comparison'}")
    if len(finished) < len(all_cells):
        lost = len(all_cells) - len(finished)
        sys.exit(f"error: {lost} of {len(all_cells)} cells failed; the same command tries them again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running cell ends too
    arguments = ["--grid" if argument == "--config" else argument for argument in sys.argv[1:]]
    again = "The same command continues from the last checkpoint."
    run_main(main, __doc__, AblationArguments, command_line=arguments, interrupted=again)
