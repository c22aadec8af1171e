"""An adapter and its base as one model, without an adapter and without 4-bit weights."""

import psutil
import torch
from transformers import PreTrainedModel

from vlmcap.models.load import count_parameters, load_adapter, load_model, skeleton_of
from vlmcap.models.weights import Adapter, ModelError

SHARD = 2**30  # bytes of a file of weights: safetensors copies what a file holds before it writes it
LIBRARIES = 2**30  # bytes of Python with torch, transformers and bitsandbytes


def needed_memory(base: str, revision: str | None, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Parameters of a base, and the bytes that merging into it takes at most: part -> bytes.

    The weights are held once: `dequantize` replaces 4-bit weights layer by layer, and PEFT merges into what is there.
    Files that are mapped come on top where memory is free; the system takes that back when it is not.
    """
    parameters = count_parameters(skeleton_of(base, revision))
    size = parameters * dtype.itemsize
    return parameters, {"weights": size, "a file to write": min(size, SHARD), "libraries": LIBRARIES}


def check_memory(base: str, revision: str | None, dtype: torch.dtype) -> str:
    """A line that says how much memory merging into this base takes, and how much is free.

    Raises:
        ModelError: there is less.
    """
    parameters, parts = needed_memory(base, revision, dtype)
    needed, free = sum(parts.values()), psutil.virtual_memory().available
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    detail = ", ".join(f"{part} {value / 2**30:.1f}" for part, value in parts.items())
    line = (
        f"Memory: about {needed / 2**30:.1f} GiB for {parameters:,} parameters in {str(dtype).removeprefix('torch.')}"
        f" ({detail}); {free / 2**30:.1f} GiB are free"
    )
    if needed > free:
        smaller = "give --dtype float16, " if dtype == torch.float32 else ""
        raise ModelError(f"{line}: {smaller}close other programs, or take a larger machine")
    return line


def merge(adapter: Adapter, base: str, revision: str | None, quantised: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Base and adapter as one model in `dtype`.

    A QLoRA adapter was trained on the weights that NF4 left, so it is merged into these, made numbers again. The
    published weights are others, and a merge into 4-bit ones would be rounded again.

    Args:
        quantised: whether the adapter was trained on the base in NF4.
    """
    model = load_model(base, revision, quantised, dtype=dtype)
    if quantised:
        model = model.dequantize()
    # PEFT keeps the trained projector in float32.
    return load_adapter(model, adapter.name, adapter.revision, revision).merge_and_unload().to(dtype)
