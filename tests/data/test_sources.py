"""Annotation files of every kind a user may hold, and every kind of damage."""

import io
import json
import subprocess
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmcap.data.corpora import CORPORA, Archive
from vlmcap.data.errors import DataError
from vlmcap.data.sources import download_archive, read_rows


def coco(images: list[dict], captions: list[tuple[int, int, str]], **rest) -> dict:
    """A COCO-format document; captions as (id, image_id, text)."""
    annotations = [{"id": id, "image_id": image_id, "caption": text} for id, image_id, text in captions]
    return {"images": images, "annotations": annotations} | rest


def write_json(path, document):
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


STAIR_VAL = coco(
    [
        {
            "id": 42,
            "file_name": "COCO_val2014_000000000042.jpg",
            "license": 2,
            "coco_url": "http://mscoco.org/images/42",
        },
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg", "license": 9, "coco_url": "https://example.org/7.jpg"},
    ],
    [(1, 7, "赤い傘が並ぶ"), (2, 42, "坂道を犬が下る"), (3, 7, "雨の日の商店街")],
    info={"description": "made up for this test"},
    licenses=[{"id": 2, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
)


def test_rows_are_complete_and_sorted_by_image_id(tmp_path):
    rows, files = read_rows([write_json(tmp_path / "stair_val.json", STAIR_VAL)], "stair")
    assert rows == [
        {
            "image_id": 7,
            "file_name": "COCO_val2014_000000000007.jpg",
            "coco_url": "https://example.org/7.jpg",
            "license": "",  # 9 is not in the licenses table
            "captions": ["赤い傘が並ぶ", "雨の日の商店街"],
            "caption_ids": [1, 3],
            "in_yj": False,
        },
        {
            "image_id": 42,
            "file_name": "COCO_val2014_000000000042.jpg",
            # mscoco.org serves no photographs any more
            "coco_url": "http://images.cocodataset.org/val2014/COCO_val2014_000000000042.jpg",
            "license": "Attribution License (http://creativecommons.org/licenses/by/2.0/)",
            "captions": ["坂道を犬が下る"],
            "caption_ids": [2],
            "in_yj": False,
        },
    ]
    assert (files[0].name, files[0].images, files[0].captions) == ("stair_val.json", 2, 3)
    assert files[0].description == "made up for this test"
    assert len(files[0].sha256) == 64


def test_yj_images_known_by_id_only_are_train2014(tmp_path):
    path = write_json(tmp_path / "val.json", coco([{"id": 393227}], [(8, 393227, "猫が寝ています。")]))
    (row,), _ = read_rows([path], "yj")
    assert row["file_name"] == "COCO_train2014_000000393227.jpg"
    assert row["coco_url"] == "http://images.cocodataset.org/train2014/COCO_train2014_000000393227.jpg"
    assert row["in_yj"] is True


@pytest.mark.parametrize(("name", "folder"), [("a_train.json", "train2014"), ("a_val.json", "val2014")])
def test_stair_folder_comes_from_the_annotation_files_name(tmp_path, name, folder):
    (row,), _ = read_rows([write_json(tmp_path / name, coco([{"id": 5}], [(1, 5, "海")]))], "stair")
    assert row["file_name"] == f"COCO_{folder}_000000000005.jpg"


def test_stair_file_without_file_names_must_say_train_or_val(tmp_path):
    with pytest.raises(DataError, match="does not say"):
        read_rows([write_json(tmp_path / "captions.json", coco([{"id": 5}], [(1, 5, "海")]))], "stair")


def test_no_address_is_made_up_for_images_that_coco_does_not_have(tmp_path):
    path = write_json(
        tmp_path / "scenes.json", coco([{"id": 1, "file_name": "COCO_train2014_000000000001.png"}], [(1, 1, "丸")])
    )
    (row,), _ = read_rows([path], "stair")
    assert row["coco_url"] == ""


def make_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def make_zip(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def archive_members() -> dict[str, bytes]:
    train = coco([{"id": 3}], [(1, 3, "朝の駅")])
    tokenized = coco([{"id": 3}], [(1, 3, "朝 の 駅")])
    documents = {"c/x_train.json": train, "c/x_val.json": STAIR_VAL, "c/x_train_tokenized.json": tokenized}
    members = {name: json.dumps(document).encode() for name, document in documents.items()}
    return members | {"__MACOSX/c/._x_train.json": b"\x00\x05\x16\x07", "c/README.md": b"read me"}


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_archives_read_like_their_files_without_the_tokenized_twins(tmp_path, make):
    rows, files = read_rows(
        [make(tmp_path / "download", archive_members())], "stair"
    )  # cached downloads have no suffix
    assert [row["image_id"] for row in rows] == [3, 7, 42]
    assert rows[0]["captions"] == ["朝の駅"]
    assert (files[0].images, files[0].captions) == (3, 4)


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_cut_off_archive(tmp_path, make):
    path = make(tmp_path / "archive", archive_members())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"archive: the archive is damaged or cut off .* Delete it and download"):
        read_rows([path], "stair")


def test_archive_without_annotations(tmp_path):
    with pytest.raises(DataError, match="holds no annotation file"):
        read_rows([make_zip(tmp_path / "a.zip", {"README.md": b"read me"})], "yj")


def test_truncated_json_is_placed_to_the_byte(tmp_path):
    text = '{"images": [{"id": 1}],\n "annotations": [{"id": 1, "image_id": 1, "caption": "夜景"},'
    path = tmp_path / "cut.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_rows([path], "yj")
    size = len(text.encode())
    assert f"{path}: line 2, column {len(text.splitlines()[1]) + 1} (byte {size} of {size})" in str(error.value)
    assert "cut off" in str(error.value)


def test_malformed_json_is_placed_to_the_byte(tmp_path):
    text = '{"images": [{"id": 1}], "info": "夜景", "annotations": [}'
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_rows([path], "yj")
    assert f"line 1, column {len(text)} (byte {len(text.encode()) - 1} of" in str(error.value)
    assert "not valid JSON" in str(error.value)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "sjis.json"
    path.write_bytes('{"images": "夜景"}'.encode("shift_jis"))
    with pytest.raises(DataError, match="byte 12 of 18.*UTF-8"):
        read_rows([path], "yj")


GOOD = coco([{"id": 1}], [(1, 1, "空")])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "an empty list, expected an object"),
        ({"images": [{"id": 1}]}, "no key 'annotations'"),
        ({"annotations": GOOD["annotations"]}, "no key 'images'"),
        (GOOD | {"annotations": []}, "'annotations' is an empty list"),
        (GOOD | {"images": None}, "'images' is null"),
        (GOOD | {"images": [{"id": 1}, {"file_name": "a.jpg"}]}, r"images\[1\] .*the key 'id' is missing"),
        (GOOD | {"images": [{"id": 1}, {"id": "2"}]}, r"images\[1\] has id '2', expected a whole number"),
        (GOOD | {"images": [{"id": 1}, {"id": 1}]}, r"image id 1 is listed twice \(images\[1\]\)"),
        (GOOD | {"images": [{"id": 1, "file_name": 3}]}, "file_name 3, expected a text"),
        (GOOD | {"annotations": ["空"]}, r"annotations\[0\] is a text, the key 'image_id' is missing"),
        (GOOD | {"annotations": [{"id": 1, "image_id": 1}]}, r"annotations\[0\] has .*'caption' is missing"),
        (GOOD | {"annotations": [{"id": True, "image_id": 1, "caption": "空"}]}, "has id True"),
        (coco([{"id": 1}], [(1, 1, "空"), (9, 8, "海")]), r"annotations\[1\] \(id 9\) is about image 8"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, document, message):
    path = write_json(tmp_path / "file.json", document)
    with pytest.raises(DataError, match=message) as error:
        read_rows([path], "yj")
    assert str(path) in str(error.value)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.json").touch()
    with pytest.raises(DataError, match="empty.json: the file is empty"):
        read_rows([tmp_path / "empty.json"], "yj")
    with pytest.raises(DataError, match="gone.json: no such file"):
        read_rows([tmp_path / "gone.json"], "yj")


def test_an_image_in_two_files(tmp_path):
    paths = [write_json(tmp_path / name, GOOD) for name in ("one.json", "two.json")]
    with pytest.raises(DataError, match=r"two.json: image id 1 is also listed in .*one.json"):
        read_rows(paths, "yj")


class CountingHandler(SimpleHTTPRequestHandler):
    gets: list[str] = []

    def do_GET(self):
        self.gets.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def file_server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    CountingHandler.gets = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(CountingHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_official_archives_are_downloaded_once_and_compared(tmp_path, file_server, monkeypatch):
    folder, address = file_server
    for commit, caption in (("c0ffee", "空"), ("master", "海")):
        (folder / commit).mkdir()
        document = coco([{"id": 1}], [(1, 1, caption)])
        make_zip(folder / commit / "yj.zip", {"yj_clean.json": json.dumps(document).encode()})
    known = subprocess.run(
        ["git", "hash-object", "--no-filters", folder / "c0ffee/yj.zip"], capture_output=True, text=True, check=True
    ).stdout.strip()
    archive = Archive(f"{address}/{{commit}}/yj.zip", "c0ffee", known)
    monkeypatch.setitem(CORPORA, "yj", replace(CORPORA["yj"], archive=archive))
    for latest, captions in ((False, ["空"]), (False, ["空"]), (True, ["海"])):
        path, url = download_archive("yj", latest, cache_dir=tmp_path / "cache")
        assert [row["captions"] for row in read_rows([path], "yj")[0]] == [captions]
        assert url == f"{address}/{'master' if latest else 'c0ffee'}/yj.zip"
    assert CountingHandler.gets == ["/c0ffee/yj.zip", "/master/yj.zip"]

    monkeypatch.setitem(CORPORA, "yj", replace(CORPORA["yj"], archive=replace(archive, blob="0" * 40)))
    with pytest.raises(DataError, match=rf"git blob id {known}, the official archive 0{{40}}\..*--latest_archives"):
        download_archive("yj", cache_dir=tmp_path / "cache")


def test_a_download_that_fails_says_what_else_to_do(tmp_path, file_server, monkeypatch):
    archive = Archive(f"{file_server[1]}/{{commit}}/gone.tar.gz", "c0ffee", "")
    monkeypatch.setitem(CORPORA, "stair", replace(CORPORA["stair"], archive=archive))
    with pytest.raises(DataError, match=r"c0ffee/gone.tar.gz: the download failed .*--annotations FILE"):
        download_archive("stair", cache_dir=tmp_path / "cache")


def test_real_yj_subset(data_dir):
    rows, files = read_rows([data_dir / "yj_subset" / "yjcaptions_subset.json"], "yj")
    assert len(rows) == 13_555
    assert sum(len(row["captions"]) for row in rows) == 25_759
    assert all(row["coco_url"] and row["in_yj"] for row in rows)
