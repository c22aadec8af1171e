"""What the runners share once torch and transformers are there: weights, device, precision, inputs, the search.

They ask for one caption at a time, so every batch has one picture.
"""

import io
import sys

import torch
from PIL import Image, ImageOps


def device_and_dtype():
    """A GPU in bfloat16 (float16 below compute capability 8.0) or the CPU in float32."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load_whole(kind, name, **options):
    """`kind.from_pretrained` from safetensors alone, with a weight for every parameter, ready to search with beams.

    By default, transformers draws missing weights at random and continues with a warning. Tied weights do not count
    as missing. Weights without a use are named on stderr.

    Raises:
        ValueError: naming the weights that are missing or have another shape.
    """
    model, report = kind.from_pretrained(
        name,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else an error that may name no weight
        **options,
    )
    # Names alone in transformers 4.57, names with two shapes before.
    shapes = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for problem, keys in (("has no weights for", report["missing_keys"]), ("has other shapes for", shapes)):
        if keys:
            raise ValueError(f"{name} {problem} {_names(keys)} of a {type(model).__name__}")
    if unused := report["unexpected_keys"]:
        print(f"{name}: a {type(model).__name__} has no use for {_names(unused)}", file=sys.stderr)
    repeat_whole_inputs(model)
    return model.eval()


def _names(keys):
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def repeat_whole_inputs(model):
    """Makes beam search give each beam every tensor as it is: (n, ...) becomes (beams * n, ...), all n for each beam.

    Older transformers (4.57.1 too) repeat row by row, which is right where a row is a picture. Rows that are the
    patches or tiles of one picture come out as p0 p0 p0 p1 p1 p1, and no beam sees the picture.
    """

    def expand(expand_size=1, is_encoder_decoder=False, input_ids=None, **inputs):
        def repeated(name, value):
            if not isinstance(value, torch.Tensor) or name == "cache_position":  # of the sequence, not of the batch
                return value
            return torch.cat([value] * expand_size)

        return repeated("input_ids", input_ids), {name: repeated(name, value) for name, value in inputs.items()}

    model._expand_inputs_for_generation = expand


def open_png(png):
    """RGB, upright, transparency on white: as vlmcap.data.images.open_image reads a picture."""
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(png))).convert("RGBA")
    image = Image.new("RGB", photo.size, "white")
    image.paste(photo, mask=photo)
    return image


def inputs_of(encoded, device, dtype):
    """What a processor made, on the device, numbers of pictures in `dtype`; without `token_type_ids`, which a
    tokenizer may add and no decoder here takes."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in encoded.items()
        if name != "token_type_ids"
    }


def search_settings(decoding, model, tokenizer):
    """Arguments of `generate` for what the header asks: beam search or greedy search.

    The model's own sampling, penalties and lengths are set back, so that all baselines search alike. The tokens that
    end and pad a caption are the model's own, or else the tokenizer's.
    """
    own = getattr(model, "generation_config", None)
    ends = {}
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(own, name, None)
        ends[name] = getattr(tokenizer, name) if token is None else token
    return ends | {
        "num_beams": decoding["num_beams"],
        "max_new_tokens": decoding["max_new_tokens"],
        "do_sample": False,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "early_stopping": False,
        "min_length": 0,
    }


def response(text, start):
    """The answer of a model of instructions `### 指示:` and answers `### 応答:`, from what `generate` returned.

    Args:
        text: decoded, with or without the prompt before it.
        start: how the prompt begins. A mark after anything else is one that the model invented with another turn.
    """
    before, mark, after = text.partition("### 応答:")
    if mark and (not before.strip() or before.lstrip().startswith(start)):
        text = after
    return text.strip().split("\n\n### ")[0].strip()


def about(model):
    parameters = list(model.parameters())
    return {"parameters": sum(p.numel() for p in parameters), "dtype": str(parameters[0].dtype).split(".")[-1]}
