"""The figures beside the reward, and when a run warns."""

import json
import re

import pytest

from vlmcap.evaluation.audit import write_audit
from vlmcap.evaluation.lexicon import Lexicon
from vlmcap.rewards.watch import caption_figures, warning

REFERENCES = {"1": ["赤い丸がある"], "2": ["青い星がある"], "3": ["緑の三角"], "4": ["黒い星"]}
CAPTIONS = {"1": "赤い丸がある", "2": "赤い丸がある", "3": "緑の三角と黒い丸", "4": "絵"}
BEFORE = {"reward": 1.0, "chair_s": 0.2, "chair_i": 0.1, "distinct": 0.6, "words": 8.0}


def test_figures_are_those_of_the_audit(tmp_path):
    lines = [json.dumps({"image_id": i, "caption": c}, ensure_ascii=False) for i, c in CAPTIONS.items()]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    audit = write_audit(tmp_path / "predictions.jsonl", REFERENCES, tmp_path / "audit.json", lexicon="scenes_ja")
    found = caption_figures(CAPTIONS, REFERENCES, Lexicon("scenes_ja"), {})
    assert {key: found[key] for key in ("chair_s", "chair_i")} == {
        key: audit["hallucination"][key]["rate"] for key in ("chair_s", "chair_i")
    }
    assert found == pytest.approx({"chair_s": 1 / 2, "chair_i": 1 / 2, "distinct": 3 / 4, "words": 3.75})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": 1.5}, None),
        ({"reward": 0.9, "chair_s": 0.9}, None),
        ({"reward": 1.5, "chair_s": 0.24, "distinct": 0.56}, None),
        ({"reward": 1.5, "chair_s": 0.3}, "CHAIRs. 20.0% -> 30.0%"),
        ({"reward": 1.5, "chair_i": 0.3}, "CHAIRi. 10.0% -> 30.0%"),
        ({"reward": 1.5, "distinct": 0.4}, "distinct captions 60.0% -> 40.0%"),
    ],
)
def test_a_warning_where_the_reward_rises_and_captions_get_worse(change, said):
    text = warning(BEFORE, BEFORE | change)
    assert (text is None) if said is None else re.search(said, text)
