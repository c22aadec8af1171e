"""Cleaning of captions: every step is a named rule that counts what it did and keeps before/after examples.

`CaptionCleaner` is for any language. The rules here are those for Japanese; `vietnamese` and `titles` have their own.
Ordinary Japanese and whatever carries meaning stays as it is:

- long vowels, 々 〇 〆 ヶ ・ 〜 「」 『』 、 。 …, the final 。 or its absence;
- kanji variants: compatibility ideographs (神 U+FA19) and ideographic variation selectors, which plain NFC or a sweep
  of selectors would lose;
- ① Ⅲ ㎝ ㈱ ½ ² ™ (NFKC would turn ² into 2), ♂ ♨ ♪ ★ →, curly quotes;
- addresses without a scheme ("epsos.de"): in a caption they are words read off the picture.
"""

import copy
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import emoji
import jaconv
import regex
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

# Character classes, for use inside [...].
_KATAKANA = "ァ-ヺー\u31f0-\u31ff"
_KANJI = r"\p{Han}"  # the script: 々 and 〇 too
_LETTERS = rf"ぁ-ゖゝ-ゟヽ-ヿ〆ヶ{_KATAKANA}{_KANJI}"
_KANJI_VARIANTS = "\ufe00-\ufe02\U000e0100-\U000e01ef"
_JAPANESE = rf"{_LETTERS}{_KANJI_VARIANTS}…・、-〿--\u302a-\u302f"  # letters, 、。「」【】〜 and the like
_DASHES = "\\-‐‑‒–—―−－─━"
_SPACES = r"\t\n\v\f\r\x85\u2028\u2029\p{Zs}"  # \p{Zs} holds the full-width space


def _compile(pattern: str) -> regex.Pattern:
    return regex.compile(pattern, regex.VERSION1)  # V1: set difference [a--b]


# Emoji -------------------------------------------------------------------------------------------------------------
# Unicode lists as emoji some characters that are text unless an emoji selector, a skin tone or a joiner goes with
# them: letterlike signs, arrows, and the signs that the Japanese character set JIS X 0213 has.
_TEXT_SIGNS = "©®‼⁉™ℹ↔↕↖↗↘↙↩↪Ⓜ▪▫▶◀☀☁☂☃☎♀♂♠♣♥♦♨⤴⤵〰〽㊗㊙"
_JOINER, _SELECTORS, _KEYCAP, _TAGS = "\u200d", "\ufe0e\ufe0f", "\u20e3", "\U000e0020-\U000e007f"
_LISTED = {char for sequence in emoji.EMOJI_DATA for char in sequence if not char.isascii()}
_PICTURES = regex.escape("".join(sorted(_LISTED.difference(_TEXT_SIGNS, _JOINER, _SELECTORS, _KEYCAP))))
_EMOJI = (
    f"(?:(?:[{_PICTURES}]|[{_TEXT_SIGNS}](?=[\ufe0f\U0001f3fb-\U0001f3ff{_JOINER}])|(?<={_JOINER})[{_TEXT_SIGNS}])"
    f"[{_SELECTORS}{_JOINER}{_TAGS}]*)+"
)
_EMOJI_BETWEEN_WORDS = _compile(rf"(?<=[\p{{Latin}}\p{{Nd}}]){_EMOJI}(?=[\p{{Latin}}\p{{Nd}}])")
_EMOJI_OR_KEYCAP = _compile(f"{_EMOJI}|\ufe0f?{_KEYCAP}")


def _drop_emoji(text: str) -> str:
    return _EMOJI_OR_KEYCAP.sub("", _EMOJI_BETWEEN_WORDS.sub(" ", text))


# Control and zero-width characters ---------------------------------------------------------------------------------
# With them go private use (the emoji of old Japanese phones), halves of surrogate pairs (json.loads lets them through,
# UTF-8 does not) and U+FFFD. A variation selector stays only after a kanji, whose variant it names.
_CONTROL = _compile(
    rf"[[\p{{Cc}}\p{{Cf}}\p{{Co}}\p{{Cs}}\p{{Noncharacter_Code_Point}}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800"
    rf"\u3164\ufe03-\ufe0f\uffa0\ufffc\ufffd]--[{_SPACES}]]|(?<![{_KANJI}])[{_KANJI_VARIANTS}]"
)


def drop_control(text: str) -> str:
    return _CONTROL.sub("", text)


# Width and long vowels ---------------------------------------------------------------------------------------------
# ！ to ～ onto ! to ~, but ～ is how Windows writes the wave dash, and － waits for its neighbours to be looked at.
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in "－～"}
_WIDTH |= str.maketrans("～ﾞﾟ￠￡￢￤￥￦￨￩￪￫￬￭￮", "〜゛゜¢£¬¦¥₩│←↑→↓■○")
# Japanese input methods offer look-alikes on the key for ー, the ASCII hyphen not among them: "スキ―", "テ−ブル".
# After ン and ッ no vowel can be long, and before a letter or digit it is a hyphen (ボーイング－747).
_LONG_VOWEL = rf"(?<=[ァ-ヺ--ッン][\u3099\u309a]?)[{_DASHES}--\-](?![{_DASHES}A-Za-z0-9])"
_LONG_VOWEL_DASH = _compile(_LONG_VOWEL)
_FULL_WIDTH_HYPHEN = _compile(f"({_LONG_VOWEL})|－")


def _one_width(text: str) -> str:
    text = jaconv.h2z(text, kana=True, ascii=False, digit=False).translate(_WIDTH)
    return _FULL_WIDTH_HYPHEN.sub(lambda dash: dash[1] or "-", text)


def _fix_long_vowels(text: str) -> str:
    return _LONG_VOWEL_DASH.sub("ー", text)


# Unicode -----------------------------------------------------------------------------------------------------------
_COMPATIBILITY_IDEOGRAPHS = "\uf900-\ufaff\U0002f800-\U0002fa1f"
_RADICALS = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0x2F00, 0x2FD6)}
_KANA = [chr(code) for code in range(0x3041, 0x30FF)]


def _before(mark: str) -> str:
    """A pattern for the place after a kana that `mark` composes with."""
    return "(?<=[" + "".join(kana for kana in _KANA if len(unicodedata.normalize("NFC", kana + mark)) == 1) + "])"


_DAKUTEN = _compile(_before("\u3099") + "゛")
_HANDAKUTEN = _compile(_before("\u309a") + "゜")
_COMPOSABLE = _compile(f"[^{_COMPATIBILITY_IDEOGRAPHS}]+")


def _compose(text: str) -> str:
    text = _HANDAKUTEN.sub("\u309a", _DAKUTEN.sub("\u3099", text.translate(_RADICALS)))
    return _COMPOSABLE.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)


# URLs --------------------------------------------------------------------------------------------------------------
# ASCII only, so that Japanese written right after an address is kept; the last character is not a punctuation mark.
_ADDRESS = r"(?:(?:https?|ftp)://|(?<![A-Za-z0-9.])www\.)[A-Za-z0-9\-._~:/?#@!$&'*+,;=%]*[A-Za-z0-9\-_~/#@$&*+=%]"
_URL = _compile(rf"(?i)\({_ADDRESS}\)|<{_ADDRESS}>|「{_ADDRESS}」|{_ADDRESS}")


def _drop_urls(text: str) -> str:
    return _URL.sub(" ", text)


# Special tokens ----------------------------------------------------------------------------------------------------
# What tokenizers read as the end of a text, a turn or a picture: <|im_end|>, <|image_pad|>, </s>, <image>, [SEP]. They
# leave a space, so that nothing grows together, and no half of one stays that could meet another half. Brackets are
# taken with whatever brackets, spaces and names touch them: closing up "[ [SEP]SEP]" must not make a new one.
_NAMES = "CLS|SEP|PAD|MASK|UNK|BOS|EOS|IMG|/?INST"
_BRACKETED = _compile(rf"\[\s*(?:{_NAMES})\s*\]")
_BRACKETS = _compile(rf"(?:[\[\]\s]|(?<![A-Za-z0-9])(?:{_NAMES})(?![A-Za-z0-9]))++")
_MARKUP = _compile(
    r"(?i)<\|[^<>|]*\|>|<\|+|\|+>|<</?SYS>>"
    r"|</?(?:s|bos|eos|cls|sep|pad|mask|unk|image|video|audio|(?:start|end)_of_(?:turn|image)|image_soft_token"
    r"|(?:unused|extra_id_|loc|seg)\d+)>"
)


def drop_markup(text: str) -> str:
    text = _MARKUP.sub(" ", text)
    return _BRACKETS.sub(lambda run: " " if _BRACKETED.search(run[0]) else run[0], text)


# Spacing -----------------------------------------------------------------------------------------------------------
# No space beside a Japanese character: in the real captions nearly every Latin word is in its Japanese sentence
# without one. A single space stays between Latin words and between katakana words, which nothing else separates. It
# also stays beside a dash and before a voicing mark, which closing up would turn into part of a word.
_SPACE_RUN = _compile(f"[{_SPACES}]+")
_NEEDLESS_SPACE = _compile(
    rf"(?<![{_DASHES}]) (?![{_DASHES}\p{{M}}゛゜])"
    rf"(?:(?<=[{_JAPANESE}] )|(?=[{_JAPANESE}]))(?!(?<=[{_KATAKANA}] )[{_KATAKANA}])"
    r"|(?<=[(\[{]) | (?=[)\]}])| (?=[,.!?;:](?: |$))"
)


def _space(text: str) -> str:
    return _NEEDLESS_SPACE.sub("", _SPACE_RUN.sub(" ", text).strip(" "))


# Punctuation -------------------------------------------------------------------------------------------------------
_STOP_RUN = _compile("[、。]{2,}")
_LEADING_STOP = _compile("^[、。]+ ?")
_COMMA = _compile(rf"(?<=[{_LETTERS}]), ?(?=[\w「『(])|(?<=[A-Za-z0-9]),(?=[{_LETTERS}])")
_PERIOD = _compile(rf"(?<=[ぁ-ゖ])\.(?=[{_LETTERS}])|(?<=[ぁ-ゖ{_KANJI}])\.$")


def _punctuate(text: str) -> str:
    text = _STOP_RUN.sub(lambda run: "。" if "。" in run[0] else "、", text)
    return _PERIOD.sub("。", _COMMA.sub("、", _LEADING_STOP.sub("", text)))


# The rules in the order they run. No rule makes work for an earlier one: that makes the whole idempotent.
class TextRule(NamedTuple):
    name: str
    description: str
    apply: Callable[[str], str]


# For any language; after what decodes or composes characters, before what closes up spaces.
MARKUP = TextRule(
    "markup",
    "special tokens of language models (im_end, image_pad, SEP and the like, with their brackets) removed",
    drop_markup,
)

# Rules of nothing that only one language has, for one's own data.
_NO_CHARACTER = regex.compile(r"[[\p{Cc}\p{Cs}\p{Noncharacter_Code_Point}\ufeff\ufffd]--[\s]]", regex.VERSION1)
_CONTROL_RULE = TextRule("control", "control, zero-width, private-use and broken characters removed", drop_control)
_NFC_RULE = TextRule("unicode", "letters and accents composed (NFC)", lambda text: unicodedata.normalize("NFC", text))
_SPACING_RULE = TextRule(
    "spacing",
    "one space between words, none at the ends (also tabs and line ends)",
    lambda text: regex.sub(r"\s+", " ", text).strip(" "),
)
LATIN_RULES = (_CONTROL_RULE, _NFC_RULE, MARKUP, _SPACING_RULE)
# Without a language, zero-width characters stay: Persian, Hindi and others need them.
OTHER_RULES = (
    TextRule("control", "control and broken characters removed", lambda text: _NO_CHARACTER.sub("", text)),
    _NFC_RULE,
    MARKUP,
    _SPACING_RULE,
)
TEXT_RULES = (
    TextRule("emoji", "emoji removed, with joiners and selectors; a keycap leaves its digit", _drop_emoji),
    TextRule("control", "control, zero-width, private-use and broken characters removed", drop_control),
    TextRule(
        "width",
        "full-width letters, digits and ASCII signs become half-width, half-width kana full-width, ～ becomes 〜",
        _one_width,
    ),
    TextRule("unicode", "kana and voicing marks, letters and accents composed (NFC; kanji unchanged)", _compose),
    TextRule("url", "web addresses (http, https, ftp, www) removed, with brackets around nothing else", _drop_urls),
    MARKUP,
    TextRule("long_vowel", "a dash typed for the long vowel of a katakana word becomes ー", _fix_long_vowels),
    TextRule(
        "spacing",
        "one space between Latin words or katakana words, none beside other Japanese or at the ends",
        _space,
    ),
    TextRule(
        "punctuation",
        "repeated 、 and 。 collapsed, leading ones removed; , and . in Japanese become 、 and 。",
        _punctuate,
    ),
)
_ROW_RULES = (
    ("max_tokens", "cut to the token limit of the model's tokenizer, between characters", "changed"),
    ("empty", "captions without a letter or digit removed", "removed"),
    ("exact_duplicate", "captions equal to an earlier one of the image removed", "removed"),
    (
        "normalised_duplicate",
        "captions that differ from an earlier one of the image only in punctuation, spaces, case or width removed",
        "removed",
    ),
)

# Nine Japanese captions in ten hold nothing that any rule could touch; one search tells them.
_NEEDS_RULES = _compile(r"[^ぁ-ゔァ-ヺー\u4e00-\u9fff々・「」、。A-Za-z0-9]|^[、。]|[、。]{2}")


def clean_text(text: str, rules: Sequence[TextRule] = TEXT_RULES) -> str:
    """Apply the per-caption rules (without truncation). Idempotent."""
    if rules is not TEXT_RULES or _NEEDS_RULES.search(text):
        for rule in rules:
            text = rule.apply(text)
    return text


_LETTER_OR_DIGIT = _compile(r"[\p{L}\p{N}]")
_IGNORED_IN_KEY = _compile(r"[\p{P}\p{Z}]+")


def duplicate_key(text: str) -> str:
    """What two captions share that differ in punctuation, spaces, case or width alone."""
    return _IGNORED_IN_KEY.sub("", unicodedata.normalize("NFKC", text).casefold())


class CaptionCleaner:
    """Clean the captions of rows and keep account of it.

    Args:
        tokenizer: the model's tokenizer, which measures captions for the token limit; None: there is no such limit.
        max_tokens: longest caption in tokens, special tokens not counted; None: no limit.
        examples_per_rule: how many before/after pairs the report keeps of each rule.
        rules: the per-caption rules of the captions' language; those for Japanese unless said otherwise.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        max_tokens: int | None = 64,
        examples_per_rule: int = 10,
        rules: Sequence[TextRule] = TEXT_RULES,
    ):
        self.max_tokens = max_tokens if tokenizer else None
        self.examples_per_rule = examples_per_rule
        self.rules = rules
        self.tokenizer_name = None
        if tokenizer:
            # A report must not name folders of the machine it was written on.
            path = Path(tokenizer.name_or_path)
            self.tokenizer_name = path.name if path.is_dir() else tokenizer.name_or_path
            # A copy, since padding or truncation left on by an earlier call would falsify the lengths.
            self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        self._counts = Counter()
        self._examples = defaultdict(list)

    def clean(self, rows: list[dict], desc: str = "cleaning") -> list[dict]:
        """Return new rows with clean captions; `caption_ids` are filtered in step. Rows without captions are left out.

        May be called several times: the counts of `report()` add up. The rows passed in are not changed.
        """
        cleaned = []
        with tqdm(total=len(rows), desc=desc, unit="image") as bar:
            for start in range(0, len(rows), 1000):  # 5,000 captions: a batch that keeps the tokenizer's threads busy
                batch = rows[start : start + 1000]
                cleaned += self._clean_batch(batch)
                bar.update(len(batch))
        return cleaned

    def report(self) -> dict:
        """Counts and examples so far, JSON-serialisable.

        `rules` are in the order they ran. `count` is the captions a rule changed or removed; a caption changed by
        two rules counts in both. The `after` of a removed duplicate is the caption that was kept.
        """
        rules = [(rule.name, rule.description, "changed") for rule in self.rules]
        rules += [rule for rule in _ROW_RULES if rule[0] != "max_tokens" or self.max_tokens]
        return {
            "tokenizer": self.tokenizer_name,
            "max_tokens": self.max_tokens,
            **{key: self._counts[key] for key in ("images_in", "images_out", "captions_in", "captions_out")},
            "rules": [
                {
                    "name": name,
                    "description": description,
                    "action": action,
                    "count": self._counts[name],
                    "examples": list(self._examples[name]),
                }
                for name, description, action in rules
            ],
        }

    def token_counts(self, texts: list[str]) -> list[int]:
        """Length of each text in tokens of the tokenizer, special tokens not counted."""
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _clean_batch(self, rows: list[dict]) -> list[dict]:
        places = [(row["image_id"], id_) for row in rows for id_ in row["caption_ids"]]
        raw = [caption for row in rows for caption in row["captions"]]
        texts = [self._apply_rules(text, *place) for text, place in zip(raw, places, strict=True)]
        if self.max_tokens:
            self._truncate(texts, places)

        cleaned, start = [], 0
        for row in rows:
            span = slice(start, start + len(row["captions"]))
            kept = self._select(raw[span], texts[span], places[span])
            if kept:
                captions = [text for text, _ in kept]
                cleaned.append({**row, "captions": captions, "caption_ids": [id_ for _, id_ in kept]})
                self._counts["captions_out"] += len(kept)
            start = span.stop
        self._counts.update(images_in=len(rows), images_out=len(cleaned), captions_in=len(raw))
        return cleaned

    def _apply_rules(self, text: str, image_id: int, caption_id: int) -> str:
        if self.rules is not TEXT_RULES or _NEEDS_RULES.search(text):
            for rule in self.rules:
                before, text = text, rule.apply(text)
                if text != before:
                    self._note(rule.name, image_id, caption_id, before, text)
        return text

    def _select(self, raw: list[str], texts: list[str], places: list[tuple]) -> list[tuple[str, int]]:
        """Captions of one image that are neither empty nor repeated, with their ids."""
        kept, by_key = {}, {}
        for original, text, (image_id, caption_id) in zip(raw, texts, places, strict=True):
            if not _LETTER_OR_DIGIT.search(text):
                self._note("empty", image_id, caption_id, original, "")
            elif text in kept:
                self._note("exact_duplicate", image_id, caption_id, text, text)
            elif (key := duplicate_key(text)) in by_key:
                self._note("normalised_duplicate", image_id, caption_id, text, by_key[key])
            else:
                kept[text] = caption_id
                by_key[key] = text
        return list(kept.items())

    def _truncate(self, texts: list[str], places: list[tuple]) -> None:
        """Cut, in place, the captions of more than `max_tokens` tokens."""
        # A token covers at least one byte, so shorter captions need no tokenizer (">=" and not ">": sentencepiece may
        # put one token in front).
        long = [i for i, text in enumerate(texts) if len(text.encode()) >= self.max_tokens]
        encodings = self._tokenizer.encode_batch_fast([texts[i] for i in long], add_special_tokens=False)
        for i, encoding in zip(long, encodings, strict=True):
            if len(encoding) > self.max_tokens:
                before, texts[i] = texts[i], self._cut(texts[i])
                self._note("max_tokens", *places[i], before, texts[i])

    def _cut(self, text: str) -> str:
        """The longest clean beginning of `text` that has at most `max_tokens` tokens and ends between graphemes."""
        first_excluded = self._tokenizer.encode(text, add_special_tokens=False).offsets[self.max_tokens][0]
        ends = [match.end() for match in regex.finditer(r"\X", text) if match.end() <= first_excluded]
        # Alone, a beginning may split into more tokens than it had inside the text, so it is measured.
        for end in reversed(ends):
            beginning = clean_text(text[:end], self.rules)
            if len(self._tokenizer.encode(beginning, add_special_tokens=False)) <= self.max_tokens:
                return beginning
        return ""

    def _note(self, rule: str, image_id: int, caption_id: int, before: str, after: str) -> None:
        self._counts[rule] += 1
        if len(self._examples[rule]) < self.examples_per_rule:
            example = {"image_id": image_id, "caption_id": caption_id, "before": before, "after": after}
            self._examples[rule].append(example)
