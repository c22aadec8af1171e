"""Captions as tokens: whatever a caption says, its special tokens are ordinary text."""

from transformers import BatchFeature, ProcessorMixin
from trl.data_utils import apply_chat_template

PROBE = "caption"


class CaptionEncoder:
    """Encodes captions as the chat template writes them after a prompt: the caption, then the end of turn.

    A caption that says `<|im_end|>` or `<|image_pad|>` is encoded letter by letter: the end of turn is the template's
    alone. Templates that change the text of a turn (some trim it) are not asked to: captions are fed as they are.
    """

    def __init__(self, processor: ProcessorMixin):
        self.tokenizer = processor.tokenizer
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE}]}
        turn = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
        written = apply_chat_template({"prompt": [user], "completion": [turn]}, processor)["completion"]
        self.before, _, self.end = written.partition(PROBE)

    def __call__(self, captions: list[str]) -> list[list[int]]:
        before, end = self.tokenizer([self.before, self.end], add_special_tokens=False)["input_ids"]
        encoded = self.tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [before + ids + end for ids in encoded]


class CaptionProcessor:
    """A processor for TRL's collator (trl 1.16), which encodes prompts and completions in a call each: the prompts,
    with their images, as the processor does, the completions as `CaptionEncoder` does."""

    def __init__(self, processor: ProcessorMixin):
        self.processor, self.encode = processor, CaptionEncoder(processor)

    def __getattr__(self, name: str):
        return getattr(self.processor, name)

    def __call__(self, text: list[str], images: list | None = None, **kwargs) -> BatchFeature:
        if images is not None:
            return self.processor(text=text, images=images, **kwargs)
        captions = [completion.removeprefix(self.encode.before).removesuffix(self.encode.end) for completion in text]
        return self.processor.tokenizer.pad(
            {"input_ids": self.encode(captions)}, padding_side=kwargs["padding_side"], return_tensors="pt"
        )
