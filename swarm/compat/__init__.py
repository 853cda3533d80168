"""Makes the released petals run on current packages. Import this before petals; it is the only place that patches them.

Each patch fixes a fault that was observed; the comment beside it says which. ``swarm.lazy_imports``, which comes first,
also replaces one PyTorch function, but only during one import.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import swarm.lazy_imports  # noqa: F401
from swarm.compat import cpufeature, transformers5  # noqa: F401

import hivemind
import hivemind.compression
import hivemind.moe.server.connection_handler
import hivemind.p2p
import hivemind.utils.asyncio
import hivemind.utils.logging
import hivemind.utils.mpfuture
import hivemind.utils.nested
import hivemind.utils.tensor_descr
import hivemind.utils.timed_storage

from swarm.process import kill_descendants

log = logging.getLogger(__name__)

# The longest wait for an answer of the DHT process. Over the internet, a large model's blocks take it many seconds.
CALL_TIMEOUT = 60.0  # seconds
# How often a wait for the DHT process checks whether it is still alive: a person may be waiting for the result.
LIFE_PERIOD = 0.25  # seconds
# hivemind's locks between processes are held only while it writes to a pipe.
LOCK_TIMEOUT = 1.0  # seconds
# How long a peer that was refused may take to read why.
REFUSAL_TIME = 5.0  # seconds


def _restore_hivemind_names() -> None:
    """Restore top-level names that petals 2.2.0 imports and hivemind 1.1.12 no longer re-exports."""
    homes = {
        hivemind.p2p: ("P2P", "P2PContext", "PeerID"),
        hivemind.compression: ("deserialize_tensor_stream", "deserialize_torch_tensor", "serialize_torch_tensor"),
        hivemind.utils: ("MSGPackSerializer", "get_logger"),
        hivemind.utils.nested: ("nested_compare", "nested_flatten", "nested_pack"),
        hivemind.utils.asyncio: ("anext",),
        hivemind.utils.tensor_descr: ("BatchTensorDescriptor", "TensorDescriptor"),
        hivemind.utils.timed_storage: ("MAX_DHT_TIME_DISCREPANCY_SECONDS", "TimedStorage", "get_dht_time"),
    }
    for home, names in homes.items():
        for name in names:
            if not hasattr(hivemind, name):
                setattr(hivemind, name, getattr(home, name))


def _keep_sockets_with_temporary_files() -> None:
    """Let p2pd have its sockets where temporary files can be written: hivemind names /tmp, wherever that is."""
    hivemind.p2p.P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"


def _end_with_parent(process_class: type) -> None:
    """Make a forked process of hivemind end when its parent has ended, however that happened.

    hivemind's DHT and handler processes outlive a parent that was killed with SIGKILL, and `p2pd` outlives them.
    """
    run: Callable[[Any], None] = process_class.run  # type: ignore[attr-defined]

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            kill_descendants()
            os._exit(1)

    def run_watched(self: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the inherited handlers are meant for the parent
        os.setpgrp()  # Ctrl-C in a terminal is for the parent, which then ends its processes cleanly
        _let_go_of_connections()
        threading.Thread(target=watch, name="watch-parent", daemon=True).start()
        run(self)

    process_class.run = run_watched  # type: ignore[attr-defined]


def _let_go_of_connections() -> None:
    """In a forked process: close the network sockets inherited from the program.

    The app forks while clients are connected when it rejoins the swarm, and a connection ends for its client only when
    no process holds it. The descriptors stay allocated, since inherited objects may still close them.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed already
            if stat.S_ISSOCK(os.fstat(number).st_mode) and _family(number) in (socket.AF_INET, socket.AF_INET6):
                os.dup2(nowhere, number, inheritable=False)
    os.close(nowhere)


def _family(number: int) -> int:
    """Return the address family of the socket with this file descriptor."""
    with socket.socket(fileno=os.dup(number)) as copy:
        return copy.family


def _end_with_daemon() -> None:
    """Make a DHT process end when its `p2pd` has ended, so that watching the DHT process watches both.

    By itself it would continue and answer everything with errors; hivemind never starts another `p2pd`.
    """
    from hivemind.p2p import P2P

    create = P2P.create.__func__

    async def create_watched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        p2p = await create(cls, *args, **kwargs)
        if isinstance(multiprocessing.current_process(), hivemind.DHT):
            p2p._watch = asyncio.create_task(watch(p2p))
        return p2p

    async def watch(p2p: Any) -> None:
        status = await p2p._child.wait()
        if p2p.is_alive:  # it was not shut down on purpose
            log.warning("p2pd has ended with %s, and the DHT process ends with it", status)
            os._exit(1)

    P2P.create = classmethod(create_watched)


def _limit_waits_for_dht() -> None:
    """Limit hivemind's waits for its DHT process, which may have died or hang: petals' routing and a server's
    announcements would wait forever. Also, data written to a dead process would be kept for it forever.
    """

    def limited(call: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *args: Any, return_future: bool = False, **kwargs: Any) -> Any:
            check_dht(self)
            future = call(self, *args, return_future=True, **kwargs)
            return future if return_future else await_dht(self, future)

        return method

    for name in ("get", "store", "run_coroutine"):
        setattr(hivemind.DHT, name, limited(getattr(hivemind.DHT, name)))


def check_dht(dht: Any) -> None:
    """Raise ConnectionError if this process's DHT process has ended. A fork cannot check its parent's DHT process."""
    if dht._parent_pid == os.getpid() and not dht.is_alive():
        raise ConnectionError("the DHT process has ended")


def await_dht(
    dht: Any, future: Any, timeout: float = CALL_TIMEOUT, given_up: Callable[[], bool] = lambda: False
) -> Any:
    """Return the result of a future that a DHT process sets.

    :param given_up: polled; the wait ends when it returns true
    :raises TimeoutError: if there is no result within ``timeout`` seconds, or the wait was given up
    :raises ConnectionError: if the process ends
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return future.result(timeout=max(0.0, min(LIFE_PERIOD, deadline - time.monotonic())))
        except concurrent.futures.TimeoutError:
            if future.done():  # it finished just now, or the timeout was the call's own
                return future.result()
        check_dht(dht)
        if given_up() or time.monotonic() >= deadline:
            raise TimeoutError(f"the DHT process has not answered for {timeout:.0f} s")


def repair_futures() -> None:
    """After a process has died: make hivemind's futures usable again, in case it died while using them.

    It may have held one of the locks that all processes share, or have written half a message.
    """
    futures = hivemind.utils.mpfuture
    for lock in (futures.MPFuture._initialization_lock, futures.MPFuture._update_lock, futures.SharedBytes._lock):
        if not lock.acquire(timeout=LOCK_TIMEOUT):
            futures.MPFuture.reset_backend()
            return
        lock.release()


def _close_sessions_without_waiting() -> None:
    """Keep petals' own inference sessions from waiting for the event loop in a finaliser.

    A close that fails (BrokenPipeError, about one in four on loopback) leaves petals' session open; when the garbage
    collector finds it on the event-loop thread, ``__del__`` waits for that same thread forever. Here the loop closes
    the stream when it gets to it, and the session counts as closed from the first call on.
    """
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
    from petals.client import inference_session

    def close(self: Any) -> None:
        stream, queue = self._outputs_stream, self._inputs_queue
        self.closed, self._outputs_stream, self._inputs_queue = True, None, None
        if stream is not None:
            RemoteExpertWorker.run_coroutine(_end_stream(stream, queue), return_future=True)

    async def _end_stream(stream: Any, queue: Any) -> None:
        await queue.put(inference_session.runtime_pb2.ExpertRequest())  # an empty request ends the session
        with contextlib.suppress(Exception):  # the server or the connection may be gone: nothing left to end
            # Iterate once: closing a generator that has never run would not close its socket.
            await asyncio.wait_for(stream.__anext__(), timeout=5)
        await stream.aclose()

    inference_session._ServerInferenceSession.close = close
    inference_session._ServerInferenceSession.__del__ = close


class _RecordingConnector:
    """Stands in for a control client of p2pd during one call, and records the connections that the call opens."""

    def __init__(self, control: Any) -> None:
        self.daemon_connector = self
        self._connector = control.daemon_connector
        self.writers: list[asyncio.StreamWriter] = []

    async def open_connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self._connector.open_connection()
        self.writers.append(writer)
        return reader, writer


def _close_connections_that_fail() -> None:
    """Close the connection to p2pd that hivemind leaves open when it cannot open a stream to a peer."""
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient

    open_stream = ControlClient.stream_open

    async def stream_open(self: Any, *args: Any, **kwargs: Any) -> Any:
        connector = _RecordingConnector(self)
        try:
            return await open_stream(connector, *args, **kwargs)
        except BaseException:
            for writer in connector.writers:
                writer.close()
            raise

    ControlClient.stream_open = stream_open


def _send_messages_whole() -> None:
    """Write each message at once; hivemind writes three pieces, each a system call and a packet that wakes p2pd.

    After a refusal, hivemind closes the stream at once. p2pd then closes both of its directions, and may take the end
    of the one for a failure of the other: it resets the stream, and what the other p2pd has not read is lost. So the
    stream stays open until the one who was refused closes it, for hivemind then cancels this task, but not for long.
    """
    from hivemind.p2p import P2P
    from hivemind.proto.p2pd_pb2 import RPCError

    async def send_protobuf(protobuf: Any, writer: asyncio.StreamWriter) -> None:
        data = protobuf.SerializeToString()
        marker = P2P.ERROR_MARKER if isinstance(protobuf, RPCError) else P2P.MESSAGE_MARKER
        writer.write(b"".join((marker, len(data).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER), data)))
        await writer.drain()
        if marker == P2P.ERROR_MARKER:
            await asyncio.sleep(REFUSAL_TIME)

    P2P.send_protobuf = staticmethod(send_protobuf)


_shared_dht: ContextVar[Any] = ContextVar("shared_dht", default=None)


@contextlib.contextmanager
def shared_dht(dht: Any) -> Iterator[None]:
    """Within this context, models use ``dht`` instead of starting a DHT process and a p2pd of their own."""
    token = _shared_dht.set(dht)
    try:
        yield
    finally:
        _shared_dht.reset(token)


def use_server_parts(
    handler: type,
    memory_cache: type,
    container: type,
    announcer: type,
    dht: type,
    backend: type,
    load_block: Callable[..., Any],
) -> None:
    """Make petals' server use these subclasses of its parts: it offers no parameters for them."""
    import petals.server.server

    petals.server.server.TransformerConnectionHandler = handler
    petals.server.server.MemoryCache = memory_cache
    petals.server.server.ModuleContainer = container
    petals.server.server.ModuleAnnouncerThread = announcer
    petals.server.server.DHT = dht
    petals.server.server.TransformerBackend = backend
    petals.server.server.load_pretrained_block = load_block


def disable_reachability_probes() -> None:
    """Stop petals' servers from probing the reachability of others: in a private swarm nobody asks.

    For this, petals starts a second p2pd of 60 MB in every server.
    """
    import petals.server.server

    petals.server.server.ReachabilityProtocol = SimpleNamespace(attach_to_dht=lambda dht: None)


def _accept_shared_dht() -> None:
    """Pass ``shared_dht`` to petals' causal models: they take no ``dht``, so each would start two processes."""
    from petals.client.routing import RemoteSequenceManager

    init = RemoteSequenceManager.__init__

    def __init__(self: Any, *args: Any, dht: Any = None, **kwargs: Any) -> None:
        init(self, *args, dht=dht if dht is not None else _shared_dht.get(), **kwargs)

    RemoteSequenceManager.__init__ = __init__


def _read_peers_carefully() -> None:
    """Read what peers send with ``swarm.wire``; processes forked from this one inherit that.

    hivemind and petals read it without bounds: 1 kB of nested tuples ends a process with SIGSEGV, a tensor with 8-bit
    compression reads memory beyond its own, a length of 2**60 is waited for, one DHT record hides all others.
    """
    import hivemind.dht.storage
    import petals.utils.dht
    from hivemind.p2p import P2P
    from hivemind.utils import MSGPackSerializer

    from swarm.wire import announcements, messages, packing, records, tensors

    MSGPackSerializer.loads = staticmethod(packing.unpack)
    MSGPackSerializer._decode_ext_types = staticmethod(packing.unpack_extension)
    tensors.check_compressions()
    P2P.receive_protobuf = staticmethod(messages.receive)
    add_handler = P2P.add_binary_stream_handler

    async def add_bounded_handler(self: Any, name: str, handler: Callable[..., Any], balanced: bool = False) -> None:
        await add_handler(self, name, messages.bound_streams(handler), balanced)

    P2P.add_binary_stream_handler = add_bounded_handler
    storage = hivemind.dht.storage
    storage.DictionaryDHTValue.unpackb = staticmethod(records.unpack_dictionary)
    storage.DHTLocalStorage.store_subkey = records.bound_subkeys(storage.DHTLocalStorage.store_subkey)
    init = hivemind.DHT.__init__

    def __init__(self: Any, *args: Any, record_validators: Any = (), **kwargs: Any) -> None:
        init(self, *args, record_validators=(*record_validators, records.SaneRecords()), **kwargs)

    hivemind.DHT.__init__ = __init__
    petals.utils.dht._get_remote_module_infos = announcements.read_module_infos


def use_view_reader(read: Callable[[Any], None]) -> None:
    """Make petals' sequence managers read the swarm by ``read(manager)``: their own does not limit the servers."""
    from petals.client.routing import RemoteSequenceManager

    RemoteSequenceManager._update = read


_restore_hivemind_names()
_keep_sockets_with_temporary_files()
_end_with_parent(hivemind.DHT)
_end_with_parent(hivemind.moe.server.connection_handler.ConnectionHandler)
_end_with_daemon()
_limit_waits_for_dht()

# Importing petals replaces the root logger's handlers, and thus the program's own log, with hivemind's.
_handlers, _level = logging.root.handlers[:], logging.root.level

transformers5.before_petals()
import petals  # noqa: E402  the names above must exist first
import petals.utils.convert_block  # noqa: E402, F401

hivemind.utils.logging.use_hivemind_log_handler("nowhere")
logging.root.handlers[:] = _handlers
logging.root.setLevel(_level)
transformers5.after_petals()
_close_sessions_without_waiting()
_close_connections_that_fail()
_send_messages_whole()
_accept_shared_dht()
_read_peers_carefully()
