"""Attention cache shared by two threads: petals' runtime and the batcher."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import swarm.compat  # noqa: F401

from petals.server.memory_cache import MemoryCache

log = logging.getLogger(__name__)


class CacheIsGone(KeyError):
    """The attention cache was freed before it was used."""


class SharedMemoryCache(MemoryCache):
    """Petals' attention cache, made safe for two threads: its own runtime and the batcher."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock_tensors = threading.Lock()
        self._failures: dict[int, str] = {}  # why a handle that is still held has no tensor

    @contextlib.contextmanager
    def use_cache(self, *handles: int) -> Iterator[Sequence[Any]]:
        """Return what these handles stand for: petals' tensors, or an ``AttentionCache`` each. Without handles, only
        process requests to allocate and free.

        :raises CacheIsGone: if one was freed meanwhile
        :raises MemoryError: if one could not be allocated
        """
        with self._lock_tensors:
            while self._pipe_recv.poll():
                try:
                    self._follow(*self._pipe_recv.recv())
                except Exception:  # its handler died while sending; continue with what is there
                    log.exception("cannot read a request for attention cache")
                    break
            tensors = tuple(map(self._find, handles))
        yield tensors

    def _follow(self, handles: Sequence[int], descriptors: Sequence[Any] | None) -> None:
        """Allocate or free a session's cache. A failure to allocate is kept for that session."""
        if descriptors is None:
            for handle in handles:
                self._failures.pop(handle, None)
                self._allocated_tensors.pop(handle, None)
            return
        for handle, descriptor in zip(handles, descriptors, strict=True):
            try:
                self._allocated_tensors[handle] = descriptor.make_zeros()
            except Exception as error:  # on a CPU, PyTorch has no error type for lack of memory
                log.exception("cannot allocate attention cache")
                self._failures[handle] = f"{type(error).__name__}: {error}"

    def _find(self, handle: int) -> Any:
        if handle in self._failures:
            raise MemoryError(self._failures[handle])
        if handle not in self._allocated_tensors:
            raise CacheIsGone("the session's attention cache was given back")
        return self._allocated_tensors[handle]
