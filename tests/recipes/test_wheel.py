"""The package as a wheel, away from the clone: what it holds, and the way from a dataset to both cards."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.recipes.files import read
from vlmcap.miniature.scenes import write_scene_dataset

# What a clone alone has.
LEFT_OUT = ("recipes/miniatures/", "recipes/figures/", "recipes/colab_t4.ipynb")
FOLDERS = ("accelerate_configs", "dataset_cards", "model_cards", "recipes", "scripts")


def files_of(repo_root: Path) -> list[str]:
    """The clone's files that belong into a wheel, from its root."""
    files = [path.relative_to(repo_root) for folder in FOLDERS for path in (repo_root / folder).rglob("*")]
    return [
        file.as_posix()
        for file in files
        if (repo_root / file).is_file()
        and not file.as_posix().startswith(LEFT_OUT)
        and not any(part == "__pycache__" or part.endswith(".egg-info") for part in file.parts)
    ]


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory) -> Path:
    """A wheel of a copy: a build leaves files in its folder, and packs those that an earlier one left."""
    folder = tmp_path_factory.mktemp("build")
    for name in [*files_of(repo_root), "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]:
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "clone" / name).write_bytes((repo_root / name).read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "clone", check=True, capture_output=True)
    return next(folder.glob("vlmcap-*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of a new environment that holds the wheel and nothing else of ours; the dependencies are those of the
    tests' environment, whose .pth files (the editable clone) are not read from there."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin/python"


def test_the_wheel_holds_every_file(wheel, repo_root):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"vlmcap/{name}".replace("vlmcap/recipes/vlmcap/", "vlmcap/") for name in files_of(repo_root)}
    assert len(expected) > 100
    assert expected - held == set(), "setup.cfg's packages and package_data leave them out"


def test_it_names_its_own_files_and_what_it_lacks(python, tmp_path):
    code = """
from vlmcap import places
print(places.__file__, places.own_file("recipes/configs/baselines.yaml"), sep="\\n")
print(places.own_file("recipes/vlmcap/evaluation/lexicons/avoid_persons_ja.txt"))
print(places.as_typed_here("python scripts/push_adapter.py --public"))
print(places.as_typed_here("accelerate launch --config_file accelerate_configs/t4.yaml recipes/sft_blip_vi.py --seed"))
places.check_miniature("recipes/miniatures/blip")
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    *files, script, recipe = done.stdout.splitlines()
    assert len(files) == 3, done.stderr
    for file in map(Path, files):
        assert file.is_file() and file.is_relative_to(python.parents[1])  # not the clone's
    assert script == "python -m vlmcap.scripts.push_adapter --public"
    config = Path(files[0]).parent / "accelerate_configs/t4.yaml"
    assert config.is_file()
    assert recipe == f"accelerate launch --config_file {config} -m vlmcap.recipes.sft_blip_vi --seed"
    assert "the miniatures are in a clone of the project alone" in done.stderr.splitlines()[-1]


def test_publish_train_and_write_both_cards(python, miniature_dir, tmp_path, without_meteor):
    write_scene_dataset(tmp_path / "scenes", train=24, validation=3, test=3)

    def run(*words):
        done = subprocess.run([python, *map(str, words)], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(
        *("-m", "vlmcap.scripts.publish_datasets", "stair", "--tokenizer", miniature_dir, "--card", "scenes"),
        *("--annotations", "scenes/stair_train.json", "scenes/stair_val.json", "--yj_annotations", "scenes/yj.json"),
        *("--val_ids", "scenes/val_ids.txt", "--test_ids", "scenes/test_ids.txt", "--images", "scenes/images"),
        *("--output_dir", "data/scenes", "--pretty_name", "Drawn scenes", "--license", "cc0-1.0"),
    )
    assert "# Drawn scenes\n" in (tmp_path / "data/scenes/README.md").read_text(encoding="utf-8")

    # The configuration is the package's own: there is no such file in the working folder.
    run(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "vlmcap.recipes.sft_qwen2vl_jp"),
        *("--config", "recipes/configs/sft_qwen2vl_jp/demo.yaml", "--model_name_or_path", miniature_dir),
        *("--dataset", "data/scenes", "--instances", "scenes/instances.json", "--output_dir", "outputs/run"),
        *("--max_steps", "2", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--max_new_tokens", "8"),
    )
    adapter = tmp_path / "outputs/run/adapter"
    metrics, card = read(adapter / "metrics.json"), (adapter / "README.md").read_text(encoding="utf-8")
    assert metrics["training"]["steps"] == 2 and metrics["counts"]["images"] == 3
    assert metrics["commit"] is None  # of no checkout
    assert "`data/scenes` (a local folder)" in card and '"outputs/run/adapter"' in card
    assert str(tmp_path) not in card and str(miniature_dir.parent) not in card
