"""Imports run one way, as recipes/vlmcap/README.md says."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recipes/vlmcap"
# A room imports the rooms before it, and itself.
ROOMS = "data models miniature captioning evaluation rewards training reporting human steps experiments".split()


@functools.cache
def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it: "errors", "data.images", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("vlmcap.") for name in names if name.startswith("vlmcap.")}


def room(module: str) -> str | None:
    first = module.split(".")[0]
    return first if first in ROOMS else None


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_the_rooms_before_it(name):
    allowed = {None, *ROOMS[: ROOMS.index(name) + 1]}
    for path in (PACKAGE / name).rglob("*.py"):
        wrong = {module for module in imported(path) if room(module) not in allowed}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_modules_beside_the_rooms_import_none():
    for path in PACKAGE.glob("*.py"):
        wrong = {module for module in imported(path) if room(module)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_nothing_of_the_package_imports_recipes_or_scripts():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (sft_|recipes|scripts|vlmcap\.(recipes|scripts))", text, re.M), path


def test_no_module_imports_itself_in_a_circle():
    """Two modules of a room that need each other are one module, or two with the wrong wall between them."""
    modules = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    needs = {
        name: {other for other in modules for module in imported(path) if f"{module}.".startswith(f"{other}.")}
        - {name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"imports in a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in needs[name]:
                walk(other, (*above, name))
            done.add(name)

    for name in needs:
        walk(name, ())


def test_the_readme_says_the_same_order():
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    order = re.search(r"Imports run one way: (.*?)\.\s", text, re.S).group(1)
    assert re.findall(r"`(\w+)`", order) == list(ROOMS)


@pytest.mark.parametrize("folder", ["recipes/vlmcap", "recipes", "scripts"])
def test_what_functions_import_is_there(folder):
    """Imports inside functions, which keep command lines quick, fail only when the function runs."""
    files = (ROOT / folder).rglob("*.py") if folder.endswith("vlmcap") else (ROOT / folder).glob("*.py")
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmcap"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{path.relative_to(ROOT)}: {node.module} has no {alias.name}"
