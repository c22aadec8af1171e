"""scripts/serve_check.py against a small server of our own: what is compared, and what is said when a server fails."""

import json
import sys
from pathlib import Path

import pytest

from vlmcap.experiments import serving
from vlmcap.experiments.serving import SERVERS, ServeError, Server, build_environment, serve_check

# Answers every picture with one caption, as OpenAI's chat interface does; checks what it is asked for.
PROGRAM = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, document):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())
    def do_GET(self):
        self.answer(200, {})
    def do_POST(self):
        time.sleep(0.2)  # so that a kill comes between two captions
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = asked["messages"][0]["content"]
        fits = picture["image_url"]["url"].startswith("data:image/png;base64,") and asked["temperature"] == 0
        caption = sys.argv[2] if fits and text["type"] == "text" else "?"
        self.answer(*((200, {"choices": [{"message": {"content": caption}}]}) if caption else (500, {})))

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """server(caption): a Server that gives it, in the environment of the tests."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(serving, "build_environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(serving, "versions", lambda _: {})

    def server(caption: str, *words: str):
        command = (Path(sys.executable).name, *(words or (str(tmp_path / "program.py"), "{port}", caption)))
        monkeypatch.setitem(SERVERS, "small", Server(install=(), command=command, num_beams=1))

    return server


def test_captions_are_counted_and_those_that_differ_are_written_down(server, miniature_dir, tmp_path, capsys):
    """Of four scenes; scripts/caption.py is killed half way, and captions the others afterwards."""
    scenes = [scene.draw() for scene in serving.scenes(4, seed=7, held_out=True)]
    said = serving.own_captions(miniature_dir, scenes, 1)
    assert said[0]
    server(said[0])
    assert not serve_check(miniature_dir, ["small"], 4, tmp_path, tmp_path / "out/serve.json")
    found = json.loads((tmp_path / "out/serve.json").read_text(encoding="utf-8"))["small"]
    equal, different = said.count(said[0]), [{"transformers": s, "small": said[0]} for s in said if s != said[0]]
    assert different and (found["images"], found["equal"], found["different"]) == (4, equal, different)
    script = found["caption_script"]
    assert 2 <= script["killed_after"] <= 4 and (script["equal"], script["different"]) == (equal, different)
    printed = capsys.readouterr().out
    assert f"small (greedy): {equal} of 4 captions" in printed and f"; {equal} of 4 by scripts/caption.py" in printed


def test_equal_captions_and_a_script_that_fails(server, miniature_dir, tmp_path):
    scene = next(serving.scenes(1, seed=7, held_out=True)).draw()
    (said,) = serving.own_captions(miniature_dir, [scene], 1)
    server(said)
    assert serve_check(miniature_dir, ["small"], 1, tmp_path, tmp_path / "serve.json")
    with pytest.raises(ServeError, match=r"(?s)caption.py --server ftp://x failed:.*an address such as"):
        serving.script_captions("ftp://x", "small", [scene])


def test_a_server_that_refuses_or_ends_is_reported_with_its_last_lines(server, miniature_dir, tmp_path):
    server("")
    with pytest.raises(ServeError, match="the server gave no caption: HTTPError: 500"):
        serve_check(miniature_dir, ["small"], 1, tmp_path, tmp_path / "serve.json")
    server("", "-c", "import sys; sys.exit('no such model')")
    with pytest.raises(ServeError, match=r"(?s)ended with status 1; .*small.log ends with\n  no such model"):
        serve_check(miniature_dir, ["small"], 1, tmp_path, tmp_path / "serve.json")
    assert not (tmp_path / "serve.json").exists()


def test_a_package_that_cannot_be_installed(tmp_path):
    install = ("{python}", "-c", "import sys; sys.exit('no torch for the CPU')")
    broken = Server(install, command=(), num_beams=1, help="Set PIP_EXTRA_INDEX_URL.")
    with pytest.raises(ServeError, match="(?s)cannot be built.*no torch.*Set PIP_EXTRA_INDEX_URL"):
        build_environment("small", broken, tmp_path / "small")
    assert not (tmp_path / "small/complete.json").exists()
    assert "PIP_EXTRA_INDEX_URL" in SERVERS["vllm"].help
