"""Captions of validation images during training, scored: loss does not rank captions."""

from dataclasses import dataclass, field

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import ProcessorMixin

from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.generate import caption_with_prompt, caption_without_prompt
from vlmcap.data.images import open_image, references_of
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.models.load import takes_prompt
from vlmcap.training.features import FeatureCache


@dataclass(frozen=True)
class CaptionValidation:
    """Scores a model by the captions it writes for `rows`, with the decoding of the final evaluation.

    rows: as `load_captions` returns them; every picture must be readable.
    tokenizer: word segmentation of the metrics.
    features: cached image features of the rows, for a model that takes them instead of pictures.
    latest: image id -> caption of the last evaluation.
    """

    rows: datasets.Dataset
    processor: ProcessorMixin
    generation: BeamArguments
    tokenizer: str = "unidic-lite"
    features: FeatureCache | None = None
    latest: dict[str, str] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`bleu_1` .. `bleu_4`, `rouge_l`, `cider_d` of a model in evaluation mode.

        Each process captions its share of the images, and all of them return the scores of all images. Decoding is
        deterministic and draws no random number, so that a run with validation trains as one without.
        """
        state = PartialState()
        mine = list(range(len(self.rows)))[state.process_index :: state.num_processes]
        captions = []
        for start in range(0, len(mine), self.generation.generation_batch_size):
            picked = mine[start : start + self.generation.generation_batch_size]
            batch = self.rows.select(picked)
            images = [open_image(row) for row in batch]
            if takes_prompt(self.processor):
                features = self.features.batch(picked) if self.features else None
                said = caption_with_prompt(model, self.processor, images, self.generation, features)
            else:
                said = caption_without_prompt(model, self.processor, images, self.generation)
            captions += zip(batch["image_id"], said, strict=True)
        predictions = {str(image_id): caption for image_id, caption in gather_object(captions)}
        self.latest.update(predictions)
        return quick_scores(predictions, references_of(self.rows), self.tokenizer)
