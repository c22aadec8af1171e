"""Most readers are not native speakers: expressions that they would have to look up, and the words to use instead."""

import ast
import io
import re
import tokenize
from bisect import bisect
from itertools import accumulate

import pytest

# Regular expression (case does not count, a space is any gap) -> better words. Each was in this repository once.
AVOIDED = {
    r"mend(s|ed|ing)?": "fix",
    r"(go|goes|going|gone|went) on": "continue, resume",
    r"anew": "again",
    r"(can|could|may|not to) be had|(cannot|not) be had": "available, fetched, downloaded",
    r"begun": "started",
    r"lies|lie|lay(?!_out)": "is, are, was",
    r"what is survived|as [a-z]+ see to": "(say who does what)",
    r"(stands?|stood)(?!-| (in )?for)": "is, are, occurs, comes",
    r"sees? to it": "makes sure",
    r"comes? to:|(what|it|run) (came|comes) to": "results, shows",
    r"left to (itself|themselves)": "by default",
    r"left alone": "unchanged",
    r"pass(ed|es)? over": "skip",
    r"(?<!idea )(?<!reason )behind(?! a (proxy|firewall))": "after",
    r"lest": "so that ... not",
    r"for want of": "because ... is missing",
    r"but for": "except for",
    r"wants an?|(licence|license) wants": "needs, requires",
    r"given again|give the same command again": "run again",
    r"comes? twice": "occurs twice",
    r"(?<!there )is no(?! longer)(?= )": "is not a",
    r"(it|that|file) is none": "is not one",
    r"(can|cannot) bear|bears? (out|the name)": "accept, has the name",
    r"reckon(s|ed)?": "count",
    r"parted": "separated",
    r"speaks? of": "describe, name",
    r"in the place of": "instead of",
    r"shall": "will, must",
    r"for ever": "without end",
    r"head of this module": "docstring of this module",
    r"drowns?": "hides",
    r"see design|design says": "(say it here, or see recipes/README.md)",
}
PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(rf'(?P<e{n}>{words})' for n, words in enumerate(AVOIDED))})(?![a-z])")
# Of a line that a sentence goes over: its indentation and comment sign, and the quotes where a string is continued.
EDGES = re.compile(r"""^\s*(?:(?:\#|//|>|[rf]{,2}["'])\s*)?|\s*["'\\]?\s*$""")
TEXTS = (
    "README.md SECURITY.md Makefile accelerate_configs/* dataset_cards/* model_cards/* tests/README.md scripts/*.py "
    "scripts/README.md recipes/**/*.py recipes/**/*.yaml recipes/**/*.j2 recipes/**/*.js recipes/**/*.md"
).split()


def avoided(text: str) -> list[tuple[int, str, str]]:
    """(number of the line, the words found, better ones) of every expression to avoid, also across lines."""
    lines = [EDGES.sub("", line) for line in text.splitlines()]
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
    better = list(AVOIDED.values())
    return [
        (bisect(starts, match.start()), match[0], better[int(match.lastgroup[1:])])
        for match in PATTERN.finditer(" ".join(lines).lower())
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n    # b goes\n    # on from c", (2, "goes on")),
        ('(\n    f"{x} cannot be"\n    " had"\n)', (2, "cannot be had")),
        ("There is no x. X stands for y, \nas it\nSTANDS.", (3, "stands")),
        ("begun_x = 1", (1, "begun")),
        ("He understands blended, layered scenes: no lay_out call is no longer here.", None),
    ],
)
def test_expressions_are_found(text, expected):
    assert [found[:2] for found in avoided(text)] == ([expected] if expected else [])


def explanations(source: str) -> str:
    """Comments, docstrings, and names of functions and classes as words, each in its line; other lines are empty."""
    lines = source.splitlines()
    kept = [""] * len(lines)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kept[token.start[0] - 1] = token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            kept[node.lineno - 1] += f" {node.name.replace('_', ' ')}."
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            place = slice(node.body[0].lineno - 1, node.body[0].end_lineno)
            kept[place] = lines[place]
    return "\n".join(kept)


def test_explanations_are_found():
    source = 'x = "anew"  # a comment goes\n# on\n\ndef goes_on():\n    """Doc\n    string."""\n    return "begun"\n'
    kept = explanations(source).split("\n")
    assert kept == ["# a comment goes", "# on", "", " goes on.", '    """Doc', '    string."""', ""]
    assert [line for line, _, _ in avoided("\n".join(kept))] == [1, 4]


def test_words_that_most_readers_know(repo_root):
    paths = [path for pattern in TEXTS for path in sorted(repo_root.glob(pattern))]
    assert len(paths) > 100
    found = [
        f"{path.relative_to(repo_root)}:{line}: {words!r}, better: {better}"
        for path in paths
        for line, words, better in avoided(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_tests_are_explained_in_words_that_most_readers_know(repo_root):
    """Their comments, docstrings and names; their data may hold any word. This file holds the list itself."""
    paths = [path for path in sorted(repo_root.glob("tests/**/*.py")) if path.name != "test_plain_english.py"]
    assert len(paths) > 100
    found = [
        f"{path.relative_to(repo_root)}:{line}: {words!r}, better: {better}"
        for path in paths
        for line, words, better in avoided(explanations(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)
