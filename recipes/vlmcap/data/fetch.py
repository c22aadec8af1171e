"""Fetches the photographs of a caption dataset from their `coco_url` into a folder: concurrent, resumed, verified.

A photograph appears under its `file_name` only once it is whole and decodes; until then it is `file_name.part`, from
which a later run resumes. `.verified.tsv` in the folder remembers what was verified (size and name), so that a second
run over a complete folder takes seconds; other files found there are decoded before they are believed.
"""

import hashlib
import json
import os
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import filelock

# requests is here already (evaluate needs it), honours the proxy settings of a cluster and keeps connections alive.
import requests
from tqdm.auto import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from vlmcap.data.errors import DataError
from vlmcap.data.images import BadImageError, check_columns, is_plain_path, open_image, whole_reason
from vlmcap.data.lookup import a_file
from vlmcap.errors import UserError, notice

ATTEMPTS = 5
TIMEOUT = (10, 30)  # seconds: to connect, and between two pieces of a body
LONGEST_BACKOFF = 60  # seconds
LONGEST_PAUSE = 600  # seconds; the longest pause that a server may ask for
MAX_BYTES = 100_000_000  # of a photograph; a stream without an end must not fill the disk
CHUNK = 8 * 1024  # bytes; when a connection breaks, the chunk being read is lost
# The run stops when 90% of the last photographs could not be fetched: the server, the network or the URLs are wrong.
RECENT, HOPELESS = 20, 18
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
# Photographs in COCO's folders, each of which COCO offers as one zip file.
COCO_SIZES = {"train2014": 82_783, "val2014": 40_504, "train2017": 118_287, "val2017": 5_000}
COCO_URL = re.compile(r"https?://images\.cocodataset\.org/(train2014|val2014|train2017|val2017)/")
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
USER_AGENT = f"vlmcap/{metadata.version('vlmcap')} (image captioning recipes; requests/{requests.__version__})"


class FetchStopped(UserError):
    """The run was stopped because nearly every photograph fails. The message says why and how to continue."""


class _Failed(Exception):
    """This photograph cannot be fetched."""


class _Retry(Exception):
    """This transfer failed; another may succeed. `pause`: seconds that the server asked to wait."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class _Stopping(Exception):
    """The run ends; this worker gives up its transfer."""


@dataclass
class FetchReport:
    present: int = 0  # photographs that were there already
    fetched: int = 0
    bytes: int = 0  # size of the fetched photographs
    seconds: float = 0.0
    failed: list[dict] = field(default_factory=list)  # {"image_id", "url", "reason"}, as in failed.jsonl


def fetch_dataset_images(
    dataset: str,
    output_dir: str | Path,
    splits: list[str] | None = None,
    revision: str | None = None,
    concurrency: int = 8,
    base_url: str | None = None,
) -> FetchReport:
    """Fetches the photographs of some splits (default: all) of a dataset, a Hub id or a local folder.

    Raises what `fetch_images` raises, and DataError when the dataset cannot be loaded or lacks a split or a column.
    """
    if Path(dataset).is_file():
        raise a_file(dataset)
    try:
        loaded = datasets.load_dataset(dataset, revision=revision)
    except Exception as error:  # any error of the libraries under datasets, as in `load_captions`
        raise DataError(f"{dataset} cannot be loaded: {whole_reason(error)}") from error
    rows = []
    for split in splits or loaded:
        if split not in loaded:
            raise DataError(f"{dataset} has no split {split!r}; it has {', '.join(loaded)}")
        columns = ["image_id", "file_name", "coco_url"]
        missing = [column for column in columns if column not in loaded[split].column_names]
        if missing:
            raise DataError(
                f"{dataset} ({split}) has no column {', '.join(missing)}: nothing says where its images are"
            )
        check_columns(loaded[split], f"{dataset} ({split})", columns)
        rows += loaded[split].select_columns(columns).to_list()
    recommend_zips(rows, Path(output_dir))
    return fetch_images(rows, output_dir, concurrency, base_url)


def recommend_zips(rows: list[dict], folder: Path) -> None:
    """Prints the address of COCO's zip file where most photographs of one of its folders are wanted, and not there."""
    wanted = Counter(
        found[1]
        for row in rows
        if (found := COCO_URL.match(row["coco_url"] or "")) and not (folder / row["file_name"]).exists()
    )
    for part, count in wanted.items():
        if count > COCO_SIZES[part] / 2:
            notice(
                f"{count:,} of the {COCO_SIZES[part]:,} photographs of {part} are wanted. One download of all is"
                f" faster: http://images.cocodataset.org/zips/{part}.zip (no need to unpack it). Put it into a"
                " folder and give that as --image_dir."
            )


def fetch_images(
    rows: Iterable[dict],
    output_dir: str | Path,
    concurrency: int = 8,
    base_url: str | None = None,
    backoff: float = 1.0,
) -> FetchReport:
    """Fetches photographs into output_dir/file_name.

    A photograph is accepted when it has the announced length and, from S3, the announced md5, and decodes as
    `open_image` does. A failed transfer is tried 5 times in all, resumed by Range, after the pause that the server
    asks for (Retry-After) or exponentially growing ones. What failed in all tries is in `report.failed` and, a line
    per photograph, in output_dir/failed.jsonl.

    Args:
        rows: {"image_id", "file_name", "coco_url"}; several rows may name the same photograph.
        output_dir: is created. One run at a time may work in it.
        concurrency: connections at a time.
        base_url: replaces scheme and host of every coco_url, e.g. "http://mirror.example.org/coco".
        backoff: seconds before the first retry; doubled before each further one, give or take a half.

    Raises:
        FetchStopped: 18 of the last 20 photographs failed.
        DataError: a file_name is not a plain image name or has two URLs.
        UserError: another run is at work in output_dir.
        OSError: output_dir cannot be written.
    """
    rows = _one_per_file(rows)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".fetch.lock", timeout=0):
            return _fetch_all(rows, folder, concurrency, _Fetcher(folder, base_url, backoff))
    except filelock.Timeout:
        raise UserError(f"another run is fetching into {folder}: wait for it, or name another folder") from None


def _one_per_file(rows: Iterable[dict]) -> list[dict]:
    unique: dict[str, dict] = {}
    for row in rows:
        name, url = row["file_name"] or "", row["coco_url"] or ""
        # A dataset comes from anybody: a name must not lead out of the folder, nor onto this module's own files.
        if not is_plain_path(name) or re.search(r"/|^\.", name) or Path(name).suffix.lower() not in SUFFIXES:
            raise DataError(
                f"image_id {row['image_id']}: file_name {name!r:.200} is not the plain name of an image file"
            )
        known = unique.setdefault(name, {"image_id": row["image_id"], "file_name": name, "coco_url": url})
        if known["coco_url"] != url:
            raise DataError(f"file_name {name!r} has two URLs: {known['coco_url']!r} and {url!r}")
    return list(unique.values())


def _fetch_all(rows: list[dict], folder: Path, concurrency: int, fetcher: "_Fetcher") -> FetchReport:
    started = time.monotonic()
    verified = _read_verified(folder)
    todo = [row for row in rows if row["file_name"] not in verified]
    report = FetchReport(present=len(rows) - len(todo))
    recent: deque[bool] = deque(maxlen=RECENT)  # True: failed
    with (
        (folder / ".verified.tsv").open("a", encoding="utf-8", buffering=1) as memory,
        tqdm(total=len(rows), initial=report.present, desc="fetching", unit=" images") as bar,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            for row, future in _as_they_finish(pool, fetcher.fetch, todo, 2 * concurrency):
                try:
                    received = future.result()
                except _Failed as error:
                    url = fetcher.url(row)
                    report.failed.append({"image_id": row["image_id"], "url": url, "reason": str(error)})
                    recent.append(True)
                    if sum(recent) == HOPELESS:
                        raise FetchStopped(_why_stopped(report, folder, len(recent))) from None
                else:
                    recent.append(False)
                    report.present += received == 0
                    report.fetched += received > 0
                    report.bytes += received
                    size = (folder / row["file_name"]).stat().st_size
                    memory.write(f"{size}\t{row['file_name']}\n")
                rate = report.bytes / 1e6 / (time.monotonic() - started)
                trouble = f"{fetcher.retries} retries, {len(report.failed)} failed"
                bar.set_postfix_str(f"{report.bytes / 1e6:.1f} MB, {rate:.1f} MB/s, {trouble}", refresh=False)
                bar.update()
        finally:  # of a run that ends before its time (Ctrl-C, a full disk) too
            fetcher.stop.set()
            pool.shutdown(cancel_futures=True)
            _write_failed(folder / "failed.jsonl", report.failed)
    report.seconds = time.monotonic() - started
    return report


def _read_verified(folder: Path) -> set[str]:
    """Names of the files that an earlier run verified and that still have the size they had then."""
    memory = folder / ".verified.tsv"
    lines = memory.read_text(encoding="utf-8", errors="replace").splitlines() if memory.exists() else []
    sizes = {entry.name: str(entry.stat().st_size) for entry in os.scandir(folder)}
    remembered = {name: size for size, _, name in (line.partition("\t") for line in lines)}
    return {name for name, size in remembered.items() if sizes.get(name) == size}


def _as_they_finish(
    pool: Executor, function: Callable[[dict], int], rows: list[dict], limit: int
) -> Iterator[tuple[dict, Future]]:
    """Each row with its finished future. At most `limit` rows are in the pool, so that a stop is a stop."""
    running: dict[Future, dict] = {}

    def finished():
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future

    for row in rows:
        if len(running) == limit:
            yield from finished()
        running[pool.submit(function, row)] = row
    while running:
        yield from finished()


def _write_failed(path: Path, failed: list[dict]) -> None:
    path.unlink(missing_ok=True)
    if failed:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in failed]
        path.write_text("".join(lines), encoding="utf-8")


def _why_stopped(report: FetchReport, folder: Path, recent: int) -> str:
    reason, _ = Counter(entry["reason"] for entry in report.failed[-HOPELESS:]).most_common(1)[0]
    return (
        f"stopped, as {HOPELESS} of the last {recent} photographs failed. Most often: {reason}; "
        f"last URL: {report.failed[-1]['url']}. Look whether this address opens in a browser, try a mirror "
        f"(--base_url), or come back later: the {report.present + report.fetched} photographs in {folder} are kept."
    )


class _Fetcher:
    """What the worker threads share. A worker calls `fetch`."""

    def __init__(self, folder: Path, base_url: str | None, backoff: float):
        self.folder = folder
        self.base_url = base_url
        self.backoff = backoff
        self.stop = threading.Event()
        self.retries = 0
        self.quiet_until = 0.0  # time.monotonic(): the server asked for no requests until then
        self.local = threading.local()

    def url(self, row: dict) -> str:
        if not self.base_url or not row["coco_url"]:
            return row["coco_url"]
        return self.base_url.rstrip("/") + urlsplit(row["coco_url"]).path

    def fetch(self, row: dict) -> int:
        """Bytes of the photograph, 0 if it was there; _Failed with the reason if it cannot be fetched."""
        target = self.folder / row["file_name"]
        if target.exists() and not _flaw(target):
            return 0
        url = self.url(row)
        if not url.startswith(("http://", "https://")):
            raise _Failed(f"no http address: {url!r}")
        for attempt in range(1, ATTEMPTS + 1):
            self._sleep(self.quiet_until - time.monotonic())
            try:
                return self._transfer(url, target)
            except _Retry as error:
                if attempt == ATTEMPTS:
                    raise _Failed(f"{error} (tried {ATTEMPTS} times)") from None
                self.retries += 1
                self._keep_quiet(error.pause, url)
                # The random part keeps the workers from coming back all at once.
                self._sleep(min(self.backoff * 2 ** (attempt - 1), LONGEST_BACKOFF) * random.uniform(0.5, 1.5))

    def _keep_quiet(self, pause: float, url: str) -> None:
        until = time.monotonic() + pause
        if pause and until > self.quiet_until + 1:  # else another worker was told the same
            self.quiet_until = until
            tqdm.write(f"{urlsplit(url).netloc} asks for a pause of {pause:.0f} s")

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise _Stopping

    def _transfer(self, url: str, target: Path) -> int:
        part = target.with_name(target.name + ".part")
        start = part.stat().st_size if part.exists() else 0
        try:
            with self._get(url, start) as response:
                resumed = response.status_code == 206
                if response.status_code == 416 or resumed and not _resumes_at(response, start):
                    part.unlink(missing_ok=True)
                    raise _Retry(f"HTTP {response.status_code}: the file on the server is no longer the same")
                if response.status_code not in (200, 206):
                    response.raw.drain_conn()  # else the connection could not be used again
                    raise _refusal(response)
                received = start if resumed else 0
                with part.open("ab" if resumed else "wb", buffering=0) as file:
                    for chunk in response.iter_content(CHUNK):
                        received += file.write(chunk)
                        if received > MAX_BYTES:
                            part.unlink()
                            raise _Failed(f"more than {MAX_BYTES:,} bytes are no photograph")
                        if self.stop.is_set():
                            raise _Stopping
        except requests.RequestException as error:
            raise _Retry(_root_cause(error)) from error
        return self._accept(part, target, response, resumed)

    def _get(self, url: str, start: int) -> requests.Response:
        if not hasattr(self.local, "session"):  # one per thread: requests does not promise to share one safely
            self.local.session = requests.Session()
            # Compressed on the way, Content-Length would not be the length of the file.
            self.local.session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        headers = {"Range": f"bytes={start}-"} if start else {}
        return self.local.session.get(url, headers=headers, stream=True, timeout=TIMEOUT)

    def _accept(self, part: Path, target: Path, response: requests.Response, resumed: bool) -> int:
        """Gives a verified photograph its name."""
        size, announced = part.stat().st_size, _announced_size(response)
        if announced is not None and size < announced:
            raise _Retry(f"got {size} of {announced} bytes")
        md5 = _announced_md5(response)
        if md5 and md5 != hashlib.md5(part.read_bytes()).hexdigest():
            part.unlink()
            raise _Retry(f"its md5 is not the {md5} that the server announces")
        flaw = _flaw(part)
        if flaw:
            part.unlink()
            # Whole and yet no image: another transfer would bring the same.
            raise _Failed(flaw) if announced is not None and not resumed else _Retry(flaw)
        part.replace(target)
        return size


def _refusal(response: requests.Response) -> Exception:
    reason = f"HTTP {response.status_code} {response.reason}"
    if response.status_code not in RETRIED_STATUS:
        return _Failed(reason)
    try:
        pause = Retry().get_retry_after(response.raw) or 0.0
    except InvalidHeader:
        pause = 0.0
    if pause > LONGEST_PAUSE:
        return _Failed(f"{reason}: the server asks for a pause of {pause:,.0f} s, and {LONGEST_PAUSE} are granted")
    return _Retry(reason, pause)


def _resumes_at(response: requests.Response, start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _announced_size(response: requests.Response) -> int | None:
    """Size of the whole file, in bytes."""
    if response.status_code == 206:
        total = response.headers["Content-Range"].rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


def _announced_md5(response: requests.Response) -> str | None:
    """S3, where COCO is stored, sends the md5 as ETag, unless a file was uploaded in parts or is encrypted with a KMS
    key (docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html). With other servers an ETag may be anything."""
    etag = response.headers.get("ETag", "").strip('"')
    encryption = response.headers.get("x-amz-server-side-encryption", "AES256")
    is_md5 = (
        response.headers.get("Server") == "AmazonS3" and encryption == "AES256" and re.fullmatch("[0-9a-f]{32}", etag)
    )
    return etag if is_md5 else None


def _flaw(path: Path) -> str | None:
    """Why training could not read this image; None when it could."""
    try:
        open_image({"image": {"bytes": None, "path": str(path)}, "file_name": path.name})
    except BadImageError as error:
        with path.open("rb") as file:
            return f"not a whole image, {error.reason} (it starts with {file.read(16)!r})"


def _root_cause(error: BaseException) -> str:
    while error.__context__:
        error = error.__context__
    return f"{type(error).__name__}: {error}"
