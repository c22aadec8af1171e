"""On PYTHONPATH, this makes bitsandbytes believe that the processor has AVX512-BF16, in every Python that is started.

The whole product as it runs on such a machine, except for the speed: `PYTHONPATH=tests/avx512_bf16 make demo`.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class AsOnAvx512Bf16(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.has_avx512bf16 = lambda: True

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, AsOnAvx512Bf16())
