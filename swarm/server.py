"""Serve blocks of a model to a swarm: ``python -m swarm.server MODEL [--initial-peers ...] [--blocks 0:10] ...``

A real Petals server, built directly from petals' ``Server`` (its own command line asks the package index for newer
versions first), which computes the steps of different sessions in batches, see ``swarm.batching``, and tells more of
itself: its ``rpc_info`` carries ``inference_tokens``, the number of tokens that inference sessions have sent through
it, and ``silent_for``, the seconds since its computing process was last seen alive.
"""

import argparse
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.compat import kill_descendants, probe_nobody, set_threads, spare_collector, use_server_parts

from petals.constants import PUBLIC_INITIAL_PEERS
from petals.server.memory_cache import AllocationFailed
from petals.server.server import ModuleContainer, Server
from petals.utils.convert_block import QuantType

from swarm import hardware, imports, weights
from swarm.batching import Batcher, SharedMemoryCache
from swarm.blocks import make_ragged_blocks
from swarm.errors import ModelUnavailable
from swarm.handler import TransformerConnectionHandler

log = logging.getLogger(__name__)

# A private swarm is small: announcing often costs little, and a server that died is forgotten after two periods.
PRIVATE_UPDATE_PERIOD = 10.0  # seconds
PUBLIC_UPDATE_PERIOD = 60.0  # seconds, petals' default
# Longer than any client keeps an idle session (SESSION_TIMEOUT is 300 s by default), so that the client decides.
STEP_TIMEOUT = 3600.0  # seconds between two steps of one session
SESSION_TIMEOUT = 24 * 3600.0  # seconds from the first step to the last
# How long an orderly stop may take before everything below this process is killed.
STOP_TIMEOUT = 10.0  # seconds
# Several of these fit into the time after which clients give up on a silent server; see session.py.
HEARTBEAT_PERIOD = 0.25  # seconds
# Petals' own path needs this module, with or without an adapter; batches do not. It takes half a second to load.
ADAPTERS = "petals.utils.peft"


class BatchingContainer(ModuleContainer):
    """Petals' container of blocks, with a batcher beside petals' own runtime, if the blocks are of a known family."""

    threads: int  # of PyTorch's operators
    batcher: Batcher | None = None

    def __init__(
        self, dht: Any, dht_prefix: str, module_backends: Any, *, inference_max_length: int, **options: Any
    ) -> None:
        backends = list(module_backends.values())
        modules, first = [backend.module for backend in backends], backends[0]
        blocks = make_ragged_blocks(modules, first.config, first.dtype, inference_max_length)
        if blocks is None:
            imports.load(ADAPTERS)
        else:
            blocks.warm_up()
            spare_collector()
            hardware.return_free_memory()  # the weights were there twice while they were put in order
            self.batcher = Batcher(blocks, first.memory_cache, options["num_handlers"], self.threads)
        # Announces the blocks, and then runs.
        super().__init__(dht, dht_prefix, module_backends, inference_max_length=inference_max_length, **options)

    def run(self) -> None:
        for index, handler in enumerate(self.conn_handlers):
            if self.batcher is not None:
                handler.line = self.batcher.handler_line(index)
                handler.cache_descriptor = self.batcher.blocks.cache_descriptor
                handler.batches = self.batcher.batches
            handler.run_in_background()  # forks: the batcher begins after that
        if self.batcher is not None:
            self.batcher.start()
        self.runtime.run()

    def is_healthy(self) -> bool:
        return super().is_healthy() and (self.batcher is None or self.batcher.is_alive())

    def shutdown(self) -> None:
        super().shutdown()
        if self.batcher is not None:
            self.batcher.stop()
            self.batcher.join(timeout=STOP_TIMEOUT)


def is_abandoned_step(record: logging.LogRecord) -> bool:
    """Whether a record tells of a step whose session was closed before its turn came.

    That is what a cancelled answer looks like to a server, and no reason for an error with a traceback in the log.
    """
    return bool(record.exc_info and isinstance(record.exc_info[1], KeyError) and "attempting to recover" in record.msg)


def shorten_refusal(record: logging.LogRecord) -> bool:
    """Leave the traceback out of a record that tells of a session for which there was no attention cache.

    On a busy server that is an everyday answer; its clients ask again, once a second and more often.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, AllocationFailed):
        record.msg, record.args, record.exc_info = "a session was refused: %s", (error,), None
    return True


def make_server(args: argparse.Namespace) -> Server:
    """Build the server from parsed arguments: joins or starts the swarm, but loads no blocks yet.

    :raises ModelUnavailable: if the model's files cannot be had
    """
    imports.postpone(ADAPTERS)
    if not args.batching or args.quant != "none":
        imports.load(ADAPTERS)  # with bitsandbytes, which quantises, and prints when it is imported
    TransformerConnectionHandler.inference_tokens = multiprocessing.Value(ctypes.c_uint64)
    TransformerConnectionHandler.heartbeat = multiprocessing.Value(ctypes.c_double, time.monotonic())
    use_server_parts(
        TransformerConnectionHandler, SharedMemoryCache, BatchingContainer if args.batching else ModuleContainer
    )
    public = args.initial_peers == ["public"]
    if args.batching and not public:  # one that computes as a stock server is left as that is, to compare with
        probe_nobody()
    device = args.device or hardware.pick_device()
    path = weights.locate(args.model, cache_dir=args.cache_dir, progress=log.info)
    blocks = args.blocks
    if blocks is None and args.num_blocks is None and device == "cpu":
        blocks = f"0:{block_count(args.model, path)}"  # petals cannot guess how many fit on a machine without GPU
    if args.batching:
        # The processes forked from here on share what is there already, for as long as nobody writes to it: and a
        # collection writes to every object. Here that is 90 MB.
        spare_collector()
    return Server(
        converted_model_name_or_path=path,
        dht_prefix=args.dht_prefix or weights.dht_prefix(args.model),
        initial_peers=PUBLIC_INITIAL_PEERS if public else args.initial_peers,
        host_maddrs=args.host_maddrs,
        announce_maddrs=args.announce_maddrs,
        identity_path=args.identity_path,
        public_name=args.public_name,
        block_indices=blocks,
        num_blocks=args.num_blocks,
        device=device,
        torch_dtype=args.dtype or hardware.pick_dtype(device),
        quant_type=QuantType[args.quant.upper()],
        attn_cache_tokens=args.attn_cache_tokens,
        inference_max_length=args.inference_max_length,
        num_handlers=args.num_handlers,
        # Petals' speed test takes long and needs the internet; in a private swarm every server counts the same.
        throughput=args.throughput or ("auto" if public else 1.0),
        update_period=args.update_period or (PUBLIC_UPDATE_PERIOD if public else PRIVATE_UPDATE_PERIOD),
        step_timeout=STEP_TIMEOUT,
        session_timeout=SESSION_TIMEOUT,
        reachable_via_relay=None if public else False,
        use_auto_relay=public,
        skip_reachability_check=not public,
    )


def block_count(model: str, path: str) -> int:
    """Return the number of transformer blocks of the model.

    :raises ModelUnavailable: if its configuration does not say
    """
    from petals import AutoDistributedConfig

    try:
        return int(AutoDistributedConfig.from_pretrained(path).num_hidden_layers)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{model}: {error}") from error


def serve(server: Server, on_ready: Any) -> None:
    """Serve until SIGTERM or SIGINT, then leave the swarm in order: announce that the blocks go, free what is held."""

    def stop(*_: object) -> None:
        server.stop.set()
        # A server that hangs must not keep its blocks announced and its memory held.
        timer = threading.Timer(STOP_TIMEOUT, die)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=on_ready, args=(server,), name="announce-ready", daemon=True).start()
    threading.Thread(target=beat, args=(server.stop,), name="heartbeat", daemon=True).start()
    try:
        server.run()
    finally:
        server.shutdown()
        kill_descendants()


def beat(stop: threading.Event) -> None:
    """Tell the handlers again and again that this process runs."""
    while not stop.wait(HEARTBEAT_PERIOD):
        TransformerConnectionHandler.heartbeat.value = time.monotonic()


def die() -> None:
    """End this process and everything below it, now."""
    kill_descendants()
    os._exit(1)


def report_ready(server: Server) -> None:
    """Log, once the blocks are served, what another machine needs to join."""
    while server.module_container is None or not server.module_container.ready.wait(timeout=1):
        if server.stop.wait(0.1):
            return
    info = server.module_container.server_info
    log.info("serving blocks %d:%d of %s", info.start_block, info.end_block, server.dht_prefix)
    for maddr in server.dht.get_visible_maddrs():
        log.info("other servers and clients join with --initial-peers %s", maddr)


def end_with_parent() -> None:
    """Stop when standard input ends: the parent holds its other end, so that it ends however the parent does."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m swarm.server", description="Serve blocks of a model to a swarm.")
    add = parser.add_argument
    add("model", help="hub name, local directory, or the name of the bundled model")
    add("--initial-peers", nargs="*", default=[], metavar="MADDR", help="peers to join, or 'public'; none: a new swarm")
    add("--blocks", metavar="START:END", help="blocks [START, END) to serve; default: all (CPU), as many as fit (GPU)")
    add("--num-blocks", type=int, help="serve this many blocks, chosen where the swarm needs them most")
    add("--host-maddrs", nargs="+", default=["/ip4/0.0.0.0/tcp/0"], metavar="MADDR", help="addresses to listen on")
    add("--announce-maddrs", nargs="+", metavar="MADDR", help="addresses to announce, if others see different ones")
    add("--identity-path", metavar="FILE", help="private key file that keeps the peer id the same over restarts")
    add("--public-name", help="a name to show to others")
    add("--dht-prefix", help="prefix of the blocks' keys; must be the same on all servers and clients of a model")
    add("--device", help="cpu, cuda, cuda:1, ...; default: by what the machine has")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: by what the machine has")
    add("--quant", choices=[kind.name.lower() for kind in QuantType], default="none", help="quantise the weights")
    add("--attn-cache-tokens", type=int, metavar="N", help="attention cache for N tokens of each block")
    add("--inference-max-length", type=int, metavar="N", help="longest session to accept, in tokens")
    add("--num-handlers", type=int, default=2, help="processes that take requests (default: %(default)s)")
    add("--throughput", type=float, help="announced throughput; default: measured (public) or 1 (private)")
    add("--update-period", type=float, metavar="SECONDS", help="how often to announce the blocks")
    add("--threads", type=int, help="threads of PyTorch's operators; default: one per core")
    add("--cache-dir", type=Path, default=weights.default_cache_dir(), help="where prepared models are kept")
    add("--no-batching", dest="batching", action="store_false", help="compute one session's step at a time, as petals")
    add("--end-with-parent", action="store_true", help="stop when standard input ends")
    add("--quiet", action="store_true", help="log warnings and errors only")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server from the command line; return the exit status."""
    args = parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING if args.quiet else logging.INFO,
        format="%(asctime)s %(levelname)s server %(process)d %(name)s: %(message)s",
    )
    logging.getLogger("hivemind.moe.server.runtime").addFilter(lambda record: not is_abandoned_step(record))
    logging.getLogger("hivemind.p2p.p2p_daemon").addFilter(shorten_refusal)
    BatchingContainer.threads = args.threads or hardware.cpu_count()
    # Each thread that computes has helpers of its own. With more helpers in all than cores OpenMP puts them to sleep
    # after each operator, and waking them takes as long as computing: so only one thread of a batching server has some.
    set_threads(1 if args.batching else BatchingContainer.threads)
    if args.end_with_parent:
        end_with_parent()
    try:
        serve(make_server(args), report_ready)
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
