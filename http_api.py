"""The HTTP API, /api/v1: parse, call, format. What it promises is in docs/http-api.md."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import parse_qsl

from flask import Blueprint, Response, current_app, g, jsonify, request
from werkzeug.exceptions import BadRequest

from errors import InvalidParameter, WrongModel
from generation.lengths import needed_length, stateless_length
from generation.parameters import MAX_NAME, get_text, parse_generation, require_int, require_text
from generation.text import encode_beginning
from inference_sessions import InferenceSession
from service import Service, get_service
from swarm.errors import Cancelled
from swarm.waiter import Waiter
from web.client_socket import RequestWaiter
from web.doors import Door
from web.openapi import documented
from web.schemas import Closed, CloseRequest, Failure, GenerateRequest, OpenRequest, Outputs, SessionId

blueprint = Blueprint("http_api", __name__, url_prefix="/api/v1")
TAG = "HTTP API"
DOORS = (
    Door(
        ("/api/v1/",),
        needs_key=True,
        active=("/api/v1/open_inference_session", "/api/v1/close_inference_session"),
        free=("/api/v1/close_inference_session",),
    ),
    Door(("/api/",)),  # versions that do not exist
)


@blueprint.post("/generate")
@documented(TAG, Outputs, request=GenerateRequest, failure=Failure, forms=True)
def generate_text() -> Response:
    """Generate text, in a session opened earlier or without one."""
    values = request_values()
    params = parse_generation(values)
    service = get_service(current_app)
    waiter = RequestWaiter(request.environ)
    model_name, session_id = (get_text(values, name, maximum=MAX_NAME) for name in ("model", "session_id"))
    input_ids = None  # of an open session: encoded when its turn has come
    if session_id:
        session = named_session(service, session_id, model_name, waiter)
    else:
        model = service.find(g.caller, model_name).loaded
        input_ids = encode_beginning(params, model.tokenizer, model.max_length)
        needed = needed_length(params, len(input_ids))
        if params.stop_sequence is not None:
            # Rounds may continue to the end of the session: to the length asked for, without the room beyond.
            params = dataclasses.replace(params, max_length=needed)
        length = stateless_length(needed, model.max_length)
        session = service.sessions.temporary(model, length, owner=g.caller.owner, client=g.caller.client, waiter=waiter)
    with service.answering(g.caller, session, params, waiter, undo=True) as answer:
        if input_ids is None:
            input_ids = answer.encode()
        chunks = [chunk for _, chunk in answer.generate(input_ids)]
        if chunks[-1].finish_reason == "cancelled":
            raise Cancelled("the client has hung up")
    return jsonify(ok=True, outputs="".join(chunk.text for chunk in chunks))


@blueprint.route("/open_inference_session", methods=["GET", "POST"])
@documented(TAG, SessionId, request=OpenRequest, failure=Failure, forms=True)
def open_inference_session() -> Response:
    """Open an inference session."""
    values = request_values()
    max_length = require_int(values, "max_length", minimum=1)
    service = get_service(current_app)
    model = service.find(g.caller, get_text(values, "model", maximum=MAX_NAME)).loaded
    g.caller.count_request()
    session_id = service.sessions.open(
        model, max_length, owner=g.caller.owner, client=g.caller.client, waiter=RequestWaiter(request.environ)
    )
    return jsonify(ok=True, session_id=session_id)


@blueprint.route("/close_inference_session", methods=["GET", "POST"])
@documented(TAG, Closed, request=CloseRequest, failure=Failure, forms=True)
def close_inference_session() -> Response:
    """Close an inference session."""
    session_id = require_text(request_values(), "session_id")
    get_service(current_app).sessions.close(session_id, owner=g.caller.owner)
    return jsonify(ok=True)


def named_session(
    service: Service, session_id: str, model_name: str | None, waiter: Waiter
) -> AbstractContextManager[InferenceSession]:
    """Return a session that was opened earlier, to be entered.

    :raises SessionNotFound, WrongModel: if there is none
    """
    model = service.sessions.find(session_id, g.caller.owner).model
    if model_name and model_name != model.name:
        raise WrongModel(f"session {session_id} was opened for {model.name}, not for {model_name}")
    return service.sessions.use(session_id, wait=service.settings.REQUEST_TIMEOUT, owner=g.caller.owner, waiter=waiter)


def request_values() -> dict[str, Any]:
    """Return the request's parameters: those of the query string, overridden by those of the body, form or JSON.

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
        # Flask's own form parser would silently replace what is not UTF-8.
        return values | _decode_pairs(request.get_data(cache=False), "the form")
    return values | request.form.to_dict()


def _decode_pairs(data: bytes, what: str) -> dict[str, Any]:
    try:
        # Not only ASCII: curl -d sends what it is given, UTF-8 included, without percent-encoding.
        return dict(parse_qsl(data.decode("utf-8"), keep_blank_values=True, errors="strict"))
    except ValueError:
        raise InvalidParameter(f"{what} is not valid UTF-8") from None
