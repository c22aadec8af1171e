"""The shared-prefix engine: an image and its prompt once, its captions as branches of one sequence.

The stock way feeds an image again with each of its captions. Here every sequence is laid out as

    [padding] image and prompt | caption 1 | caption 2 | ... | [padding]
              segment 1          segment 2   segment 3

A caption sees the prefix and itself (`branch_mask`), its positions continue where the prefix ends (`lay_out`), and its
first token is predicted from the prefix's last hidden state (`branch_sources`). Prefixes are padded on the left and
captions on the right, so that in a batch all captions begin in one column and one slice of the hidden states needs
logits. Loss and gradients equal those of one caption at a time (tests/invariants).
"""

from functools import partial
from types import SimpleNamespace

import torch
from accelerate import PartialState
from datasets import Dataset
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.models.load import MASKED_ATTENTION, MODEL_TYPES, ModelError
from vlmcap.training.caption_tokens import CaptionEncoder
from vlmcap.training.collator import BadImages, read_example
from vlmcap.training.features import FeatureCache

PADDING, PREFIX = 0, 1  # segments; captions are 2, 3, ...


def supports(model: PreTrainedModel) -> bool:
    """Whether the engine knows the architecture; prints a line if it does not.

    Raises:
        ModelError: it knows the architecture, but not the attention implementation it was loaded with.
    """
    if model.config.model_type not in MODEL_TYPES:
        PartialState().print(
            f"Note: {model.config.model_type} is trained one caption a sequence; the shared-prefix engine knows"
            f" {', '.join(MODEL_TYPES)}."
        )
        return False
    attention = model.config.get_text_config()._attn_implementation
    if attention not in MASKED_ATTENTION:
        raise ModelError(
            f"attn_implementation={attention} takes no mask, which captions that share an image need: choose"
            f" {', '.join(MASKED_ATTENTION)}, or set shared_prefix: false (slower)."
        )
    return True


class SharedPrefixCollator:
    """Turns examples of `caption_examples` into shared-prefix batches.

    Args:
        rows: as `load_captions` returns them.
        processor: of the model.
        prompt: the user's text after the image.
        bad_images: the list of unreadable pictures, see `read_example`.
        model: gives the positions (`get_rope_index`); of `MODEL_TYPES`. Nothing of its weights is kept, so that the
            collator travels to worker processes.
        features: cached image features of the rows; no picture is then opened.

    Returns a dict, B images long, L = longest prefix + longest sum of captions:
        input_ids, segments, labels: int64, (B, L). Labels are -100 outside the captions.
        position_ids: int64, (3, B, L).
        pixel_values: float32, (patches, channels * temporal patch * patch^2), or cached features (patches, width).
        image_grid_thw: int64, (B, 3).
        caption_start: int, the column where captions begin.
    """

    def __init__(
        self,
        rows: Dataset,
        processor: ProcessorMixin,
        prompt: str,
        bad_images: BadImages,
        model: PreTrainedModel,
        features: FeatureCache | None = None,
    ):
        self.rows, self.processor, self.bad_images, self.features = rows, processor, bad_images, features
        self.encode = CaptionEncoder(processor, prompt)
        inner = model.model
        positions_of = SimpleNamespace(
            config=inner.config, get_vision_position_ids=partial(type(inner).get_vision_position_ids, None)
        )
        self.get_rope_index = partial(type(inner).get_rope_index, positions_of)

    def __call__(self, examples: list[dict]) -> dict:
        if self.features is None:
            images, captions = zip(*(read_example(self.rows, e, self.bad_images) for e in examples), strict=True)
            pictures = dict(self.processor.image_processor(list(images), return_tensors="pt"))
        else:
            captions = [example["captions"] for example in examples]
            pictures = self.features.batch([example["row"] for example in examples])
        prefix = self.prefixes(pictures["image_grid_thw"])
        return lay_out(*prefix, [self.encode(texts) for texts in captions]) | pictures

    def prefixes(self, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, mask (int64, (B, P), padded on the left) and positions (int64, (3, B, P)) of images with their
        prompt; `grids`: image_grid_thw."""
        prompt, image_token = self.encode.prompt, self.processor.image_token
        tokens = grids.prod(1) // self.processor.image_processor.merge_size**2
        prefix = self.processor.tokenizer(
            [prompt.replace(image_token, image_token * count) for count in tokens.tolist()],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids, mask = prefix["input_ids"], prefix["attention_mask"]
        is_image = (ids == self.processor.image_token_id).long()
        position_ids, _ = self.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=grids, attention_mask=mask
        )
        return ids, mask, position_ids


def lay_out(
    prefix_ids: torch.Tensor,
    prefix_mask: torch.Tensor,
    prefix_positions: torch.Tensor,
    branches: list[list[list[int]]],
) -> dict:
    """Prefixes and their captions in one sequence an image.

    Args:
        prefix_ids, prefix_mask: int64, (B, P), padded on the left.
        prefix_positions: int64, (3, B, P).
        branches: token ids of every caption of every image; numbers and lengths may differ.
    """
    batch, start = prefix_ids.shape
    length = start + max(sum(map(len, captions)) for captions in branches)
    ids = torch.zeros((batch, length), dtype=torch.long)
    segments = torch.full_like(ids, PADDING)
    positions = torch.zeros((3, batch, length), dtype=torch.long)
    ids[:, :start], segments[:, :start], positions[:, :, :start] = prefix_ids, prefix_mask * PREFIX, prefix_positions
    for row, captions in enumerate(branches):
        end, after = start, positions[:, row].max() + 1
        for number, tokens in enumerate(captions):
            begin, end = end, end + len(tokens)
            ids[row, begin:end] = torch.tensor(tokens)
            segments[row, begin:end] = PREFIX + 1 + number
            positions[:, row, begin:end] = after + torch.arange(len(tokens))
    return {
        "input_ids": ids,
        "segments": segments,
        "position_ids": positions,
        "labels": ids.masked_fill(segments <= PREFIX, -100),
        "caption_start": start,
    }


def branch_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom: bool, (B, 1, L, L), True where query (dim 2) attends to key (dim 3).

    A token sees what is before it in the prefix and in its own caption, and itself; padding is seen by nobody
    else (it sees itself, since a row of nothing has no softmax).
    """
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril_()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return ((((query == key) | (key == PREFIX)) & (key != PADDING) & causal) | itself)[:, None]


def attention_mask(segments: torch.Tensor, implementation: str) -> torch.Tensor | BlockMask:
    """`branch_mask` in the form that an attention implementation of transformers takes as it is."""
    if implementation == "flex_attention":

        def visible(batch, head, query, key):
            seen = (segments[batch, query] == segments[batch, key]) | (segments[batch, key] == PREFIX)
            return (seen & (segments[batch, key] != PADDING) & (key <= query)) | (key == query)

        rows, length = segments.shape
        return create_block_mask(visible, rows, None, length, length, device=segments.device)
    mask = branch_mask(segments)
    if implementation == "eager":  # adds the mask to the attention scores
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float16).min)
    return mask


def branch_sources(segments: torch.Tensor, caption_start: int) -> torch.Tensor:
    """Which hidden state predicts each caption token: int64, (B, L - caption_start).

    0 stands for the last token of the prefix, j for the j-th token after it: a caption's first token is predicted
    from the prefix, every other from its predecessor.
    """
    follows = segments[:, caption_start:] == segments[:, caption_start - 1 : -1]
    return torch.arange(follows.shape[1], device=segments.device) * follows
