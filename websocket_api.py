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
from urllib.parse import urlsplit

from flask import Flask, current_app, g, request
from flask_sock import Sock
from simple_websocket import ConnectionClosed
from simple_websocket import Server as WebSocket

from access import Caller, presented_key
from client_socket import limit_sends
from config import Settings
from errors import ApiError, InvalidParameter, describe, error_body
from generation import Chunk
from parameters import GenerationParams, get_bool, get_text, parse_generation, require_int
from service import Service, get_service
from swarm.errors import Cancelled, SwarmError

log = logging.getLogger(__name__)
sock = Sock()

# How often an idle connection looks whether the program is ending.
IDLE_POLL = 1.0  # seconds
# Requests that a client may send ahead while an answer is running; one that sends more does not read its answers.
MAX_PENDING, MAX_PENDING_SIZE = 64, 4_194_304  # messages, characters
GOING_AWAY, POLICY_VIOLATION = 1001, 1008  # RFC 6455, section 7.4.1


@sock.route("/api/v2/generate")
def generate_stream(websocket: WebSocket) -> None:
    """Serve a connection until either side closes it."""
    service = get_service(current_app)
    if not origin_allowed(request.headers.get("Origin"), request.host, service.settings.WEBSOCKET_ORIGINS):
        websocket.close(POLICY_VIOLATION, "pages of this origin may not use this API")
        return
    Connection(websocket, service, g.request_id, presented_key(request.headers.get("Authorization"))).serve()


def origin_allowed(origin: str | None, host: str, allowed: Sequence[str]) -> bool:
    """Whether a browser's page of this origin may connect; programs send none."""
    return origin is None or "*" in allowed or origin in allowed or urlsplit(origin).netloc == host


class Connection:
    """One open WebSocket."""

    def __init__(self, websocket: WebSocket, service: Service, request_id: str, key: str | None) -> None:
        self.websocket = websocket
        self.service = service
        self.request_id = request_id
        self.session_id: str | None = None
        self._key = key  # from the handshake, or from the message that opens the session
        self._caller: Caller | None = None
        self._pending: deque[str | bytes] = deque()  # messages that came while an answer was running
        self._stopped = False
        self._queue_updates = False
        websocket.sock = WholeSends(websocket.sock, service.settings.SEND_TIMEOUT)

    def serve(self) -> None:
        """Answer messages one after the other; close the session in the end, however the end comes."""
        try:
            while (message := self._receive()) is not None:
                self._handle(message)
            self.websocket.close(GOING_AWAY, "the server is shutting down")
        except ConnectionClosed:
            log.debug("connection closed by the client")
        finally:
            if self.session_id is not None:
                with contextlib.suppress(ApiError):  # it may have given its place to another
                    # What was computed serves who comes back, as the page does after a reload.
                    self.service.sessions.close(self.session_id, remember=True)

    def _receive(self) -> str | bytes | None:
        """Wait for the next message; None if the program is ending."""
        while not self.service.ending.is_set():
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
            elif kind == "generate":
                self._generate(request)
            elif kind != "stop":  # a stop that came after the end of the answer
                raise InvalidParameter('type must be "open_inference_session", "generate" or "stop"')
        except ConnectionClosed:
            raise
        except Exception as error:
            self._send_error(error)

    def _open(self, request: dict[str, Any]) -> None:
        max_length = require_int(request, "max_length", minimum=1)
        if self.session_id is not None:
            raise InvalidParameter("this connection has an inference session already; open another connection")
        self._caller = caller = self._authenticate(request)
        model = self.service.model(caller, get_text(request, "model"))
        self._queue_updates = get_bool(request, "queue_updates")
        self._stopped = False
        self.session_id = self.service.sessions.open(
            model, max_length, kept=True, owner=caller.owner, cancelled=self._cancelled, on_position=self._tell_position
        )
        self._send({"ok": True})

    def _authenticate(self, request: dict[str, Any]) -> Caller:
        """Return who opens a session. Browsers cannot send headers with a WebSocket: the message may hold the key."""
        if token := get_text(request, "page_token"):
            return self.service.access.page(token)
        return self.service.access.caller(get_text(request, "api_key") or self._key)

    def _generate(self, request: dict[str, Any]) -> None:
        params = parse_generation(request)
        if self.session_id is None or self._caller is None:
            raise InvalidParameter("send open_inference_session before generate")
        self._stopped = False
        self._caller.count_request()
        self.service.log_text("inputs", params.inputs)
        wait = self.service.settings.REQUEST_TIMEOUT
        try:
            with (
                self.service.sessions.use(self.session_id, wait=wait, cancelled=self._cancelled) as session,
                self.service.generating(self._caller, self._cancelled, self._tell_position),
                session.counted(self._caller.count_tokens),
            ):
                for chunks in rounds(session.generate(params, self._cancelled), params):
                    response = answer(chunks)
                    self.service.log_text("outputs", response["outputs"])
                    self._send(response)
        except Cancelled:  # before the answer began
            self._send(answer([Chunk("", (), "cancelled")]))

    def _tell_position(self, position: int) -> None:
        """Tell a client that wants to know how many are before it; others see no message that they do not expect."""
        if self._queue_updates:
            self._send({"ok": True, "queue": {"position": position}})

    def _cancelled(self) -> bool:
        """Whether the client has stopped the answer, or has gone; other messages wait for the answer to end."""
        try:
            while not self._stopped and (message := self.websocket.receive(timeout=0)) is not None:
                if is_stop(message):
                    self._stopped = True
                elif len(self._pending) < MAX_PENDING and self._pending_size() < MAX_PENDING_SIZE:
                    self._pending.append(message)
                else:
                    self.websocket.close(POLICY_VIOLATION, "too many requests sent ahead")
        except ConnectionClosed:
            return True
        return self._stopped or not self.websocket.connected

    def _pending_size(self) -> int:
        return sum(map(len, self._pending))

    def _send(self, response: dict[str, Any]) -> None:
        try:
            self.websocket.send(json.dumps(response))
        except OSError as error:
            raise ConnectionClosed(message=str(error)) from error

    def _send_error(self, error: Exception) -> None:
        status, *_ = describe(error)
        if status == 500:
            log.exception("WebSocket request failed")
        else:
            log.info("WebSocket request refused: %s", error if isinstance(error, (ApiError, SwarmError)) else status)
        self._send(error_body(error, self.request_id))


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


def is_stop(message: str | bytes) -> bool:
    """Whether a message asks to stop the running answer."""
    try:
        return parse_message(message).get("type") == "stop"
    except InvalidParameter:
        return False  # told to the client when its turn comes


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
