"""Lets processes share tensors as PyTorch does by default.

hivemind chooses the way that needs a helper process, ``torch_shm_manager``, whose 60 MB each server and each app would
have; all that is shared is whether a call to the DHT is done.
"""

import os

import torch.multiprocessing

_default = torch.multiprocessing.get_sharing_strategy()

import hivemind.utils.mpfuture  # noqa: E402, F401  sets its own

if "HIVEMIND_MEMORY_SHARING_STRATEGY" not in os.environ:
    torch.multiprocessing.set_sharing_strategy(_default)
