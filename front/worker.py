"""gunicorn's worker with threads, behind a loop that owns the connections.

gunicorn's own gives a thread to each connection that has a request to send, until it is sent, answered and the answer
taken; 100 slow clients are the end of it. Here one loop, which never waits for anybody, reads requests, gives a thread
to those that are whole, and sends what clients do not take at once. gunicorn's code parses and answers.
"""

import collections
import contextlib
import errno
import functools
import json
import logging
import math
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import ThreadWorker

from admission.addresses import client_address
from config import Settings
from errors import ApiError, Overloaded, RequestTimeout, error_body
from front.connection import Connection, State
from front.lane import Lane
from front.request_reader import RequestReader

log = logging.getLogger("petals_chat.front")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
ACCEPTED = 64  # connections at a time, before those that are there have their turn
SWEEP = 0.25  # seconds between two looks at deadlines
# How long a client may take to close its own side, which tells that it has all of the answer (RFC 9112, 9.6).
LINGER = 2.0  # seconds
MAX_LINGERING = 128  # connections, beyond MAX_CONNECTIONS; others are closed without waiting for their clients
# Requests that are not yet answered, and answers that are not yet taken, each over all connections: 128 of the largest.
MAX_HELD = 128 * 1024**2  # bytes
# Answered by threads of their own, whatever the load, for monitoring.
EXPRESS_PATHS = ("/healthz", "/readyz")
EXPRESS_THREADS = 2  # one for each path
# Besides connections and WebSockets: those that linger, and the rest of the program (models, swarm, log, pipes).
OTHER_FILES = MAX_LINGERING + 512


class Worker(ThreadWorker):
    """A worker whose threads never wait for a client to send, and hardly for one to take.

    Puts ``front.detach`` into the environment of each request: see :meth:`AnswerSocket.detach`.
    """

    wsgi: Callable[..., Iterable[bytes]]

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse what the loop cannot do.

        :raises SystemExit: naming it
        """
        refused = {
            "certfile: let a proxy in front add TLS": cfg.is_ssl,
            "proxy_protocol: let the proxy send X-Forwarded-For, and name it in TRUSTED_PROXIES": (
                cfg.proxy_protocol != "off"
            ),
            "http2_cleartext": cfg.http2_cleartext != "off",
            f"protocol {cfg.protocol}": cfg.protocol != "http",
        }
        for name, is_asked_for in refused.items():
            if is_asked_for:
                raise SystemExit(f"Petals Chat does not serve gunicorn's {name}")
        wanted = cfg.worker_connections + Settings.from_environment().MAX_WEBSOCKETS + OTHER_FILES
        if (missing := wanted - _allow_files(wanted)) > 0:
            fewer = cfg.worker_connections - missing
            if fewer < cfg.threads:
                raise SystemExit(
                    f"Petals Chat needs {wanted} open files, {missing} more than the system allows (ulimit -Hn): "
                    "set MAX_CONNECTIONS or MAX_WEBSOCKETS lower"
                )
            log.warning("too few files may be open (ulimit -Hn): MAX_CONNECTIONS is %d, not %d", fewer, fewer + missing)
            cfg.set("worker_connections", fewer)

    def load_wsgi(self) -> None:
        super().load_wsgi()
        app = self.wsgi

        def with_detach(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ["front.detach"] = environ["gunicorn.socket"].detach
            return app(environ, start_response)

        self.wsgi = with_detach

    def run(self) -> None:
        """Serve until asked to end, then answer the requests that have come."""
        self.settings = Settings.from_environment()
        self.connections: set[Connection] = set()
        self.lingering = 0
        self.held = 0  # bytes of requests
        self.turned_away = 0  # since the last line of the log
        self.max_keepalived = self.cfg.worker_connections  # gunicorn's code asks; nothing is counted there
        self.main_lane: Lane[Connection] = Lane(self.tpool, self.cfg.threads)
        express_pool = ThreadPoolExecutor(EXPRESS_THREADS, "express")
        self.express_lane: Lane[Connection] = Lane(express_pool, EXPRESS_THREADS)
        self._next_sweep = self._next_report = 0.0
        self.poller.register(self.method_queue.fileno(), READ, self.method_queue.run_callbacks)
        self.set_accept_enabled(True)
        while self.alive and self.is_parent_alive():
            self._turn()
        self._end()
        express_pool.shutdown(wait=False)

    def _end(self) -> None:
        """Take nothing new, answer what was whole, and close."""
        self.set_accept_enabled(False)
        for conn in list(self.connections):
            if conn.state is State.READING:
                self._drop(conn)
        deadline = time.monotonic() + self.cfg.graceful_timeout
        while self.connections and time.monotonic() < deadline:
            self._turn()
        self.tpool.shutdown(wait=False)
        self.poller.close()
        self.method_queue.close()
        for listener in self.sockets:
            listener.close()

    # The loop: nothing below waits, but for `_turn` itself.

    def _turn(self) -> None:
        self.notify()
        # Without connections there is nothing to look at; gunicorn's parent must still hear from us every second.
        for key, events in self.poller.select(SWEEP if self.connections else 1.0):
            if isinstance(key.data, Connection):
                self._guard(self._on_event, key.data, events)
            else:
                key.data(key.fileobj)
        if time.monotonic() >= self._next_sweep:
            self._sweep()

    def _guard(self, step: Callable[..., None], conn: Connection, *args: Any) -> None:
        """Do something for one connection; a failure ends that connection, not the loop."""
        try:
            step(conn, *args)
        except Exception:
            log.exception("a connection fails")
            self._drop(conn)

    def _defer(self, step: Callable[..., None], conn: Connection, *args: Any) -> None:
        """Let the loop do something. For any thread."""
        self.method_queue.defer(self._guard, step, conn, *args)

    def _watch(self, conn: Connection, events: int) -> None:
        if events == conn.events:
            return
        if not conn.events:
            self.poller.register(conn.raw, events, conn)
        elif events:
            self.poller.modify(conn.raw, events, conn)
        else:
            self.poller.unregister(conn.raw)
        conn.events = events

    def _on_event(self, conn: Connection, events: int) -> None:
        if events & WRITE and conn.events & WRITE:
            self._flush(conn)
        elif events & READ and conn.events & READ:
            self._read(conn)

    # Connections come

    def accept(self, listener: Any) -> None:
        """Accept those that wait."""
        for _ in range(ACCEPTED):
            try:
                raw, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    log.error("cannot accept connections: %s", error)  # out of files or memory: again at the next sweep
                    self._displace()
                    self.set_accept_enabled(False)
                    return
            else:
                self._admit(raw, peer, listener.getsockname())

    def _admit(self, raw: socket.socket, peer: Any, server: Any) -> None:
        raw.setblocking(False)
        reader = RequestReader(self.cfg, peer, self.settings.MAX_BODY_BYTES)
        conn = Connection(raw, peer, server, self._client_key(peer, raw), reader, self.settings.SEND_TIMEOUT)
        conn.sock.on_pending = functools.partial(self._defer, self._watch_pending, conn)
        reader.on_continue = functools.partial(conn.sock.sendall, b"HTTP/1.1 100 Continue\r\n\r\n")
        is_full = len(self.connections) - self.lingering >= self.cfg.worker_connections
        has_place = not is_full or self._displace()
        self.connections.add(conn)
        if has_place:
            conn.await_next(self.settings.REQUEST_READ_TIMEOUT)
            self._guard(self._read, conn)
        else:
            self._guard(self._turn_away, conn)

    def _client_key(self, peer: Any, raw: socket.socket) -> str:
        """Return the client of a connection. Each connection of a trusted proxy counts as a client of its own."""
        address = peer[0] if isinstance(peer, tuple) else ""
        trusted = self.settings.trusted_proxies
        is_trusted = not client_address(address, "somebody behind it", trusted)
        return f"connection {raw.fileno()}" if is_trusted else client_address(address, "", ())

    def _displace(self) -> bool:
        """Close a connection without a running request: of the client with most, the one that is silent for longest.

        Also one of the newcomer's own client: its own old ones must not keep it out.
        """
        silent: dict[str, list[Connection]] = collections.defaultdict(list)
        for conn in self.connections:
            if conn.state in (State.READING, State.FLUSHING):
                silent[conn.client_key].append(conn)
        if not silent:
            return False
        heaviest = max(silent, key=lambda client: len(silent[client]))
        victim = min(silent[heaviest], key=lambda conn: conn.active)
        if victim.state is State.READING and victim.reader.begun:
            self._turn_away(victim)
        else:
            self._drop(victim)
        return True

    # Requests come

    def _read(self, conn: Connection) -> None:
        try:
            data = conn.raw.recv(conn.reader.appetite)
        except (BlockingIOError, InterruptedError):
            self._watch(conn, READ)
            return
        except OSError:
            data = b""
        if not data:  # the client has closed; what has begun will not be whole
            self._drop(conn)
        elif conn.state is not State.LINGERING:
            conn.heard = time.monotonic()
            conn.reader.feed(data)
            self._hold(conn)
            self._advance(conn)

    def _hold(self, conn: Connection) -> None:
        """Account for what has come of a request; it is held until it is answered."""
        self.held += conn.reader.held - conn.held
        conn.held = conn.reader.held
        if self.held > MAX_HELD:
            self._relieve()

    def _advance(self, conn: Connection) -> None:
        """Continue with what has been read: hand a request over if it is whole."""
        if conn.state is not State.READING:
            return
        try:
            request = conn.reader.next_request()
        except ParseException as error:
            self.handle_error(None, conn.sock, conn.client, error)
            self._finish(conn, keep=False)
            return
        except OSError:  # gone before it was asked to continue
            self._drop(conn)
            return
        if request is not None:
            conn.hold(request)
            self._submit(conn, request)
            return
        if conn.reader.begun:
            conn.await_rest(self.settings.REQUEST_READ_TIMEOUT, self.settings.MAX_BODY_BYTES)
        self._watch(conn, READ)

    def _submit(self, conn: Connection, request: Any) -> None:
        self._watch(conn, 0)
        conn.state = State.WAITING
        conn.deadline = time.monotonic() + self.settings.QUEUE_TIMEOUT
        conn.lane = self.express_lane if request.path in EXPRESS_PATHS else self.main_lane
        forwarded_for = ",".join(value for name, value in request.headers if name == "X-FORWARDED-FOR")
        peer = conn.client[0] if isinstance(conn.client, tuple) else ""
        client = client_address(peer, forwarded_for, self.settings.trusted_proxies)
        conn.lane.add(client or conn.client_key, conn)
        self._dispatch(conn.lane)
        # So that half of the connections remain for newcomers.
        if len(conn.lane) > self.cfg.worker_connections // 2:
            self._turn_away(conn.lane.newest_of_heaviest())

    def _dispatch(self, lane: Lane[Connection]) -> None:
        while (conn := lane.take()) is not None:
            conn.state = State.RUNNING
            conn.deadline = math.inf
            future = lane.pool.submit(self.handle, conn)
            future.add_done_callback(functools.partial(self._defer, self._answered, conn))

    # Answers go

    def _answered(self, conn: Connection, future: "Future[bool]") -> None:
        """The thread is done with a request."""
        conn.lane.done(conn)
        self._dispatch(conn.lane)
        conn.parser = None
        if conn.sock.detached:
            self._forget(conn)
        else:
            is_kept = not future.cancelled() and future.exception() is None and future.result()
            self._finish(conn, keep=bool(is_kept) and self.alive)

    def _finish(self, conn: Connection, keep: bool) -> None:
        """Send the rest of the answer, then read the next request, or close."""
        self._release(conn)
        conn.state = State.FLUSHING
        conn.deadline = math.inf  # but for the sending itself
        conn.keep = keep
        self._flush(conn)

    def _watch_pending(self, conn: Connection) -> None:
        with conn.sock.changed:
            if conn.sock.pending and conn.state in (State.RUNNING, State.FLUSHING):
                self._watch(conn, WRITE)

    def _flush(self, conn: Connection) -> None:
        with conn.sock.changed:  # nothing may become pending between looking and no longer watching
            conn.sock.flush()
            self._watch(conn, WRITE if conn.sock.pending else 0)
        if conn.state is not State.FLUSHING or conn.sock.pending:
            return
        if conn.sock.broken:
            self._drop(conn)
        elif conn.keep and self.alive:
            conn.state = State.READING
            self._hold(conn)
            conn.await_next(self.cfg.keepalive)
            self._advance(conn)
        else:
            self._hang_up(conn)

    def _turn_away(self, conn: Connection) -> None:
        """Answer that there is no room."""
        self.turned_away += 1
        if conn.state is State.WAITING:
            conn.lane.remove(conn)
        self._refuse(conn, Overloaded("too many clients; come back later"))

    def _refuse(self, conn: Connection, error: ApiError) -> None:
        """Answer without a thread, and close."""
        body = json.dumps(error_body(error, "")).encode() + b"\n"
        retry = "" if error.retry_after is None else f"Retry-After: {error.retry_after}\r\n"
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nConnection: close\r\n{retry}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):  # `_finish` sees it
            conn.sock.sendall(head.encode() + body)
        self._finish(conn, keep=False)

    # Connections go

    def _hang_up(self, conn: Connection) -> None:
        """Close our side, and give the client a while to close its own.

        Closing both at once would make the kernel drop the answer if the client still sends.
        """
        try:
            if self.lingering >= MAX_LINGERING:
                raise OSError(errno.EMFILE, "too many linger")
            conn.raw.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        conn.state = State.LINGERING
        self.lingering += 1
        conn.deadline = time.monotonic() + LINGER
        self._watch(conn, READ)

    def _drop(self, conn: Connection) -> None:
        """Close a connection at once; one that a thread answers is broken off, and closed when the thread is done."""
        if conn.state is State.CLOSED:
            return
        if conn.state is State.RUNNING:
            conn.sock.break_off()
            return
        if conn.state is State.WAITING:
            conn.lane.remove(conn)
        # A process that was forked meanwhile has the socket too: closing it alone would not reach the client.
        conn.sock.break_off()
        self._forget(conn)
        conn.raw.close()

    def _forget(self, conn: Connection) -> None:
        self._watch(conn, 0)
        self._release(conn)
        if conn.state is State.LINGERING:
            self.lingering -= 1
        conn.state = State.CLOSED
        self.connections.discard(conn)

    def _release(self, conn: Connection) -> None:
        """No longer account for a request that has been answered."""
        self.held -= conn.held
        conn.held = 0

    # Limits

    def _sweep(self) -> None:
        """End what has lasted too long."""
        now = time.monotonic()
        self._next_sweep = now + SWEEP
        for conn in list(self.connections):
            if conn.sock.pending and now > conn.sock.progress + conn.sock.timeout:
                self._guard(self._drop, conn)
            elif now > conn.deadline:
                self._guard(self._expire, conn)
        self._relieve()
        if self.alive:
            self.set_accept_enabled(True)
        if self.turned_away and now >= self._next_report:
            log.warning("%d clients were turned away or displaced: too many connections or requests", self.turned_away)
            self.turned_away = 0
            self._next_report = now + 10.0  # seconds: no flood of lines under a flood of connections

    def _expire(self, conn: Connection) -> None:
        if conn.state is State.WAITING:
            self._turn_away(conn)
        elif conn.state is State.READING and conn.reader.begun:
            self._refuse(conn, RequestTimeout("the request did not come in time"))
        else:
            self._drop(conn)

    def _relieve(self) -> None:
        """Keep the memory of slow clients within bounds: the client whose connections take most loses one."""
        waiting = (State.READING, State.WAITING)
        while self.held > MAX_HELD:
            victim = self._heaviest(lambda conn: conn.held if conn.state in waiting else 0)
            if victim is None:
                break
            self._turn_away(victim)
        while sum(conn.sock.pending for conn in self.connections) > MAX_HELD:
            victim = self._heaviest(lambda conn: conn.sock.pending)
            if victim is None:
                break
            self._drop(victim)

    def _heaviest(self, weight: Callable[[Connection], int]) -> Connection | None:
        """Return the heaviest connection of the client that weighs most; None if none weighs anything."""
        weights: dict[str, int] = collections.defaultdict(int)
        for conn in self.connections:
            weights[conn.client_key] += weight(conn)
        if not any(weights.values()):
            return None
        client = max(weights, key=lambda key: weights[key])
        return max((conn for conn in self.connections if conn.client_key == client), key=weight)


def _allow_files(count: int) -> int:
    """Raise the limit of open files as far as needed, and as the system allows; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
