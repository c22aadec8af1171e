"""Every HTML page in a real browser, with hostile text everywhere: no script of a stranger runs, no request leaves.

And again with the escaping switched off: the page's policy alone holds.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vlmcap.human.page import write_export
from vlmcap.human.study import draw
from vlmcap.reporting import html
from vlmcap.reporting.compare import write_comparison
from vlmcap.reporting.gallery import write_sample_page
from vlmcap.reporting.runs import read_runs

# BEACON stands for the address of a server that counts who calls.
HOSTILE = (
    "</script></title></style></textarea>--><script>window.attacked=1</script>"
    "<img src=x onerror=window.attacked=2><img src=BEACON><svg onload=window.attacked=3>"
    "<iframe src=BEACON></iframe><link rel=stylesheet href=BEACON><style>@import 'BEACON';"
    "body{background:url(BEACON)}</style><meta http-equiv=refresh content='0;url=BEACON'>"
    "<object data=BEACON></object><video src=BEACON></video><base href=BEACON>"
    "<form action=BEACON><input type=submit></form>\"' onfocus=window.attacked=4 autofocus x='"
    "{{ 7*7 }}{% raw %} javascript:window.attacked=5 \u202etxet\u202c\u2028\u2029\x00\x1b[2J"
)
# A policy cannot keep a page from being left for another, which is what a refresh does.
INSIDE = HOSTILE.replace("<meta http-equiv=refresh", "<i x")

# What a script of a stranger would do, tried from inside the page.
PROBES = """async () => {
    await fetch("BEACON").catch(() => {});
    const script = document.createElement("script");
    script.textContent = "window.attacked = 6";
    document.body.append(script);
    const image = new Image();
    const tried = new Promise((done) => { image.onload = image.onerror = done; });
    image.src = "BEACON";
    document.body.append(image);
    await tried;
    return window.attacked ?? null;
}"""


@pytest.fixture
def beacon():
    """A server on this machine: `url`, and `calls`, the paths it was asked for."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/beacon", calls=calls)
    server.shutdown()
    server.server_close()


def sample_page(folder: Path, scored_runs: dict, hostile: str) -> Path:
    said = {"references": [hostile] * 2, "base": hostile, "adapter": hostile}
    items = [{"image": Image.new("RGB", (84, 84)), "image_id": hostile, "captions": {hostile: said}}]
    return write_sample_page(folder / "samples.html", hostile, items, {hostile: [[hostile] * 3] * 3}, hostile)


def comparison_page(folder: Path, scored_runs: dict, hostile: str) -> Path:
    name = "<script>window.attacked=1</script><img src=x onerror=window.attacked=2>"
    metrics = json.loads((scored_runs["wild"] / "metrics.json").read_text())
    metrics["model"] |= {"id": hostile, "revision": hostile, "adapter": hostile}
    metrics["dataset"] |= {"id": hostile, "revision": hostile, "split": hostile}
    metrics["saw"] = dict.fromkeys(("STAIR", "YJ", "COCO"), hostile)
    metrics["notices"] = [hostile]
    (folder / "run").mkdir(parents=True)
    (folder / "run/metrics.json").write_text(json.dumps(metrics))
    (folder / "run/audit.json").write_text(json.dumps({"flagged": {"7": [hostile]}}))
    (folder / "run/predictions.jsonl").write_bytes((scored_runs["wild"] / "predictions.jsonl").read_bytes())
    lines = [{"image_id": image, "captions": [hostile]} for image in range(1, 41)]
    (folder / "references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs([f"{name}={folder / 'run'}", f"other={folder / 'run'}"])
    return write_comparison(runs, folder / "out", references=folder / "references.jsonl", resamples=20)["html"]


def rater_page(folder: Path, scored_runs: dict, hostile: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (84, 84)).save(folder / "a.png")
    row = {"image": {"bytes": None, "path": str(folder / "a.png")}, "file_name": "a.png", "image_id": 1}
    key = draw({hostile: {"1": hostile}, "other": {"1": f"{hostile}2"}}, ["1"], 1, 1, seed=0)
    write_export(key, {"1": row}, folder / "human")
    return folder / "human/rater_1.html"


PAGES = {"samples": sample_page, "comparison": comparison_page, "human evaluation": rater_page}


@pytest.fixture
def visit(browser, beacon):
    """visit(path): opens a page and tries what an attacker would; gives what a script of his left, or None."""
    contexts = []

    def open_page(path: Path) -> int | None:
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(300_000)
        page.on("dialog", lambda dialog: dialog.dismiss())
        page.goto(path.as_uri())
        done = page.evaluate(PROBES.replace("BEACON", beacon.url))
        assert page.url == path.as_uri()
        return done

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("write", PAGES.values(), ids=PAGES)
def test_hostile_text_is_text(visit, beacon, scored_runs, tmp_path, write):
    path = write(tmp_path / "page", scored_runs, HOSTILE.replace("BEACON", beacon.url))
    assert visit(path) is None and beacon.calls == []
    text = path.read_text(encoding="utf-8")
    assert "<script>window" not in text and "<img src=x" not in text and "<meta http-equiv=refresh" not in text
    assert text.count("<script>") == text.count("sha256-") == ("samples" not in path.name)


@pytest.fixture
def unescaped(monkeypatch):
    """Pages into which text is put as it is."""
    environment = html.jinja2.Environment
    monkeypatch.setattr(html.jinja2, "Environment", lambda **more: environment(**more | {"autoescape": False}))


@pytest.mark.parametrize("write", [sample_page, comparison_page])
def test_the_policy_holds_without_the_escapes(visit, beacon, scored_runs, tmp_path, write, unescaped):
    """Markup that slipped through runs nothing and loads nothing."""
    path = write(tmp_path / "page", scored_runs, INSIDE.replace("BEACON", beacon.url))
    assert f"<img src={beacon.url}>" in path.read_text(encoding="utf-8")
    assert visit(path) is None and beacon.calls == []


def test_without_policy_and_escapes_the_attack_works(visit, beacon, tmp_path, unescaped, monkeypatch):
    """So that the tests above can fail."""
    monkeypatch.setattr(html, "_policy", lambda *scripts: "")
    path = sample_page(tmp_path / "page", {}, INSIDE.replace("BEACON", beacon.url))
    assert visit(path) and "/beacon" in beacon.calls


def test_every_page_has_a_policy():
    for page in html.PAGES.glob("*.html.j2"):
        head = page.read_text(encoding="utf-8").split("</head>")[0]
        assert re.search(r'<meta charset="utf-8">\n\{\{ policy\(.*\) \}\}\n', head), page.name
    for script in html.PAGES.glob("*.js"):
        assert "</script" not in script.read_text(encoding="utf-8").lower() and "innerHTML" not in script.read_text()
