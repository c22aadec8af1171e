"""captioning.json beside trained weights: how they caption, so that nobody has to know prompt, precision and decoding.

Which base the weights belong to is not in it: PEFT's adapter_config.json names model and commit.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import DTYPES, BeamArguments, GenerationArguments
from vlmcap.data.corpora import KEY
from vlmcap.errors import UserError
from vlmcap.models.load import base_model, is_quantised, takes_pixel_bounds
from vlmcap.models.weights import MAX_CONFIG_BYTES, loading
from vlmcap.strict_parsing import parse_json, shown

NAME = "captioning.json"
RECIPES = ("sft_qwen2vl_jp", "sft_blip_vi", "sft_vit_gpt2_food", "sft_vit_llama_food")


class SettingsError(UserError):
    """captioning.json is damaged, or is not what this version writes. The message names the key."""


@dataclass(frozen=True)
class CaptioningSettings:
    """What captioning.json holds.

    Attributes:
        recipe: which of RECIPES trained the weights; it says how they are loaded.
        prompt: None for a model that takes none.
        dtype: of the weights in training, e.g. "bfloat16"; in 4 bits, of what was computed.
        min_pixels, max_pixels: bounds of an image; None where the processor has a size of its own.
        prompts: key (`vlmcap.data.keys`) -> prompt, of a model that was trained with several, of which `prompt` is
            the first; else None.
    """

    recipe: str
    prompt: str | None
    load_in_4bit: bool
    dtype: str
    min_pixels: int | None
    max_pixels: int | None
    num_beams: int
    max_new_tokens: int
    no_repeat_ngram_size: int
    japanese_only: bool
    prompts: dict[str, str] | None = None


def settings_of(
    recipe: str,
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    args: BeamArguments,
    prompts: dict[str, str] | None = None,
) -> CaptioningSettings:
    """The settings of a model as it was trained. `args.avoid_words`, a file of the user's, is not among them.

    Args:
        prompts: key -> prompt, of a model that was trained with several; that of `args` is the first.
    """
    size = processor.image_processor.size if takes_pixel_bounds(processor) else {}
    prompted = isinstance(args, GenerationArguments)
    return CaptioningSettings(
        recipe=recipe,
        prompt=args.prompt if prompted else None,
        load_in_4bit=is_quantised(model),
        dtype=str(base_model(model).dtype).removeprefix("torch."),
        min_pixels=size["shortest_edge"] if size else None,
        max_pixels=size["longest_edge"] if size else None,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        japanese_only=prompted and args.japanese_only,
        prompts=prompts,
    )


def write_settings(folder: Path, settings: CaptioningSettings) -> None:
    """Writes captioning.json into the folder of the weights."""
    write_atomically(folder / NAME, json.dumps(asdict(settings), ensure_ascii=False, indent=2) + "\n")


def read_settings(name: str, revision: str | None = None) -> CaptioningSettings | None:
    """captioning.json of a folder or of a repository on the Hub; None where it has none.

    Raises:
        SettingsError: the file is too large, is not JSON, lacks a key, has one that is not known, or a value of
            another kind than its key.
        ModelError: the Hub cannot be asked.
    """
    with loading(name):
        path = cached_file(name, NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    where = f"{NAME} of {name}"
    try:
        if Path(path).stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES:,} bytes")
        found = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{where} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{where} must be a JSON object, but is {shown(found)}")
    names = [known.name for known in fields(CaptioningSettings)]
    found = {"prompts": None} | found  # earlier versions did not write it
    if wrong := [key for key in (*names, *found) if key not in found or key not in names]:
        problem = "is missing" if wrong[0] in names else "is not known"
        raise SettingsError(f"{where}: the key {shown(wrong[0])} {problem}; it holds {', '.join(names)}")
    for key, value in found.items():
        if not _fits(key, value):
            raise SettingsError(f"{where}: {key} cannot be {shown(value)}")
    return CaptioningSettings(**found)


def check_prompts(name: str, revision: str | None, prompts: Iterable[str], option: str = "--prompt") -> None:
    """Raises SettingsError where an adapter was trained with other prompts, by its captioning.json if it has one.

    Args:
        prompts: of this run, which it has set with `option`.
    """
    settings = read_settings(name, revision)
    if settings is None:
        return
    known = list((settings.prompts or {"": settings.prompt}).values())
    for prompt in prompts:
        if prompt not in known:
            raise SettingsError(
                f"adapter {name} is asked {' or '.join(map(shown, known))} ({NAME}), and this run would ask"
                f" {shown(prompt)}: set {option} to that of the adapter"
            )


def key_of_prompt(
    settings: CaptioningSettings | None, name: str, language: str | None, style: str | None
) -> str | None:
    """Which of its prompts the model `name` is asked for a language and a style; None for its only one.

    Without a style it is that of the key LANGUAGE, else of the first key in this language; without a language that of
    the main key is meant.

    Raises:
        SettingsError: the model has no such prompt; the message lists its keys.
    """
    wanted = " ".join(f"--{option} {given}" for option, given in (("language", language), ("style", style)) if given)
    prompts = (settings and settings.prompts) or {}
    if not prompts:
        if wanted:
            raise SettingsError(f"{wanted}: {name} was not trained with several prompts ({NAME}): leave it out")
        return None
    language = language or next(iter(prompts)).split("/")[0]
    if style:
        keys = [f"{language}/{style}"]
    elif wanted:
        keys = [language, *(key for key in prompts if key.startswith(f"{language}/"))]
    else:
        keys = list(prompts)
    key = next((key for key in keys if key in prompts), None)
    if key is None:
        raise SettingsError(f"{wanted}: {name} has no prompt for {keys[0]} ({NAME}); it has {', '.join(prompts)}")
    return key


def _fits(key: str, value: object) -> bool:
    if key == "recipe":
        return value in RECIPES
    if key == "dtype":
        return value in DTYPES
    if key == "prompt":
        return isinstance(value, str | None)
    if key == "prompts":
        return value is None or isinstance(value, dict) and bool(value) and all(map(_is_prompt, value.items()))
    if key in ("load_in_4bit", "japanese_only"):
        return isinstance(value, bool)
    if key in ("min_pixels", "max_pixels") and value is None:
        return True
    least = 0 if key == "no_repeat_ngram_size" else 1
    return type(value) is int and least <= value < 2**31


def _is_prompt(item: tuple[str, object]) -> bool:
    return bool(re.fullmatch(KEY, item[0])) and isinstance(item[1], str)
