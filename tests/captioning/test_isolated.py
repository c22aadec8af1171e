"""Models in environments of their own: uv really builds one, a small runner really answers from it."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import yaml

from vlmcap import places
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import Baseline, read_table
from vlmcap.captioning.isolated import (
    RUNNERS,
    IsolatedError,
    IsolatedModel,
    build_environment,
    generate_isolated,
    isolated_record,
    start_isolated,
)
from vlmcap.captioning.predictions import PredictionsError
from vlmcap.data.images import load_captions
from vlmcap.errors import UserError
from vlmcap.miniature.scenes import scenes
from vlmcap.places import find_uv

ARGS = GenerationArguments(prompt="大きさは", num_beams=2, max_new_tokens=9)
HEADER = {"model": "org/describe", "revision": None, "trust_remote_code": False, "decoding": {"num_beams": 2}}
# Says the size and mean colour of the picture, and what it was told; a file beside it tells it to misbehave.
DESCRIBE = """
import io, os, sys, time
from pathlib import Path
from PIL import Image, ImageStat
from protocol import serve

def load(header):
    print("a library that prints to stdout")
    count = 0
    def caption(png, prompt):
        nonlocal count
        count += 1
        order = Path(__file__).with_suffix(".order")
        order = order.read_text() if order.exists() else ""
        if order and count == 3:
            print("the last words", file=sys.stderr, flush=True)
            if order == "crash":
                os._exit(7)
            if order == "sleep":
                time.sleep(10**6)
            raise RuntimeError("no memory for picture 3")
        image = Image.open(io.BytesIO(png))
        red, green, blue = (round(value) for value in ImageStat.Stat(image).mean)
        return f"{prompt} {image.width}x{image.height} {red},{green},{blue} {header['decoding']['num_beams']}"
    return caption, {"parameters": 3, "dtype": "float32"}

serve(load)
"""


def row_of(tmp_path, **change):
    runner = tmp_path / "describe.py"
    runner.write_text(DESCRIBE, encoding="utf-8")
    values = {
        "key": "describe",
        "id": "org/describe",
        "revision": None,
        "license": "mit",
        "gated": False,
        "model_class": "package",
        "native_prompt": "何色",
        "runs": "isolated",
        "parameters": 0.0,
        "saw": {"STAIR": "no", "YJ": "no", "COCO": "no", "note": "It has learned nothing."},
        "runner": str(runner),
        "python": ".".join(map(str, sys.version_info[:2])),
        "packages_until": "2025-11-30",
        "requirements": ["pillow==11.3.0"],
    }
    return Baseline(**values | change)


@pytest.fixture
def row(tmp_path):
    return row_of(tmp_path)


@pytest.fixture
def rows(tmp_path):
    made = []
    for number, scene in enumerate(scenes(5, seed=4, held_out=True)):
        scene.draw().resize((84 + number, 84)).save(tmp_path / f"{number}.png")
        made.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()})
    datasets.Dataset.from_list(made).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    return load_captions(str(tmp_path / "data"), "test", image_dir=str(tmp_path))


def captions(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(model):
    return {"model": isolated_record(model, "org/describe", None), "dataset": {"id": "c/d"}, "saw": {}}


def test_an_environment_is_built_once(environments, row):
    folder = build_environment(row, environments)
    done = json.loads((folder / "complete.json").read_text())
    assert "pillow==11.3.0" in done["installed"]
    built = (folder / "complete.json").stat().st_mtime_ns
    assert build_environment(row, environments) == folder
    assert (folder / "complete.json").stat().st_mtime_ns == built
    path = subprocess.run(
        [folder / "bin/python", "-c", "import PIL; print(PIL.__version__, PIL.__file__)"],
        capture_output=True,
        text=True,
    )
    assert path.stdout.startswith("11.3.0") and str(folder) in path.stdout


def test_a_half_built_environment_is_not_taken_for_whole(environments, tmp_path):
    broken = row_of(tmp_path, key="broken", requirements=["pillow==11.3.0", "no-such-package-vlmcap==1.0"])
    with pytest.raises(IsolatedError, match="Installing broken failed: .*\n(.*\n)*.*no-such-package-vlmcap"):
        build_environment(broken, environments)
    folder = next(path for path in environments.glob("broken-*") if path.is_dir())
    assert (folder / "bin/python").exists() and not (folder / "complete.json").exists()
    # Stopped in the middle: the next call begins again.
    row = row_of(tmp_path, key="halved")
    folder = build_environment(row, environments)
    (folder / "complete.json").unlink()
    (folder / "leftover").touch()
    assert build_environment(row, environments) == folder
    assert (folder / "complete.json").exists() and not (folder / "leftover").exists()


def test_other_pins_are_another_environment(environments, row, tmp_path):
    other = row_of(tmp_path, requirements=["pillow==11.3.0", "six==1.17.0"])
    assert build_environment(other, environments) != build_environment(row, environments)


def test_no_package_is_newer_than_the_row(environments, tmp_path):
    """What a requirement requires in turn is of its time: zipp 3.20 came on 2024-08-13."""
    row = row_of(tmp_path, key="dated", requirements=["importlib-metadata==8.0.0"], packages_until="2024-08-01")
    done = json.loads((build_environment(row, environments) / "complete.json").read_text())
    assert "zipp==3.19.2" in done["installed"] and done["packages_until"] == "2024-08-01"
    early = row_of(tmp_path, key="early", packages_until="2025-06-01")
    with pytest.raises(IsolatedError, match="(?s)Installing early failed.*pillow"):
        build_environment(early, environments)


def test_source_is_checked_out_at_its_commit(environments, tmp_path):
    code = tmp_path / "code"
    git = ["git", "-C", str(code), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "init", "--quiet", str(code)], check=True)
    for version in ("1", "2"):
        (code / "cloned.py").write_text(f"VERSION = {version}\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", version], check=True)
    subprocess.run([*git, "config", "uploadpack.allowAnySHA1InWant", "true"], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD~1"], capture_output=True, text=True, check=True).stdout.strip()
    row = row_of(tmp_path, key="cloned", source={"url": f"file://{code}", "commit": first})
    runner = "import cloned\nfrom protocol import serve\n"
    runner += "serve(lambda header: (None, {'parameters': cloned.VERSION, 'dtype': 'float32'}))\n"
    (tmp_path / "describe.py").write_text(runner)
    with IsolatedModel(row, build_environment(row, environments), HEADER) as model:
        assert model.about["parameters"] == 1


def test_captions_and_run_record(environments, row, rows, tmp_path):
    output = tmp_path / "out/predictions.jsonl"
    with start_isolated(row, row.id, None, ARGS, environments) as model:
        generate_isolated(model, rows, output, ARGS, record(model))
    said = captions(output)
    assert [line["image_id"] for line in said] == [0, 1, 2, 3, 4]
    assert said[3]["caption"].split()[:2] == ["大きさは", "87x84"] and said[3]["caption"].endswith(" 2")
    run = json.loads((tmp_path / "out/predictions.run.json").read_text(encoding="utf-8"))
    assert run["model"]["parameters"] == 3 and run["model"]["dtype"] == "float32"
    assert run["environment"]["versions"]["pillow"] == "11.3.0" and run["environment"]["requirements"]
    assert run["decoding"] == {"num_beams": 2, "max_new_tokens": 9, "do_sample": False, "batch_size": 1}
    assert run["images_per_second"] > 0 and "peak_memory_bytes" in run


class ShortOfTime(IsolatedModel):
    """Waits a second for the caption that a sleeping runner never gives, and as usual for those before it."""

    def caption(self, rows, prompt):
        if list(rows["image_id"]) == [2] and (RUNNERS / self.row.runner).with_suffix(".order").read_text() == "sleep":
            self.caption_timeout = 1
        return super().caption(rows, prompt)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("crash", "describe.py ended with exit status 7 .image 2.*the last words"),
        ("raise", "describe.py failed: RuntimeError: no memory for picture 3 .image 2.*the last words"),
        ("sleep", "describe.py took more than 1 s .image 2"),
    ],
)
def test_what_is_done_is_kept_when_a_runner_fails(environments, row, rows, tmp_path, order, message):
    output, switch = tmp_path / "out/predictions.jsonl", tmp_path / "describe.order"
    folder = build_environment(row, environments)
    switch.write_text(order)
    with ShortOfTime(row, folder, HEADER) as model:
        with pytest.raises(IsolatedError, match=f"(?s){message}"):
            generate_isolated(model, rows, output, ARGS, record(model))
    assert model.process.returncode is not None
    assert [line["image_id"] for line in captions(output.with_suffix(".rank0.jsonl"))] == [0, 1]
    switch.unlink()
    with IsolatedModel(row, folder, HEADER) as model:
        generate_isolated(model, rows, output, ARGS, record(model))
    assert [line["image_id"] for line in captions(output)] == [0, 1, 2, 3, 4]


def test_a_model_that_does_not_load_is_an_error(environments, row, tmp_path):
    (tmp_path / "describe.py").write_text("import torch_that_is_not_there\n")
    with pytest.raises(IsolatedError, match="(?s)ended with exit status 1 .loading.*torch_that_is_not_there"):
        IsolatedModel(row, build_environment(row, environments), HEADER)
    (tmp_path / "describe.py").write_text("import time\ntime.sleep(10**6)\n")
    with pytest.raises(IsolatedError, match="took more than 1 s .loading"):
        IsolatedModel(row, build_environment(row, environments), HEADER, load_timeout=1)


def test_constraints_are_refused(row, tmp_path):
    with pytest.raises(
        PredictionsError, match="describe runs in its own environment, where there is no japanese_only"
    ):
        start_isolated(row, row.id, None, GenerationArguments(japanese_only=True), tmp_path)


def test_without_uv_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(places, "ROOT", tmp_path)
    with pytest.raises(UserError, match="uv is needed.*pip install uv"):
        find_uv()


def test_runners_compile_and_need_nothing_but_what_their_row_installs(repo_root):
    """They cannot be run here. Their imports are those of the row's requirements, of the shared files, or standard."""
    shared = {path.stem for path in RUNNERS.glob("*.py")}
    packages = {"PIL": "pillow"}
    for row in read_table(repo_root / "recipes/configs/baselines.yaml").rows.values():
        if row.runs == "isolated":
            code = (RUNNERS / row.runner).read_text(encoding="utf-8")
            compile(code, row.runner, "exec")
            words = [line.split() for line in code.splitlines()]
            imports = {line[1].split(".")[0] for line in words if line[:1] in (["import"], ["from"])}
            installed = {requirement.split("==")[0].split(" ")[0] for requirement in row.requirements}
            installed |= {"llava"} if row.source else set()
            assert {packages.get(name, name) for name in imports - shared - sys.stdlib_module_names} <= installed
            assert row.experimental == ("Experimental: it has never run with the real weights" in code)


def test_the_script_builds_and_asks(environments, rows, run_script, tmp_path):
    """From the table to the predictions, with the native prompt; code of others does not run unasked."""
    row_of(tmp_path)
    table = tmp_path / "table.yaml"
    entry = {
        "id": "org/describe",
        "revision": None,
        "license": "mit",
        "gated": False,
        "class": "package",
        "native_prompt": "何色",
        "runs": "isolated",
        "runner": str(tmp_path / "describe.py"),
        "python": ".".join(map(str, sys.version_info[:2])),
        "packages_until": "2025-11-30",
        "experimental": True,
        "requirements": ["pillow==11.3.0"],
        "parameters": 0,
        "saw": {"STAIR": "no", "YJ": "no", "COCO": "no", "note": "It has learned nothing."},
    }
    models = {"describe": entry, "coded": entry | {"remote_code": True, "class": "remote"}}
    models = json.loads(json.dumps(models))  # else YAML writes aliases for what rows share
    table.write_text(yaml.safe_dump({"common_prompt": "大きさは", "models": models}, allow_unicode=True))
    (tmp_path / "data/README.md").write_text("---\nlicense: cc0-1.0\ntags: [scenes-captions]\n---\n")
    output = tmp_path / "out/predictions.jsonl"
    where = ["--table", table, "--dataset", tmp_path / "data", "--image_dir", tmp_path, "--output", output]
    where += ["--env_dir", environments, "--model", tmp_path / "data"]  # a folder: no look at the Hub
    env = {"PATH": os.environ["PATH"]}
    done = run_script("infer_baseline.py", "--baseline", "describe", "--prompt_kind", "native", *where, env=env)
    assert "describe is experimental: its runner has never seen the model" in done.stderr
    assert captions(output)[0]["caption"].startswith("何色 84x84")
    run = json.loads(output.with_suffix(".run.json").read_text(encoding="utf-8"))
    assert run["prompt_kind"] == "native" and run["saw"]["note"] == "It has learned nothing."
    assert run["model"] | {"baseline": "describe", "license": "mit", "parameters": 3} == run["model"]
    refused = run_script("infer_baseline.py", "--baseline", "coded", *where, expect=1)
    assert "coded runs code of" in refused.stderr and "--trust_remote_code" in refused.stderr
