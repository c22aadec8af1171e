"""4-bit weights mean the same on every CPU: bitsandbytes chooses code by the processor, and some of it differs."""

from collections.abc import Callable
from ctypes import c_longlong

import bitsandbytes as bnb
from bitsandbytes.functional import lib
from torch import nn


def keep_as_quantised(model: nn.Module) -> None:
    """Makes every 4-bit layer compute from the weights that quantisation left.

    On CPUs with AVX512-BF16, `Linear4bit.forward` of bitsandbytes 0.50.2 repacks its weight for a faster kernel, once,
    in evaluation mode without gradients. That crashes for widths that are no multiple of 64. Other layers stay
    repacked: their scales are rounded to bfloat16, and no gradient passes through them in the training steps that
    follow a validation. Neither `train()` nor `Params4bit.to()` undoes it (bitsandbytes issues 2078 and 2083). This
    can be removed when a repacked layer takes part in training as an unpacked one does, and computes the same values.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def in_whole_blocks(dequantise: Callable) -> Callable:
    """`dequantise(A, absmax, out, blocksize, rows, width)`, called with rows that are whole blocks.

    A matrix is quantised in blocks of 64 numbers one after the other, across the ends of its rows. The kernel for
    AVX512 in bitsandbytes 0.50.2 (csrc/cpu_ops.cpp) takes `width // blocksize` scales a row, so that a matrix 160 wide
    gets the wrong scales from its second row on. The kernel without AVX512 does not look at rows. Both are right for
    the same numbers in rows of one block. This can be removed when AVX512 gives `test_nf4.py` without it.
    """

    def call(packed, absmax, out, blocksize, rows, width):
        count, size = rows.value * width.value, blocksize.value
        if width.value % size:
            rows, width = (count // size, size) if count % size == 0 else (1, count)
            rows, width = c_longlong(rows), c_longlong(width)
        return dequantise(packed, absmax, out, blocksize, rows, width)

    return call


for _dtype in ("fp32", "bf16", "fp16"):
    _name = f"cdequantize_blockwise_cpu_nf4_{_dtype}"
    setattr(lib, _name, in_whole_blocks(getattr(lib, _name)))
