"""The command line of every script and recipe: dataclass fields, `--config file.yaml`, and the manual as help."""

import argparse
import errno
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from trl import TrlParser

from vlmcap.credentials import redact, refuse_credentials
from vlmcap.errors import UserError, needs_file
from vlmcap.places import as_typed_here, own_file
from vlmcap.strict_parsing import parse_yaml, shown
from vlmcap.versions import is_first_process, report_untested_versions


class ManualFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the manual and shows defaults."""


def run_main(
    main: Callable,
    manual: str,
    *dataclasses: type,
    command_line: list[str] | None = None,
    config: Path | None = None,
    interrupted: str = "",
) -> None:
    """Calls `main` with the arguments that `parse` finds. An error that the user can fix, or the system's, ends the
    program with its message and status 1, Ctrl-C with a line and status 130.

    Args:
        command_line: the words after the program's name; None for those it was started with.
        config: the `--config` of a command line without one.
        interrupted: what that line says of how to continue.
    """
    words = sys.argv[1:] if command_line is None else command_line
    if config and "--config" not in words:
        words = ["--config", str(config), *words]
    arguments = parse(manual, *dataclasses, command_line=words)
    if sys.platform == "win32":
        sys.exit("error: Windows is not supported (checkpoints and signals are those of Linux): use Linux, or WSL 2")
    report_untested_versions()
    try:
        main(*arguments)
    except KeyboardInterrupt:
        if is_first_process():
            print(f"\nInterrupted. {interrupted}".rstrip(), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        sys.exit(f"error: {redact(as_typed_here(_explained(error, arguments)))}")
    except UserError as error:
        sys.exit(f"error: {redact(as_typed_here(str(error)))}")


def parse(manual: str, *dataclasses: type, command_line: list[str] | None = None) -> tuple:
    """Instances of the dataclasses, from the command line over `--config` over the fields' defaults.

    `--help` begins with `manual`, the docstring of the script. A revision in the configuration (`model_revision`,
    `dataset_revision`) is that of what is named there (`model_name_or_path`, `dataset`), and is left out where the
    command line names another. A configuration file that is missing, is not a mapping, holds an unknown key or a value
    of another type than its field ends the program with a message that names it. So does a token or a password in
    a setting.
    """
    parser = TrlParser(dataclasses, description=as_typed_here(manual), formatter_class=ManualFormatter)
    words = sys.argv[1:] if command_line is None else command_line
    words = [own_file(b) if a == "--config" else b for a, b in zip(["", *words], words, strict=False)]
    try:
        config = _read_config(words, dataclasses) if "--config" in words else {}
        arguments = parser.parse_args_and_config(words)
        refuse_credentials(*arguments)
        for found in arguments:
            _leave_out_revisions(found, config, words)
        return arguments
    except (OSError, ValueError) as error:
        sys.exit(f"error: {redact(str(error))}")


def _explained(error: OSError, arguments: tuple) -> str:
    """What the system says of a file, with the option that named it, and what is needed there instead."""
    path = error.filename2 or error.filename
    if error.errno is None or not isinstance(path, str | Path):
        return str(error)
    path = Path(path)
    near = [(name, value) for name, value in _values(arguments) if value and _is_near(path, Path(value))]
    near.sort(key=lambda found: Path(found[1]) != path)  # what was named itself comes first
    place = f"--{near[0][0]} {near[0][1]}: " if near else f"{path}: "
    if near and Path(near[0][1]) != path:
        place += f"{path} "
    if error.errno == errno.EISDIR:
        return f"{place}{needs_file(path)}"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{place}is a file, or is in one, and a folder is needed"
    return f"{place}{error.strerror}"


def _is_near(path: Path, named: Path) -> bool:
    """Whether a path is the one that a setting names, or is in it, or the other way round."""
    return named != Path() and (path.is_relative_to(named) or (named.is_relative_to(path) and path != Path()))


def _values(arguments: tuple) -> Iterator[tuple[str, str]]:
    """(option, one of its texts): of a list each; of NAME=FILE the file."""
    for group in arguments:
        for name, value in vars(group).items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield name, one.partition("=")[2] or one


def _leave_out_revisions(arguments: object, config: dict, words: list[str]) -> None:
    given = {word.split("=")[0] for word in words}
    for name in vars(arguments).keys() & config.keys():
        revision = name.removesuffix("_name_or_path") + "_revision"
        if hasattr(arguments, revision) and getattr(arguments, name) != config[name] and f"--{revision}" not in given:
            setattr(arguments, revision, None)


def _read_config(words: list[str], dataclasses: tuple[type, ...]) -> dict:
    """The settings of the file. Checked is what TrlParser takes on trust: that it is YAML of plain types, and that
    values fit their fields."""
    if words[-1] == "--config":
        raise ValueError("--config needs a file")
    path = words[words.index("--config") + 1]
    try:
        config = parse_yaml(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a YAML mapping of settings is needed, but this is {shown(config)}")
    if "env" in config:
        raise ValueError(f"{path}: `env` would set environment variables from a file; set them in the shell instead")
    hints = {name: hint for dataclass in dataclasses for name, hint in get_type_hints(dataclass).items()}
    for key, value in config.items():
        if key not in hints:
            raise ValueError(f"{path}: there is no setting {shown(key)}; --help lists them")
        if not _fits(value, hints[key]):
            raise ValueError(f"{path}: {key} must be {_said(hints[key])}, but is {shown(value)}")
    return config


def _fits(value: object, hint: object) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is type(None):
        return value is None
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if (origin or hint) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    # A text is converted as on the command line: YAML reads 1e-4 as one.
    allowed = {bool: (bool, str), int: (int, str), float: (int, float, str), str: (str,)}
    return hint not in allowed or isinstance(value, allowed[hint]) and (hint is bool or not isinstance(value, bool))


def _said(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
