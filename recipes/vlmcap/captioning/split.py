"""Captions of a whole split, in resumable files: by base and adapter at once, for several prompts of each picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.engines import ADAPTER, BASE
from vlmcap.captioning.generate import asked_of
from vlmcap.captioning.predictions import ImageId, PredictionsFile, write_captions
from vlmcap.captioning.stream import CaptionStream
from vlmcap.data.images import open_image
from vlmcap.models.load import takes_prompt
from vlmcap.threads import map_ahead


@dataclass(frozen=True)
class SplitFile:
    """A predictions file of a split.

    Attributes:
        record: "model", "dataset" and "saw" of its run record.
        args: GenerationArguments for a model that takes a prompt. One without a place for it is given the pictures
            alone; its record has the prompt null.
        which: ADAPTER, the model as it is, or BASE, without its adapter.
        image_ids: of the images that it holds, in the order of the split; None: of all.
    """

    path: Path
    record: dict
    args: BeamArguments
    which: str = ADAPTER
    image_ids: Sequence[ImageId] | None = None


def caption_split(
    model: PreTrainedModel | PeftModel, processor: ProcessorMixin, rows: datasets.Dataset, *files: SplitFile
) -> None:
    """Captions rows with a loaded model; writes predictions and run record of each file as `open_predictions` does.

    Each picture goes through the vision encoder once for all files that still need it.

    Args:
        rows: as `load_captions` returns them.
        files: whose `args` differ in the prompt alone.
    """
    model.eval()
    prompts = [file.args.prompt if takes_prompt(processor) else None for file in files]

    def captions(numbers: list[int], chosen: list[int]) -> Iterator[list[str]]:
        models = [which for which in (BASE, ADAPTER) if any(files[number].which == which for number in chosen)]
        asked = list(dict.fromkeys(prompts[number] for number in chosen))
        stream = CaptionStream(model, processor, files[0].args, prompts=asked, models=models)
        order = [(which, prompt) for which in models for prompt in asked]
        for texts in stream.run(map_ahead(lambda row: stream.prepare(open_image(rows[row])), numbers)):
            said = dict(zip(order, texts, strict=True))
            yield [said[files[number].which, prompts[number]] for number in chosen]

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def peak_memory() -> int | None:
        return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None

    predictions = [
        PredictionsFile(file.path, file.record | asked_of(processor, file.args), file.image_ids) for file in files
    ]
    write_captions(captions, rows, predictions, peak_memory)
