"""Stands in for the package of this name, which has no wheels for Python 3.12 and newer.

Petals' head asks it whether plain products of bfloat16 are fast on this processor; PyTorch knows that too.
Importing this module makes it that package.
"""

import sys

import torch

_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
CPUFeature = {"AVX512f": _AVX512, "OS_AVX512": _AVX512}
sys.modules["cpufeature"] = sys.modules[__name__]
