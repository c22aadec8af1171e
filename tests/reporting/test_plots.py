"""Plots: valid SVG with a mark for every figure, the same bytes every time."""

import json
import xml.etree.ElementTree as ET

import pytest

from tests.reporting.documents import family_document
from vlmcap.reporting.plots import has_curve, plot_quality_against_memory, plot_scores, plot_training_curves


@pytest.fixture
def runs(scored_runs):
    return {name: json.loads((folder / "metrics.json").read_text()) for name, folder in scored_runs.items()}


def gids(path, prefix):
    ids = [element.get("id") for element in ET.parse(path).iter() if element.get("id", "").startswith(prefix)]
    assert len(ids) == len(set(ids))
    return set(ids)


def texts(path):
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter() if element.tag.endswith("}text")]


def width(path, gid):
    """Of a bar, from the corners of its path."""
    (bar,) = (element for element in ET.parse(path).iter() if element.get("id") == gid)
    corners = next(element.get("d") for element in bar.iter() if element.tag.endswith("}path")).split()
    numbers = [float(word) for word in corners if word not in "MLz"]
    return max(numbers[::2]) - min(numbers[::2])


def test_a_bar_for_every_score_of_every_run(runs, tmp_path):
    del runs["wild"]["scores"]["rouge_l"]
    path = plot_scores(runs, tmp_path / "scores.svg")
    expected = {f"bar-{key}-{number}" for number, run in enumerate(runs.values()) for key in run["scores"]}
    expected |= {f"bar-cider_d_plain-{number}" for number in range(4)}
    assert gids(path, "bar-") == expected and "bar-rouge_l-3" not in expected
    assert {*runs, "CIDEr-D", "CIDEr-D, plain endings", "–"} <= set(texts(path))
    scores = [run["scores"]["cider_d"] for run in runs.values()]
    widths = [width(path, f"bar-cider_d-{number}") for number in range(4)]
    assert [w / max(widths) for w in widths] == pytest.approx([s / max(scores) for s in scores], abs=1e-3)


def test_quality_is_drawn_against_memory_where_it_is_measured_for_all(runs, tmp_path):
    path = plot_quality_against_memory(runs, tmp_path / "some.svg")
    assert gids(path, "point-") == {"point-0", "point-1", "point-2", "point-3"}
    assert "parameters, millions (peak memory not measured for 1 of 4 runs)" in texts(path)
    del runs["wild"]
    path = plot_quality_against_memory(runs, tmp_path / "all.svg")
    assert gids(path, "point-") == {"point-0", "point-1", "point-2"}
    assert "peak memory while captioning, GiB" in texts(path)


def test_training_curves_are_of_runs_with_a_log(runs, tmp_path):
    assert [has_curve(run) for run in runs.values()] == [False, False, False, True]
    runs["twin"]["training"] = {"log": [{"step": step, "loss": 1.0} for step in (1, 2)]}
    path = plot_training_curves(runs, tmp_path / "curves.svg")
    assert gids(path, "loss-") == {"loss-1", "loss-3"}
    assert gids(path, "eval_cider_d-") == {"eval_cider_d-3"}
    for line in runs["wild"]["training"]["log"]:
        line.pop("eval_cider_d", None)
    path = plot_training_curves(runs, tmp_path / "loss.svg")
    assert gids(path, "loss-") == {"loss-1", "loss-3"} and not gids(path, "eval_")
    assert "training loss" in texts(path)


def test_validation_is_drawn_beside_the_training_loss(tmp_path):
    """Its loss in the same panel, each of its scores in one of its own, in the order of the tables."""
    runs = {name: family_document(f"sft_{name}") for name in ("blip_vi", "vit_gpt2_food")}
    for line in runs["blip_vi"]["training"]["log"]:
        line.pop("eval_bleu_2", None)
    path = plot_training_curves(runs, tmp_path / "curves.svg")
    assert gids(path, "eval_loss-") == {"eval_loss-0", "eval_loss-1"}
    assert gids(path, "eval_cider_d-") == {"eval_cider_d-0", "eval_cider_d-1"}
    assert gids(path, "eval_bleu_2-") == {"eval_bleu_2-1"}
    labels = [text for text in texts(path) if text.endswith("validation")]
    assert labels == ["training loss, dashed: validation", "BLEU-2, validation", "CIDEr-D, validation"]
    assert {"blip_vi", "vit_gpt2_food"} <= set(texts(path))


def test_scores_can_be_chosen(runs, tmp_path):
    path = plot_scores(runs, tmp_path / "scores.svg", ["rouge_l", "bleu_1"])
    assert gids(path, "bar-") == {f"bar-{key}-{number}" for key in ("rouge_l", "bleu_1") for number in range(4)}
    assert [text for text in texts(path) if text in ("ROUGE-L", "BLEU-1")] == ["ROUGE-L", "BLEU-1"]


def test_the_same_documents_give_the_same_bytes(runs, tmp_path):
    for plot in (plot_scores, plot_quality_against_memory, plot_training_curves):
        (tmp_path / "again").mkdir(exist_ok=True)
        first, second = (plot(runs, folder / "plot.svg").read_bytes() for folder in (tmp_path, tmp_path / "again"))
        assert first == second and b"<dc:date>" not in first


@pytest.mark.filterwarnings("error")
def test_any_name_is_drawn_as_it_is(runs, tmp_path):
    names = ["<b>&", "アダプタ r=8", r"$\frac{1}{$", "_hidden"]
    runs = dict(zip(names, runs.values(), strict=True))
    for plot in (plot_scores, plot_quality_against_memory):
        assert set(names) <= set(texts(plot(runs, tmp_path / "names.svg")))


def test_a_system_that_scores_nothing_has_a_bar_of_no_width(runs, tmp_path):
    for part in (runs["weak"], runs["weak"]["register_normalised"]):
        part["scores"] = dict.fromkeys(part["scores"], 0.0)
        part["intervals"] = dict.fromkeys(part["intervals"], [0.0, 0.0])
    path = plot_scores({"weak": runs["weak"]}, tmp_path / "zero.svg")
    assert width(path, "bar-cider_d-0") == 0
