"""Every script and recipe answers --help and mistakes on its command line before it imports what takes seconds.

No clock: looked at is which modules were loaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("scripts/*.py"), *ROOT.glob("recipes/*.py")))
RECIPES = [program for program in PROGRAMS if program.startswith("recipes/")]
VERBS = {"scripts/human_eval.py": ["export"]}
HEAVY = set(
    "accelerate bitsandbytes datasets matplotlib pandas peft pyarrow safetensors scipy sklearn tokenizers torch"
    " torchvision transformers trl.trainer wordcloud".split()
)
# Runs each command line in a process of its own, as `python PROGRAM WORDS` would. They are forked from one that has
# imported what nearly all of them need, so that this is loaded, and looked at, once.
PROBE = """
import io, json, os, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
import vlmcap.arguments, vlmcap.evaluation.scoring

def run(words):
    output, status = io.StringIO(), 0
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    try:
        with redirect_stdout(output), redirect_stderr(output):
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        output.write(str(end.code))
    modules = {part for name in sys.modules for part in (name.split(".")[0], ".".join(name.split(".")[:2]))}
    return {"status": status, "output": output.getvalue(), "modules": sorted(modules)}

for words in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        print(json.dumps(run(words)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture
def answers(tmp_path):
    """answers(["scripts/x.py", "--help"], ...): status, output and modules of each command line, run in tmp_path."""

    def answers(*commands: list[str]) -> list[dict]:
        commands = [[str(ROOT / program), *words] for program, *words in commands]
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            input=json.dumps(commands),
            cwd=tmp_path,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        lines = done.stdout.splitlines()
        assert len(lines) == len(commands), done.stdout + done.stderr
        return [json.loads(line) for line in lines]

    return answers


def is_quick(answer: dict) -> bool:
    assert not (loaded := HEAVY & set(answer["modules"])), (loaded, answer["output"])
    return True


def test_heavy_modules_are_seen(answers, tmp_path):
    """The probe itself: a program that imports one of them is found out."""
    (tmp_path / "slow.py").write_text("import transformers\n")
    (answer,) = answers([str(tmp_path / "slow.py")])
    assert {"transformers", "torch"} & HEAVY & set(answer["modules"])


def test_help(answers):
    found = answers(*([program, *VERBS.get(program, []), "--help"] for program in PROGRAMS))
    for program, answer in zip(PROGRAMS, found, strict=True):
        assert is_quick(answer) and answer["status"] == 0, program
        manual = (ROOT / program).read_text(encoding="utf-8").split('"""')[1]
        assert manual.splitlines()[0] in answer["output"] and "options:" in answer["output"], program


def test_an_unknown_option(answers):
    found = answers(*([program, *VERBS.get(program, []), "--no_such_option", "1"] for program in PROGRAMS))
    for program, answer in zip(PROGRAMS, found, strict=True):
        assert is_quick(answer) and answer["status"] != 0, program
        assert "no_such_option" in answer["output"] or "required: " in answer["output"], program


def test_a_configuration_with_an_unknown_key(answers, tmp_path):
    (tmp_path / "typo.yaml").write_text("no_such_setting: 1\n")
    found = answers(*([program, *VERBS.get(program, []), "--config", "typo.yaml"] for program in PROGRAMS))
    for program, answer in zip(PROGRAMS, found, strict=True):
        assert is_quick(answer) and answer["status"] == 1 and "typo.yaml" in answer["output"], program


def needed_by(recipe: str) -> list[str]:
    """What a recipe must be given: those that train an adapter further, an adapter."""
    further = recipe.removeprefix("recipes/").startswith(("grpo", "dpo"))
    return ["--adapter", "x"] if further else []


def test_what_recipes_refuse_at_once(answers, tmp_path):
    two = ["recipes/sft_qwen2vl_jp.py", "recipes/sft_blip_vi.py"]  # of either kind: SFTConfig, TrainingArguments
    refused = [
        (two, ["--config", "none.yaml"], "none.yaml"),
        (two, ["--num_train_epochs", "many"], "invalid float value: 'many'"),
        (two, ["--lr_scheduler_type", "cosin"], "invalid choice: 'cosin'"),
        (two, ["--eval_strategy", "no", "--early_stopping_patience", "3"], "rank the model by captions of"),
        (two, ["--output_dir", "hf_" + "a" * 34], "--output_dir holds a token"),
        (two, ["--hub_token", "x"], "--hub_token"),
        (two, ["--push_to_hub", "--hub_model_id", "adapter"], "--hub_model_id adapter: give it as USER/NAME"),
        (two, ["--push_to_hub"], "--push_to_hub needs --hub_model_id USER/NAME"),
        (RECIPES, ["--train_sampling_strategy", "sequential"], "--train_sampling_strategy must stay at its default"),
        (
            two[:1],
            ["--config", "changed.yaml"],
            "--loss_type must stay at its default, 'nll': the loss is the smoothed",
        ),
        (two[:1], ["--attn_implementation", "flash_attention_2"], "flash_attention_2 needs the module flash_attn"),
        (
            two[1:],
            ["--report_to", "mlflow"],
            "report_to: mlflow needs the Python package mlflow, which is not installed",
        ),
        (two, ["--report_to", "trackio"], "which is not installed: install it with `pip install trackio`, or leave"),
        (RECIPES, ["--dataset", "data/none"], "data/none is not a folder"),
        (RECIPES, ["--dataset", "data/one/more/none"], "data/one/more/none is not a folder"),
    ]
    (tmp_path / "changed.yaml").write_text("dataset: x\noutput_dir: x\nloss_type: dft\n")
    commands = [
        (program, words + needed_by(program), message) for programs, words, message in refused for program in programs
    ]
    found = answers(*([program, *words] for program, words, _ in commands))
    for (program, words, message), answer in zip(commands, found, strict=True):
        assert is_quick(answer) and answer["status"] in (1, 2), (program, words)
        assert message in answer["output"], (program, words, answer["output"])


def test_what_a_dataset_lacks_is_named_before_torch(answers, tmp_path):
    """tests/steps/test_early.py has all that it can lack."""
    (tmp_path / "own/data").mkdir(parents=True)
    (tmp_path / "own/README.md").write_text("---\nlicense: mit\n---\n")
    rows = pa.table({"image_id": [1], "file_name": ["1.png"], "captions": [["犬"]]})
    pq.write_table(rows, tmp_path / "own/data/train-0.parquet")
    words = ["--dataset", "own", "--image_dir", ".", "--output_dir", "out", "--tokenizer", "characters"]
    for recipe, answer in zip(
        RECIPES, answers(*([recipe, *words, *needed_by(recipe)] for recipe in RECIPES)), strict=True
    ):
        assert answer["status"] == 1 and "torch" not in answer["modules"], recipe
        assert "own has no split 'test'; it has train. Name one of them with --test_split" in answer["output"]


def test_what_scripts_miss_at_once(answers):
    missing = {
        "scripts/audit_captions.py": ([], "give --predictions FILE"),
        "scripts/bench_training.py": (["--preset", "huge"], "'huge' is none of"),
        "scripts/bench_time_to_quality.py": (["--timing_rounds", "0"], "timing.json does not exist"),
        "scripts/caption.py": (["photo.jpg"], "--adapter, --model or --server are needed"),
        "scripts/eval_captioning.py": ([], "give the references"),
        "scripts/export_model.py": (
            ["--adapter", "x", "--output_dir", "x", "--push_to_hub"],
            "--push_to_hub needs --repo_id user/name",
        ),
        "scripts/human_eval.py": ([], "the first word must be export or import"),
        "scripts/hold_out_captions.py": (["--output_dir", "x"], "give the captions either"),
        "scripts/infer_baseline.py": ([], "--model or --baseline, --dataset and --output are needed"),
        "scripts/pretrain_miniature.py": (["--output_dir", "x", "--model", "t5"], "invalid choice: 't5'"),
        "scripts/publish_datasets.py": (["stair", "--output_dir", "x"], "--source stair needs --tokenizer"),
        "scripts/publish_metric.py": (["--output_dir", "x", "--push_to_hub"], "--push_to_hub needs --repo_id"),
        "scripts/publish_space.py": (["--adapter", "x", "--repo_id", "demo"], "--repo_id demo: give it as USER/NAME"),
        "scripts/push_adapter.py": ([], "the following arguments are required: "),
        "scripts/run_ablation.py": (["--config", "none.yaml"], "none.yaml"),
        "scripts/serve_check.py": (["--model", "none"], "there is no merged model in none"),
    }
    found = answers(*([program, *words] for program, (words, _) in missing.items()))
    for (program, (_, message)), answer in zip(missing.items(), found, strict=True):
        assert is_quick(answer) and answer["status"] in (1, 2) and message in answer["output"], (program, answer)
