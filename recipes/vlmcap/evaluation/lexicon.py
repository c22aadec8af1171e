"""Words of a lexicon found in Japanese captions: which things and persons a caption names.

A lexicon is a YAML file: `categories` (category -> words), and, where needed, `groups` (group -> categories), `none`
(longer words that hold a word of a category and do not name it) and `depictions` (see lexicons/coco_ja.yaml).
"""

import hashlib
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vlmcap.errors import UserError
from vlmcap.evaluation.tokenise import tagger
from vlmcap.strict_parsing import parse_yaml, shown

LEXICONS = Path(__file__).parent / "lexicons"
# Tokens of unidic-lite that one entry may span; the longest of the shipped lexicons spans six.
LONGEST = 8
# The index of a feature of unidic-lite; a word the dictionary lacks has the first six alone.
POS, KIND, FORM, READING, LEMMA = 0, 1, 5, 6, 7


class LexiconError(UserError):
    """A lexicon cannot be used; the message names the file and the place."""


class Token(NamedTuple):
    """A token of a caption. `key` joins the spellings of a word: lemma, the lemma's reading, part of speech."""

    surface: str
    key: str
    pos: str
    kind: str  # the part of speech, closer
    form: str  # of conjugation, "*" where there is none


class Mention(NamedTuple):
    """A word of a lexicon at tokens start..end of a caption; `categories` has several for an ambiguous word."""

    word: str
    categories: tuple[str, ...]
    start: int
    end: int


@lru_cache(maxsize=1 << 16)
def analyse(text: str) -> tuple[Token, ...]:
    """Tokens of a caption (NFKC) by MeCab with unidic-lite."""
    tokens = []
    # MeCab reads a C string: whatever follows a NUL would be lost.
    for node in tagger()(unicodedata.normalize("NFKC", text).replace("\0", " ")):
        feature = node.feature
        known = len(feature) > LEMMA
        lemma = f"{feature[LEMMA]}/{feature[READING]}" if known else node.surface
        tokens.append(Token(node.surface, f"{lemma}/{feature[POS]}", feature[POS], feature[KIND], feature[FORM]))
    return tuple(tokens)


class Lexicon:
    """Finds the words of categories in captions; the longest word wins, in what is written or in dictionary forms.

    Attributes:
        name: of the file; sha256: of its bytes; categories: names, in the order of the file;
        groups: group -> categories, {} when the file has none.
    """

    def __init__(self, name_or_path: str | Path):
        """Reads `coco_ja`, `persons_ja`, `scenes_ja` or a YAML file. LexiconError: there is no such lexicon."""
        shipped = LEXICONS / f"{name_or_path}.yaml"
        path = shipped if shipped.exists() else Path(name_or_path)
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in LEXICONS.glob("*.yaml")))
            raise LexiconError(f"there is no lexicon {name_or_path}: name a YAML file or one of {names}")
        content = path.read_bytes()
        try:
            document = parse_yaml(content)
        except ValueError as error:
            raise LexiconError(f"{path}: not YAML ({error})") from error
        if not isinstance(document, dict) or not isinstance(document.get("categories"), dict):
            raise LexiconError(f"{path}: a mapping with the key `categories` is needed (category -> list of words)")
        unknown = document.keys() - {"categories", "groups", "none", "depictions"}
        if unknown:
            raise LexiconError(
                f"{path}: unknown keys {sorted(map(str, unknown))}; there are categories, groups, none, depictions"
            )
        _check_categories(path, document["categories"], document.get("groups") or {})

        self.name, self.sha256 = path.name, hashlib.sha256(content).hexdigest()
        self.categories = tuple(document["categories"])
        self.groups = document.get("groups") or {}
        self._written: dict[str, tuple[str, ...]] = {}
        self._keys: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._suffixes: dict[str, tuple[str, ...]] = {}
        for category, words in document["categories"].items():
            for word in _words(path, f"categories: {category}", words):
                self._add(word, (category,))
        for word in _words(path, "none", document.get("none") or []):
            if word in self._written and self._written[word]:
                raise LexiconError(f"{path}: {word} is a word of {self._written[word][0]} and of `none`")
            self._add(word, ())
        depictions = _words(path, "depictions", document.get("depictions") or [])
        self._depictions = {*depictions, *(token.key for word in depictions for token in analyse(word)[:1])}

    def _add(self, word: str, categories: tuple[str, ...]) -> None:
        word = unicodedata.normalize("NFKC", word)
        if word.startswith("-"):
            self._suffixes[word[1:]] = self._suffixes.get(word[1:], ()) + categories
            return
        keys = tuple(token.key for token in analyse(word))
        for table, key in ((self._written, word), (self._keys, keys)):
            table[key] = tuple(dict.fromkeys(table.get(key, ()) + categories))

    def words(self) -> int:
        """How many words name a category."""
        return sum(map(bool, self._written.values())) + len(self._suffixes)

    def find(self, caption: str) -> list[Mention]:
        """The words of the lexicon in a caption, from left to right.

        Two words of the same categories side by side or around の are one mention (女性選手, 二人の男性).
        """
        tokens = analyse(caption)
        mentions: list[Mention] = []
        start = 0
        while start < len(tokens):
            end, categories = self._longest(tokens, start)
            if categories and not self._is_depiction(tokens, end):
                word = "".join(token.surface for token in tokens[start:end])
                last = mentions[-1] if mentions else None
                between = "".join(token.surface for token in tokens[last.end : start]) if last else None
                if between in ("", "の") and last.categories == categories:
                    mentions[-1] = Mention(last.word + between + word, categories, last.start, end)
                else:
                    mentions.append(Mention(word, categories, start, end))
            start = end
        return mentions

    def named(self, caption: str) -> set[str]:
        """Every category that a caption names, those of words inside longer words too (若い女性: young and female)."""
        tokens = analyse(caption)
        found: set[str] = set()
        start = 0
        while start < len(tokens):
            end, categories = self._longest(tokens, start)
            found.update(categories)
            start = start + 1 if categories else end
        return found

    def _longest(self, tokens: tuple[Token, ...], start: int) -> tuple[int, tuple[str, ...]]:
        for end in range(min(len(tokens), start + LONGEST), start, -1):
            span = tokens[start:end]
            written = "".join(token.surface for token in span)
            if len(span) == 1 and span[0].pos == "接尾辞":
                return end, self._suffixes.get(written, ())
            if span[-1].pos == "動詞":  # 流し is a sink as a noun and not in 水を流している
                continue
            categories = self._written.get(written)
            if categories is None:
                categories = self._keys.get(tuple(token.key for token in span))
            if categories is not None:
                return end, categories
        return start + 1, ()

    def _is_depiction(self, tokens: tuple[Token, ...], end: int) -> bool:
        if end < len(tokens) and tokens[end].surface == "の":
            end += 1
        return end < len(tokens) and not self._depictions.isdisjoint(tokens[end][:2])


def _check_categories(path: Path, categories: dict, groups: object) -> None:
    for name in categories:
        if not isinstance(name, str) or not name.strip():
            raise LexiconError(f"{path}: the category {shown(name)} must be a text; put it in quotes")
    if not isinstance(groups, dict):
        raise LexiconError(f"{path}: groups must be a mapping (group -> categories), but is {shown(groups)}")
    for group, members in groups.items():
        known = isinstance(members, list) and all(isinstance(name, str) and name in categories for name in members)
        if not isinstance(group, str) or not group.strip() or not known:
            raise LexiconError(
                f"{path}: groups: {shown(group)} must be a name with a list of categories of this file, but has"
                f" {shown(members)}"
            )


def _words(path: Path, place: str, words: object) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise LexiconError(f"{path}: {place} must be a list of words, but is {shown(words)}")
    return words
