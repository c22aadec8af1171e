"""Scores of other programs: equal to theirs, and never a number when the program is missing."""

import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from pycocoevalcap.meteor.meteor import Meteor
from sacrebleu.metrics import CHRF

from tests.faults.ranks import free_port
from vlmcap.evaluation import external
from vlmcap.evaluation.caption_files import read_predictions, read_references
from vlmcap.evaluation.external import (
    METEOR_JAR_VARIABLE,
    ScorerUnavailable,
    chrf,
    chrf_statistics,
    local_spice_scores,
    meteor,
    meteor_jar,
    meteor_statistics,
    service_scores,
)
from vlmcap.evaluation.scoring import ScoreOptions, score
from vlmcap.places import find_uv

needs_java = pytest.mark.usefixtures("java")
PREDICTIONS = {"1": "赤い車が道路を走っています。", "2": "白い猫が寝ている", "3": ""}
REFERENCES = {"1": ["赤い車が走る", "道を走る車"], "2": ["猫が眠っている", "白猫"], "3": ["犬"]}
LEAN = {"resamples": 20, "register_normalised": False}
ITEMS = [{"candidate": "a", "references": ["b"]}, {"candidate": "c", "references": ["d"]}]
PATIENCE = 3600  # seconds for what a busy machine may take its time for


@pytest.fixture
def service():
    """service(answer): URL of a real HTTP server that answers so, and the list of the requests' bodies.

    `answer` is the body, a status code, or a function from the request's body to its answer.
    """
    servers = []

    def start(answer):
        received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                said = answer(received[-1]) if callable(answer) else answer
                self.wfile.write(b"" if isinstance(answer, int) else said.encode())

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/spice", received

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_chrf_is_sacrebleus_with_ragged_references():
    generator = np.random.default_rng(0)

    def draw():
        return "".join(generator.choice(list("犬猫が走 る。Ａb"), generator.integers(0, 14)))

    hypotheses = [draw() for _ in range(60)]
    references = [[draw() for _ in range(generator.integers(1, 5))] for _ in range(60)]
    statistics = chrf_statistics(hypotheses, references)
    documents = [[refs[i] if i < len(refs) else None for refs in references] for i in range(4)]
    nfkc = [[text and text.replace("Ａ", "A") for text in document] for document in documents]
    texts = [text.replace("Ａ", "A") for text in hypotheses]
    assert chrf(statistics.sum(0)) == pytest.approx(CHRF().corpus_score(texts, nfkc).score / 100, rel=1e-12)
    alone = [
        CHRF().sentence_score(text, [doc[i] for doc in nfkc if doc[i] is not None]).score / 100
        for i, text in enumerate(texts)
    ]
    np.testing.assert_allclose(chrf(statistics), alone, rtol=1e-12)


@pytest.fixture(scope="module")
def odd_meteor(java):
    """METEOR's statistics of captions that could break the protocol, from one run of Java."""
    hypotheses = ["", "赤 い 車", "青 い 車", "a ||| dog", "a dog", "|||", "the dogs are running"]
    references = [
        ["a dog"],
        ["赤 い 車"],
        ["赤 い 車"],
        ["a dog ||| runs", "||| a"],
        ["a dog runs", "a"],
        ["x"],
        ["a dog runs fast", "the dog is running"],
    ]
    return meteor_statistics(
        [text.split() for text in hypotheses], [[text.split() for text in refs] for refs in references], PATIENCE
    )


def test_captions_that_could_break_meteors_protocol(odd_meteor):
    scores = meteor(odd_meteor)
    assert scores.shape == (7,) and np.isfinite(scores).all()
    assert scores[0] == scores[5] == 0
    assert scores[1] == 1 and 0 < scores[2] < 1  # Japanese reaches Java as Japanese
    np.testing.assert_array_equal(odd_meteor[3], odd_meteor[4])
    assert scores[6] > 0.5


@needs_java
def test_meteor_is_pycocoevalcaps_on_fakecap(data_dir):
    folder = data_dir / "metric_vectors" / "fakecap"
    predictions = read_predictions(folder / "predictions.jsonl")
    references = read_references(folder / "references.jsonl")
    document = score(predictions, references, "none", ScoreOptions(resamples=100))
    theirs = Meteor()
    expected, images = theirs.compute_score(
        {i: refs for i, refs in references.items()}, {i: [predictions[i]] for i in references}
    )
    assert document["notices"] == []
    assert document["scores"]["meteor"] == pytest.approx(expected, rel=0, abs=1e-9)
    assert round(document["scores"]["meteor"], 3) == 0.195
    np.testing.assert_allclose(document["per_image"]["meteor"], images, rtol=0, atol=1e-9)
    low, high = document["intervals"]["meteor"]
    assert 0.185 < low < document["scores"]["meteor"] < high < 0.206


@needs_java
def test_meteor_of_english_titles_is_english():
    """Stems and synonyms count, and its signature says so; the words are those of `--tokenizer english`."""
    predictions = {"1": "Grandma's Roasted Chickens", "2": "Quick Soup"}
    references = {"1": ["Grandma's Roast Chicken"], "2": ["Fast Soup"]}
    document = score(predictions, references, "english", ScoreOptions(resamples=0))
    assert document["notices"] == [] and min(document["per_image"]["meteor"]) > 0.4
    assert document["scores"]["bleu_1"] == pytest.approx(3 / 6)  # of grandma 's roasted chickens, quick soup
    assert document["signatures"]["meteor"] == (
        "meteor|tok:english-13a-ptb-sacrebleu-2.6.0|norm:nfc|punct:drop|case:lc|meteor:1.5|lang:en|nref:1|v:0.1"
    )


def missing_meteor(timeout: float = PATIENCE) -> str:
    """The notice of a document that has no METEOR, whose other scores are there."""
    document = score(PREDICTIONS, REFERENCES, options=ScoreOptions(**LEAN, meteor_timeout=timeout))
    for part in ("scores", "signatures", "intervals", "per_image"):
        assert "meteor" not in document[part] and "chrf" in document[part]
    (notice,) = document["notices"]
    return notice


def test_meteor_without_java_is_a_notice(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_meteor() == "METEOR is left out: there is no Java (`java` on the PATH; any version from 8 on)"


def test_meteor_without_its_jar_is_a_notice(monkeypatch, tmp_path):
    monkeypatch.setenv(METEOR_JAR_VARIABLE, str(tmp_path / "none.jar"))
    assert "none.jar, which is not a file" in missing_meteor()


def test_the_jar_is_found_without_importing_pycocoevalcap(monkeypatch):
    monkeypatch.delenv(METEOR_JAR_VARIABLE, raising=False)
    assert meteor_jar().name == "meteor-1.5.jar"


@needs_java
def test_a_broken_jar_is_a_notice(monkeypatch, tmp_path):
    (tmp_path / "meteor.jar").write_text("no jar")
    monkeypatch.setenv(METEOR_JAR_VARIABLE, str(tmp_path / "meteor.jar"))
    assert "java ended with 1" in missing_meteor() and "meteor.jar" in missing_meteor()


def fake_java(folder, script: str, monkeypatch) -> None:
    java = folder / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_java_that_hangs_is_given_up(monkeypatch, tmp_path):
    fake_java(tmp_path, "exec sleep 1000000", monkeypatch)
    assert missing_meteor(timeout=0.5) == "METEOR is left out: it was not done after the time limit of 0.5 seconds"


def test_a_java_that_answers_too_little_is_a_notice(monkeypatch, tmp_path):
    fake_java(tmp_path, "echo 1.0 2.0; cat > /dev/null", monkeypatch)
    assert "answered 1 lines to 3 captions" in missing_meteor()


def test_jaspice_is_asked_as_its_own_client_asks(service, monkeypatch):
    """Lists of references and candidates without spaces, some images a request."""
    monkeypatch.setattr(external, "REQUEST_IMAGES", 2)
    url, received = service(lambda body: json.dumps([0.5, 0.25][: len(body["candidates"])]))
    predictions = PREDICTIONS | {"2": "白い 猫 が寝ている"}
    document = score(predictions, REFERENCES, options=ScoreOptions(**LEAN, meteor=False, jaspice_url=url))
    assert document["per_image"]["jaspice"] == [0.5, 0.25, 0.5]
    assert document["scores"]["jaspice"] == pytest.approx(1.25 / 3)
    assert document["signatures"]["jaspice"] == "jaspice|norm:none|space:no|by:service|nref:1-2|v:0.1"
    assert 0.25 <= document["intervals"]["jaspice"][0] < 0.4 < document["intervals"]["jaspice"][1] <= 0.5
    assert received == [
        {"references": [REFERENCES["1"], REFERENCES["2"]], "candidates": [PREDICTIONS["1"], "白い猫が寝ている"]},
        {"references": [REFERENCES["3"]], "candidates": [""]},
    ]


# The package's server with a stub instead of its scorer, which needs JUMAN++, KNP and ray: the share of the
# candidate's characters that a reference has.
JASPICE = """
import sys, types
stub = types.ModuleType("jaspice.metrics")
class BatchJaSPICE:
    def __init__(self, size):
        self.size = size
    def __call__(self, batch_candidate, batch_references):
        assert len(batch_candidate) <= self.size
        texts = zip(batch_candidate, batch_references)
        return [sum(c in "".join(refs) for c in text) / max(1, len(text)) for text, refs in texts]
stub.BatchJaSPICE = BatchJaSPICE
package = types.ModuleType("jaspice")
package.__path__ = [sys.argv[1]]
sys.modules |= {"jaspice": package, "jaspice.metrics": stub}
import uvicorn
from jaspice.server import CallbackServer
run = uvicorn.run
uvicorn.run = lambda app, host, port: run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
CallbackServer.start()
"""


@pytest.fixture
def jaspice_server(environments, tmp_path):
    """The address of the real `server.py` of the package jaspice, with a stub scorer."""
    uv, folder = find_uv(), environments / "jaspice"
    python = str(folder / "bin/python")
    install = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    subprocess.run([*install, "--no-deps", "jaspice==0.0.1"], check=True)
    subprocess.run([*install, "fastapi==0.165.0", "uvicorn==0.54.0", "tqdm", "numpy"], check=True)
    (package,) = folder.glob("lib/python*/site-packages/jaspice")
    port = free_port()
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen([python, "-c", JASPICE, str(package), str(port)], stdout=file, stderr=file)
    try:
        for _ in range(PATIENCE):
            with socket.socket() as probe:
                if server.poll() is not None or probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.1)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_jaspices_own_server_is_understood(jaspice_server):
    """20 images: more than the server scores at once."""
    references = {str(i): ["猫が寝ている", "白い猫"] for i in range(20)}
    predictions = {str(i): "白い 猫" if i % 2 else "犬" for i in range(20)}
    options = ScoreOptions(**LEAN, meteor=False, jaspice_url=jaspice_server)
    document = score(predictions, references, options=options)
    assert document["notices"] == [] and document["per_image"]["jaspice"] == [0.0, 1.0] * 10


def test_spice_of_vietnamese_says_that_it_parses_english(service):
    """The published figure of UIT-ViIC is of that kind."""
    url, received = service("[0.5, 0.25]")
    predictions, references = {"1": "Chó chạy.", "2": "mèo"}, {"1": ["Một con chó."], "2": ["Con mèo."]}
    options = ScoreOptions(**LEAN, meteor=False, spice_url=url)
    english = score(predictions, references, "english", options)
    vietnamese = score(predictions, references, "vietnamese", options)
    assert english["notices"] == [] and english["scores"]["spice"] == vietnamese["scores"]["spice"] == 0.375
    assert received[0] == received[1] and received[0]["candidates"][0] == "Chó chạy."
    (notice,) = vietnamese["notices"]
    assert notice.startswith("SPICE parses English alone")


def test_spice_comes_from_its_service_for_english_only(service):
    url, received = service("[0.5, 0.5, 0.2]")
    options = ScoreOptions(**LEAN, meteor=False, spice_url=url, jaspice_url=url)
    japanese = score(PREDICTIONS, REFERENCES, options=ScoreOptions(**LEAN, meteor=False, spice_url=url))
    assert "spice" not in japanese["scores"] and received == []
    assert japanese["notices"] == ["SPICE is left out: it is for English alone, and the tokenizer is unidic-lite"]
    english = score({"1": "a", "2": "b", "3": "c"}, {"1": ["a"], "2": ["b"], "3": ["d"]}, "none", options)
    assert english["scores"]["spice"] == pytest.approx(0.4)
    assert english["notices"] == ["JaSPICE is left out: it is for Japanese alone, and the tokenizer is none"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (503, "503 Server Error"),
        ("no json", "Expecting value"),
        ('{"scores": [0.1, 0.1]}', "must answer a list of 2 numbers"),
        ("[0.1]", "must answer a list of 2 numbers.* but answered .*0.1"),
        ("[0.1, null]", "the score None, which is not a number"),
        ("[0.1, NaN]", "the score nan"),
        ("[12.5, 0.1]", "the score 12.5, which is not a number from 0 to 1"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_service_that_fails_is_named(service, answer, message):
    url, _ = service(answer)
    with pytest.raises(ScorerUnavailable, match=message) as failed:
        service_scores(url, ITEMS, PATIENCE)
    assert url in str(failed.value)


@pytest.mark.parametrize("there", [True, False])
def test_a_notice_tells_no_secret_of_the_url(service, there):
    url = service(503)[0] if there else "http://127.0.0.1:9/spice"
    with pytest.raises(ScorerUnavailable) as failed:
        service_scores(url.replace("127", "me:secret@127", 1) + "?key=secret", ITEMS, PATIENCE)
    assert url in str(failed.value) and "secret" not in str(failed.value)


def test_a_service_that_is_not_there_is_a_notice(service):
    url = "http://127.0.0.1:9/spice"
    document = score(PREDICTIONS, REFERENCES, options=ScoreOptions(**LEAN, meteor=False, jaspice_url=url))
    assert "jaspice" not in document["scores"]
    (notice,) = document["notices"]
    assert notice.startswith(f"JaSPICE is left out: {url}: ") and "refused" in notice


def test_a_local_spice_names_the_jars_it_lacks(tmp_path):
    (tmp_path / "spice-1.0.jar").touch()
    with pytest.raises(ScorerUnavailable, match="lacks lib/stanford-corenlp-3.6.0.jar, lib/stanford.*-models.jar"):
        local_spice_scores(tmp_path, [], PATIENCE)


def test_a_local_spice_is_run_and_read(monkeypatch, tmp_path):
    """Java itself is the substitute: SPICE's models are not available in a test. The files have SPICE's format."""
    (tmp_path / "lib").mkdir()
    for name in ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / name).touch()
    rows = [{"image_id": i, "scores": {"All": {"f": f, "pr": 1, "re": 1}}} for i, f in ((1, 0.25), (0, 0.75))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fake_java(tmp_path, 'while [ "$1" != -out ]; do shift; done; cp rows.json "$2"', monkeypatch)
    assert local_spice_scores(tmp_path, ITEMS, PATIENCE).tolist() == [0.75, 0.25]
    with pytest.raises(ScorerUnavailable, match="left 1 images without a score"):
        local_spice_scores(tmp_path, [*ITEMS, ITEMS[0]], PATIENCE)


# What FST does where SPICE stores a parse: it opens fields of Java's own classes.
OPENS = """
public class Opens {
    public static void main(String[] words) throws Exception {
        String[] names = {"java.lang.String", "java.math.BigInteger", "java.util.ArrayList",
            "java.util.concurrent.ConcurrentHashMap", "java.net.URL", "java.text.SimpleDateFormat"};
        for (String name : names) Class.forName(name).getDeclaredFields()[0].setAccessible(true);
        String rows = "[{\\"image_id\\": 0, \\"scores\\": {\\"All\\": {\\"f\\": 0.5}}},"
            + "{\\"image_id\\": 1, \\"scores\\": {\\"All\\": {\\"f\\": 1}}}]";
        java.nio.file.Files.write(java.nio.file.Paths.get(words[2]), rows.getBytes());
    }
}
"""


def test_java_lets_spice_look_into_its_classes(java, tmp_path):
    """From Java 16 on that needs to be allowed. Debian's JRE has the compiler's module without `javac`."""
    (tmp_path / "lib").mkdir()
    for jar in external.CORENLP_JARS:
        (tmp_path / "lib" / jar).touch()
    (tmp_path / "Opens.java").write_text(OPENS)
    subprocess.run([java, "-m", "jdk.compiler/com.sun.tools.javac.Main", "Opens.java"], cwd=tmp_path, check=True)
    with zipfile.ZipFile(tmp_path / external.SPICE_JAR, "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "Manifest-Version: 1.0\nMain-Class: Opens\n")
        jar.write(tmp_path / "Opens.class", "Opens.class")
    assert local_spice_scores(tmp_path, ITEMS, PATIENCE).tolist() == [0.5, 1.0]
