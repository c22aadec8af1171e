"""Command lines: the manual as help, and mistakes that end in a message."""

from dataclasses import dataclass, field

import pytest

from vlmcap.arguments import parse


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder to write."})
    steps: int = field(default=3, metadata={"help": "How many."})


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


@pytest.mark.parametrize(("text", "message"), [("stepz: 5", "stepz"), ("- 5", "mapping"), (None, "thing.yaml")])
def test_config_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "thing.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        parse(MANUAL, Arguments, command_line=["--config", str(path), "--output_dir", "a"])
