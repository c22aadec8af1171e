"""scripts/reward_table.py: means over seeds, differences with their intervals, the plot."""

import json
import runpy

import pytest

from vlmcap.arguments import parse
from vlmcap.errors import UserError
from vlmcap.evaluation.audit import write_audit
from vlmcap.evaluation.scoring import ScoreOptions, write_metrics
from vlmcap.experiments.ablation import cells, read_grid
from vlmcap.experiments.reward_table import difference_rows, plot, read_settings, table_rows

COLOURS = ["赤い", "青い", "黒い", "黄色い"]
REFERENCES = {str(i): [f"{COLOURS[i % 4]}丸がある", f"{COLOURS[i % 4]}円がある"] for i in range(40)}
RIGHT = {image_id: captions[0] for image_id, captions in REFERENCES.items()}


@pytest.fixture
def evaluated(tmp_path):
    """evaluated("name", wrong=8): a folder of captions of which the first `wrong` name another thing."""

    def evaluated(name: str, wrong: int, seconds: float | None = None):
        folder = tmp_path / name
        folder.mkdir()
        captions = {i: "緑の星がある" if int(i) < wrong else caption for i, caption in RIGHT.items()}
        lines = [json.dumps({"image_id": i, "caption": caption}) for i, caption in captions.items()]
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        more = {"training": {"seconds": seconds}} if seconds else {}
        options = ScoreOptions(meteor=False, resamples=10, register_normalised=False)
        write_metrics(folder / "predictions.jsonl", REFERENCES, folder / "metrics.json", more=more, options=options)
        write_audit(folder / "predictions.jsonl", REFERENCES, folder / "audit.json", lexicon="scenes_ja")
        return folder

    return evaluated


def test_means_over_seeds(evaluated):
    words = [f"start={evaluated('a', 20)}", *(f"longer={evaluated(str(n), n, 10.0 * n)}" for n in (4, 8))]
    header, start, longer = table_rows(read_settings(words))
    cells = dict(zip(header, longer, strict=True))
    assert cells["CHAIRs"] == cells["CHAIRi"] == "15.0%"  # 4 and 8 of 40, a thing each
    assert cells["distinct"] == "5" and cells["seeds"] == "2" and cells["seconds of training"] == "60"
    assert float(cells["least"]) < float(cells["CIDEr-D"]) < float(cells["most"])
    assert dict(zip(header, start, strict=True))["seconds of training"] == "-"


def test_differences_have_intervals_over_images_and_seeds(evaluated):
    words = [f"a={evaluated('0', 20)}", *(f"b={evaluated(str(n), n)}" for n in (2, 12))]
    header, row = difference_rows(read_settings(words), "a")
    assert header[0] == "minus a"
    point, low, high = (float(part.strip("[]%,")) for part in dict(zip(header, row, strict=True))["CHAIRs"].split())
    assert point == pytest.approx(100 * (7 - 20) / 40, abs=0.06)
    # One seed of b is 12.5 points from the mean of both: as far as a resample of two seeds can be, and images on top.
    assert low < point - 12.5 and high > point + 12.5 and high < 12.5


def test_a_run_against_itself_differs_by_nothing(evaluated):
    folder = evaluated("a", 7)
    _, row = difference_rows(read_settings([f"a={folder}", f"b={folder}"]), "a")
    assert row == ["b", *["+0.000 [+0.000, +0.000]"] * 2, *["+0.0% [+0.0, +0.0]"] * 2, "+0.0"]


def test_plot(evaluated, tmp_path):
    settings = read_settings([f"start={evaluated('a', 20)}", f"b={evaluated('b', 4)}", f"b={evaluated('c', 8)}"])
    text = plot(settings, tmp_path / "plot.svg").read_text()
    assert "CIDEr-D" in text and "distinct captions" in text and ">start<" in text


def test_what_cannot_be_compared(evaluated, tmp_path):
    folder = evaluated("a", 3)
    with pytest.raises(UserError, match="give each run as NAME=FOLDER"):
        read_settings([str(folder)])
    with pytest.raises(UserError, match="has no metrics.json"):
        read_settings([f"a={tmp_path}"])
    with pytest.raises(UserError, match="there is no such run"):
        difference_rows(read_settings([f"a={folder}"]), "b")
    with pytest.raises(UserError, match="no runs"):
        read_settings([])


@pytest.mark.parametrize(
    "name", ["grpo_qwen2vl_jp/weights_demo", "grpo_qwen2vl_jp/against_sft_demo", "sft_qwen2vl_jp/longer_demo"]
)
def test_the_grids_change_settings_of_their_recipe(repo_root, monkeypatch, name):
    monkeypatch.chdir(repo_root)
    grid = read_grid(f"recipes/configs/{name}.yaml")
    arguments = runpy.run_path(grid.recipe)["ARGUMENTS"]
    for cell in cells(grid):
        words = ["--config", grid.config, "--output_dir", "x"]
        for key, value in cell.changes.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
        parsed = {
            key: value for group in parse("", *arguments, command_line=words) for key, value in vars(group).items()
        }
        for key, value in cell.changes.items():
            assert parsed[key] == value
