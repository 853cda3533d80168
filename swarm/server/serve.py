"""Serve blocks of a model to a swarm: ``python -m swarm.server MODEL [--initial-peers ...] [--blocks 0:10] ...``

A real Petals server, built directly from petals' ``Server`` (its own command line asks the package index for newer
versions first). It computes the steps of different sessions in batches, see ``swarm.server.batching``. Its ``rpc_info``
also reports ``inference_tokens``, the number of tokens that inference sessions have sent through it, and
``silent_for``, the seconds since its computing process was last seen alive.

If a part of it dies, the server leaves the swarm at once and restarts, see ``swarm.supervision``.
"""

import ctypes
import functools
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from swarm.compat import disable_reachability_probes, transformers5, use_server_parts

import psutil
from petals.constants import PUBLIC_INITIAL_PEERS
from petals.server.server import Server
from petals.utils.convert_block import QuantType

from swarm import collector, hardware, weights
from swarm import lazy_imports as imports
from swarm.errors import ModelUnavailable, SwarmError
from swarm.families.adopt import adopt
from swarm.families.checkpoint import load_block
from swarm.lengths import served_length
from swarm.lifeline import program_line
from swarm.options import ServerOptions, parse_args
from swarm.process import kill_descendants, set_threads
from swarm.server import quantising
from swarm.server.announcing import Announcer
from swarm.server.backend import HeadSizeBackend
from swarm.server.cache import SharedMemoryCache
from swarm.server.container import ADAPTERS, STEP_LIMIT, WatchedContainer, batching_container, time_in_batch
from swarm.server.dht import PatientDHT, find_daemon, is_running
from swarm.server.handler import TransformerConnectionHandler
from swarm.server.identity import identity_file, listening_maddrs, remember_maddrs
from swarm.server.logs import is_abandoned_step, shorten_refusal
from swarm.server.restart import EARLY_DEATHS, STOP_TIMEOUT, bury_children, die, start_again
from swarm.shape import attention_share
from swarm.supervision import Part, Watcher
from swarm.wire.server_info import extended

log = logging.getLogger(__name__)

# A private swarm is small: frequent announcements are cheap, and a dead server is forgotten after two periods.
PRIVATE_UPDATE_PERIOD = 10.0  # seconds
PUBLIC_UPDATE_PERIOD = 60.0  # seconds, petals' default
SESSION_TIMEOUT = 12 * 3600.0  # seconds from the first step to the last; no session is used for this long
CACHE_TOKENS, CACHE_TOKENS_GROUPED = 4096, 16384  # petals' default, without and with grouped-query attention
# How long a server with a dead part may take to announce that it leaves: its users wait for its restart.
WITHDRAWAL_TIMEOUT = 1.0  # seconds


def make_server(options: ServerOptions) -> Server:
    """Build the server: join or start the swarm, but load no blocks yet.

    :raises ModelUnavailable: if the model's files are not available
    """
    use_own_parts(options)
    cache_dir = options.cache_dir or weights.default_cache_dir()
    path = weights.locate(options.model, cache_dir=cache_dir, progress=weights.Progress(log.info))
    adopt(path)
    TransformerConnectionHandler.model = weights.fingerprint(path).known
    arguments = server_arguments(options, path)
    host_maddrs = listening_maddrs(options)
    if options.batching:
        # Processes forked from now on share the existing objects until someone writes to them, and a garbage
        # collection writes to every object. Here that is 90 MB.
        collector.freeze()
    with identity_file(options) as identity_path:
        server = Server(**arguments, host_maddrs=host_maddrs, identity_path=identity_path)
    server.server_info = extended(server.server_info, server.inference_max_length, options.batching)
    if not options.initial_peers:
        remember_maddrs(host_maddrs, server.dht.get_visible_maddrs())
    return server


def use_own_parts(options: ServerOptions) -> None:
    """Make petals build its server from this project's parts."""
    imports.postpone(ADAPTERS, transformers5.before_adapters)
    if not options.batching or quantising.by_petals(options) is not QuantType.NONE:
        imports.load(ADAPTERS)  # imports bitsandbytes, which quantises, and prints on import
    TransformerConnectionHandler.inference_tokens = multiprocessing.Value(ctypes.c_uint64)
    TransformerConnectionHandler.heartbeat = multiprocessing.Value(ctypes.c_double, time.monotonic())
    container = batching_container(operator_threads(options)) if options.batching else WatchedContainer
    parts = (TransformerConnectionHandler, SharedMemoryCache, container, Announcer, PatientDHT, HeadSizeBackend)
    use_server_parts(*parts, functools.partial(load_block, quant=quantising.by_loops(options)))
    if options.batching and not is_public(options):  # leave a stock server unchanged, for comparison
        disable_reachability_probes()


def server_arguments(options: ServerOptions, path: str) -> dict[str, Any]:
    """Return the arguments of petals' ``Server``, except its addresses and identity.

    :param path: of the model, see ``weights.locate``
    :raises ModelUnavailable: if the model's configuration cannot be read, or it cannot be quantised as wanted
    """
    public, config = is_public(options), read_config(options.model, path)
    if reason := quantising.refusal(options, config):
        raise ModelUnavailable(f"{options.model}: --quant {options.quant} {reason}")
    device = options.device or hardware.pick_device()
    blocks = options.blocks
    if blocks is None and options.num_blocks is None and device == "cpu":
        blocks = f"0:{config.num_hidden_layers}"  # without a GPU, petals cannot guess how many fit
    return {
        "converted_model_name_or_path": path,
        "dht_prefix": options.dht_prefix or weights.dht_prefix(options.model),
        "initial_peers": PUBLIC_INITIAL_PEERS if public else list(options.initial_peers),
        "announce_maddrs": list(options.announce_maddrs) or None,
        "public_name": options.public_name,
        "block_indices": blocks,
        "num_blocks": options.num_blocks,
        "device": device,
        "torch_dtype": options.dtype or hardware.pick_dtype(device),
        "quant_type": quantising.by_petals(options),
        "attn_cache_tokens": petals_cache_tokens(options.attn_cache_tokens, config),
        "inference_max_length": options.inference_max_length or served_length(config, options.attn_cache_tokens),
        "num_handlers": options.num_handlers,
        # Petals' speed test is slow and needs the internet; in a private swarm all servers count the same.
        "throughput": options.throughput or ("auto" if public else 1.0),
        "update_period": options.update_period or (PUBLIC_UPDATE_PERIOD if public else PRIVATE_UPDATE_PERIOD),
        "step_timeout": options.idle_timeout,
        "session_timeout": SESSION_TIMEOUT,
        "reachable_via_relay": None if public else False,
        "use_auto_relay": public,
        "skip_reachability_check": not public,
    }


def is_public(options: ServerOptions) -> bool:
    """Whether the server joins the public swarm."""
    return options.initial_peers == ("public",)


def operator_threads(options: ServerOptions) -> int:
    """Return how many threads PyTorch's operators may use."""
    return options.threads or hardware.cpu_count()


def read_config(model: str, path: str) -> Any:
    """Return a model's configuration, as petals reads it.

    :raises ModelUnavailable: if it cannot be read, or does not say how many blocks there are
    """
    from petals import AutoDistributedConfig

    try:
        config = AutoDistributedConfig.from_pretrained(path)
        int(config.num_hidden_layers)
        return config
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{model}: {error}") from error


def petals_cache_tokens(tokens: int | None, config: Any) -> int:
    """Return for how many tokens petals is to have attention cache, which it takes to be hidden size wide.

    :param tokens: for which there is to be cache, in each block; None: as many as petals has by default
    :param config: petals' configuration of the model
    """
    if tokens is None:
        tokens = CACHE_TOKENS_GROUPED if config.num_key_value_groups > 1 else CACHE_TOKENS
    return math.ceil(tokens * attention_share(config))


def serve(server: Server, on_ready: Any) -> None:
    """Serve until SIGTERM or SIGINT, then leave the swarm: withdraw the blocks, free all resources.

    If a part of the server dies, restart it in this process.

    :raises ModelUnavailable: if the blocks' weights do not fit
    """
    watcher = Watcher(functools.partial(server_parts, server, find_daemon(server.dht.pid)), beat)

    def stop(*_: object) -> None:
        # A server that hangs must not keep its blocks announced and its memory held.
        timer = threading.Timer(STOP_TIMEOUT, die)
        timer.daemon = True
        timer.start()
        watcher.stop()
        server.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=on_ready, args=(server,), name="announce-ready", daemon=True).start()
    watcher.watch(functools.partial(begin_anew, server))
    try:
        server.run()
    except ModelUnavailable:
        raise  # it will not be better the next time
    except Exception as error:
        if server.stop.is_set() or (WatchedContainer.current is None and EARLY_DEATHS not in os.environ):
            raise  # it has never served: its options must be wrong
        log.exception("petals' server has failed")
        watcher.stop()
        begin_anew(server, f"petals' server ({type(error).__name__})")
    finally:
        watcher.stop()
        server.shutdown()
        kill_descendants()


def server_parts(server: Server, daemon: psutil.Process) -> Iterator[Part]:
    """Yield the current parts of a server.

    :param daemon: its p2pd
    """
    yield Part("the DHT process", server.dht.is_alive, server.dht.sentinel)
    yield Part("the DHT process, which does not answer,", server.dht.is_answering)
    yield Part("p2pd", functools.partial(is_running, daemon))
    if WatchedContainer.current is not None:
        yield from WatchedContainer.current.parts()


def begin_anew(server: Server, part: str) -> None:
    """Leave the swarm at once and restart this process. Returns only if the server is to stop.

    :param part: what has died
    """
    log.error("%s of this server has died; leaving the swarm and restarting", part)
    program_line.say_failed(f"{part} has died")
    if WatchedContainer.current is not None:
        announcer = WatchedContainer.current.dht_announcer
        leaving = threading.Thread(target=announcer.withdraw, name="withdraw", daemon=True)
        leaving.start()
        leaving.join(WITHDRAWAL_TIMEOUT)  # it may hang: the dead part may be the DHT, or may hold its lock
    kill_descendants()
    start_again(server.stop)


def beat() -> None:
    """Report to the handlers that this process runs and its batches finish."""
    batcher = getattr(WatchedContainer.current, "batcher", None)
    if batcher is None or time_in_batch(batcher) < STEP_LIMIT:
        TransformerConnectionHandler.heartbeat.value = time.monotonic()


def report_ready(server: Server) -> None:
    """Once the blocks are served, report that, and log what other machines need to join."""
    while server.module_container is None or not server.module_container.ready.wait(timeout=1):
        if server.stop.wait(0.1):
            return
    program_line.say_serving()
    info = server.module_container.server_info
    log.info("serving blocks %d:%d of %s", info.start_block, info.end_block, server.dht_prefix)
    for maddr in server.dht.get_visible_maddrs():
        log.info("other servers and clients join with --initial-peers %s", maddr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server from the command line; return the exit status."""
    options = parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING if options.quiet else logging.INFO,
        format="%(asctime)s %(levelname)s server %(process)d %(name)s: %(message)s",
    )
    logging.getLogger("hivemind.moe.server.runtime").addFilter(lambda record: not is_abandoned_step(record))
    logging.getLogger("hivemind.p2p.p2p_daemon").addFilter(shorten_refusal)
    # Each computing thread has its own helper threads. If there are more helpers than cores, OpenMP puts them to sleep
    # after each operator, and waking them takes as long as computing; so only one thread of a batching server has some.
    set_threads(1 if options.batching else operator_threads(options))
    if options.end_with_parent:
        program_line.hold()
    bury_children()
    try:
        server = make_server(options)
    except Exception as error:
        if isinstance(error, ModelUnavailable) or EARLY_DEATHS not in os.environ or options.end_with_parent:
            if not isinstance(error, SwarmError):
                raise  # a parent restarts it, and may know other peers by now
            print(error, file=sys.stderr)
            program_line.say_failed(error)
            return 1
        log.exception("the restart of this server failed; retrying")
        kill_descendants()
        start_again(threading.Event())
        return 1
    try:
        serve(server, report_ready)
    except ModelUnavailable as error:  # the files of a block, which are looked at only now
        print(error, file=sys.stderr)
        return 1
    return 0
