"""What happens before and after each request: its id, its caller, its line in the log, the report of a failure."""

import logging
import re
import time
import uuid
from collections.abc import Sequence

from flask import Flask, Response, current_app, g, jsonify, request
from flask.typing import ResponseReturnValue
from flask_cors import CORS
from markupsafe import escape
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from errors import ApiError, RequestTooLarge, describe, error_body, log_failure
from service import Service, get_service
from web.browsers import check_host, check_origin
from web.callers import find_caller
from web.doors import Door, Doors
from web.pages import CONTENT_SECURITY_POLICY

log = logging.getLogger("petals_chat")

# Werkzeug and Flask raise these themselves.
HTTP_CODES = {400: "invalid_parameter", 404: "not_found", 405: "method_not_allowed"}


def install(app: Flask, doors: Doors, cors_origins: Sequence[str]) -> None:
    """Install these hooks for all requests of an app."""
    app.extensions["petals_chat_doors"] = doors
    CORS(
        app,
        resources={rf"({doors.cross_origin_paths()})": {"origins": list(cors_origins)}},
        expose_headers=["X-Request-Id", "Retry-After"],
    )
    app.before_request(begin_request)
    app.after_request(end_request)
    app.register_error_handler(Exception, report_failure)


def door_of_request() -> Door:
    """Return the door at which the request has come."""
    doors: Doors = current_app.extensions["petals_chat_doors"]
    return doors.of(request.path)


def begin_request() -> None:
    """Give the request an id: the client's own if it sent a usable one."""
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given) else uuid.uuid4().hex
    g.started = time.monotonic()
    if request.environ.get("wsgi.multiprocess"):
        raise ApiError("the session registry lives in one process: start gunicorn with one worker and many threads")
    service = get_service(current_app)
    check_host(request, service.settings)
    door = door_of_request()
    if door.needs_key and request.method != "OPTIONS":
        let_in(service, door)
    service.start()  # under servers that do not report their start


def let_in(service: Service, door: Door) -> None:
    """Find the caller of the request, and count what costs something, before any of it is read.

    For WebSockets this happens in their first message: browsers send no header with them.
    """
    active = request.method not in ("GET", "HEAD") or request.path in door.active
    if active:
        check_origin(request, service.settings)
    g.caller = find_caller(request, service.access, service.settings, of_page=door.for_own_pages)
    if active and request.path not in door.free:
        g.caller.count_request()


def end_request(response: Response) -> Response:
    """Log the request, without its query string, which may hold a prompt."""
    response.headers["X-Request-Id"] = g.get("request_id", "")
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype == "text/html":
        response.headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        response.headers["Referrer-Policy"] = "no-referrer"
    seconds = time.monotonic() - g.get("started", time.monotonic())
    quiet = response.status_code < 400 and door_of_request().quiet
    level = logging.DEBUG if quiet else logging.INFO
    log.log(level, "%s %s %d %.3f s", request.method, request.path, response.status_code, seconds)
    return response


def report_failure(error: Exception) -> ResponseReturnValue:
    """Turn any exception into an answer: JSON for programs, pages for people."""
    door = door_of_request()
    allowed: Sequence[str] | None = None  # the allowed methods, if another was used
    if isinstance(error, HTTPException):
        if not door.for_programs:
            return error
        allowed = getattr(error, "valid_methods", None)
        error = as_api_error(error)
    log_failure(log, "request", error)
    status, _, message, retry_after = describe(error)
    if door.failure is not None:
        body, status = door.failure(error)
    else:
        body = error_body(error, g.get("request_id", ""), traced=get_service(current_app).settings.TRACEBACKS)
    if isinstance(error, ApiError) and not door.for_programs:
        response = Response(f"<!doctype html>\n<title>{status}</title>\n<p>{escape(message)}</p>\n")
    else:
        response = jsonify(body)
    response.status_code = status
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    if allowed:
        response.headers["Allow"] = ", ".join(sorted(allowed))  # RFC 9110, section 15.5.6
    return response


def as_api_error(error: HTTPException) -> ApiError:
    """Return the same failure as this program reports its own."""
    if isinstance(error, RequestEntityTooLarge):
        limit = current_app.config["MAX_CONTENT_LENGTH"]
        return RequestTooLarge(f"the body is larger than {limit} bytes").with_traceback(error.__traceback__)
    api_error = ApiError(error.description or error.name)
    api_error.status = error.code or 500
    api_error.code = HTTP_CODES.get(api_error.status, (error.name or "error").lower().replace(" ", "_"))
    return api_error.with_traceback(error.__traceback__)
