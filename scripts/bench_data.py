"""Measure how long the dataset build takes on a corpus of STAIR's real size, and how much memory.

    python scripts/bench_data.py                          # prints a table; exits with 1 when a bound is missed
    python scripts/bench_data.py --json bench_data.json   # and writes the figures

Generates two COCO-format files as STAIR Captions has them (82,783 train2014 and 40,504 val2014 images, 616,435
captions) out of the real captions in `--data_dir`: seeded recombinations of their clauses, with the defects that
cleaning is for. Then it runs what scripts/publish_datasets.py runs (reading, splitting, cleaning and tokenising,
writing) in a process of its own and measures that process: seconds a stage, seconds in all with imports, CPU seconds,
peak resident memory. The bounds are 90 seconds and 3 GB on 2 CPU cores, with nothing else running on them.

`--data_dir` (default: $VLMCAP_DATA_DIR, else ../shared/data) must hold yj_subset/yjcaptions_subset.json,
karpathy/{val,test}_ids.txt and qwen2_vl_2b/ (the tokenizer of Qwen2-VL-2B-Instruct).
"""

import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from vlmcap.arguments import run_main
from vlmcap.data.arguments import PublishArguments

TRAIN_IMAGES, VAL_IMAGES = 82_783, 40_504  # COCO 2014
MAX_SECONDS, MAX_BYTES = 90, 3_000_000_000
LICENSES = [
    {"id": id, "name": name, "url": f"http://creativecommons.org/licenses/{short}/2.0/"}
    for id, (name, short) in enumerate(
        [("Attribution-NonCommercial License", "by-nc"), ("Attribution License", "by")], start=1
    )
]


@dataclass
class BenchArguments:
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the real captions. Default: $VLMCAP_DATA_DIR, else ../shared/data."}
    )
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})
    seed: int = field(default=0, metadata={"help": "Seed of the generated corpus."})


def main(args: BenchArguments) -> None:
    repository = Path(__file__).resolve().parents[1]
    data_dir = Path(args.data_dir or os.environ.get("VLMCAP_DATA_DIR") or repository.parent / "shared" / "data")
    with tempfile.TemporaryDirectory() as folder:
        files = generate_corpus(data_dir, Path(folder), args.seed)
        result = measure(
            PublishArguments(
                source="stair",
                annotations=[str(path) for path in files],
                yj_annotations=[str(data_dir / "yj_subset" / "yjcaptions_subset.json")],
                val_ids=str(data_dir / "karpathy" / "val_ids.txt"),
                test_ids=str(data_dir / "karpathy" / "test_ids.txt"),
                tokenizer=str(data_dir / "qwen2_vl_2b"),
                output_dir=str(Path(folder) / "dataset"),
            )
        )
    print_result(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["within_bounds"]:
        sys.exit(1)


def generate_corpus(data_dir: Path, folder: Path, seed: int) -> list[Path]:
    """Writes stair_{train,val}.json to `folder`: STAIR's number of images and captions, COCO's fields an image.

    Every YJ image is a train2014 image and every Karpathy validation and test image a val2014 image, as in COCO.
    """
    from vlmcap.data import splits
    from vlmcap.data.corpora import CORPORA
    from vlmcap.data.sources import read_rows

    rng = random.Random(seed)
    yj_rows, _ = read_rows([data_dir / "yj_subset" / "yjcaptions_subset.json"], "yj")
    train_ids = {row["image_id"] for row in yj_rows}
    val_ids = {id for split in ("val", "test") for id in splits.read_ids(data_dir / "karpathy" / f"{split}_ids.txt")}
    unused = [id for id in range(1, 581_930) if id not in train_ids and id not in val_ids]  # COCO's ids end at 581,929
    rng.shuffle(unused)
    for ids, size in ((train_ids, TRAIN_IMAGES), (val_ids, VAL_IMAGES)):
        ids.update(unused.pop() for _ in range(size - len(ids)))

    clauses = [re.split("(?<=、)", caption) for row in yj_rows for caption in row["captions"]]
    paths = []
    with tqdm(total=CORPORA["stair"].captions, desc="generating captions", unit="caption") as progress:
        for part, ids in (("train", sorted(train_ids)), ("val", sorted(val_ids))):
            images = [_image(id, f"{part}2014", rng) for id in ids]
            annotations = []
            for id in ids:
                # 5 captions an image: 123,287 x 5 = 616,435
                for caption in _captions(clauses, 5, rng):
                    annotations.append({"image_id": id, "id": len(annotations) + 1, "caption": caption})
                progress.update(5)
            rng.shuffle(annotations)
            document = {"info": {"description": "generated"}, "images": images, "licenses": LICENSES}
            paths.append(folder / f"stair_{part}.json")
            # ASCII with \u escapes, which takes longest to read
            paths[-1].write_text(json.dumps(document | {"annotations": annotations}), encoding="utf-8")
    return paths


def _image(image_id: int, folder: str, rng: random.Random) -> dict:
    return {
        "license": rng.choice((1, 2)),
        "file_name": f"COCO_{folder}_{image_id:012d}.jpg",
        "coco_url": f"http://mscoco.org/images/{image_id}",
        "height": 480,
        "width": 640,
        "date_captured": "2013-11-14 16:28:13",
        "flickr_url": f"http://farm4.staticflickr.com/3153/{rng.randrange(10**10)}_{rng.randrange(16**10):010x}_z.jpg",
        "id": image_id,
    }


def _captions(clauses: list[list[str]], count: int, rng: random.Random) -> list[str]:
    """Captions of one image; one in ten has a defect that the cleaner has a rule for."""
    captions = []
    for _ in range(count):
        first, last = rng.choice(clauses), rng.choice(clauses)
        caption = "".join(first[:-1] + last[-1:])
        defect = rng.random()
        if defect < 0.02:
            caption = caption.replace("1", "１").replace("2", "２") + " "
        elif defect < 0.04:
            caption = caption.replace("。", "。。")
        elif defect < 0.05:
            caption += "😀"
        elif defect < 0.055:
            caption += " http://example.com/photo"
        elif defect < 0.06:
            caption = caption[:3] + "\u200b" + caption[3:]
        elif defect < 0.075 and captions:
            caption = captions[0]
        elif defect < 0.09:
            caption = (caption * 6)[:200]  # beyond 64 tokens
        elif defect < 0.1:
            caption = caption.replace("テ", "ﾃ").replace("ー", "ｰ")
        captions.append(caption)
    return captions


def measure(args: PublishArguments) -> dict:
    """Runs `build` in a new process and samples the resident memory of it and its children."""
    from vlmcap.data.publish import build

    peak = 0
    start = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(build, args)
        (worker,) = (psutil.Process(pid) for pid in pool._processes)
        while not future.done():
            peak = max(peak, _resident_bytes(worker))
            time.sleep(0.2)
        summary = future.result()
        cpu = worker.cpu_times()
    seconds = time.perf_counter() - start
    stages = summary["seconds"]
    stages["start-up (imports)"] = round(seconds - sum(stages.values()), 2)
    return {
        "images": summary["cleaning"]["images_in"],
        "captions": summary["cleaning"]["captions_in"],
        "splits": {split: counts["images"] for split, counts in summary["splits"].items()},
        "rules": {rule["name"]: rule["count"] for rule in summary["cleaning"]["rules"]},
        "seconds": stages,
        "total_seconds": round(seconds, 2),
        "cpu_seconds": round(cpu.user + cpu.system, 2),
        "peak_memory_bytes": peak,
        "cores": os.cpu_count(),
        "bounds": {"seconds": MAX_SECONDS, "bytes": MAX_BYTES},
        "within_bounds": seconds <= MAX_SECONDS and peak <= MAX_BYTES,
    }


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return sum(part.memory_info().rss for part in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def print_result(result: dict) -> None:
    print(f"{result['images']:,} images, {result['captions']:,} captions, {result['cores']} cores")
    for stage, value in result["seconds"].items():
        print(f"  {stage:<20}{value:>7.1f} s")
    print(f"  {'total':<20}{result['total_seconds']:>7.1f} s   (bound {MAX_SECONDS} s)")
    print(f"  {'CPU time':<20}{result['cpu_seconds']:>7.1f} s")
    print(f"  {'peak memory':<20}{result['peak_memory_bytes'] / 1e9:>7.2f} GB  (bound {MAX_BYTES / 1e9:.0f} GB)")
    print("within the bounds" if result["within_bounds"] else "OUT OF THE BOUNDS")


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments)
