"""The WebSocket API, /api/v2/generate: one connection, one inference session, any number of answers."""

import contextlib
import functools
import json
import logging
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from flask import Flask, current_app, g, request
from flask_sock import Sock
from simple_websocket import ConnectionClosed
from simple_websocket import Server as WebSocket
from wsproto.connection import ConnectionState
from wsproto.utilities import LocalProtocolError

from access import Caller, find_address, presented_key, tokens_of
from browsers import origin_host, page_cookie
from client_socket import limit_sends
from config import Settings
from errors import ApiError, InvalidParameter, SessionNotFound, describe, error_body
from generation import Chunk
from inference_sessions import InferenceSession
from parameters import (
    GenerationParams,
    get_bool,
    get_int,
    get_text,
    parse_generation,
    require_int,
    require_text,
    with_defaults,
)
from resumption import Outbox, Unreachable
from service import Service, get_service
from swarm.errors import Cancelled, SwarmError

log = logging.getLogger(__name__)
sock = Sock()

# How often an idle connection looks whether the program is ending.
IDLE_POLL = 1.0  # seconds
# Requests that a client may send ahead while an answer is running; one that sends more does not read its answers.
MAX_PENDING, MAX_PENDING_SIZE = 64, 4_194_304  # messages, characters
GOING_AWAY, POLICY_VIOLATION = 1001, 1008  # RFC 6455, section 7.4.1
ON_PURPOSE = (1000, 1005)  # normal, and without a code; a browser that reloads or closes a page sends 1001
RESUMED_ELSEWHERE = 4001  # ours
DISMISSAL = 1.0  # seconds for telling that to a connection that may be dead
CLOSE = "close_inference_session"


@sock.route("/api/v2/generate")
def generate_stream(websocket: WebSocket) -> None:
    """Serve a connection until either side closes it."""
    service = get_service(current_app)
    if not origin_allowed(request.headers.get("Origin"), request.host, service.settings.WEBSOCKET_ORIGINS):
        websocket.close(POLICY_VIOLATION, "pages of this origin may not use this API")
        with contextlib.suppress(OSError):  # the client has gone
            websocket.sock.shutdown(socket.SHUT_WR)  # else it waits for the end of the connection
        return
    key = presented_key(request.headers.get("Authorization")) or page_cookie(request, service.settings)
    address = find_address(request, service.settings)
    Connection(websocket, service, g.request_id, key, address).serve()


def origin_allowed(origin: str | None, host: str, allowed: Sequence[str]) -> bool:
    """Whether a browser's page of this origin may connect; programs send none."""
    return origin is None or "*" in allowed or origin in allowed or origin_host(origin) == host.lower()


class Connection:
    """One open WebSocket."""

    def __init__(self, websocket: WebSocket, service: Service, request_id: str, key: str | None, address: str) -> None:
        self.websocket = websocket
        self.service = service
        self.request_id = request_id
        self.queue_updates = False
        self.swarm_updates = False
        self._key = key  # from the handshake, or from the message that opens the session
        self._address = address
        self._caller: Caller | None = None
        self._entry: InferenceSession | None = None  # its session
        self._outbox: Outbox | None = None  # of its session
        self._pending: deque[str | bytes] = deque()  # messages that came while an answer was running
        self._stopped = False
        self._abandoned = False
        websocket.sock = WholeSends(websocket.sock, service.settings.SEND_TIMEOUT)

    def serve(self) -> None:
        """Answer messages one after the other; leave the session in the end, however the end comes."""
        try:
            while (message := self._receive()) is not None:
                self._handle(message)
            self.websocket.close(GOING_AWAY, "the server is shutting down")
        except ConnectionClosed:
            log.debug("connection closed by the client")
        except Unreachable:
            self.dismiss()  # if it is reachable: the session goes on over another connection
        finally:
            if self._outbox is not None:
                self._outbox.leave(self)

    def _receive(self) -> str | bytes | None:
        """Wait for the next message; None if the program is ending.

        :raises Unreachable: if the client was lost, or has gone on over another connection
        """
        while not self.service.ending.is_set():
            if self._outbox is not None and not self._outbox.serves(self):
                raise Unreachable
            if self._pending:
                return self._pending.popleft()
            message = self.websocket.receive(timeout=IDLE_POLL)
            if message is not None:
                return message
        return None

    def _handle(self, message: str | bytes) -> None:
        try:
            request = parse_message(message)
            kind = request.get("type")
            if kind == "open_inference_session":
                self._open(request)
            elif kind == "resume_inference_session":
                self._resume(request)
            elif kind == CLOSE:
                self._close()
            elif kind == "generate":
                self._generate(request)
            elif kind != "stop":  # a stop that came after the end of the answer
                raise InvalidParameter('type must be "open_inference_session", "generate" or "stop"')
        except (ConnectionClosed, Unreachable):
            raise
        except Exception as error:
            self.deliver(self._failure(error))

    def _open(self, request: dict[str, Any]) -> None:
        max_length = require_int(request, "max_length", minimum=1)
        resumable = get_bool(request, "resumable")
        self._caller = caller = self._begin(request)
        caller.count_request()
        model = self.service.model(caller, get_text(request, "model"))
        self._stopped = False
        session_id = self.service.sessions.open(
            model, max_length, kept=True, owner=caller.owner, cancelled=self._cancelled, on_position=self._tell_place
        )
        self._entry = self.service.sessions.find(session_id)
        self._outbox = Outbox(self.service, self._entry, self, resumable)
        if resumable:
            self._entry.outbox = self._outbox
            timeout = self.service.settings.RESUME_TIMEOUT
            self.deliver({"ok": True, "session_id": session_id, "resume_timeout": timeout})
        else:
            self.deliver({"ok": True})

    def _begin(self, request: dict[str, Any]) -> Caller:
        """Read what requests for a session have in common: who asks, and what they want to be told.

        Browsers cannot send headers with a WebSocket: the message may hold the key.
        """
        if self._outbox is not None:
            raise InvalidParameter("this connection has an inference session already; open another connection")
        self.queue_updates = get_bool(request, "queue_updates")
        self.swarm_updates = get_bool(request, "swarm_updates")
        if token := get_text(request, "page_token"):
            return self.service.access.page(token, self._address)
        return self.service.access.caller(get_text(request, "api_key") or self._key, self._address)

    def _resume(self, request: dict[str, Any]) -> None:
        """Go on with a session whose connection was lost; its running answer ends on this one."""
        session_id = require_text(request, "session_id")
        received = require_int(request, "received", minimum=0)
        answers = get_int(request, "answers", minimum=0)
        caller = self._begin(request)
        entry = self.service.sessions.find(session_id, caller.owner)
        if entry.outbox is None:
            raise SessionNotFound(f"the session {session_id} is not resumable")
        caller.check_model(entry.model.name)
        self._stopped = False
        entry.outbox.attach(self, received, answers)
        self._caller, self._entry, self._outbox = caller, entry, entry.outbox
        self._outbox.wait_until_over(self)

    def _close(self) -> None:
        if self._outbox is not None:
            self._outbox.close(self)
        self._entry = self._outbox = None
        self.deliver({"ok": True})

    def _generate(self, request: dict[str, Any]) -> None:
        if self._caller is not None:
            self._caller.count_request()
        if self._entry is not None and get_bool(request, "model_defaults"):
            defaults = self.service.models.served[self._entry.model.name].config.generation
            request = with_defaults(request, defaults)
        params = parse_generation(request)
        if self._entry is None or self._outbox is None or self._caller is None:
            raise InvalidParameter("send open_inference_session before generate")
        # Who has asked already to close the session wants none of the answers before.
        self._stopped = any(kind_of(message) == CLOSE for message in self._pending)
        with self._outbox.answering(self):
            try:
                self._answer(params, self._entry, self._outbox, self._caller)
            except Cancelled:  # before the answer began
                self._outbox.send(answer([Chunk("", (), "cancelled")]), self._entry.length)
            except Exception as error:
                self._outbox.send(self._failure(error))

    def _answer(self, params: GenerationParams, entry: InferenceSession, outbox: Outbox, caller: Caller) -> None:
        self.service.log_text("inputs", params.inputs)
        wait = self.service.settings.REQUEST_TIMEOUT
        with (
            self.service.sessions.use(entry.session_id, wait=wait, cancelled=outbox.cancelled) as session,
            caller.reserving(*tokens_of(params, session.length, session.room)) as usage,
            self.service.generating(caller, outbox.cancelled, outbox.tell_place, present=lambda: outbox.attended),
            session.counted(usage.spent),
        ):
            outbox.compute()
            for chunks in rounds(outbox.follow(session.generate(params, outbox.cancelled)), params):
                response = answer(chunks)
                self.service.log_text("outputs", response["outputs"])
                outbox.send(response, entry.length)

    def _tell_place(self, place: int) -> None:
        """Tell a client that wants to know how many wait for a session before it."""
        if self.queue_updates:
            self.deliver({"ok": True, "queue": {"position": place}})

    def _cancelled(self) -> bool:
        """Whether the client does not want to wait any more, or has gone."""
        return self.stopped() or not self.connected

    def stopped(self) -> bool:
        """Whether the client has stopped the answer; other messages wait for the answer to end."""
        with contextlib.suppress(ConnectionClosed):
            while not self._stopped and (message := self.websocket.receive(timeout=0)) is not None:
                kind = kind_of(message)
                self._stopped = kind in ("stop", CLOSE)
                if kind == "stop":
                    break
                if len(self._pending) < MAX_PENDING and self._pending_size() < MAX_PENDING_SIZE:
                    self._pending.append(message)
                else:
                    self.websocket.close(POLICY_VIOLATION, "too many requests sent ahead")
        return self._stopped

    def _pending_size(self) -> int:
        return sum(map(len, self._pending))

    @property
    def connected(self) -> bool:
        """Whether the client is there, as far as one knows."""
        return self.websocket.connected and not self._abandoned

    @property
    def closed_on_purpose(self) -> bool:
        """Whether the client has closed the connection, and not because it leaves the page or loses its network."""
        # A connection that is lost has the code 1005 too; but then there was no closing frame.
        closed = self.websocket.ws.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.CLOSED)
        return closed and self.websocket.close_reason in ON_PURPOSE

    def deliver(self, message: dict[str, Any]) -> None:
        """Send a message.

        :raises Unreachable: if the client is gone, or takes no data
        """
        try:
            self.websocket.send(json.dumps(message))
        except (ConnectionClosed, OSError, LocalProtocolError) as error:
            self.abandon()  # a part of the message may have gone out, after which nothing can follow
            raise Unreachable(str(error)) from error

    def abandon(self) -> None:
        """Break the connection off: whoever sends or waits for data on it is woken. Does not wait."""
        self._abandoned = True
        with contextlib.suppress(OSError):
            self.websocket.sock.shutdown(socket.SHUT_RDWR)

    def dismiss(self) -> None:
        """Close the connection because the client has resumed its session on another one."""
        with contextlib.suppress(ConnectionClosed, OSError, LocalProtocolError):
            limit_sends(self.websocket.sock, DISMISSAL)
            self.websocket.close(RESUMED_ELSEWHERE, "resumed elsewhere")

    def _failure(self, error: Exception) -> dict[str, Any]:
        """Log a failure and return what to tell the client of it."""
        status, *_ = describe(error)
        if status == 500:
            log.exception("WebSocket request failed")
        else:
            log.info("WebSocket request refused: %s", error if isinstance(error, (ApiError, SwarmError)) else status)
        return error_body(error, self.request_id, traced=self.service.settings.TRACEBACKS)


class WholeSends:
    """A connection's socket, on which ``send`` sends all or fails within a limit, one message after the other.

    simple-websocket takes it that ``send`` always does; and it sends its pings from another thread.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        """Wrap a socket.

        :param timeout: seconds after which a client that takes no data is given up
        """
        self._sock = sock
        self._lock = threading.Lock()
        limit_sends(sock, timeout)

    def send(self, data: bytes) -> int:
        with self._lock:
            self._sock.sendall(data)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def parse_message(message: str | bytes) -> dict[str, Any]:
    """Read a message.

    :raises InvalidParameter: if it is not a JSON object in a text frame
    """
    if not isinstance(message, str):
        raise InvalidParameter("messages must be JSON in text frames, not binary frames")
    try:
        request = json.loads(message)
    except (ValueError, RecursionError):
        raise InvalidParameter("the message is not valid JSON") from None
    if not isinstance(request, dict):
        raise InvalidParameter("the message must be a JSON object")
    return request


def kind_of(message: str | bytes) -> Any:
    """Return the type of a message; None if it has none."""
    try:
        return parse_message(message).get("type")
    except InvalidParameter:
        return None  # told to the client when its turn comes


def rounds(chunks: Iterator[Chunk], params: GenerationParams) -> Iterator[list[Chunk]]:
    """Group the chunks of an answer into responses: one in all, or, with a stop sequence, one per round."""
    size = params.max_new_tokens if params.stop_sequence is not None else None
    group: list[Chunk] = []
    count = 0
    for chunk in chunks:
        group.append(chunk)
        count += len(chunk.token_ids)
        if chunk.finish_reason is not None or count == size:
            yield group
            group, count = [], 0


def answer(chunks: list[Chunk]) -> dict[str, Any]:
    """Return the response for the chunks of a round."""
    response: dict[str, Any] = {
        "ok": True,
        "outputs": "".join(chunk.text for chunk in chunks),
        "stop": chunks[-1].finish_reason is not None,
        "token_count": sum(len(chunk.token_ids) for chunk in chunks),
    }
    if chunks[-1].finish_reason is not None:
        response["finish_reason"] = chunks[-1].finish_reason
        response["stop_sequence"] = chunks[-1].stop_sequence
    return response


def register(app: Flask, settings: Settings) -> None:
    """Add the API to an app."""
    app.config["SOCK_SERVER_OPTIONS"] = {
        "ping_interval": settings.WEBSOCKET_PING_INTERVAL,
        "max_message_size": settings.MAX_BODY_BYTES,
        # Its reader may sit in a socket for a ping interval more; that must not keep the program from ending.
        "thread_class": functools.partial(threading.Thread, daemon=True),
    }
    sock.init_app(app)
