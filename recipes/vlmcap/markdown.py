"""Text of any origin as Markdown that shows it and nothing else, in prose, in a cell, in a code span; tables."""

import re

from tabulate import tabulate


def escape_unseen(text: str) -> str:
    r"""The text with \u escapes, which Python's strings know too, for what cannot be seen: control characters, bidi
    controls, zero-width characters, halves of surrogate pairs."""
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in text)


def visible(text: str) -> str:
    """The text in one line: each run of white space is a space, and what else cannot be seen is escaped."""
    return escape_unseen(re.sub(r"\s+", " ", text))


def markdown_escape(text: str) -> str:
    """Plain text as Markdown that shows it as it is, in a table's cell too."""
    text = re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", visible(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def prose(text: str) -> str:
    """`markdown_escape`, also for the beginning of a line: no heading, no list, no rule, no underline of a heading."""
    text = re.sub(r"^( ?\d+)([.)])(?=\s|$)", r"\1\\\2", markdown_escape(text))
    return re.sub(r"^ ?(?=#+(?:\s|$)|[-+](?:\s|$)|-{2}|=+\s?$)", r"\\", text)


def code_span(text: str) -> str:
    """Text as a code span; in a table's cell, `|` needs a backslash beside."""
    text = visible(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    ends = {text[:1], text[-1:]}  # a space at both is not shown
    space = " " if not text.strip() or ends == {" "} or "`" in ends else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str, language: str = "text") -> str:
    """Text of several lines as a code block."""
    lines = [escape_unseen(re.sub(r"\s", " ", line)) for line in text.split("\n")]
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def text_table(rows: list[list[str]]) -> str:
    """Rows of text, header first, in columns for a terminal; all except the first are aligned right."""
    return _table(rows, "plain", 1)


def markdown_table(rows: list[list[str]], left: int = 1) -> str:
    """Rows of escaped text, header first, as a Markdown table; columns after the first `left` are aligned right."""
    return _table(rows, "pipe", left) + "\n"


def _table(rows: list[list[str]], layout: str, left: int) -> str:
    header, *body = rows
    sides = ["left"] * left + ["right"] * (len(header) - left)
    # Cells are printed as they are: numbers are formatted already, and a system may be called "1e3".
    return tabulate(body, header, layout, disable_numparse=True, colalign=sides if body else None)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
