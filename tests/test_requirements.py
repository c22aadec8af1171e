"""setup.cfg declares every package that is imported: what another one happens to bring may be gone tomorrow."""

import ast
import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

# Not imported in our environment: by programs in environments of their own, and by pages that run on the Hub.
ELSEWHERE = ("recipes/vlmcap/captioning/isolated_runners", "recipes/caption_space", "recipes/metric_space")
# `make fuzz` installs it where it is available, and does without where not.
OPTIONAL = {"atheris"}
OURS = {"vlmcap", "tests"}
DISTRIBUTIONS = metadata.packages_distributions()


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(repo_root: Path, extras: bool = False, tests: bool = False) -> set[str]:
    """What every installation has; `extras`: with the optional packages, `tests`: with those of the tests too."""
    config = configparser.ConfigParser()
    config.read(repo_root / "setup.cfg", encoding="utf-8")
    optional = dict(config["options.extras_require"]) if extras or tests else {}
    lists = [config["options"]["install_requires"]]
    lists += [text for extra, text in optional.items() if tests or extra != "test"]
    lines = [line for text in lists for line in text.split("\n") if line and not line.startswith("#")]
    return {normalised(re.match(r"[\w.-]+", line)[0]) for line in lines}


def imported(folder: Path) -> dict[str, Path]:
    """The top names that a folder's files import in our environment, each with one of the files."""
    found = {}
    for path in folder.rglob("*.py"):
        if any(elsewhere in path.as_posix() for elsewhere in ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                names = [ast.literal_eval(node.args[0])]
            else:
                continue
            found |= {name.split(".")[0]: path for name in names}
    return found


@pytest.mark.parametrize("folder", ["recipes", "scripts", "tests"])
def test_every_imported_package_is_declared(repo_root, folder):
    known = declared(repo_root, extras=True, tests=folder == "tests")
    undeclared = {
        name: str(path.relative_to(repo_root))
        for name, path in imported(repo_root / folder).items()
        if name not in sys.stdlib_module_names | OPTIONAL | OURS
        and known.isdisjoint(map(normalised, DISTRIBUTIONS.get(name, [name])))
    }
    assert undeclared == {}, "declare these in setup.cfg"


def test_a_user_needs_no_extra(repo_root):
    """An import at the head of a module would need what `make setup` leaves out."""
    extra = declared(repo_root, tests=True) - declared(repo_root)
    for folder in ("recipes", "scripts"):
        for path in (repo_root / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
            names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
            for name in names:
                needed = set(map(normalised, DISTRIBUTIONS.get(name.split(".")[0], [])))
                assert not needed or not needed <= extra, f"{path} imports {name}"


def test_constraints_hold_every_declared_package(repo_root):
    lines = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if "==" in line}
    assert declared(repo_root, tests=True) - pinned == set()


def test_this_python_is_one_that_was_tried(repo_root):
    config = configparser.ConfigParser()
    config.read(repo_root / "setup.cfg", encoding="utf-8")
    tried = re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"])
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in tried
    first, last = tried[0], tried[-1].split(".")
    assert config["options"]["python_requires"] == f">={first},<{last[0]}.{int(last[1]) + 1}"
