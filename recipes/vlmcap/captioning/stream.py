"""Captions of a stream of pictures, in their order: by the engine of `branches.py` where it knows the model, else by
transformers' `generate`, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from os.path import commonprefix

import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.branches import BranchGenerator, supports_branches
from vlmcap.captioning.constraints import constraints
from vlmcap.captioning.engines import ADAPTER, run_engines, weights
from vlmcap.captioning.generate import caption_batch, read_words, search_config, takes_special_tokens
from vlmcap.errors import notice
from vlmcap.models.load import MASKED_ATTENTION, MODEL_TYPES, base_model, chat_prompt, takes_prompt

# Pixels of a batch for `generate`: 0.6 GB as RGB, 16 photographs of 12 megapixels.
BATCH_PIXELS = 200_000_000


class CaptionStream:
    """Prepared pictures in, captions out.

    A picture gets `num_captions` captions for each of `prompts`, by each of `models`.

    Args:
        model: in evaluation mode. Between two captions it may be used.
        args: GenerationArguments for a model that takes a prompt. `generation_batch_size` captions are in work.
        num_captions: the best of the beam first; `args.num_beams` at most.
        prompts: instead of that of `args`. What they begin with, the picture too, runs once for all.
        models: ADAPTER, the model as it is; BASE, without its adapter; or both: the vision encoder runs once for them.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: ProcessorMixin,
        args: BeamArguments,
        num_captions: int = 1,
        prompts: list[str] | None = None,
        models: Sequence[str] = (ADAPTER,),
    ):
        self.model, self.processor, self.args, self.num_captions = model, processor, args, num_captions
        self.prompts, self.models = prompts or [args.prompt if takes_prompt(processor) else None], models
        self.shares = takes_prompt(processor) and supports_branches(model)
        if self.shares:
            ids = [self._encode(prompt) for prompt in self.prompts]
            self.beginning = commonprefix([one[:-1] for one in ids]) if len(ids) > 1 else ids[0]
            self.endings = [one[len(self.beginning) :] for one in ids]
            self.shares = processor.image_token_id in self.beginning
            if not self.shares:
                _say_stock("prompts cannot share a picture where the chat template writes them before it")
        elif base_model(model).config.model_type not in MODEL_TYPES:
            _say_stock(f"the engine whose beams share their image knows {', '.join(MODEL_TYPES)}")
        else:
            _say_stock(f"the engine whose beams share their image needs --attn_implementation {MASKED_ATTENTION[0]}")

    def _encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt with its chat template; the picture is one token."""
        text = chat_prompt(self.processor, prompt)
        specials = takes_special_tokens(self.processor, text)
        return self.processor.tokenizer(text, add_special_tokens=specials)["input_ids"]

    def prepare(self, picture: Image.Image | dict[str, torch.Tensor]) -> Image.Image | dict[str, torch.Tensor]:
        """What `run` takes of a picture. Threads may call it, ahead of the model.

        Args:
            picture: as `open_image` returns it, or what the image processor makes of it: image_grid_thw, int64,
                (1, 3), and pixel_values, or features for a model that takes these (models/tower.py).
        """
        if not self.shares:
            return picture
        if isinstance(picture, Image.Image):
            picture = self.processor.image_processor(picture, return_tensors="pt")
        image, merged = self.processor.image_token_id, self.processor.image_processor.merge_size**2
        place = self.beginning.index(image)
        tokens = [image] * (int(picture["image_grid_thw"].prod()) // merged)
        ids = torch.tensor([self.beginning[:place] + tokens + self.beginning[place + 1 :]])
        types = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == image).long()}
        return {"input_ids": ids} | types | dict(picture)

    def run(self, prepared: Iterable) -> Iterator[list[str]]:
        """Captions of each picture, in the order of the pictures."""
        return self._run_engines(prepared) if self.shares else self._run_batches(prepared)

    def _run_engines(self, prepared: Iterable[dict]) -> Iterator[list[str]]:
        engines = {which: self._engine() for which in self.models}
        order = [(which, ending) for which in self.models for ending in range(len(self.endings))]
        waiting: dict[int, dict[tuple[str, int], list[str]]] = {}
        following = 0
        for which, caption in run_engines(self.model, engines, prepared):
            texts = self.processor.batch_decode(caption.tokens, skip_special_tokens=True)
            said = waiting.setdefault(caption.number, {})
            said[which, caption.ending] = [" ".join(text.split()) for text in texts]
            while len(waiting.get(following, ())) == len(order):
                said = waiting.pop(following)
                yield [text for key in order for text in said[key]]
                following += 1

    def _engine(self) -> BranchGenerator:
        args, tokenizer = self.args, self.processor.tokenizer
        config = search_config(self.model, tokenizer, args, self.num_captions)
        limits = constraints(
            tokenizer,
            0,
            args.japanese_only,
            args.no_repeat_ngram_size,
            read_words(args.avoid_words),
            max_new_tokens=args.max_new_tokens,
            eos_token_id=config.eos_token_id,
        )
        return BranchGenerator(self.model, config, limits, args.generation_batch_size, endings=self.endings)

    def _run_batches(self, images: Iterable[Image.Image]) -> Iterator[list[str]]:
        for batch in _batches(images, self.args.generation_batch_size):
            said = [[] for _ in batch]
            for which in self.models:
                with weights(self.model, which):
                    for prompt in self.prompts:
                        args = self.args if prompt is None else replace(self.args, prompt=prompt)
                        captions = caption_batch(self.model, self.processor, batch, args, self.num_captions)
                        said = [before + more for before, more in zip(said, captions, strict=True)]
            del batch
            yield from said


def _batches(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """At most `size` pictures, and at most BATCH_PIXELS of them, unless one has more."""
    batch, pixels = [], 0
    for image in images:
        more = image.width * image.height
        if batch and (len(batch) == size or pixels + more > BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(image)
        pixels += more
        del image
    if batch:
        yield batch


@cache
def _say_stock(reason: str) -> None:
    notice(f"Note: captioning in batches with transformers' generate; {reason}.")


def caption_images(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    args: BeamArguments,
    num_captions: int = 1,
) -> list[list[str]]:
    """`num_captions` captions of each PIL image, the best first; arguments as of `CaptionStream`."""
    stream = CaptionStream(model, processor, args, num_captions)
    return list(stream.run(map(stream.prepare, images)))
