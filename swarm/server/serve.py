"""Serve blocks of a model to a swarm: ``python -m swarm.server MODEL [--initial-peers ...] [--blocks 0:10] ...``

A real Petals server, built directly from petals' ``Server`` (its own command line asks the package index for newer
versions first), which computes the steps of different sessions in batches, see ``swarm.batching``, and tells more of
itself: its ``rpc_info`` carries ``inference_tokens``, the number of tokens that inference sessions have sent through
it, and ``silent_for``, the seconds since its computing process was last seen alive.

A server of which a part has died is no server: it leaves the swarm at once and begins anew, see ``swarm.supervision``.
"""

import argparse
import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swarm.compat import await_dht, probe_nobody, use_server_parts

import hivemind
import psutil
from hivemind import P2P, get_dht_time
from petals.constants import PUBLIC_INITIAL_PEERS
from petals.data_structures import ServerState
from petals.server.memory_cache import AllocationFailed
from petals.server.server import ModuleAnnouncerThread, ModuleContainer, Server
from petals.utils.convert_block import QuantType
from petals.utils.dht import declare_active_modules

from swarm import hardware, supervision, weights
from swarm import lazy_imports as imports
from swarm.errors import ModelUnavailable
from swarm.process import freeze_collector, kill_descendants, set_threads
from swarm.server.batching import Batcher
from swarm.server.cache import SharedMemoryCache
from swarm.server.families import make_ragged_blocks
from swarm.server.handler import TransformerConnectionHandler
from swarm.supervision import Part, Watcher

log = logging.getLogger(__name__)

# A private swarm is small: announcing often costs little, and a server that died is forgotten after two periods.
PRIVATE_UPDATE_PERIOD = 10.0  # seconds
PUBLIC_UPDATE_PERIOD = 60.0  # seconds, petals' default
# Attention cache is for those who use it. The app keeps idle sessions for SESSION_TIMEOUT, 300 s by default, and those
# that wait for their client to come back for RESUME_TIMEOUT, 60 s, longer; with a minute more, the client decides.
IDLE_TIMEOUT = 420.0  # seconds between two steps of one session
SESSION_TIMEOUT = 12 * 3600.0  # seconds from the first step to the last: nobody uses one without a pause for so long
# Petals' own clients train with sequences of up to 2048 tokens, or with more than one in a request if they are shorter.
TRAINING_TOKENS = 2048  # of one forward or backward pass
# How long an orderly stop may take before everything below this process is killed.
STOP_TIMEOUT = 10.0  # seconds
# Clients wait so long for a step, see session.py: a batcher that has been computing for longer is of no use to them.
STEP_LIMIT = 120.0  # seconds
# The DHT answers within milliseconds in a local network and within seconds over the internet. One that has failed to
# several times in a row is as good as dead.
DHT_TIMEOUT, DHT_FAILURES = 30.0, 3  # seconds, times
# Joining takes seconds; hivemind's own limits end it within this, unless its process has died.
JOIN_TIMEOUT = 120.0  # seconds
# How long a server with a dead part may take to say that it goes: its users wait for it to come back.
WITHDRAWAL_TIMEOUT = 1.0  # seconds
# How soon a failed announcement is tried again.
ANNOUNCEMENT_DELAY = 2.0  # seconds
# What this process tells the program that it begins anew with: how many before it died early, one after the other; and
# where others look for a server that founded its swarm, its private key (hexadecimal) and the addresses it listens on.
EARLY_DEATHS = "SWARM_SERVER_EARLY_DEATHS"
IDENTITY, MADDRS = "SWARM_SERVER_IDENTITY", "SWARM_SERVER_MADDRS"
STARTED = time.monotonic()
# Petals' own path needs this module, with or without an adapter; batches do not. It takes half a second to load.
ADAPTERS = "petals.utils.peft"


class PatientDHT(hivemind.DHT):
    """A DHT whose process is not waited for without a limit."""

    unanswered = 0  # calls in a row

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until the process has joined the swarm.

        :raises ConnectionError: if it ends meanwhile
        :raises TimeoutError: if it takes too long
        """
        await_dht(self, self._ready, timeout or JOIN_TIMEOUT)

    def run_coroutine(self, coro: Any, return_future: bool = False) -> Any:
        """Run a coroutine in the DHT's process.

        :raises ConnectionError: if the process ends meanwhile
        :raises TimeoutError: if it is not done in time
        """
        future = super().run_coroutine(coro, return_future=True)
        if return_future:
            return future
        try:
            result = await_dht(self, future, DHT_TIMEOUT)
        except TimeoutError:
            self.unanswered += not future.done()  # else the coroutine itself has raised it
            raise
        self.unanswered = 0
        return result

    def is_answering(self) -> bool:
        return self.unanswered < DHT_FAILURES


class Announcer(ModuleAnnouncerThread):
    """Petals' announcer. One announcement that fails does not end it: without announcements the server is forgotten."""

    def run(self) -> None:
        while True:
            try:
                return super().run()  # until the server goes
            except Exception as error:
                log.warning("the blocks could not be announced: %s: %s", type(error).__name__, error)
            if self.server_info.state == ServerState.OFFLINE:
                return
            self.trigger.wait(ANNOUNCEMENT_DELAY)

    def announce(self, state: ServerState) -> None:
        """Announce a state soon, or, if it is that the server goes, within a limit."""
        self.server_info.state = state
        self.trigger.set()
        if state == ServerState.OFFLINE:
            self.join(STOP_TIMEOUT / 2)

    def withdraw(self) -> None:
        """Announce at once that the server goes, whatever the announcer's thread does."""
        self.server_info.state = ServerState.OFFLINE
        self.server_info.next_pings = None
        try:
            declare_active_modules(self.dht, self.module_uids, self.server_info, get_dht_time() + self.expiration)
        except Exception as error:  # the dead part may be the DHT: then others find out when they ask
            log.warning("the swarm cannot be told that this server goes: %s: %s", type(error).__name__, error)

    def _ping_next_servers(self) -> None:
        try:
            super()._ping_next_servers()
        except Exception as error:  # what others announce is no reason not to announce oneself
            log.warning("the next servers cannot be measured: %s: %s", type(error).__name__, error)


class WatchedContainer(ModuleContainer):
    """Petals' container of blocks, which tells what it is made of."""

    current: "WatchedContainer | None" = None  # this process's
    closing = False  # its parts may end

    def run(self) -> None:
        WatchedContainer.current = self
        super().run()

    def parts(self) -> Iterator[Part]:
        """Yield what has been started of it."""
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
        """Petals asks every few minutes. The watcher looks all the time, and does not load the blocks into this process
        once more, as petals would: the locks that a dead part held are held for ever."""
        return True

    def shutdown(self) -> None:
        self.closing = True
        super().shutdown()


class BatchingContainer(WatchedContainer):
    """A container of blocks with a batcher beside petals' own runtime, if the blocks are of a known family."""

    threads: int  # of PyTorch's operators
    batcher: Batcher | None = None

    def __init__(
        self, dht: Any, dht_prefix: str, module_backends: Any, *, inference_max_length: int, **options: Any
    ) -> None:
        backends = list(module_backends.values())
        modules, first = [backend.module for backend in backends], backends[0]
        for pool in (pool for backend in backends for pool in (backend.forward_pool, backend.backward_pool)):
            pool.max_batch_size = min(pool.max_batch_size, TRAINING_TOKENS)
        blocks = make_ragged_blocks(modules, first.config, first.dtype, inference_max_length)
        if blocks is None:
            imports.load(ADAPTERS)
        else:
            blocks.warm_up()
            freeze_collector()
            hardware.return_free_memory()  # the weights were there twice while they were put in order
            self.batcher = Batcher(blocks, first.memory_cache, options["num_handlers"], self.threads)
        # Announces the blocks, and then runs.
        super().__init__(dht, dht_prefix, module_backends, inference_max_length=inference_max_length, **options)

    def run(self) -> None:
        WatchedContainer.current = self
        for index, handler in enumerate(self.conn_handlers):
            if self.batcher is not None:
                handler.line = self.batcher.handler_line(index)
                handler.line.on_break = end_handler
                handler.cache_descriptor = self.batcher.blocks.cache_descriptor
                handler.batches = self.batcher.batches
            handler.run_in_background()  # forks: the batcher begins after that
        if self.batcher is not None:
            self.batcher.start()
        self.runtime.run()

    def parts(self) -> Iterator[Part]:
        batcher = self.batcher
        if self.closing or batcher is None or batcher.ident is None:
            yield from super().parts()
            return
        yield Part("the batcher", batcher.is_alive)  # first, because the handlers end with it
        yield Part("the batcher, which does not come back,", lambda: time_in_batch(batcher) < 2 * STEP_LIMIT)
        yield from super().parts()
        yield Part("a handler's line", lambda: batcher.lost is None)  # last, because it ends with its handler

    def shutdown(self) -> None:
        super().shutdown()
        if self.batcher is not None:
            self.batcher.stop()
            self.batcher.join(timeout=STOP_TIMEOUT)


def time_in_batch(batcher: Batcher) -> float:
    """Return for how many seconds a batcher has not looked for messages."""
    since = batcher.busy_since
    return time.monotonic() - since if since is not None else 0.0


def end_handler() -> None:
    """End a handler that has lost the batcher. At once, so that its clients see what they know: a lost server."""
    log.error("this handler has lost the batcher, and ends")
    os._exit(1)


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
    container = BatchingContainer if args.batching else WatchedContainer
    use_server_parts(TransformerConnectionHandler, SharedMemoryCache, container, Announcer, PatientDHT)
    public = args.initial_peers == ["public"]
    if args.batching and not public:  # one that computes as a stock server is left as that is, to compare with
        probe_nobody()
    device = args.device or hardware.pick_device()
    host_maddrs = os.environ.get(MADDRS, "").split() or args.host_maddrs
    path = weights.locate(args.model, cache_dir=args.cache_dir, progress=weights.Progress(log.info))
    blocks = args.blocks
    if blocks is None and args.num_blocks is None and device == "cpu":
        blocks = f"0:{block_count(args.model, path)}"  # petals cannot guess how many fit on a machine without GPU
    if args.batching:
        # The processes forked from here on share what is there already, for as long as nobody writes to it: and a
        # collection writes to every object. Here that is 90 MB.
        freeze_collector()
    with identity_file(args) as identity_path:
        server = Server(
            converted_model_name_or_path=path,
            dht_prefix=args.dht_prefix or weights.dht_prefix(args.model),
            initial_peers=PUBLIC_INITIAL_PEERS if public else args.initial_peers,
            host_maddrs=host_maddrs,
            announce_maddrs=args.announce_maddrs,
            identity_path=identity_path,
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
            step_timeout=args.idle_timeout,
            session_timeout=SESSION_TIMEOUT,
            reachable_via_relay=None if public else False,
            use_auto_relay=public,
            skip_reachability_check=not public,
        )
    if not args.initial_peers:
        ports = re.search(r"/tcp/(\d+)", " ".join(map(str, server.dht.get_visible_maddrs())))
        if ports:
            os.environ[MADDRS] = " ".join(re.sub(r"/tcp/0(?=/|$)", ports[0], maddr) for maddr in host_maddrs)
    return server


@contextlib.contextmanager
def identity_file(args: argparse.Namespace) -> Iterator[str | None]:
    """Have a server's private key in a file, for as long as p2pd starts; None if any will do.

    Others know a server that founded its swarm by its key, so that it needs the same one when it begins anew.
    """
    if args.identity_path or args.initial_peers:
        yield args.identity_path
        return
    with tempfile.TemporaryDirectory(prefix="petals-chat-") as directory:
        path = Path(directory, "identity")
        if IDENTITY in os.environ:
            path.touch(mode=0o600)
            path.write_bytes(bytes.fromhex(os.environ[IDENTITY]))
        else:
            P2P.generate_identity(str(path))
            os.environ[IDENTITY] = path.read_bytes().hex()
        yield str(path)


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
    """Serve until SIGTERM or SIGINT, then leave the swarm in order: announce that the blocks go, free what is held.

    If a part of the server dies, begin anew, in this process.
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
    except Exception as error:
        if server.stop.is_set() or (WatchedContainer.current is None and EARLY_DEATHS not in os.environ):
            raise  # it has never served: something is wrong with what it was told
        log.exception("petals' server fails")
        watcher.stop()
        begin_anew(server, f"petals' server ({type(error).__name__})")
    finally:
        watcher.stop()
        server.shutdown()
        kill_descendants()


def server_parts(server: Server, daemon: psutil.Process) -> Iterator[Part]:
    """Yield what a server is made of at present.

    :param daemon: its p2pd
    """
    yield Part("the DHT process", server.dht.is_alive, server.dht.sentinel)
    yield Part("the DHT process, which does not answer,", server.dht.is_answering)
    yield Part("p2pd", functools.partial(is_running, daemon))
    if WatchedContainer.current is not None:
        yield from WatchedContainer.current.parts()


def find_daemon(pid: int) -> psutil.Process:
    """Return the p2pd of a DHT process.

    :raises ProcessLookupError: if it has none
    """
    for child in psutil.Process(pid).children():
        if "p2pd" in child.name():
            return child
    raise ProcessLookupError("the DHT process has no p2pd")


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # since a moment ago
        return False


def begin_anew(server: Server, part: str) -> None:
    """Leave the swarm at once and begin as this process began. Returns only if the server is to stop.

    :param part: what has died
    """
    log.error("%s of this server has died; it leaves the swarm and begins anew", part)
    if WatchedContainer.current is not None:
        announcer = WatchedContainer.current.dht_announcer
        leaving = threading.Thread(target=announcer.withdraw, name="withdraw", daemon=True)
        leaving.start()
        leaving.join(WITHDRAWAL_TIMEOUT)  # it may never end: what is dead may be the DHT, or hold a lock of it
    kill_descendants()
    start_again(server.stop)


def start_again(stop: threading.Event) -> None:
    """Begin as this process began, but later and later if it died early again and again.

    Returns only if ``stop`` is set meanwhile.
    """
    lived = time.monotonic() - STARTED
    deaths = 0 if lived > supervision.HEALTHY_AFTER else int(os.environ.get(EARLY_DEATHS, "0")) + 1
    if stop.wait(supervision.backoff(deaths)):
        return
    try:
        supervision.replace_process(**{EARLY_DEATHS: str(deaths)})
    except OSError:
        log.exception("this server cannot begin anew, and ends")
        die()


def bury_children() -> None:
    """Take note of the deaths of processes that this process had as another program: nobody else would, for good."""
    with contextlib.suppress(ChildProcessError):  # there are no more
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def beat() -> None:
    """Tell the handlers that this process runs, and computes what it is given."""
    batcher = getattr(WatchedContainer.current, "batcher", None)
    if batcher is None or time_in_batch(batcher) < STEP_LIMIT:
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
    add(
        "--idle-timeout",
        type=float,
        default=IDLE_TIMEOUT,
        metavar="SECONDS",
        help="end sessions that are idle for so long",
    )
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
    bury_children()
    try:
        server = make_server(args)
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    except Exception:
        if EARLY_DEATHS not in os.environ or args.end_with_parent:
            raise  # a parent starts it again, and may know other peers by now
        log.exception("this server could not begin anew")
        kill_descendants()
        start_again(threading.Event())
        return 1
    serve(server, report_ready)
    return 0
