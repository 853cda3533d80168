"""Attention cache that two threads use: petals' runtime and the batcher."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import swarm.compat  # noqa: F401

import torch
from petals.server.memory_cache import MemoryCache

log = logging.getLogger(__name__)


class CacheIsGone(KeyError):
    """Attention cache was given back before it was used."""


class SharedMemoryCache(MemoryCache):
    """Petals' account of attention cache, used by its own runtime and by the batcher, which are two threads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock_tensors = threading.Lock()
        self._failures: dict[int, str] = {}  # why there is no tensor for a handle that is not given back yet

    @contextlib.contextmanager
    def use_cache(self, *handles: int) -> Iterator[Sequence[torch.Tensor]]:
        """Return the tensors of these handles; with no handle, only allocate and free what was asked for.

        :raises CacheIsGone: if one was given back meanwhile
        :raises MemoryError: if there was no memory for one
        """
        with self._lock_tensors:
            while self._pipe_recv.poll():
                try:
                    self._follow(*self._pipe_recv.recv())
                except Exception:  # sent by a handler that died over it; whoever asks now may have what is there
                    log.exception("a request for attention cache cannot be read")
                    break
            tensors = tuple(map(self._find, handles))
        yield tensors

    def _follow(self, handles: Sequence[int], descriptors: Sequence[Any] | None) -> None:
        """Allocate what a session has asked for, or free what it gives back. If that fails, it is that session's."""
        if descriptors is None:
            for handle in handles:
                self._failures.pop(handle, None)
                self._allocated_tensors.pop(handle, None)
            return
        for handle, descriptor in zip(handles, descriptors, strict=True):
            try:
                self._allocated_tensors[handle] = descriptor.make_zeros()
            except Exception as error:  # PyTorch has no type of its own for memory that a CPU does not have
                log.exception("no attention cache could be made")
                self._failures[handle] = f"{type(error).__name__}: {error}"

    def _find(self, handle: int) -> torch.Tensor:
        if handle in self._failures:
            raise MemoryError(self._failures[handle])
        if handle not in self._allocated_tensors:
            raise CacheIsGone("the session's attention cache was given back")
        return self._allocated_tensors[handle]
