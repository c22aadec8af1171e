"""Captions into tokens: the step that decides more about a Japanese score than the metric does.

    unidic-lite   words of MeCab (fugashi) with the frozen dictionary unidic-lite; the default
    ipadic        words of MeCab with the older dictionary ipadic (PyPI package of that name)
    characters    one token a character
    vietnamese    words of pyvi, the syllables of one joined by `_`: con_mèo
    english       words as pycocoevalcap's PTB tokenizer has them: sacreBLEU's 13a, contractions split, hyphens kept
    none          the text split at white space, otherwise as it is: for captions that are tokenised already

All but `none` lower case, and drop every token without a letter or digit; of these `english` keeps signs that are read
aloud, such as & and %. pycocoevalcap's PTB tokenizer does all three too. The Japanese ones normalise by Unicode NFKC
first, `vietnamese` and `english` by NFC, and no tone mark is lost. UniDic's part of speech does not tell what is
punctuation: in 32,944 human captions it called 51 word fragments such as 梁, ク and 々 symbols, and no sign a word.
Numerals stay as written: 2 and 二 are different tokens.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module, metadata

import fugashi
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from vlmcap.errors import UserError

JAPANESE_TOKENIZERS = ("unidic-lite", "ipadic", "characters")
TOKENIZERS = (*JAPANESE_TOKENIZERS, "vietnamese", "english", "none")
# Of captions that say their language, by its ISO 639-1 code.
LANGUAGE_TOKENIZERS = {"ja": "unidic-lite", "en": "english", "vi": "vietnamese"}

_split_13a = Tokenizer13a()
# Quotes, dashes and the ellipsis as ASCII has them; control characters, which are dashes and quotes of Windows.
_PLAIN_SIGNS = str.maketrans("‘’‚“”„–—…", "'''\"\"\"  .") | dict.fromkeys(range(0x80, 0xA0), " ")
# What 13a splits and the Penn Treebank does not: a hyphen or & inside a word, the slash of a fraction.
_JOINT = re.compile(r"(?<=\w)[-&](?=\w)|(?<=\d)/(?=\d)")
_HIDE = str.maketrans("-&/", "\ue000\ue001\ue002")
_SHOW = str.maketrans("\ue000\ue001\ue002", "-&/")
_CONTRACTION = re.compile(r"(?<=\w)('s|'re|'ve|'ll|'m|'d|n't)(?![\w'])")
# Words that begin with an apostrophe: contractions, the 'n' between two words, the '90s.
_APOSTROPHISED = re.compile(r"'s|'re|'ve|'ll|'m|'d|'n'|'\d\ds?")
_ENGLISH_PUNCTUATION = "'\"`.?!,:;-()[]{}"


class TokenizerError(UserError):
    """There is no tokenizer of that name, or for a language; the message lists those there are."""


def tokenise(texts: Iterable[str], tokenizer: str = "unidic-lite") -> list[list[str]]:
    """Tokens of each text, in the order of `texts`. A text without any word gives an empty list.

    No token is empty or holds white space, so that `" ".join(tokens)` loses nothing. Repeated texts are tokenised once
    and share one list. Raises TokenizerError on an unknown name.
    """
    texts = list(texts)
    split = _splitter(tokenizer)
    tokens = {text: split(text) for text in set(texts)}
    return [tokens[text] for text in texts]


def tokenizer_signature(tokenizer: str = "unidic-lite") -> str:
    """What `tokenise` does, for a metric's signature: `tok:unidic-lite-1.0.8|norm:nfkc|punct:drop|case:lc`.

    Raises TokenizerError on an unknown name.
    """
    _splitter(tokenizer)
    if tokenizer == "none":
        return "tok:none|norm:none|punct:keep|case:mixed"
    if tokenizer == "vietnamese":
        return f"tok:vietnamese-pyvi-{metadata.version('pyvi')}|norm:nfc|punct:drop|case:lc"
    if tokenizer == "english":
        return f"tok:english-13a-ptb-sacrebleu-{metadata.version('sacrebleu')}|norm:nfc|punct:drop|case:lc"
    version = "" if tokenizer == "characters" else f"-{metadata.version(tokenizer)}"
    return f"tok:{tokenizer}{version}|norm:nfkc|punct:drop|case:lc"


def tokenizer_of(language: str, japanese: str = "unidic-lite") -> str:
    """The tokenizer for captions in a language, an ISO 639-1 code.

    Args:
        japanese: that for Japanese, if it is one of JAPANESE_TOKENIZERS.

    Raises:
        TokenizerError: there is none for the language.
    """
    if language not in LANGUAGE_TOKENIZERS:
        raise TokenizerError(
            f"captions in {language!r} cannot be scored: there are tokenizers for {', '.join(LANGUAGE_TOKENIZERS)}"
        )
    return japanese if language == "ja" and japanese in JAPANESE_TOKENIZERS else LANGUAGE_TOKENIZERS[language]


def _splitter(tokenizer: str) -> Callable[[str], list[str]]:
    splitters = {
        "unidic-lite": lambda text: _words(text, "unidic_lite"),
        "ipadic": lambda text: _words(text, "ipadic"),
        "characters": _characters,
        "vietnamese": _vietnamese_words,
        "english": _english_words,
        "none": str.split,
    }
    if tokenizer not in splitters:
        raise TokenizerError(f"unknown tokenizer {tokenizer!r}: choose one of {', '.join(TOKENIZERS)}")
    return splitters[tokenizer]


def _words(text: str, package: str) -> list[str]:
    words = tagger(package, "-Owakati").parse(_normalise(text)).split()
    return [word for word in words if _has_letter_or_digit(word)]


def _characters(text: str) -> list[str]:
    return [character for character in _normalise(text) if character.isalnum()]


def _vietnamese_words(text: str) -> list[str]:
    from pyvi import ViTokenizer  # imports scikit-learn, which takes seconds

    words = ViTokenizer.tokenize(unicodedata.normalize("NFC", text)).lower().split()
    return [word for word in words if _has_letter_or_digit(word)]


def _english_words(text: str) -> list[str]:
    """Equal to pycocoevalcap's PTB tokenizer on ordinary titles: on 1,994 of 2,000 titles of dishes.

    Where they differ: abbreviations lose their full stop (`dr.`, `st.`, `no.`; `u.s.a.` is three words), brackets are
    dropped (`-lrb-` stays there, lower cased before its wrapper looks for `-LRB-`), `cannot`, `all'amatriciana` and
    `butter®` are one word, and text becomes NFC, which that one leaves as it is.
    """
    text = _CONTRACTION.sub(r" \1 ", unicodedata.normalize("NFC", text).lower().translate(_PLAIN_SIGNS))
    words = _split_13a(_JOINT.sub(lambda match: match[0].translate(_HIDE), text)).translate(_SHOW).split()
    words = [word if _APOSTROPHISED.fullmatch(word) else word.strip(_ENGLISH_PUNCTUATION) for word in words]
    return [word for word in words if word]


def _normalise(text: str) -> str:
    # MeCab reads a C string: whatever follows a NUL would be lost.
    return unicodedata.normalize("NFKC", text).lower().replace("\0", " ")


@cache
def _has_letter_or_digit(token: str) -> bool:
    return any(character.isalnum() for character in token)


@cache
def tagger(package: str = "unidic_lite", output: str = "") -> fugashi.GenericTagger:
    """MeCab with the dictionary of a package; `output`: an option such as -Owakati."""
    dictionary = import_module(package).DICDIR  # hundreds of MB, which a machine that only trains may lack
    # The dictionary by its path: fugashi.Tagger() would take the full unidic wherever that is installed.
    return fugashi.GenericTagger(f'-r "{dictionary}/mecabrc" -d "{dictionary}" {output}')
