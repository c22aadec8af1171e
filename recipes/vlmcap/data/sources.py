"""Annotation files in, rows out: STAIR Captions, YJ Captions and UIT-ViIC, as official archives or COCO-format JSON.

A row is one image (see `read_rows`); every file this module reads is described by a `SourceFile` for the dataset card.
Whatever is wrong with an annotation file becomes a `DataError` that names the file, the place and the mend.
"""

import hashlib
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import DownloadConfig, DownloadManager
from tqdm.auto import tqdm

# Official releases, both CC BY 4.0: github.com/STAIR-Lab-CIT/STAIR-captions and github.com/yahoojapan/YJCaptions.
ARCHIVES = {
    "stair": "https://github.com/STAIR-Lab-CIT/STAIR-captions/raw/master/stair_captions_v1.2.tar.gz",
    "yj": "https://github.com/yahoojapan/YJCaptions/raw/master/yjcaptions26k.zip",
}
# COCO's own licence table, the same in all its annotation files; UIT-ViIC has the numbers and not the table.
COCO_LICENSES = {
    1: "Attribution-NonCommercial-ShareAlike License (http://creativecommons.org/licenses/by-nc-sa/2.0/)",
    2: "Attribution-NonCommercial License (http://creativecommons.org/licenses/by-nc/2.0/)",
    3: "Attribution-NonCommercial-NoDerivs License (http://creativecommons.org/licenses/by-nc-nd/2.0/)",
    4: "Attribution License (http://creativecommons.org/licenses/by/2.0/)",
    5: "Attribution-ShareAlike License (http://creativecommons.org/licenses/by-sa/2.0/)",
    6: "Attribution-NoDerivs License (http://creativecommons.org/licenses/by-nd/2.0/)",
    7: "No known copyright restrictions (http://flickr.com/commons/usage/)",
    8: "United States Government Work (http://www.usa.gov/copyright.shtml)",
}
COCO_FILE_NAME = re.compile(r"COCO_(train2014|val2014)_\d{12}\.jpg")


class DataError(ValueError):
    """The data cannot be built as asked; the message names the file, the value and the mend."""


@dataclass(frozen=True)
class SourceFile:
    """What was read from one annotation file or archive; `description` and `license` are what its `info` says."""

    name: str
    sha256: str
    images: int
    captions: int
    description: str
    license: str


def download_archive(source: str, cache_dir: str | Path | None = None) -> Path:
    """The official archive of "stair" or "yj", downloaded once into the cache of the datasets library, with progress.

    Raises DataError when the archive cannot be had.
    """
    url = ARCHIVES[source]
    manager = DownloadManager(
        dataset_name=source, download_config=DownloadConfig(cache_dir=cache_dir, download_desc=f"Downloading {url}")
    )
    try:
        return Path(manager.download(url))
    except Exception as error:  # whatever lies under fsspec: OSError, aiohttp errors, offline mode
        raise DataError(
            f"{url}: the download failed ({type(error).__name__}: {error}). Fetch the archive in another way and name "
            f"it with {'--annotations' if source == 'stair' else '--annotations (or --yj_annotations)'} FILE."
        ) from error


def read_rows(paths: Sequence[str | Path], source: str) -> tuple[list[dict], list[SourceFile]]:
    """Reads COCO-format annotation files (.json, or .tar.gz and .zip archives of them) into rows sorted by image id.

    A row is {"image_id": int, "file_name": str, "coco_url": str, "license": str, "captions": list[str],
    "caption_ids": list[int], "in_yj": bool}, captions in the order of the file; `in_yj` is True for "yj" and, until
    `splits.flag_yj`, False for "stair" and None for "uit_viic". What an annotation file leaves out is derived:

    - file_name: COCO_{folder}_{id:012d}.jpg. The folder is train2014 for YJ, whose images all lie there; for STAIR it
      is the one that the name of the annotation file says (train or val).
    - coco_url: http://images.cocodataset.org/{folder}/{file_name} for the file names of COCO 2014, else "". It also
      replaces the http://mscoco.org/images/ID of old COCO files, where no photograph is served any more.
    - license: "name (url)" of the image's licence out of the file's `licenses` table, "" when the file does not say;
      "uit_viic" files have COCO's licence numbers without a table, so COCO's is used.

    In an archive, *_tokenized.json members are passed over: the STAIR archive holds every caption a second time there.

    Raises DataError on a file that is missing, damaged, malformed, truncated, empty or lacks a key, on an annotation
    whose image the same file does not list, and on an image listed twice.
    """
    rows: dict[int, dict] = {}
    listed_in: dict[int, str] = {}
    files = []
    for path in tqdm([Path(path) for path in paths], desc="reading annotations", unit="file"):
        images = captions = 0
        infos = []
        for name, data in _json_documents(path):
            document = _parse(name, data)
            new_rows = _rows_of(document, name, source)
            for image_id in new_rows:
                if image_id in rows:
                    raise DataError(
                        f"{name}: image id {image_id} is also listed in {listed_in[image_id]}. Give each image once."
                    )
                listed_in[image_id] = name
            rows |= new_rows
            images += len(new_rows)
            captions += len(document["annotations"])
            infos.append(document["info"] if isinstance(document.get("info"), dict) else {})
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        description, license = _joined(infos, "description"), _joined(infos, "license", "licence")
        files.append(SourceFile(path.name, digest, images, captions, description, license))
    return [rows[image_id] for image_id in sorted(rows)], files


def _joined(infos: list[dict], *keys: str) -> str:
    return "; ".join(dict.fromkeys(str(info[key]) for info in infos for key in keys if info.get(key)))


def _json_documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name for messages, bytes) of every annotation document in a JSON file or an archive."""
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] != b"\x1f\x8b" and magic != b"PK\x03\x04":
        yield str(path), path.read_bytes()
        return
    try:
        found = False
        for member, data in _zip_members(path) if magic[:2] == b"PK" else _tar_members(path):
            found = True
            yield f"{path}/{member}", data
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: the archive is damaged or cut off ({error}). Download it again.") from error
    if not found:
        raise DataError(f"{path}: the archive holds no annotation file (*.json).")


def _is_annotation_file(member: str) -> bool:
    name = member.rsplit("/", 1)[-1]
    # ._NAME are macOS's resource forks, which its archivers put beside every file.
    return name.endswith(".json") and not name.endswith("_tokenized.json") and not name.startswith("._")


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if _is_annotation_file(member):
                yield member, archive.read(member)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isfile() and _is_annotation_file(member.name):
                yield member.name, archive.extractfile(member).read()


def _parse(name: str, data: bytes) -> dict:
    if not data.strip():
        raise DataError(f"{name}: the file is empty.")
    try:
        document = json.loads(data)
    except json.JSONDecodeError as error:
        position = len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))
        cut_off = not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated string")
        raise DataError(
            f"{name}: line {error.lineno}, column {error.colno} (byte {position:,} of {len(data):,}): {error.msg}. "
            + ("The file looks cut off; fetch it again." if cut_off else "This is not valid JSON.")
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {error.start:,} of {len(data):,}: {error.reason}. Annotation files are UTF-8."
        ) from error
    if not isinstance(document, dict):
        raise DataError(f"{name}: holds {_kind(document)}, expected an object with `images` and `annotations`.")
    for key in ("images", "annotations"):
        if key not in document:
            raise DataError(f"{name}: has no key {key!r}; a COCO-format file has `images` and `annotations`.")
        if not isinstance(document[key], list) or not document[key]:
            raise DataError(f"{name}: {key!r} is {_kind(document[key])}, expected a list with at least one entry.")
    return document


def _rows_of(document: dict, name: str, source: str) -> dict[int, dict]:
    licenses = dict(COCO_LICENSES) if source == "uit_viic" else {}
    for index, license in enumerate(document.get("licenses") or []):
        license_id = _field(license, "id", int, name, "licenses", index)
        licenses[license_id] = f"{license.get('name', '')} ({license.get('url', '')})"
    rows: dict[int, dict] = {}
    for index, image in enumerate(document["images"]):
        image_id = _field(image, "id", int, name, "images", index)
        if image_id in rows:
            raise DataError(f"{name}: image id {image_id} is listed twice (images[{index}]). Give each image once.")
        if "file_name" in image:
            file_name = _field(image, "file_name", str, name, "images", index)
        else:
            file_name = f"COCO_{_folder(source, name)}_{image_id:012d}.jpg"
        coco_name = COCO_FILE_NAME.fullmatch(file_name)
        coco_url = image.get("coco_url") or ""
        if coco_name and (not coco_url or "//mscoco.org/" in coco_url):
            coco_url = f"http://images.cocodataset.org/{coco_name[1]}/{file_name}"
        rows[image_id] = {
            "image_id": image_id,
            "file_name": file_name,
            "coco_url": coco_url,
            "license": licenses.get(image.get("license"), ""),
            "captions": [],
            "caption_ids": [],
            "in_yj": {"stair": False, "yj": True, "uit_viic": None}[source],
        }
    for index, annotation in enumerate(document["annotations"]):
        image_id = _field(annotation, "image_id", int, name, "annotations", index)
        caption_id = _field(annotation, "id", int, name, "annotations", index)
        caption = _field(annotation, "caption", str, name, "annotations", index)
        row = rows.get(image_id)
        if row is None:
            raise DataError(
                f"{name}: annotations[{index}] (id {caption_id}) is about image {image_id}, which the file's `images` "
                "do not list."
            )
        row["captions"].append(caption)
        row["caption_ids"].append(caption_id)
    return rows


def _folder(source: str, name: str) -> str:
    if source == "yj":
        return "train2014"
    file_name = Path(name).name
    folders = [f"{part}2014" for part in ("train", "val") if part in file_name]
    if len(folders) != 1:
        raise DataError(
            f"{name}: its images have no `file_name`, and the name of the file does not say whether they are COCO's "
            "train2014 or val2014. Put `train` or `val` into the file's name."
        )
    return folders[0]


def _field(entry: dict, key: str, kind: type, name: str, place: str, index: int):
    """entry[key], which must be a `kind`; exact types, so that true is no id."""
    try:
        value = entry[key]
    except (KeyError, TypeError) as error:
        found = f"has the keys {sorted(entry)}" if isinstance(entry, dict) else f"is {_kind(entry)}"
        raise DataError(f"{name}: {place}[{index}] {found}, the key {key!r} is missing.") from error
    if type(value) is not kind:
        wanted = {int: "a whole number", str: "a text"}[kind]
        raise DataError(f"{name}: {place}[{index}] has {key} {value!r}, expected {wanted}.")
    return value


def _kind(value: object) -> str:
    if value == []:
        return "an empty list"
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), repr(value))
