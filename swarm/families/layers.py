"""Transformers' decoder layers as blocks of petals."""

from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.families.attention import IMPLEMENTATION, OneCall, computing_attention


class Positions:
    """The rotary position embeddings of a model, made by Transformers' own module for its family."""

    def __init__(self, config: Any) -> None:
        self._rotary = config.block_class.rotary_class(config)
        self._by_layer_type = isinstance(getattr(self._rotary, "rope_type", None), dict)

    def __call__(
        self, positions: torch.Tensor, layer_type: str | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, [1, tokens, rotated part of the head].

        :param positions: [1, tokens]
        :param layer_type: some families rotate layers with a window otherwise than others
        """
        like = torch.empty(0, dtype=dtype, device=positions.device)
        return self._rotary(like, positions, layer_type) if self._by_layer_type else self._rotary(like, positions)


class SwarmLayer:
    """Mixed into a decoder layer of Transformers, before it, this makes it a block that petals can compute.

    Subclasses are made by ``swarm.families.classes``.
    """

    rotary_class: type[Any]

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        """Make a layer without weights.

        :param layer_idx: its number in the model. Petals gives none where it only counts parameters.
        """
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.config = config
        layer: Any = self
        layer.self_attn.num_heads = config.num_attention_heads  # petals counts them
        types = getattr(config, "layer_types", None)
        self.layer_type: str | None = types[layer_idx] if types else None
        # In a list, where PyTorch does not look: its buffers are neither weights, nor may they be made on the meta
        # device, as the layer's are.
        self._positions: list[Positions] = []

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, layer_past: Any = None, use_cache: bool = False, **options: Any
    ) -> tuple[Any, ...]:
        """Compute the block as petals wants it.

        :param hidden_states: [batch, tokens, hidden size]
        :param layer_past: see ``OneCall``
        :returns: the outputs, and with ``use_cache`` keys and values of all tokens
        """
        past = 0 if layer_past is None else layer_past[0].shape[-1]
        positions = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device)[None]
        if not self._positions:
            self._positions.append(Positions(self.config))
        rotation = self._positions[0](positions, self.layer_type, hidden_states.dtype)
        call = OneCall(layer_past if past else None)
        with computing_attention(call):
            outputs = self.compute(hidden_states, rotation, positions)
        return (outputs, call.present) if use_cache else (outputs,)

    def compute(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor
    ) -> torch.Tensor:
        """Compute the layer as Transformers does; within ``computing_attention``.

        :param hidden: [batch, tokens, hidden size]; with one row of positions, and so with one rotation
        """
        outputs = super().forward(  # type: ignore[misc]
            hidden, position_embeddings=rotation, position_ids=positions, attention_mask=None
        )
        return outputs[0] if isinstance(outputs, tuple) else outputs
