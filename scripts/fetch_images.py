"""Fetches the photographs of a published caption dataset, which holds their addresses but not the pictures themselves.

    python scripts/fetch_images.py --dataset user/stair-captions-ja --output_dir images
    python scripts/fetch_images.py --dataset user/stair-captions-ja --split test validation --output_dir images
    python scripts/fetch_images.py --dataset outputs/yj --output_dir images --base_url http://mirror.example.org/coco
    accelerate launch recipes/sft_qwen2vl_jp.py --image_dir images

COCO offers each of its folders as one zip file; the script recommends it where most of a folder is wanted. The recipes
read the zip files as they are (--image_dir FOLDER that holds train2014.zip and val2014.zip).

All of COCO 2014 is 123,287 files and about 19 GB. The photographs are directly in output_dir under their `file_name`.
Ctrl-C, a crash or a broken connection lose nothing: the same command continues where the last run ended, within a file
too, and fetches again what failed. Every file was compared with the length (and md5) that the server announces and
decoded; delete output_dir/.verified.tsv to have all of them decoded again.

Photographs that cannot be fetched are listed in output_dir/failed.jsonl ({"image_id", "url", "reason"}), and the exit
status is then 1, or 0 with --allow_failures. The run stops early when 18 of the last 20 photographs failed.

The photographs are not the dataset's: each has its own licence (column `license`), mostly from Flickr.
"""

import sys
from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class FetchArguments:
    dataset: str = field(metadata={"help": "Caption dataset: Hub id or local folder."})
    output_dir: str = field(metadata={"help": "Folder for the photographs."})
    split: list[str] | None = field(default=None, metadata={"help": "Splits to fetch. Default: all of them."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub."})
    concurrency: int = field(default=8, metadata={"help": "Connections at a time. Be kind to the server."})
    base_url: str | None = field(
        default=None,
        metadata={"help": "A mirror: replaces http://images.cocodataset.org in front of /train2014/FILE.jpg."},
    )
    allow_failures: bool = field(default=False, metadata={"help": "Exit with 0 even if photographs are missing."})


def main(args: FetchArguments) -> None:
    from vlmcap.data.fetch import fetch_dataset_images

    report = fetch_dataset_images(
        args.dataset, args.output_dir, args.split, args.revision, args.concurrency, args.base_url
    )
    size, pace = report.bytes / 1e6, report.fetched / report.seconds
    print(
        f"{args.output_dir}: fetched {report.fetched} photographs ({size:.1f} MB) in {report.seconds:.0f} s"
        f" ({pace:.1f} images/s); {report.present} were there; {len(report.failed)} failed"
    )
    if report.failed:
        print(f"What failed is listed in {args.output_dir}/failed.jsonl", file=sys.stderr)
        sys.exit(0 if args.allow_failures else 1)


if __name__ == "__main__":
    run_main(main, __doc__, FetchArguments, interrupted="The same command fetches the rest.")
