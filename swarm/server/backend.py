"""Petals' backend of a block, which knows how large attention heads are."""

from collections.abc import Sequence

import swarm.compat  # noqa: F401

from hivemind.utils import TensorDescriptor
from petals.server.backend import TransformerBackend

from swarm.shape import head_size


class HeadSizeBackend(TransformerBackend):
    """Petals' backend, which takes hidden size / heads for the size of a head."""

    def get_inference_cache_descriptors(self, batch_size: int, max_length: int) -> Sequence[TensorDescriptor]:
        """Return the attention cache of a session of this block: keys and values for each device.

        :returns: keys of [batch, heads, head size, tokens], values of [batch, heads, tokens, head size]
        """
        size, descriptors = head_size(self.config), []
        for device, heads in zip(self.module.devices, self.shard_num_heads, strict=True):
            shape = (batch_size, heads // self.config.num_key_value_groups)
            descriptors += [
                TensorDescriptor((*shape, *sizes), dtype=self.dtype, device=device)
                for sizes in ((size, max_length), (max_length, size))
            ]
        return descriptors
