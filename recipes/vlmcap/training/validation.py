"""Captions of validation images during training, scored: loss does not rank captions."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import datasets
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import ProcessorMixin

from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.stream import CaptionStream
from vlmcap.data.images import image_size, open_image, references_of
from vlmcap.errors import notice
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.models.load import base_model
from vlmcap.models.tower import fed_with_features, projector_blocks
from vlmcap.threads import map_ahead
from vlmcap.training.features import FeatureCache

SHARE_OF_MEMORY = 0.25  # of what is free, for the features of the validation pictures


@dataclass
class CaptionValidation:
    """Scores a model by the captions it writes for `rows`, with the decoding of the final evaluation.

    rows: as `load_captions` returns them; every picture must be readable.
    tokenizer: word segmentation of the metrics.
    features: cached image features of the rows, for a model that takes them instead of pictures.
    latest: image id -> caption of the last evaluation.
    kept: what `CaptionStream.prepare` made of this process's pictures, the frozen vision encoder's output in place of
        pixels; empty for a model that the engine does not know, or if too large; None before the first evaluation.
    """

    rows: datasets.Dataset
    processor: ProcessorMixin
    generation: BeamArguments
    tokenizer: str = "unidic-lite"
    features: FeatureCache | None = None
    latest: dict[str, str] = field(default_factory=dict)
    kept: list[dict[str, torch.Tensor]] | None = None

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`bleu_1` .. `bleu_4`, `rouge_l`, `cider_d` of a model in evaluation mode.

        Each process captions its share of the images, and all of them return the scores of all images. Decoding is
        deterministic and draws no random number, so that a run with validation trains as one without.
        """
        state = PartialState()
        mine = list(range(len(self.rows)))[state.process_index :: state.num_processes]
        image_ids = self.rows.select(mine)["image_id"]
        predictions = gather_object(list(zip(image_ids, self._captions(model, mine), strict=True)))
        predictions = {str(image_id): caption for image_id, (caption,) in predictions}
        self.latest.update(predictions)
        return quick_scores(predictions, references_of(self.rows), self.tokenizer)

    def _captions(self, model: nn.Module, mine: list[int]) -> list[list[str]]:
        stream = CaptionStream(model, self.processor, self.generation)
        if self.features:
            return list(stream.run(stream.prepare(self.features.batch([row])) for row in mine))
        pictures = map_ahead(lambda row: stream.prepare(open_image(self.rows[row])), mine)
        if self.kept is None:
            self.kept = self._encode(model, pictures) if stream.shares and self._fit(model, mine) else []
        if not self.kept:
            return list(stream.run(pictures))
        with fed_with_features(model):
            return list(stream.run(self.kept))

    def _encode(self, model: nn.Module, pictures: Iterable[dict]) -> list[dict[str, torch.Tensor]]:
        with fed_with_features(model) as encode:
            return [one | {"pixel_values": encode([one])[0].cpu()} for one in pictures]

    def _fit(self, model: nn.Module, mine: list[int]) -> bool:
        """Whether the vision encoder's output for all pictures may stay in memory; prints its size."""
        tower, processor = base_model(model).model.visual, self.processor.image_processor
        row = len(projector_blocks(tower)) * tower.blocks[0].norm1.weight.numel() * tower.dtype.itemsize
        sizes = (image_size(self.rows[number]) for number in mine)
        size = row * sum(processor.get_number_of_image_patches(height, width, {}) for width, height in sizes)
        free = psutil.virtual_memory().available
        fits = size < free * SHARE_OF_MEMORY
        what = "stay in memory between evaluations" if fits else "are computed at each evaluation"
        notice(
            f"Validation: image features of {len(mine):,} pictures {what} ({size / 2**30:.2f} GiB; at most"
            f" {SHARE_OF_MEMORY:.0%} of the {free / 2**30:.1f} GiB that are free)."
        )
        return fits
