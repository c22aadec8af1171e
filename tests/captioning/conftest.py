"""What these tests share: environments of isolated models, and a chat server."""

import base64
import io
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlmcap.errors import UserError
from vlmcap.places import find_uv


@pytest.fixture(scope="session")
def environments(tmp_path_factory):
    """Where this session's environments are built; skips when there is no uv, or it finds no package."""
    try:
        uv = find_uv()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("environments")
    probe = ["pip", "install", "--quiet", "--target", str(folder / "probe"), "--no-deps", "pillow==11.3.0"]
    done = subprocess.run([uv, *probe], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"uv cannot install pillow here: {done.stderr.strip()[-300:]}")
    return folder


class ChatHandler(BaseHTTPRequestHandler):
    """Says the colour of the picture it was sent; `server.script` has what happens to the next requests instead."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Authorization"), body))
            fault = self.server.script.pop(0) if self.server.script else self.server.always
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        try:
            self.answer_to(body, fault)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer_to(self, body: dict, fault):
        if self.server.together:
            self.server.together.wait(30)
        image = Image.open(io.BytesIO(base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"][22:])))
        text = "色 {}\n".format(",".join(map(str, image.getpixel((0, 0)))))
        if fault is None:
            self.answer(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})
        elif fault == "break":  # the connection, in the middle of the answer
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            self.close_connection = True
        elif isinstance(fault, int):
            self.answer(fault, {"error": {"message": f"injected {fault}"}}, {"Retry-After": "0"})
        else:
            self.answer(200, fault)

    def answer(self, status: int, document, headers: dict | None = None):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def chat():
    """A running server; its address is `chat.address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
    server.lock, server.requests, server.script, server.always = threading.Lock(), [], [], None
    server.busy, server.most, server.together, server.models = 0, 0, None, ["qwen"]
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *request: None  # a client that gave up
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
