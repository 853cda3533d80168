"""Any family of Transformers in batches, see ``LayerBlocks``."""

from collections.abc import Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
from torch import nn

from swarm.families.attention import Scoring, computing_attention
from swarm.families.layers import Positions
from swarm.products.linear import fuse
from swarm.server.blocks import Batch, RaggedBlocks

# Of a batch: positions, [1, tokens], and the rotation of each type of layer.
Context = tuple[torch.Tensor, dict[str | None, tuple[torch.Tensor, torch.Tensor]]]


class LayerBlocks(RaggedBlocks):
    """Transformers' own layers. They see a batch as one long sequence, each token with the position that it has in its
    own; only attention knows better."""

    @classmethod
    def accepts(cls, blocks: Sequence[Any], config: Any) -> bool:
        return True

    def __init__(self, blocks: Sequence[Any], config: Any, dtype: torch.dtype, max_length: int) -> None:
        super().__init__(blocks, config, dtype, max_length)
        self.positions = Positions(config)
        if getattr(config, "sliding_window", None) is not None:
            self.windows = tuple(map(self._window, blocks))

    @torch.inference_mode()
    def _window(self, block: Any) -> int | None:
        """Ask a layer for its window, with a token: some layers keep it, others read it from the configuration."""
        asked: list[int | None] = []

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
            asked.append(scoring.window)
            return query.transpose(1, 2)

        hidden = torch.zeros(1, 1, self.config.hidden_size, dtype=self.dtype, device=self.device)
        positions = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with computing_attention(attention):
            block.compute(hidden, self.positions(positions, block.layer_type, self.dtype), positions)
        return asked[0]

    def pack(self) -> None:
        """Put the weights into the processor's order. Nothing else changes."""
        for block in self.blocks:
            for parent in list(block.modules()):
                for name, layer in list(parent.named_children()):
                    if type(layer) is nn.Linear:
                        fuse(parent, name)

    def context(self, batch: Batch) -> Context:
        positions = torch.from_numpy(batch.positions)[None].to(self.device)
        types = {block.layer_type for block in self.blocks}
        return positions, {kind: self.positions(positions, kind, self.dtype) for kind in types}

    def compute(self, number: int, hidden: torch.Tensor, batch: Batch, context: Context) -> torch.Tensor:
        block: Any = self.blocks[number]
        positions, rotations = context

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
            queries = query[0].transpose(0, 1).unflatten(1, (self.kv_heads, self.group)).contiguous()
            new = torch.stack([key[0], value[0]]).permute(2, 0, 1, 3).contiguous()
            outputs = batch.attend(number, queries, new, scoring)
            return outputs.view(1, len(outputs), -1, self.head_size)

        with computing_attention(attention):
            return block.compute(hidden[None], rotations[block.layer_type], positions)[0]
