"""The two ends of a model that this program computes itself: token ids to hidden states, hidden states to logits."""

from collections.abc import Sequence
from typing import Any

import torch


class Head:
    """Embeddings and language-model head of a petals model. May be used by several threads at a time."""

    def __init__(self, model: Any) -> None:
        self._transformer = model.transformer  # petals gives all its model families BLOOM's attribute names
        self._lm_head = model.lm_head
        self.device: torch.device = self._transformer.word_embeddings.weight.device
        self.vocab_size: int = self._transformer.word_embeddings.weight.shape[0]

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the inputs of the first block: [1, n tokens, hidden size], on the CPU, from where they are sent."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        return self._transformer.word_embeddings_layernorm(self._transformer.word_embeddings(ids)).cpu()

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens, float32 on the CPU.

        :param hidden: [n rows, hidden size], outputs of the last block
        :returns: [n rows, vocabulary]
        """
        hidden = hidden.to(self.device, self._transformer.ln_f.weight.dtype)
        return self._lm_head(self._transformer.ln_f(hidden)).float().cpu()
