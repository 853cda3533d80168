"""The HTTP API, /api/v1: parse, call, format. What it promises is in the README."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

from flask import Blueprint, Response, current_app, g, jsonify, request
from werkzeug.exceptions import BadRequest

from admission.access import Usage, tokens_of
from errors import InvalidParameter, WrongModel
from generation.lengths import stateless_length
from generation.loop import encode_beginning
from generation.parameters import MAX_NAME, GenerationParams, get_text, parse_generation, require_int, require_text
from inference_sessions import InferenceSession
from service import Service, get_service
from swarm.errors import Cancelled
from web.client_socket import client_gone
from web.openapi import documented
from web.schemas import Closed, CloseRequest, Failure, GenerateRequest, OpenRequest, Outputs, SessionId

blueprint = Blueprint("http_api", __name__, url_prefix="/api/v1")
TAG = "HTTP API"


@blueprint.post("/generate")
@documented(TAG, Outputs, request=GenerateRequest, failure=Failure, forms=True)
def generate_text() -> Response:
    """Generate text, in a session opened earlier or without one."""
    values = request_values()
    params = parse_generation(values)
    service = get_service(current_app)
    service.log_text("inputs", params.inputs)
    cancelled = client_gone(request.environ)
    with (
        g.caller.generating(cancelled=cancelled),
        _session(service, values, params, cancelled) as (session, params, input_ids),
        g.caller.reserving(*tokens_of(params, session.length, session.room)) as usage,
        service.generating(g.caller, cancelled),
    ):
        outputs = _answer(session, params, input_ids, cancelled, usage)
    service.log_text("outputs", outputs)
    return jsonify(ok=True, outputs=outputs)


@blueprint.route("/open_inference_session", methods=["GET", "POST"])
@documented(TAG, SessionId, request=OpenRequest, failure=Failure, forms=True)
def open_inference_session() -> Response:
    """Open an inference session."""
    values = request_values()
    max_length = require_int(values, "max_length", minimum=1)
    service = get_service(current_app)
    model = service.model(g.caller, get_text(values, "model", maximum=MAX_NAME))
    g.caller.count_request()
    session_id = service.sessions.open(
        model, max_length, owner=g.caller.owner, client=g.caller.client, cancelled=client_gone(request.environ)
    )
    return jsonify(ok=True, session_id=session_id)


@blueprint.route("/close_inference_session", methods=["GET", "POST"])
@documented(TAG, Closed, request=CloseRequest, failure=Failure, forms=True)
def close_inference_session() -> Response:
    """Close an inference session."""
    session_id = require_text(request_values(), "session_id")
    get_service(current_app).sessions.close(session_id, owner=g.caller.owner)
    return jsonify(ok=True)


@contextlib.contextmanager
def _session(
    service: Service, values: Mapping[str, Any], params: GenerationParams, cancelled: Callable[[], bool]
) -> Iterator[tuple[InferenceSession, GenerationParams, list[int] | None]]:
    """The session that the request names, or one of its own; the parameters for it; its inputs, if they are tokens."""
    model_name, session_id = (get_text(values, name, maximum=MAX_NAME) for name in ("model", "session_id"))
    if not session_id:
        model = service.model(g.caller, model_name)
        # The session is as long as the request: known once its inputs are tokens.
        input_ids = encode_beginning(params.inputs, model.tokenizer, model.max_length)
        length = len(input_ids)
        wanted = params.max_length or length + (params.max_new_tokens or 0)
        needed = max(wanted, length)
        if params.stop_sequence is not None:
            # It may go on in rounds to the end of the session, which is what was asked for and not the room beyond.
            params = dataclasses.replace(params, max_length=needed)
        length = stateless_length(needed, model.max_length)
        owner, client = g.caller.owner, g.caller.client
        with service.sessions.temporary(model, length, owner=owner, client=client, cancelled=cancelled) as session:
            yield session, params, input_ids
        return
    wait = service.settings.REQUEST_TIMEOUT
    with service.sessions.use(session_id, wait=wait, owner=g.caller.owner, cancelled=cancelled) as session:
        if model_name and model_name != session.model.name:
            raise WrongModel(f"session {session_id} was opened for {session.model.name}, not for {model_name}")
        yield session, params, None


def _answer(
    session: InferenceSession,
    params: GenerationParams,
    input_ids: list[int] | None,
    cancelled: Callable[[], bool],
    usage: Usage,
) -> str:
    """Generate the whole answer; if that fails, or nobody is left to read it, the session is as it was."""
    with session.undone_on_error(), session.counted(usage.spent):
        chunks = list(session.generate(params, cancelled, input_ids))
        if chunks[-1].finish_reason == "cancelled":
            raise Cancelled("the client has hung up")
        return "".join(chunk.text for chunk in chunks)


def request_values() -> dict[str, Any]:
    """Return the request's parameters: from the query string, and over them those of the body, form or JSON.

    :raises InvalidParameter: if they cannot be read
    """
    values: dict[str, Any] = _decode_pairs(request.query_string, "the query string")
    if request.is_json:
        try:
            body = request.get_json()
        except (BadRequest, RecursionError):
            raise InvalidParameter("the body is not valid JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise InvalidParameter("the JSON body must be an object")
        return values | body
    if request.mimetype == "application/x-www-form-urlencoded":
        # Flask's own form parser would replace what is not UTF-8 in silence.
        return values | _decode_pairs(request.get_data(cache=False), "the form")
    return values | request.form.to_dict()


def _decode_pairs(data: bytes, what: str) -> dict[str, Any]:
    try:
        # Not only ASCII: curl -d sends what it is given, UTF-8 included, without percent-encoding.
        return dict(parse_qsl(data.decode("utf-8"), keep_blank_values=True, errors="strict"))
    except ValueError:
        raise InvalidParameter(f"{what} is not valid UTF-8") from None
