"""A small model that this program runs itself: what it says is a draft of what a large one says."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import swarm.compat  # noqa: F401

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from swarm import weights
from swarm.client.model import LOADING
from swarm.client.warm_sessions import common_prefix
from swarm.errors import ModelUnavailable

log = logging.getLogger(__name__)

# Tokens whose keys and values are kept, of all answers together, of those that have ended as well.
MAX_TOKENS = 32_768
# So few tokens are computed while an answer waits for the draft; more are computed while it goes on without.
AT_ONCE = 32
PIECE = 256  # tokens computed at a time, between which others have their turn
NEWEST = 0.1  # the share of the average time of a token that the next one replaces


class DraftModel:
    """A causal language model of Transformers, shared by all answers. Thread-safe; computes for one at a time."""

    def __init__(self, name: str, model: PreTrainedModel, vocabulary: int) -> None:
        """:param vocabulary: tokens that the large model knows"""
        self.name = name
        self.seconds = 0.0  # that a token takes, on average
        self._model = model
        self._vocabulary = vocabulary
        self._computing = threading.Lock()
        self._lock = threading.Lock()  # held for moments
        self._kept: list[_Cache] = []  # of answers that have ended, oldest first
        self._running: list[DraftSession] = []
        self.worker = ThreadPoolExecutor(1, "draft-model")
        _, self.seconds = self.continued(_Cache(), [0], 4)
        _, self.seconds = self.continued(_Cache(), [0], 4)  # the first time takes longer

    @classmethod
    def load(
        cls, name: str, vocabulary: Mapping[str, int], size: int, *, cache_dir: Path, device: str, torch_dtype: str
    ) -> "DraftModel":
        """Load a model.

        :param name: hub name, local directory, or the name of a bundled model
        :param vocabulary: of the large model's tokenizer
        :param size: of the large model's vocabulary
        :param torch_dtype: its dtype, or ``"auto"``
        :raises ModelUnavailable: if its files are unavailable or broken, or its tokenizer is another one
        """
        try:
            path = weights.locate(name, cache_dir=cache_dir)
            if AutoTokenizer.from_pretrained(path).get_vocab() != vocabulary:
                raise ModelUnavailable(f"{name} cannot draft: its tokenizer is not the model's")
            dtype = torch_dtype if torch_dtype == "auto" else getattr(torch, torch_dtype)
            with LOADING:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, weights_only=True)
            return cls(name, model.to(device).eval(), size)
        except ModelUnavailable:
            raise
        except Exception as error:  # of whatever kind: an app without drafts is better than none
            raise ModelUnavailable(f"{name} cannot draft: {type(error).__name__}: {error}") from error

    def open(self) -> "DraftSession":
        """Return what drafts for one answer; it must be closed."""
        session = DraftSession(self)
        with self._lock:
            self._running.append(session)
        return session

    def take(self, token_ids: Sequence[int]) -> "_Cache":
        """Return the cache of an ended answer that has most of these tokens, or an empty one."""
        with self._lock:
            best = max(self._kept, key=lambda cache: common_prefix(cache.token_ids, token_ids), default=None)
            if best is None or not common_prefix(best.token_ids, token_ids):
                return _Cache()
            self._kept.remove(best)
            return best

    def has_room(self, session: "DraftSession", tokens: int) -> bool:
        """Whether a session may have so many tokens. Those of answers that have ended make room."""
        with self._lock:
            taken = tokens + sum(len(other.cache.token_ids) for other in self._running if other is not session)
            while self._kept and taken + sum(len(cache.token_ids) for cache in self._kept) > MAX_TOKENS:
                self._kept.pop(0)
            return taken <= MAX_TOKENS

    def give_back(self, session: "DraftSession") -> None:
        """Keep the cache of an answer that has ended."""
        with self._lock:
            self._running.remove(session)
            if session.cache.token_ids:
                self._kept.append(session.cache)

    @torch.inference_mode()
    def continued(self, cache: "_Cache", token_ids: Sequence[int], count: int) -> tuple[list[int], float]:
        """Return the likeliest tokens after some, and the seconds that each took.

        :param count: how many; 0: only compute the tokens' keys and values
        """
        cache.rewind(token_ids)
        new = list(token_ids[len(cache.token_ids) :])
        found: list[int] = []
        started = time.perf_counter()
        while new or len(found) < count:
            piece, new = new[:PIECE], new[PIECE:]
            with self._computing:
                output: Any = self._model(
                    torch.tensor([piece], device=self._model.device), cache=cache.tensors, use_cache=True
                )
            cache.tensors = output.cache
            cache.token_ids += piece
            if not new and len(found) < count:
                found.append(int(output.logits[0, -1, : self._vocabulary].argmax()))
                if len(found) < count:
                    new = found[-1:]
                else:
                    break
        seconds = (time.perf_counter() - started) / max(1, count)
        if count:
            self.seconds += NEWEST * (seconds - self.seconds) if self.seconds else seconds
        return found, seconds


class _Cache:
    """Keys and values of some tokens."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.tensors: Any = None

    def rewind(self, token_ids: Sequence[int]) -> None:
        """Forget the tokens from the first on that is another one, and at least the last: its logits are wanted."""
        kept = min(common_prefix(self.token_ids, token_ids), len(token_ids) - 1)
        if (excess := len(self.token_ids) - kept) <= 0:
            return
        try:
            if kept > 0:
                self.tensors.crop(-excess)
            else:
                self.tensors = None
        except RuntimeError:  # layers with a sliding window have forgotten what the tokens see
            kept, self.tensors = 0, None
        del self.token_ids[max(0, kept) :]


class DraftSession:
    """Drafts for one answer. One thread at a time may use it."""

    def __init__(self, model: DraftModel) -> None:
        self.cache = _Cache()
        self._model = model
        self._catching_up: Future[None] | None = None
        self._begun = self._closed = False

    def continued(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return tokens that may follow; none while those before them are being computed, or if there are too many."""
        if self._catching_up is not None and not self._catching_up.done():
            return []
        if not self._model.has_room(self, len(token_ids) + count):
            return []
        if not self._begun:
            self._begun, self.cache = True, self._model.take(token_ids)
        if len(token_ids) - common_prefix(self.cache.token_ids, token_ids) > AT_ONCE:
            self._catching_up = self._model.worker.submit(self._catch_up, list(token_ids))
            return []
        found, _ = self._model.continued(self.cache, token_ids, count)
        return found

    def _catch_up(self, token_ids: list[int]) -> None:
        for end in range(len(self.cache.token_ids) + PIECE, len(token_ids) + PIECE, PIECE):
            if self._closed:
                return
            self._model.continued(self.cache, token_ids[:end], 0)

    def close(self) -> None:
        """Keep what was computed for an answer that goes on from here. Does not wait."""
        self._closed = True
        if self._catching_up is None:
            self._model.give_back(self)
        else:
            self._catching_up.add_done_callback(lambda _: self._model.give_back(self))
