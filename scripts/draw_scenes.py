"""Draw the miniatures' scenes and write their captions as the caption corpora come.

    python scripts/draw_scenes.py --output_dir outputs/demo/scenes                        # as STAIR and YJ Captions
    python scripts/draw_scenes.py --kind vietnamese --output_dir outputs/demo/scenes_vi   # as UIT-ViIC
    python scripts/draw_scenes.py --kind titles --output_dir outputs/demo/scene_titles    # as the dish titles

`scripts/publish_datasets.py stair|uit_viic|food_titles` reads the result; `make demo` and `make demo-family` run both.
Titles go into one file, which publishing splits: there --train, --validation and --test are added up.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmcap.arguments import run_main


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for the pictures and annotation files."})
    kind: Literal["japanese", "vietnamese", "titles"] = field(
        default="japanese", metadata={"help": "Captions to write."}
    )
    train: int = field(default=2000, metadata={"help": "Training scenes."})
    validation: int = field(default=200, metadata={"help": "Validation scenes, of combinations never trained on."})
    test: int = field(default=200, metadata={"help": "Test scenes, of combinations never trained on."})
    seed: int = field(default=0, metadata={"help": "Seed of all scenes."})


def main(args: Arguments) -> None:
    from vlmcap.miniature.scenes import write_scene_dataset, write_title_scenes, write_vietnamese_scenes

    folder, sizes = Path(args.output_dir), (args.train, args.validation, args.test)
    if args.kind == "titles":
        write_title_scenes(folder, sum(sizes), args.seed)
    elif args.kind == "vietnamese":
        write_vietnamese_scenes(folder, *sizes, args.seed)
    else:
        write_scene_dataset(folder, *sizes, args.seed)
    print(f"{args.train} + {args.validation} + {args.test} scenes in {args.output_dir}")


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
