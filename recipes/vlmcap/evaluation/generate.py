"""Captions by beam search, in batches, resumable, with a record of how they were made."""

import glob
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from vlmcap import provenance
from vlmcap.data.images import BadImageError, open_image
from vlmcap.errors import UserError
from vlmcap.evaluation.arguments import BeamArguments, GenerationArguments
from vlmcap.evaluation.constraints import constraints
from vlmcap.files import write_atomically
from vlmcap.models.load import base_model, chat_prompt, count_parameters, takes_pixel_bounds, takes_prompt
from vlmcap.places import own_file

# Keys of a run record: captions are continued only if these are the same.
ASKED = ("model", "dataset", "prompt", "decoding")


class PredictionsError(UserError):
    """Captions cannot be made or continued as asked. The message names the file and the fix."""


def run_record_path(predictions: Path) -> Path:
    """predictions.jsonl -> predictions.run.json, which records how the predictions were made."""
    return predictions.with_suffix(".run.json")


def shares(predictions: Path) -> list[Path]:
    """predictions.rank0.jsonl, ...: where the processes of an unfinished run keep their captions."""
    return sorted(predictions.parent.glob(f"{glob.escape(predictions.stem)}.rank*.jsonl"))


def delete_predictions(predictions: Path) -> None:
    """Deletes predictions and what an unfinished run left of them."""
    for path in (predictions, *shares(predictions)):
        path.unlink(missing_ok=True)


def read_done(predictions: Path, asked: dict) -> tuple[dict[int | str, dict], dict]:
    """Lines by image id, of finished predictions and of the shares of an unfinished run, and the run record of them.

    A half-written last line is left out. An image in two files counts once: a run was killed when it had joined them.

    Raises:
        PredictionsError: a file was started with another model, dataset, prompt or decoding than `asked`, or is
            damaged.
    """
    files = [path for path in (predictions, *shares(predictions)) if path.exists()]
    done = {}
    for path in files:
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            entry = _read_object(line, f"{path}, line {number}", predictions)
            if not isinstance(entry.get("image_id"), int | str) or not isinstance(entry.get("caption"), str):
                raise PredictionsError(f'{path}, line {number} has no "image_id" and "caption". {_fix(predictions)}')
            done[entry["image_id"]] = entry
    if not done:
        return {}, {}
    path = run_record_path(predictions)
    record = _read_object(path.read_bytes(), str(path), predictions) if path.exists() else {}
    differs = [key for key in asked if record.get(key) != json.loads(json.dumps(asked[key]))]
    if differs:
        raise PredictionsError(
            f"{files[0]} was started with another {', '.join(differs)}: {[record.get(k) for k in differs]} instead of"
            f" {[asked[k] for k in differs]}. {_fix(predictions)}"
        )
    return done, record


def _read_object(text: bytes, where: str, predictions: Path) -> dict:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{where} is damaged, no JSON in UTF-8 ({error}). {_fix(predictions)}") from error
    if not isinstance(entry, dict):
        raise PredictionsError(f"{where} is damaged, no JSON object: {entry!r:.80}. {_fix(predictions)}")
    return entry


def _fix(predictions: Path) -> str:
    names = " and ".join(path.name for path in (predictions, *shares(predictions)) if path.exists())
    return f"Delete {names} in {predictions.parent}, or choose another --output."


def cut_half_line(path: Path) -> None:
    """Cuts off what a killed process left after the last whole line of a file, if it is there."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_words(path: str | None) -> list[str] | None:
    """The words of an `avoid_words` file, one a line, blank lines left out; None without a file.

    Raises:
        PredictionsError: the file is missing, is not UTF-8 or has no word.
    """
    if path is None:
        return None
    try:
        lines = Path(own_file(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionsError(
            f"--avoid_words {path} cannot be read as UTF-8 text, one word a line: {error}"
        ) from error
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise PredictionsError(f"--avoid_words {path} holds no word. Write one a line, or leave the option out.")
    return words


def decoding_record(args: BeamArguments) -> dict:
    """The "decoding" part of a run record. Constraints are named only when they are on."""
    record = {
        "num_beams": args.num_beams,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False,
        "batch_size": args.generation_batch_size,
    }
    prompted = isinstance(args, GenerationArguments)
    if prompted and args.japanese_only:
        record["japanese_only"] = True
    if args.no_repeat_ngram_size:
        record["no_repeat_ngram_size"] = args.no_repeat_ngram_size
    if prompted and args.avoid_words:
        record["avoid_words"] = read_words(args.avoid_words)
    return record


def image_size_record(processor: ProcessorMixin) -> dict:
    """What a run record says of the size of images: the pixel bounds, or the size that the processor has instead."""
    size = processor.image_processor.size
    if takes_pixel_bounds(processor):
        return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {"image_size": dict(size)}


def search_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: BeamArguments
) -> GenerationConfig:
    """Beam search as `args` asks for it, the same for every model.

    What a configuration does not set is taken from the model's own, and the one published with Qwen2-VL-2B-Instruct
    samples (temperature 0.01, top_k 1), Qwen2.5-VL's has a penalty of 1.05: sampling, penalties and lengths are set
    back. The tokens that begin, end and pad a caption are the model's own, or else the tokenizer's.
    """
    own = model.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(
        num_beams=args.num_beams,
        do_sample=False,
        max_new_tokens=args.max_new_tokens,
        min_length=0,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        early_stopping=False,
        **{name: getattr(tokenizer, name) if token is None else token for name, token in tokens.items()},
    )


def check_beams(
    model: PreTrainedModel | PeftModel, pixel_values: torch.Tensor | None, pictures: int, beams: int
) -> None:
    """Beams get whole pictures: rows of `pixel_values` are pictures, or the model makes sure that beams get all rows.

    transformers repeats tensors row by row for the beams, patches and tiles of a picture too, unless the model takes
    pictures that were encoded before (`mm_encoder_outputs`), as its own models do, or repeats them in its own way.

    Raises:
        PredictionsError: beams would get rows of one picture mixed up.
    """
    base = base_model(model)
    if beams == 1 or pixel_values is None or len(pixel_values) == pictures:
        return
    own_way = type(base)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation
    if not own_way and "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        raise PredictionsError(
            f"{type(base).__name__} takes {pictures} pictures as {len(pixel_values)} rows of patches, which beam"
            f" search would mix up: give --num_beams 1, instead of {beams}"
        )


@torch.inference_mode()
def caption_images(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    images: list,
    args: GenerationArguments,
    features: dict[str, torch.Tensor] | None = None,
) -> list[str]:
    """Captions of a list of PIL images, by one beam search over the batch.

    `features` stands in for what the processor makes of the pictures, for a model that takes cached features
    (vlmcap.training.features).
    """
    text, bos = chat_prompt(processor, args.prompt), processor.tokenizer.bos_token
    inputs = processor(
        images=[[image] for image in images],
        text=[text] * len(images),
        padding=True,
        padding_side="left",
        add_special_tokens=not (bos and text.startswith(bos)),  # Gemma 3's template writes it already
        return_tensors="pt",
    )
    inputs.update(features or {})
    inputs = inputs.to(model.device, dtype=base_model(model).dtype)
    inputs.pop("labels", None)  # PaliGemma's processor makes them, also without a text to learn
    prompt_length = inputs["input_ids"].shape[1]
    check_beams(model, inputs.get("pixel_values"), len(images), args.num_beams)
    config = search_config(model, processor.tokenizer, args)
    limits = constraints(
        processor.tokenizer,
        prompt_length,
        args.japanese_only,
        args.no_repeat_ngram_size,
        read_words(args.avoid_words),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=config.eos_token_id,
    )
    output = model.generate(**inputs, generation_config=config, logits_processor=limits)
    texts = processor.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


@torch.inference_mode()
def caption_pictures(
    model: PreTrainedModel | PeftModel, processor: ProcessorMixin, images: list, args: BeamArguments
) -> list[str]:
    """Captions of a list of PIL images by a model that takes no prompt (BLIP, ViT + GPT-2 and the like)."""
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    config = search_config(model, processor.tokenizer, args)
    config.no_repeat_ngram_size = args.no_repeat_ngram_size
    dtype = base_model(model).dtype
    ids = model.generate(pixel_values=pixels.to(model.device, dtype), generation_config=config)
    return [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]


def generate(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    output: Path,
    args: BeamArguments,
    record: dict,
) -> None:
    """Captions every row with a loaded model and writes `output` and its run record, as `write_captions` does.

    A model whose processor has no place for a prompt is given the pictures alone; its record has the prompt null.

    Args:
        rows: as `load_captions` returns them.
        args: GenerationArguments for a model that takes a prompt.
        record: "model", "dataset" and "saw" of the run record.
    """
    record = record | _asked_of(processor, args)
    prompted = takes_prompt(processor)
    model.eval()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def caption(batch: datasets.Dataset) -> list[str]:
        images = [open_image(row) for row in batch]
        return (caption_images if prompted else caption_pictures)(model, processor, images, args)

    def peak_memory() -> int | None:
        return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None

    write_captions(caption, rows, output, record, peak_memory)


def check_predictions(processor: ProcessorMixin, output: Path, args: BeamArguments, record: dict) -> None:
    """Raises PredictionsError if `generate` with these arguments could not write or continue `output`: it was started
    with other settings, or is damaged. Recipes ask before they train."""
    record = record | _asked_of(processor, args)
    read_done(output, {key: record[key] for key in ASKED})


def _asked_of(processor: ProcessorMixin, args: BeamArguments) -> dict:
    """ "prompt" and "decoding" of a run record."""
    decoding, prompted = decoding_record(args) | image_size_record(processor), takes_prompt(processor)
    if not prompted and ("japanese_only" in decoding or "avoid_words" in decoding):
        raise PredictionsError("japanese_only and avoid_words are for models that take a prompt; this one takes none")
    return {"prompt": args.prompt if prompted else None, "decoding": decoding}


def write_captions(
    caption: Callable[[datasets.Dataset], list[str]],
    rows: datasets.Dataset,
    output: Path,
    record: dict,
    peak_memory: Callable[[], int | None],
) -> None:
    """Captions every row and writes `output` (JSON lines) and its run record; continues where an earlier call stopped.

    Every process captions its share and appends it, batch by batch, to a file of its own (`shares`). When all are done
    process 0 writes `output` in the order of the rows, whole or not at all, and removes the shares. It may be killed
    at any moment, and continued by another number of processes.

    Args:
        caption: captions of a few rows, `record["decoding"]["batch_size"]` at most.
        rows: as `load_captions` returns them.
        record: "model", "dataset", "saw", "prompt" and "decoding" of the run record.
        peak_memory: bytes of device memory that were held at most, None on a CPU; asked at the end.

    Raises:
        BadImageError: a picture cannot be read; a score over fewer images than its split would be no score of the
            split.
        PredictionsError: `output` was started with other settings, is damaged, or cannot be written (a full disk).
    """
    try:
        _write_captions(caption, rows, output, record, peak_memory)
    except BadImageError:  # an OSError too
        raise
    except OSError as error:
        raise PredictionsError(
            f"{error.filename or output.parent} cannot be read or written: {error.strerror or error}. The captions so"
            " far are kept: fix it (make room), then run the same command again."
        ) from error


def _write_captions(
    caption: Callable[[datasets.Dataset], list[str]],
    rows: datasets.Dataset,
    output: Path,
    record: dict,
    peak_memory: Callable[[], int | None],
) -> None:
    state = PartialState()
    output.parent.mkdir(parents=True, exist_ok=True)
    batch_size = record["decoding"]["batch_size"]
    asked = {key: record[key] for key in ASKED}
    run_record = run_record_path(output)
    done, earlier = read_done(output, asked)
    todo = [i for i, image_id in enumerate(rows["image_id"]) if image_id not in done]
    before, start = earlier.get("seconds", 0.0), time.perf_counter()
    finished = not todo and output.exists() and "created" in earlier

    def write_record(**more) -> None:
        seconds = before + time.perf_counter() - start
        if state.is_main_process:
            text = json.dumps(record | {"seconds": seconds} | more, ensure_ascii=False, indent=2)
            write_atomically(run_record, text)

    state.wait_for_everyone()  # all have read the same before one writes
    if not finished:
        write_record()
        state.wait_for_everyone()  # no share without the record that says what it is of
        share = output.with_suffix(f".rank{state.process_index}.jsonl")
        cut_half_line(share)
        mine = todo[state.process_index :: state.num_processes]
        with (
            share.open("ab") as file,
            tqdm(
                total=len(rows),
                initial=len(rows) - len(todo),
                desc=f"captions {output.parent.name}",
                disable=not state.is_main_process,
            ) as bar,
        ):
            for begin in range(0, len(mine), batch_size):
                batch = rows.select(mine[begin : begin + batch_size])
                said = zip(batch["image_id"], caption(batch), strict=True)
                file.write(_lines({"image_id": image_id, "caption": text} for image_id, text in said))
                file.flush()
                write_record()  # with the time so far, so that a continued run reports all of it
                bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))
        state.wait_for_everyone()
        if state.is_main_process:
            done = read_done(output, asked)[0]
            write_atomically(output, _lines(({i: done[i] for i in rows["image_id"]} | done).values()))
        seconds = before + time.perf_counter() - start
        write_record(
            hardware=provenance.hardware(),
            images_per_second=len(rows) / seconds,
            peak_memory_bytes=peak_memory(),
            versions=provenance.versions(),
            commit=provenance.git_commit(),
            created=provenance.now(),
        )
    if state.is_main_process:
        for path in shares(output):
            path.unlink()
    state.wait_for_everyone()


def _lines(entries: Iterable[dict]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode("utf-8")


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of the weights in the folder of an adapter or of a whole model; None when there are none."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return None


def model_record(
    model: PreTrainedModel | PeftModel,
    name: str,
    revision: str | None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> dict:
    """The "model" part of the run record.

    Args:
        revision: the commit that was loaded, see `resolve_revision`; None for a folder.
        adapter: the trained weights, also where they are a whole model's.
        adapter_revision: their commit on the Hub, see `read_adapter`. Of a folder the hash of the weights is recorded.
    """
    base = base_model(model)
    if adapter and Path(adapter).exists():
        adapter_revision = weights_hash(Path(adapter))
    return {
        "id": provenance.public_name(name),
        "revision": revision,
        "adapter": adapter and provenance.public_name(adapter),
        "adapter_revision": adapter_revision,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": "nf4" if getattr(base, "is_loaded_in_4bit", False) else None,
        "parameters": count_parameters(model),
    }
