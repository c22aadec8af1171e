"""Rehearse a training run at its real size, with random weights, before a GPU is rented.

    make rehearsal                          # the same as the next line, in outputs/rehearsal
    python scripts/rehearse.py

One command, from publish to card. It builds the model that recipes/configs/sft_qwen2vl_jp/base.yaml names from its
configuration, tokenizer and processor alone (Qwen2-VL-2B-Instruct: 2,208,985,600 random weights in bfloat16). It
publishes a few pictures with scripts/publish_datasets.py and runs recipes/sft_qwen2vl_jp.py with that configuration:
two steps of two images, captions of base and adapter, scores, audit and card. Then it prints the memory that the
recipe expected beside what was measured, and the seconds of a step. What breaks at the real size breaks here. The
captions and scores mean nothing: nobody has trained these weights.

It needs about 13 GiB of free memory and 8 GB of disk, and takes ten minutes on two CPU cores that do nothing else; it
checks for both before it starts. On a machine with a GPU it uses that.

Model and pictures come from the folders qwen2_vl_2b and coco_yj_images of VLMCAP_DATA_DIR (default ../shared/data)
where these exist. Else configuration, tokenizer and processor, a few MB, are fetched from the Hub, and scenes are
drawn, enlarged to the size of a photograph. Or give your own:

    python scripts/rehearse.py --model Qwen/Qwen2-VL-2B-Instruct        # a Hub id or a folder; its weights stay there
    python scripts/rehearse.py --images photos --captions captions.json # COCO format, six pictures or more
    python scripts/rehearse.py --recipe_config recipes/configs/sft_qwen2vl_jp/t4.yaml    # on a T4
    python scripts/rehearse.py --model recipes/miniatures/qwen2_vl --drawn_scenes true   # the path alone, in a minute

In output_dir it leaves model/, dataset/, run/ (with run/adapter/README.md, the card) and rehearsal.json, the figures.
It runs in a clone of the project.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/rehearsal", metadata={"help": "Folder for everything; must be empty."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id whose configuration, tokenizer and processor are used. Default: qwen2_vl_2b of"
            " VLMCAP_DATA_DIR where it is, else the model that the recipe's configuration names."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    images: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures. Default: coco_yj_images of VLMCAP_DATA_DIR where it is, else drawn scenes."
        },
    )
    captions: str | None = field(
        default=None, metadata={"help": "Their captions in COCO format. Default: captions.json among the pictures."}
    )
    drawn_scenes: bool = field(default=False, metadata={"help": "Draw scenes though there are photographs."})
    recipe_config: str = field(
        default="recipes/configs/sft_qwen2vl_jp/base.yaml", metadata={"help": "The recipe's settings to rehearse."}
    )
    steps: int = field(default=2, metadata={"help": "Training steps."})
    images_per_step: int = field(default=2, metadata={"help": "Images a step, with the captions of the settings."})
    held_out: int = field(default=2, metadata={"help": "Pictures in validation and in test, each."})
    max_new_tokens: int = field(default=4, metadata={"help": "Captions are cut after this many tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of the random weights and the drawn scenes."})


def main(args: Arguments) -> None:
    from vlmcap.experiments.rehearsal import rehearse

    rehearse(args, Path(__file__).resolve().parents[1])


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
