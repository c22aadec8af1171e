"""Where the project's own files are: templates, configurations, recipes and scripts.

In a clone they are in the folders of its root. An installed package holds the same folders, see `package_dir` in
setup.cfg, except for what only a clone has: miniatures, tests, figures. `python -m vlmcap.places` prints their folder:

    accelerate launch --config_file "$(python -m vlmcap.places)/accelerate_configs/t4.yaml" \\
        -m vlmcap.recipes.sft_qwen2vl_jp --config recipes/configs/sft_qwen2vl_jp/t4.yaml
"""

import os
import re
import shutil
from pathlib import Path

from vlmcap.errors import UserError

PACKAGE = Path(__file__).parent
INSTALLED = (PACKAGE / "model_cards").is_dir()
ROOT = PACKAGE if INSTALLED else PACKAGE.parents[1]
MINIATURES = "recipes/miniatures/"


def own_file(path: str) -> str:
    """`path` as it is; where there is none, the project's file of that name, as in recipes/configs/baselines.yaml."""
    if not os.path.exists(path):
        for own in (ROOT / path, PACKAGE / path.removeprefix("recipes/vlmcap/")):
            if os.path.isfile(own):
                return str(own)
    return path


def as_typed_here(text: str) -> str:
    """A manual or message whose commands are those of a clone; in an installed package, with those that work there."""
    if not INSTALLED:
        return text
    text = re.sub(r"(?<![\w/])(?:python )?scripts/(\w+)\.py\b", r"python -m vlmcap.scripts.\1", text)
    text = re.sub(r"(\baccelerate launch\b[^\n]*?) recipes/(\w+)\.py\b", r"\1 -m vlmcap.recipes.\2", text)
    return text.replace(" accelerate_configs/", f" {ROOT / 'accelerate_configs'}/")


def paths_root() -> Path:
    """What records and cards take relative paths from: the clone, or the working folder of an installed package."""
    return Path.cwd() if INSTALLED else ROOT


def check_miniature(name: str) -> None:
    """Raises UserError where the model `name` is a committed miniature, and is not here: a clone alone has them."""
    if MINIATURES in name and not os.path.exists(name):
        raise UserError(
            f"there is no {name}: the miniatures are in a clone of the project alone, run this in its root"
        )


def find_uv() -> str:
    """uv from PATH, or the one that `make setup` puts into the clone.

    Raises:
        UserError: there is neither.
    """
    own = ROOT / ".uv/bin/uv"
    found = shutil.which("uv") or (str(own) if own.exists() else None)
    if found is None:
        raise UserError("uv is needed, and is not on the PATH: `pip install uv`, or `make setup` in the clone")
    return found


if __name__ == "__main__":
    print(ROOT)
