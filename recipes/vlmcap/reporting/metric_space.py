"""The metric of recipes/metric_space as a Space of the Hub: one folder that needs no installed vlmcap."""

import re
import shlex
import shutil
from pathlib import Path

import vlmcap
from vlmcap import evaluation
from vlmcap.places import ROOT
from vlmcap.upload import push_folder

NAME = "japanese_caption_metrics"
SOURCE = ROOT / "recipes" / "metric_space" / NAME
# The scorer and what it imports: modules of vlmcap.evaluation and of vlmcap itself.
MODULES = {
    name: evaluation.__path__[0]
    for name in ("bootstrap", "caption_files", "external", "metrics", "register", "scoring", "tokenise")
} | {name: vlmcap.__path__[0] for name in ("atomic_write", "errors", "strict_parsing")}
IMPORT = re.compile(r"^from vlmcap\.(?:evaluation\.)?(?=\w+ import)", re.MULTILINE)
IMPORT_MODULE = re.compile(r"^from vlmcap\.evaluation import (\w+)$", re.MULTILINE)


def write_metric_space(output_dir: str | Path, repo_id: str | None = None) -> Path:
    """Writes the metric and copies of vlmcap's modules to a folder that `evaluate.load` takes; returns the folder.

    evaluate loads `<folder>/<folder's name>.py`, so the folder is `output_dir`/NAME, or has the name of `repo_id`.
    evaluate copies only the siblings that this script imports itself, so it imports all of them.
    """
    name = repo_id.split("/")[1] if repo_id else NAME
    folder = Path(output_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for module, place in MODULES.items():
        text = (Path(place) / f"{module}.py").read_text(encoding="utf-8")
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
    return IMPORT.sub("from .", IMPORT_MODULE.sub(r"from . import \1", text))


def push_metric_space(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Pushes a folder of `write_metric_space` to the Space `repo_id` in one commit; returns its URL.

    Raises PushError when the Hub refuses or cannot be reached, and when an existing Space has the other visibility.
    """
    command = ["python", "scripts/publish_metric.py", "--output_dir", str(Path(folder).parent), "--push_to_hub"]
    command += ["--repo_id", repo_id] + ([] if private else ["--public"])
    url, _ = push_folder(folder, repo_id, "space", private, "Upload the metric and its page", shlex.join(command))
    return url
