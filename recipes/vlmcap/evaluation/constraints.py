"""Constrained decoding: what a caption may not contain, as logits processors. (To be written.)"""

from transformers import LogitsProcessorList, PreTrainedTokenizerBase


def constraints(
    tokenizer: PreTrainedTokenizerBase,
    prompt_length: int,
    japanese_only: bool = False,
    no_repeat_ngram_size: int = 0,
    avoid_words: list[str] | None = None,
) -> LogitsProcessorList:
    """Logits processors for `generate`; `prompt_length` tokens stand before the caption in every row."""
    return LogitsProcessorList()
