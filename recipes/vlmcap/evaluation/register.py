"""Polite Japanese into plain Japanese: です and ます alone move the scores of YJ Captions by a third of BLEU-4.

`to_plain` rewrites polite auxiliaries wherever they are, by the words that MeCab finds with unidic-lite:

    verb + ます                    its dictionary form       座っています -> 座っている, あります -> ある
    verb + ました, まして, ましたら    past, て form ...         食べました -> 食べた, 読みました -> 読んだ
    verb + ません                  negative                 いません -> いない, ありません -> ない
    verb + ませんでした             negative past            見えませんでした -> 見えなかった
    verb + ましょう                 volitional               行きましょう -> 行こう
    おります, ございます            いる, ある                 立っております -> 立っている, でございます -> である
    noun, の and others + です      だ                       公園です -> 公園だ, でした -> だった, でしょう -> だろう,
                                                            でして -> で, ですので -> なので, ですか -> か
    adjective, verb, た, ない + です  nothing                 赤いです -> 赤い

Left as they are: requests (ください, ませ), honorific verbs (いらっしゃる, なさる), polite prefixes (お, ご),
what is between 「 and 」 (the words of a sign, not of the writer), and the punctuation, which the tokenizers drop.
Plain text is returned as it came. Of the 24,471 captions of JGLUE's part of YJ Captions that end politely, 8 still do
afterwards, five of them misspelt (tests/evaluation/test_register.py).
"""

import re

import fugashi

from vlmcap.evaluation.tokenise import tagger

# Fields of a UniDic entry: part of speech, conjugation type and form, lemma, reading of the lemma, dictionary form.
POS, TYPE, FORM, READING, LEMMA, DICTIONARY_FORM = 0, 4, 5, 6, 7, 10
OPENING, CLOSING = re.compile("[「『]"), re.compile("[」』]")
POLITE = re.compile("ます|まし|ませ|です|でし")
# The last kana of a godan verb -> that before ない, that before う, and what comes before the a of its past:
# 書く, 書かない, 書こう, 書いた.
GODAN = {
    "う": ("わ", "お", "っt"),
    "く": ("か", "こ", "いt"),
    "ぐ": ("が", "ご", "いd"),
    "す": ("さ", "そ", "しt"),
    "つ": ("た", "と", "っt"),
    "ぬ": ("な", "の", "んd"),
    "ぶ": ("ば", "ぼ", "んd"),
    "む": ("ま", "も", "んd"),
    "る": ("ら", "ろ", "っt"),
}
VOICED = {"た": "だ", "て": "で"}


def to_plain(text: str) -> str:
    """`text` with its polite endings made plain by the rules above; anything else, white space too, is kept.

    Rewritten until no rule applies any more: MeCab may find other words in what a rule leaves. Every rule takes a
    polite word away.
    """
    while POLITE.search(text) and (plain := _rewritten(text)) != text:
        text = plain
    return text


def is_polite(text: str) -> bool:
    """Whether it has a polite ending, of those above."""
    return to_plain(text) != text


def _rewritten(text: str) -> str:
    words = tagger()(text.replace("\0", " "))
    plain, i, kept_to, counted_to, depth = [], 0, 0, 0, 0
    ends = _ends(text, words)
    while i < len(words):
        start = ends[i] - len(words[i].surface)
        depth += len(OPENING.findall(text, counted_to, start)) - len(CLOSING.findall(text, counted_to, start))
        counted_to = start
        taken, replacement = (0, "") if depth > 0 else _rewrite(words, i)
        if taken:
            plain += [text[kept_to:start], replacement]
            kept_to = ends[i + taken - 1]
        i += taken or 1
    return "".join([*plain, text[kept_to:]])


def _ends(text: str, words: list) -> list[int]:
    """Where each word ends in the text."""
    ends, end = [], 0
    for word in words:
        end = text.index(word.surface, end) + len(word.surface)
        ends.append(end)
    return ends


def _rewrite(words: list, i: int) -> tuple[int, str]:
    """Number of words from place `i` on that a rule replaces, 0 for none, and what replaces them."""
    if i + 1 < len(words) and _is(words[i + 1], "助動詞-マス") and words[i].feature[FORM].startswith("連用形"):
        return _masu(words, i)
    if _is(words[i], "助動詞-デス"):
        return _desu(words, i)
    return 0, ""


def _masu(words: list, i: int) -> tuple[int, str]:
    """A verb and ます."""
    verb, form, after = words[i].feature, words[i + 1].feature[FORM], _surface(words, i + 2)
    if form.startswith(("終止形", "連体形")):
        return 2, _dictionary_form(verb)
    if form.startswith("意志推量形"):
        return 2, _volitional(verb)
    if form.startswith("連用形") and after[:1] in VOICED:
        stem, voiced = _past_stem(verb)
        return 3, stem + (VOICED[after[0]] if voiced else after[0]) + after[1:]
    if form.startswith("未然形") and after == "ん":
        if _surface(words, i + 3) == "でし" and _surface(words, i + 4).startswith("た"):
            return 5, f"{_negative_stem(verb)}なかっ{_surface(words, i + 4)}"
        return 3, f"{_negative_stem(verb)}ない"
    return 0, ""


def _desu(words: list, i: int) -> tuple[int, str]:
    """です, after whatever comes before it."""
    form, after = words[i].feature[FORM], _surface(words, i + 1)
    before = words[i - 1].feature if i else ()
    plain_before = (
        bool(before) and (before[POS] in ("動詞", "形容詞") or before[POS] == "助動詞") and not _is_da(before)
    )
    if form.startswith(("終止形", "連体形")):
        if plain_before or after == "か":
            return 1, ""
        return 1, "な" if after in ("の", "ので", "のに") else "だ"
    if form.startswith("意志推量形"):
        return 1, "だろう"
    if after == "て":
        return 2, "で"
    if after.startswith("た"):
        return 1, "だっ"
    return 0, ""


def _is(word: fugashi.Node, conjugation: str) -> bool:
    return word.feature[TYPE] == conjugation


def _is_da(feature: tuple) -> bool:
    return feature[TYPE] in ("助動詞-ダ", "助動詞-デス", "助動詞-マス")


def _surface(words: list, i: int) -> str:
    return words[i].surface if i < len(words) else ""


def _dictionary_form(verb: tuple) -> str:
    """That of おる and ござる, which are polite in themselves, is いる and ある."""
    return {"おる": "いる", "ござる": "ある", "御座る": "ある"}.get(verb[DICTIONARY_FORM], verb[DICTIONARY_FORM])


def _is_godan(verb: tuple, form: str) -> bool:
    return verb[TYPE].startswith("五段") and form != "いる"  # いる for おる, which is godan


def _past_stem(verb: tuple) -> tuple[str, bool]:
    """What た or て follows, and whether they are voiced: 読む -> 読ん, True."""
    form = _dictionary_form(verb)
    if _is_godan(verb, form):
        ending = "っt" if verb[LEMMA] == "行く" else GODAN[form[-1]][2]
        return form[:-1] + ending[0], ending[1] == "d"
    return _stem(verb, form, "し", "き"), False


def _negative_stem(verb: tuple) -> str:
    """What ない follows: 読む -> 読ま; nothing for ある."""
    form = _dictionary_form(verb)
    if form in ("ある", "有る", "在る"):
        return ""
    return form[:-1] + GODAN[form[-1]][0] if _is_godan(verb, form) else _stem(verb, form, "し", "こ")


def _volitional(verb: tuple) -> str:
    form = _dictionary_form(verb)
    return f"{form[:-1]}{GODAN[form[-1]][1]}う" if _is_godan(verb, form) else _stem(verb, form, "し", "こ") + "よう"


def _stem(verb: tuple, form: str, suru: str, kuru: str) -> str:
    """The stem of a verb that is not godan."""
    if verb[TYPE] == "サ行変格" and form.endswith("する"):
        return form[:-2] + suru
    if verb[TYPE] == "カ行変格" and form.endswith("くる"):
        return form[:-2] + kuru
    return form[:-1]
