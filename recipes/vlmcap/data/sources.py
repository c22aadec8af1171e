"""Annotation files in, rows out: STAIR Captions, YJ Captions and UIT-ViIC, as official archives or COCO-format JSON.

A row is one image (see `read_rows`); every file this module reads is described by a `SourceFile` for the dataset card.
Whatever is wrong with an annotation file becomes a `DataError` that names the file, the place and the fix.
"""

import gzip
import hashlib
import io
import json
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import DownloadConfig, DownloadManager
from tqdm.auto import tqdm

from vlmcap.atomic_write import git_blob_id
from vlmcap.data.corpora import CORPORA
from vlmcap.data.errors import DataError
from vlmcap.data.images import is_plain_path
from vlmcap.errors import needs_file
from vlmcap.strict_parsing import parse_json, shown

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
# What is read of an annotation file at most, packed and unpacked.
MAX_BYTES = 2**29
MAX_EXPANSION, ROOM = 100, 2**20  # unpacked bytes for a packed one, and 1 MiB more for small archives
MAX_MEMBERS, MAX_HEADER = 1_000, 4_096  # of an archive: members, and bytes of a header that extends tar's own
LONGEST_INFO = 1_000  # characters of what a file says of itself
COCO_FILE_NAME = re.compile(r"COCO_(train2014|val2014)_\d{12}\.jpg")


@dataclass(frozen=True)
class SourceFile:
    """What was read from one annotation file or archive; `description` and `license` are what its `info` says."""

    name: str
    sha256: str
    images: int
    captions: int
    description: str
    license: str


def download_archive(source: str, latest: bool = False, cache_dir: str | Path | None = None) -> tuple[Path, str]:
    """The official archive of a corpus that has one, and its address.

    It is downloaded once, into the cache of the datasets library.

    Args:
        latest: take the file of the repository's branch, whatever it is, and not the one whose git blob id is known.

    Raises:
        DataError: the archive cannot be downloaded, or is not the one that is known.
    """
    archive = CORPORA[source].archive
    url = archive.url.format(commit=archive.branch if latest else archive.commit)
    manager = DownloadManager(
        dataset_name=source, download_config=DownloadConfig(cache_dir=cache_dir, download_desc=f"Downloading {url}")
    )
    try:
        path = Path(manager.download(url))
    except Exception as error:  # any error of the libraries under fsspec: OSError, aiohttp errors, offline mode
        raise DataError(
            f"{url}: the download failed ({type(error).__name__}: {error}). Fetch the archive in another way and name "
            f"it with {'--annotations' if source == 'stair' else '--annotations (or --yj_annotations)'} FILE."
        ) from error
    if not latest and (blob := git_blob_id(read_source(path))) != archive.blob:
        raise DataError(
            f"{url}: what was downloaded has the git blob id {blob}, the official archive {archive.blob}. Look at"
            f" {path} and delete it to download it again; for a newer release add --latest_archives."
        )
    return path, url


def read_rows(paths: Sequence[str | Path], source: str) -> tuple[list[dict], list[SourceFile]]:
    """Reads COCO-format annotation files (.json, or .tar.gz and .zip archives of them) into rows sorted by image id.

    A row is {"image_id": int, "file_name": str, "coco_url": str, "license": str, "captions": list[str],
    "caption_ids": list[int], "in_yj": bool}, captions in the order of the file; `in_yj` is the corpus's, see
    `corpora.Corpus`, until `splits.flag_yj`. What an annotation file leaves out is derived:

    - file_name: COCO_{folder}_{id:012d}.jpg. The folder is the corpus's (`coco_folder`), else the one that the name of
      the annotation file says (train or val).
    - coco_url: http://images.cocodataset.org/{folder}/{file_name} for the file names of COCO 2014, else "". It also
      replaces the http://mscoco.org/images/ID of old COCO files, where no photograph is served any more.
    - license: "name (url)" of the image's licence out of the file's `licenses` table, "" when the file does not say;
      where the corpus has COCO's licence numbers without a table, COCO's is used.

    In an archive, *_tokenized.json members are skipped: the STAIR archive holds every caption a second time there.

    Raises DataError on a file that is missing, damaged, malformed, truncated, empty or lacks a key, on an annotation
    whose image the same file does not list, and on an image listed twice.
    """
    rows: dict[int, dict] = {}
    listed_in: dict[int, str] = {}
    files = []
    for path in tqdm([Path(path) for path in paths], desc="reading annotations", unit="file"):
        images = captions = 0
        infos = []
        data = read_source(path)
        for name, content in _json_documents(path, data):
            document = _parse(name, content)
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
        digest = hashlib.sha256(data).hexdigest()
        description, license = _joined(infos, "description"), _joined(infos, "license", "licence")
        files.append(SourceFile(path.name, digest, images, captions, description, license))
    return [rows[image_id] for image_id in sorted(rows)], files


def _joined(infos: list[dict], *keys: str) -> str:
    return "; ".join(dict.fromkeys(str(info[key])[:LONGEST_INFO] for info in infos for key in keys if info.get(key)))


def read_source(path: str | Path) -> bytes:
    """The bytes of an annotation file or id list. Raises DataError when it is missing, no file, or above MAX_BYTES."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: {needs_file(path)}.")
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes are more than the {MAX_BYTES:,} that are read here.")
    return path.read_bytes()


def _json_documents(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name for messages, bytes) of every annotation document in a JSON file or an archive. Nothing is unpacked."""
    is_zip = data.startswith(b"PK\x03\x04")
    if not is_zip and not data.startswith(b"\x1f\x8b"):
        yield str(path), data
        return
    limit = min(MAX_BYTES, ROOM + MAX_EXPANSION * len(data))
    names = set()
    try:
        for member, content in (_zip_members if is_zip else _tar_members)(data, limit):
            if member in names:
                raise _Refused(f"{member!r} is in it twice")
            names.add(member)
            yield f"{path}/{member}", content
    except _Refused as error:
        raise DataError(f"{path}: {error}. No official release is like that; look where the file is from.") from error
    except Exception as error:  # zipfile and tarfile raise what they stumble over: BadZipFile, struct.error, EOFError
        raise DataError(
            f"{path}: the archive is damaged or cut off ({type(error).__name__}: {error}). Delete it and download it "
            "again."
        ) from error
    if not names:
        raise DataError(f"{path}: the archive holds no annotation file (*.json).")


def _is_annotation_file(member: str) -> bool:
    name = member.rsplit("/", 1)[-1]
    # ._NAME are macOS's resource forks, which its archivers put beside every file.
    return name.endswith(".json") and not name.endswith("_tokenized.json") and not name.startswith("._")


class _Refused(Exception):
    """An archive that is whole, but that nobody honest makes."""


def _zip_members(data: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        # zipfile unpacks no more of a member than it states, and compares the CRC.
        _check_size(sum(member.file_size for member in members), limit)
        for number, member in enumerate(members):
            _check_member(number, member.filename)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: not packed on Unix
                raise _Refused(f"{member.filename!r} in it is a link or a device")
            if _is_annotation_file(member.filename):
                if member.flag_bits & 1:
                    raise _Refused(f"{member.filename!r} in it is encrypted")
                yield member.filename, archive.read(member)


def _tar_members(data: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    class Unpacked(gzip.GzipFile):
        def read(self, size: int = -1) -> bytes:
            _check_size(self.tell() + size, limit)  # of members that are skipped too
            return super().read(size)

    with (
        Unpacked(fileobj=io.BytesIO(data)) as stream,
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarMember) as archive,
    ):
        for number, member in enumerate(archive):
            _check_member(number, member.name)
            if member.issparse():
                raise _Refused(f"{member.name!r} in it is a sparse file")
            if member.isreg() and _is_annotation_file(member.name):
                yield member.name, archive.extractfile(member).read()


class _TarMember(tarfile.TarInfo):
    """Looks at every header before tarfile reads what follows it: long headers make its parser crawl."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_TarMember":
        member = super().frombuf(buf, encoding, errors)
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 <= member.size <= MAX_HEADER:
                raise _Refused(f"a header in it has {member.size:,} bytes")
        elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.size < 0:
            raise _Refused(f"{member.name!r} in it is a link or a device, or otherwise no plain file")
        return member


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise _Refused(f"unpacked it has more than {limit:,} bytes, which is as much as is read of one of its size")


def _check_member(number: int, name: str) -> None:
    if number == MAX_MEMBERS:
        raise _Refused(f"it has more than {MAX_MEMBERS:,} members")
    if not is_plain_path(name):
        raise _Refused(f"{name!r} in it is not a path below the archive")


def parse_source(name: str | Path, data: bytes) -> object:
    """The value of a JSON file, by `documents.parse_json`. Raises DataError with the place of the error."""
    try:
        return parse_json(data)
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
    except ValueError as error:
        raise DataError(f"{name}: {error}.") from error


def _parse(name: str, data: bytes) -> dict:
    if not data.strip():
        raise DataError(f"{name}: the file is empty.")
    document = parse_source(name, data)
    if not isinstance(document, dict):
        raise DataError(f"{name}: holds {_kind(document)}, expected an object with `images` and `annotations`.")
    for key in ("images", "annotations"):
        if key not in document:
            raise DataError(f"{name}: has no key {key!r}; a COCO-format file has `images` and `annotations`.")
        _list(document, key, name)
    return document


def _list(document: dict, key: str, name: str) -> list:
    if not isinstance(document[key], list) or not document[key]:
        raise DataError(f"{name}: {key!r} is {_kind(document[key])}, expected a list with at least one entry.")
    return document[key]


def _rows_of(document: dict, name: str, source: str) -> dict[int, dict]:
    corpus = CORPORA[source]
    licenses = dict(COCO_LICENSES) if corpus.coco_licenses else {}
    for index, license in enumerate(_list(document, "licenses", name) if document.get("licenses") else []):
        license_id = _field(license, "id", int, name, "licenses", index)
        licenses[license_id] = f"{license.get('name', '')} ({license.get('url', '')})"
    rows: dict[int, dict] = {}
    for index, image in enumerate(document["images"]):
        image_id = _field(image, "id", int, name, "images", index)
        if image_id in rows:
            raise DataError(f"{name}: image id {image_id} is listed twice (images[{index}]). Give each image once.")
        if "file_name" in image:
            file_name = _field(image, "file_name", str, name, "images", index)
            if not is_plain_path(file_name):
                raise DataError(
                    f"{name}: images[{index}] has file_name {file_name!r:.200}, expected a path below a folder."
                )
        else:
            file_name = f"COCO_{corpus.coco_folder or _folder(name)}_{image_id:012d}.jpg"
        url = _field(image, "coco_url", str, name, "images", index) if image.get("coco_url") else ""
        if not url or "//mscoco.org/" in url:
            url = coco_url(file_name) or url
        license_id = image.get("license")
        if isinstance(license_id, list | dict):
            raise DataError(f"{name}: images[{index}] has license {_kind(license_id)}, expected a number.")
        rows[image_id] = {
            "image_id": image_id,
            "file_name": file_name,
            "coco_url": url,
            "license": licenses.get(license_id, ""),
            "captions": [],
            "caption_ids": [],
            "in_yj": corpus.in_yj,
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


def coco_url(file_name: str) -> str:
    """Where COCO serves a photograph with a file name of COCO 2014; "" for other names."""
    found = COCO_FILE_NAME.fullmatch(file_name)
    return f"http://images.cocodataset.org/{found[1]}/{file_name}" if found else ""


def _folder(name: str) -> str:
    file_name = Path(name).name
    folders = [f"{part}2014" for part in ("train", "val") if part in file_name]
    if len(folders) != 1:
        raise DataError(
            f"{name}: its images have no `file_name`, and the name of the file does not say whether they are COCO's "
            "train2014 or val2014. Put `train` or `val` into the file's name."
        )
    return folders[0]


def _field(entry: dict, key: str, kind: type, name: str, place: str, index: int):
    """entry[key], which must be a `kind`; exact types, so that true is not an id."""
    try:
        value = entry[key]
    except (KeyError, TypeError) as error:
        found = f"has the keys {shown(sorted(entry))}" if isinstance(entry, dict) else f"is {_kind(entry)}"
        raise DataError(f"{name}: {place}[{index}] {found}, the key {key!r} is missing.") from error
    if type(value) is not kind:
        wanted = {int: "a whole number", str: "a text"}[kind]
        raise DataError(f"{name}: {place}[{index}] has {key} {shown(value)}, expected {wanted}.")
    if kind is int and not 0 <= value < 2**63:
        raise DataError(f"{name}: {place}[{index}] has {key} {value}, expected a number from 0 to 2^63 - 1.")
    return value


def _kind(value: object) -> str:
    if value == []:
        return "an empty list"
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), shown(value))
