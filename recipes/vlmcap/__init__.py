"""Adapt a small vision-language model to image captioning, and measure the result."""

import logging
import sys

# On CPUs with AVX512-BF16, bitsandbytes 0.50.2 loads compiled code from the Hub when it is imported and
# the package `kernels` is installed, and warns where it is not. Code of a repository runs only when it was asked for
# (SECURITY.md), so here the package counts as not installed. Can be removed when bitsandbytes asks first.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in record.msg)
