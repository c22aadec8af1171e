"""Captions of validation images during training, scored: loss does not rank captions."""

from collections.abc import Sequence
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
from vlmcap.data.images import image_size, open_image
from vlmcap.errors import notice
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.evaluation.tasks import CaptionTask, folder_name, one_task
from vlmcap.models.load import base_model, takes_prompt
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
    tasks: what the model is asked for, each with its own prompt and tokenizer; by default one, of all rows.
    latest: image id -> caption of the last evaluation; with keys, of the first key that the image has references of.
    latest_of: key -> image id -> caption of the last evaluation.
    kept: row -> what the frozen vision encoder made of its picture, of this process's rows; empty for a model that the
        engine does not know, or if too large; None before the first evaluation.
    """

    rows: datasets.Dataset
    processor: ProcessorMixin
    generation: BeamArguments
    tokenizer: str = "unidic-lite"
    features: FeatureCache | None = None
    tasks: Sequence[CaptionTask] = ()
    latest: dict[str, str] = field(default_factory=dict)
    latest_of: dict[str | None, dict[str, str]] = field(default_factory=dict)
    kept: dict[int, dict[str, torch.Tensor]] | None = None

    def __post_init__(self):
        self.tasks = self.tasks or [one_task(self.generation, self.tokenizer, self.rows)]

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`bleu_1` .. `bleu_4`, `rouge_l`, `cider_d` of a model in evaluation mode. With keys they are means, and
        `cider_d_KEY` is that of each, a slash in it written as a hyphen.

        Each process captions its share of the images, and all of them return the scores of all images. Decoding is
        deterministic and draws no random number, so that a run with validation trains as one without.
        """
        state = PartialState()
        image_ids = list(map(str, self.rows["image_id"]))
        mine = list(range(len(self.rows)))[state.process_index :: state.num_processes]
        said: list[dict[str, str]] = [{} for _ in self.tasks]
        for number, captions in gather_object(self._captions(model, mine, image_ids)):
            for task, caption in captions.items():
                said[task][image_ids[number]] = caption
        self.latest.update({image_id: text for captions in reversed(said) for image_id, text in captions.items()})
        self.latest_of = {task.key: captions for task, captions in zip(self.tasks, said, strict=True)}
        scores = [
            quick_scores(captions, task.references, task.tokenizer)
            for task, captions in zip(self.tasks, said, strict=True)
        ]
        if self.tasks[0].key is None:
            return scores[0]
        means = {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}
        named = zip(self.tasks, scores, strict=True)
        return means | {f"cider_d_{folder_name(task.key)}": one["cider_d"] for task, one in named}

    def _captions(self, model: nn.Module, mine: list[int], image_ids: list[str]) -> list[tuple[int, dict[int, str]]]:
        """(row, task -> caption) of rows that a task has references of."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in mine:
            asked = tuple(n for n, task in enumerate(self.tasks) if image_ids[row] in task.references)
            groups.setdefault(asked, []).append(row)
        found = []
        for asked, rows in groups.items():
            prompts = [self.tasks[n].args.prompt if takes_prompt(self.processor) else None for n in asked]
            stream = CaptionStream(model, self.processor, self.generation, prompts=prompts)
            for row, captions in zip(rows, self._run(stream, rows, mine), strict=True):
                found.append((row, dict(zip(asked, captions, strict=True))))
        return found

    def _run(self, stream: CaptionStream, rows: list[int], mine: list[int]) -> list[list[str]]:
        if self.features:
            return list(stream.run(stream.prepare(self.features.batch([row])) for row in rows))
        if self.kept is None:
            self.kept = self._encode(stream, mine) if stream.shares and self._fit(stream.model, mine) else {}
        if not (self.kept and stream.shares):
            return list(stream.run(map_ahead(lambda row: stream.prepare(open_image(self.rows[row])), rows)))
        with fed_with_features(stream.model):
            return list(stream.run(stream.prepare(self.kept[row]) for row in rows))

    def _encode(self, stream: CaptionStream, mine: list[int]) -> dict[int, dict[str, torch.Tensor]]:
        pictures = map_ahead(lambda row: stream.prepare(open_image(self.rows[row])), mine)
        with fed_with_features(stream.model) as encode:
            return {
                row: {"image_grid_thw": one["image_grid_thw"], "pixel_values": encode([one])[0].cpu()}
                for row, one in zip(mine, pictures, strict=True)
            }

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
