"""Archives and annotation files from nobody knows where (vlmcap.data.sources)."""

import gzip
import io
import json
import stat
import struct
import tarfile
import zipfile

import pytest

from vlmcap.data import sources
from vlmcap.data.errors import DataError
from vlmcap.data.sources import read_rows

GOOD = json.dumps({"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "空"}]}).encode()


def tar(*members: tuple[str, bytes, dict]) -> bytes:
    """A .tar.gz; of each member name, content and what differs from a plain file's header."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content, changed in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in changed.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(*members: tuple[str, bytes, dict]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, changed in members:
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            for key, value in changed.items():
                setattr(member, key, value)
            archive.writestr(member, content)
    return packed.getvalue()


def with_tar_size(archive: bytes, size: bytes) -> bytes:
    """The first header of the archive with another size field, its checksum corrected."""
    raw = bytearray(gzip.decompress(archive))
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return gzip.compress(bytes(raw))


def with_encryption(archive: bytes) -> bytes:
    """Sets the flag in the local and in the central header."""
    raw = bytearray(archive)
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def with_zip_size(archive: bytes, size: int) -> bytes:
    raw = bytearray(archive)
    for place in (22, raw.index(b"PK\x01\x02") + 24):
        raw[place : place + 4] = struct.pack("<I", size)
    return bytes(raw)


PLAIN = ("val.json", GOOD, {})
NEVER = "No official release is like that"
SPARSE = {"pax_headers": {"GNU.sparse.major": "0", "GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**50)}}
ARCHIVES = {
    "tar: a path out of the folder": (tar(PLAIN, ("../../x.json", GOOD, {})), r"'\.\./\.\./x\.json' in it is not a"),
    "tar: an absolute path": (tar(("/etc/x.json", GOOD, {})), "'/etc/x.json' in it is not a path below"),
    "tar: an escape sequence": (tar(("a\x1b[2J.json", GOOD, {})), r"'a\\x1b\[2J.json' in it is not a path below"),
    "tar: a symbolic link": (tar(("x.json", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})), "is a link"),
    "tar: a hard link": (tar(PLAIN, ("x.json", b"", {"type": tarfile.LNKTYPE, "linkname": "val.json"})), "is a link"),
    "tar: a device": (tar(PLAIN, ("x.json", b"", {"type": tarfile.CHRTYPE})), "or a device"),
    "tar: a fifo": (tar(PLAIN, ("x.json", b"", {"type": tarfile.FIFOTYPE})), "no plain file"),
    "tar: a sparse file of a petabyte": (tar(("x.json", b"{}", SPARSE)), "sparse file"),
    "tar: the same file twice": (tar(PLAIN, PLAIN), "'val.json' is in it twice"),
    "tar: a bomb": (tar(("x.json", bytes(3_000_000), {})), "more than [0-9,]+ bytes, .*as is read of one of its size"),
    "tar: a bomb that is passed over": (tar(("x.bin", bytes(3_000_000), {}), PLAIN), "more than [0-9,]+ bytes, "),
    "tar: many members": (tar(*[(f"{n}.txt", b"", {}) for n in range(1_001)]), "more than 1,000 members"),
    "tar: a long header": (tar(("x" * 5_000 + ".json", GOOD, {})), "a header in it has 5,[0-9]+ bytes"),
    "tar: a size below zero": (with_tar_size(tar(PLAIN), b"\xff" * 12), "no plain file"),
    "tar: a size that lies": (with_tar_size(tar(PLAIN), b"%011o\0" % 10**6), "damaged or cut off"),
    "tar: an archive in the archive": (tar(("inner.zip", zipped(PLAIN), {})), r"holds no annotation file"),
    "gzip of no tar": (gzip.compress(GOOD), "damaged or cut off"),
    "zip: a path out of the folder": (zipped(("../x.json", GOOD, {})), "not a path below"),
    "zip: a path of Windows": (zipped(("..\\x.json", GOOD, {})), "not a path below"),
    "zip: a drive of Windows": (zipped(("C:x.json", GOOD, {})), "not a path below"),
    "zip: a symbolic link": (zipped(("x.json", b"/etc/passwd", {"external_attr": stat.S_IFLNK << 16})), "is a link"),
    "zip: the same file twice": (None, "'val.json' is in it twice"),
    "zip: a bomb": (zipped(("x.json", bytes(3_000_000), {})), "more than [0-9,]+ bytes"),
    "zip: a bomb that states a small size": (
        with_zip_size(zipped(("x.json", bytes(3_000_000), {})), 100),
        "damaged or cut off .*CRC",
    ),
    "zip: encrypted": (with_encryption(zipped(PLAIN)), "'val.json' in it is encrypted"),
    "zip: two names of one member": (
        zipped(PLAIN).replace(b"val.json", b"tra.json", 1),
        "damaged or cut off .*differ",
    ),
    "zip: many members": (zipped(*[(f"{n}.txt", b"", {}) for n in range(1_001)]), "more than 1,000 members"),
    "zip: an archive in the archive": (zipped(("inner.tar.gz", tar(PLAIN), {})), "holds no annotation file"),
}
with pytest.warns(UserWarning, match="Duplicate name"):
    ARCHIVES["zip: the same file twice"] = (zipped(PLAIN, PLAIN), "'val.json' is in it twice")


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_nobody_honest_makes(fault, tmp_path, name):
    content, message = ARCHIVES[name]
    path = tmp_path / "archive"
    path.write_bytes(content)
    with fault(name):
        with pytest.raises(DataError, match=message) as error:
            read_rows([path], "yj")
        assert str(error.value).startswith(f"{path}: ")
        assert [file.name for file in tmp_path.iterdir()] == ["archive"]  # nothing is unpacked


def test_any_byte_changed_or_lost_is_an_error_or_does_not_matter(fault, tmp_path):
    expected, _ = read_rows([write(tmp_path, zipped(PLAIN))], "yj")
    for content in (zipped(PLAIN), tar(PLAIN)):
        for place in range(0, len(content), 3):
            for damaged in (content[:place], content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :]):
                with fault(f"byte {place} of an archive"):
                    try:
                        rows, _ = read_rows([write(tmp_path, damaged)], "yj")
                    except DataError as error:
                        assert str(tmp_path / "archive") in str(error)
                    else:
                        assert rows == expected


def write(folder, content: bytes):
    path = folder / "archive"
    path.write_bytes(content)
    return path


def changed(**entry) -> dict:
    return {"images": [{"id": 1, **entry}], "annotations": [{"id": 1, "image_id": 1, "caption": "空"}]}


TEXT = GOOD.decode()
DOCUMENTS = {
    "nested 100,000 deep": (b"[" * 100_000, "levels of nesting"),
    "UTF-16": (TEXT.encode("utf-16"), "byte 0 of .*Annotation files are UTF-8"),
    "cp932": (GOOD.replace(b"\\u7a7a", "空".encode("cp932")), "byte [0-9]+ of .*Annotation files are UTF-8"),
    "NUL bytes": (b"\0" * 1_000, "not valid JSON"),
    "a key twice": (TEXT.replace('"id": 1}', '"id": 1, "id": 2}', 1).encode(), "the key 'id' occurs twice"),
    "half a surrogate pair": (GOOD.replace(b"\\u7a7a", b"\\ud83d"), "surrogate"),
    "NaN as id": (GOOD.replace(b'"id": 1', b'"id": NaN', 1), "NaN is not a finite number"),
    "an id of 5,000 digits": (GOOD.replace(b'"id": 1', b'"id": 1' + b"0" * 5_000, 1), "5001 digits"),
    "an id that parquet cannot hold": (
        changed(id=2**63),
        r"images\[0\] has id 9223372036854775808, expected a number",
    ),
    "an id below zero": (changed(id=-1), r"images\[0\] has id -1, expected a number from 0"),
    "an id that is a fraction": (changed(id=1.0), r"images\[0\] has id 1.0, expected a whole number"),
    "a list as licence": (changed(license=[1]), r"images\[0\] has license a list, expected a number"),
    "a licence table that is a number": (changed() | {"licenses": 3}, "'licenses' is 3, expected a list"),
    "a URL that is a number": (changed(coco_url=3), r"images\[0\] has coco_url 3, expected a text"),
    "a file name out of the folder": (
        changed(file_name="../../etc/passwd"),
        r"images\[0\] has file_name '../../etc/p",
    ),
    "an absolute file name": (changed(file_name="/etc/passwd"), r"file_name '/etc/passwd', expected a path below"),
    "a file name with NUL": (changed(file_name="a\0.jpg"), r"file_name 'a\\x00.jpg', expected a path below"),
    "a file name of Windows": (changed(file_name="..\\a.jpg"), "expected a path below"),
    "a file name of 300 letters": (changed(file_name="a" * 300), "expected a path below"),
    "an empty file name": (changed(file_name=""), "file_name '', expected a path below"),
    "images that are lists": (changed() | {"images": [[1]]}, r"images\[0\] is a list, the key 'id' is missing"),
    "images in an object": (changed() | {"images": {"1": {}}}, "'images' is an object, expected a list"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_that_is_not_what_it_should_be(fault, tmp_path, name):
    content, message = DOCUMENTS[name]
    path = tmp_path / "annotations.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with fault(name), pytest.raises(DataError, match=message) as error:
        read_rows([path], "yj")
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 1_000


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_rows([path], "yj")[0][0]["captions"] == ["空"]


def test_a_file_larger_than_all_releases_is_not_read(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 50)
    path = write(tmp_path, GOOD)
    with fault("a file that is too large"), pytest.raises(DataError, match="bytes are more than the 50 that are read"):
        read_rows([path], "yj")


def test_what_a_file_says_of_itself_is_cut(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(changed() | {"info": {"description": "x" * 10**6}}))
    assert len(read_rows([path], "yj")[1][0].description) == 1_000
