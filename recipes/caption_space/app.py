"""A picture in, its caption out: the base model with the adapter on it, loaded as it was measured."""

import json
from pathlib import Path

import gradio
import torch
from peft import PeftModel
from pictures import BadImageError, read_picture
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

SPACE = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))


def load() -> tuple[PeftModel, AutoProcessor]:
    """Base and adapter of space.json; the base in NF4 where it was measured so, which a CPU computes too."""
    base, adapter = SPACE["base"], SPACE["adapter"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base["dtype"],
        llm_int8_skip_modules=base["unquantised"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        base["id"],
        revision=base["revision"],
        dtype=base["dtype"],
        device_map="auto",
        quantization_config=nf4 if base["quantization"] else None,
        trust_remote_code=False,
    )
    for module in model.modules():  # as in training on every CPU, see bitsandbytes issue 2078
        module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, adapter["id"], revision=adapter["revision"]).eval()
    processor = AutoProcessor.from_pretrained(adapter["id"], revision=adapter["revision"], trust_remote_code=False)
    return model, processor


MODEL, PROCESSOR = load()


@torch.inference_mode()
def caption(path: str | None, kind: str) -> tuple[str, str]:
    """The caption of a picture file, and what else the beam search ended with, the best first, one a line.

    kind: of the prompts in space.json.
    """
    if path is None:
        raise gradio.Error("Upload a picture, or take one with the camera.")
    try:
        image = read_picture(path, Path(path).name)
    except BadImageError as error:
        raise gradio.Error(str(error)) from error
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SPACE["prompts"][kind]}]}]
    text = PROCESSOR.apply_chat_template(messages, add_generation_prompt=True)
    inputs = PROCESSOR(text=[text], images=[image], return_tensors="pt").to(MODEL.device)
    beams = SPACE["decoding"]["num_beams"]
    output = MODEL.generate(
        **inputs, **SPACE["decoding"], num_return_sequences=beams, do_sample=False, repetition_penalty=1.0
    )
    said = PROCESSOR.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    best, *others = dict.fromkeys(" ".join(one.split()) for one in said)
    return best, "\n".join(others)


def page() -> gradio.Blocks:
    """The app. Pictures are deleted within the hour; nothing else is kept."""
    with gradio.Blocks(title=SPACE["title"], delete_cache=(1800, 1800), analytics_enabled=False) as app:
        gradio.Markdown(f"# {SPACE['title']}\n\n{SPACE['introduction']}")
        with gradio.Row():
            # By its path, so that it is read as in training: turned upright by its EXIF, and put on white.
            picture = gradio.Image(type="filepath", image_mode=None, sources=["upload", "webcam"], label="Picture")
            with gradio.Column():
                kinds = list(SPACE["prompts"])
                kind = gradio.Dropdown(kinds, value=kinds[0], label="Language", visible=len(kinds) > 1)
                button = gradio.Button("Caption", variant="primary")
                said = gradio.Textbox(label="Caption")
                others = gradio.Textbox(label="Alternatives of the beam search, the best first", lines=3)
        gradio.Markdown(f"## Limits and risks\n\n{SPACE['limits']}")
        button.click(caption, [picture, kind], [said, others], api_name="caption")
    return app


if __name__ == "__main__":
    # Without the fonts of the default theme, which the visitor's browser would fetch from Google.
    page().launch(theme=gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"]))
