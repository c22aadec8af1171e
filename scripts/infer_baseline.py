"""Caption a split with a model as it comes, or with an adapter on it: batched beam search of width 3, resumable.

Zero-shot Qwen2-VL-2B-Instruct on the held-out YJ Captions split, then its scores:

    python scripts/infer_baseline.py --model Qwen/Qwen2-VL-2B-Instruct --dataset you/yj-captions-ja --split test \\
        --image_dir images --output outputs/qwen2vl_yj/predictions.jsonl
    python scripts/eval_captioning.py --predictions outputs/qwen2vl_yj/predictions.jsonl \\
        --dataset you/yj-captions-ja --split test --output outputs/qwen2vl_yj/metrics.json

The same with a trained adapter, from the Hub or a folder:

    python scripts/infer_baseline.py --model Qwen/Qwen2-VL-2B-Instruct --adapter you/qwen2vl-jp --load_in_4bit \\
        --dataset you/stair-captions-ja --split test --image_dir images --output outputs/adapter/predictions.jsonl

Beside predictions.jsonl it writes predictions.run.json: model, dataset, prompt, decoding, hardware, seconds, versions.
An interrupted run continues when the same command is given again. Several GPUs share the work under `accelerate
launch`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import parse
from vlmcap.data.images import DatasetError, check_images, dataset_record, load_captions
from vlmcap.evaluation.generate import GenerationArguments, PredictionsError, generate, model_record
from vlmcap.models.load import ModelError, load_adapter, load_model, load_processor


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Base model: Hub id or folder, e.g. Qwen/Qwen2-VL-2B-Instruct."})
    dataset: str = field(metadata={"help": "Caption dataset made by publish_datasets.py: Hub id or folder."})
    output: str = field(metadata={"help": "Predictions file to write, e.g. outputs/base/predictions.jsonl."})
    split: str = field(default="test", metadata={"help": "Split to caption."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    adapter: str | None = field(default=None, metadata={"help": "Trained adapter: Hub id or folder."})
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the photographs, for a dataset published without them."}
    )
    max_images: int | None = field(default=None, metadata={"help": "Caption the first N images only."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Language model in NF4, as adapters of this project are trained and scored."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})
    min_pixels: int | None = field(
        default=None, metadata={"help": "Smallest image in pixels; default the processor's."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Largest image in pixels; default the processor's."}
    )
    saw_stair: str = field(
        default="unknown", metadata={"help": "Whether the model was trained on STAIR: train, no or unknown. Recorded."}
    )
    saw_yj: str = field(default="unknown", metadata={"help": "The same for YJ Captions."})


def main(args: Arguments, generation_args: GenerationArguments) -> None:
    dataset = dataset_record(args.dataset, args.split, args.dataset_revision)
    rows = load_captions(args.dataset, args.split, args.image_dir, dataset["revision"])
    if args.max_images:
        rows = rows.select(range(min(args.max_images, len(rows))))
    check_images(rows, args.split)
    # The adapter's own processor, when there is one: it carries the image size of the training.
    processor = load_processor(
        args.adapter or args.model,
        args.adapter_revision if args.adapter else args.model_revision,
        args.min_pixels,
        args.max_pixels,
    )
    model = load_model(args.model, args.model_revision, args.load_in_4bit, args.attn_implementation)
    if args.adapter:
        model = load_adapter(model, args.adapter, args.adapter_revision)
    record = {
        "model": model_record(model, args.model, args.model_revision, args.adapter, args.adapter_revision),
        "dataset": dataset,
        "saw": {"STAIR": args.saw_stair, "YJ": args.saw_yj, "note": "As stated on the command line."},
    }
    generate(model, processor, rows, Path(args.output), generation_args, record)
    print(
        f"{len(rows):,} captions in {args.output}; score them with\n  python scripts/eval_captioning.py --predictions"
        f" {args.output} --dataset {args.dataset} --split {args.split} --output "
        f"{Path(args.output).parent}/metrics.json"
    )


if __name__ == "__main__":
    try:
        main(*parse(__doc__, Arguments, GenerationArguments))
    except (DatasetError, ModelError, PredictionsError) as error:
        sys.exit(f"error: {error}")
