"""Fetching photographs from a real HTTP server that misbehaves."""

import contextlib
import email.utils
import hashlib
import io
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
from PIL import Image

import vlmcap.data.fetch
from tests.faults import ranks
from tests.local_hub import Fault
from vlmcap.data.fetch import FetchStopped, fetch_dataset_images, fetch_images


class PhotoServer:
    """Serves `photos` {path: bytes} as images.cocodataset.org does, with the faults of the local hub and two more:
    "stall" sends `after` bytes of the body, then nothing until `released`; "html" sends a page, no photograph."""

    def __init__(self):
        self.photos: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[dict] = []  # path, range, agent, connection, at
        self.ranges = True  # honours Range
        self.headers: dict[str, str] = {}
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (PhotoHandler,), {"photos": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def fail(self, **spec) -> None:
        self.faults.append(Fault(**spec))

    def asked(self, path: str) -> list[dict]:
        return [entry for entry in self.log if entry["path"] == path]


class PhotoHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "AmazonS3", ""
    photos: PhotoServer

    def version_string(self):
        return self.server_version

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that goes away is part of the tests
            super().handle()

    def do_GET(self):
        server, wanted = self.photos, self.headers.get("Range")
        with server.lock:
            connection = self.client_address[1]
            agent = self.headers["User-Agent"]
            server.log.append(
                {"path": self.path, "range": wanted, "agent": agent, "connection": connection, "at": time.monotonic()}
            )
            fault = next((fault for fault in server.faults if fault.take("GET", self.path)), Fault(action="none"))
        content = server.photos.get(self.path)
        if fault.action == "status":
            return self.send(fault.status, b"injected", fault.headers)
        if content is None:
            return self.send(404, b"no such key", {})
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', **server.headers}
        if fault.action == "html":
            content, headers = b"<!DOCTYPE html><title>Sign in</title>", {}
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start >= len(content):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, content[start:], headers, fault)

    def send(self, status, body, headers, fault=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault is None or fault.action not in ("truncate", "stall"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.after])
        self.close_connection = True
        if fault.action == "stall":
            self.photos.released.wait()


def photograph(seed: int) -> bytes:
    """A JPEG of noise, about 60 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def server():
    server = PhotoServer()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def rows(server):
    """Six photographs on the server, and the rows of a dataset that names them."""
    rows = []
    for n in range(1, 7):
        name = f"COCO_train2014_{n:012d}.jpg"
        server.photos[f"/train2014/{name}"] = photograph(n)
        rows.append({"image_id": n, "file_name": name, "coco_url": f"{server.url}/train2014/{name}"})
    return rows


def path(row):
    return f"/train2014/{row['file_name']}"


def assert_complete(folder, rows, server):
    for row in rows:
        assert (folder / row["file_name"]).read_bytes() == server.photos[path(row)], row["file_name"]
    assert not list(folder.glob("*.part"))
    assert not (folder / "failed.jsonl").exists()


def failures(folder):
    return [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]


def test_fetches_everything_and_says_what_it_did(server, rows, tmp_path):
    report = fetch_images(rows, tmp_path / "images")

    assert_complete(tmp_path / "images", rows, server)
    assert (report.fetched, report.present, report.failed) == (6, 0, [])
    assert report.bytes == sum(len(photo) for photo in server.photos.values())


def test_is_polite(server, rows, tmp_path):
    """Named in the User-Agent, few connections, each used for many photographs."""
    del server.photos[path(rows[0])]
    server.fail(path=rows[1]["file_name"], status=503)
    fetch_images(rows, tmp_path, concurrency=2, backoff=0.01)
    assert len(server.log) == 7
    assert len({entry["connection"] for entry in server.log}) <= 2
    assert {entry["agent"].split("/")[0] for entry in server.log} == {"vlmcap"}


def test_a_second_run_asks_for_nothing(server, rows, tmp_path):
    fetch_images(rows, tmp_path)
    server.log.clear()
    report = fetch_images(rows, tmp_path)
    assert (report.fetched, report.present, server.log) == (0, 6, [])


def test_what_was_verified_is_decoded_again_only_when_asked(server, rows, tmp_path):
    fetch_images(rows, tmp_path)
    file = tmp_path / rows[0]["file_name"]
    file.write_bytes(bytes(file.stat().st_size))
    assert fetch_images(rows, tmp_path).present == 6
    (tmp_path / ".verified.tsv").unlink()
    assert fetch_images(rows, tmp_path).fetched == 1
    assert_complete(tmp_path, rows, server)


def test_files_of_unknown_origin_are_decoded_before_they_are_believed(server, rows, tmp_path):
    """A folder unpacked elsewhere: whole files are taken as they are, a cut one is fetched again."""
    whole, cut = server.photos[path(rows[0])], server.photos[path(rows[1])][:20_000]
    (tmp_path / rows[0]["file_name"]).write_bytes(whole)
    (tmp_path / rows[1]["file_name"]).write_bytes(cut)

    report = fetch_images(rows[:2], tmp_path)

    assert [entry["path"] for entry in server.log] == [path(rows[1])]
    assert (report.fetched, report.present) == (1, 1)
    assert_complete(tmp_path, rows[:2], server)


def test_a_file_damaged_after_it_was_verified_is_fetched_again(server, rows, tmp_path):
    fetch_images(rows, tmp_path)
    (tmp_path / rows[2]["file_name"]).write_bytes(server.photos[path(rows[2])][:30_000])
    server.log.clear()
    assert fetch_images(rows, tmp_path).fetched == 1
    assert_complete(tmp_path, rows, server)


def test_what_is_not_there_is_listed_and_the_rest_fetched(server, rows, tmp_path):
    del server.photos[path(rows[3])]
    report = fetch_images(rows, tmp_path)
    assert report.fetched == 5
    assert failures(tmp_path) == report.failed
    assert report.failed == [{"image_id": 4, "url": rows[3]["coco_url"], "reason": "HTTP 404 Not Found"}]
    assert len(server.asked(path(rows[3]))) == 1, "a 404 is not worth a second request"


def test_the_list_of_failures_is_that_of_the_last_run(server, rows, tmp_path):
    photo = server.photos.pop(path(rows[0]))
    fetch_images(rows, tmp_path)
    server.photos[path(rows[0])] = photo
    fetch_images(rows, tmp_path)
    assert_complete(tmp_path, rows, server)


def test_a_server_error_is_tried_again(server, rows, tmp_path):
    server.fail(path=rows[0]["file_name"], status=500, times=2)
    fetch_images(rows, tmp_path, backoff=0.01)
    assert len(server.asked(path(rows[0]))) == 3
    assert_complete(tmp_path, rows, server)


def test_pauses_between_tries_grow(server, rows, tmp_path):
    server.fail(status=503, times=4)
    fetch_images(rows[:1], tmp_path, backoff=0.1)
    at = [entry["at"] for entry in server.log]
    pauses = [later - earlier for earlier, later in zip(at, at[1:], strict=False)]
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2, 0.4), strict=True)), pauses


def test_an_unreadable_retry_after_does_not_matter(server, rows, tmp_path):
    server.fail(status=503, headers={"Retry-After": "soon"})
    fetch_images(rows, tmp_path, backoff=0.01)
    assert_complete(tmp_path, rows, server)


def test_a_lasting_server_error_is_listed(server, rows, tmp_path):
    server.fail(path=rows[0]["file_name"], status=500, times=100)
    report = fetch_images(rows, tmp_path, backoff=0.01)
    assert [entry["reason"] for entry in report.failed] == ["HTTP 500 Internal Server Error (tried 5 times)"]
    assert len(server.asked(path(rows[0]))) == 5


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_quiets_all_connections(server, rows, tmp_path, as_date):
    date = int(time.time()) + 3
    when = email.utils.formatdate(date, usegmt=True) if as_date else "1"
    server.fail(status=429, headers={"Retry-After": when}, times=2)
    epoch = time.time() - time.monotonic()

    fetch_images(rows, tmp_path, concurrency=2, backoff=0.01)

    refused, others = server.log[:2], server.log[2:]
    until = date - epoch if as_date else refused[0]["at"] + 1
    assert min(entry["at"] for entry in others) >= until - 0.05
    assert_complete(tmp_path, rows, server)


def test_a_truncated_body_is_resumed(server, rows, tmp_path):
    server.fail(path=rows[0]["file_name"], action="truncate", after=10_000)
    fetch_images(rows, tmp_path, backoff=0.01)
    assert [entry["range"] for entry in server.asked(path(rows[0]))] == [None, "bytes=8192-"]
    assert_complete(tmp_path, rows, server)


def test_a_server_without_ranges_sends_it_all_again(server, rows, tmp_path):
    server.ranges = False
    server.fail(path=rows[0]["file_name"], action="truncate", after=10_000)
    fetch_images(rows, tmp_path, backoff=0.01)
    assert len(server.asked(path(rows[0]))) == 2
    assert_complete(tmp_path, rows, server)


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("size", [10_000, 200_000])
def test_the_beginning_of_another_file_is_not_kept(server, rows, tmp_path, md5, size):
    """What an earlier run began may be of an older version: as long as the new one, or longer."""
    server.headers = {} if md5 else {"ETag": '"61f-5e3"'}
    (tmp_path / (rows[0]["file_name"] + ".part")).write_bytes(b"\xff\xd8" + bytes(size))
    fetch_images(rows, tmp_path, backoff=0.01)
    assert_complete(tmp_path, rows, server)


def test_a_corrupt_photograph_is_listed_and_not_left(server, rows, tmp_path):
    """Cut on the server, so that length and md5 agree and only decoding tells."""
    server.photos[path(rows[1])] = server.photos[path(rows[1])][:30_000]
    report = fetch_images(rows, tmp_path, backoff=0.01)
    assert [entry["image_id"] for entry in report.failed] == [2]
    assert "truncated" in report.failed[0]["reason"]
    assert not list(tmp_path.glob(rows[1]["file_name"] + "*"))


def test_a_page_instead_of_a_photograph_is_listed(server, rows, tmp_path):
    server.fail(path=rows[1]["file_name"], action="html", times=100)
    report = fetch_images(rows, tmp_path, backoff=0.01)
    assert "<!DOCTYPE html>" in report.failed[0]["reason"]
    assert not (tmp_path / rows[1]["file_name"]).exists()


def test_the_md5_of_s3_is_checked(server, rows, tmp_path):
    server.headers = {"ETag": '"' + "0" * 32 + '"'}
    report = fetch_images(rows[:1], tmp_path, backoff=0.01)
    assert "md5" in report.failed[0]["reason"]
    server.headers["x-amz-server-side-encryption"] = "aws:kms"  # then the ETag is not an md5
    assert fetch_images(rows[:1], tmp_path).fetched == 1


def test_stops_when_nothing_works(server, rows, tmp_path):
    many = [{"image_id": n, "file_name": f"{n}.jpg", "coco_url": f"{server.url}/moved/{n}.jpg"} for n in range(500)]
    with pytest.raises(
        FetchStopped, match=r"18 of the last (18|19|20) photographs.*HTTP 404 Not Found.*/moved/.*--base_url"
    ):
        fetch_images([*rows, *many], tmp_path, concurrency=4)
    assert len(server.log) < 50
    assert len(failures(tmp_path)) == 18
    assert any((tmp_path / row["file_name"]).exists() for row in rows), "what was fetched before is kept"


def test_stops_when_the_host_is_down(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    many = [{"image_id": n, "file_name": f"{n}.jpg", "coco_url": f"{server.url}/{n}.jpg"} for n in range(500)]
    with pytest.raises(FetchStopped, match="Connection refused"):
        fetch_images(many, tmp_path, backoff=0.001)


def test_base_url_replaces_scheme_and_host(server, rows, tmp_path):
    for row in rows:
        row["coco_url"] = f"https://images.invalid{path(row)}"
    rows[0]["coco_url"] = ""
    server.photos = {f"/mirror{name}": photo for name, photo in server.photos.items()}
    report = fetch_images(rows, tmp_path, base_url=f"{server.url}/mirror/")
    assert (report.fetched, len(report.failed), len(server.log)) == (5, 1, 5)


def test_a_row_without_url_is_listed(server, rows, tmp_path):
    rows[0]["coco_url"] = ""
    report = fetch_images(rows, tmp_path)
    assert (report.fetched, report.failed[0]["image_id"]) == (5, 1)
    assert "no http address" in report.failed[0]["reason"]


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/tmp/a.jpg", "a/b.jpg", "a\\b.jpg", ".verified.tsv", "failed.jsonl", ""]
)
def test_file_names_stay_in_the_folder(server, tmp_path, name):
    row = {"image_id": 9, "file_name": name, "coco_url": f"{server.url}/9.jpg"}
    with pytest.raises(ValueError, match="image_id 9: file_name .* is not the plain name of an image file"):
        fetch_images([row], tmp_path / "images")
    assert server.log == []


def test_one_photograph_in_two_splits_is_fetched_once(server, rows, tmp_path):
    assert fetch_images([rows[0], dict(rows[0])], tmp_path).fetched == 1
    other = rows[0] | {"coco_url": f"{server.url}/val2014/other.jpg"}
    with pytest.raises(ValueError, match="two URLs"):
        fetch_images([rows[0], other], tmp_path)


def fetch(rows, folder) -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that: the tests may run in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    vlmcap.data.fetch.TIMEOUT = (3600, 3600)  # the stalled photograph is waited for until this process is killed
    fetch_images(rows, folder, concurrency=2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_continues_after_a_kill_or_ctrl_c(server, rows, tmp_path, number):
    stalled = rows[-1]
    server.fail(path=stalled["file_name"], action="stall", after=20_000)
    log = tmp_path.with_suffix(".log")
    process = ranks.start(fetch, rows, tmp_path, log=log)
    part = tmp_path / (stalled["file_name"] + ".part")
    done = [tmp_path / row["file_name"] for row in rows[:-1]]
    while not (part.exists() and part.stat().st_size == 16_384 and all(file.exists() for file in done)):
        assert process.is_alive(), ranks.tail(log)
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another run is fetching"):
        fetch_images(rows, tmp_path)
    os.kill(process.pid, number)
    server.released.set()
    process.join()
    assert process.exitcode != 0
    assert number == signal.SIGKILL or "KeyboardInterrupt" in ranks.tail(log)
    assert not (tmp_path / stalled["file_name"]).exists()

    server.log.clear()
    fetch_images(rows, tmp_path)

    assert [(entry["path"], entry["range"]) for entry in server.log] == [(path(stalled), "bytes=16384-")]
    assert_complete(tmp_path, rows, server)


@pytest.fixture
def dataset_dir(rows, tmp_path):
    """A published dataset, as load_dataset reads it: train has four photographs, test the other two."""
    folder = tmp_path / "dataset"
    for split, part in (("train", rows[:4]), ("test", rows[4:])):
        datasets.Dataset.from_list(part).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_fetches_the_splits_asked_for(server, rows, dataset_dir, tmp_path):
    fetch_dataset_images(str(dataset_dir), tmp_path / "images", splits=["test"])
    assert {file.name for file in (tmp_path / "images").glob("*.jpg")} == {row["file_name"] for row in rows[4:]}
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        fetch_dataset_images(str(dataset_dir), tmp_path / "images", splits=["val"])


def test_script_with_a_dataset_of_the_hub(hub, server, rows, dataset_dir, tmp_path, run_script):
    datasets.load_dataset(str(dataset_dir)).push_to_hub("user/captions", private=True)
    del server.photos[path(rows[0])]
    args = ("fetch_images.py", "--dataset", "user/captions", "--output_dir", tmp_path / "images")

    done = run_script(*args, expect=1)
    assert "fetched 5 photographs" in done.stdout and "1 failed" in done.stdout
    assert "failed.jsonl" in done.stderr

    assert "hf_user_write" not in done.stdout + done.stderr


def test_script_may_tolerate_failures(server, rows, dataset_dir, tmp_path, repo_root, monkeypatch, capsys):
    del server.photos[path(rows[0])]
    args = f"fetch_images.py --dataset {dataset_dir} --split train --output_dir {tmp_path / 'images'} --allow_failures"
    monkeypatch.setattr(sys, "argv", args.split())
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(repo_root / "scripts" / "fetch_images.py"), run_name="__main__")
    assert exit.value.code == 0
    assert "fetched 3 photographs" in capsys.readouterr().out
