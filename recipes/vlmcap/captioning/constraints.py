"""Constrained decoding: what a caption may not contain, as one logits processor for beam search.

Everything is decided on bytes, because a tokenizer's pieces need not be whole characters: a byte-level BPE may cut 猫
into E7 8C | AB. Three constraints, alone or together:

    japanese_only           An automaton over the UTF-8 of the allowed characters. Its state after a piece says which
                            pieces may follow, so a caption is at every step the start of a valid Japanese text, and
                            may end only where a character ends.
    avoid_words             A piece is barred when it would complete a forbidden word after what is written already.
    no_repeat_ngram_size    As in transformers, but over the caption alone: a word of the prompt may be said once more.
"""

import bisect
import re
from functools import lru_cache

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from vlmcap.errors import UserError

# Marks that occur in Japanese sentences. No spaces, no ASCII: digits are added below.
PUNCTUATION = (
    "、。，．・：；？！「」『』（）［］〔〕【】〈〉《》〜～ー－…‥―～％＋＝／＆＃＠※→"
    "←↑↓○●◎△▲▽▼□■◇◆☆★♪々〆〇〻ゝゞヽヾ゛゜"
)
# A started character needs at most three more pieces, of one byte each.
LONGEST_TAIL = 3


class ConstraintError(UserError):
    """A constraint cannot be kept with this tokenizer or these words. The message says why."""


@lru_cache(maxsize=1)
def japanese_characters() -> frozenset[str]:
    """Hiragana, katakana (full and half width), kanji, digits (ASCII and full width) and punctuation.

    Kanji are those of JIS X 0213 and of Windows-31J: most simplified characters of Chinese (发, 这, 车) are not among
    them.
    """
    kana = {chr(code) for block in ((0x3041, 0x3097), (0x30A1, 0x30FB), (0xFF66, 0xFFA0)) for code in range(*block)}
    digits = {chr(code) for zero in ("0", "０") for code in range(ord(zero), ord(zero) + 10)}
    han = (chr(code) for block in ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x2A6E0)) for code in range(*block))
    kanji = {character for character in han if _in_jis(character)}
    return frozenset(kana | digits | kanji | set(PUNCTUATION))


def _in_jis(character: str) -> bool:
    for codec in ("shift_jis_2004", "cp932"):  # Windows's has 髙 and a few more
        try:
            character.encode(codec)
        except UnicodeEncodeError:
            continue
        return True
    return False


def constraints(
    tokenizer: PreTrainedTokenizerBase,
    prompt_length: int,
    japanese_only: bool = False,
    no_repeat_ngram_size: int = 0,
    avoid_words: list[str] | None = None,
    max_new_tokens: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> LogitsProcessorList:
    """Logits processors for `generate`, an empty list when nothing is asked.

    Args:
        tokenizer: a fast tokenizer, byte-level or SentencePiece-like.
        prompt_length: how many tokens are before the caption in every row.
        japanese_only: nothing but `japanese_characters`; one space may come before them, as SentencePiece writes it.
        no_repeat_ngram_size: no n-gram of this many generated tokens occurs twice; 0 allows it.
        avoid_words: no caption contains one of these, however it is cut into pieces. Compared character by character:
            another spelling is another word.
        max_new_tokens: of `generate`. With it a caption of japanese_only that is cut there still ends with a whole
            character.
        eos_token_id: of `generate`; the tokenizer's own when None. Gemma 3 ends a turn with another token.

    Raises:
        ConstraintError: the tokenizer's pieces cannot be read as bytes, or a word is empty or holds white space.
    """
    words = tuple(avoid_words or ())
    for word in words:
        if not word or re.search(r"\s", word):
            raise ConstraintError(
                f"avoid_words: {word!r} is empty or holds white space, which no caption keeps as it is"
            )
    if japanese_only and words:
        _check_enough_left(words)
    if not (japanese_only or no_repeat_ngram_size or words):
        return LogitsProcessorList()
    ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or [tokenizer.eos_token_id]
    ends = frozenset(ends) | {tokenizer.pad_token_id}
    without = frozenset(word for word in words if len(word) == 1)
    return LogitsProcessorList(
        [
            CaptionConstraints(
                prompt_length,
                _automaton(tokenizer, without, ends - {None}) if japanese_only else None,
                _avoided(tokenizer, words) if words else None,
                no_repeat_ngram_size,
                max_new_tokens,
            )
        ]
    )


def _check_enough_left(words: tuple[str, ...]) -> None:
    """Whatever part of a character is written, a character must be left that begins so and completes no word."""
    last = {word[-1] for word in words if len(word) > 1}
    allowed = japanese_characters() - {word for word in words if len(word) == 1}
    left = {character.encode()[:cut] for character in allowed - last for cut in (1, 2, 3)}
    for character in allowed & last:
        if not left.issuperset(character.encode()[:cut] for cut in range(1, len(character.encode()))):
            raise ConstraintError(
                f"avoid_words: the words leave no character whose bytes begin like those of {character!r}, so a "
                "caption could not be ended. Give fewer words that end in such characters."
            )


class CaptionConstraints(LogitsProcessor):
    """Sets the scores of what may not come next to minus infinity; see `constraints`, which makes it."""

    def __init__(self, prompt_length: int, automaton, avoided, no_repeat_ngram_size: int, max_new_tokens: int | None):
        self.prompt_length, self.automaton, self.avoided = prompt_length, automaton, avoided
        self.ngram, self.max_new_tokens = no_repeat_ngram_size, max_new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) of the next token after `input_ids` (rows, prompt and caption so far)."""
        written = input_ids[:, self.prompt_length :]
        left = LONGEST_TAIL + 1
        if self.max_new_tokens is not None:
            left = min(left, self.max_new_tokens - written.shape[1])
        if self.automaton:
            blocked = self.automaton.blocked(written, left, scores.shape[1])
        else:
            blocked = torch.zeros_like(scores, dtype=torch.bool)
        if self.avoided:
            self.avoided.block(written, blocked)
        if self.ngram:
            free = blocked.clone()
            self._block_repeats(written, blocked)
            # In the middle of a character everything that would complete it may be a repetition: then let it be one.
            blocked = torch.where(blocked.all(1, keepdim=True), free, blocked)
        return scores.masked_fill(blocked, -torch.inf)

    def _block_repeats(self, written: torch.Tensor, blocked: torch.Tensor) -> None:
        if written.shape[1] < self.ngram:
            return
        ngrams = written.unfold(1, self.ngram, 1)
        last = written[:, written.shape[1] - self.ngram + 1 :]
        rows, places = (ngrams[..., :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
        blocked[rows, ngrams[rows, places, -1]] = True


# Pieces as bytes ---------------------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Bytes that each token adds to a decoded caption; None for special tokens, which decoding leaves out."""
    decoder = str(tokenizer.backend_tokenizer.decoder)
    byte_level = "ByteLevel" in decoder
    if not byte_level and "Metaspace" not in decoder and "▁" not in decoder:
        raise ConstraintError(
            f"{type(tokenizer).__name__}: its pieces are neither byte-level nor SentencePiece's, so what they write "
            "is not known"
        )
    # The characters by which byte-level tokenizers write bytes: GPT-2's table, which tokenizers does not export whole.
    table = {character: byte for byte, character in _byte_characters().items()}
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    pieces: list[bytes | None] = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if index in special or token is None:
            pieces.append(None)
        elif index in added:
            pieces.append(token.encode())
        elif byte_level:
            pieces.append(bytes(table[character] for character in token))
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            pieces.append(bytes([int(token[3:5], 16)]))
        else:
            pieces.append(token.replace("▁", " ").encode())
    return pieces


def _byte_characters() -> dict[int, str]:
    """Byte -> character of byte-level BPE (GPT-2's encoder.py): printable Latin-1 as itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    if set(characters.values()) != set(ByteLevel.alphabet()):
        raise ConstraintError("the byte-level alphabet of this version of tokenizers is not GPT-2's")
    return characters


# Japanese only -----------------------------------------------------------------------------------------------------
class _Automaton:
    """Which pieces may follow in which state, for every piece of a tokenizer.

    States: 0 nothing written, 1 after a whole character, 2 ended, then one for every way of being inside a character
    (some 600), last a dead one. Inside a character only pieces that begin with a continuation byte may follow, so
    those states have columns for these pieces alone.
    """

    START, WHOLE, ENDED, INSIDE = 0, 1, 2, 3

    def __init__(self, tokenizer: PreTrainedTokenizerBase, without: frozenset[str], ends: frozenset[int]):
        pieces = _pieces(tokenizer)
        steps = self._byte_steps(japanese_characters() - without)
        dead = len(steps)

        def after(state: int, piece: bytes | None) -> int:
            for byte in piece or ():
                state = steps[state].get(byte, dead)
                if state == dead:
                    break
            return state if piece else dead

        outside = np.full((self.INSIDE, len(pieces)), dead, dtype=np.int16)
        for state in (self.START, self.WHOLE):
            outside[state] = [after(state, piece) for piece in pieces]
        outside[:, list(ends)] = self.ENDED
        columns = [index for index, piece in enumerate(pieces) if piece and 0x80 <= piece[0] < 0xC0]
        inside = np.full((dead + 1, len(columns) + 1), dead, dtype=np.int16)
        for state in range(self.INSIDE, dead):
            inside[state, :-1] = [after(state, pieces[index]) for index in columns]

        # How many more tokens complete the started character; what none completes is out of reach.
        needed = np.array([0] * self.INSIDE + [len(pieces)] * (dead + 1 - self.INSIDE))
        for _ in range(LONGEST_TAIL):
            needed[self.INSIDE : dead] = needed[inside[self.INSIDE : dead]].min(axis=1) + 1
        if (outside[self.START] == dead).sum() >= len(pieces) - len(ends):
            raise ConstraintError(f"{type(tokenizer).__name__} has no piece that writes Japanese: japanese_only fails")

        self.columns = torch.tensor(columns, dtype=torch.long)
        self.column_of = torch.full((len(pieces),), len(columns), dtype=torch.long)
        self.column_of[self.columns] = torch.arange(len(columns))
        self.outside, self.inside = torch.from_numpy(outside), torch.from_numpy(inside)
        # What is blocked when 1, 2, 3 or any number of tokens may still come; inside a character, all but `columns`.
        most = range(LONGEST_TAIL + 1)
        everything = np.ones((1, len(pieces)), dtype=bool)
        self.blocked_outside = torch.from_numpy(
            np.stack([np.concatenate([needed[outside] > left, everything]) for left in most])
        )
        every_state = np.concatenate([outside[:, columns], inside[self.INSIDE :, :-1]])
        self.blocked_inside = torch.from_numpy(np.stack([needed[every_state] > left for left in most]))

    @staticmethod
    def _byte_steps(characters: frozenset[str]) -> list[dict[int, int]]:
        """Byte -> next state, for every state; ways into characters that can end alike are one state."""
        trie: dict = {}
        for character in characters:
            *head, last = character.encode()
            node = trie
            for byte in head:
                node = node.setdefault(byte, {})
            node[last] = None
        steps: list[dict[int, int]] = [{}, {}, {}]
        known: dict[tuple, int] = {}

        def state_of(node: dict | None) -> int:
            if node is None:
                return _Automaton.WHOLE
            arcs = tuple(sorted((byte, state_of(child)) for byte, child in node.items()))
            if arcs not in known:
                known[arcs] = len(steps)
                steps.append(dict(arcs))
            return known[arcs]

        steps[_Automaton.WHOLE] = {byte: state_of(child) for byte, child in trie.items()}
        steps[_Automaton.START] = steps[_Automaton.WHOLE] | {ord(" "): _Automaton.WHOLE}
        return steps

    def blocked(self, written: torch.Tensor, left: int, vocabulary: int) -> torch.Tensor:
        """(rows, vocabulary) after the tokens `written` (rows, length), when `left` tokens may still come."""
        if self.outside.device != written.device:
            for name, value in vars(self).items():
                setattr(self, name, value.to(written.device))
        state = torch.zeros(len(written), dtype=torch.long, device=written.device)
        for token in written.unbind(1):
            outside = self.outside[state.clamp(max=self.ENDED), token]
            inside = self.inside[state, self.column_of[token]]
            following = torch.where(state < self.INSIDE, outside, inside).long()
            # What follows the end is padding, whatever token the model pads with.
            state = torch.where(state == self.ENDED, state, following)
        blocked = self.blocked_outside[left - 1][state.clamp(max=self.INSIDE)]
        blocked[:, self.columns] = self.blocked_inside[left - 1][state]
        # A model may have more logits than its tokenizer has tokens.
        return torch.nn.functional.pad(blocked, (0, vocabulary - blocked.shape[1]), value=True)


@lru_cache(maxsize=4)
def _automaton(tokenizer: PreTrainedTokenizerBase, without: frozenset[str], ends: frozenset[int]) -> _Automaton:
    return _Automaton(tokenizer, without, ends)


# Words to avoid ----------------------------------------------------------------------------------------------------
class _Avoided:
    """Which pieces would complete a forbidden word, after a given end of a caption."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]):
        self.pieces = _pieces(tokenizer)
        encoded = [word.encode() for word in words]
        # A piece that holds a whole word is never right.
        whole = re.compile(b"|".join(map(re.escape, encoded)))
        self.never = torch.tensor(
            [i for i, piece in enumerate(self.pieces) if piece and whole.search(piece)], dtype=torch.long
        )
        self.order = sorted((i for i, piece in enumerate(self.pieces) if piece), key=self.pieces.__getitem__)
        self.sorted = [self.pieces[i] for i in self.order]
        # The beginning of a word -> the pieces that complete it.
        completing: dict[bytes, set[int]] = {}
        for word in encoded:
            for cut in range(1, len(word)):
                completing.setdefault(word[:cut], set()).update(self._beginning_with(word[cut:]))
        self.completing = {start: torch.tensor(sorted(pieces)) for start, pieces in completing.items() if pieces}
        self.longest = max(map(len, encoded)) - 1

    def _beginning_with(self, rest: bytes) -> list[int]:
        first = bisect.bisect_left(self.sorted, rest)
        last = first
        while last < len(self.sorted) and self.sorted[last].startswith(rest):
            last += 1
        return self.order[first:last]

    def block(self, written: torch.Tensor, blocked: torch.Tensor) -> None:
        """Marks in `blocked` (rows, vocabulary) what may not follow `written` (rows, length)."""
        blocked[:, self.never.to(blocked.device)] = True
        for row, ids in enumerate(written.tolist()):
            end = b""
            for index in reversed(ids):
                if len(end) >= self.longest:
                    break
                end = (self.pieces[index] or b"" if index < len(self.pieces) else b"") + end
            for length in range(1, min(self.longest, len(end)) + 1):
                tokens = self.completing.get(end[-length:])
                if tokens is not None:
                    blocked[row, tokens.to(blocked.device)] = True


@lru_cache(maxsize=4)
def _avoided(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> _Avoided:
    return _Avoided(tokenizer, words)
