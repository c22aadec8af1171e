"""Heron-NVILA-Lite (Turing): NVILA with code in the model's repository.

Never run with the real weights. Unverified: the versions, and that its `generate_content` takes a configuration with
beams.
"""

from loading import about, device_and_dtype, open_png, search_settings
from protocol import serve


def load(header):
    import torch
    from transformers import AutoModel, GenerationConfig

    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    options = {"torch_dtype": dtype, "device_map": device}
    model = AutoModel.from_pretrained(header["model"], use_safetensors=True, **options, **pinned).eval()
    config = GenerationConfig(**search_settings(header["decoding"]))

    @torch.inference_mode()
    def caption(png, prompt):
        return model.generate_content([open_png(png), prompt], generation_config=config)

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
