"""Publish STAIR Captions or YJ Captions as a cleaned Hugging Face dataset: a folder, and with --push_to_hub the Hub.

STAIR Captions and YJ Captions as released (downloaded once, cached by the datasets library), captions and image
addresses only. Splits like Karpathy's in size; with Karpathy's own ids scores compare with published ones:

    python scripts/publish_datasets.py --source stair --tokenizer Qwen/Qwen2-VL-2B-Instruct \\
        --output_dir outputs/stair --karpathy dataset_coco.json
    python scripts/publish_datasets.py --source yj --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/yj

From files at hand (COCO-format .json, or the official .tar.gz and .zip), with split lists of one image id a line:

    python scripts/publish_datasets.py --source stair --tokenizer Qwen/Qwen2-VL-2B-Instruct \\
        --output_dir outputs/stair --annotations stair_captions_v1.2_train.json stair_captions_v1.2_val.json \\
        --yj_annotations yjcaptions26k_clean.json --val_ids val_ids.txt --test_ids test_ids.txt

With the photographs inside (coco/train2014/*.jpg and coco/val2014/*.jpg; about 20 GB for STAIR, 4 GB for YJ):

    python scripts/publish_datasets.py --source yj --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/yj \\
        --images coco

And on the Hub, private unless --public (log in once with `hf auth login`):

    python scripts/publish_datasets.py --source yj --tokenizer Qwen/Qwen2-VL-2B-Instruct --output_dir outputs/yj \\
        --push_to_hub --repo_id USER/yj-captions

The folder holds README.md (the dataset card), data/*.parquet and cleaning_report.json (every cleaning rule with its
count and examples); `datasets.load_dataset(FOLDER)` reads it. Captions alone take no GPU and, for the whole of STAIR,
about a minute (scripts/bench_data.py measures it). `--config file.yaml` gives any of the options below.
"""

import sys

from vlmcap.arguments import parse
from vlmcap.data.build import PublishArguments, publish
from vlmcap.data.sources import DataError


def main() -> None:
    (args,) = parse(__doc__, PublishArguments)
    try:
        publish(args)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
