"""Base and adapter in one pass: the frozen vision encoder runs once a picture for both."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from peft import PeftModel

from vlmcap.captioning.branches import BranchGenerator, Caption
from vlmcap.models.load import base_model
from vlmcap.models.tower import feature_modules, projector_inputs


def run_both(
    model: PeftModel, base: BranchGenerator, adapter: BranchGenerator, pictures: Iterable[dict]
) -> Iterator[tuple[str, Caption]]:
    """("base" or "adapter", caption), each as soon as it is complete, as `BranchGenerator.run` of each would find it.

    A group of pictures goes through the vision encoder, then through both versions of projector and language model.

    Args:
        model: with the adapter on. Between two captions it may be used.
        base, adapter: engines of `model`, with as many rows.
    """
    numbered = enumerate(pictures)
    while True:
        room = min(base.free, adapter.free) if base.has_room and adapter.has_room else 0
        if group := list(islice(numbered, room)):
            with fed_with_features(model) as encode:
                group = [(number, one | {"pixel_values": encode(one)}) for number, one in group]
                with model.disable_adapter():
                    base.add(group)
                adapter.add(group)
        if not base.work and not adapter.work:
            return
        found = []
        if base.work:
            with model.disable_adapter():
                found += [("base", caption) for caption in base.step()]
        if adapter.work:
            found += [("adapter", caption) for caption in adapter.step()]
        yield from found


@contextmanager
def fed_with_features(model: PeftModel) -> Iterator[Callable[[dict], torch.Tensor]]:
    """Within it the model takes features in place of pixels; `encode(inputs)` makes them of the pixels of `inputs`."""
    tower = base_model(model).model.visual
    own, fed = (tower.patch_embed, tower.blocks), feature_modules(tower)

    @torch.inference_mode()
    def encode(inputs: dict) -> torch.Tensor:
        tower.patch_embed, tower.blocks = own
        features = projector_inputs(
            tower, inputs["pixel_values"].to(model.device), inputs["image_grid_thw"].to(model.device)
        )
        tower.patch_embed, tower.blocks = fed
        return features

    tower.patch_embed, tower.blocks = fed
    try:
        yield encode
    finally:
        tower.patch_embed, tower.blocks = own
