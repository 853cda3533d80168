"""What this machine can compute with: the device, and the dtype that is fast and accurate on it."""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from typing import Any

from swarm.shape import head_size

MADV_DONTNEED = 4  # as Linux numbers it


def pick_device() -> str:
    """Return ``"cuda"`` if PyTorch sees a GPU, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(device: str) -> str:
    """Return the name of the dtype to compute in on ``device``, or ``"auto"`` for the checkpoint's own.

    On a CPU with AVX512, PyTorch computes fastest in bfloat16. Without, it emulates it; then the loops of
    ``swarm.products`` are as fast with activations in float32, and more accurate: servers keep their weights in fewer
    bits all the same, see ``swarm.server.quantising``.
    """
    import torch

    if not device.startswith("cpu"):
        return "auto"
    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"


def cpu_count() -> int:
    """Return the number of cores that this process may use; in a container they may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: str) -> int:
    """Return how many bytes are free on a device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def attn_cache_tokens(config: Any, dtype: str, share: float, device: str) -> int:
    """Return the number of tokens for which a server of all blocks may hold attention cache.

    Memory pages are allocated when first written, so unused cache costs nothing.

    :param config: the model's configuration
    :param share: share of the device's free memory that the cache may take; the weights come on top
    :param dtype: the dtype of the cache; ``"auto"`` counts as two bytes
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    values_per_token = 2 * config.num_hidden_layers * heads * head_size(config)
    bytes_per_token = values_per_token * (4 if dtype == "float32" else 2)
    return max(1, int(free_memory(device) * share) // bytes_per_token)


def return_free_memory() -> None:
    """Return freed memory to the system, which glibc otherwise keeps for later; without glibc, do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_library_pages() -> None:
    """Let go of what was read of libraries while the program was loaded; do nothing where that is not known.

    Most of it is needed only then: LLVM alone is 70 MB. What is needed again is read again, from the system's cache.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/smaps") as maps:
        for start, size in untouched_mappings(maps):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)


def untouched_mappings(maps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield address and size of each mapping of a library that is as its file is, and cannot be written to.

    :param maps: lines as those of ``/proc/PID/smaps``
    """
    start = size = 0
    library = False
    for line in maps:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(address, 16) for address in words[0].split("-"))
            size = end - start
            # Libraries are never unmapped, so that nothing else can be there by now.
            library = words[1][1] == "-" and ".so" in words[-1]
        elif words[0] == "Anonymous:" and words[1] == "0" and library:
            yield start, size
