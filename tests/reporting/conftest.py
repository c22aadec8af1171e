"""A browser for the pages, and scored runs to compare."""

import json
import random
from pathlib import Path

import pytest

from tests.browser import browser, page  # noqa: F401
from tests.reporting.documents import document
from vlmcap.evaluation.scoring import ScoreOptions, write_metrics

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u202etxet\u202c"


def sentence(rng: random.Random) -> str:
    parts = (
        "赤い 青い 白い 黒い",
        "犬が 猫が 鳥が 馬が",
        "公園で 海辺で 道で",
        "走っています 寝ています 立っています",
    )
    return "".join(rng.choice(words.split()) for words in parts)


# The scorer's part of a metrics document; the rest is the run record.
SCORERS = "scores signatures intervals bootstrap register_normalised counts notices per_image".split()


@pytest.fixture(scope="session")
def scored_runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of four runs on the same 40 images, as scoring leaves them: metrics.json beside predictions.jsonl.

    `good` says what a reference says for most images, `twin` the same except for one image, `weak` anything at all.
    `wild` is `weak` with a hostile caption for image 7, an empty one for image 8, flags for both and a training log.
    Peak memory is measured for all but `wild`.
    """
    rng = random.Random(0)
    references = {str(image): [sentence(rng) for _ in range(3)] for image in range(1, 41)}
    good = {
        image: rng.choice(captions) if rng.random() < 0.7 else sentence(rng) for image, captions in references.items()
    }
    weak = {image: sentence(rng) for image in references}
    predictions = {"good": good, "twin": good | {"5": sentence(rng)}, "weak": weak}
    predictions["wild"] = weak | {"7": HOSTILE, "8": ""}
    root = tmp_path_factory.mktemp("scored")
    lines = [{"image_id": int(image), "captions": captions} for image, captions in references.items()]
    (root / "references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = {}
    for number, (name, captions) in enumerate(predictions.items()):
        folder = folders[name] = root / name
        folder.mkdir()
        lines = [{"image_id": int(image), "caption": caption} for image, caption in captions.items()]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        record = document((0.0,) * 6, 20.0 + number, None)
        record = {key: value for key, value in record.items() if key not in SCORERS}
        record |= {"peak_memory_bytes": None if name == "wild" else (4 + number) * 2**30}
        (folder / "predictions.run.json").write_text(json.dumps(record))
        more = {"training": {"log": training_log()}} if name == "wild" else {}
        options = ScoreOptions(meteor=False)  # Java takes seconds to start
        write_metrics(folder / "predictions.jsonl", references, folder / "metrics.json", more=more, options=options)
    (root / "wild" / "audit.json").write_text(
        json.dumps({"flagged": {"7": ["not Japanese"], "8": ["empty", "<b>short"]}})
    )
    return folders


def training_log() -> list[dict]:
    """Loss every ten steps, CIDEr-D of validation captions every fifty."""
    losses = [{"step": step, "epoch": step / 100, "loss": 30 / step} for step in range(10, 201, 10)]
    return [line | ({"eval_cider_d": line["step"] / 100} if line["step"] % 50 == 0 else {}) for line in losses]
