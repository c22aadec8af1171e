"""Captions of a whole split, in resumable files: by one model, by base and adapter at once, or for several prompts."""

from pathlib import Path

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.captioning.arguments import BeamArguments, GenerationArguments
from vlmcap.captioning.engines import ADAPTER, BASE
from vlmcap.captioning.generate import asked_of
from vlmcap.captioning.predictions import Captions, write_captions
from vlmcap.captioning.stream import CaptionStream
from vlmcap.data.images import open_image
from vlmcap.threads import map_ahead

File = tuple[Path, dict]  # predictions, and "model", "dataset" and "saw" of their run record


def caption_split(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    output: Path,
    args: BeamArguments,
    record: dict,
) -> None:
    """Captions every row with a loaded model and writes `output` and its run record, as `open_predictions` does.

    A model whose processor has no place for a prompt is given the pictures alone; its record has the prompt null.

    Args:
        rows: as `load_captions` returns them.
        args: GenerationArguments for a model that takes a prompt.
        record: "model", "dataset" and "saw" of the run record.
    """
    caption_split_prompts(model, processor, rows, [(output, record)], [args])


def caption_split_prompts(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    files: list[File],
    args: list[BeamArguments],
) -> None:
    """As `caption_split`, for several prompts of each picture.

    Args:
        args: of each file, which differ in the prompt alone.
    """
    files = [(path, record | asked_of(processor, one)) for (path, record), one in zip(files, args, strict=True)]
    alone = [CaptionStream(model.eval(), processor, one) for one in args]
    together = (
        CaptionStream(model, processor, args[0], prompts=[one.prompt for one in args]) if alone[1:] else alone[0]
    )
    _write(rows, files, together, alone)


def caption_split_both(
    model: PeftModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    files: list[File],
    args: GenerationArguments,
) -> None:
    """As `caption_split`, with the base and with the adapter: each picture goes through the vision encoder once.

    Args:
        files: of the base, and of the adapter.
    """
    files = [(path, record | asked_of(processor, args)) for path, record in files]
    alone = [CaptionStream(model.eval(), processor, args, models=[which]) for which in (BASE, ADAPTER)]
    _write(rows, files, CaptionStream(model, processor, args, models=(BASE, ADAPTER)), alone)


def _write(rows: datasets.Dataset, files: list[File], together: CaptionStream, alone: list[CaptionStream]) -> None:
    def captions_of(stream: CaptionStream) -> Captions:
        return lambda numbers: stream.run(map_ahead(lambda row: stream.prepare(open_image(rows[row])), numbers))

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def peak_memory() -> int | None:
        return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None

    write_captions(captions_of(together), rows, files, peak_memory, [captions_of(stream) for stream in alone])
