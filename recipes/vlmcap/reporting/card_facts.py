"""What cards say of a metrics document: which recipe wrote it, what its models are called, what holds for them."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from vlmcap.data.corpora import SEEN_CORPORA
from vlmcap.errors import UserError
from vlmcap.evaluation.scoring import SCORE_LABELS
from vlmcap.places import paths_root

# The smallest published bases, BLIP and ViT with GPT-2, have more than 200 million parameters, the miniatures a few.
MINIATURE_PARAMETERS = 100_000_000
LLAMA = "llama-3.2"  # in the id of every model under the licence of Llama 3.2
SMOLLM2 = "smollm2"  # in the id of every SmolLM2: of Llama's architecture, trained by others, under Apache-2.0
MINIATURES = "recipes/miniatures/"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# Those that captions can be scored in (vlmcap.evaluation.tokenise.LANGUAGE_TOKENIZERS).
LANGUAGES = {"ja": "Japanese", "en": "English", "vi": "Vietnamese"}


class CardError(UserError):
    """A card cannot be written from these documents. The message names the file or the key, and the fix."""


@dataclass(frozen=True)
class Recipe:
    """What the card of a recipe says in its metadata and table heads, and how its result is loaded."""

    base: str  # what a miniature says nothing about
    title: str  # {base}, or {encoder} and {decoder}, are names of models without their owner
    task: str  # {languages}, here and in the title, are those of the captions
    language: str  # where captions have no keys
    license: str  # of the published weights; of a miniature's Apache-2.0
    tags: tuple[str, ...]
    load: str  # Python that makes `model` and `processor` as they were measured, filled by `load_snippet`
    pipeline_tag: str = "image-to-text"  # image alone in, text out; image-text-to-text is with a prompt
    trained: str = "adapter"
    untrained: str = "base, zero-shot"
    trained_with_prompt: bool = False  # it may speak several languages, which are among its tags
    saw: tuple[str, ...] = ()  # corpora of "saw" that are worth a line


RECIPES = {
    "sft_qwen2vl_jp": Recipe(
        base="Qwen2-VL",
        title="{base}, adapted to {languages} image captions",
        task="{languages} image captioning",
        language="ja",
        license="apache-2.0",
        tags=("lora", "qwen2_vl", "sft", "trl"),
        load="""\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor{nf4_import}

base, adapter = {base}, {repo}
processor = AutoProcessor.from_pretrained(adapter){nf4}
model = AutoModelForImageTextToText.from_pretrained(
    base,{revision}
    dtype={dtype},
    device_map="auto",{quantised}
){unpacked}
model = PeftModel.from_pretrained(model, adapter).eval()""",
        pipeline_tag="image-text-to-text",
        trained_with_prompt=True,
        saw=SEEN_CORPORA,
    ),
    "sft_blip_vi": Recipe(
        base="BLIP",
        title="{base}, adapted to Vietnamese image captions",
        task="Vietnamese image captioning",
        language="vi",
        license="bsd-3-clause",
        tags=("vietnamese", "lora", "blip"),
        load="""\
from vlmcap.models.blip import load_blip_adapter

model, processor = load_blip_adapter({repo})""",
        saw=("COCO",),
    ),
    "sft_vit_gpt2_food": Recipe(
        base="ViT or GPT-2",
        title="{encoder} with {decoder}, trained on image titles",
        task="Image titles",
        language="en",
        license="apache-2.0",
        tags=("food", "vit", "gpt2", "vision-encoder-decoder"),
        load="""\
from transformers import AutoProcessor, VisionEncoderDecoderModel

processor = AutoProcessor.from_pretrained({repo})
model = VisionEncoderDecoderModel.from_pretrained({repo})""",
        trained="model",
        untrained="before training",
    ),
    "sft_vit_llama_food": Recipe(
        base="ViT or Llama",
        # Llama's licence requires a name that begins with "Llama".
        title="{decoder} with {encoder}, adapted to image titles",
        task="Image titles",
        language="en",
        license="llama3.2",
        tags=("food", "lora", "vit", "llama"),
        load="""\
from vlmcap.models.vit_llama import load_vit_llama

model, processor = load_vit_llama({repo})""",
        untrained="before training",
    ),
}
RECIPES["dpo_qwen2vl_jp"] = replace(
    RECIPES["sft_qwen2vl_jp"],
    title="{base}, adapted to {languages} image captions and to preferences",
    tags=("lora", "qwen2_vl", "dpo"),
)
RECIPES["grpo_qwen2vl_jp"] = replace(
    RECIPES["sft_qwen2vl_jp"],
    title="{base}, adapted to {languages} image captions and trained on rewards",
    tags=("lora", "qwen2_vl", "grpo"),
)


def recipe_of(metrics: dict) -> Recipe:
    """The recipe that wrote a metrics document; one that names none is of sft_qwen2vl_jp.

    Raises:
        CardError: it names a recipe that has no card.
    """
    return RECIPES[recipe_name(metrics)]


def recipe_name(metrics: dict) -> str:
    """The key in RECIPES; raises CardError as `recipe_of`."""
    name = metrics.get("recipe", "sft_qwen2vl_jp")
    if name not in RECIPES:
        raise CardError(f"recipe is {name!r}, which has no card; there are those of {', '.join(RECIPES)}")
    return name


def is_miniature(metrics: dict) -> bool:
    """Whether the base is the project's own miniature, recognised by its size."""
    return metrics["base"]["model"]["parameters"] < MINIATURE_PARAMETERS


def miniature_encoder(metrics: dict) -> bool:
    """Whether pictures are seen by a miniature of the project, while the text model is a real one."""
    encoder = model_parts(metrics["model"]).get("encoder", {"id": ""})["id"]
    return encoder.startswith(MINIATURES) and not is_miniature(metrics)


def built_with_llama(metrics: dict) -> bool:
    """Whether the licence of Llama 3.2 holds for what was trained: its decoder is one, by its name."""
    return is_decoder(metrics, LLAMA)


def is_decoder(metrics: dict, name: str) -> bool:
    """Whether `name`, in small letters, is in the id of the decoder of a model that was put together."""
    return name in model_parts(metrics["model"]).get("decoder", {"id": ""})["id"].lower()


def is_hub_id(name: str) -> bool:
    """Whether a model or dataset id is "user/name" of the Hub and not a local folder that happens to look like one."""
    if len(name) > 96 or not HUB_ID.fullmatch(name):  # huggingface_hub's limit
        return False
    return not Path(name).exists() and not (paths_root() / name).exists()


def local_name(path: str) -> str:
    """How a card names a local folder: relative to the clone, or to the working folder of an installed package, when
    inside it, else by its last part alone, so that no card tells the world where somebody's home folder is."""
    root = paths_root()
    full = Path(os.path.abspath(root / path))
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else full.name


def model_parts(model: dict) -> dict[str, dict]:
    """{"encoder", "decoder": {"id", "revision"}} of a model that was put together, {"base": ...} of any other."""
    return model.get("parts") or {"base": {"id": model["id"], "revision": model["revision"]}}


def on_hub(metrics: dict) -> bool:
    """Whether every model that the trained one was made of is on the Hub."""
    return all(is_hub_id(part["id"]) for part in model_parts(metrics["model"]).values())


def public_id(name: str) -> str:
    """An id of the Hub as it is, a local folder by its `local_name`."""
    return name if is_hub_id(name) else local_name(name)


def card_title(metrics: dict) -> str:
    """The heading of the card, with the models' names without their owners."""
    names = {place: public_id(part["id"]).split("/")[-1] for place, part in model_parts(metrics["model"]).items()}
    return recipe_of(metrics).title.format(languages=language_names(metrics), **names)


def trained_keys(metrics: dict) -> dict[str, str]:
    """Key -> prompt, of the captions that it was trained on, the main one first; empty where captions have no keys."""
    return {key: one["prompt"] for key, one in metrics.get("languages", {}).items() if one["trained"]}


def other_keys(metrics: dict) -> dict[str, dict]:
    """Key -> its document, of all captions but those of the main key."""
    return {key: one for key, one in metrics.get("languages", {}).items() if "scores" in one}


def languages_of(metrics: dict) -> list[str]:
    """Codes of the languages that it was trained on, ISO 639-1."""
    return list(dict.fromkeys(key.split("/")[0] for key in trained_keys(metrics))) or [recipe_of(metrics).language]


def language_names(metrics: dict, last: str = "and") -> str:
    """The same for people: "Japanese", "Japanese, English and Vietnamese"."""
    *others, final = (LANGUAGES[code] for code in languages_of(metrics))
    return f"{', '.join(others)} {last} {final}" if others else final


def score_label(score: str) -> str:
    """How a card names a score: "CIDEr-D" for cider_d."""
    return SCORE_LABELS.get(score, score)
