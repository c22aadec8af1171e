"""Samples for training on rewards: the pictures of a step, in their order, and captions drawn as branches of each."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SuppressTokensLogitsProcessor,
)

from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.branches import BranchGenerator
from vlmcap.captioning.generate import search_config
from vlmcap.models.tower import fed_with_features
from vlmcap.training.collator import read_picture
from vlmcap.training.features import FeatureCache
from vlmcap.training.sampler import SimilarSizeSampler
from vlmcap.training.shared_prefix import SharedPrefixCollator
from vlmcap.training.trainer_arguments import CaptionGRPOConfig


class PictureCollator(SharedPrefixCollator):
    """Turns examples of `caption_examples` into pictures with their prompts; captions come later, by sampling. Where
    rows have prompts of their own, all captions of a row have the same.

    Returns a dict of B images: input_ids, attention_mask (int64, (B, P), padded on the left), position_ids (int64,
    (3, B, P)), pixel_values and image_grid_thw as in `SharedPrefixCollator`, rows (int64, (B,)): where they are in the
    dataset.
    """

    def __call__(self, examples: list[dict]) -> dict:
        rows = [example["row"] for example in examples]
        if self.features is None:
            read = [read_picture(self.rows, row, self.bad_images) for row in rows]
            rows = [row for row, _ in read]
            pictures = dict(self.processor.image_processor([image for _, image in read], return_tensors="pt"))
        else:
            pictures = self.features.batch(rows)
        beginnings = [self.encode([[self.prompt_of(row), ""]])[0] for row in rows]
        ids, mask, positions = self.prefixes(pictures["image_grid_thw"], beginnings)
        prompts = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return prompts | pictures | {"rows": torch.tensor(rows)}

    def prompt_of(self, row: int) -> str:
        """What is asked of the picture of a row."""
        if "prompts" not in self.rows.column_names:
            return self.prompt
        return self.rows.select_columns("prompts")[row]["prompts"][0][0]


class RepeatingSampler(SimilarSizeSampler):
    """The order of `SimilarSizeSampler`, the images of every optimizer step `times` times in a row: their samples are
    trained on as often. What is left at the end of an epoch, less than a step, waits for another epoch.

    Args:
        step: images of an optimizer step.
    """

    def __init__(self, sizes: list[int], batch_size: int, seed: int, step: int, times: int):
        super().__init__(sizes, batch_size, seed)
        self.step, self.times = step, times

    def __len__(self) -> int:
        return len(self.sizes) // self.step * self.step * self.times

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        for start in range(0, len(order) - self.step + 1, self.step):
            yield from order[start : start + self.step] * self.times


class CaptionSampler:
    """Draws captions of pictures whose pixels the vision encoder has encoded, as branches of each picture.

    Samples depend on seed, step and image alone, not on their batch or process. Special tokens but the end are never
    sampled: an `<|image_pad|>` in a caption would be taken for another image.

    Args:
        model: the one that is trained, in evaluation mode whenever it draws.
        processor: of the model.
        args: `num_generations`, `max_completion_length`, `temperature`, `top_k`, `top_p` and `seed`.
        at_once: images a device.

    Attributes:
        config: how samples are drawn.
        limits: what may not be drawn.
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin, args: CaptionGRPOConfig, at_once: int):
        self.model, self.args, self.at_once, self.image_token = model, args, at_once, processor.image_token_id
        self.config = sampling_config(model, processor.tokenizer, args)
        barred = barred_tokens(processor.tokenizer, model.config.get_text_config().vocab_size, self.config)
        self.limits = LogitsProcessorList([SuppressTokensLogitsProcessor(barred, device=str(args.device))])

    def draw(self, pictures: list[dict], rows: list[int], step: int) -> list[list[list[int]]]:
        """Token ids of the samples of each picture, each up to its end, which is one of them.

        Args:
            pictures: batches of `PictureCollator`, their pixels encoded.
            rows: where these pictures are in the dataset.
            step: of the optimizer.
        """
        shape = (self.args.num_generations, self.args.max_completion_length)

        def draws(number: int) -> torch.Tensor:
            text = f"{self.args.seed} {step} {rows[number]}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7]))
            return torch.rand(shape, generator=generator)

        at_once = min(self.at_once, len(rows))
        engine = BranchGenerator(self.model, self.config, self.limits, at_once, draws=draws)
        found = {caption.number: caption.tokens for caption in engine.run(self._single(pictures))}
        return [[self._cut(sample) for sample in found[number].tolist()] for number in range(len(rows))]

    def truncated(self, sample: list[int]) -> bool:
        """Whether a sample has no end."""
        return sample[-1] not in self.config.eos_token_id

    def _single(self, pictures: list[dict]) -> Iterator[dict]:
        """Each picture of some batches with its prompt, as `BranchGenerator` takes it."""
        for batch in pictures:
            features = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
            for row, mask in enumerate(batch["attention_mask"].bool()):
                ids = batch["input_ids"][row][mask][None]
                yield {
                    "input_ids": ids,
                    "attention_mask": torch.ones_like(ids),
                    "mm_token_type_ids": (ids == self.image_token).long(),
                    "pixel_values": features[row],
                    "image_grid_thw": batch["image_grid_thw"][row : row + 1],
                }

    def _cut(self, sample: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(sample) if token in self.config.eos_token_id]
        return sample[: ends[0] + 1] if ends else sample


def sampling_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: CaptionGRPOConfig) -> GenerationConfig:
    """How samples are drawn: the ends and the padding are those of beam search (`search_config`)."""
    config = search_config(model, tokenizer, BeamArguments(num_beams=1, max_new_tokens=args.max_completion_length))
    ends = config.eos_token_id
    config.update(
        do_sample=True,
        num_return_sequences=args.num_generations,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_token_id=[ends] if isinstance(ends, int) else ends,
    )
    return config


def barred_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, config: GenerationConfig) -> list[int]:
    """What is never sampled: special tokens but the ends, and rows of the output layer that are no token."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted((special | set(range(len(tokenizer), vocabulary))) - set(config.eos_token_id))


@contextmanager
def fed_with(model: nn.Module, features: FeatureCache | None) -> Iterator[Callable[[list[dict]], list[torch.Tensor]]]:
    """`fed_with_features`, also for a model that is given cached features."""
    if features is None:
        with fed_with_features(model) as encode:
            yield encode
    else:
        yield lambda batches: [batch["pixel_values"] for batch in batches]
