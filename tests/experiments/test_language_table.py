"""scripts/language_table.py: the trainings are settings of the recipe, and the tables say what the runs leave."""

import json
import runpy

import pytest
import yaml

from vlmcap.arguments import parse
from vlmcap.errors import UserError
from vlmcap.experiments.language_table import (
    ALL,
    ONE_BY_ONE,
    STYLES,
    TRAININGS,
    finished,
    grid_of,
    in_style,
    language_rows,
    speed_rows,
    style_rows,
    trainings,
)

CONFIG = "recipes/configs/sft_qwen2vl_jp/languages_demo.yaml"
IMAGES = 50


@pytest.fixture
def grid(repo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root)
    return grid_of(CONFIG, str(tmp_path))


def test_the_trainings_are_settings_of_the_recipe(grid):
    """What they train on and what they only score; nothing else differs but the seed, except where speed is looked
    at."""
    arguments = runpy.run_path(grid.recipe)["ARGUMENTS"]
    found = trainings(grid, [42, 43])
    assert {name: len(of_seeds) for name, of_seeds in found.items()} == dict.fromkeys(found, 2) | {ONE_BY_ONE: 1}
    parsed = {}
    for name, (cell, *_) in found.items():
        words = ["--config", grid.config, "--output_dir", "x"]
        for key, value in cell.changes.items():
            words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        groups = parse("", *arguments, command_line=words)
        parsed[name] = {key: value for group in groups for key, value in vars(group).items()}
        assert set(cell.changes) <= set(parsed[name])
    for name, keys in TRAININGS.items():
        assert tuple(parsed[name]["prompts"]) == keys
        assert set(keys) | set(parsed[name]["also_score"] or {}) == {"ja/plain", "en", "vi"}
    assert list(parsed[STYLES]["prompts"]) == ["ja/plain", "ja/polite"] and not parsed[STYLES]["also_score"]
    assert len({parsed[name]["max_steps"] for name in (*TRAININGS, STYLES)}) == 1
    assert parsed[ONE_BY_ONE]["prompts"] == parsed[ALL]["prompts"] and not parsed[ONE_BY_ONE]["shared_prefix"]
    folders = [cell.folder for of_seeds in found.values() for cell in of_seeds]
    assert len(set(folders)) == len(folders)


def test_a_prompt_that_is_missing_is_named(grid, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"prompts": {"ja/plain": "短く。", "en": "Briefly.", "vi": "Ngắn."}}))
    with pytest.raises(UserError, match="config.yaml: prompts has no ja/polite"):
        trainings(grid_of(str(config), str(tmp_path)), [1])
    config.write_text(yaml.safe_dump({"prompts": {"Japanese": "短く。"}}))
    with pytest.raises(UserError, match="config.yaml: 'Japanese' is "):
        trainings(grid_of(str(config), str(tmp_path)), [1])


@pytest.fixture
def left(grid):
    """left(cell, {key: CIDEr-D of every image}, base={...}, captions={key: ...}): what a finished training leaves; the
    first key is the main one."""

    def left(cell, scores, base=None, captions=None, seconds=100.0):
        main, *others = scores
        for model, of_model in {"adapter": scores, "base": base or {}}.items():
            for key, value in of_model.items():
                place = cell.folder / model
                folder = place if key == main else place / "languages" / key.replace("/", "-")
                folder.mkdir(parents=True, exist_ok=True)
                values = [value + 0.5 * (number % 2) - 0.25 for number in range(IMAGES)]
                document = {"key": key, "per_image": {"cider_d": values}}
                document["training"] = {"steps": 600, "seconds": seconds}
                (folder / "metrics.json").write_text(json.dumps(document))
                lines = (captions or {}).get(key, [])
                texts = [json.dumps({"image_id": i, "caption": text}) for i, text in enumerate(lines)]
                (folder / "predictions.jsonl").write_text("\n".join(texts))
        state = {"status": "finished", "fingerprint": "", "seconds": 1.0}
        (cell.folder / "cell.json").write_text(json.dumps(state))

    return left


def numbers(cell: str) -> list[float]:
    return [float(part.strip("[],%")) for part in cell.split()]


def test_scores_of_each_language_with_intervals(grid, left):
    found = trainings(grid, [42, 43])
    base = {"ja/plain": 0.5, "en": 4.0, "vi": 0.25}
    for number, cell in enumerate(found[ALL]):
        left(cell, {"ja/plain": 4.0 + number, "en": 3.8, "vi": 2.0}, base, seconds=100.0)
    left(found["Japanese"][0], {"ja/plain": 5.0, "en": 1.0, "vi": 0.3}, base)
    head, of_base, japanese, everything = language_rows(finished(found))
    assert head[1:4] == ["CIDEr-D, Japanese", "CIDEr-D, English", "CIDEr-D, Vietnamese"]
    assert numbers(of_base[2])[0] == 4.0 and numbers(japanese[1])[0] == 5.0
    assert japanese[5:] == ["1", "6.00"] and everything[5] == "2"
    # One seed has 4.0, the other 5.0: an interval over seeds holds both.
    point, low, high = numbers(everything[1])
    assert point == 4.5 and low < 4.0 and high > 5.0
    point, low, high = numbers(everything[4])
    assert point == pytest.approx(3.8 / 4.0) and low < point < high and high - low < 0.1
    assert numbers(japanese[4])[0] == 0.25


def test_captions_in_the_style_that_was_asked_for(grid, left):
    found = trainings(grid, [42])
    plain, polite = ["赤い丸が左にある"] * IMAGES, ["赤い丸が左にあります。"] * (IMAGES - 5) + ["赤い丸が左にある"] * 5
    left(found[STYLES][0], {"ja/plain": 5.0, "ja/polite": 4.0}, captions={"ja/plain": plain, "ja/polite": polite})
    head, of_plain, of_polite = style_rows(finished(found))
    assert head[1] == "captions in this style" and [row[0] for row in (of_plain, of_polite)] == [
        "ja/plain",
        "ja/polite",
    ]
    assert of_plain[1] == "100.0% [100.0%, 100.0%]"
    point, low, high = numbers(of_polite[1])
    assert point == 90.0 and low < 85 < 95 < high and numbers(of_polite[2])[0] == 4.0
    assert in_style(["a red circle", "赤い丸です", ""], polite=False).sum() == 0


def test_speed_against_one_prompt_a_sequence(grid, left):
    found = trainings(grid, [42])
    assert language_rows({}) == style_rows({}) == speed_rows(finished(found)) == []
    left(found[ALL][0], {"ja/plain": 4.0, "en": 3.8, "vi": 2.0}, seconds=100.0)
    left(found[ONE_BY_ONE][0], {"ja/plain": 4.0, "en": 3.8, "vi": 2.0}, seconds=300.0)
    _, shared, one_by_one = speed_rows(finished(found))
    assert shared[1:] == ["6.00", "3.00"] and one_by_one[1:] == ["2.00", "1.00"]
