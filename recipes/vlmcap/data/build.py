"""Rows to a published dataset: parquet shards, dataset card and cleaning report in a folder, and on the Hub."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from huggingface_hub import DatasetCardData, HfApi
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from vlmcap import provenance
from vlmcap.data import sources, splits
from vlmcap.data.clean import CaptionCleaner
from vlmcap.data.sources import DataError, SourceFile

CARDS = Path(__file__).resolve().parents[3] / "dataset_cards"
REPORT = "cleaning_report.json"
COLUMNS = {
    "image_id": Value("int64"),
    "file_name": Value("string"),
    "coco_url": Value("string"),
    "license": Value("string"),
    "captions": List(Value("string")),
    "caption_ids": List(Value("int64")),
    "in_yj": Value("bool"),
}
SHARD_BYTES = 500_000_000  # what datasets.push_to_hub aims at too: a shard is one download that can be retried
# Rows a row group: what a reader of one row has to load. 100 rows with photographs are about 16 MB.
ROW_GROUP = {"captions": 10_000, "images": 100}

# Images and captions of the public releases (captions.stair.center; Miyazaki and Shimizu, ACL 2016).
RELEASE = {
    "stair": {"name": "STAIR Captions v1.2", "images": 123_287, "captions": 616_435},
    "yj": {"name": "YJ Captions 26k", "images": 26_500, "captions": 131_730},
}


@dataclass
class PublishArguments:
    """What to build, from which files, and where to; `publish` does it."""

    source: Literal["stair", "yj"] = field(metadata={"help": "Caption corpus: STAIR Captions or YJ Captions."})
    tokenizer: str = field(metadata={"help": "Hub id or folder of the model's tokenizer, for the length limit."})
    output_dir: str = field(metadata={"help": "Folder to write the dataset to; load_dataset(FOLDER) reads it."})
    annotations: list[str] | None = field(
        default=None,
        metadata={"help": "Annotation files: COCO-format .json, official .tar.gz or .zip. Default: download them."},
    )
    images: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the COCO photographs (directly, or in train2014/ and val2014/), which are then "
            "embedded in the dataset; without it the dataset holds their coco_url only."
        },
    )
    karpathy: str | None = field(
        default=None, metadata={"help": "Karpathy's dataset_coco.json, which names the validation and test images."}
    )
    val_ids: str | None = field(default=None, metadata={"help": "File of validation image ids, one a line."})
    test_ids: str | None = field(default=None, metadata={"help": "File of test image ids, one a line."})
    val_size: int = field(default=5000, metadata={"help": "Validation images to draw when no ids are given."})
    test_size: int = field(default=5000, metadata={"help": "Test images to draw when no ids are given."})
    seed: int = field(default=0, metadata={"help": "Seed of that draw."})
    yj_annotations: list[str] | None = field(
        default=None,
        metadata={"help": "STAIR only: the YJ Captions files, for the in_yj column. Default: download them."},
    )
    max_tokens: int = field(default=64, metadata={"help": "Captions are cut to this many tokens of the tokenizer."})
    skip_bad_images: bool = field(
        default=False,
        metadata={"help": "Leave out missing and unreadable photographs (listed in the report) instead of stopping."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the dataset that output_dir holds."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the captions, as the Hub writes it. Default: the one that `info` of the annotation "
            "files states, else cc-by-4.0, under which STAIR and YJ Captions were released."
        },
    )
    card: str | None = field(
        default=None, metadata={"help": "Card template CARD_captions.md.j2 in dataset_cards/. Default: by source."}
    )
    pretty_name: str | None = field(default=None, metadata={"help": "Title of the card. Default: by source."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the folder to the Hub as well."})
    repo_id: str | None = field(default=None, metadata={"help": "Hub dataset to push to, e.g. user/stair-captions."})
    public: bool = field(default=False, metadata={"help": "Create the Hub dataset as a public one."})


def publish(args: PublishArguments) -> dict:
    """Builds the dataset folder, prints what it holds, and pushes it when asked. Returns the summary of `build`.

    Raises DataError as `build` and `push` do.
    """
    if args.push_to_hub and not args.repo_id:
        raise DataError("--push_to_hub needs --repo_id USER/NAME.")
    summary = build(args)
    print(summary_text(summary))
    if args.push_to_hub:
        summary["url"], summary["revision"] = push(summary["folder"], args.repo_id, private=not args.public)
        print(f"pushed      {summary['url']} (revision {summary['revision']})")
    return summary


def build(args: PublishArguments) -> dict:
    """Reads, splits, cleans and writes one dataset to `args.output_dir`, which appears only when it is complete.

    Returns {"source", "license", "files", "split_origin", "overlap", "splits": {split: {"images", "captions",
    "in_yj"}}, "bad_images", "cleaning": the cleaner's report, "fingerprint", "built_with", "folder", "seconds":
    {stage: seconds}}; all but the last two also lie in the folder's cleaning_report.json.

    Raises DataError on whatever is wrong with the annotations, the splits, the photographs or the output folder.
    """
    output_dir = Path(args.output_dir).resolve()
    _check_arguments(args, output_dir)
    seconds: dict[str, float] = {}

    with _timed(seconds, "load tokenizer"):
        try:
            cleaner = CaptionCleaner(AutoTokenizer.from_pretrained(args.tokenizer), max_tokens=args.max_tokens)
        except (OSError, ValueError) as error:
            raise DataError(f"--tokenizer {args.tokenizer}: {error}") from error
    with _timed(seconds, "read"):
        rows, files = _read(args.source, args.annotations)
        if args.source == "stair":
            yj_rows, yj_files = _read("yj", args.yj_annotations)
            splits.flag_yj(rows, {row["image_id"] for row in yj_rows})
        else:
            yj_rows, yj_files = rows, []
        license = _license(args, files)
    with _timed(seconds, "split"):
        held_out, origin = _held_out_ids(args, rows)
        if held_out:
            splits.check_yj_overlap({row["image_id"] for row in yj_rows}, *held_out)
        by_split = splits.split_rows(rows, *held_out) if args.source == "stair" else {"test": rows}
        splits.check_disjoint(by_split)
    image_paths, bad_images = None, []
    if args.images:
        with _timed(seconds, "check images"):
            image_paths, bad_images = _check_images(rows, Path(args.images))
            if bad_images and not args.skip_bad_images:
                raise DataError(_bad_images_text(bad_images, len(rows), args.images))
            by_split = {
                split: [row for row in members if row["image_id"] in image_paths]
                for split, members in by_split.items()
            }
    with _timed(seconds, "clean and tokenise"):
        by_split = {split: cleaner.clean(members, desc=f"cleaning {split}") for split, members in by_split.items()}
        for split, members in by_split.items():
            if not members:
                raise DataError(f"The {split} split holds no caption after cleaning.")
    with _timed(seconds, "write"):
        summary = {
            "source": args.source,
            "license": license,
            "files": [asdict(file) for file in files + yj_files],
            "split_origin": origin if args.source == "stair" else "one held-out test split",
            "overlap": _overlap_text(args.source, by_split, len(yj_rows), held_out, origin),
            "splits": {
                split: {
                    "images": len(members),
                    "captions": sum(len(row["captions"]) for row in members),
                    "in_yj": sum(row["in_yj"] for row in members),
                }
                for split, members in by_split.items()
            },
            "bad_images": bad_images,
            "cleaning": cleaner.report(),
            "fingerprint": _fingerprint(by_split, image_paths),
            "built_with": {"vlmcap": provenance.versions()["vlmcap"], "commit": provenance.git_commit()},
        }
        with _replacing(output_dir) as folder:
            _write_folder(folder, by_split, image_paths, summary, _card(args, summary, files))
    return summary | {"folder": str(output_dir), "seconds": seconds}


def push(folder: str | Path, repo_id: str, private: bool = True) -> tuple[str, str]:
    """Uploads a dataset folder to the Hub dataset `repo_id`, created when it is not there; parquet shards that an
    earlier push left are deleted in the same commit. Returns (URL, revision).

    Raises DataError when the upload fails; the folder is as it was, and the message says how to push it again.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Upload dataset",
            delete_patterns="data/*.parquet",
        )
    except Exception as error:  # HfHubHTTPError, RuntimeError, ValueError, httpx errors: by what the Hub refuses
        visibility = "--private" if private else "--no-private"
        raise DataError(
            f"The upload to {repo_id} failed ({type(error).__name__}: {error}).\n"
            f"The dataset in {folder} is complete. Log in with `hf auth login` where that is the trouble, and push it "
            f'with: hf upload {repo_id} {folder} . --repo-type dataset {visibility} --delete "data/*.parquet"'
        ) from error
    return f"{api.endpoint}/datasets/{repo_id}", commit.oid


def summary_text(summary: dict) -> str:
    """What the script prints about a dataset built: counts, cleaning, overlap, folder, how to load it."""
    cleaning = summary["cleaning"]
    lines = [f"{'split':<12}{'images':>9}{'captions':>10}{'in YJ':>8}"]
    for split, counts in summary["splits"].items():
        lines.append(f"{split:<12}{counts['images']:>9,}{counts['captions']:>10,}{counts['in_yj']:>8,}")
    lines += ["", f"{'cleaning rule':<28}{'captions':>9}  action"]
    for rule in cleaning["rules"]:
        lines.append(f"{rule['name']:<28}{rule['count']:>9,}  {rule['action']}")
    lines.append(f"captions {cleaning['captions_in']:,} -> {cleaning['captions_out']:,}")
    lines.append(f"images   {cleaning['images_in']:,} -> {cleaning['images_out']:,}")
    lines += ["", f"splits      {summary['split_origin']}", f"overlap     {summary['overlap']}"]
    if summary["bad_images"]:
        names = ", ".join(bad["file_name"] for bad in summary["bad_images"][:5])
        more = ", ..." if len(summary["bad_images"]) > 5 else ""
        lines.append(f"left out    {len(summary['bad_images']):,} unreadable photographs: {names}{more}")
    lines.append("seconds     " + ", ".join(f"{stage} {value:.1f}" for stage, value in summary["seconds"].items()))
    lines.append(f"folder      {summary['folder']} (card README.md, examples of each rule in {REPORT})")
    lines.append(f'load it     datasets.load_dataset("{summary["folder"]}")')
    return "\n".join(lines)


def _check_arguments(args: PublishArguments, output_dir: Path) -> None:
    if args.karpathy and (args.val_ids or args.test_ids):
        raise DataError("Give --karpathy or --val_ids and --test_ids, not both.")
    if bool(args.val_ids) != bool(args.test_ids):
        raise DataError("--val_ids and --test_ids go together.")
    if args.source == "yj" and args.yj_annotations:
        raise DataError("--yj_annotations goes with --source stair; with --source yj the files are --annotations.")
    if args.images and not Path(args.images).is_dir():
        raise DataError(f"{args.images}: no such folder (--images).")
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"{output_dir}: is a file (--output_dir).")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not args.overwrite:
            raise DataError(f"{output_dir}: holds files already. Name another --output_dir, or give --overwrite.")
        if not (output_dir / REPORT).exists():
            raise DataError(f"{output_dir}: holds files but no {REPORT}: not a dataset of ours, so not overwritten.")


def _license(args: PublishArguments, files: list[SourceFile]) -> str:
    """--license, else the Creative Commons licence that the annotation files state, else the one of both releases."""
    if args.license:
        return args.license
    stated = {
        "-".join(re.split("[ -]", found[0].lower())): file.name
        for file in files
        if (found := re.search(r"CC[ -]BY(-(NC|ND|SA))*[ -]\d\.\d", file.license))
    }
    if len(stated) > 1:
        raise DataError(f"The annotation files state different licences ({stated}). Say which it is with --license.")
    return next(iter(stated), "cc-by-4.0")


def _read(source: str, annotations: list[str] | None) -> tuple[list[dict], list[SourceFile]]:
    if annotations:
        return sources.read_rows(annotations, source)
    rows, files = sources.read_rows([sources.download_archive(source)], source)
    return rows, [replace(file, name=sources.ARCHIVES[source]) for file in files]


def _held_out_ids(args: PublishArguments, rows: list[dict]) -> tuple[tuple[list[int], list[int]] | None, str]:
    """((validation ids, test ids), where they come from); no ids for YJ unless they are given."""
    if args.karpathy:
        held_out, lists = splits.read_karpathy(args.karpathy), Path(args.karpathy).name
    elif args.val_ids:
        held_out = splits.read_ids(args.val_ids), splits.read_ids(args.test_ids)
        lists = f"{Path(args.val_ids).name} and {Path(args.test_ids).name}"
    elif args.source == "stair":
        return splits.draw_ids(rows, args.val_size, args.test_size, args.seed), (
            f"a Karpathy-style partition drawn by this build (seed {args.seed}), not Karpathy's own: scores on it do "
            "not compare with scores on the Karpathy splits"
        )
    else:
        return None, ""
    if splits.is_karpathy(*held_out):
        return held_out, f"the Karpathy splits (image ids from {lists})"
    return held_out, f"the image ids in {lists}, which are not the Karpathy splits"


def _overlap_text(source: str, by_split: dict, yj_images: int, held_out: tuple | None, origin: str) -> str:
    if source == "stair":
        flagged = sum(row["in_yj"] for row in by_split["train"])
        text = (
            f"{flagged:,} of the {len(by_split['train']):,} training images are also in YJ Captions (in_yj is true); "
            "no validation or test image is."
        )
        if yj_images != RELEASE["yj"]["images"]:
            text += (
                f" The YJ file given to the build names {yj_images:,} images, the release has "
                f"{RELEASE['yj']['images']:,}: in_yj covers the images named only."
            )
        return text
    if held_out:
        return (
            f"None of the {yj_images:,} images is among the {len(held_out[0]):,} validation and {len(held_out[1]):,} "
            f"test images of {origin}."
        )
    return "Not compared with the validation and test images of STAIR Captions in this build."


def _check_images(rows: list[dict], folder: Path) -> tuple[dict[int, Path], list[dict]]:
    """({image id: path} of the photographs that decode, the others as {"image_id", "file_name", "reason"})."""

    def check(row: dict) -> tuple[Path | None, str]:
        candidates = [folder / part / row["file_name"] for part in ("", "train2014", "val2014")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            return None, "missing"
        try:
            with PILImage.open(path) as image:
                image.load()  # decodes every pixel: open() alone reads the header only
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
            return None, f"{type(error).__name__}: {str(error).replace(str(path), path.name)}"
        return path, ""

    paths, bad = {}, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        for row, (path, reason) in zip(rows, tqdm(pool.map(check, rows), "checking images", len(rows)), strict=True):
            if path:
                paths[row["image_id"]] = path
            else:
                bad.append({"image_id": row["image_id"], "file_name": row["file_name"], "reason": reason})
    return paths, bad


def _bad_images_text(bad_images: list[dict], total: int, folder: str) -> str:
    if len(bad_images) == total and all(bad["reason"] == "missing" for bad in bad_images):
        name = bad_images[0]["file_name"]
        return f"{folder} holds none of the {total:,} photographs: no {name}, train2014/{name} or val2014/{name}, ..."
    lines = [f"{len(bad_images):,} of {total:,} photographs in {folder} are missing or unreadable:"]
    lines += [f"  {bad['file_name']}: {bad['reason']}" for bad in bad_images]
    lines.append("Fetch them again (scripts/fetch_images.py), or leave them out with --skip_bad_images.")
    return "\n".join(lines)


def _fingerprint(by_split: dict, image_paths: dict | None) -> str:
    """Eight hex digits of the rows and the sizes of their photographs; they stand in the names of the shards.

    datasets caches a local folder by its last name and the file patterns of its card, not by what the files hold
    (`LocalDatasetModuleFactory`, datasets 5.2): of two builds called `dataset` with the same patterns, the second
    would silently load as the first.
    """
    digest = hashlib.sha256()
    for split, rows in by_split.items():
        for row in rows:
            size = image_paths[row["image_id"]].stat().st_size if image_paths else 0
            digest.update(f"{split} {size} {row}".encode())
    return digest.hexdigest()[:8]


def _write_folder(folder: Path, by_split: dict, image_paths: dict | None, summary: dict, card: str) -> None:
    (folder / "data").mkdir()
    total = sum(len(rows) for rows in by_split.values())
    with tqdm(total=total, desc="writing parquet", unit="row") as progress:
        for split, rows in by_split.items():
            shards = _shards(rows, image_paths)
            for index, shard in enumerate(shards):
                name = f"{split}-{summary['fingerprint']}-{index:05d}-of-{len(shards):05d}.parquet"
                _write_parquet(folder / "data" / name, shard, image_paths, progress)
    (folder / REPORT).write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _shards(rows: list[dict], image_paths: dict[int, Path] | None) -> list[list[dict]]:
    """Rows in order, cut so that no shard's photographs pass SHARD_BYTES; captions alone always fit into one."""
    if image_paths is None:
        return [rows]
    shards, size = [[]], 0
    for row in rows:
        row_size = image_paths[row["image_id"]].stat().st_size
        if shards[-1] and size + row_size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row_size
    return shards


def _write_parquet(path: Path, rows: list[dict], image_paths: dict[int, Path] | None, progress: tqdm) -> None:
    features = Features(COLUMNS if image_paths is None else {"image": Image()} | COLUMNS)
    group = ROW_GROUP["captions" if image_paths is None else "images"]
    # Content-defined chunks: when a later push changes some rows, the Hub's Xet storage takes only those chunks.
    with pq.ParquetWriter(
        path, features.arrow_schema, use_content_defined_chunking=True, write_page_index=True
    ) as writer:
        for start in range(0, len(rows), group):
            batch = rows[start : start + group]
            if image_paths is not None:
                batch = [
                    row | {"image": {"bytes": image_paths[row["image_id"]].read_bytes(), "path": row["file_name"]}}
                    for row in batch
                ]
            writer.write_table(pa.Table.from_pylist(batch, schema=features.arrow_schema), row_group_size=group)
            progress.update(len(batch))


def _card(args: PublishArguments, summary: dict, files: list[SourceFile]) -> str:
    release = RELEASE[args.source]
    images = sum(counts["images"] for counts in summary["splits"].values())
    images_read, captions_read = sum(file.images for file in files), sum(file.captions for file in files)
    complete = (images_read, captions_read) == (release["images"], release["captions"])
    pretty_name = args.pretty_name or f"{release['name']}, cleaned{'' if complete else ' (part of it)'}"
    data_files = [
        {"split": split, "path": f"data/{split}-{summary['fingerprint']}-*.parquet"} for split in summary["splits"]
    ]
    metadata = DatasetCardData(
        language=["ja"],
        license=summary["license"],
        pretty_name=pretty_name,
        task_categories=["image-to-text"],
        size_categories=[_size_category(images)],
        tags=["image-captioning", "coco", "japanese", f"{args.card or args.source}-captions"],
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    # StrictUndefined: a name that the template has and the build does not give is an error, not a blank.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "visible": _visible, "cell": _cell}
    return environment.get_template(f"{args.card or args.source}_captions.md.j2").render(
        summary,
        metadata=metadata.to_yaml(),
        pretty_name=pretty_name,
        repo_id=args.repo_id,
        images_embedded=bool(args.images),
        release=release,
        complete=complete,
        images_read=images_read,
        captions_read=captions_read,
    )


def _size_category(images: int) -> str:
    """The Hub's `size_categories` value for a number of rows."""
    for bound, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if images < bound:
            return name
    return "100K<n<1M"


def _visible(text: str) -> str:
    """A caption as a code span in a Markdown table cell; characters that cannot be seen become \\u escapes."""
    shown = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return _cell(f"`` {shown} ``" if "`" in shown else f"`{shown}`")


def _cell(text: str) -> str:
    """Text that keeps to one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


@contextmanager
def _replacing(output_dir: Path) -> Iterator[Path]:
    """A new folder beside `output_dir` that takes its place at the end; after an error, neither is half-written."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    building, old = (output_dir.parent / f".{output_dir.name}.{what}-{os.getpid()}" for what in ("building", "old"))
    building.mkdir()
    try:
        yield building
        if output_dir.exists():
            output_dir.rename(old)
        building.rename(output_dir)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if old.exists():
            old.rename(output_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)
