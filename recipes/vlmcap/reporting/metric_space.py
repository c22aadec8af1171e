"""The metric of recipes/metric_space as a Space of the Hub: one folder that needs no installed vlmcap."""

import re
import shutil
from pathlib import Path

import httpx2
from huggingface_hub import HfApi

from vlmcap import evaluation
from vlmcap.reporting.hub import PushError

NAME = "japanese_caption_metrics"
SOURCE = Path(__file__).parents[3] / "recipes" / "metric_space" / NAME
# Of vlmcap.evaluation: the scorer and what it imports.
MODULES = ("bootstrap", "external", "metrics", "register", "scoring", "tokenise")
IMPORT = re.compile(r"^from vlmcap\.evaluation\.", re.MULTILINE)
IMPORT_MODULE = re.compile(r"^from vlmcap\.evaluation import (\w+)$", re.MULTILINE)


def write_metric_space(output_dir: str | Path, repo_id: str | None = None) -> Path:
    """Writes the metric and copies of vlmcap's modules to a folder that `evaluate.load` takes; returns the folder.

    evaluate loads `<folder>/<folder's name>.py`, so the folder is `output_dir`/NAME, or bears the name of `repo_id`.
    evaluate copies only the siblings that this script imports itself, so it imports all of them.
    """
    name = repo_id.split("/")[1] if repo_id else NAME
    folder = Path(output_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for module in MODULES:
        text = (Path(evaluation.__path__[0]) / f"{module}.py").read_text(encoding="utf-8")
        (folder / f"{module}.py").write_text(_with_relative_imports(text), encoding="utf-8")
    for file in ("README.md", "app.py"):
        text = (SOURCE / file).read_text(encoding="utf-8")
        text = text.replace(f"you/{NAME}", repo_id or f"you/{NAME}").replace(f"./{NAME}.py", f"./{name}.py")
        (folder / file).write_text(text, encoding="utf-8")
    shutil.copy(SOURCE / "requirements.txt", folder)
    metric = _with_relative_imports((SOURCE / f"{NAME}.py").read_text(encoding="utf-8"))
    siblings = "\n".join(f"from .{module} import __doc__ as _{module}" for module in MODULES if module != "scoring")
    metric = metric.replace("from .scoring import", f"{siblings}\nfrom .scoring import", 1)
    (folder / f"{name}.py").write_text(metric, encoding="utf-8")
    return folder


def _with_relative_imports(text: str) -> str:
    return IMPORT_MODULE.sub(r"from . import \1", IMPORT.sub("from .", text))


def push_metric_space(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Pushes a folder of `write_metric_space` to the Space `repo_id` in one commit; returns its URL.

    Raises PushError when the Hub refuses or cannot be reached, and when an existing Space has the other visibility.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if api.repo_info(repo_id, repo_type="space").private != private:
            raise ValueError(f"the Space exists and is not {'private' if private else 'public'}, as was asked for")
        api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Upload the metric and its page"
        )
    # The errors of a push: see vlmcap.reporting.hub.push_adapter.
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PushError(f"pushing {folder} to the Space {repo_id} failed: {error}") from error
    return str(url)
