"""LLaVA-JP v1.0: code of github.com/tosiyuki/LLaVA-JP, which the table pins to a commit, on PYTHONPATH.

Never run with the real weights. The steps follow demo_llava.py of that commit. Unverified: the versions of the other
packages, and beams (the demo samples).
"""

from loading import about, device_and_dtype, open_png, search_settings
from protocol import serve


def load(header):
    import torch
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.model.llava_gpt2 import LlavaGpt2ForCausalLM
    from llava.train.dataset import tokenizer_image_token
    from transformers import AutoTokenizer

    name, revision = header["model"], header["revision"]
    device, dtype = device_and_dtype()
    model = LlavaGpt2ForCausalLM.from_pretrained(name, revision=revision, torch_dtype=dtype, use_safetensors=True)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=revision, model_max_length=1024, use_fast=False, trust_remote_code=False
    )
    pictures = model.get_model().vision_tower.image_processor

    @torch.inference_mode()
    def caption(png, prompt):
        talk = conv_templates["v1"].copy()
        talk.append_message(talk.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{prompt}")
        talk.append_message(talk.roles[1], None)
        tokens = tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        output = model.generate(
            inputs=tokens[None, :-1].to(device),  # without the end of text that the tokenizer puts behind the prompt
            images=pictures(open_png(png), return_tensors="pt")["pixel_values"].to(device, dtype),
            use_cache=True,
            **search_settings(header["decoding"]),
        )
        return tokenizer.decode(output[0, len(tokens) - 1 :], skip_special_tokens=True)

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
