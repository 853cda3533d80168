"""The WebSocket API, /api/v2/generate: one connection, one inference session, any number of answers.

A connection holds a thread only while one of its messages is handled.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Flask, current_app, g, jsonify, request
from flask.typing import ResponseReturnValue

from admission.callers import Caller
from config import Settings
from errors import ApiError, InvalidParameter, error_body, log_failure
from generation.loop import Chunk
from generation.parameters import (
    MAX_NAME,
    GenerationParams,
    get_bool,
    get_int,
    get_text,
    parse_generation,
    require_int,
    require_text,
    with_defaults,
)
from inference_sessions import InferenceSession, State
from models.loading import ServedModel
from service import Service, get_service
from swarm.errors import Cancelled
from web.browsers import origin_host, page_cookie
from web.callers import find_address, presented_key
from web.doors import Door
from web.reply_stream import ReplyStream, Unreachable
from web.websocket import GOING_AWAY, POLICY_VIOLATION, WebSocket
from web.websocket_client import CLOSE, WebSocketClient, parse_message
from web.websocket_handshake import BadHandshake, accept_handshake
from web.websockets import Upgraded, WebSockets, websockets_of

log = logging.getLogger(__name__)
DOORS = (Door(("/api/v2/",)),)  # a key is asked for in the first message

INTERNAL_ERROR = 1011
TYPES = ("open_inference_session", "resume_inference_session", "generate", "stop", CLOSE)


def generate_stream() -> ResponseReturnValue:
    """Begin a connection."""
    service = get_service(current_app)
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    websockets = websockets_of(app)
    try:
        accepted = accept_handshake(request.environ)
    except BadHandshake as error:
        return refuse(error)
    key = presented_key(request.headers.get("Authorization")) or page_cookie(request, service.settings)
    address = find_address(request, service.settings)
    websocket = websockets.adopt(request.environ, address, accepted)
    if not origin_allowed(request.headers.get("Origin"), request.host, service.settings.WEBSOCKET_ORIGINS):
        websocket.close(POLICY_VIOLATION, "pages of this origin may not use this API")
    connection = Connection(websocket, app, g.request_id, key, address)
    websocket.start(lambda: websockets.pool.submit(address, connection.serve))
    return Upgraded(websocket)


def refuse(error: BadHandshake) -> ResponseReturnValue:
    """Answer a request that does not begin a WebSocket."""
    api_error = ApiError(str(error))
    api_error.status, api_error.code = error.status, "bad_handshake"
    log.info("refused: %s", error)
    response = jsonify(error_body(api_error, g.request_id))
    response.status_code = error.status
    response.headers.update(error.headers)
    return response


def origin_allowed(origin: str | None, host: str, allowed: Sequence[str]) -> bool:
    """Whether a browser's page of this origin may connect; programs send none."""
    return origin is None or "*" in allowed or origin in allowed or origin_host(origin) == host.lower()


@dataclass(frozen=True)
class Attached:
    """What a connection has once it has an inference session."""

    caller: Caller
    served: ServedModel
    entry: InferenceSession
    stream: ReplyStream


class Connection:
    """One open WebSocket: the protocol."""

    def __init__(self, websocket: WebSocket, app: Flask, request_id: str, key: str | None, address: str) -> None:
        self.websocket = websocket
        self.client = WebSocketClient(websocket)
        self.service: Service = get_service(app)
        self.request_id = request_id
        self._app = app
        self._streams = websockets_of(app).streams
        self._key = key  # from the handshake, or from the message that opens the session
        self._address = address
        self._caller: Caller | None = None  # set once a session was asked for
        self._attached: Attached | None = None

    def serve(self) -> None:
        """Handle the next message, or the end. Called when one has come, by one thread at a time."""
        with self._app.app_context():
            g.request_id = self.request_id  # for the log
            try:
                more = self._serve()
            except Unreachable:
                self.client.dismiss()  # if it can be reached: the session continues over another connection
                more = False
            except Exception:
                log.exception("a WebSocket is given up")
                self.websocket.close(INTERNAL_ERROR, "internal error")
                more = False
            if not more:
                self._leave()

    def _serve(self) -> bool:
        """Handle the next message; return whether there may be others.

        :raises Unreachable: if the client was lost, or has continued over another connection
        """
        if self.service.ending.is_set():
            self.websocket.close(GOING_AWAY, "the server is shutting down")
            return False
        if self._attached is not None and not self._attached.stream.serves(self.client):
            raise Unreachable
        message = self.websocket.take()
        if message is None:
            log.debug("connection closed by the client")
            return False
        held = self._handle(message)
        if not held:
            self.client.handle_pending()
        return True

    def _leave(self) -> None:
        """Leave the session, however the connection ended."""
        try:
            if self._attached is not None:
                self._attached.stream.leave(self.client)
        finally:
            self.websocket.finish()

    def _handle(self, message: str | bytes) -> bool:
        """Handle a message; return whether the next has to wait until ``handle_pending`` is called.

        :raises Unreachable: if the client is gone
        """
        try:
            request = parse_message(message)
            kind = request.get("type")
            if kind == "open_inference_session":
                self._open(request)
            elif kind == "resume_inference_session":
                return self._resume(request)
            elif kind == CLOSE:
                self._close()
            elif kind == "generate":
                self._generate(request)
            elif kind != "stop":  # a stop that came after the end of the answer
                raise InvalidParameter(f"type must be one of {', '.join(TYPES)}")
        except Unreachable:
            raise
        except Exception as error:
            self.client.deliver(self._failure(error))
        return False

    def _open(self, request: dict[str, Any]) -> None:
        max_length = require_int(request, "max_length", minimum=1)
        resumable = get_bool(request, "resumable")
        self._caller = caller = self._begin(request)
        caller.count_request()
        served = self.service.find(caller, get_text(request, "model", maximum=MAX_NAME))
        self.client.begin()
        sessions = self.service.sessions
        session_id = sessions.open(
            served.loaded,
            max_length,
            connected=True,
            owner=caller.owner,
            client=caller.client,
            on_close=self._streams.discard,
            waiter=self.client,
        )
        entry = sessions.find(session_id)
        stream = ReplyStream(self.service, entry, self.client, resumable)
        self._attach(Attached(caller, served, entry, stream))
        if not resumable:
            self.client.deliver({"ok": True})
            return
        self._streams.add(stream)
        if entry.state is State.CLOSING:  # closed meanwhile, perhaps before the stream was added
            self._streams.discard(session_id)
        timeout = self.service.settings.RESUME_TIMEOUT
        self.client.deliver({"ok": True, "session_id": session_id, "resume_timeout": timeout})

    def _attach(self, attached: Attached | None) -> None:
        self._attached = attached
        self.websocket.engaged = attached is not None  # and may be silent

    def _begin(self, request: dict[str, Any]) -> Caller:
        """Read what requests for a session have in common: the caller, and the updates it wants.

        Browsers cannot send headers with a WebSocket: the message may hold the key.
        """
        if self._attached is not None:
            raise InvalidParameter("this connection already has a session: close it, or open another connection")
        self.client.queue_updates = get_bool(request, "queue_updates")
        self.client.swarm_updates = get_bool(request, "swarm_updates")
        if token := get_text(request, "page_token"):
            return self.service.access.page(token, self._address)
        return self.service.access.caller(get_text(request, "api_key") or self._key, self._address)

    def _resume(self, request: dict[str, Any]) -> bool:
        """Resume a session whose connection was lost; its running answer is finished on this one.

        Returns whether an answer is running: the thread that computes it reads what the client sends meanwhile.
        """
        session_id = require_text(request, "session_id")
        received = require_int(request, "received", minimum=0)
        answers = get_int(request, "answers", minimum=0)
        caller = self._begin(request)
        entry = self.service.sessions.find(session_id, caller.owner)
        stream = self._streams.find(session_id)
        served = self.service.find(caller, entry.model.name)
        self.client.begin()
        # Before attaching: an answer that ends at once lets another thread continue here.
        self._caller = caller
        self._attach(Attached(caller, served, entry, stream))
        try:
            return stream.attach(self.client, received, answers)
        except BaseException:
            self._caller = None
            self._attach(None)
            raise

    def _close(self) -> None:
        if self._attached is not None:
            self._attached.stream.close(self.client)
        self._attach(None)
        self.client.deliver({"ok": True})

    def _generate(self, request: dict[str, Any]) -> None:
        if self._caller is not None:
            self._caller.count_request()
        if self._attached is not None and get_bool(request, "model_defaults"):
            request = with_defaults(request, self._attached.served.config.generation)
        params = parse_generation(request)
        if self._attached is None:
            raise InvalidParameter("open or resume an inference session before generate")
        # If the client has already asked to close the session, do not start the answers queued before that.
        self.client.begin()
        self.websocket.reset_lookahead()
        entry, stream = self._attached.entry, self._attached.stream
        with stream.answering(self.client):
            try:
                self._answer(params, self._attached.caller, entry, stream)
            except Cancelled:  # before the answer began
                stream.send(response_of([Chunk("", (), "cancelled")]), entry.length)
            except Exception as error:
                stream.send(self._failure(error))

    def _answer(self, params: GenerationParams, caller: Caller, entry: InferenceSession, stream: ReplyStream) -> None:
        wait = self.service.settings.REQUEST_TIMEOUT
        session = self.service.sessions.use(entry.session_id, wait=wait, waiter=stream)
        with self.service.answering(caller, session, params, stream) as answer:
            stream.compute()
            chunks = answer.generate(answer.encode())
            for group in rounds(stream.follow(chunks), params):
                stream.send(response_of(group), entry.length)

    def _failure(self, error: Exception) -> dict[str, Any]:
        """Log a failure and return the message for the client."""
        log_failure(log, "WebSocket request", error)
        return error_body(error, self.request_id, traced=self.service.settings.TRACEBACKS)


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


def response_of(chunks: list[Chunk]) -> dict[str, Any]:
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
    app.extensions["petals_chat_websockets"] = WebSockets(settings, get_service(app).ending)
    for upgrades in (True, False):  # requests for an upgrade are routed separately
        app.add_url_rule("/api/v2/generate", view_func=generate_stream, methods=["GET"], websocket=upgrades)
