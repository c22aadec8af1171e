"""What the recipes' tests look at in files."""

import json
from pathlib import Path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def captions(path: Path) -> dict[int, str]:
    """Captions of a predictions file by image id."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["image_id"]: line["caption"] for line in lines}


def assert_describes_itself(config: Path) -> None:
    """The command is at the top, and every key says what it is for."""
    text = config.read_text(encoding="utf-8")
    assert "accelerate launch" in text.split("\n\n")[0]
    assert [line for line in text.splitlines() if line and line[0] not in "# " and "#" not in line] == []
