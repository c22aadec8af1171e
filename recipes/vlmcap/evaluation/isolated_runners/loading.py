"""What the runners share once torch and transformers are there: device, precision, settings of the search."""

import io

import torch
from PIL import Image, ImageOps


def device_and_dtype():
    """A GPU in bfloat16 (float16 below compute capability 8.0) or the CPU in float32."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def open_png(png):
    """RGB, upright, transparency on white: as vlmcap.data.images.open_image reads a picture."""
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(png))).convert("RGBA")
    image = Image.new("RGB", photo.size, "white")
    image.paste(photo, mask=photo)
    return image


def search_settings(decoding):
    """Arguments of `generate` for what the header asks: beam search or greedy search, no sampling, no penalty."""
    return {
        "num_beams": decoding["num_beams"],
        "max_new_tokens": decoding["max_new_tokens"],
        "do_sample": False,
        "repetition_penalty": 1.0,
    }


def about(model):
    parameters = list(model.parameters())
    return {"parameters": sum(p.numel() for p in parameters), "dtype": str(parameters[0].dtype).split(".")[-1]}
