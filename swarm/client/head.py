"""The two ends of a model, which this program computes itself: token ids to hidden states, hidden states to logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.client.bounded_head import BoundedHead, make_finish, softcapped
from swarm.client.bounds import Logits
from swarm.client.together import Together
from swarm.errors import ModelMismatch
from swarm.hardware import pick_dtype
from swarm.products.choice import can_pack
from swarm.products.linear import PackedLinear, can_loop

# Memory for a second copy of the head's weights, where the embeddings need the first. BLOOM's would take 7 GB.
COPY_LIMIT = 2**30  # bytes
# Numbers of weights from which the head's are read in 8 bits first. Without AVX512, where the alternative is float32,
# 32,000 rows of 4,096 then take a third of the time for one session, and no longer for 16; of SmolLM2's 49,152 rows of
# 576, drawing from bounds takes longer than is gained. With AVX512 the alternative is bfloat16: 128,256 rows of 4,096
# take half the time for one session, and as long for 16. What is larger would need much memory.
BOUNDED_FROM = 100_000_000
BOUNDED_FROM_WITH_AVX512 = 500_000_000


def is_large(config: Any, device: str) -> bool:
    """Whether a model's head is computed by ``BoundedHead``, from weights as they are in the checkpoint."""
    least = BOUNDED_FROM_WITH_AVX512 if pick_dtype(device) == "bfloat16" else BOUNDED_FROM
    return torch.device(device).type == "cpu" and config.vocab_size * config.hidden_size >= least


def pack_head(lm_head: Any, embeddings: torch.Tensor) -> Any:
    """Return the language-model head with its weights packed in the processor's preferred order, if possible."""
    weight = lm_head.weight
    small = weight.numel() * weight.element_size() <= COPY_LIMIT
    by_loops = small and weight.dtype in (torch.bfloat16, torch.float16) and can_loop(weight)
    if not by_loops and (not can_pack(weight) or (weight.dtype != torch.float32 and lm_head.use_chunked_forward)):
        return lm_head  # petals knows a way that takes less memory, for a processor without AVX512
    tied = weight.data_ptr() == embeddings.data_ptr()
    if tied and not small:
        return lm_head
    packed = PackedLinear(lm_head)
    if not tied:
        lm_head.weight.data = torch.empty(0)  # the packed copy replaces it
    return packed


class Head:
    """Embeddings and language-model head of a petals model. Thread-safe."""

    def __init__(self, model: Any, *, bounded: bool = False, cache_dir: Path | None = None, identity: str = "") -> None:
        """Take a model's two ends.

        :param bounded: whether the head's weights are read in 8 bits first, see ``BoundedHead``
        :param cache_dir: where those are kept; None: in memory
        :param identity: of the weights, see ``swarm.client.quantised_weights.quantised``
        """
        self._transformer = model.transformer  # petals gives all its model families BLOOM's attribute names
        # What some families do to the logits after the product: greedy answers do not change by it, but all others do.
        self._scaling: float = getattr(model.config, "logits_scaling", None) or 1.0
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.device: torch.device = self._transformer.word_embeddings.weight.device
        self.vocab_size: int = self._transformer.word_embeddings.weight.shape[0]
        self._hidden_shape: torch.Size = self._transformer.word_embeddings.weight.shape[1:]
        self._bounded: BoundedHead | None = None
        if bounded:
            finish = make_finish(self._scaling, self._softcap)
            self._bounded = BoundedHead(model.lm_head.weight.detach(), cache_dir, identity, *finish)
        else:
            self._lm_head = pack_head(model.lm_head, self._transformer.word_embeddings.weight)
        self._all_together: Together[torch.Tensor] = Together(lambda hidden: self.logits(hidden).unbind(0))
        self._bounds_together: Together[Logits] = Together(lambda hidden: self.bounds(hidden))

    @torch.inference_mode()
    def embed(self, *rows: Sequence[int]) -> torch.Tensor:
        """Return the inputs of the first block: [rows, n tokens, hidden size], on the CPU, which they are sent from."""
        ids = torch.tensor([list(row) for row in rows], device=self.device)
        embedded = self._transformer.word_embeddings(ids)
        if self._bounded is not None:  # rows of the checkpoint become what the rest is computed in
            embedded = embedded.to(self._transformer.ln_f.weight.dtype)
        return self._transformer.word_embeddings_layernorm(embedded).cpu()

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens, float32 on the CPU.

        :param hidden: [n rows, hidden size], outputs of the last block
        :returns: [n rows, vocabulary]
        """
        inputs = self._normed(hidden)
        if self._bounded is not None:
            return self._bounded.logits(inputs)
        return softcapped(self._lm_head(inputs).float(), self._scaling, self._softcap).cpu()

    @torch.inference_mode()
    def bounds(self, hidden: torch.Tensor) -> Sequence[Logits]:
        """Return what is known of the logits of the next tokens without reading all weights, or all of them if the
        head is small.

        :param hidden: [n rows, hidden size], outputs of the last block
        """
        if self._bounded is None:
            return self.logits(hidden).unbind(0)
        return self._bounded.bounds(self._normed(hidden).float())

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._transformer.ln_f(hidden.to(self.device, self._transformer.ln_f.weight.dtype))

    def next_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of one sequence's next token, computed together with those other threads wait for.

        :param hidden: [hidden size], floating
        :returns: [vocabulary], float32 on the CPU
        :raises ModelMismatch: if ``hidden`` is something else
        """
        return self._all_together(self._checked(hidden))

    def next_bounds(self, hidden: torch.Tensor) -> Logits:
        """As ``next_logits``, but return what is known of the logits, see ``bounds``."""
        if self._bounded is None:
            return self.next_logits(hidden)
        return self._bounds_together(self._checked(hidden))

    def next_bounds_of_each(self, hidden: torch.Tensor) -> Sequence[Logits]:
        """As ``next_bounds``, for several positions.

        :param hidden: [n, hidden size], floating
        """
        together: Together[Any] = self._all_together if self._bounded is None else self._bounds_together
        return together.each([self._checked(row) for row in hidden])

    def _checked(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape != self._hidden_shape or not hidden.is_floating_point():
            raise ModelMismatch(f"hidden states are {hidden.dtype} of shape {list(hidden.shape)}")
        return hidden
