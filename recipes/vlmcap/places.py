"""Where the project's own files are: templates, configurations, recipes and scripts.

In a clone they lie in the folders of its root. An installed package holds the same folders, see `package_dir` in
setup.cfg, but for what a clone alone has: miniatures, tests, figures. `python -m vlmcap.places` prints their folder:

    accelerate launch --config_file "$(python -m vlmcap.places)/accelerate_configs/t4.yaml" \\
        -m vlmcap.recipes.sft_qwen2vl_jp --config recipes/configs/sft_qwen2vl_jp/t4.yaml
"""

import os
from pathlib import Path

from vlmcap.errors import UserError

PACKAGE = Path(__file__).parent
INSTALLED = (PACKAGE / "model_cards").is_dir()
ROOT = PACKAGE if INSTALLED else PACKAGE.parents[1]
MINIATURES = "recipes/miniatures"


def own_file(path: str) -> str:
    """`path` as it is; where there is none, the project's file of that name, as in recipes/configs/baselines.yaml."""
    if not os.path.exists(path):
        for own in (ROOT / path, PACKAGE / path.removeprefix("recipes/vlmcap/")):
            if os.path.isfile(own):
                return str(own)
    return path


def script(name: str) -> str:
    """What starts a script: `python scripts/NAME.py` in a clone, else `python -m vlmcap.scripts.NAME`."""
    return f"python -m vlmcap.scripts.{name}" if INSTALLED else f"python scripts/{name}.py"


def paths_root() -> Path:
    """What records and cards take relative paths from: the clone, or the working folder of an installed package."""
    return Path.cwd() if INSTALLED else ROOT


def miniature(name: str) -> Path:
    """The folder of a committed miniature.

    Raises:
        UserError: the package was installed without the clone, which alone has it.
    """
    folder = ROOT / MINIATURES / name
    if not folder.is_dir():
        raise UserError(f"{MINIATURES}/{name} is in a clone of the project alone: run this in the root of one")
    return folder


if __name__ == "__main__":
    print(ROOT)
