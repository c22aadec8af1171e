"""recipes/colab_t4.ipynb, all of its cells, on a CPU: with the miniature and drawn scenes."""

import copy
import json
import os
import re
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from huggingface_hub import HfApi
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from vlmcap.data.images import load_captions
from vlmcap.miniature.scenes import write_scene_dataset


@pytest.fixture
def notebook(repo_root):
    return nbformat.read(repo_root / "recipes/colab_t4.ipynb", as_version=4)


@pytest.fixture
def scenes(tmp_path) -> Path:
    """Scenes as STAIR Captions comes, and their pictures as COCO's server has them, below `coco`."""
    folder = tmp_path / "scenes"
    write_scene_dataset(folder, train=40, validation=4, test=6)
    for split in ("train", "val"):
        annotations = folder / f"stair_{split}.json"
        annotations.write_text(annotations.read_text("utf-8").replace(".png", ".jpg"), encoding="utf-8")
    for picture in (folder / "images").iterdir():
        photograph = tmp_path / "coco" / picture.name.split("_")[1] / f"{picture.stem}.jpg"
        photograph.parent.mkdir(parents=True, exist_ok=True)
        picture.rename(photograph)
    return folder


@pytest.fixture
def mirror(scenes, tmp_path):
    """The address of a server that has the photographs."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "coco"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def with_settings(notebook, **changes) -> None:
    """Changes settings of the first cell of code."""
    cell = next(cell for cell in notebook.cells if cell.id == "settings")
    for name, value in changes.items():
        assert re.search(rf"^{name} = ", cell.source, re.MULTILINE), name
        cell.source = re.sub(rf"^{name} = .*", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)


def execute(notebook, folder: Path, without: str = "") -> dict[str, str]:
    """Runs all cells but one; returns what each printed."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if cell.id != without]
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return {cell.id: "".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells}


def test_every_cell_runs_and_a_second_time_resumes(hub, notebook, scenes, mirror, repo_root, tmp_path, monkeypatch):
    train = f"--instances {scenes}/instances.json --max_new_tokens 16 --save_steps 1 --eval_steps 1 --max_steps"
    settings = {
        "REPOSITORY": str(repo_root),
        "WORK": str(tmp_path / "drive"),
        "CODE": str(tmp_path / "clone"),
        "PHOTOGRAPHS": str(tmp_path / "photographs"),
        "MODEL": "recipes/miniatures/qwen2_vl",
        "CONFIG": "recipes/configs/sft_qwen2vl_jp/demo.yaml",
        "LAUNCHER": "accelerate_configs/cpu.yaml",
        "IMAGES": 20,
        "VALIDATION": 2,
        "TEST": 2,
        "ANNOTATIONS": f"--annotations {scenes}/stair_train.json {scenes}/stair_val.json",
        "YJ_ANNOTATIONS": f"--yj_annotations {scenes}/yj.json",
        "FETCH": f"--base_url {mirror}",
        "PUSH_TO": "user/from-colab",
        "NEEDS_GPU": False,
    }
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VLMCAP_METEOR_JAR", "none.jar")
    # pip looks whether all is there, and leaves our environment as it is.
    monkeypatch.setenv("PIP_DRY_RUN", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")

    with_settings(notebook, TRAIN=f"{train} 1", **settings)
    printed = execute(notebook, tmp_path, without="caption")
    assert "No checkpoint in" in printed["train"]
    assert HfApi().model_info("user/from-colab").private

    with_settings(notebook, TRAIN=f"{train} 2", PICTURE=str(next((tmp_path / "coco/val2014").iterdir())))
    printed = execute(notebook, tmp_path, without="push")
    assert "Continuing from" in printed["train"] and "checkpoint-1" in printed["train"]
    assert printed["caption"].strip()
    metrics = json.loads((tmp_path / "drive/run/adapter/metrics.json").read_text("utf-8"))
    assert metrics["training"]["steps"] == 2 and metrics["counts"]["images"] == 2
    assert (metrics["training"]["images"], metrics["training"]["in_yj_images"]) == (20, 0)


def test_own_pictures_become_the_dataset(notebook, scenes, repo_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    pictures = sorted((tmp_path / "coco/train2014").iterdir())
    for number, picture in enumerate(pictures):
        picture.with_suffix(".txt").write_text(f"{number} 番目の絵\n", encoding="utf-8")
    settings = {"OWN": str(pictures[0].parent), "OWN_PICTURES": str(pictures[0].parent), "NEEDS_GPU": False}
    with_settings(notebook, WORK=str(tmp_path / "drive"), VALIDATION=2, TEST=3, **settings)
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("settings", "data")]
    execute(notebook, repo_root)
    splits = ("train", "validation", "test")
    sizes = [len(load_captions(str(tmp_path / "drive/dataset"), split)) for split in splits]
    assert sizes == [len(pictures) - 5, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shutil.which": "lambda name: None"}, "There is no GPU: choose Runtime > Change runtime type > T4 GPU"),
        ({"sys.version_info": "(3, 10)"}, "is too old, 3.11 to 3.13 is needed: choose Runtime"),
        ({"subprocess.check_output": "lambda *a, **k: 'GT 710, 2048 MiB, 3.5'"}, "2048 MiB of GPU memory are too"),
        ({"subprocess.check_output": "lambda *a, **k: 'P100, 16384 MiB, 6.0'"}, "Compute capability 6.0"),
        ({"subprocess.check_output": "lambda *a, **k: 'T4, 15360 MiB, 7.5'"}, None),
    ],
)
def test_the_first_cell_says_what_to_do(notebook, change, message, monkeypatch, capsys):
    source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    for name, value in change.items():
        monkeypatch.setattr(name, eval(value))
    if message is None:
        exec(source, {})
        assert "T4, 15360 MiB, compute capability 7.5" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit, match=re.escape(message)):
        exec(source, {})


def test_a_command_that_fails_stops_the_notebook(notebook, tmp_path):
    with_settings(notebook, NEEDS_GPU=False, WORK=str(tmp_path), CODE=str(tmp_path / "clone"), REPOSITORY="none")
    with pytest.raises(CellExecutionError, match="is REPOSITORY, none, this project's address"):
        execute(notebook, tmp_path)


def test_outputs_are_cleared(notebook):
    assert not [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
