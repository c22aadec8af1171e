"""The project's own files are found from any folder; recipes/test_wheel.py tries the same of an installed package."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from vlmcap.arguments import parse
from vlmcap.captioning.baselines import read_prompts
from vlmcap.captioning.generate import read_words
from vlmcap.data.publish import PublishArguments, build
from vlmcap.errors import UserError
from vlmcap.experiments.ablation import read_grid
from vlmcap.models.load import load_processor, resolve_revision
from vlmcap.places import own_file

CONFIGS = "recipes/configs"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_file_of_the_working_folder_comes_first(tmp_path, repo_root):
    assert own_file(f"{CONFIGS}/baselines.yaml") == str(repo_root / CONFIGS / "baselines.yaml")
    (tmp_path / CONFIGS).mkdir(parents=True)
    (tmp_path / CONFIGS / "baselines.yaml").touch()
    assert own_file(f"{CONFIGS}/baselines.yaml") == f"{CONFIGS}/baselines.yaml"
    for nothing in ("none.yaml", "", "recipes", "a\0b", "x" * 5000):
        assert own_file(nothing) == nothing


@dataclass
class Settings:
    plain: str = ""
    task: str = ""
    descriptive: str = ""


def test_configurations_are_found(repo_root):
    prompts = f"{CONFIGS}/prompts/qwen2_5_vl_7b.yaml"
    (settings,) = parse("", Settings, command_line=["--config", prompts])
    assert settings.plain == read_prompts(prompts)["plain"] != ""
    grid = read_grid(f"{CONFIGS}/sft_qwen2vl_jp/ablation_demo.yaml")
    assert [grid.recipe, grid.config, grid.launch[1]] == [
        str(repo_root / name)
        for name in (
            "recipes/sft_qwen2vl_jp.py",
            f"{CONFIGS}/sft_qwen2vl_jp/demo.yaml",
            "accelerate_configs/cpu.yaml",
        )
    ]
    assert read_words("recipes/vlmcap/evaluation/lexicons/avoid_persons_ja.txt")


def test_a_miniature_that_is_not_here_is_named_before_work_begins(tmp_path):
    name = "recipes/miniatures/qwen2_vl"
    args = PublishArguments(
        source="stair", tokenizer=name, annotations=["a.json"], output_dir=str(tmp_path / "dataset")
    )
    for work in (lambda: resolve_revision(name, None), lambda: load_processor(name), lambda: build(args)):
        with pytest.raises(UserError, match=f"there is no {name}: the miniatures are in a clone"):
            work()
    assert not Path("dataset").exists()
