"""Rows to a published dataset: parquet shards, dataset card and cleaning report in a folder, and on the Hub."""

import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from zipfile import is_zipfile

import httpx2
import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCardData, hf_hub_download
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from vlmcap import provenance
from vlmcap.data import splits
from vlmcap.data.arguments import PublishArguments, check_arguments, facts
from vlmcap.data.clean import CaptionCleaner
from vlmcap.data.corpora import Corpus
from vlmcap.data.errors import DataError
from vlmcap.data.images import BadImageError, open_image
from vlmcap.data.lengths import caption_lengths, token_limit
from vlmcap.data.multi import JoinedCleaner, key_counts, shared_images
from vlmcap.data.picture_files import COCO_FOLDERS, Picture, PictureFile, picture_finder
from vlmcap.data.readers import CorpusRows, find_license
from vlmcap.data.sources import SourceFile
from vlmcap.data.titles import word_counts, write_word_cloud
from vlmcap.markdown import code_span, escape_unseen, prose
from vlmcap.places import ROOT, check_miniature
from vlmcap.strict_parsing import parse_json
from vlmcap.upload import PushError, check_push_rights, push_folder

CARDS = ROOT / "dataset_cards"
REPORT = "cleaning_report.json"
WORD_CLOUD = "word_cloud.png"
COLUMNS = {
    "image_id": Value("int64"),
    "file_name": Value("string"),
    "coco_url": Value("string"),
    "license": Value("string"),
    "captions": List(Value("string")),
    "caption_ids": List(Value("int64")),
    "languages": List(Value("string")),
    "styles": List(Value("string")),
    "in_yj": Value("bool"),
}
SHARD_BYTES = 500_000_000  # what datasets.push_to_hub aims at too: a shard is one download that can be retried
# Rows a row group: what a reader of one row has to load. 100 rows with photographs are about 16 MB.
ROW_GROUP = {"captions": 10_000, "images": 100}


def publish(args: PublishArguments) -> dict:
    """Builds the dataset folder, prints what it holds, and pushes it when asked. Returns the summary of `build`.

    Raises DataError as `build` and `push` do, and PushError before the build when the push would be refused.
    """
    check_arguments(args)
    if args.push_to_hub:
        check_push_rights(args.repo_id, "--repo_id", "dataset", private=not args.public)
    summary = build(args)
    print(summary_text(summary))
    if args.push_to_hub:
        summary["url"], summary["revision"] = push(summary["folder"], args.repo_id, private=not args.public)
        print(f"pushed      {summary['url']} (revision {summary['revision']})")
    return summary


def build(args: PublishArguments) -> dict:
    """Reads, splits, cleans and writes one dataset to `args.output_dir`, which appears only when it is complete.

    Returns {"source", "license", "files", "changed_files" (`_changed_files`), "split_origin", "overlap", "splits":
    {split: {"images", "captions", "in_yj"}}, "bad_images", "cleaning": the cleaner's report, "fingerprint",
    "built_with", "folder", "seconds": {stage: seconds}}; all except the last two are also in the folder's
    cleaning_report.json. By corpus, it has "lengths" too (`lengths.caption_lengths`), "left_out": {"rules", "rows"},
    "words": {"distinct", "total", "most_common"}; of joined corpora "corpora" (`multi.read_multi`), "keys"
    (`multi.key_counts`) and "shared" (`multi.shared_images`).

    Raises DataError on whatever is wrong with the annotations, the splits, the photographs or the output folder, and
    when it cannot be written.
    """
    output_dir = Path(args.output_dir).resolve()
    check_arguments(args)
    with _replacing(output_dir) as folder:
        return _build(args, output_dir, folder)


def _build(args: PublishArguments, output_dir: Path, folder: Path) -> dict:
    _check_folders(args, output_dir)
    corpus = facts(args)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load tokenizer"):
        cleaner = _cleaner(args, corpus)
    with _timed(seconds, "read and split"):
        read: CorpusRows = resolve_name(corpus.reader)(args)
        license = args.license or read.license or find_license(args, args.source, read.files)
        by_split = read.by_split
        splits.check_disjoint(by_split)
        changed = _changed_files(read.files + read.yj_files, _earlier_files(args, output_dir))
    pictures, bad_images = None, []
    if args.images or read.pictures is not None:
        with _timed(seconds, "check images"):
            by_split, pictures, bad_images = _with_images(by_split, args, read.pictures)
    if not args.images and not read.embed:
        pictures = None
    with _timed(seconds, "clean and tokenise"):
        if cleaner.tokenizer_name and not cleaner.max_tokens:
            cleaner.max_tokens = token_limit(cleaner, by_split["train"])
        by_split = {split: cleaner.clean(members, desc=f"cleaning {split}") for split, members in by_split.items()}
        _check_not_empty(by_split, "caption after cleaning")
    with _timed(seconds, "write"):
        summary = {
            "source": args.source,
            "license": license,
            "files": [asdict(file) for file in read.files + read.yj_files],
            "changed_files": changed,
            "split_origin": read.split_origin,
            "overlap": read.overlap(by_split),
            "splits": {split: _counts(members) for split, members in by_split.items()},
            "bad_images": bad_images,
            "cleaning": cleaner.report(),
            "fingerprint": _fingerprint(by_split, pictures),
            "built_with": {"vlmcap": provenance.versions()["vlmcap"], "commit": provenance.git_commit()},
            **read.more,
        }
        if corpus.lengths:
            summary["lengths"] = caption_lengths(cleaner, by_split)
        if corpus.joins:
            summary["keys"] = key_counts(by_split)
            summary["shared"] = shared_images(by_split, summary["keys"])
        if corpus.word_cloud:
            words = word_counts(caption for rows in by_split.values() for row in rows for caption in row["captions"])
            most = [{"word": word, "count": count} for word, count in words.most_common(100)]
            summary["words"] = {"distinct": len(words), "total": words.total(), "most_common": most}
            write_word_cloud(words, folder / WORD_CLOUD)
        _write_folder(folder, by_split, pictures, summary, _card(args, summary, read.files, pictures is not None))
    return summary | {"folder": str(output_dir), "seconds": seconds}


def _cleaner(args: PublishArguments, corpus: Corpus) -> CaptionCleaner | JoinedCleaner:
    check_miniature(args.tokenizer or "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False) if args.tokenizer else None
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {args.tokenizer}: {error}") from error
    max_tokens = args.max_tokens or corpus.max_tokens
    if corpus.joins:
        return JoinedCleaner(args, tokenizer, max_tokens)
    return CaptionCleaner(tokenizer, max_tokens, rules=resolve_name(corpus.rules))


def push(folder: str | Path, repo_id: str, private: bool = True) -> tuple[str, str]:
    """Publishes a dataset folder as the Hub dataset `repo_id`, in one commit, as `vlmcap.upload.push_folder` does;
    parquet shards that an earlier push left are deleted in the same commit. Returns (URL, revision).

    Raises DataError when the folder is not a complete dataset, and when the upload fails; the folder is as it was, and
    the message says what is on the Hub and how to push it again.
    """
    folder = Path(folder)
    _check_complete(folder)
    command = ["python", "scripts/push_dataset.py", "--folder", str(folder), "--repo_id", repo_id]
    command = shlex.join(command if private else [*command, "--public"])
    try:
        return push_folder(folder, repo_id, "dataset", private, "Upload dataset", command, replace="data/*.parquet")
    except PushError as error:
        raise DataError(str(error)) from error


def _check_complete(folder: Path) -> None:
    """Raises DataError unless the folder holds a card, a report and every shard of every split."""
    report = folder / REPORT
    if not report.is_file() or not (folder / "README.md").is_file():
        raise DataError(f"{folder}: no dataset of scripts/publish_datasets.py: README.md or {REPORT} is missing.")
    try:
        summary = parse_json(report.read_bytes())
        names = {split: f"{split}-{summary['fingerprint']}" for split in summary["splits"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{report}: not the report of a build ({type(error).__name__}: {error}).") from error
    for split, name in names.items():
        shards = sorted(path.stem for path in (folder / "data").glob(f"{name}-?????-of-?????.parquet"))
        if not shards or len(shards) != int(shards[0][-5:]):
            raise DataError(f"{folder}: shards of the {split} split are missing. Build it again, with --overwrite.")


def summary_text(summary: dict) -> str:
    """What the script prints about a dataset built: counts, cleaning, overlap, folder, how to load it."""
    cleaning = summary["cleaning"]
    lines = [f"{'split':<12}{'images':>9}{'captions':>10}{'in YJ':>8}"]
    for split, counts in summary["splits"].items():
        in_yj = "-" if counts["in_yj"] is None else f"{counts['in_yj']:,}"
        lines.append(f"{split:<12}{counts['images']:>9,}{counts['captions']:>10,}{in_yj:>8}")
    if "keys" in summary:
        lines += _joined_lines(summary)
    lines += ["", f"{'cleaning rule':<28}{'captions':>9}  action"]
    for rule in cleaning["rules"]:
        lines.append(f"{rule['name']:<28}{rule['count']:>9,}  {rule['action']}")
    lines.append(f"captions {cleaning['captions_in']:,} -> {cleaning['captions_out']:,}")
    lines.append(f"images   {cleaning['images_in']:,} -> {cleaning['images_out']:,}")
    if "left_out" in summary:
        lines += ["", f"{'rows left out':<28}{'rows':>9}"]
        lines += [f"{rule['name']:<28}{rule['count']:>9,}" for rule in summary["left_out"]["rules"]]
    if "lengths" in summary:
        lines += ["", f"{'caption length':<28}{'mean':>9}{'median':>8}{'p99':>6}{'p99.9':>7}{'max':>6}"]
        for split, units in summary["lengths"].items():
            for unit, of in units.items():
                figures = f"{of['mean']:>9.1f}{of['median']:>8}{of['p99']:>6}{of['p99.9']:>7}{of['max']:>6}"
                lines.append(f"{f'{split}, {unit}':<28}{figures}")
        if cleaning["max_tokens"]:
            lines.append(f"limit       {cleaning['max_tokens']} tokens of {cleaning['tokenizer']}")
    if found := summary.get("other_language"):
        lines.append(
            f"language    {found['count']:,} of {found['of']:,} captions look like another one than --language"
        )
        lines += [f"            {text}" for text in found["examples"][:3]]
    lines += ["", f"splits      {summary['split_origin']}", f"overlap     {summary['overlap']}"]
    if summary["bad_images"]:
        names = ", ".join(bad["file_name"] for bad in summary["bad_images"][:5])
        more = ", ..." if len(summary["bad_images"]) > 5 else ""
        lines.append(f"left out    {len(summary['bad_images']):,} unreadable photographs: {names}{more}")
    for file in summary["changed_files"]:
        lines.append(f"CHANGED     {_change_text(file)}")
    lines.append("seconds     " + ", ".join(f"{stage} {value:.1f}" for stage, value in summary["seconds"].items()))
    lines.append(f"folder      {summary['folder']} (card README.md, examples of each rule in {REPORT})")
    lines.append(f'load it     datasets.load_dataset("{summary["folder"]}")')
    return "\n".join(lines)


def _joined_lines(summary: dict) -> list[str]:
    """Of joined corpora: images and captions of each language and style, images that two of them have, licences."""
    columns = "".join(f"{split:>20}" for split in summary["splits"])
    lines = ["", f"{'images / captions':<20}{columns}"]
    for key, of_split in summary["keys"].items():
        cells = (f"{counts['images']:,} / {counts['captions']:,}" for counts in of_split.values())
        lines.append(f"{key:<20}" + "".join(f"{cell:>20}" for cell in cells))
    if summary["shared"]:
        lines += ["", f"{'images of both':<20}{columns}"]
        for pair in summary["shared"]:
            lines.append(f"{' + '.join(pair['keys']):<20}" + "".join(f"{n:>20,}" for n in pair["splits"].values()))
    lines += ["", f"{'corpus':<20}{'captions':<20}{'licence':<20}left out, because another corpus holds the image out"]
    for part in summary["corpora"]:
        left_out = f"{part['left_out']['captions']:,} captions of {part['left_out']['images']:,} images"
        lines.append(f"{part['name']:<20}{part['key']:<20}{part['license']:<20}{left_out}")
    return lines


def _check_folders(args: PublishArguments, output_dir: Path) -> None:
    if args.images and not Path(args.images).is_dir() and not is_zipfile(args.images):
        raise DataError(f"{args.images}: no such folder or zip file (--images).")
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"{output_dir}: is a file (--output_dir).")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not args.overwrite:
            raise DataError(f"{output_dir}: holds files already. Name another --output_dir, or give --overwrite.")
        if not (output_dir / REPORT).exists():
            raise DataError(f"{output_dir}: holds files but no {REPORT}: not a dataset of ours, so not overwritten.")


def _counts(rows: list[dict]) -> dict[str, int | None]:
    """Images, captions and images in YJ Captions of a split; the last is None where nobody has compared."""
    captions = sum(len(row["captions"]) for row in rows)
    in_yj = [row.get("in_yj") for row in rows]
    return {"images": len(rows), "captions": captions, "in_yj": None if None in in_yj else sum(in_yj)}


def _check_not_empty(by_split: dict[str, list[dict]], what: str) -> None:
    for split, members in by_split.items():
        if not members:
            raise DataError(f"The {split} split holds no {what}.")


def _earlier_files(args: PublishArguments, output_dir: Path) -> tuple[list[dict], str]:
    """(`files` of the report of the build that this one replaces, what that is): the folder's, else the Hub's."""
    report, place = output_dir / REPORT, "the build that this one replaces"
    if not report.exists():
        if not args.push_to_hub:
            return [], ""
        place = f"{args.repo_id} on the Hub"
        try:
            report = Path(hf_hub_download(args.repo_id, REPORT, repo_type="dataset"))
        except (httpx2.HTTPError, OSError, ValueError):  # no such dataset; if the Hub is away, the push will say so
            return [], ""
    try:
        files = parse_json(report.read_bytes())["files"]
        return [{key: file[key] for key in ("name", "sha256", "images", "captions")} for file in files], place
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{report}: no report of a build ({type(error).__name__}: {error}), so what is replaced is not known. "
            "Delete it, or name another folder or repository."
        ) from error


def _changed_files(files: list[SourceFile], earlier: tuple[list[dict], str]) -> list[dict]:
    """The files that had the same name and other contents when the dataset was built before, as {"name", "place":
    where that is known from, "before" and "now": {"sha256", "images", "captions"}}."""
    before, place = {file["name"]: file for file in earlier[0]}, earlier[1]
    changed = []
    for file in map(asdict, files):
        old = before.get(file["name"], file)
        if old["sha256"] != file["sha256"]:
            both = ({key: of[key] for key in ("sha256", "images", "captions")} for of in (old, file))
            changed.append({"name": file["name"], "place": place} | dict(zip(("before", "now"), both, strict=True)))
    return changed


def _change_text(file: dict) -> str:
    return (
        f"{file['name']} is not the file that {file['place']} was made from: "
        + ", ".join(f"{key} {file['before'][key]} then, {file['now'][key]} now" for key in file["now"])
        + "."
    )


def _with_images(
    by_split: dict[str, list[dict]], args: PublishArguments, pictures: dict[int | str, Picture] | None
) -> tuple[dict[str, list[dict]], dict[int | str, Picture], list[dict]]:
    """(rows whose picture can be read, {image id: picture}, the others as {"image_id", "file_name", "reason"}).

    Raises DataError on a picture that cannot be read, without --skip_bad_images, and on a split without any.
    """
    rows = sorted((row for rows in by_split.values() for row in rows), key=lambda row: row["image_id"])
    if pictures is None:
        find = picture_finder(args.images)
        found = ((row["image_id"], find(row["file_name"])) for row in rows)
        pictures = {image_id: PictureFile(path) for image_id, path in found if path}
    bad_images = _check_images(rows, pictures)
    if bad_images and not args.skip_bad_images:
        raise DataError(_bad_images_text(bad_images, len(rows), args))
    bad = {entry["image_id"] for entry in bad_images}
    by_split = {split: [row for row in members if row["image_id"] not in bad] for split, members in by_split.items()}
    _check_not_empty(by_split, "photograph that can be read")
    return by_split, pictures, bad_images


def _check_images(rows: list[dict], pictures: dict[int | str, Picture]) -> list[dict]:
    def check(row: dict) -> str:
        picture = pictures.get(row["image_id"])
        if picture is None:
            return "missing"
        try:
            open_image({"image": {"bytes": picture.read(), "path": None}, "file_name": row["file_name"]})
        except BadImageError as error:
            return error.reason
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        reasons = tqdm(pool.map(check, rows), "checking images", len(rows))
        return [
            {"image_id": row["image_id"], "file_name": row["file_name"], "reason": reason}
            for row, reason in zip(rows, reasons, strict=True)
            if reason
        ]


def _bad_images_text(bad_images: list[dict], total: int, args: PublishArguments) -> str:
    where = args.images or (args.annotations or [""])[0]
    if len(bad_images) == total and all(bad["reason"] == "missing" for bad in bad_images):
        name = bad_images[0]["file_name"]
        return (
            f"{where} holds none of the {total:,} photographs: no {name}, also not in {', '.join(COCO_FOLDERS)} or a"
            " zip file there, ... Name their folder with --images."
        )
    lines = [f"{len(bad_images):,} of {total:,} photographs in {where} are missing or unreadable:"]
    lines += [f"  {bad['file_name']}: {bad['reason']}" for bad in bad_images[:100]]
    lines += [f"  ... and {len(bad_images) - 100:,} more"] if len(bad_images) > 100 else []
    lines.append("Fetch them again (scripts/fetch_images.py), or leave them out with --skip_bad_images.")
    return "\n".join(lines)


def _fingerprint(by_split: dict, pictures: dict | None) -> str:
    """Eight hex digits of the rows and the sizes of their photographs; they are part of the names of the shards.

    datasets caches a local folder by its last name and the file patterns of its card, not by what the files hold
    (`LocalDatasetModuleFactory`, datasets 5.2): of two builds called `dataset` with the same patterns, the second
    would silently load as the first.
    """
    digest = hashlib.sha256()
    for split, rows in by_split.items():
        for row in rows:
            size = pictures[row["image_id"]].size if pictures else 0
            digest.update(f"{split} {size} {row}".encode())
    return digest.hexdigest()[:8]


def _write_folder(folder: Path, by_split: dict, pictures: dict | None, summary: dict, card: str) -> None:
    (folder / "data").mkdir()
    total = sum(len(rows) for rows in by_split.values())
    with tqdm(total=total, desc="writing parquet", unit="row") as progress:
        for split, rows in by_split.items():
            shards = _shards(rows, pictures)
            for index, shard in enumerate(shards):
                name = f"{split}-{summary['fingerprint']}-{index:05d}-of-{len(shards):05d}.parquet"
                _write_parquet(folder / "data" / name, shard, pictures, progress)
    (folder / REPORT).write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _shards(rows: list[dict], pictures: dict[int | str, Picture] | None) -> list[list[dict]]:
    """Rows in order, cut so that no shard's photographs pass SHARD_BYTES; captions alone always fit into one."""
    if pictures is None:
        return [rows]
    shards, size = [[]], 0
    for row in rows:
        row_size = pictures[row["image_id"]].size
        if shards[-1] and size + row_size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row_size
    return shards


def _write_parquet(path: Path, rows: list[dict], pictures: dict[int | str, Picture] | None, progress: tqdm) -> None:
    columns = {name: kind for name, kind in COLUMNS.items() if name in rows[0]}
    columns["image_id"] = Value("string" if isinstance(rows[0]["image_id"], str) else "int64")
    features = Features(columns if pictures is None else {"image": Image()} | columns)
    group = ROW_GROUP["captions" if pictures is None else "images"]
    # Content-defined chunks: when a later push changes some rows, the Hub's Xet storage takes only those chunks.
    with pq.ParquetWriter(
        path, features.arrow_schema, use_content_defined_chunking=True, write_page_index=True
    ) as writer:
        for start in range(0, len(rows), group):
            batch = rows[start : start + group]
            if pictures is not None:
                batch = [
                    row | {"image": {"bytes": pictures[row["image_id"]].read(), "path": row["file_name"]}}
                    for row in batch
                ]
            writer.write_table(pa.Table.from_pylist(batch, schema=features.arrow_schema), row_group_size=group)
            progress.update(len(batch))


def _card(args: PublishArguments, summary: dict, files: list[SourceFile], embedded: bool) -> str:
    corpus = facts(args)
    images = sum(counts["images"] for counts in summary["splits"].values())
    images_read, captions_read = sum(file.images for file in files), sum(file.captions for file in files)
    complete = not corpus.images or (images_read, captions_read) == (corpus.images, corpus.captions)
    pretty_name = args.pretty_name or f"{corpus.title}, cleaned{'' if complete else ' (part of it)'}"
    data_files = [
        {"split": split, "path": f"data/{split}-{summary['fingerprint']}-*.parquet"} for split in summary["splits"]
    ]
    languages = [corpus.language] if corpus.language else []
    languages += dict.fromkeys(key.split("/")[0] for key in summary.get("keys", ()))
    # What a model trained on it has seen, for `images.dataset_record`; drawn scenes show no corpus.
    trained = [part["source"] for part in summary.get("corpora", ()) if part["splits"].get("train", {}).get("images")]
    trained = [f"{source}-training-captions" for source in dict.fromkeys(trained) if not args.card]
    metadata = DatasetCardData(
        language=languages or None,
        license=summary["license"],
        pretty_name=pretty_name,
        task_categories=["image-to-text"],
        size_categories=[_size_category(images)],
        tags=["image-captioning", *corpus.tags, f"{args.card or args.source}-captions", *trained],
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
    environment.filters |= {"change": _change_text, "thousands": "{:,}".format}
    environment.filters |= {"visible": _visible, "prose": prose}
    return environment.get_template(f"{args.card or args.source}_captions.md.j2").render(
        summary,
        metadata=metadata.to_yaml(),
        pretty_name=pretty_name,
        repo_id=args.repo_id,
        images_embedded=embedded,
        compared_with_yj=all(counts["in_yj"] is not None for counts in summary["splits"].values()),
        corpus=corpus,
        author=args.author,
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
    """A text of others in a Markdown table's cell, as a code span."""
    return code_span(escape_unseen(text)).replace("|", "\\|") if text else "nothing"


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


@contextmanager
def _replacing(output_dir: Path) -> Iterator[Path]:
    """A new folder that takes the place of `output_dir` at the end.

    After an error `output_dir` is as it was. After a kill the next build finds it as it was or whole and new, and
    clears what the killed one left beside it.

    Raises DataError when another build is at work there, and on a disk that is full or cannot be written.
    """
    work = output_dir.parent / f".{output_dir.name}.building"
    new, old = work / "new", work / "old"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            if old.exists() and not output_dir.exists():  # killed between the two renames below
                old.rename(output_dir)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir()
            try:
                yield new
                if output_dir.exists():
                    output_dir.rename(old)
                new.rename(output_dir)
            finally:
                if old.exists() and not output_dir.exists():
                    old.rename(output_dir)
                shutil.rmtree(work, ignore_errors=True)
    except Timeout:
        raise DataError(
            f"{output_dir}: another build is at work there. Wait for it, or name another folder."
        ) from None
    except OSError as error:
        free = shutil.disk_usage(next(folder for folder in output_dir.parents if folder.exists())).free
        raise DataError(
            f"{output_dir}: the build stopped ({error}). That disk has {free / 1e9:,.1f} GB free; an earlier dataset "
            "in the folder is as it was."
        ) from error
