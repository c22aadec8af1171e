"""Draw the miniatures' scenes and write their captions as the caption corpora come.

    python scripts/draw_scenes.py --output_dir outputs/demo/scenes                        # as STAIR and YJ Captions
    python scripts/draw_scenes.py --kind vietnamese --output_dir outputs/demo/scenes_vi   # as UIT-ViIC
    python scripts/draw_scenes.py --kind titles --output_dir outputs/demo/scene_titles    # as the dish titles
    python scripts/draw_scenes.py --kind languages --output_dir outputs/scenes   # as STAIR, YJ, COCO and UIT-ViIC

`scripts/publish_datasets.py stair|uit_viic|food_titles|multi` reads the result; `make demo` and `make demo-family` run
both. The scenes in all languages and styles become one dataset with:

    python scripts/publish_datasets.py multi --corpora stair yj coco uit_viic --yj_split lists \\
        --stair_annotations outputs/scenes/stair_train.json outputs/scenes/stair_val.json \\
        --yj_annotations outputs/scenes/yj.json \\
        --coco_annotations outputs/scenes/captions_train2014.json outputs/scenes/captions_val2014.json \\
        --uit_viic_annotations outputs/scenes/uitviic_captions_train2017.json \\
        outputs/scenes/uitviic_captions_val2017.json outputs/scenes/uitviic_captions_test2017.json \\
        --val_ids outputs/scenes/val_ids.txt --test_ids outputs/scenes/test_ids.txt --images outputs/scenes/images \\
        --tokenizer recipes/miniatures/qwen2_vl_languages --output_dir outputs/scenes_multi \\
        --card scenes_multi --pretty_name "Drawn scenes in three languages" --license cc0-1.0

Titles go into one file, which publishing splits: there --train, --validation and --test are added up.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlmcap.arguments import run_main


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for the pictures and annotation files."})
    kind: Literal["japanese", "vietnamese", "titles", "languages"] = field(
        default="japanese", metadata={"help": "Captions to write."}
    )
    train: int = field(default=2000, metadata={"help": "Training scenes."})
    validation: int = field(default=200, metadata={"help": "Validation scenes, of combinations never trained on."})
    test: int = field(default=200, metadata={"help": "Test scenes, of combinations never trained on."})
    seed: int = field(default=0, metadata={"help": "Seed of all scenes."})


def main(args: Arguments) -> None:
    from vlmcap.miniature.scenes import (
        write_language_scenes,
        write_scene_dataset,
        write_title_scenes,
        write_vietnamese_scenes,
    )

    folder, sizes = Path(args.output_dir), (args.train, args.validation, args.test)
    if args.kind == "titles":
        write_title_scenes(folder, sum(sizes), args.seed)
    elif args.kind == "languages":
        write_language_scenes(folder, *sizes, args.seed)
    elif args.kind == "vietnamese":
        write_vietnamese_scenes(folder, *sizes, args.seed)
    else:
        write_scene_dataset(folder, *sizes, args.seed)
    print(f"{args.train} + {args.validation} + {args.test} scenes in {args.output_dir}")


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
