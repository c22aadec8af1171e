"""LLaVA-JP v1.0: code of github.com/tosiyuki/LLaVA-JP, which the table pins to a commit, on PYTHONPATH.

Experimental: it has never run with the real weights. The steps follow demo_llava.py of that commit, which samples.
transformers 4.36 and later have a model type "llava" of their own, which that code registers too.
"""

from types import SimpleNamespace

from loading import about, device_and_dtype, load_whole, open_png, search_settings
from protocol import serve

# config.json ("vision_config") and preprocessor_config.json of openai/clip-vit-large-patch14-336, where they differ
# from what transformers takes without them.
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
    "image_size": 336,
    "patch_size": 14,
}
PICTURES = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def pin_vision_tower():
    """Builds the vision tower from `TOWER`; its weights come with the checkpoint.

    By default, their code reads the tower from the main branch of a repository of others, which has a pickle.
    """
    from llava.model import clip_encoder
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    def instead(make):
        return SimpleNamespace(from_pretrained=lambda name: make())

    clip_encoder.CLIPVisionConfig = instead(lambda: CLIPVisionConfig(**TOWER))
    clip_encoder.CLIPVisionModel = instead(lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)))
    clip_encoder.CLIPImageProcessor = instead(lambda: CLIPImageProcessor(**PICTURES))


def load(header):
    import torch
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.model.llava_gpt2 import LlavaConfig, LlavaGpt2ForCausalLM
    from llava.train.dataset import tokenizer_image_token
    from transformers import AutoTokenizer

    pin_vision_tower()
    name, revision = header["model"], header["revision"]
    device, dtype = device_and_dtype()
    # Where training began from a projector, their code would read that from a pickle: it is in the checkpoint too.
    config = LlavaConfig.from_pretrained(name, revision=revision, pretrain_mm_mlp_adapter=None)
    model = load_whole(LlavaGpt2ForCausalLM, name, config=config, revision=revision, torch_dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=revision, model_max_length=1024, use_fast=False, trust_remote_code=False
    )
    pictures = model.get_model().vision_tower.image_processor
    search = search_settings(header["decoding"], model, tokenizer)

    @torch.inference_mode()
    def caption(png, prompt):
        talk = conv_templates["v1"].copy()
        talk.append_message(talk.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{prompt}")
        talk.append_message(talk.roles[1], None)
        tokens = tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        output = model.generate(
            inputs=tokens[None, :-1].to(device),  # without the end of text that the tokenizer puts after the prompt
            images=pictures(open_png(png), return_tensors="pt")["pixel_values"].to(device, dtype),
            use_cache=True,
            **search,
        )
        return tokenizer.decode(output[0, len(tokens) - 1 :], skip_special_tokens=True)

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
