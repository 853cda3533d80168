"""WebSockets that hold no thread: one thread reads and writes all of them (RFC 6455, the server's side).

A connection is read no faster than it is used: while a few of its messages are not looked at, the rest stays in the
kernel, and then with the client. What is sent goes to the kernel at once, or into a bounded buffer that the hub's
thread empties. No extension is offered: a message is as large here as on the wire. Knows nothing of what is said.
"""

import base64
import binascii
import collections
import contextlib
import logging
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.events import Message as MessageEvent
from wsproto.utilities import generate_accept_token

log = logging.getLogger(__name__)

# Read at a time from one connection, so that others are not kept waiting: a few thousand of the smallest frames, which
# are parsed in about 20 ms.
READ_SIZE = 16_384  # bytes
# Messages that nobody has looked at before reading stops. A chat has one or two; a client that sends ahead loses
# nothing, for the rest waits in the kernel. One message of any allowed size always fits.
UNSEEN_MESSAGES, UNSEEN_BYTES = 16, 65_536
# Of one connection in a tick, which nobody needs who means well; parsing them takes about 10 ms. The next ones are read
# in the next tick, so that a flood of the smallest frames leaves the thread to the others.
FRAMES_AT_A_TICK = 1000
# Of all connections together, beyond those bytes of each: 64 messages of the largest size, which nobody sends who means
# well, in 64 MiB, which every machine has that computes a model.
TOTAL_BYTES = 67_108_864
# A sender waits while more than this was not taken by the kernel: about as much as the kernel's own buffer takes.
UNSENT_BYTES = 65_536
# For telling a client that the connection ends, and its own closing frame; it may be dead.
CLOSING_LIMIT = 2.0  # seconds
# A connection that asks for nothing for so long is closed. The chat page opens its session at once, and itself waits no
# longer for that.
OPENING_LIMIT = 60.0  # seconds
# How often timers are looked at; none of them is that exact.
TICK = 1.0  # seconds
SEND_CHUNK = 262_144  # bytes given to the kernel at a time, which copies what it takes

GOING_AWAY, LOST, POLICY_VIOLATION = 1001, 1006, 1008  # RFC 6455, section 7.4.1
TOO_BIG, TRY_AGAIN_LATER = 1009, 1013
VERSION = "13"
# An SSL socket that does not block raises its own exceptions.
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Closed(ConnectionError):
    """The connection has ended, or is about to."""


class NoRoom(Exception):
    """All places for WebSockets are taken."""


class BadHandshake(Exception):
    """A request that does not begin a WebSocket."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        # RFC 6455, section 4.4; RFC 9110, section 15.5.22
        self.headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": VERSION} if status == 426 else {}


def accept_handshake(environ: Mapping[str, Any]) -> bytes:
    """Return the answer to a client that wants to talk WebSocket; RFC 6455, section 4.2.

    :param environ: of the request, as WSGI has it
    :raises BadHandshake: with the status of the refusal
    """
    if environ.get("REQUEST_METHOD") != "GET":
        raise BadHandshake(400, "a WebSocket begins with GET")
    connection = [token.strip().lower() for token in environ.get("HTTP_CONNECTION", "").split(",")]
    if environ.get("HTTP_UPGRADE", "").lower() != "websocket" or "upgrade" not in connection:
        raise BadHandshake(426, "this is a WebSocket API: the request must ask for an upgrade to it")
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != VERSION:
        raise BadHandshake(426, f"the WebSocket version must be {VERSION}")
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "").strip()
    try:
        size = len(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size != 16:
        raise BadHandshake(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    token = generate_accept_token(key.encode("ascii")).decode("ascii")
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
    return "\r\n".join([*lines, f"Sec-WebSocket-Accept: {token}", "", ""]).encode("ascii")


@dataclass(frozen=True)
class Limits:
    """What is asked of clients."""

    max_websockets: int  # open at a time
    max_message: int  # bytes of a message
    ping_interval: float  # seconds; a client that is silent for two of them after a ping is given up
    send_timeout: float  # seconds that a client may take no data


class Message(NamedTuple):
    """A message as it came; as bytes, for a text may be four times as large."""

    data: bytes
    is_text: bool

    def read(self) -> str | bytes:
        return self.data.decode() if self.is_text else self.data


class WebSocket:
    """One connection. Thread-safe; no method but ``send`` waits.

    Whoever handles its messages is told by ``on_ready`` when there is one, or the end, and then has the connection
    alone until ``done``, or, after the end, ``finish``.
    """

    def __init__(self, hub: "Hub", sock: socket.socket, address: str, greeting: bytes, leftover: bytes) -> None:
        """Wrap a socket after its handshake; see ``Hub.adopt``.

        :param greeting: what is sent first
        :param leftover: what was read already
        """
        self.address = address
        self.engaged = False  # whether it has something to lose, and may be silent; set by who handles its messages
        self.close_code: int | None = None  # how it ended: RFC 6455, section 7.1.5
        self._hub = hub
        self._sock = sock
        self._protocol = Connection(ConnectionType.SERVER, trailing_data=leftover)
        self._on_ready: Callable[[], None] | None = None
        self._changed = threading.Condition()  # guards all that follows; its users wait for room to send
        self._busy = True  # whether somebody handles it
        self._messages: deque[Message] = deque()
        self._size = 0  # bytes of them
        self._seen = 0  # how many of them were looked at
        self._seen_size = 0
        self._partial = bytearray()  # of a message that is not whole
        self._frames = 0  # parsed in this tick
        self._out = bytearray(greeting)  # not yet taken by the kernel
        self._pong: Ping | None = None  # to be answered when that is taken: the last ping; RFC 6455, section 5.5.3
        self._offer: str | None = None  # to be sent then, if nothing else was
        self._ended = False  # nothing more comes or is sent, but what is in _out
        self._closing_by = 0.0  # time.monotonic() by which that must be taken
        self._half_closed = False  # whether the client was told that nothing follows, and closes in its turn
        self._closed = threading.Event()  # the socket is
        self._finished = False  # nobody handles it any more
        now = time.monotonic()
        self._progress_at = self._heard_at = self._pinged_at = self._idle_since = now

    def start(self, on_ready: Callable[[], None]) -> None:
        """Begin to read.

        :param on_ready: called from any thread, and must not wait
        """
        self._on_ready = on_ready
        with self._changed:
            self._flush()
        self.done()

    @property
    def connected(self) -> bool:
        """Whether the client is there, as far as one knows, and nobody has closed the connection."""
        return not self._ended

    # For who handles messages

    def take(self) -> str | bytes | None:
        """Return the next message, a text or, from a binary frame, bytes; None if there is none."""
        with self._changed:
            if not self._messages:
                return None
            message = self._messages.popleft()
            self._size -= len(message.data)
            if self._seen:
                self._seen -= 1
                self._seen_size -= len(message.data)
        self._hub.poke(self)
        return message.read()

    def look(self) -> str | bytes | None:
        """Return the first message that was not looked at, without taking it; None if there is none."""
        with self._changed:
            if self._seen == len(self._messages):
                return None
            message = self._messages[self._seen]
            self._seen += 1
            self._seen_size += len(message.data)
        self._hub.poke(self)
        return message.read()

    def withdraw(self) -> None:
        """Take the message that was looked at last."""
        with self._changed:
            size = len(self._messages[self._seen - 1].data)
            del self._messages[self._seen - 1]
            self._seen -= 1
            self._seen_size -= size
            self._size -= size

    def look_anew(self) -> None:
        """Let ``look`` begin with the first message again."""
        with self._changed:
            self._seen = self._seen_size = 0

    @property
    def ahead(self) -> tuple[int, int]:
        """How many messages were looked at and not taken, and their bytes."""
        return self._seen, self._seen_size

    def done(self) -> None:
        """Whoever handled the connection does not any more; when there is something, ``on_ready`` is called again."""
        with self._changed:
            self._busy = False
            self._idle_since = time.monotonic()
        self._notify()
        self._hub.poke(self)

    def finish(self) -> None:
        """The end was seen to; nothing is handled any more."""
        with self._changed:
            self._finished = True
            self._messages.clear()
            self._size = self._seen = self._seen_size = 0
        self._hub.poke(self)

    def send(self, *texts: str) -> None:
        """Send messages, one after the other; wait while the client takes no data.

        :raises Closed: if the connection has ended, or the client takes none for too long
        """
        with self._changed:
            self._await_room()
            if self._ended:
                raise Closed("the connection has ended")
            self._offer = None
            self._write(*(TextMessage(text) for text in texts))
            if self._ended:
                raise Closed("the connection was lost")

    def _await_room(self) -> None:
        while len(self._out) > UNSENT_BYTES and not self._ended:
            patience = self._progress_at + self._hub.limits.send_timeout - time.monotonic()
            if patience <= 0:
                self._lose()
            else:
                self._changed.wait(patience)

    def offer(self, text: str) -> None:
        """Send a message that may be replaced by the next, or left out: never waits, not even for a slow client."""
        with self._changed:
            if self._ended:
                return
            if self._out:
                self._offer = text
            else:
                self._write(TextMessage(text))

    def close(self, code: int, reason: str) -> None:
        """Tell the client that the connection ends, if it can be told within a moment, and end it."""
        with self._changed:
            self._close(code, CloseConnection(code, reason))

    def abandon(self) -> None:
        """Break the connection off; who waits to send on it is woken."""
        with self._changed:
            self._lose()

    def wait_closed(self) -> None:
        """Wait until the socket is closed: for as long as the client is there."""
        self._closed.wait()

    # Under the lock

    def _write(self, *events: Event) -> None:
        idle = not self._out
        for event in events:
            self._out += self._protocol.send(event)
        if idle:
            self._progress_at = time.monotonic()
            self._flush()

    def _flush(self) -> None:
        """Give the kernel what it takes."""
        try:
            while self._out:
                sent = self._sock.send(self._out[:SEND_CHUNK])
                del self._out[:sent]
                self._progress_at = time.monotonic()
                if not self._out:
                    self._write_deferred()
        except WOULD_BLOCK:
            self._hub.poke(self)
        except (OSError, ValueError):  # a closed socket is a ValueError for SSL
            self._lose()
        if len(self._out) <= UNSENT_BYTES:
            self._changed.notify_all()

    def _write_deferred(self) -> None:
        ping, self._pong = self._pong, None
        offer, self._offer = self._offer, None
        if self._ended:
            return
        if ping is not None:
            self._out += self._protocol.send(ping.response())
        if offer is not None:
            self._out += self._protocol.send(TextMessage(offer))

    def _close(self, code: int, frame: Event) -> None:
        if self._ended:
            return
        self.close_code, self._ended = code, True
        self._partial.clear()
        self._closing_by = time.monotonic() + CLOSING_LIMIT
        self._write(frame)
        self._changed.notify_all()
        self._hub.poke(self)

    def _lose(self) -> None:
        if not self._ended:
            self.close_code, self._ended = LOST, True
        self._out.clear()
        self._partial.clear()
        self._closing_by = 0.0
        self._changed.notify_all()
        self._hub.poke(self)

    @property
    def _full(self) -> bool:
        """Whether enough was read for now; the rest waits."""
        unseen = len(self._messages) - self._seen
        enough = unseen >= UNSEEN_MESSAGES or self._size - self._seen_size >= UNSEEN_BYTES
        return enough or self._frames >= FRAMES_AT_A_TICK

    def _read(self) -> None:
        try:
            data = self._sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            return
        except (OSError, ValueError):
            data = b""
        if not data:
            self._lose()
        elif not self._ended:  # else the client has not yet seen that nobody reads this
            self._heard_at = time.monotonic()
            self._protocol.receive_data(data)

    def _parse(self) -> None:
        """Take messages out of what was read, while they have room here."""
        if self._full or self._ended:
            return
        for event in self._protocol.events():
            self._frames += 1
            if isinstance(event, (TextMessage, BytesMessage)):
                self._assemble(event)
            elif isinstance(event, Ping):
                self._answer(event)
            elif isinstance(event, CloseConnection):
                # Without a closing frame it is the parser's word: the client does not keep to the protocol.
                theirs = self._protocol.state is ConnectionState.REMOTE_CLOSING
                self._close(int(event.code), event.response() if theirs else event)
            if self._full or self._ended:
                return

    def _assemble(self, event: MessageEvent) -> None:
        text = isinstance(event, TextMessage)
        data = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
        if len(self._partial) + len(data) > self._hub.limits.max_message:
            reason = f"a message may have at most {self._hub.limits.max_message} bytes"
            log.info("%s sends a message that is too large: %s", self.address or "a client", reason)
            self._close(TOO_BIG, CloseConnection(TOO_BIG, reason))
            return
        self._partial += data
        if event.message_finished:
            self._messages.append(Message(bytes(self._partial), text))
            self._size += len(self._partial)
            self._partial = bytearray()

    def _answer(self, ping: Ping) -> None:
        if self._out:
            self._pong = ping
        else:
            self._write(ping.response())

    # For the hub's thread

    def _attend(self, readable: bool, writable: bool) -> None:
        with self._changed:
            if not self._closed.is_set():
                if writable:
                    self._flush()
                if readable and (self._ended or not self._full):
                    self._read()
                self._parse()  # it may have room again for what was read before
                if self._ended:
                    self._end()
        self._notify()

    def _end(self) -> None:
        """Close the socket: at once if the client has closed or gone, else when it has closed in its turn."""
        if not self._out and self._closing_by and not self._half_closed:
            if self._protocol.state is ConnectionState.CLOSED:
                self._closing_by = 0.0
            else:
                self._half_closed = True
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_WR)
        if time.monotonic() >= self._closing_by:
            self._hub._unregister(self)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # others may have the same socket
            self._sock.close()
            self._out.clear()
            self._closed.set()

    def _notify(self) -> None:
        """If there is something to handle, and nobody does: tell who does."""
        with self._changed:
            if self._busy or self._finished or self._on_ready is None:
                return
            if self._hub.ending:
                self._close(GOING_AWAY, CloseConnection(GOING_AWAY, "the server is shutting down"))
            # A client that does not take the answers is not asked for more questions: nobody waits to send to it.
            if not self._ended and (not self._messages or len(self._out) > UNSENT_BYTES):
                return
            self._busy = True
        self._on_ready()

    def _tick(self, now: float) -> None:
        """Look at the timers."""
        limits = self._hub.limits
        with self._changed:
            if self._ended:
                return
            if self._full:
                self._heard_at = now  # its pongs are not read
            self._frames = 0
            if self._out and now - self._progress_at >= limits.send_timeout:
                self._lose()
            elif self._idle and now - self._idle_since >= OPENING_LIMIT:
                self._close(POLICY_VIOLATION, CloseConnection(POLICY_VIOLATION, "no session was opened"))
            elif now - self._heard_at >= 3 * limits.ping_interval:  # two after the first ping without an answer
                self._close(POLICY_VIOLATION, CloseConnection(POLICY_VIOLATION, "pings were not answered"))
            elif now - self._pinged_at >= limits.ping_interval and not self._out:
                self._pinged_at = now
                self._write(Ping())

    @property
    def _idle(self) -> bool:
        """Whether nobody would miss it."""
        return not (self._busy or self.engaged or self._messages or self._ended)

    @property
    def _interest(self) -> int:
        """What is to be awaited of the socket."""
        if self._closed.is_set():
            return 0
        reads = self._half_closed or not (self._ended or self._full)
        return (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if self._out else 0)

    @property
    def _held(self) -> int:
        return self._size + len(self._partial)


class Hub:
    """All open WebSockets, and the thread that reads and writes them. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ending = False
        self._lock = threading.Lock()  # held for moments; may be acquired under a WebSocket's, and not the other way
        self._websockets: dict[WebSocket, None] = {}  # in the order in which they came
        self._coming = 0  # places that are taken by those who come
        self._poked: dict[WebSocket, None] = {}  # to be looked at
        self._thread: threading.Thread | None = None
        self._awake = False  # whether the thread has been told of them
        self._selector: selectors.BaseSelector | None = None
        self._waker: socket.socket | None = None

    def __len__(self) -> int:
        return len(self._websockets)

    def adopt(self, take: Callable[[], tuple[socket.socket, bytes]], address: str, greeting: bytes = b"") -> WebSocket:
        """Take over a connection after its handshake. It is read when it is started.

        :param take: returns the socket and what was read of it already; called when there is a place
        :param address: whose it is: no address displaces the connections of one that has no more
        :param greeting: what is sent first
        :raises NoRoom: if all places are taken, and nobody makes room
        :raises Closed: if the program is ending
        :raises OSError: if the client is gone already
        """
        with self._lock:
            if self.ending:
                raise Closed("the server is shutting down")
            displaced = None
            if len(self._websockets) + self._coming >= self.limits.max_websockets:
                displaced = self._displaced(address)
            self._coming += 1
        try:
            sock, leftover = take()  # which may wait
            sock.setblocking(False)
        finally:
            with self._lock:
                self._coming -= 1
        with contextlib.suppress(OSError):  # not one of TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        websocket = WebSocket(self, sock, address, greeting, leftover)
        with self._lock:
            self._websockets[websocket] = None
            self._start()
        if displaced is not None:
            displaced.close(TRY_AGAIN_LATER, "others need the place of this connection, which has no session")
        return websocket

    def _displaced(self, address: str) -> WebSocket:
        """Under the lock: find the one that goes for a newcomer; it keeps its place for the moment that this takes.

        It is the oldest one that nobody would miss of the address that has most of them: the newcomer's own, or one
        that has more even then.
        """
        idle = [websocket for websocket in self._websockets if websocket._idle]
        counts = collections.Counter(websocket.address for websocket in self._websockets)
        fair = [w for w in idle if w.address == address or counts[w.address] > counts[address] + 1]
        if not fair or len(self._websockets) + self._coming >= 2 * self.limits.max_websockets:
            raise NoRoom(f"all {self.limits.max_websockets} places for WebSockets are taken")
        return max(fair, key=lambda websocket: counts[websocket.address])  # the first of them

    def shut_down(self) -> None:
        """Close all that are idle, and the others when they are; take no new ones."""
        with self._lock:
            self.ending = True
            websockets = list(self._websockets)
        for websocket in websockets:
            websocket._notify()

    def join(self, timeout: float) -> None:
        """After ``shut_down``: wait until all connections are closed."""
        if (thread := self._thread) is not None:
            thread.join(timeout)

    def poke(self, websocket: WebSocket) -> None:
        """Have the hub's thread look at a connection."""
        if threading.current_thread() is self._thread:
            self._poked[websocket] = None  # it looks at them before it waits
            return
        with self._lock:
            self._poked[websocket] = None
            if self._awake or self._waker is None:
                return
            self._awake = True
            waker = self._waker
        with contextlib.suppress(OSError):  # full: it wakes anyway
            waker.send(b"\0")

    def _start(self) -> None:
        """Under the lock: start the thread if it does not run. It ends with the last connection."""
        if self._thread is None:
            self._selector = selectors.DefaultSelector()
            self._waker, woken = socket.socketpair()
            for end in (self._waker, woken):
                end.setblocking(False)
            self._selector.register(woken, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, args=(woken,), name="websockets", daemon=True)
            self._thread.start()

    def _run(self, woken: socket.socket) -> None:
        next_tick = 0.0
        while not self._over(woken):
            try:
                for key, mask in self._wait(next_tick):
                    if key.data is None:
                        self._read_wakes(woken)
                    else:
                        self._attend(key.data, bool(mask & selectors.EVENT_READ), bool(mask & selectors.EVENT_WRITE))
                self._attend_poked()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + min(TICK, self.limits.ping_interval / 2)
                    self._tick()
            except Exception:  # not a connection's, which ends the connection alone
                log.exception("the WebSockets' thread goes on after")
                time.sleep(0.1)  # it may come again

    def _over(self, woken: socket.socket) -> bool:
        with self._lock:
            if self._websockets:
                return False
            assert self._selector is not None and self._waker is not None
            self._selector.close()
            self._waker.close()
            woken.close()
            self._thread = self._waker = None
            self._awake = False
            self._poked.clear()
            return True

    def _wait(self, until: float) -> Iterable[tuple[selectors.SelectorKey, int]]:
        assert self._selector is not None
        timeout = 0.0 if self._poked else max(0.0, until - time.monotonic())
        return self._selector.select(timeout)

    def _read_wakes(self, woken: socket.socket) -> None:
        with self._lock:
            self._awake = False
            with contextlib.suppress(BlockingIOError):
                woken.recv(64)

    def _attend_poked(self) -> None:
        with self._lock:
            poked, self._poked = self._poked, {}
        for websocket in poked:
            self._attend(websocket, False, False)

    def _attend(self, websocket: WebSocket, readable: bool, writable: bool) -> None:
        """Look at a connection; what goes wrong there ends that one alone."""
        try:
            websocket._attend(readable, writable)
            if readable and websocket._held > UNSEEN_BYTES:
                self._bound_memory()
            self._register(websocket)
            if websocket._finished and websocket._closed.is_set():
                with self._lock:
                    self._websockets.pop(websocket, None)
        except Exception:
            log.exception("a WebSocket is given up")
            if not websocket._closed.is_set():
                websocket.abandon()
                with websocket._changed:
                    websocket._end()

    def _register(self, websocket: WebSocket) -> None:
        assert self._selector is not None
        sock, interest = websocket._sock, websocket._interest
        if not interest:
            self._unregister(websocket)
        elif sock in self._selector.get_map():
            if self._selector.get_key(sock).events != interest:
                self._selector.modify(sock, interest, websocket)
        else:
            self._selector.register(sock, interest, websocket)

    def _unregister(self, websocket: WebSocket) -> None:
        if self._selector is not None:
            with contextlib.suppress(KeyError, ValueError):  # it was not, or is closed
                self._selector.unregister(websocket._sock)

    def _bound_memory(self) -> None:
        """When all that was received and not used is too much: end the largest of the address that has most of it."""
        with self._lock:
            websockets = list(self._websockets)
        if sum(max(0, websocket._held - UNSEEN_BYTES) for websocket in websockets) > TOTAL_BYTES:
            held: collections.Counter[str] = collections.Counter()
            for websocket in websockets:
                held[websocket.address] += websocket._held if websocket.connected else 0
            address, _ = held.most_common(1)[0]
            largest = max((w for w in websockets if w.address == address and w.connected), key=lambda w: w._held)
            largest.close(TRY_AGAIN_LATER, "the server holds too much that is not answered yet")

    def _tick(self) -> None:
        now = time.monotonic()
        with self._lock:
            websockets = list(self._websockets)
        for websocket in websockets:
            websocket._tick(now)
            self._attend(websocket, False, False)
