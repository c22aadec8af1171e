"""The frozen vision tower of the Qwen2-VL family: what it hands to the projectors, and a model that takes that as it
takes pixels."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmcap.models.load import base_model


def tower_hash(tower: PreTrainedModel) -> str:
    """sha256 of the weights below the projector."""
    digest = hashlib.sha256()
    for name, parameter in tower.named_parameters():
        if "merger" not in name:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def projector_blocks(tower: PreTrainedModel) -> list[int]:
    """The blocks whose output goes into a projector: the last one, and with DeepStack (Qwen3-VL) some before it."""
    return sorted({*getattr(tower.config, "deepstack_visual_indexes", []), len(tower.blocks) - 1})


@torch.no_grad()
def projector_inputs(tower: PreTrainedModel, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Outputs of the `projector_blocks` side by side: of the tower's dtype, (patches, projector inputs * width)."""
    outputs = []
    blocks = [tower.blocks[number] for number in projector_blocks(tower)]
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in blocks]
    tower(pixel_values.to(tower.dtype), grid_thw=grids)
    for hook in hooks:
        hook.remove()
    return torch.cat(outputs, 1)


class FeatureInput(nn.Module):
    """In place of the patch embedding: takes features (patches, projector inputs * width) apart, for `FeatureOutput`.

    `features` is a list of as many tensors as there are projector inputs, shared with those modules. What is returned
    goes through the rest of the tower's forward, in the shape it expects, only to be replaced by them.
    """

    def __init__(self, features: list[torch.Tensor | None]):
        super().__init__()
        self.features = features

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.features[:] = [part.contiguous() for part in pixel_values.chunk(len(self.features), dim=1)]
        return self.features[-1].detach()  # a tensor of its own: gradient checkpointing may set its requires_grad


class FeatureOutput(nn.Module):
    """In place of a block: returns what the next projector takes, which the last block before it once computed."""

    def __init__(self, features: list[torch.Tensor | None], position: int):
        super().__init__()
        self.features, self.position = features, position

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.features[self.position]


def feature_modules(tower: PreTrainedModel) -> tuple[FeatureInput, nn.ModuleList]:
    """What takes the place of `patch_embed` and `blocks` in a tower that is given features."""
    inputs = projector_blocks(tower)
    features = [None] * len(inputs)
    outputs = (FeatureOutput(features, bisect_left(inputs, block)) for block in range(len(tower.blocks)))
    return FeatureInput(features), nn.ModuleList(outputs)


def feed_features(model: PreTrainedModel) -> None:
    """Makes a Qwen2-VL, Qwen2.5-VL or Qwen3-VL take cached features as `pixel_values`, and drops the ViT's weights.

    The blocks are replaced, the projectors are not: everything from their input on is as before, and PEFT may copy
    them.
    """
    tower = model.model.visual
    # PEFT and accelerate look for every class of this list among the modules when they shard a model.
    model._no_split_modules.discard(type(tower.blocks[0]).__name__)
    tower.patch_embed, tower.blocks = feature_modules(tower)


@contextmanager
def fed_with_features(model: nn.Module) -> Iterator[Callable[[list[dict]], list[torch.Tensor]]]:
    """Within it the model, perhaps with an adapter, takes features as `pixel_values`. Its blocks stay, and make them:
    `encode(pictures)` returns the features of each, of pixel_values and image_grid_thw, (1, 3)."""
    tower = base_model(model).model.visual
    own, fed = (tower.patch_embed, tower.blocks), feature_modules(tower)

    def encode(pictures: list[dict]) -> list[torch.Tensor]:
        pixels, grids = (torch.cat([one[name] for one in pictures]) for name in ("pixel_values", "image_grid_thw"))
        tower.patch_embed, tower.blocks = own
        features = projector_inputs(tower, pixels.to(tower.device), grids.to(tower.device))
        tower.patch_embed, tower.blocks = fed
        return list(features.split(grids.prod(1).tolist()))

    try:
        tower.patch_embed, tower.blocks = fed
        yield encode
    finally:
        tower.patch_embed, tower.blocks = own
