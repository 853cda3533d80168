"""Build the app: put the doors together. Importing it loads no model and starts nothing.

flask run --host=0.0.0.0 --port=5000
gunicorn app:app --bind 0.0.0.0:5000 --threads 100 --timeout 1000
"""

import atexit
import logging
from collections.abc import Sequence

import click
import werkzeug.serving
from flask import Flask

import http_api
import websocket_api
from config import Settings
from errors import ConfigError
from openai_api import routes as openai_api
from service import Service, get_service
from web import hooks, openapi, pages, status
from web.browsers import is_local
from web.doors import Doors
from web.logs import set_up_logging

log = logging.getLogger("petals_chat")

DOORS = Doors(*http_api.DOORS, *websocket_api.DOORS, *openai_api.DOORS, *status.DOORS, *openapi.DOORS, *pages.DOORS)


def create_app(settings: Settings | None = None) -> Flask:
    """Build the app.

    :param settings: default: from the environment
    :raises ConfigError: if a setting is wrong
    """
    settings = settings or Settings.from_environment()
    set_up_logging(settings)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.MAX_BODY_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["petals_chat"] = Service(settings)
    app.add_url_rule("/static/<path:filename>", "static", pages.static_file)
    for part in (http_api, openai_api, status, openapi, pages):
        app.register_blueprint(part.blueprint)
    websocket_api.register(app, settings)
    hooks.install(app, DOORS, settings.CORS_ORIGINS)
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


def served_by_flask_run() -> bool:
    """Whether this process is `flask run` and about to serve, rather than another command or the reloader's parent."""
    context = click.get_current_context(silent=True)
    if context is None or context.info_name != "run":
        return False
    reloads = context.params.get("reload")
    reloads = context.find_root().params.get("debug") if reloads is None else reloads
    return not reloads or werkzeug.serving.is_running_from_reloader()


def create_app_for_flask() -> Flask:
    """Build the app under a command of Flask's; end it with one sentence if a setting is wrong."""
    try:
        settings = Settings.from_environment()
        if served_by_flask_run():
            settings.check_machine()
        return create_app(settings)
    except ConfigError as error:
        raise SystemExit(f"Petals Chat cannot start: {error}") from None


app = create_app_for_flask() if click.get_current_context(silent=True) else create_app()
if served_by_flask_run():
    start(app, [click.get_current_context().params["host"]])
