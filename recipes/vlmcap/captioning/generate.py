"""Captions by transformers' beam search, in batches, and how captions are asked for."""

import inspect
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from vlmcap.captioning.arguments import BeamArguments, GenerationArguments
from vlmcap.captioning.constraints import constraints
from vlmcap.captioning.predictions import ASKED, PredictionsError, read_done
from vlmcap.models.load import base_model, chat_prompt, takes_pixel_bounds, takes_prompt
from vlmcap.places import own_file


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
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: BeamArguments, num_captions: int = 1
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
        num_return_sequences=num_captions,
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


def takes_special_tokens(processor: ProcessorMixin, text: str) -> bool:
    """Whether the tokenizer is to add what begins a text: Gemma 3's template has written it already."""
    bos = processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


@torch.inference_mode()
def caption_with_prompt(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    images: list,
    args: GenerationArguments,
    num_captions: int = 1,
) -> list[str]:
    """Captions of a list of PIL images, by one beam search over the batch; `num_captions` of each, the best first."""
    text = chat_prompt(processor, args.prompt)
    inputs = processor(
        images=[[image] for image in images],
        text=[text] * len(images),
        padding=True,
        padding_side="left",
        add_special_tokens=takes_special_tokens(processor, text),
        return_tensors="pt",
    )
    inputs = inputs.to(model.device, dtype=base_model(model).dtype)
    inputs.pop("labels", None)  # PaliGemma's processor makes them, also without a text to learn
    prompt_length = inputs["input_ids"].shape[1]
    check_beams(model, inputs.get("pixel_values"), len(images), args.num_beams)
    config = search_config(model, processor.tokenizer, args, num_captions)
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
def caption_without_prompt(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    images: list,
    args: BeamArguments,
    num_captions: int = 1,
) -> list[str]:
    """Captions of a list of PIL images by a model that takes no prompt (BLIP, ViT + GPT-2 and the like).

    `num_captions` of each picture, the best first.
    """
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    config = search_config(model, processor.tokenizer, args, num_captions)
    config.no_repeat_ngram_size = args.no_repeat_ngram_size
    dtype = base_model(model).dtype
    ids = model.generate(pixel_values=pixels.to(model.device, dtype), generation_config=config)
    return [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]


def caption_batch(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    images: list,
    args: BeamArguments,
    num_captions: int = 1,
) -> list[list[str]]:
    """`num_captions` captions of each PIL image, the best first, with a prompt for a model that takes one.

    Args:
        args: GenerationArguments for a model that takes a prompt.
        num_captions: `args.num_beams` at most.
    """
    ask = caption_with_prompt if takes_prompt(processor) else caption_without_prompt
    said = ask(model, processor, images, args, num_captions)
    return [said[first : first + num_captions] for first in range(0, len(said), num_captions)]


def check_predictions(processor: ProcessorMixin, output: Path, args: BeamArguments, record: dict) -> None:
    """Raises PredictionsError if `caption_split` with these arguments could not write or continue `output`: it was
    started with other settings, or is damaged. Recipes ask before they train."""
    record = record | asked_of(processor, args)
    read_done(output, {key: record[key] for key in ASKED})


def asked_of(processor: ProcessorMixin, args: BeamArguments) -> dict:
    """ "prompt" and "decoding" of a run record."""
    decoding, prompted = decoding_record(args) | image_size_record(processor), takes_prompt(processor)
    if not prompted and ("japanese_only" in decoding or "avoid_words" in decoding):
        raise PredictionsError("japanese_only and avoid_words are for models that take a prompt; this one takes none")
    return {"prompt": args.prompt if prompted else None, "decoding": decoding}
