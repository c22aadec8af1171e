"""Draw the miniature's scenes and write their Japanese captions as STAIR and YJ Captions come.

    python scripts/draw_scenes.py --output_dir outputs/demo/scenes

`scripts/publish_datasets.py --source stair` reads the result; `make demo` runs both.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import parse
from vlmcap.data.scenes import write_scene_dataset


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for the pictures and annotation files."})
    train: int = field(default=2000, metadata={"help": "Training scenes."})
    validation: int = field(default=200, metadata={"help": "Validation scenes, of combinations never trained on."})
    test: int = field(default=200, metadata={"help": "Test scenes, of combinations never trained on."})
    seed: int = field(default=0, metadata={"help": "Seed of all scenes."})


if __name__ == "__main__":
    (args,) = parse(__doc__, Arguments)
    write_scene_dataset(Path(args.output_dir), args.train, args.validation, args.test, args.seed)
    print(f"{args.train} + {args.validation} + {args.test} scenes in {args.output_dir}")
