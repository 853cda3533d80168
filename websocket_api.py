"""The WebSocket API, /api/v2/generate: one connection, one inference session, any number of answers.

A connection holds a thread only while one of its messages is handled.
"""

import atexit
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flask import Flask, Response, current_app, g, jsonify, request
from flask.typing import ResponseReturnValue

from admission.access import Caller, find_address, presented_key, tokens_of
from admission.fair_pool import FairPool
from config import Settings
from errors import ApiError, InvalidParameter, SessionNotFound, ShuttingDown, TooManyRequests, describe, error_body
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
from inference_sessions import InferenceSession
from service import Service, get_service
from swarm.errors import Cancelled, SwarmError
from web.browsers import origin_host, page_cookie
from web.client_socket import take_socket
from web.reply_stream import Outbox, Unreachable
from web.websocket_hub import (
    CLOSING_LIMIT,
    GOING_AWAY,
    POLICY_VIOLATION,
    BadHandshake,
    Closed,
    Hub,
    Limits,
    NoRoom,
    WebSocket,
    accept_handshake,
)

log = logging.getLogger(__name__)

# Requests that a client may send ahead while an answer is running; one that sends more does not read its answers.
MAX_PENDING, MAX_PENDING_SIZE = 64, 4_194_304  # messages, bytes
ON_PURPOSE = (1000, 1005)  # normal, and without a code; a browser that reloads or closes a page sends 1001
INTERNAL_ERROR = 1011
RESUMED_ELSEWHERE = 4001  # ours
# Threads for messages whose handling waits for nothing, beside those that have a session or wait for one.
SPARE_THREADS = 8
CLOSE = "close_inference_session"


class WebSockets:
    """The open WebSockets of an app, and the threads that handle their messages."""

    def __init__(self, settings: Settings, ending: threading.Event) -> None:
        self.hub = Hub(
            Limits(
                max_websockets=settings.MAX_WEBSOCKETS,
                max_message=settings.MAX_BODY_BYTES,
                ping_interval=settings.WEBSOCKET_PING_INTERVAL,
                send_timeout=settings.SEND_TIMEOUT,
            )
        )
        # Those who have a session may all be answered, or wait for that; and so many may wait for a session.
        threads = settings.MAX_SESSIONS + 2 * settings.MAX_QUEUE + SPARE_THREADS
        self.pool = FairPool("websocket", threads)
        self._ending = ending
        self._watched = False
        self._lock = threading.Lock()

    def adopt(self, environ: Mapping[str, Any], address: str, accepted: bytes) -> WebSocket:
        """Take over the connection of a request.

        :param accepted: what its client is answered
        :raises TooManyRequests: if there are too many
        :raises ShuttingDown: if the program is ending
        :raises Cancelled: if the client has gone already
        """
        self._watch()
        try:
            return self.hub.adopt(lambda: take_socket(environ), address, accepted)
        except NoRoom as error:
            raise TooManyRequests(str(error)) from None
        except Closed as error:
            raise ShuttingDown(str(error)) from None
        except OSError as error:
            raise Cancelled(f"the client has hung up: {error}") from None

    def _watch(self) -> None:
        """Have somebody wait for the end of the program, from the first connection on."""
        with self._lock:
            watched, self._watched = self._watched, True
        if not watched:
            atexit.register(self._let_finish)
            threading.Thread(target=self._await_end, name="websockets-end", daemon=True).start()

    def _await_end(self) -> None:
        self._ending.wait()
        self.hub.shut_down()

    def _let_finish(self) -> None:
        """Let slow clients have the end of their answers, for a moment, before the program ends."""
        if self.hub.ending:
            self.hub.join(2 * CLOSING_LIMIT)


class Upgraded(Response):
    """The response to a request whose connection is the hub's: nothing that its server may write."""

    def __init__(self, websocket: WebSocket) -> None:
        super().__init__(status=101)
        self._websocket = websocket

    def __call__(self, environ: Mapping[str, Any], start_response: Any) -> Any:
        """End the request: at once, or, under servers that close the connection then, with the connection.

        :raises StopIteration: as gunicorn, and what is made like it, wants to be told that nothing is left to do
        :raises ConnectionAbortedError: as werkzeug does
        """
        if "front.detach" not in environ:
            self._websocket.wait_closed()
        if "werkzeug.socket" in environ:
            raise ConnectionAbortedError("the WebSocket was closed")
        raise StopIteration


def generate_stream() -> ResponseReturnValue:
    """Begin a connection."""
    service = get_service(current_app)
    websockets: WebSockets = current_app.extensions["petals_chat_websockets"]
    try:
        accepted = accept_handshake(request.environ)
    except BadHandshake as error:
        return refuse(error)
    key = presented_key(request.headers.get("Authorization")) or page_cookie(request, service.settings)
    address = find_address(request, service.settings)
    websocket = websockets.adopt(request.environ, address, accepted)
    if not origin_allowed(request.headers.get("Origin"), request.host, service.settings.WEBSOCKET_ORIGINS):
        websocket.close(POLICY_VIOLATION, "pages of this origin may not use this API")
    app = current_app._get_current_object()  # type: ignore[attr-defined]
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


class Connection:
    """One open WebSocket, as its session's client."""

    def __init__(self, websocket: WebSocket, app: Flask, request_id: str, key: str | None, address: str) -> None:
        self.websocket = websocket
        self.service: Service = get_service(app)
        self.request_id = request_id
        self.queue_updates = False
        self.swarm_updates = False
        self._app = app
        self._key = key  # from the handshake, or from the message that opens the session
        self._address = address
        self._caller: Caller | None = None
        self._entry: InferenceSession | None = None  # its session
        self._outbox: Outbox | None = None  # of its session
        self._stopped = False

    def serve(self) -> None:
        """Handle the next message, or the end. Called when there is one, by one thread at a time."""
        with self._app.app_context():
            g.request_id = self.request_id  # for the log
            try:
                going_on = self._serve()
            except Unreachable:
                self.dismiss()  # if it is reachable: the session goes on over another connection
                going_on = False
            except Exception:
                log.exception("a WebSocket is given up")
                self.websocket.close(INTERNAL_ERROR, "internal error")
                going_on = False
            if not going_on:
                self._leave()

    def _serve(self) -> bool:
        """Handle the next message; return whether there may be others.

        :raises Unreachable: if the client was lost, or has gone on over another connection
        """
        if self.service.ending.is_set():
            self.websocket.close(GOING_AWAY, "the server is shutting down")
            return False
        if self._outbox is not None and not self._outbox.serves(self):
            raise Unreachable
        message = self.websocket.take()
        if message is None:
            log.debug("connection closed by the client")
            return False
        held = self._handle(message)
        if not held:
            self.go_on()
        return True

    def go_on(self) -> None:
        """Handle what the client has sent meanwhile, when a thread is free. Does not wait."""
        self.websocket.engaged = self._outbox is not None
        self.websocket.done()

    def _leave(self) -> None:
        """Leave the session, however the end comes."""
        try:
            if self._outbox is not None:
                self._outbox.leave(self)
        finally:
            self.websocket.finish()

    def _handle(self, message: str | bytes) -> bool:
        """Handle a message; return whether the next has to wait until ``go_on`` is called.

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
                raise InvalidParameter('type must be "open_inference_session", "generate" or "stop"')
        except Unreachable:
            raise
        except Exception as error:
            self.deliver(self._failure(error))
        return False

    def _open(self, request: dict[str, Any]) -> None:
        max_length = require_int(request, "max_length", minimum=1)
        resumable = get_bool(request, "resumable")
        self._caller = caller = self._begin(request)
        caller.count_request()
        model = self.service.model(caller, get_text(request, "model", maximum=MAX_NAME))
        self._stopped = False
        session_id = self.service.sessions.open(
            model,
            max_length,
            kept=True,
            owner=caller.owner,
            client=caller.client,
            cancelled=self._cancelled,
            on_position=self._tell_place,
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

    def _resume(self, request: dict[str, Any]) -> bool:
        """Go on with a session whose connection was lost; its running answer ends on this one.

        Returns whether there is one: what the client sends meanwhile is read by the thread that computes it.
        """
        session_id = require_text(request, "session_id")
        received = require_int(request, "received", minimum=0)
        answers = get_int(request, "answers", minimum=0)
        caller = self._begin(request)
        entry = self.service.sessions.find(session_id, caller.owner)
        if entry.outbox is None:
            raise SessionNotFound(f"the session {session_id} is not resumable")
        caller.check_model(entry.model.name)
        self._stopped = False
        # Before it is attached: an answer that ends at once lets another thread go on here.
        self._caller, self._entry, self._outbox = caller, entry, entry.outbox
        try:
            return entry.outbox.attach(self, received, answers)
        except BaseException:
            self._caller = self._entry = self._outbox = None
            raise

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
        self._stopped = False
        self.websocket.look_anew()
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
            caller.generating(cancelled=outbox.cancelled),
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
            self.offer({"ok": True, "queue": {"position": place}})

    def _cancelled(self) -> bool:
        """Whether the client does not want to wait any more, or has gone."""
        return self.stopped() or not self.connected

    def stopped(self) -> bool:
        """Whether the client has stopped the answer; other messages wait for the answer to end."""
        while not self._stopped and (message := self.websocket.look()) is not None:
            kind = kind_of(message)
            self._stopped = kind in ("stop", CLOSE)
            if kind == "stop":
                self.websocket.withdraw()
            count, size = self.websocket.ahead
            if count > MAX_PENDING or size > MAX_PENDING_SIZE:
                self.websocket.close(POLICY_VIOLATION, "too many requests sent ahead")
        return self._stopped

    @property
    def connected(self) -> bool:
        """Whether the client is there, as far as one knows."""
        return self.websocket.connected

    @property
    def closed_on_purpose(self) -> bool:
        """Whether the client has closed the connection, and not because it leaves the page or loses its network."""
        return self.websocket.close_code in ON_PURPOSE

    def deliver(self, *messages: dict[str, Any]) -> None:
        """Send messages; wait while the client takes no data.

        :raises Unreachable: if the client is gone, or takes none for too long
        """
        try:
            self.websocket.send(*map(json.dumps, messages))
        except Closed as error:
            raise Unreachable(str(error)) from error

    def offer(self, message: dict[str, Any]) -> None:
        """Send a message, or the next one in its place if the client takes no data. Does not wait."""
        self.websocket.offer(json.dumps(message))

    def abandon(self) -> None:
        """Break the connection off: whoever sends on it is woken. Does not wait."""
        self.websocket.abandon()

    def dismiss(self) -> None:
        """Close the connection because the client has resumed its session on another one. Does not wait."""
        self.websocket.close(RESUMED_ELSEWHERE, "resumed elsewhere")

    def _failure(self, error: Exception) -> dict[str, Any]:
        """Log a failure and return what to tell the client of it."""
        status, *_ = describe(error)
        if status == 500:
            log.exception("WebSocket request failed")
        else:
            log.info("WebSocket request refused: %s", error if isinstance(error, (ApiError, SwarmError)) else status)
        return error_body(error, self.request_id, traced=self.service.settings.TRACEBACKS)


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
    app.extensions["petals_chat_websockets"] = WebSockets(settings, get_service(app).ending)
    for upgrades in (True, False):  # requests for an upgrade are routed for themselves
        app.add_url_rule("/api/v2/generate", view_func=generate_stream, methods=["GET"], websocket=upgrades)
