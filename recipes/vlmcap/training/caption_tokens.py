"""Conversations about a picture as tokens: the chat template is rendered once, and whatever a caption or a user says,
its special tokens are text."""

from itertools import groupby, pairwise
from typing import NamedTuple

from transformers import BatchFeature, ProcessorMixin
from trl.data_utils import apply_chat_template

from vlmcap.models.load import ModelError, special_tokens

BEFORE, BEFORE_REPLY, AFTER = range(3)


class Branch(NamedTuple):
    """A sequence after the prefix that it shares with others: token ids, and which of them are trained on."""

    ids: list[int]
    trained: list[bool]


class Piece(NamedTuple):
    """A piece of a conversation as the chat template writes it.

    turn: whose text it is: the number of the turn, -1 for the system's; None for what the template writes.
    trained: whether the assistant says it, the end of turn included.
    part: BEFORE the user's first turn, where the picture is; BEFORE_REPLY: from there to the assistant's first turn;
        AFTER: the rest.
    """

    text: str
    turn: int | None
    trained: bool
    part: int


class TurnsEncoder:
    """Encodes conversations about one picture: the prefix that they share, and a branch for each.

    They share what comes before the assistant's first turn, if the user's first turn is the same in all of them; else
    what comes before that, the picture. Trained on is what the assistant says, with its ends of turn.

    A turn that says `<|im_end|>` or `<|image_pad|>` is encoded letter by letter: the end of turn is the template's
    alone. Templates that change the text of a turn (some trim it) are not asked to: it is fed as it is.

    Attributes:
        picture_first: whether the template writes the picture before the user's text. If not, only conversations that
            begin with the same turn share a picture.

    Raises:
        ModelError: the chat template fails.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.specials = special_tokens(processor)
        self.templates: dict[tuple, list[Piece]] = {}  # by number of turns, and whether there is a system's turn
        before = "".join(piece.text for piece in self._template(2, False) if piece.part == BEFORE)
        self.picture_first = processor.image_token in before

    def __call__(self, conversations: list[list[str]], system: str = "") -> tuple[list[int], list[Branch]]:
        """Token ids of the prefix, the picture being one token, and the branches.

        Args:
            conversations: what user and assistant say in turn: [prompt, caption], or more turns. The last one is the
                assistant's.
            system: the system's turn; "" leaves it to the template.

        Raises:
            ModelError: the template cannot write them, or writes the picture after different texts.
        """
        same = len({turns[0] for turns in conversations}) == 1
        if not same and not self.picture_first:
            raise ModelError("the chat template writes the picture after the user's text: one prompt a picture")
        written, shared = [self._written(turns, system) for turns in conversations], BEFORE_REPLY if same else BEFORE
        prefix = self._encode([piece for piece in written[0] if piece.part <= shared]).ids
        return prefix, [self._encode([piece for piece in pieces if piece.part > shared]) for pieces in written]

    def with_text(self, turns: list[str], system: str = "") -> tuple[str, Branch]:
        """The same of one conversation, the prefix as text with one image token: a processor knows how many it
        becomes. What the user says is in the prefix, unless it holds a special token.

        Raises:
            ModelError: as above; a special token is before the picture.
        """
        shared = BEFORE if self._holds_special(turns[0]) else BEFORE_REPLY
        if self._holds_special(system) or not self.picture_first and shared == BEFORE:
            raise ModelError("a special token of this model is in what the user or the system says before the picture")
        written = self._written(turns, system)
        prefix = "".join(piece.text for piece in written if piece.part <= shared)
        return prefix, self._encode([piece for piece in written if piece.part > shared])

    def _written(self, turns: list[str], system: str) -> list[Piece]:
        said = dict(enumerate(turns)) | {-1: system}
        pieces = self._template(len(turns), bool(system))
        return [Piece(said.get(piece.turn, piece.text), *piece[1:]) for piece in pieces]

    def _encode(self, pieces: list[Piece]) -> Branch:
        branch = Branch([], [])
        for trained, group in groupby(pieces, lambda piece: piece.trained):
            group = list(group)
            if not trained and not any(self._holds_special(piece.text) for piece in group if piece.turn is not None):
                # One text, which the tokenizer splits as it does when captions are asked for.
                group = [Piece("".join(piece.text for piece in group), None, trained, AFTER)]
            for piece in group:
                ids = self.tokenizer(
                    piece.text, add_special_tokens=False, split_special_tokens=piece.turn is not None
                )["input_ids"]
                branch.ids.extend(ids)
                branch.trained.extend([trained] * len(ids))
        return branch

    def _holds_special(self, text: str) -> bool:
        return any(token in text for token in self.specials)

    def _template(self, turns: int, system: bool) -> list[Piece]:
        """The pieces of a conversation of so many turns, its texts left open; rendered once."""
        if (turns, system) not in self.templates:
            self.templates[turns, system] = self._render(turns, system)
        return self.templates[turns, system]

    def _render(self, turns: int, system: bool) -> list[Piece]:
        probes = {f"probe{number}probe": number for number in range(-system, turns)}
        messages = [
            {
                "role": "system" if number < 0 else ("user", "assistant")[number % 2],
                "content": [{"type": "image"}] * (number == 0) + [{"type": "text", "text": probe}],
            }
            for probe, number in probes.items()
        ]
        written, replies = "", []
        for place in range(1 + system, turns + system, 2):
            try:
                parts = {"prompt": messages[:place], "completion": [messages[place]]}
                parts = apply_chat_template(parts, self.processor)
            except Exception as error:  # a template is a program, run in a sandbox: it may fail in any way
                raise ModelError(f"the chat template of {self.tokenizer.name_or_path} fails: {error}") from error
            if not parts["prompt"].startswith(written):
                raise ModelError("the chat template changes earlier turns when others follow: use one turn a picture")
            written = parts["prompt"] + parts["completion"]
            replies.append(range(len(parts["prompt"]), len(written)))
        if odd := [number for probe, number in probes.items() if written.count(probe) != 1]:
            what = "the system's turn" if odd[0] < 0 else f"turn {odd[0] + 1} of {turns}"
            raise ModelError(f"the chat template leaves out or repeats {what}")
        begins = {written.index(probe): number for probe, number in probes.items()}
        ends = {written.index(probe) + len(probe) for probe in probes}
        cuts = {0, len(written), *begins, *ends, *(place for reply in replies for place in (reply.start, reply.stop))}
        parts = written.index("probe0probe"), replies[0].start
        return [
            Piece(
                written[start:end],
                begins.get(start),
                trained=any(start in reply for reply in replies),
                part=sum(start >= part for part in parts),
            )
            for start, end in pairwise(sorted(cuts))
        ]


class EncodedProcessor:
    """A processor for TRL's collator (trl 1.16), which encodes prompts and completions in a call each: the prompts,
    with their images, as the processor does; completions are branches already."""

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __getattr__(self, name: str):
        return getattr(self.processor, name)

    def __call__(self, text: list[str] | list[Branch], images: list | None = None, **kwargs) -> BatchFeature:
        if images is not None:
            return self.processor(text=text, images=images, **kwargs)
        ids = {"input_ids": [branch.ids for branch in text]}
        return self.processor.tokenizer.pad(ids, padding_side=kwargs["padding_side"], return_tensors="pt")
