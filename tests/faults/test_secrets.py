"""A planted Hub token is in nothing that a run leaves, says or starts, whether the run ends well or not."""

import base64
import json
import os
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from vlmcap.arguments import parse
from vlmcap.credentials import CredentialError, redact, refuse_credentials
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.provenance import public_name
from vlmcap.training.trainer_arguments import CaptionSFTConfig

TOKEN = "hf_" + "PlantedSecretThatNoFileMayHold9876"
# Every process of a run writes the command lines of those that it starts into a file.
WATCH = """
import os, sys

def watch(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        with open(os.environ["COMMAND_LINES"], "a") as file:
            file.write(f"{event} {args[:2]}\\n")

sys.addaudithook(watch)
"""
SETTINGS = (
    "--config recipes/configs/sft_qwen2vl_jp/demo.yaml --max_steps 2 --save_steps 2 --eval_steps 2 --logging_steps 1"
    " --load_in_4bit false --max_new_tokens 8 --max_validation_images 2 --max_train_images 6 --report_to none"
).split()


@pytest.fixture
def world(hub, tmp_path, monkeypatch):
    """Environment of a run: the token is known to the hub, caches and command lines are under tmp_path."""
    monkeypatch.setitem(hub.users, TOKEN, {"name": "user", "role": "write"})
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_TOKEN")}
    environment |= {
        "HF_HOME": str(tmp_path / "hf_home"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path / "watch"), os.environ.get("PYTHONPATH")))),
        "COMMAND_LINES": str(tmp_path / "command_lines.txt"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    (tmp_path / "tmp").mkdir()
    return environment


def run(repo_root: Path, environment: dict, *command) -> subprocess.CompletedProcess:
    """A script; what it said is kept in a file beside what it left."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    with Path(environment["COMMAND_LINES"]).with_name("output.txt").open("a") as file:
        file.write(f"{done.stdout}\n{done.stderr}\n")
    return done


def holding(folder: Path, token: str) -> list[str]:
    """Files under a folder that hold the token, as it is or in base64, also half of it."""
    encoded = [base64.b64encode(token[shift:].encode()).strip(b"=")[:-2] for shift in range(3)]
    needles = [token.encode(), token[3:].encode(), token[: len(token) // 2].encode(), *encoded]
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(needle in path.read_bytes() for needle in needles):
            found.append(str(path.relative_to(folder)))
        assert token not in path.name
    return found


def publish(repo_root, environment, tmp_path) -> subprocess.CompletedProcess:
    scenes = tmp_path / "scenes"
    write_scene_dataset(scenes, train=24, validation=2, test=2)
    words = ["--source", "stair", "--tokenizer", "recipes/miniatures/qwen2_vl", "--output_dir", tmp_path / "dataset"]
    words += ["--annotations", scenes / "stair_train.json", scenes / "stair_val.json"]
    words += ["--yj_annotations", scenes / "yj.json", "--images", scenes / "images"]
    words += ["--val_ids", scenes / "val_ids.txt", "--test_ids", scenes / "test_ids.txt"]
    words += ["--push_to_hub", "--repo_id", "user/scenes"]
    return run(repo_root, environment, "scripts/publish_datasets.py", *words)


def recipe(folder: Path) -> list:
    command = ["recipes/sft_qwen2vl_jp.py", *SETTINGS, "--dataset", "user/scenes"]
    return [*command, "--output_dir", folder / "run", "--instances", folder / "scenes/instances.json"]


def test_a_token_of_the_environment_is_nowhere(fault, world, repo_root, tmp_path):
    """Dataset and adapter are published; every file is searched, checkpoints and caches among them."""
    environment = world | {"HF_TOKEN": TOKEN}
    with fault("a token planted in the environment of a run that publishes"):
        published = publish(repo_root, environment, tmp_path)
        assert published.returncode == 0, published.stderr
        done = run(repo_root, environment, *recipe(tmp_path), "--push_to_hub", "--hub_model_id", "user/adapter")
        assert done.returncode == 0, done.stderr
        assert HfApi(token=TOKEN).model_info("user/adapter").private
        names = {path.name for path in (tmp_path / "run").rglob("*")}
        assert {"trainer_state.json", "metrics.json", "README.md", "samples.html", "predictions.run.json"} <= names
        assert "training_args.bin" not in names
        assert "git" in (tmp_path / "command_lines.txt").read_text()  # the watch works
        assert holding(tmp_path, TOKEN) == []


def test_a_token_of_the_login_is_only_in_its_file(fault, world, repo_root, tmp_path):
    """A run that ends with a traceback, after checkpoints were written."""
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home/token").write_text(TOKEN)
    with fault("a token planted in the login of a run that fails"):
        assert publish(repo_root, world, tmp_path).returncode == 0
        command = recipe(tmp_path)
        command += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--early_stopping_patience", 0]
        command += ["--push_to_hub", "--hub_model_id", "user/adapter", "--num_beams", -1]
        done = run(repo_root, world, *command)
        assert done.returncode == 1 and "Traceback" in done.stderr
        assert list((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
        assert holding(tmp_path, TOKEN) == ["hf_home/token"]


def test_a_refused_push_does_not_say_the_token(fault, world, repo_root, hub, tmp_path, monkeypatch):
    for reason, answer in (
        ("another's namespace", "user can push to user only"),
        ("unknown token", "does not say who you are"),
    ):
        with fault(f"a planted token that may not push: {reason}"):
            if reason == "unknown token":
                monkeypatch.delitem(hub.users, TOKEN)
            command = ["recipes/sft_qwen2vl_jp.py", *SETTINGS, "--dataset", "user/scenes", "--output_dir"]
            command += [tmp_path / "run", "--push_to_hub", "--hub_model_id", "other/adapter"]
            done = run(repo_root, world | {"HF_TOKEN": TOKEN}, *command)
            said = done.stderr.splitlines()[-1]
            assert done.returncode == 1 and said.startswith("error: ") and answer in said
            assert holding(tmp_path, TOKEN) == []


CREDENTIALS = {
    "hub_token": ("--hub_token", TOKEN),
    "a token as a name": ("--hub_model_id", f"user/{TOKEN}"),
    "an address with user and password": ("--output_dir", "https://user:secret@example.org/run"),
    "an address with a token": ("--run_name", f"https://example.org/?token={TOKEN}"),
}


@pytest.mark.parametrize("words", CREDENTIALS.values(), ids=CREDENTIALS)
def test_no_option_takes_a_token(fault, words, capsys):
    with fault(f"a token given as {words[0]}"):
        defaults = ["--output_dir", "run"] if words[0] != "--output_dir" else []
        with pytest.raises(SystemExit) as stopped:
            parse("", CaptionSFTConfig, command_line=[*defaults, *words])
        said = f"{stopped.value}{capsys.readouterr()}"
        assert str(stopped.value).startswith(f"error: {words[0]}") and "hf auth login" in said
        assert TOKEN not in said and "secret" not in said


def test_a_mistyped_option_does_not_say_the_token(fault, capsys):
    with fault("a token given to an option that does not exist"):
        with pytest.raises(SystemExit) as stopped:
            parse("", CaptionSFTConfig, command_line=["--output_dir", "run", "--hub_tokn", TOKEN])
        assert TOKEN not in f"{stopped.value}{capsys.readouterr()}"


def test_ordinary_settings_are_no_credentials():
    group = make_dataclass("Group", [("value", str), ("eos_token", str), ("hub_token", str)])
    names = [
        "user/data",
        "Qwen/Qwen2-VL-2B-Instruct",
        "a@b.org",
        "/home/me/hf_cache",
        "https://example.org/@me",
        "hf_x",
    ]
    for name in names:
        refuse_credentials(group(name, "<|im_end|>", None))
        assert redact(name) == public_name(name) == name or name.startswith("/")
    with pytest.raises(CredentialError, match="--value"):
        refuse_credentials(group("https://me:pw@example.org/x", "", None))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Bearer {TOKEN}", "Bearer REDACTED"),
        ("https://me:pw@host/x", "https://REDACTED@host/x"),
        ("https:/me:pw@host/x", "https:/REDACTED@host/x"),
        ("GET https://s3/x?X-Amz-Signature=ab12&a=1", "GET https://s3/x?X-Amz-Signature=REDACTED&a=1"),
        (
            "https://cdn/x?Expires=1&Signature=zz~z&Policy=K",
            "https://cdn/x?Expires=1&Signature=REDACTED&Policy=REDACTED",
        ),
        (json.dumps({"url": f"https://h/?token={TOKEN}"}), '{"url": "https://h/?token=REDACTED"}'),
    ],
)
def test_redacted(text, shown):
    assert redact(text) == shown
