"""Id lists, Karpathy's JSON, the CSV of titles, and servers of photographs that never end."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from vlmcap.data import fetch
from vlmcap.data.errors import DataError
from vlmcap.data.fetch import fetch_images
from vlmcap.data.splits import read_ids, read_karpathy
from vlmcap.data.titles import read_titles

FORM = "Karpathy's dataset_coco.json has a list"
HEAD = b"Image_Name,Title\n"
FILES = {
    "ids in UTF-16": (read_ids, "12\n".encode("utf-16"), "byte 0 of .*Save the list as UTF-8"),
    "ids: 5,000 digits": (read_ids, b"1\n" + b"9" * 5_000, "line 2: '9+' is not an image id"),
    "ids: more than 64 bits": (read_ids, b"99999999999999999999", "line 1: '9+' is not an image id"),
    "ids: digits of another script": (read_ids, "４２".encode(), "line 1: '４２' is not an image id"),
    "ids: a NUL": (read_ids, b"1\n2\0\n", r"line 2: '2\\x00' is not an image id"),
    "ids: a line of a megabyte": (read_ids, b"x" * 10**6, "line 1: 'x+' is not an image id"),
    "Karpathy: nested deep": (read_karpathy, b"[" * 100_000, "levels of nesting"),
    "Karpathy: a list": (read_karpathy, b"[]", FORM),
    "Karpathy: images by name": (read_karpathy, b'{"images": {"a": 1}}', FORM),
    "Karpathy: a text as image": (read_karpathy, b'{"images": ["a"]}', rf"images\[0\] .*{FORM}"),
    "Karpathy: an id that is a fraction": (
        read_karpathy,
        b'{"images": [{"cocoid": 1.5, "split": "val"}]}',
        rf"images\[0\] .*{FORM}",
    ),
    "Karpathy: an endless id": (
        read_karpathy,
        b'{"images": [{"cocoid": 1e999, "split": "val"}]}',
        "1e999 is not a finite number",
    ),
    "Karpathy: a split that is a list": (
        read_karpathy,
        b'{"images": [{"cocoid": 1, "split": []}]}',
        rf"images\[0\] .*{FORM}",
    ),
    "Karpathy: an image twice": (
        read_karpathy,
        b'{"images": [{"cocoid": 1, "split": "val"}, {"cocoid": 1, "split": "test"}]}',
        r"images\[1\] has cocoid 1, which an earlier one has",
    ),
    "CSV in UTF-16": (read_titles, "Image_Name,Title\n".encode("utf-16"), "byte 0 of .*Save the CSV as UTF-8"),
    "CSV in UTF-16 without a mark": (read_titles, "Image_Name,Title\n".encode("utf-16-le"), "has the columns"),
    "CSV in cp932": (read_titles, HEAD + "a,茸の御飯\n".encode("cp932"), "byte [0-9]+ of .*Save the CSV as UTF-8"),
    "CSV: a field of a megabyte": (read_titles, HEAD + b"a," + b"x" * 10**6, "line 2: field larger than field limit"),
    "CSV: a quote that never ends": (read_titles, HEAD + b'a,"' + b"x,y\n" * 10**5, "field larger than field limit"),
    "CSV: a column twice": (read_titles, b"Image_Name,Title,Title\na,b,c\n", "has the column 'Title' twice"),
    "CSV: a name out of the folder": (
        read_titles,
        HEAD + b"../../a,Soup\n",
        "row 1 has Image_Name '../../a', expected",
    ),
    "CSV: a name with NUL": (read_titles, HEAD + b"a\0,Soup\n", r"row 1 has Image_Name 'a\\x00', expected"),
    "CSV: of NUL bytes": (read_titles, bytes(1_000), "has the columns"),
    "CSV: a header of 10,000 columns": (read_titles, b"a," * 10_000, "has the columns"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_what_they_should_be(fault, tmp_path, name):
    read, content, message = FILES[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    with fault(name), pytest.raises(DataError, match=message) as error:
        read(path, None) if read is read_titles else read(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 1_200


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf12\n")
    assert read_ids(tmp_path / "ids.txt") == [12]
    images = [{"cocoid": 3, "split": "val"}, {"cocoid": 4, "split": "test"}]
    (tmp_path / "karpathy.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"images": images}).encode())
    assert read_karpathy(tmp_path / "karpathy.json") == ([3], [4])


class Endless(BaseHTTPRequestHandler):
    """/stream never ends; /pause asks for a pause of a day, of which urllib3 makes six hours."""

    def do_GET(self):
        if self.path == "/pause.jpg":
            self.send_response(503)
            self.send_header("Retry-After", "86400")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(100_000))
        except OSError:  # the client has had enough
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def endless():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stream.jpg", "more than 1,000,000 bytes are no photograph"),
        ("pause.jpg", "HTTP 503 .*a pause of 21,600 s, and 600 are granted"),
    ],
)
def test_a_server_neither_fills_the_disk_nor_holds_up_the_run(fault, endless, tmp_path, monkeypatch, name, reason):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1_000_000)
    row = {"image_id": 1, "file_name": name, "coco_url": f"{endless}/{name}"}
    with fault(f"a server: {name}"):
        report = fetch_images([row], tmp_path, backoff=0.01)
        assert re.search(reason, report.failed[0]["reason"])
        assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.jpg"))


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/a.jpg", "a\0.jpg", "a\x1b[2J.jpg", "..\\a.jpg", "C:a.jpg", "a" * 300 + ".jpg"]
)
def test_names_of_photographs_are_plain(fault, tmp_path, name):
    row = {"image_id": 1, "file_name": name, "coco_url": "http://127.0.0.1:9/a.jpg"}
    with fault(f"file_name {name[:20]!r}"), pytest.raises(ValueError, match="is not the plain name of an image file"):
        fetch_images([row], tmp_path / "images")


def test_the_memory_of_a_fetch_may_be_damaged(fault, tmp_path):
    (tmp_path / ".verified.tsv").write_bytes(b"\xff\xfe\0\n12\ta.jpg\n")
    row = {"image_id": 1, "file_name": "a.jpg", "coco_url": ""}
    with fault("a damaged .verified.tsv"):
        assert fetch_images([row], tmp_path).failed[0]["reason"] == "no http address: ''"
