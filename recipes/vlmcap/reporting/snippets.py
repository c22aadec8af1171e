"""Python for a card: loads, merges and asks what was trained as it was measured."""

import json

from vlmcap.markdown import escape_unseen
from vlmcap.models.arguments import UNQUANTISED
from vlmcap.reporting.card_facts import is_hub_id, public_id, recipe_of, trained_keys

MERGE = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor{nf4_import}

base, adapter = {base}, {repo}{nf4}
model = AutoModelForImageTextToText.from_pretrained(
    base,{revision}
    dtype={dtype},
    device_map="auto",{quantised}
){dequantised}
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained("merged")
AutoProcessor.from_pretrained(adapter).save_pretrained("merged")"""

NF4 = """
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={},
    llm_int8_skip_modules=[
{}    ],
)"""

UNPACKED = """
for module in model.modules():  # as in training on every CPU, see bitsandbytes issue 2078
    module.support_avx512bf16_for_cpu = False"""

DEQUANTISED = """.dequantize()
for config in (model.config, model.config.text_config, model.config.vision_config):
    vars(config).pop("_pre_quantization_dtype", None)  # transformers 4 leaves it, and cannot save it"""

# As vlmcap.data.images.open_image reads a picture: upright, transparency on white.
PICTURE = """\
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
image = Image.new("RGB", photo.size, "white")
image.paste(photo, mask=photo)
"""

CAPTION = """\
pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values.to(model.device)
ids = model.generate(
    pixel_values=pixel_values, {settings}
)
print(processor.batch_decode(ids, skip_special_tokens=True)[0])"""

PROMPT = """\
{prompt}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": prompt}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
"""

ANSWER = """\
inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
output = model.generate(**inputs, {settings})
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())"""


def load_snippet(metrics: dict, repo: str) -> str:
    """Python that loads model and processor as they were measured, NF4 included; `repo` is a Hub id or a folder."""
    return recipe_of(metrics).load.format(**_loaded(metrics, repo))


def merge_snippet(metrics: dict, repo: str) -> str:
    """Python that makes one model of base and adapter and writes it into the folder `merged`.

    The weights that the adapter was trained on are those of NF4, so it is merged into these, made numbers again
    (`dequantize`); the published weights are others, and 4-bit ones would be rounded again.
    """
    return MERGE.format(**_loaded(metrics, repo))


MERGED = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {repo}
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")"""


def quick_start(metrics: dict, name: str, load: str | None = None) -> str:
    """Python that captions one photograph with the settings of the measured run, ready to paste.

    Where captions have keys, the language is chosen in one line of it.

    Args:
        name: of the adapter or model, a Hub id or a folder.
        load: Python that makes `model` and `processor` of it, with `{repo}` for the name; default the recipe's own.
    """
    load = (load.format(repo=quoted(name)) if load else load_snippet(metrics, name)).splitlines()
    imports = ["from PIL import Image, ImageOps", *(line for line in load if line.startswith("from "))]
    if metrics["prompt"] is None:
        keys = ("num_beams", "max_new_tokens", "no_repeat_ngram_size", "do_sample")
        caption = PICTURE + CAPTION
    else:
        keys, caption = ("num_beams", "max_new_tokens", "do_sample"), PROMPT + PICTURE + ANSWER
    decoding = {key: metrics["decoding"][key] for key in keys if key in metrics["decoding"]}
    decoding["repetition_penalty"] = 1.0  # some bases bring another, which the measured captions were made without
    settings = ", ".join(f"{key}={value!r}" for key, value in decoding.items())
    lines = [*imports, *(line for line in load if line not in imports), ""]
    return "\n".join(lines) + "\n" + caption.format(settings=settings, prompt=_prompt(metrics))


def _prompt(metrics: dict) -> str:
    """Python that sets `prompt`; where there are several, those that it was trained with, and the main one chosen."""
    prompts = trained_keys(metrics)
    if not prompts:
        return f"prompt = {quoted(metrics['prompt'] or '')}"
    lines = [f"    {quoted(key)}: {quoted(prompt)},\n" for key, prompt in prompts.items()]
    return f"prompts = {{\n{''.join(lines)}}}\nprompt = prompts[{quoted(metrics['key'])}]  # or another of them"


def _loaded(metrics: dict, repo: str) -> dict[str, str]:
    """What the templates of code are filled with; what belongs to NF4 is empty where the base was not quantised."""
    model = metrics["model"]
    dtype = quoted(model["dtype"].removeprefix("torch."))
    revision = f"\n    revision={quoted(model['revision'])}," if model["revision"] and is_hub_id(model["id"]) else ""
    unquantised = "".join(f"        {quoted(name)},\n" for name in UNQUANTISED)
    nf4 = {
        "nf4_import": ", BitsAndBytesConfig",
        "nf4": NF4.format(dtype, unquantised),
        "quantised": "\n    quantization_config=nf4,",
        "unpacked": UNPACKED,
        "dequantised": DEQUANTISED,
    }
    filled = nf4 if model["quantization"] else dict.fromkeys(nf4, "")
    return filled | {
        "base": quoted(public_id(model["id"])),
        "repo": quoted(repo),
        "revision": revision,
        "dtype": dtype,
    }


def quoted(text: str) -> str:
    """A string of Python in double quotes and one line; what cannot be seen is written out."""
    return escape_unseen(json.dumps(text, ensure_ascii=False))
