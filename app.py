"""Build the app: wire the parts, map errors to answers. Importing it loads no model and starts nothing.

flask run --host=0.0.0.0 --port=5000
gunicorn app:app --bind 0.0.0.0:5000 --threads 100 --timeout 1000
"""

import atexit
import logging
import re
import time
import uuid
from collections.abc import Sequence

import click
import werkzeug.serving
from flask import Flask, Response, current_app, g, jsonify, request
from flask.typing import ResponseReturnValue
from flask_cors import CORS
from markupsafe import escape
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import http_api
import websocket_api
from config import Settings
from errors import ApiError, describe, error_body
from openai_api import routes as openai_api
from openai_api.formats import openai_error
from service import Service, get_service
from swarm.errors import SwarmError
from web import openapi as api_docs
from web import pages as page
from web import status as status_api
from web.browsers import check_host, check_origin, is_local
from web.callers import find_caller
from web.logs import set_up_logging

log = logging.getLogger("petals_chat")

# Routes for programs, which are answered in JSON whatever happens; the others are for people.
OPENAI_PREFIXES = ("/v1/", "/tokenize", "/detokenize", "/apply-template")
API_PREFIXES = ("/api/", *OPENAI_PREFIXES, "/healthz", "/readyz", "/openapi.json")
JSON_PREFIXES = (*API_PREFIXES, page.KEY_PATH)
# Those that need an API key, if there are any.
KEY_PREFIXES = ("/api/v1/", *OPENAI_PREFIXES)
# Those of them that do something although they are asked with GET.
ACTIVE_PATHS = ("/api/v1/open_inference_session", "/api/v1/close_inference_session")
# Those that cost nothing, and give something back: they are not counted.
FREE_PATHS = ("/api/v1/close_inference_session",)
# Of those, what this program's own pages ask for as well; they show themselves to be that by a token or a cookie.
PAGE_PATHS = ("/api/v1/state",)
# What is asked for again and again, or in dozens with each page: not worth a line of the log, unless it fails.
QUIET_PREFIXES = ("/static/", "/vendor/", "/healthz", "/readyz", "/api/v1/state")
# Werkzeug and Flask raise these themselves.
HTTP_CODES = {400: "invalid_parameter", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def create_app(settings: Settings | None = None) -> Flask:
    """Build the app.

    :param settings: default: from the environment
    :raises ConfigError: if a setting is wrong
    """
    settings = settings or Settings.from_environment()
    set_up_logging(settings)
    app = Flask(__name__, static_folder=None)
    app.add_url_rule("/static/<path:filename>", "static", page.static_file)
    app.config["MAX_CONTENT_LENGTH"] = settings.MAX_BODY_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["petals_chat"] = Service(settings)
    app.register_blueprint(api_docs.blueprint)
    app.register_blueprint(http_api.blueprint)
    app.register_blueprint(openai_api.blueprint)
    app.register_blueprint(page.blueprint)
    app.register_blueprint(status_api.blueprint)
    websocket_api.register(app, settings)
    paths = "|".join(prefix.strip("/") for prefix in API_PREFIXES)
    CORS(
        app,
        resources={rf"/({paths}).*": {"origins": list(settings.CORS_ORIGINS)}},
        expose_headers=["X-Request-Id", "Retry-After"],
    )
    app.before_request(begin_request)
    app.after_request(end_request)
    app.register_error_handler(Exception, handle_error)
    return app


def start(app: Flask, hosts: Sequence[str] = ()) -> None:
    """Begin to load the models, and end everything below when the program ends.

    :param hosts: addresses and names at which the app listens, as far as they are known
    """
    service = get_service(app)
    log.info("%s", service.access.summary())
    if not service.access.needs_key and (beyond := [host for host in hosts if not is_local(host)]):
        log.warning("listening at %s without API_KEYS: everybody who reaches it may use everything", ", ".join(beyond))
    service.start()
    atexit.register(service.close, grace=0)


def begin_request() -> None:
    """Give the request an id: the client's own if it sent a usable one."""
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given) else uuid.uuid4().hex
    g.started = time.monotonic()
    if request.environ.get("wsgi.multiprocess"):
        raise ApiError("the session registry lives in one process: start gunicorn with one worker and many threads")
    service = get_service(current_app)
    check_host(request, service.settings)
    if request.path.startswith(KEY_PREFIXES) and request.method != "OPTIONS":
        begin_api_request(service)
    service.start()  # under servers that tell us of no beginning


def begin_api_request(service: Service) -> None:
    """Find out who sends it, and count what costs something, before anything of it is read.

    Who opens a WebSocket is found out there: its browser sends no header.
    """
    active = request.method not in ("GET", "HEAD") or request.path in ACTIVE_PATHS
    if active:
        check_origin(request, service.settings)
    g.caller = find_caller(request, service.access, service.settings, of_page=request.path in PAGE_PATHS)
    if active and request.path not in FREE_PATHS:
        g.caller.count_request()


def end_request(response: Response) -> Response:
    """Log the request, without its query string, which may hold a prompt."""
    response.headers["X-Request-Id"] = g.get("request_id", "")
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype == "text/html":
        response.headers.setdefault("Content-Security-Policy", page.CONTENT_SECURITY_POLICY)
        response.headers["Referrer-Policy"] = "no-referrer"
    seconds = time.monotonic() - g.get("started", time.monotonic())
    quiet = response.status_code < 400 and request.path.startswith(QUIET_PREFIXES)
    level = logging.DEBUG if quiet else logging.INFO
    log.log(level, "%s %s %d %.3f s", request.method, request.path, response.status_code, seconds)
    return response


def handle_error(error: Exception) -> ResponseReturnValue:
    """Turn any exception into an answer: JSON for programs, Flask's own pages for people."""
    allowed: Sequence[str] | None = None  # methods, if it is another that was used
    if isinstance(error, HTTPException):
        if not request.path.startswith(JSON_PREFIXES):
            return error
        code = HTTP_CODES.get(error.code or 500, (error.name or "error").lower().replace(" ", "_"))
        api_error = ApiError(error.description or error.name)
        api_error.status, api_error.code = error.code or 500, code
        if isinstance(error, RequestEntityTooLarge):
            api_error.args = (f"the body is larger than {current_app.config['MAX_CONTENT_LENGTH']} bytes",)
        allowed = getattr(error, "valid_methods", None)
        error = api_error.with_traceback(error.__traceback__)
    status, code, message, retry_after = describe(error)
    if status >= 500 and not isinstance(error, (ApiError, SwarmError)):
        log.exception("request failed")
    else:
        log.info("refused: %s: %s", code, message)
    if request.path.startswith(OPENAI_PREFIXES):
        body, status = openai_error(error)
    else:
        body = error_body(error, g.get("request_id", ""), traced=get_service(current_app).settings.TRACEBACKS)
    if isinstance(error, ApiError) and not request.path.startswith(JSON_PREFIXES):
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


def served_by_flask_run() -> bool:
    """Whether this process is `flask run` and about to serve, rather than another command or the reloader's parent."""
    context = click.get_current_context(silent=True)
    if context is None or context.info_name != "run":
        return False
    reloads = context.params.get("reload")
    reloads = context.find_root().params.get("debug") if reloads is None else reloads
    return not reloads or werkzeug.serving.is_running_from_reloader()


app = create_app()
if served_by_flask_run():
    start(app, [click.get_current_context().params["host"]])
