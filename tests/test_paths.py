"""Options that take a file are given a folder, and the other way round: the message names the option or the file, the
value, and what is needed.

Scripts run in this process, with what they print left aside.
"""

import io
import re
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from PIL import Image

from vlmcap.data.arguments import PublishArguments
from vlmcap.data.publish import build

FOLDER, FILE = r"is a folder, and a file is needed, such as folder/predictions.jsonl", "and a folder is needed"
SCORED = ["--predictions", "p.jsonl", "--references", "r.jsonl"]
SYSTEMS = ["export", "--systems", "a=p.jsonl", "b=p.jsonl"]
MODEL = ["--model", "MINIATURE"]
STAIR = ["stair", "--tokenizer", "MINIATURE", "--output_dir", "new"]
# Script and words; `folder` is a folder, `file` a file, `data` a dataset -> the message.
WRONG = {
    "eval_captioning --predictions folder --references r.jsonl": f"--predictions folder: {FOLDER}",
    "eval_captioning --predictions p.jsonl --references folder": f"--references folder: {FOLDER}",
    "eval_captioning SCORED --output folder": f"--output folder: {FOLDER}",
    "eval_captioning SCORED --output file/x.json": f"--output file/x.json: file is a file, .*{FILE}",
    "eval_captioning SCORED --idf folder": f"--idf folder: {FOLDER}",
    "eval_captioning --references r.jsonl --write_idf folder": f"--write_idf folder: {FOLDER}",
    "eval_captioning --predictions p.jsonl --dataset file": "file is a file, and a dataset is a folder",
    "audit_captions --predictions folder --references r.jsonl": f"--predictions folder: {FOLDER}",
    "audit_captions SCORED --lexicon folder": "there is no lexicon folder: name a YAML file",
    "audit_captions SCORED --instances folder": r"folder: the annotations cannot be read \(Is a directory\)",
    "audit_captions SCORED --compare folder": r"folder: the audit cannot be read \(Is a directory\)",
    "audit_captions SCORED --review_queue file --output new/a.json": f"--review_queue file: .*{FILE}",
    "audit_captions SCORED --output folder": f"--output folder: {FOLDER}",
    "audit_captions SCORED --train_dataset file": "file is a file, and a dataset is a folder",
    "compare_runs a=file b=file --output_dir new": "file is not JSON",
    "compare_runs a=folder b=folder --output_dir new": "a=folder: no such metrics file, and no folder with",
    "hold_out_captions --references folder --output_dir new": f"--references folder: {FOLDER}",
    "hold_out_captions --references r.jsonl --output_dir file": f"--output_dir file: .*{FILE}",
    "human_eval export --systems a=folder b=p.jsonl --dataset data --output_dir new": f"--systems folder: {FOLDER}",
    "human_eval SYSTEMS --dataset file --output_dir new": "file is a file, and a dataset is a folder",
    "human_eval SYSTEMS --dataset data --images 1 --output_dir file": f"--output_dir file: .*{FILE}",
    "human_eval import folder --key folder --output_dir new": f"folder: {FOLDER}",
    "publish_datasets own --annotations data --images file --language ja --output_dir new": "file: no such folder",
    "publish_datasets own --annotations own/m.csv --language ja --output_dir file": "file: is a file",
    "publish_datasets STAIR --annotations folder": f"folder: {FOLDER}",
    "publish_datasets food_titles --annotations folder --output_dir new": f"folder: {FOLDER}",
    "fetch_images --dataset file --output_dir new": "file is a file, and a dataset is a folder",
    "draw_scenes --output_dir file": f"--output_dir file: .*{FILE}",
    "publish_metric --output_dir file": f"--output_dir file: .*{FILE}",
    "push_adapter --adapter_dir file --repo_id a/b": "there is no adapter folder file",
    "push_dataset --folder file --repo_id a/b": "file: no dataset of scripts/publish_datasets.py",
    "pin_revisions --files folder": "folder cannot be read as YAML: .*Is a directory",
    "run_ablation --config folder": "folder cannot be read: .*Is a directory",
    "run_ablation --config recipes/configs/sft_qwen2vl_jp/ablation_demo.yaml --output_dir file": FILE,
    "language_table --recipe_config folder": "folder cannot be read: .*Is a directory",
    "language_table --output_dir file": FILE,
    "serve_check --model file": "there is no merged model in file",
    "infer_baseline MODEL --dataset data --output folder": f"--output folder: {FOLDER}",
    "infer_baseline MODEL --dataset file --output new/x.jsonl": "file is a file, and a dataset is a folder",
    "infer_baseline MODEL --dataset data --prompts folder --output_dir new": "folder cannot be read as YAML",
    "infer_baseline MODEL --dataset data --output new/x.jsonl --avoid_words folder": "_words folder cannot be read",
    "infer_baseline --model file --dataset data --output new/x.jsonl": "file cannot be loaded",
    "infer_baseline MODEL --adapter file --dataset data --output new/x.jsonl": "file is not an adapter",
    "infer_baseline --list --table folder": "folder cannot be read as YAML",
    "caption own/1.png MODEL --output folder": "folder exists, and is not of this command",
    "caption own/1.png MODEL --output file/x.jsonl": "file cannot be read or written: File exists",
    "caption own/1.png MODEL --avoid_words folder": "--avoid_words folder cannot be read",
    "caption own/1.png --model file": "file is not an adapter",
    "caption own/1.png --adapter file": "file is not an adapter",
    "export_model --adapter file --output_dir new": "file has no metrics.json",
    "publish_space --adapter file --output_dir new": "file/metrics.json does not exist",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    (folder / "folder").mkdir()
    (folder / "file").write_text("x")
    for name, key, value in (("p", "caption", '"犬"'), ("r", "captions", '["犬"]')):
        text = "".join(f'{{"image_id": "{number}.png", "{key}": {value}}}\n' for number in range(3))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "folder/predictions.jsonl").write_bytes((folder / "p.jsonl").read_bytes())
    (folder / "own").mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"own/{number}.png")
    (folder / "own/m.csv").write_text("image,caption\n0.png,絵\n1.png,犬\n2.png,空\n", encoding="utf-8")
    source = {"annotations": [str(folder / "own/m.csv")], "images": str(folder / "own"), "language": "ja"}
    build(PublishArguments("own", str(folder / "data"), val_size=0, test_size=1, seed=1, **source))
    return folder


def run(script, words) -> str:
    """How it ends: its message, or nothing where there is none."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            sys.argv = [str(script), *words]
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return f"{end.code}\n{printed.getvalue()}" if end.code else ""
    return ""


@pytest.mark.parametrize("command", WRONG)
def test_a_folder_for_a_file_and_a_file_for_a_folder(place, repo_root, miniature_dir, monkeypatch, command):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [])
    shutil.rmtree("new", ignore_errors=True)
    known = {"SCORED": SCORED, "SYSTEMS": SYSTEMS, "MODEL": MODEL, "STAIR": STAIR}
    name, *words = [word for part in command.split() for word in known.get(part, [part])]
    words = [str(miniature_dir) if word == "MINIATURE" else word for word in words]
    words = [str(repo_root / word) if word.startswith("recipes/") else word for word in words]
    message = run(repo_root / f"scripts/{name}.py", words)
    assert message.startswith("error: ") and re.search(WRONG[command], message), message
