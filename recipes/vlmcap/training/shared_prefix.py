"""The shared-prefix engine: an image and its prompt once, its captions as branches of one sequence.

The stock way feeds an image again with each of its captions. Here every sequence is laid out as

    [padding] image and prompt | caption 1 | caption 2 | ... | [padding]
              segment 1          segment 2   segment 3

Captions with prompts of their own, in several languages for instance, share the image alone:

    [padding] image | prompt 1, caption 1 | prompt 2, caption 2 | ... | [padding]

A branch sees the prefix and itself (`branch_mask`), its positions continue where the prefix ends (`lay_out`), and its
first token is predicted from the prefix's last hidden state (`branch_sources`). Prefixes are padded on the left and
branches on the right, so that in a batch all branches begin in one column. Only hidden states that predict a caption's
token need logits. Loss and gradients equal those of one caption at a time (tests/invariants).
"""

from functools import partial
from types import SimpleNamespace

import torch
from accelerate import PartialState
from datasets import Dataset
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from vlmcap.models.load import MASKED_ATTENTION, MODEL_TYPES, ModelError, chat_prompt
from vlmcap.training.caption_tokens import Branch, TurnsEncoder
from vlmcap.training.collator import BadImages, conversations, read_example
from vlmcap.training.features import FeatureCache

PADDING, PREFIX = 0, 1  # segments; branches are 2, 3, ...
LAYOUT = ("segments", "labels", "caption_start", "logit_columns", "sources")  # of a batch: what no model takes


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
        prompt: the user's text after the image, for examples without prompts of their own.
        bad_images: the list of unreadable pictures, see `read_example`.
        model: gives the positions (`get_rope_index`); of `MODEL_TYPES`. Nothing of its weights is kept, so that the
            collator travels to worker processes.
        features: cached image features of the rows; no picture is then opened.

    Returns a dict, B images long, L = longest prefix + longest sum of captions:
        input_ids, segments, labels, position_ids, caption_start, logit_columns, sources: see `lay_out`.
        pixel_values: float32, (patches, channels * temporal patch * patch^2), or cached features (patches, width).
        image_grid_thw: int64, (B, 3).
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
        self.prompt, self.encode = prompt, TurnsEncoder(processor)
        chat_prompt(processor, prompt)  # refuses what would end the turn
        inner = model.model
        positions_of = SimpleNamespace(
            config=inner.config, get_vision_position_ids=partial(type(inner).get_vision_position_ids, None)
        )
        self.get_rope_index = partial(type(inner).get_rope_index, positions_of)

    def __call__(self, examples: list[dict]) -> dict:
        if self.features is None:
            images, examples = zip(*(read_example(self.rows, e, self.bad_images) for e in examples), strict=True)
            pictures = dict(self.processor.image_processor(list(images), return_tensors="pt"))
        else:
            pictures = self.features.batch([example["row"] for example in examples])
        encoded = [self.encode(*conversations(example, self.prompt)) for example in examples]
        prefix = self.prefixes(pictures["image_grid_thw"], [beginning for beginning, _ in encoded])
        return lay_out(*prefix, [branches for _, branches in encoded]) | pictures

    def prefixes(
        self, grids: torch.Tensor, beginnings: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, mask (int64, (B, P), padded on the left) and positions (int64, (3, B, P)) of what branches share.

        Args:
            grids: image_grid_thw.
            beginnings: token ids of each, the image being one token.
        """
        image = self.processor.image_token_id
        counts = (grids.prod(1) // self.processor.image_processor.merge_size**2).tolist()
        prefix = self.processor.tokenizer.pad(
            {
                "input_ids": [
                    [number for token in ids for number in [token] * (count if token == image else 1)]
                    for ids, count in zip(beginnings, counts, strict=True)
                ]
            },
            padding_side="left",
            return_tensors="pt",
        )
        ids, mask = prefix["input_ids"], prefix["attention_mask"]
        is_image = (ids == image).long()
        position_ids, _ = self.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=grids, attention_mask=mask
        )
        return ids, mask, position_ids


def lay_out(
    prefix_ids: torch.Tensor,
    prefix_mask: torch.Tensor,
    prefix_positions: torch.Tensor,
    branches: list[list[Branch]],
) -> dict:
    """Prefixes and their branches in one sequence an image.

    Args:
        prefix_ids, prefix_mask: int64, (B, P), padded on the left.
        prefix_positions: int64, (3, B, P).
        branches: of every image; numbers and lengths may differ.

    Returns a dict, L = P + longest sum of branches, W = L - P:
        input_ids, segments, labels: int64, (B, L). Labels are -100 where nothing is trained on.
        position_ids: int64, (3, B, L).
        caption_start: int, the column where branches begin.
        logit_columns: int64, (C,), the columns whose hidden states predict a label of some image.
        sources: int64, (B, W), which of these predicts each column from `caption_start` on; 0 where no label is.
    """
    batch, start = prefix_ids.shape
    length = start + max(sum(len(branch.ids) for branch in captions) for captions in branches)
    ids = torch.zeros((batch, length), dtype=torch.long)
    trained = torch.zeros_like(ids, dtype=torch.bool)
    segments = torch.full_like(ids, PADDING)
    positions = torch.zeros((3, batch, length), dtype=torch.long)
    ids[:, :start], segments[:, :start], positions[:, :, :start] = prefix_ids, prefix_mask * PREFIX, prefix_positions
    for row, captions in enumerate(branches):
        end, after = start, positions[:, row].max() + 1
        for number, branch in enumerate(captions):
            begin, end = end, end + len(branch.ids)
            ids[row, begin:end] = torch.tensor(branch.ids)
            trained[row, begin:end] = torch.tensor(branch.trained)
            segments[row, begin:end] = PREFIX + 1 + number
            positions[:, row, begin:end] = after + torch.arange(len(branch.ids))
    sources = branch_sources(segments, start)
    needed = torch.zeros(length - start, dtype=torch.bool)
    needed[sources[trained[:, start:]]] = True
    return {
        "input_ids": ids,
        "segments": segments,
        "position_ids": positions,
        "labels": ids.masked_fill(~trained, -100),
        "caption_start": start,
        # The hidden state in a column predicts the token of the next one, so the last one predicts nothing.
        "logit_columns": start - 1 + needed.nonzero()[:, 0],
        "sources": (needed.cumsum(0) - 1)[sources].clamp(min=0) * trained[:, start:],
    }


def caption_logits(
    model: PreTrainedModel, batch: dict, attention: str
) -> tuple[ModelOutput, torch.Tensor, torch.Tensor]:
    """One forward of a batch, with logits where captions are predicted alone.

    Args:
        model: perhaps wrapped.
        batch: of `SharedPrefixCollator` or `CaptionCollator`; it is left as it is.
        attention: implementation of the model's attention, `config.get_text_config()._attn_implementation`.

    Returns:
        The model's output, with logits (B, C, V); and of the columns from `caption_start` on the labels, int64,
        (B * W,), and before them their sources, int64, (B * W,), among the flattened logits, (B * C, V).
    """
    inputs = {key: value for key, value in batch.items() if key not in LAYOUT}
    if "segments" in batch:
        inputs["attention_mask"] = attention_mask(batch["segments"], attention)
    columns = batch["logit_columns"]
    outputs = model(**inputs, logits_to_keep=columns, use_cache=False)
    rows = torch.arange(len(batch["labels"]), device=columns.device)[:, None]
    sources = batch["sources"] + len(columns) * rows
    return outputs, sources.flatten(), batch["labels"][:, batch["caption_start"] :].flatten()


def branch_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom: bool, (B, 1, L, L), True where query (dim 2) attends to key (dim 3).

    A token sees what is before it in the prefix and in its own branch, and itself; padding is seen by nobody
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
    """Which hidden state predicts each token of a branch: int64, (B, L - caption_start).

    0 stands for the last token of the prefix, j for the j-th token after it: a branch's first token is predicted
    from the prefix, every other from its predecessor.
    """
    follows = segments[:, caption_start:] == segments[:, caption_start - 1 : -1]
    return torch.arange(follows.shape[1], device=segments.device) * follows
