"""The two ends of a model, which this program computes itself: token ids to hidden states, hidden states to logits."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import swarm.compat  # noqa: F401

import torch

from swarm.errors import ModelMismatch
from swarm.products.choice import can_pack
from swarm.products.linear import PackedLinear, can_loop

# Memory for a second copy of the head's weights, where the embeddings need the first. BLOOM's would take 7 GB.
COPY_LIMIT = 2**30  # bytes


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

    def __init__(self, model: Any) -> None:
        self._transformer = model.transformer  # petals gives all its model families BLOOM's attribute names
        self._lm_head = pack_head(model.lm_head, self._transformer.word_embeddings.weight)
        # What some families do to the logits after the product: greedy answers do not change by it, but all others do.
        self._scaling: float = getattr(model.config, "logits_scaling", None) or 1.0
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.device: torch.device = self._transformer.word_embeddings.weight.device
        self.vocab_size: int = self._transformer.word_embeddings.weight.shape[0]
        self._hidden_shape: torch.Size = self._transformer.word_embeddings.weight.shape[1:]
        self._waiting: deque[tuple[torch.Tensor, Future[torch.Tensor]]] = deque()
        self._computing = threading.Lock()

    @torch.inference_mode()
    def embed(self, *rows: Sequence[int]) -> torch.Tensor:
        """Return the inputs of the first block: [rows, n tokens, hidden size], on the CPU, which they are sent from."""
        ids = torch.tensor([list(row) for row in rows], device=self.device)
        return self._transformer.word_embeddings_layernorm(self._transformer.word_embeddings(ids)).cpu()

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens, float32 on the CPU.

        :param hidden: [n rows, hidden size], outputs of the last block
        :returns: [n rows, vocabulary]
        """
        hidden = hidden.to(self.device, self._transformer.ln_f.weight.dtype)
        logits = self._lm_head(self._transformer.ln_f(hidden)).float()
        if self._scaling != 1.0:
            logits = logits / self._scaling
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.cpu()

    def next_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of one sequence's next token, computed together with those other threads wait for.

        Reading the head's large weights takes most of the time: with BLOOM's, 32 rows at once take hardly longer than
        one. The thread that finds the head free computes for all waiting threads (flat combining, Hendler et al., SPAA
        2010); no thread waits for a batch to fill.

        :param hidden: [hidden size], floating
        :returns: [vocabulary], float32 on the CPU
        :raises ModelMismatch: if ``hidden`` is something else
        """
        if hidden.shape != self._hidden_shape or not hidden.is_floating_point():
            raise ModelMismatch(f"hidden states are {hidden.dtype} of shape {list(hidden.shape)}")
        mine: Future[torch.Tensor] = Future()
        self._waiting.append((hidden, mine))
        with self._computing:
            if not mine.done():
                self._compute_waiting()
        return mine.result()

    def _compute_waiting(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            rows = self.logits(torch.stack([hidden for hidden, _ in waiting])).unbind(0)
        except Exception:  # out of memory, or one of them cannot be computed; computing each alone shows which
            for hidden, future in waiting:
                self._compute_alone(hidden, future)
        except BaseException as error:
            for _, future in waiting:
                future.set_exception(error)
            raise
        else:
            for (_, future), row in zip(waiting, rows, strict=True):
                future.set_result(row)

    def _compute_alone(self, hidden: torch.Tensor, future: "Future[torch.Tensor]") -> None:
        try:
            future.set_result(self.logits(hidden[None])[0])
        except BaseException as error:  # raised in the thread that waits for it
            future.set_exception(error)
