"""Publish a caption corpus as a cleaned Hugging Face dataset: a folder, and with --push_to_hub the Hub.

The corpora: stair (STAIR Captions) and yj (YJ Captions), Japanese; coco (COCO Captions), English; uit_viic (UIT-ViIC),
Vietnamese; food_titles (dish titles of Food Ingredients and Recipes), English; own (your files); multi (several of
these joined). `stair` as the first word is short for `--source stair`.

STAIR Captions and YJ Captions as released, captions and image addresses only. The archives are downloaded once,
compared with their known git blob ids and cached by the datasets library; --latest_archives takes a newer release.
Splits like Karpathy's in size; with Karpathy's own ids scores compare with published ones:

    python scripts/publish_datasets.py stair --tokenizer Qwen/Qwen2-VL-2B-Instruct \\
        --output_dir outputs/stair --karpathy dataset_coco.json
    python scripts/publish_datasets.py yj --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/yj

From local files (COCO-format .json, or the official .tar.gz and .zip), with split lists of one image id a line:

    python scripts/publish_datasets.py stair --tokenizer Qwen/Qwen2-VL-2B-Instruct \\
        --output_dir outputs/stair --annotations stair_captions_v1.2_train.json stair_captions_v1.2_val.json \\
        --yj_annotations yjcaptions26k_clean.json --val_ids val_ids.txt --test_ids test_ids.txt

UIT-ViIC from its three official files, with COCO's photographs (coco/train2017/*.jpg); given the training file alone,
a seeded tenth of its images is the test split (--holdout 0.1 --seed 0):

    python scripts/publish_datasets.py uit_viic --output_dir outputs/uit_viic --images coco \\
        --annotations uitviic_captions_train2017.json uitviic_captions_val2017.json uitviic_captions_test2017.json

COCO's own captions, in English, split as STAIR's:

    python scripts/publish_datasets.py coco --output_dir outputs/coco --karpathy dataset_coco.json \\
        --annotations annotations/captions_train2014.json annotations/captions_val2014.json

Dish titles from the CSV (columns Image_Name and Title) and the folder of its images, split 80/10/10:

    python scripts/publish_datasets.py food_titles --output_dir outputs/food_titles \\
        --annotations food.csv --images "Food Images"

Your own pictures and captions, in any of the forms of recipes/README.md ("Your own data"):

    python scripts/publish_datasets.py own --annotations pictures --images pictures --language ja \\
        --output_dir data/own --val_size 50 --test_size 50

Japanese (plain and polite), English and Vietnamese captions of the same photographs as one dataset, whose columns
`languages` and `styles` say what each caption is. Each corpus keeps its own splits. --drop_held_out: an image that one
of them holds out has its captions alone, and trains nowhere:

    python scripts/publish_datasets.py multi --corpora stair yj coco uit_viic --drop_held_out \\
        --coco_annotations annotations/captions_train2014.json annotations/captions_val2014.json \\
        --uit_viic_annotations uitviic_captions_train2017.json uitviic_captions_val2017.json \\
        uitviic_captions_test2017.json --karpathy dataset_coco.json \\
        --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/multi

coco, uit_viic, food_titles and own can do without --tokenizer. With it, lengths are counted in its tokens too, and the
training captions set the limit that longer captions are cut to (printed, and in cleaning_report.json as
cleaning.max_tokens).

With the photographs inside (coco/train2014/*.jpg and coco/val2014/*.jpg; about 20 GB for STAIR, 4 GB for YJ):

    python scripts/publish_datasets.py yj --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/yj \\
        --images coco

And on the Hub, private unless --public (log in once with `hf auth login`):

    python scripts/publish_datasets.py yj --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/yj \\
        --push_to_hub --repo_id USER/yj-captions

The folder holds README.md (the dataset card), data/*.parquet and cleaning_report.json (every cleaning rule with its
count and examples); `datasets.load_dataset(FOLDER)` reads it. Captions alone take no GPU and, for the whole of STAIR,
about a minute (scripts/bench_data.py measures it). `--config file.yaml` gives any of the options below.
"""

import sys

from vlmcap.arguments import run_main
from vlmcap.data.arguments import PublishArguments, check_arguments


def main(args: PublishArguments) -> None:
    check_arguments(args)

    from vlmcap.data.publish import publish

    publish(args)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words.insert(0, "--source")
    run_main(main, __doc__, PublishArguments, command_line=words)
