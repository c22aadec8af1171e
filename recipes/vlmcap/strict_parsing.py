"""JSON and YAML from elsewhere, read strictly.

The parsers accept more than a program can handle: a key twice (the last counts), NaN and 1e999, numbers too long to be
printed, half a surrogate pair (which no UTF-8 file can hold), nesting that exhausts the stack, and YAML aliases, a few
lines of which unfold into gigabytes. All of it is refused here, each as a ValueError with the place where the parser
knows it.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterable

import yaml

DEPTH = 64  # levels of lists and mappings; the deepest document of this project has nine
MAX_BITS = 14_000  # 4,214 digits; Python prints no number of more than 4,300
YAML_BYTES = 250_000  # ten times the longest file of this project; PyYAML needs two seconds for it
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes | str) -> object:
    """The value of a JSON document; bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not JSON, or holds what this module's docstring lists. json.JSONDecodeError where the parser
            itself says so, UnicodeDecodeError for bytes that are not UTF-8.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError(f"more than {DEPTH} levels of nesting") from error
    _check(value, scalars=bool(_SURROGATE_ESCAPE.search(text)))
    return value


def parse_yaml(data: bytes | str) -> object:
    """The value of a YAML document of plain types, at most YAML_BYTES long; bytes are UTF-8.

    Raises:
        ValueError: it is not YAML, or holds what this module's docstring lists.
    """
    if len(data) > YAML_BYTES:
        raise ValueError(f"{len(data):,} bytes are more than the {YAML_BYTES:,} that a YAML file may have here")
    try:
        value = yaml.load(data.decode("utf-8-sig") if isinstance(data, bytes) else data, _StrictLoader)
    # What PyYAML's constructors let through: "!!int ''", "!!bool x", "!!timestamp x", "2020-13-45", "\UFFFFFFFF".
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    _check(value, scalars=True)
    return value


def shown(value: object) -> str:
    """A value for a message: the beginning of its repr, without the making of the rest, which may be gigabytes."""
    return f"{reprlib.repr(value):.120}"


def _unique(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the key {_first_repeated(key for key, _ in pairs)!r} occurs twice in one object")
    return value


def _first_repeated(keys: Iterable) -> object:
    seen = set()
    return next(key for key in keys if key in seen or seen.add(key))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def _check(value: object, scalars: bool) -> None:
    """Walks a document level by level: its depth and, if asked, that texts can be written in UTF-8, numbers shown."""
    level = [value]
    for _ in range(DEPTH + 1):
        if scalars:
            for part in level:
                _check_scalar(part)
        level = [
            part
            for node in level
            if isinstance(node, dict | list | tuple | set)
            for part in ([*node, *node.values()] if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"more than {DEPTH} levels of nesting")


def _check_scalar(value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("a whole number in it has thousands of digits")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {value[error.start]!a}, in a text: no character") from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases, with bounded depth and unique keys."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not accepted", event.start_mark
            )
        self.depth += 1
        if self.depth > DEPTH + 1:
            raise yaml.composer.ComposerError(None, None, f"more than {DEPTH} levels of nesting", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            twice = _first_repeated(self.construct_object(key, deep=True) for key, _ in node.value)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return mapping
