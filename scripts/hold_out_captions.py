"""One human caption of each image as a system of its own: what a score can reach, what an audit finds in people.

    python scripts/hold_out_captions.py --dataset data/yj --split test --output_dir outputs/human_yj
    python scripts/eval_captioning.py --predictions outputs/human_yj/predictions.jsonl \\
        --references outputs/human_yj/references.jsonl --output outputs/human_yj/metrics.json
    python scripts/audit_captions.py --predictions outputs/human_yj/predictions.jsonl \\
        --references outputs/human_yj/references.jsonl --output outputs/human_yj/audit.json

The first caption of every image that has --min_captions or more is the prediction, the others are its references.
Scores on fewer references are lower: they compare with a model's only on the same references.jsonl.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.evaluation.caption_files import ScoreError, read_references


@dataclass
class HoldOutArguments:
    output_dir: str = field(metadata={"help": "Folder for predictions.jsonl and references.jsonl."})
    references: str | None = field(
        default=None, metadata={"help": 'Captions, JSONL lines {"image_id", "captions"} or COCO\'s captions_*.json.'}
    )
    dataset: str | None = field(default=None, metadata={"help": "Published dataset instead: Hub id or local folder."})
    split: str = field(default="test", metadata={"help": "Split of --dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of --dataset on the Hub."})
    min_captions: int = field(default=2, metadata={"help": "Images with fewer captions are left out; 2 or more."})


def main(args: HoldOutArguments) -> None:
    if (args.references is None) == (args.dataset is None):
        raise ScoreError("give the captions either as --references FILE or as --dataset ID_OR_DIR, one of the two")
    if args.min_captions < 2:
        raise ScoreError(f"--min_captions {args.min_captions}: one caption is held out and one is left at least, so 2")
    if args.references:
        captions = read_references(args.references)
    else:
        from vlmcap.data.images import dataset_references

        captions = dataset_references(args.dataset, args.split, args.dataset_revision)
    chosen = {image_id: texts for image_id, texts in captions.items() if len(texts) >= args.min_captions}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as predictions:
        with (folder / "references.jsonl").open("w", encoding="utf-8") as references:
            for image_id, (first, *others) in chosen.items():
                predictions.write(json.dumps({"image_id": image_id, "caption": first}, ensure_ascii=False) + "\n")
                references.write(json.dumps({"image_id": image_id, "captions": others}, ensure_ascii=False) + "\n")
    left = sum(len(texts) - 1 for texts in chosen.values())
    print(f"{len(chosen):,} of {len(captions):,} images, {left:,} references left: {folder}")


if __name__ == "__main__":
    run_main(main, __doc__, HoldOutArguments)
