"""One open WebSocket: its messages, its frames, its limits. The hub's thread reads and writes it; RFC 6455."""

import contextlib
import logging
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.events import Message as MessageEvent

if TYPE_CHECKING:
    from web.websocket_hub import Hub

log = logging.getLogger(__name__)

# Read at a time from one connection, so that others are not kept waiting: a few thousand of the smallest frames, which
# are parsed in about 20 ms.
READ_SIZE = 16_384  # bytes
# Unseen messages before reading stops. A chat has one or two; a client that sends ahead loses
# nothing, for the rest waits in the kernel. One message of any allowed size always fits.
UNSEEN_MESSAGES, UNSEEN_BYTES = 16, 65_536
# Of one connection in a tick, which no sane client needs; parsing them takes about 10 ms. The next ones are read
# in the next tick, so that a flood of the smallest frames leaves the thread to the others.
FRAMES_AT_A_TICK = 1000
# A sender waits while more than this was not taken by the kernel: about as much as the kernel's own buffer takes.
UNSENT_BYTES = 65_536
# For sending a client the closing frame, and receiving its own; it may be dead.
CLOSING_LIMIT = 2.0  # seconds
# A connection that asks for nothing for this long is closed. The chat page opens its session at once, and itself waits
# no longer for that.
OPENING_LIMIT = 60.0  # seconds
SEND_CHUNK = 262_144  # bytes given to the kernel at a time, which copies what it takes

GOING_AWAY, LOST, POLICY_VIOLATION = 1001, 1006, 1008  # RFC 6455, section 7.4.1
TOO_BIG, TRY_AGAIN_LATER = 1009, 1013
# An SSL socket that does not block raises its own exceptions.
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Closed(ConnectionError):
    """The connection has ended, or is about to."""


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

    ``on_ready`` is called when there is a message, or the end. The thread that handles it then has the connection
    to itself until ``done``, or, after the end, ``finish``.
    """

    def __init__(self, hub: "Hub", sock: socket.socket, address: str, greeting: bytes, leftover: bytes) -> None:
        """Wrap a socket after its handshake; see ``Hub.adopt``.

        :param greeting: what is sent first
        :param leftover: what was read already
        """
        self.address = address
        self.engaged = False  # whether it has something to lose, and may be silent; set by the handler of its messages
        self.close_code: int | None = None  # how it ended: RFC 6455, section 7.1.5
        self._hub = hub
        self.sock = sock
        self._protocol = Connection(ConnectionType.SERVER, trailing_data=leftover)
        self._on_ready: Callable[[], None] | None = None
        self.changed = threading.Condition()  # guards all that follows; its users wait for room to send
        self._busy = True  # whether a thread handles it
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
        self._half_closed = False  # whether our side is closed, and the client closes in its turn
        self.closed = threading.Event()  # the socket is
        self.finished = False  # no longer handled
        now = time.monotonic()
        self._progress_at = self._heard_at = self._pinged_at = self._idle_since = now

    def start(self, on_ready: Callable[[], None]) -> None:
        """Begin to read.

        :param on_ready: called from any thread, and must not wait
        """
        self._on_ready = on_ready
        with self.changed:
            self._flush()
        self.done()

    @property
    def connected(self) -> bool:
        """Whether the client is there, as far as is known, and the connection was not closed."""
        return not self._ended

    # For the handler of messages

    def take(self) -> str | bytes | None:
        """Return the next message, a text or, from a binary frame, bytes; None if there is none."""
        with self.changed:
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
        with self.changed:
            if self._seen == len(self._messages):
                return None
            message = self._messages[self._seen]
            self._seen += 1
            self._seen_size += len(message.data)
        self._hub.poke(self)
        return message.read()

    def withdraw(self) -> None:
        """Take the message that was looked at last."""
        with self.changed:
            size = len(self._messages[self._seen - 1].data)
            del self._messages[self._seen - 1]
            self._seen -= 1
            self._seen_size -= size
            self._size -= size

    def reset_lookahead(self) -> None:
        """Let ``look`` begin with the first message again."""
        with self.changed:
            self._seen = self._seen_size = 0

    @property
    def ahead(self) -> tuple[int, int]:
        """How many messages were looked at and not taken, and their bytes."""
        return self._seen, self._seen_size

    def done(self) -> None:
        """End the handling for now; when there is something to handle, ``on_ready`` is called again."""
        with self.changed:
            self._busy = False
            self._idle_since = time.monotonic()
        self.notify()
        self._hub.poke(self)

    def finish(self) -> None:
        """Note that the end was handled; nothing more is."""
        with self.changed:
            self.finished = True
            self._messages.clear()
            self._size = self._seen = self._seen_size = 0
        self._hub.poke(self)

    def send(self, *texts: str) -> None:
        """Send messages, one after the other; wait while the client takes no data.

        :raises Closed: if the connection has ended, or the client takes none for too long
        """
        with self.changed:
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
                self.changed.wait(patience)

    def offer(self, text: str) -> None:
        """Send a message that may be replaced by the next, or skipped: never waits, not even for a slow client."""
        with self.changed:
            if self._ended:
                return
            if self._out:
                self._offer = text
            else:
                self._write(TextMessage(text))

    def close(self, code: int, reason: str) -> None:
        """End the connection, with a closing frame if it can be sent within a moment."""
        with self.changed:
            self._close(code, CloseConnection(code, reason))

    def close_idle(self, code: int, reason: str) -> bool:
        """End the connection if that loses nothing; return whether it did."""
        with self.changed:
            if not self.idle:
                return False
            self._close(code, CloseConnection(code, reason))
            return True

    def abandon(self) -> None:
        """Break the connection off; wake the threads that wait to send on it."""
        with self.changed:
            self._lose()

    def wait_closed(self) -> None:
        """Wait until the socket is closed: for as long as the client is there."""
        self.closed.wait()

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
                sent = self.sock.send(self._out[:SEND_CHUNK])
                del self._out[:sent]
                self._progress_at = time.monotonic()
                if not self._out:
                    self._write_deferred()
        except WOULD_BLOCK:
            self._hub.poke(self)
        except (OSError, ValueError):  # a closed socket is a ValueError for SSL
            self._lose()
        if len(self._out) <= UNSENT_BYTES:
            self.changed.notify_all()

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
        self.changed.notify_all()
        self._hub.poke(self)

    def _lose(self) -> None:
        if not self._ended:
            self.close_code, self._ended = LOST, True
        self._out.clear()
        self._partial.clear()
        self._closing_by = 0.0
        self.changed.notify_all()
        self._hub.poke(self)

    @property
    def _full(self) -> bool:
        """Whether enough was read for now; the rest waits."""
        unseen = len(self._messages) - self._seen
        enough = unseen >= UNSEEN_MESSAGES or self._size - self._seen_size >= UNSEEN_BYTES
        return enough or self._frames >= FRAMES_AT_A_TICK

    def _read(self) -> None:
        try:
            data = self.sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            return
        except (OSError, ValueError):
            data = b""
        if not data:
            self._lose()
        elif not self._ended:  # else the client has not yet seen that this is not read
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
                # Without a closing frame it is the parser's verdict: the client breaks the protocol.
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

    def attend(self, readable: bool, writable: bool) -> None:
        with self.changed:
            if not self.closed.is_set():
                if writable:
                    self._flush()
                if readable and (self._ended or not self._full):
                    self._read()
                self._parse()  # it may have room again for what was read before
                if self._ended:
                    self.end()
        self.notify()

    def end(self) -> None:
        """Close the socket: at once if the client has closed or gone, else when it has closed in its turn."""
        if not self._out and self._closing_by and not self._half_closed:
            if self._protocol.state is ConnectionState.CLOSED:
                self._closing_by = 0.0
            else:
                self._half_closed = True
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_WR)
        if time.monotonic() >= self._closing_by:
            self._hub.unregister(self)
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # others may have the same socket
            self.sock.close()
            self._out.clear()
            self.closed.set()

    def notify(self) -> None:
        """Call ``on_ready`` if there is something to handle and no thread does."""
        with self.changed:
            if self._busy or self.finished or self._on_ready is None:
                return
            if self._hub.ending:
                self._close(GOING_AWAY, CloseConnection(GOING_AWAY, "the server is shutting down"))
            # A client that does not take the answers is not asked for more questions: nobody waits to send to it.
            if not self._ended and (not self._messages or len(self._out) > UNSENT_BYTES):
                return
            self._busy = True
        self._on_ready()

    def tick(self, now: float) -> None:
        """Look at the timers."""
        limits = self._hub.limits
        with self.changed:
            if self._ended:
                return
            if self._full:
                self._heard_at = now  # its pongs are not read
            self._frames = 0
            if self._out and now - self._progress_at >= limits.send_timeout:
                self._lose()
            elif self.idle and now - self._idle_since >= OPENING_LIMIT:
                self._close(POLICY_VIOLATION, CloseConnection(POLICY_VIOLATION, "no session was opened"))
            elif now - self._heard_at >= 3 * limits.ping_interval:  # two after the first ping without an answer
                self._close(POLICY_VIOLATION, CloseConnection(POLICY_VIOLATION, "pings were not answered"))
            elif now - self._pinged_at >= limits.ping_interval and not self._out:
                self._pinged_at = now
                self._write(Ping())

    @property
    def idle(self) -> bool:
        """Whether it can be closed without loss."""
        return not (self._busy or self.engaged or self._messages or self._ended)

    @property
    def interest(self) -> int:
        """The events to await on the socket."""
        if self.closed.is_set():
            return 0
        reads = self._half_closed or not (self._ended or self._full)
        return (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if self._out else 0)

    @property
    def held(self) -> int:
        return self._size + len(self._partial)
