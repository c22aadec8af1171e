"""The list of what this project overrides inside its libraries is whole, and fits the libraries that are installed.

After an upgrade the tests here fail by name, before a user's long run does.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from vlmcap.versions import TESTED, minor, untested_versions

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "recipes/vlmcap/library_overrides.yaml"
ENTRIES = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
FIELDS = ["how", "where", "why", "upstream", "removed", "written_for"]
SOURCE = [path for folder in ("recipes", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
LIBRARIES = {*TESTED, "datasets", "huggingface_hub", "safetensors", "tokenizers"}


# What is installed ---------------------------------------------------------------------------------------------------
def find(name: str):
    """The function, class, property or module of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def signature(found) -> str:
    """Names and kinds of the parameters. Annotations and defaults print differently from one Python to the next."""
    if isinstance(found, property) or inspect.ismodule(found):
        return "property" if isinstance(found, property) else "module"
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else ...)
        for p in inspect.signature(found).parameters.values()
    ]
    return str(inspect.Signature(parameters)).replace("Ellipsis", "...")


def source(found) -> str:
    """The code without docstrings, comments on lines of their own, blank lines and the indentation of the whole."""
    parts = [found.fget, found.fset] if isinstance(found, property) else [found]
    kept = []
    for part in filter(None, parts):
        text = textwrap.dedent(inspect.getsource(part))
        dropped = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
                dropped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        lines = [line.rstrip() for number, line in enumerate(text.splitlines(), 1) if number not in dropped]
        kept += [line for line in lines if line and not line.lstrip().startswith("#")]
    return "\n".join(kept)


def digest(found) -> str:
    return hashlib.sha256(f"{signature(found)}\n{source(found)}".encode()).hexdigest()


WRITTEN_FOR = [(key, name) for key, entry in ENTRIES.items() for name in entry["written_for"]]


@pytest.mark.parametrize(("key", "name"), WRITTEN_FOR, ids=[f"{key}-{name}" for key, name in WRITTEN_FOR])
def test_the_library_is_the_one_the_code_was_written_for(key, name):
    entry, library = ENTRIES[key], name.split(".")[0]
    known = entry["written_for"][name]
    version, where = metadata.version(library), " and ".join(entry["where"])
    try:
        found = find(name)
    except (AttributeError, ModuleNotFoundError):
        pytest.fail(f"{library} {version} has no {name}, for which {key} in {where} was written.", pytrace=False)
    changed = []
    if signature(found) != known["signature"]:
        changed.append(f"its signature was {known['signature']} and is {signature(found)}")
    if digest(found) not in known.values():
        changed.append("its source is another")
    if changed:
        versions = ", ".join(version for version in known if version != "signature")
        pytest.fail(
            f"{name} is not what {key} in {where} was written for ({library} {versions}, installed is {version}):"
            f" {' and '.join(changed)}.\n"
            f"Why it is there: {entry['why']}\n"
            f"Read what changed in {name} between the versions, and adapt {where} if need be. Run tests/training,"
            " tests/invariants, tests/models, tests/recipes, tests/captioning/test_generate.py and"
            f" tests/captioning/test_baselines_native.py. Then write under {name} in {TABLE.relative_to(ROOT)}\n"
            f'      "{minor(version)}": {digest(found)}\n'
            f"with signature: {signature(found)}, and add {version} to TESTED in recipes/vlmcap/versions.py and to the"
            " bounds in setup.cfg.",
            pytrace=False,
        )


# The list against our source -----------------------------------------------------------------------------------------
def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


class Code:
    """What our source says of libraries' insides, found without importing it.

    Attributes:
        private: (file, line, name) of private names that are not ours: attributes, keywords, imports, names for
            `getattr` and `setattr`; and of `forward` where a foreign object's is replaced.
        overridden: (file, line, name) of private and public methods and attributes of library classes that a class of
            ours, or another one beside it in a subclass, defines again.
    """

    def __init__(self, files: dict[str, str]):
        self.trees = {file: ast.parse(text) for file, text in files.items()}
        self.imports = {file: dict(self._imported(tree)) for file, tree in self.trees.items()}
        self.classes = [
            (file, node)
            for file, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        ]
        self.bases = {node: [self._resolve(file, base) for base in node.bases] for file, node in self.classes}
        self.foreign = {node: self._foreign(node) for _, node in self.classes}
        for _, node in self.classes:  # what is beside a mixin, as in class X(Mixin, Trainer)
            for parent in self._ours(node):
                self.foreign[parent] |= self.foreign[node]
        self.overridden = list(self._overridden())
        self.private = list(self._private())

    @staticmethod
    def _imported(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.asname or alias.name.split(".")[0], (alias.name, None)) for alias in node.names)

    def _resolve(self, file, base):
        """The node of a class of ours, a library's class, or None."""
        if isinstance(base, ast.Subscript):
            base = base.value
        module, name = self.imports[file].get(ast.unparse(base).split(".")[0], (None, None))
        if module is None or module.split(".")[0] == "vlmcap":
            ours = [node for _, node in self.classes if node.name == (name or ast.unparse(base))]
            return ours[0] if ours else None
        if module.split(".")[0] not in LIBRARIES:
            return None
        return find(".".join([module, name] if name else [module, *ast.unparse(base).split(".")[1:]]))

    def _ours(self, node):
        for base in self.bases[node]:
            if isinstance(base, ast.ClassDef):
                yield base
                yield from self._ours(base)

    def _foreign(self, node):
        nodes = [node, *self._ours(node)]
        return {base for node in nodes for base in self.bases[node] if isinstance(base, type)}

    def _overridden(self):
        for file, node in self.classes:
            # Callbacks' hooks and the fields of configurations are there to be set.
            library = [
                cls
                for base in self.foreign[node]
                for cls in base.__mro__
                if cls.__module__.split(".")[0] in LIBRARIES and cls.__name__ != "TrainerCallback"
            ]
            for statement in node.body:
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                names = [statement.name] if isinstance(statement, ast.FunctionDef) else []
                names += [t.id for t in targets if isinstance(t, ast.Name) and is_private(t.id)]
                for name in names:
                    if not name.endswith("__") and any(name in vars(cls) for cls in library):
                        yield file, statement.lineno, name

    def _own(self):
        """Private names that our source defines. Those that a trainer of ours sets may be its parent's."""
        inside = {}
        for _, node in self.classes:
            if self.foreign[node]:
                modules = {cls.__module__ for base in self.foreign[node] for cls in base.__mro__}
                modules = {name for name in modules if name.split(".")[0] in LIBRARIES}
                text = "\n".join(inspect.getsource(sys.modules[name]) for name in modules)
                inside |= dict.fromkeys(ast.walk(node), set(re.findall(r"\b_\w+", text)))
        for tree in self.trees.values():
            for node in ast.walk(tree):
                name = None
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    name = node.name
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    name = node.id
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    name = node.attr if ast.unparse(node.value) == "self" else None
                if name and name not in inside.get(node, ()):
                    yield name

    def _private(self):
        own = set(self._own())
        standard = sys.stdlib_module_names
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                names = []
                if isinstance(node, ast.Attribute):
                    root = ast.unparse(node).split(".")[0]
                    module, _ = self.imports[file].get(root, (root, None))
                    if module.split(".")[0] not in standard:
                        names = [node.attr]
                    patched = isinstance(node.ctx, ast.Store) and node.attr == "forward"
                    if patched:
                        yield file, node.lineno, "forward"
                elif isinstance(node, ast.Call):
                    names = [keyword.arg or "" for keyword in node.keywords]
                    if ast.unparse(node.func) in ("getattr", "setattr", "hasattr") and len(node.args) > 1:
                        names += [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
                elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in (
                    *standard,
                    "vlmcap",
                    "__future__",
                ):
                    names = [*(alias.name for alias in node.names), *(node.module or "").split(".")]
                yield from ((file, node.lineno, name) for name in names if is_private(name) and name not in own)


@pytest.fixture(scope="module")
def code():
    return Code({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCE})


# Of the standard library, on an object whose type the source does not name: ProcessPoolExecutor in bench_data.py.
STANDARD = {"_processes"}


def test_no_private_name_is_missing_from_the_list(code):
    found = {(name, file, line) for file, line, name in code.private + code.overridden if name not in STANDARD}
    missing = [
        f"{file}:{line}: {name}"
        for name, file, line in sorted(found)
        if name not in ENTRIES or file not in ENTRIES[name]["where"]
    ]
    assert not missing, (
        f"not in {TABLE.relative_to(ROOT)}, or not with this file under `where` (add an entry; if the name is ours,"
        " give it one that the library does not use):\n" + "\n".join(missing)
    )


def test_the_trainers_overrides_are_found(code):
    """The nine that the list began with: none is found if the walk over mixins breaks."""
    found = {name for file, _, name in code.overridden if file.startswith("recipes/vlmcap/training/")}
    assert found >= {
        "_get_num_items_in_batch",
        "_get_output_dir",
        "_get_train_sampler",
        "_init_training_state",
        "_load_best_model",
        "_load_from_checkpoint",
        "_run_epoch",
        "_save",
        "_save_checkpoint",
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from transformers import Trainer\nclass X(Trainer):\n    def _save(self): pass", {"_save"}),
        (
            "from trl import SFTTrainer\nclass A:\n    def _wrap_model(self): pass\nclass X(A, SFTTrainer): pass",
            {"_wrap_model"},
        ),
        ("import transformers\nclass X(transformers.Trainer):\n    def log(self): pass", {"log"}),
        ("from transformers import Trainer\nclass X(Trainer):\n    def f(self): self._tr_loss = 0", {"_tr_loss"}),
        ("from transformers import Trainer\nclass X(Trainer):\n    def _mine(self): self._mine()", set()),
        ("class X:\n    def __init__(self): self._mine = 1\n    def f(self): return self._mine", set()),
        ("def f(model): model.config._flash = 1", {"_flash"}),
        ("def f(model): setattr(model, '_flash', 1)", {"_flash"}),
        ("def f(model): model.forward = None", {"forward"}),
        ("from peft.utils import _secret", {"_secret"}),
        ("from peft._inner import name", {"_inner"}),
        ("def f(g): g(_quiet=True)", {"_quiet"}),
        ("import os\nos._exit(0)", set()),
        (
            "from transformers import TrainerCallback\n"
            "class X(TrainerCallback):\n    def on_save(self, args, state, control): pass",
            set(),
        ),
    ],
)
def test_what_the_walk_finds(text, names):
    code = Code({"a.py": text})
    assert {name for _, _, name in code.private + code.overridden} == names


@pytest.mark.parametrize("key", ENTRIES)
def test_an_entry_is_whole_and_still_used(key):
    entry = ENTRIES[key]
    assert list(entry) == FIELDS
    assert all(entry[field] for field in FIELDS if field != "upstream")
    for file in entry["where"]:
        used = re.search(rf"(?<!\w){key}(?!\w)", (ROOT / file).read_text(encoding="utf-8"))
        assert used, f"{file} no longer has {key}: remove it from {TABLE.relative_to(ROOT)}"
    for name, known in entry["written_for"].items():
        library = name.split(".")[0]
        assert library in LIBRARIES
        versions = [version for version in known if version != "signature"]
        assert versions
        if library in TESTED:
            assert set(versions) <= set(map(minor, TESTED[library]))


# Versions ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("library", TESTED)
def test_bounds_are_the_tested_minor_versions(library):
    """setup.cfg accepts the first tested minor version to the last, and constraints.txt holds one of them."""
    versions = [tuple(map(int, version.split("."))) for version in TESTED[library]]
    (major, first), (_, last) = versions[0][:2], versions[-1][:2]
    assert [version[:2] for version in versions] == [(major, number) for number in range(first, last + 1)]
    lower = ".".join(map(str, versions[0])).removesuffix(".0")
    declared = re.search(rf"^    {library}(\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert declared == f">={lower},<{major}.{last + 1}"
    pinned = re.search(rf"^{library}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert pinned in TESTED[library]


@pytest.fixture
def other_version(tmp_path):
    """other_version("trl", "9.9.9"): an environment for a script in which that is installed, by what pip writes."""

    def claim(**versions: str) -> dict[str, str]:
        for library, version in versions.items():
            folder = tmp_path / f"{library}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")
        return {"PYTHONPATH": str(tmp_path)}

    return claim


def test_another_version_prints_one_line(run_script, other_version, tmp_path):
    """Of a script that begins, and not of its help. Another patch of a tested minor version prints nothing."""
    environment = other_version(trl="9.9.9", peft="0.0.1", accelerate="1.15.99")
    arguments = ("draw_scenes.py", "--output_dir", tmp_path / "scenes", "--train", 2, "--validation", 1, "--test", 1)
    done = run_script(*arguments, env=environment, fresh=True)
    notes = [line for line in done.stderr.splitlines() if line.startswith("Note:")]
    assert notes == [
        "Note: trl 9.9.9 is installed, and tested is 1.16.0; peft 0.0.1 is installed, and tested is 0.21.2."
        " Results may differ."
    ]
    second = run_script(*arguments, env=environment | {"RANK": "1"}, fresh=True)
    asked = run_script("draw_scenes.py", "--help", env=environment, fresh=True)
    assert "Note:" not in second.stderr + asked.stderr + asked.stdout


def test_what_is_installed_here_was_tested():
    assert untested_versions() is None
