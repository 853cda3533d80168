"""WebSockets that hold no thread: one thread reads and writes all of them (RFC 6455, the server's side).

A connection is read no faster than it is used: while a few of its messages are not looked at, the rest stays in the
kernel, and then with the client. What is sent goes to the kernel at once, or into a bounded buffer that the hub's
thread empties. No extension is offered: a message is as large here as on the wire. Knows nothing of what messages mean.
"""

import collections
import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable

from web.websocket import TRY_AGAIN_LATER, UNSEEN_BYTES, Closed, Limits, WebSocket

log = logging.getLogger(__name__)

# Of all connections together, beyond those bytes of each: 64 messages of the largest size, which no well-meaning client
# sends, in 64 MiB, which every machine has that computes a model.
TOTAL_BYTES = 67_108_864
# How often timers are looked at; none of them is that exact.
TICK = 1.0  # seconds
# What a client is told whose place another one gets.
GIVES_WAY = "others need the place of this connection, which has opened no session"


class NoRoom(Exception):
    """All places for WebSockets are taken."""


class Hub:
    """All open WebSockets, and the thread that reads and writes them. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ending = False
        self._lock = threading.Lock()  # held for moments; may be acquired under a WebSocket's, and not the other way
        self._websockets: dict[WebSocket, None] = {}  # in the order in which they came
        self._coming = 0  # places taken by connections that are being adopted
        self._poked: dict[WebSocket, None] = {}  # to be looked at
        self._thread: threading.Thread | None = None
        self._awake = False  # whether the thread was woken for them
        self._selector: selectors.BaseSelector | None = None
        self._waker: socket.socket | None = None

    def __len__(self) -> int:
        return len(self._websockets)

    def adopt(self, take: Callable[[], tuple[socket.socket, bytes]], address: str, greeting: bytes = b"") -> WebSocket:
        """Take over a connection after its handshake. It is read when it is started.

        :param take: returns the socket and what was read of it already; called when there is a place
        :param address: whose it is: no address displaces the connections of one that has no more
        :param greeting: what is sent first
        :raises NoRoom: if all places are taken, and no connection gives way
        :raises Closed: if the program is ending
        :raises OSError: if the client is gone already
        """
        with self._lock:
            if self.ending:
                raise Closed("the server is shutting down")
            displaced = None
            if len(self._websockets) + self._coming >= self.limits.max_websockets:
                displaced = self._displaced(address)
                if displaced is None:
                    raise NoRoom(self._full)
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
            self._displace(displaced, websocket)
        return websocket

    def _displace(self, displaced: WebSocket | None, newcomer: WebSocket) -> None:
        """Close the one that goes; if it was put to use since it was found, another; if there is none, the newcomer."""
        while displaced is not None and not displaced.close_idle(TRY_AGAIN_LATER, GIVES_WAY):
            with self._lock:
                if sum(websocket.connected for websocket in self._websockets) <= self.limits.max_websockets:
                    return
                displaced = self._displaced(newcomer.address)
        if displaced is None:
            newcomer.close(TRY_AGAIN_LATER, self._full)

    def _displaced(self, address: str) -> WebSocket | None:
        """Under the lock: find the one that goes for a newcomer; it keeps its place for the moment that this takes.

        It is the oldest idle one of the address that has most of them: the newcomer's own, or one that has more
        even then.
        """
        if len(self._websockets) + self._coming >= 2 * self.limits.max_websockets:
            return None
        idle = [websocket for websocket in self._websockets if websocket.idle]
        counts = collections.Counter(websocket.address for websocket in self._websockets)
        fair = [w for w in idle if w.address == address or counts[w.address] > counts[address] + 1]
        return max(fair, key=lambda websocket: counts[websocket.address], default=None)  # the first of them

    @property
    def _full(self) -> str:
        return f"all {self.limits.max_websockets} places for WebSockets are taken"

    def shut_down(self) -> None:
        """Close all that are idle, and the others when they are; take no new ones."""
        with self._lock:
            self.ending = True
            websockets = list(self._websockets)
        for websocket in websockets:
            websocket.notify()

    def join(self, timeout: float) -> None:
        """After ``shut_down``: wait until all connections are closed."""
        if (thread := self._thread) is not None:
            thread.join(timeout)

    def poke(self, websocket: WebSocket) -> None:
        """Let the hub's thread look at a connection."""
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
        """Look at a connection; a failure ends that one alone."""
        try:
            websocket.attend(readable, writable)
            if readable and websocket.held > UNSEEN_BYTES:
                self._bound_memory()
            self._register(websocket)
            if websocket.finished and websocket.closed.is_set():
                with self._lock:
                    self._websockets.pop(websocket, None)
        except Exception:
            log.exception("a WebSocket is given up")
            if not websocket.closed.is_set():
                websocket.abandon()
                with websocket.changed:
                    websocket.end()

    def _register(self, websocket: WebSocket) -> None:
        assert self._selector is not None
        sock, interest = websocket.sock, websocket.interest
        if not interest:
            self.unregister(websocket)
        elif sock in self._selector.get_map():
            if self._selector.get_key(sock).events != interest:
                self._selector.modify(sock, interest, websocket)
        else:
            self._selector.register(sock, interest, websocket)

    def unregister(self, websocket: WebSocket) -> None:
        if self._selector is not None:
            with contextlib.suppress(KeyError, ValueError):  # it was not, or is closed
                self._selector.unregister(websocket.sock)

    def _bound_memory(self) -> None:
        """If too much was received and not used, end the largest connection of the address that has most of it."""
        with self._lock:
            websockets = list(self._websockets)
        if sum(max(0, websocket.held - UNSEEN_BYTES) for websocket in websockets) > TOTAL_BYTES:
            held: collections.Counter[str] = collections.Counter()
            for websocket in websockets:
                held[websocket.address] += websocket.held if websocket.connected else 0
            address, _ = held.most_common(1)[0]
            largest = max((w for w in websockets if w.address == address and w.connected), key=lambda w: w.held)
            largest.close(TRY_AGAIN_LATER, "too much unhandled data: wait for answers before sending more")

    def _tick(self) -> None:
        now = time.monotonic()
        with self._lock:
            websockets = list(self._websockets)
        for websocket in websockets:
            websocket.tick(now)
            self._attend(websocket, False, False)
