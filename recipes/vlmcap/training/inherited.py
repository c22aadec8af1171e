"""The settings that recipes inherit from transformers' TrainingArguments and TRL's SFTConfig, without importing them.

These classes cannot be imported without torch, which takes seconds, and `--help` or a mistyped option should not wait
for it. So a command line is parsed into a stand-in, a dataclass with the same fields (`parsed_as`), and the real
object is made of its values when it was right (`complete`). Names, types, defaults and help of the fields are read
from the source files of the installed libraries. tests/training/test_inherited.py compares each with the real class.

Not every field has an effect in a recipe. What becomes of each is in inherited.yaml, and one that the recipe does
not obey is refused where it is changed.
"""

import ast
import builtins
import importlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from vlmcap.errors import UserError
from vlmcap.strict_parsing import parse_yaml

Config = TypeVar("Config")
# File and class, the parent first.
TRAINING_ARGUMENTS = (("transformers/training_args.py", "TrainingArguments"),)
SFT_CONFIG = (
    *TRAINING_ARGUMENTS,
    ("trl/trainer/base_config.py", "_BaseConfig"),
    ("trl/trainer/sft_config.py", "SFTConfig"),
)

TABLE = Path(__file__).with_name("inherited.yaml")


class ParallelismConfig:
    """accelerate's has no value that could be written on a command line, either."""

    def __init__(self, text: str):
        raise ValueError(text)


# What occurs in field definitions and is neither an enumeration nor built in (transformers 5.23).
KNOWN = {
    "Any": Any,
    "Literal": Literal,
    "ParallelismConfig": ParallelismConfig,
    "dataclass": dataclass,
    "default_optim": "adamw_torch_fused",  # adamw_torch below torch 2.8
    "field": field,
    "trainer_log_levels": dict.fromkeys("detail debug info warning error critical passive".split()),
}


def parsed_as(own: type, inherited: tuple[tuple[str, str], ...]) -> type:
    """The dataclass that a command line is parsed into.

    Args:
        own: what the recipe adds to the inherited class, with its checks: a class of `vlmcap.training.arguments`.
        inherited: SFT_CONFIG or TRAINING_ARGUMENTS.

    Making an object of it raises ValueError where a field that the recipe does not obey has another value than its
    default.
    """
    try:
        base = read_fields(inherited)
    except (LookupError, OSError):
        base = import_fields(inherited)  # slower: a version of the library that is written otherwise
    base.__post_init__ = lambda self: None
    reasons = refused(base, inherited)

    def check(self) -> None:
        _refuse_changed(self, reasons)
        super(parsed, self).__post_init__()  # may change fields itself

    parsed = make_dataclass(own.__name__, [], bases=(own, base), namespace={"__post_init__": check})
    return parsed


def refused(base: type, inherited: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The fields of `base` that a recipe does not obey, each with the reason: what inherited.yaml says of them."""
    table, recipe = parse_yaml(TABLE.read_bytes()), "sft" if inherited is SFT_CONFIG else "captioner"
    new = "this project has not met it yet: the installed library is newer than the tested one"
    found = {field.name: table.get(field.name, new) for field in fields(base)}
    found = {name: said[recipe] if isinstance(said, dict) else said for name, said in found.items()}
    return {name: said for name, said in found.items() if said is not True}


def _refuse_changed(self, reasons: dict[str, str]) -> None:
    for given in fields(self):
        default = given.default if given.default_factory is MISSING else given.default_factory()
        unchanged = (default, False) if default == "no" else (default,)  # the parser reads "no" as False
        if given.name in reasons and getattr(self, given.name) not in unchanged:
            raise ValueError(f"--{given.name} must stay at its default, {default!r}: {reasons[given.name]}")


def complete(config: Callable[..., Config], parsed) -> Config:
    """The real object, of the class `config`, with the values of what `parsed_as` made.

    Raises:
        UserError: a value is refused there, or two that do not go together.
    """
    try:
        return config(**{field.name: getattr(parsed, field.name) for field in fields(parsed) if field.init})
    except ValueError as error:
        raise UserError(str(error)) from error


def read_fields(classes: tuple[tuple[str, str], ...]) -> type:
    """A dataclass with the fields of the last of the classes and of its parents, read from their source files.

    Raises:
        LookupError: a file does not hold the class, it has other parents, or a field is defined with something that is
            not known here.
        OSError: there is no such file.
    """
    names, parents = dict(KNOWN), []
    for path, name in classes:
        package = path.split("/")[0]
        file = Path(find_spec(package).submodule_search_locations[0]).parent / path
        module = ast.parse(file.read_text(encoding="utf-8"))
        definition = _class(module, name)
        if [ast.unparse(base) for base in definition.bases] != parents:
            raise LookupError(f"{name} has other parents than {parents}")
        definition.body = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
        loaded = [
            node for node in ast.walk(definition) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        ]
        for used in {node.id for node in loaded}:
            if used not in names and not hasattr(builtins, used):
                names[used] = _enumeration(module, file, used)
        exec(compile(ast.Module([definition], []), str(file), "exec"), names)
        parents = [name]
    return names[name]


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(name)


def _enumeration(module: ast.Module, file: Path, name: str) -> type[Enum]:
    """The enumeration `name`, of texts, that the module defines or imports from a neighbour."""
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in [alias.name for alias in node.names]:
            neighbour = file.parent / f"{node.module.replace('.', '/')}.py"
            module = ast.parse(neighbour.read_text(encoding="utf-8"))
    members = [node for node in _class(module, name).body if isinstance(node, ast.Assign)]
    try:
        return Enum(name, {node.targets[0].id: ast.literal_eval(node.value) for node in members}, type=str)
    except ValueError as error:
        raise LookupError(f"{name}: {error}") from error


def import_fields(classes: tuple[tuple[str, str], ...]) -> type:
    """As `read_fields`, by importing the last of the classes."""
    path, name = classes[-1]
    real = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    hints = get_type_hints(real)
    kinds = [
        (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
        for f in fields(real)
        if f.init
    ]
    return make_dataclass(name, kinds)
