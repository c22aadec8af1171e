"""One model, however it was made, as a function from pictures to captions: adapters, whole models, bases alone."""

from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from vlmcap.captioning.arguments import CaptionArguments, GenerationArguments, check_num_captions
from vlmcap.captioning.generate import decoding_record, image_size_record
from vlmcap.captioning.predictions import model_record
from vlmcap.captioning.settings import NAME, CaptioningSettings, key_of_prompt, read_settings
from vlmcap.captioning.stream import CaptionStream
from vlmcap.errors import UserError, notice
from vlmcap.models.blip import load_blip_adapter
from vlmcap.models.load import (
    chat_prompt,
    check_adapter_of,
    compute_dtype,
    load_adapter,
    load_model,
    load_processor,
    resolve_revision,
    takes_prompt,
)
from vlmcap.models.vit_gpt2 import load_vit_gpt2
from vlmcap.models.vit_llama import load_vit_llama
from vlmcap.models.weights import COMMIT, loading, read_adapter

OF_PROMPTED = "model model_revision prompt japanese_only avoid_words load_in_4bit min_pixels max_pixels".split()


@dataclass(frozen=True)
class Captioner:
    """A loaded model with its settings. `stream` captions pictures, `num_captions` of each.

    `record` is "model", "prompt" and "decoding" of a run record; captions are continued only by a model with the same.
    `language` is an ISO 639-1 code.
    """

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    args: GenerationArguments
    num_captions: int
    record: dict
    language: str

    @cached_property
    def stream(self) -> CaptionStream:
        return CaptionStream(self.model, self.processor, self.args, self.num_captions)


def find_settings(args: CaptionArguments) -> tuple[str, str | None, CaptioningSettings | None]:
    """What is captioned with, an adapter or a model, its commit on the Hub, and its captioning.json.

    Raises:
        ModelError: there is no such adapter or model.
        SettingsError: its captioning.json is damaged.
    """
    name, revision = (args.adapter, args.adapter_revision) if args.adapter else (args.model, args.model_revision)
    revision = resolve_revision(name, revision)
    settings = read_settings(name, revision)
    if settings is None and args.adapter:
        notice(
            f"{name} has no {NAME}, which the recipes write: it was made elsewhere, or by an earlier version."
            f" Defaults are used: the prompt {GenerationArguments.prompt}, no quantisation, a beam of 3. If it was"
            " trained otherwise, say so with --prompt, --load_in_4bit, --max_pixels, --num_beams."
        )
    return name, revision, settings


def decoding_of(args: CaptionArguments, settings: CaptioningSettings | None) -> GenerationArguments:
    """How captions are asked for: as the command line says, or else captioning.json, or else the defaults.

    Raises:
        UserError: more captions are asked for than the beam has; there is no prompt for the language or style.
    """
    values = {"generation_batch_size": args.batch_size, "avoid_words": args.avoid_words}
    if not args.prompt and (key := key_of_prompt(settings, args.adapter or args.model, args.language, args.style)):
        values["prompt"] = settings.prompts[key]
    for key in ("prompt", "num_beams", "max_new_tokens", "no_repeat_ngram_size", "japanese_only"):
        for source in (args, settings):
            if key not in values and getattr(source, key, None) is not None:
                values[key] = getattr(source, key)
    decoding = GenerationArguments(**values)
    check_num_captions(args.num_captions, decoding.num_beams)
    return decoding


def language_of(args: CaptionArguments, settings: CaptioningSettings | None) -> str:
    """The language of the captions, an ISO 639-1 code: of the prompt's key; Japanese where there is none."""
    key = key_of_prompt(settings, args.adapter or args.model, args.language, args.style)
    return key.split("/")[0] if key and not args.prompt else "ja"


def load_captioner(args: CaptionArguments) -> Captioner:
    """Loads what `args.adapter` or `args.model` names, with its own settings where the command line says nothing.

    Raises:
        ModelError, SettingsError: as `find_settings`; or it cannot be loaded.
        UserError: an option has no meaning for this model.
    """
    name, revision, settings = find_settings(args)
    decoding = decoding_of(args, settings)
    decoding_record(decoding)  # reads the file of words, before minutes of loading
    recipe = settings.recipe if settings else _recipe_of(name, revision)
    dtype = _precision(args.dtype, settings and settings.dtype)
    if recipe == "sft_qwen2vl_jp":
        model, processor, base, commit = _load_prompted(args, name, revision, settings, dtype)
        unfit = [] if takes_prompt(processor) else ["prompt", "japanese_only", "avoid_words"]
        trained = args.adapter
    else:  # base and precision of the parts are in their own configuration
        unfit = OF_PROMPTED if args.adapter else [key for key in OF_PROMPTED if "model" not in key]
        base, commit, trained = name, revision, name
    _refuse(args, name, unfit)
    if recipe == "sft_blip_vi":
        model, processor = load_blip_adapter(name, revision, dtype)
    elif recipe == "sft_vit_llama_food":
        model, processor = load_vit_llama(name, revision, dtype)
    elif recipe == "sft_vit_gpt2_food":
        _refuse(args, name, ["dtype"])  # float32, as it was trained
        model, processor = load_vit_gpt2(name, revision)
    record = {
        "model": model_record(model.eval(), base, commit, trained, trained and revision),
        "prompt": decoding.prompt if takes_prompt(processor) else None,
        "decoding": decoding_record(decoding) | image_size_record(processor),
    }
    record["decoding"]["num_captions"] = args.num_captions
    del record["decoding"]["batch_size"]  # captions may be continued with another
    return Captioner(model, processor, decoding, args.num_captions, record, language_of(args, settings))


def _load_prompted(
    args: CaptionArguments,
    name: str,
    revision: str | None,
    settings: CaptioningSettings | None,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin, str, str | None]:
    """Model, processor, name and commit of the base: an image-text-to-text model, with `args.adapter` on it if any."""
    in_4bit = args.load_in_4bit
    if in_4bit is None:
        in_4bit = bool(settings and settings.load_in_4bit)
    bounds = [
        given if given is not None else settings and getattr(settings, key)
        for key, given in (("min_pixels", args.min_pixels), ("max_pixels", args.max_pixels))
    ]
    if not args.adapter:
        processor = load_processor(name, revision, *bounds)
        return load_model(name, revision, in_4bit, None, dtype=dtype), processor, name, revision
    adapter = read_adapter(name, revision)
    base, base_revision = args.model or adapter.config.base_model_name_or_path, args.model_revision
    if base_revision is None and COMMIT.fullmatch(adapter.config.revision or ""):
        base_revision = adapter.config.revision
    base_revision = resolve_revision(base, base_revision)
    check_adapter_of(adapter, base, base_revision)
    # An adapter made elsewhere may come without a processor.
    own = _has(name, revision, "processor_config.json") or _has(name, revision, "preprocessor_config.json")
    processor = load_processor(*((name, revision) if own else (base, base_revision)), *bounds)
    if takes_prompt(processor):
        chat_prompt(processor, decoding_of(args, settings).prompt)  # refuses one that would end the turn
    model = load_model(base, base_revision, in_4bit, None, dtype=dtype)
    return load_adapter(model, name, revision, base_revision), processor, base, base_revision


def _recipe_of(name: str, revision: str | None) -> str:
    """Which recipe's loader fits weights without captioning.json, by their configurations."""
    if not _has(name, revision, "config.json"):
        base = read_adapter(name, revision).config
        with loading(base.base_model_name_or_path):
            config = AutoConfig.from_pretrained(
                base.base_model_name_or_path, revision=base.revision, trust_remote_code=False
            )
        return "sft_blip_vi" if config.model_type == "blip" else "sft_qwen2vl_jp"
    with loading(name):
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if config.get("model_type") == "vit_llama":
        return "sft_vit_llama_food"
    parts = [config.get(part, {}).get("model_type") for part in ("encoder", "decoder")]
    return "sft_vit_gpt2_food" if parts == ["vit", "gpt2"] else "sft_qwen2vl_jp"


def _has(name: str, revision: str | None, file: str) -> bool:
    with loading(name):
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def _precision(given: str | None, trained: str | None) -> torch.dtype:
    """`given` as it is; else float32 on a CPU, and on a GPU what was trained in, where the GPU has it."""
    if given:
        return getattr(torch, given)
    own = compute_dtype()
    if not torch.cuda.is_available() or trained is None or (trained == "bfloat16" and own != torch.bfloat16):
        return own
    return getattr(torch, trained)


def _refuse(args: CaptionArguments, name: str, options: list[str]) -> None:
    if given := [f"--{option}" for option in options if getattr(args, option)]:
        raise UserError(f"{name} is a model for which there is no {given[0]}: leave it out")
