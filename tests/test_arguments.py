"""Command lines: the manual as help, and mistakes that end in a message."""

import re
import signal
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from vlmcap.arguments import parse, run_main
from vlmcap.errors import UserError


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder to write."})
    steps: int = field(default=3, metadata={"help": "How many."})
    rate: float | None = field(default=None, metadata={"help": "How fast."})
    names: list[str] = field(default_factory=list, metadata={"help": "What of."})
    kind: Literal["fast", "slow"] = field(default="fast", metadata={"help": "Which."})
    careful: bool = field(default=False, metadata={"help": "Whether to be."})


MANUAL = "Does a thing.\n\n    python scripts/thing.py --output_dir x\n"


def test_help_begins_with_the_manual(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        parse(MANUAL, Arguments, command_line=["--help"])
    shown = capsys.readouterr().out
    assert MANUAL.strip() in shown and "(default: 3)" in shown


def test_config_and_command_line(tmp_path):
    (tmp_path / "thing.yaml").write_text("output_dir: a\nsteps: 5\n")
    (arguments,) = parse(MANUAL, Arguments, command_line=["--config", str(tmp_path / "thing.yaml"), "--steps", "7"])
    assert (arguments.output_dir, arguments.steps) == ("a", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", "there is no setting 'stepz'"),
        ("- 5", "mapping"),
        (None, ""),
        ("steps: five", None),  # argparse says so
        ("steps: 3.5", "steps must be int, but is 3.5"),
        ("steps: true", "steps must be int, but is True"),
        ("steps: [3]", r"steps must be int, but is \[3\]"),
        ("output_dir: 5", "output_dir must be str, but is 5"),
        ("names: ab", r"names must be list\[str\], but is 'ab'"),
        ("names: [1]", r"names must be list\[str\], but is \[1\]"),
        ("steps: null", "steps must be int, but is None"),
        ("kind: none", r"kind must be Literal\['fast', 'slow'\], but is 'none'"),
        ("rate: {a: 1}", r"rate must be float \| None, but is {'a': 1}"),
        ("careful: 2", "careful must be bool, but is 2"),
        ("env: {PATH: x}", "`env` would set environment variables"),
        ("steps: 1\nsteps: 2", "the key 'steps' occurs twice"),
        ("steps: &a [*a]", "alias"),
        ("steps: !!int ''", "not YAML"),
        ("steps: [", "not YAML"),
    ],
)
def test_config_mistakes_are_named(tmp_path, monkeypatch, capsys, text, message):
    path = tmp_path / "thing.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as refused:
        parse(MANUAL, Arguments, command_line=["--config", str(path), "--output_dir", "a"])
    if message is not None:
        assert re.match(f"error: .*thing.yaml.*{message}", str(refused.value), re.S)
    else:
        assert "--steps: invalid int value: 'five'" in capsys.readouterr().err


@dataclass
class Models:
    model_name_or_path: str = "a/a"
    model_revision: str | None = None
    encoder_name_or_path: str = "b/b"
    encoder_revision: str | None = None


@pytest.mark.parametrize(
    ("words", "revisions"),
    [
        ([], ("c0ffee", "beef")),
        (["--model_name_or_path", "a/model"], ("c0ffee", "beef")),
        (["--model_name_or_path", "a/other"], (None, "beef")),
        (["--model_name_or_path=a/other", "--encoder_name_or_path", "folder"], (None, None)),
        (["--model_name_or_path", "a/other", "--model_revision=main"], ("main", "beef")),
        (["--model_revision", "main"], ("main", "beef")),
    ],
)
def test_a_commit_is_that_of_the_model_beside_it(tmp_path, words, revisions):
    lines = ["model_name_or_path: a/model", "model_revision: c0ffee", "encoder_name_or_path: b/b"]
    (tmp_path / "thing.yaml").write_text("\n".join([*lines, "encoder_revision: beef"]))
    (found,) = parse(MANUAL, Models, command_line=["--config", str(tmp_path / "thing.yaml"), *words])
    assert (found.model_revision, found.encoder_revision) == revisions


def test_config_without_a_file():
    with pytest.raises(SystemExit, match="error: --config needs a file"):
        parse(MANUAL, Arguments, command_line=["--output_dir", "a", "--config"])


def test_numbers_may_be_texts_and_null_is_the_default(tmp_path):
    path = tmp_path / "thing.yaml"
    path.write_text("output_dir: a\nrate: 1e-4\nsteps: '4'\nnames: [x, y]\nkind: slow\ncareful: true\n")
    (arguments,) = parse(MANUAL, Arguments, command_line=["--config", str(path)])
    assert arguments == Arguments("a", 4, 1e-4, ["x", "y"], "slow", True)
    path.write_text("output_dir: a\nrate: null\n")
    (arguments,) = parse(MANUAL, Arguments, command_line=["--config", str(path)])
    assert arguments.rate is None


@pytest.mark.parametrize(("words", "steps"), [([], 5), (["--steps", "7"], 7), (["--config", "other.yaml"], 6)])
def test_a_program_may_have_a_configuration_of_its_own(tmp_path, monkeypatch, words, steps):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("output_dir: a\nsteps: 5\n")
    (tmp_path / "other.yaml").write_text("output_dir: a\nsteps: 6\n")
    seen = []
    run_main(seen.append, MANUAL, Arguments, command_line=words, config=tmp_path / "own.yaml")
    assert seen[0].steps == steps


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("a.json: no caption. Add one."), "a.json: no caption. Add one."),
        (OSError(28, "No space left", "a"), "--output_dir a: No space left"),
        (OSError(28, "No space left", "a/b"), "--output_dir a: a/b No space left"),
        (OSError(28, "No space left", "elsewhere"), "elsewhere: No space left"),
        (OSError("no words of the system's"), "no words of the system's"),
    ],
)
def test_what_the_user_can_fix_ends_with_its_message(error, message):
    def main(arguments: Arguments) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main, MANUAL, Arguments, command_line=["--output_dir", "a"])
    assert ended.value.code == f"error: {message}"


def test_ctrl_c_ends_with_a_line_and_its_status(monkeypatch, capsys):
    def main(arguments: Arguments) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
    try:
        for rank in ("0", "1"):  # one process of several speaks
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as ended:
                run_main(main, MANUAL, Arguments, command_line=["--output_dir", "a"], interrupted="Do it again.")
            assert ended.value.code == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nInterrupted. Do it again.\n"


def test_programs_that_continue_say_so_when_ctrl_c_ends_them(repo_root):
    programs = [*repo_root.glob("scripts/*.py"), *repo_root.glob("recipes/sft_*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in programs}
    promising = re.compile(r"[Gg]iven again|same command|interrupted (run|one)")
    for name, text in texts.items():
        assert bool(promising.search(text.split('"""')[1])) <= ("interrupted=" in text), name
        assert "run_main(" in text, f"{name}: run_main turns Ctrl-C into a line"


def test_windows_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="error: Windows is not supported .*: use Linux, or WSL 2"):
        run_main(pytest.fail, MANUAL, Arguments, command_line=["--output_dir", "a"])


def test_other_errors_keep_their_traceback():
    def main(arguments: Arguments) -> None:
        raise KeyError("scores")

    with pytest.raises(KeyError):
        run_main(main, MANUAL, Arguments, command_line=["--output_dir", "a"])
