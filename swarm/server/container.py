"""Petals' container of blocks, able to list its parts; and one with a batcher beside petals' own runtime."""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import swarm.compat  # noqa: F401

from petals.server.server import ModuleContainer

from swarm import collector, hardware
from swarm import lazy_imports as imports
from swarm.server import quantising
from swarm.server.batching import Batcher
from swarm.server.families import make_ragged_blocks
from swarm.server.restart import STOP_TIMEOUT
from swarm.supervision import Part

log = logging.getLogger(__name__)

# Petals' own clients train with sequences of up to 2048 tokens, or several shorter ones in a request.
TRAINING_TOKENS = 2048  # of one forward or backward pass
# Clients wait this long for a step, see session.py; a batch that takes longer is useless to them.
STEP_LIMIT = 120.0  # seconds
# Petals' own path needs this module, with or without an adapter; batching does not. It takes half a second to load.
ADAPTERS = "petals.utils.peft"


class WatchedContainer(ModuleContainer):
    """Petals' container of blocks, able to list its parts."""

    current: "WatchedContainer | None" = None  # of this process
    closing = False  # whether its parts may end

    def run(self) -> None:
        WatchedContainer.current = self
        super().run()

    def parts(self) -> Iterator[Part]:
        """Yield the parts that have been started."""
        if self.closing:
            return
        yield Part("the announcer", self.dht_announcer.is_alive)
        yield Part("petals' runtime", self.is_alive)
        for number, handler in enumerate(self.conn_handlers):
            if handler.pid is not None:
                yield Part(f"handler {number}", handler.is_alive, handler.sentinel)
        for pool in self.runtime.pools:
            if pool.ident is not None:
                yield Part(f"petals' pool {pool.name}", pool.is_alive)

    def is_healthy(self) -> bool:
        """Return True to petals, which checks every few minutes. The watcher checks all the time; petals would reload
        the blocks into this process, where locks that a dead part held are never released."""
        return True

    def shutdown(self) -> None:
        self.closing = True
        super().shutdown()


class BatchingContainer(WatchedContainer):
    """A container of blocks. If they are of a known family, it has a batcher beside petals' own runtime."""

    batcher: Batcher | None = None

    def __init__(
        self,
        dht: Any,
        dht_prefix: str,
        module_backends: Any,
        *,
        threads: int,
        inference_max_length: int,
        **options: Any,
    ) -> None:
        """Make a container of loaded blocks, announce them and run. Parameters are petals', except one.

        :param threads: of PyTorch's operators
        """
        backends = list(module_backends.values())
        modules, first = [backend.module for backend in backends], backends[0]
        for pool in (pool for backend in backends for pool in (backend.forward_pool, backend.backward_pool)):
            pool.max_batch_size = min(pool.max_batch_size, TRAINING_TOKENS)
        blocks = make_ragged_blocks(modules, first.config, first.dtype, inference_max_length)
        if blocks is None:
            imports.load(ADAPTERS)
        else:
            blocks.warm_up()
            collector.freeze()
            # In a copy: of its own, petals takes it for what it has quantised.
            announcer, kind = options["dht_announcer"], quantising.announced(blocks.blocks)
            if kind is not None:
                announcer.server_info = dataclasses.replace(announcer.server_info, quant_type=kind)
            hardware.return_free_memory()  # packing held the weights twice
            hardware.return_library_pages()
            self.batcher = Batcher(blocks, first.memory_cache, options["num_handlers"], threads)
        # Announces the blocks, then runs.
        super().__init__(dht, dht_prefix, module_backends, inference_max_length=inference_max_length, **options)

    def run(self) -> None:
        WatchedContainer.current = self
        for index, handler in enumerate(self.conn_handlers):
            if self.batcher is not None:
                handler.channel = self.batcher.handler_channel(index)
                handler.channel.on_break = end_handler
                handler.cache_descriptor = self.batcher.blocks.cache_descriptor
                handler.batches = self.batcher.batches
            handler.run_in_background()  # forks, so start the batcher after that
        if self.batcher is not None:
            self.batcher.start()
        self.runtime.run()

    def parts(self) -> Iterator[Part]:
        batcher = self.batcher
        if self.closing or batcher is None or batcher.ident is None:
            yield from super().parts()
            return
        yield Part("the batcher", batcher.is_alive)  # first: the handlers end with it
        yield Part("the batcher, which hangs,", lambda: time_in_batch(batcher) < 2 * STEP_LIMIT)
        yield from super().parts()
        yield Part("a handler's channel", lambda: batcher.lost is None)  # last: it ends with its handler

    def shutdown(self) -> None:
        super().shutdown()
        if self.batcher is not None:
            self.batcher.stop()
            self.batcher.join(timeout=STOP_TIMEOUT)


def batching_container(threads: int) -> type[BatchingContainer]:
    """Return a container class for petals, which passes no arguments of ours.

    :param threads: of PyTorch's operators
    """

    class Container(BatchingContainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, threads=threads, **options)

    return Container


def time_in_batch(batcher: Batcher) -> float:
    """Return for how many seconds the batcher has not waited for messages."""
    since = batcher.busy_since
    return time.monotonic() - since if since is not None else 0.0


def end_handler() -> None:
    """End a handler that has lost the batcher, at once: its clients know how to handle a lost server."""
    log.error("this handler has lost the batcher; ending")
    os._exit(1)
