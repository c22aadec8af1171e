"""The hub's HTTP side: one thread per connection, keep-alive, authentication, faults; the routes are in routes.py."""

import contextlib
import json
import re
import secrets
import socket
import struct
import threading
import time
import traceback
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .faults import Fault
from .routes import ROUTES
from .store import LFS_SUFFIXES, Blobs, HubError, Repo

# token -> user; a user of role "read" may not write
USERS = {
    "hf_user_write": {"name": "user", "role": "write"},
    "hf_user_read": {"name": "user", "role": "read"},
    "hf_other_write": {"name": "other", "role": "write"},
}


class Hub:
    """The running hub. `repos[kind, id]`, `faults` and `log` are there for tests to read and set.

    `log` has one dict per request: method, path, auth (a token was sent), fault, status (-1: connection broken), ms.
    """

    def __init__(self, root, lfs_bytes=10 * 2**20, lfs_suffixes=LFS_SUFFIXES, xet=False, part_bytes=None):
        self.blobs = Blobs(Path(root), xet)
        self.users = USERS
        self.lfs_bytes = lfs_bytes  # files of this size and more go through LFS, whatever their name
        self.lfs_suffixes = tuple(lfs_suffixes)
        self.part_bytes = part_bytes  # LFS files above this size are uploaded in parts
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[dict] = []
        self.uploads: dict[str, dict] = {}  # LFS uploads under way, by the key in their URL
        self.is_down = False

    def fail(self, **spec) -> Fault:
        """Arms a fault; returns it, so that a test can look at its `hits`."""
        fault = Fault(**spec)
        self.faults.append(fault)
        return fault

    def file(self, kind: str, repo_id: str, path: str, rev: str = "main") -> bytes:
        """Content of a file as the hub holds it (`kind`: "models", "datasets", "spaces")."""
        return self.blobs.read(self.repos[kind, repo_id].at(rev).files[path])

    def settle(self) -> None:
        """Returns when no request is under way."""
        while any("status" not in entry for entry in list(self.log)):
            time.sleep(0.01)

    def reset(self) -> None:
        with self.lock:
            self.repos.clear()
            self.faults.clear()
            self.log.clear()
            self.uploads.clear()

    def start(self, port: int = 0) -> "Hub":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def go_down(self) -> None:
        """New connections are refused, open ones break at their next request."""
        self.is_down = True
        self.stop()

    def come_back(self) -> None:
        self.start(self.server.server_address[1])
        self.is_down = False

    @contextlib.contextmanager
    def serve(self, port: int = 0):
        self.start(port)
        try:
            yield self
        finally:
            self.stop()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive, as the clients expect
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def do(self):
        started = time.time()
        self.sent, self.cut_at, self.cut_hard = 0, None, False
        if self.hub.is_down:
            return self.break_connection()
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        entry = {"method": self.command, "path": self.path, "auth": "authorization" in self.headers, "fault": None}
        with self.hub.lock:
            self.hub.log.append(entry)
            is_control = url.path.startswith("/__")
            faults = [] if is_control else self.hub.faults
            fault = next((f for f in faults if f.take(self.command, self.path)), None)
        try:
            self.answer(url.path, fault, entry)
        except HubError as error:
            self.send(error.status, error.body, error.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:  # a bug of this server: say so, where the test's output shows it
            entry["bug"] = repr(error)
            traceback.print_exc()
            self.send(500, {"error": f"server bug: {error!r}"})
        finally:
            entry["status"], entry["ms"] = self.sent, round(1000 * (time.time() - started), 1)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def answer(self, path: str, fault: Fault | None, entry: dict):
        action = entry["fault"] = fault and fault.action
        if fault and fault.before:
            fault.before()
        if action == "drop":
            return self.break_connection(fault.after)
        if action == "delay":
            time.sleep(fault.seconds)
        if action in ("truncate", "cut"):
            self.cut_at, self.cut_hard = fault.after, action == "cut"
        self.body = self.read_body()
        if action == "partial":
            self.body = b"\n".join(self.body.splitlines()[:-1])
        if action == "status":
            raise HubError(fault.status, headers=fault.headers, body=fault.body or {"error": "injected"})
        result = self.dispatch(path)
        if action == "lost":
            return self.break_connection()
        if result is not None:
            self.send(200, result)

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json(self):
        return json.loads(self.body or b"{}")

    def send(self, status: int, body=b"", headers=None):
        """Sends bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {
            "Content-Type": "application/octet-stream" if data is body else "application/json",
            "Content-Length": str(len(data)),
            "X-Request-Id": secrets.token_hex(6),
            **(headers or {}),
        }
        self.sent = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_at is None:
            self.wfile.write(data)
            return
        self.wfile.write(data[: self.cut_at])
        self.close_connection = True
        if self.cut_hard:
            time.sleep(0.2)  # let the client read: an RST discards what it has not read yet
            self.break_connection()

    def send_range(self, data: bytes, headers: dict):
        """Sends the bytes, or the part of them that a Range header asks for."""
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, data, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        if start >= len(data):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def break_connection(self, after: int = 0):
        """RST, after reading at most `after` bytes of the body."""
        if after:
            self.rfile.read(after)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection, self.sent = True, -1
        self.connection.close()

    def user(self) -> dict | None:
        """Who sent the request; None without a token; HubError 401 for an unknown one."""
        authorization = self.headers.get("Authorization")
        if not authorization:
            return None
        user = self.hub.users.get(authorization.removeprefix("Bearer ").strip())
        if not user:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return user

    def need_write(self, namespace: str) -> None:
        user = self.user()
        if not user:
            raise HubError(401, None, "Invalid username or password.")
        if user["role"] != "write" or namespace != user["name"]:
            raise HubError(403, None, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def repo(self, kind: str, repo_id: str) -> Repo:
        """A repository the user may see: a private one does not exist for others."""
        user, repo = self.user(), self.hub.repos.get((kind, repo_id))
        if not repo or (repo.private and (user or {}).get("name") != repo_id.split("/")[0]):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def dispatch(self, path: str):
        for methods, pattern, function, write in ROUTES:
            match = pattern.fullmatch(path)
            if not match or self.command not in methods:
                continue
            args = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items() if v is not None}
            if "repo" in args:
                args["repo"] = self.repo(args.pop("kind", "models"), args["repo"])
                if write:
                    self.need_write(args["repo"].id.split("/")[0])
            return function(self, **args)
        raise HubError(404, None, f"no such route here: {self.command} {path}")
