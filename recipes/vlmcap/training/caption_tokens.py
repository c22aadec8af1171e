"""The chat template, rendered once, and captions as tokens: whatever a caption says, its special tokens are text."""

from transformers import BatchFeature, ProcessorMixin
from trl.data_utils import apply_chat_template

from vlmcap.models.load import chat_prompt

PROBE = "caption"


class CaptionEncoder:
    """Encodes captions as the chat template writes them after a prompt: the caption, then the end of turn.

    A caption that says `<|im_end|>` or `<|image_pad|>` is encoded letter by letter: the end of turn is the template's
    alone. Templates that change the text of a turn (some trim it) are not asked to: captions are fed as they are.

    Args:
        prompt: the user's text after the image.

    Attributes:
        prompt: the text in front of the assistant's turn, with one image token, as TRL renders it.
        before, end: token ids that the template writes before a caption, and after it.

    Raises:
        ModelError: as `chat_prompt`, for instance if the prompt holds a special token.
    """

    def __init__(self, processor: ProcessorMixin, prompt: str):
        self.tokenizer = processor.tokenizer
        chat_prompt(processor, prompt)  # refuses what would end the turn
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        turn = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
        written = apply_chat_template({"prompt": [user], "completion": [turn]}, processor)
        self.prompt = written["prompt"]
        before, _, end = written["completion"].partition(PROBE)
        self.before, self.end = self.tokenizer([before, end], add_special_tokens=False)["input_ids"]

    def __call__(self, captions: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [self.before + ids + self.end for ids in encoded]


class CaptionProcessor:
    """A processor for TRL's collator (trl 1.16), which encodes prompts and completions in a call each: the prompts,
    with their images, as the processor does, the completions, which are captions, as `CaptionEncoder` does."""

    def __init__(self, processor: ProcessorMixin, encode: CaptionEncoder):
        self.processor, self.encode = processor, encode

    def __getattr__(self, name: str):
        return getattr(self.processor, name)

    def __call__(self, text: list[str], images: list | None = None, **kwargs) -> BatchFeature:
        if images is not None:
            return self.processor(text=text, images=images, **kwargs)
        return self.processor.tokenizer.pad(
            {"input_ids": self.encode(text)}, padding_side=kwargs["padding_side"], return_tensors="pt"
        )
