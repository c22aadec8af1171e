"""Pin models to commits: write those of today's main branches into configuration files.

    python scripts/pin_revisions.py --files recipes/configs/baselines.yaml recipes/configs/*/base.yaml

Where a file names a model of the Hub and its revision is null, the commit replaces null; comments stay, and so does
what is pinned already. Models that run code of their own repository are left out: read the code of a commit, then
write the commit yourself. Look at `git diff` and commit it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main


@dataclass
class Arguments:
    files: list[str] = field(metadata={"help": "YAML files: the table of baselines, configurations of recipes."})


def main(args: Arguments) -> None:
    from vlmcap.models.load import pin_revisions

    for file in args.files:
        print(file, *pin_revisions(Path(file)), sep="\n  ")


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
