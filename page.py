"""The pages for people, and the files that they load: all from this program, none from elsewhere."""

import functools
from pathlib import Path
from typing import Any

import rcssmin
import rjsmin
from flask import Blueprint, Response, abort, current_app, render_template, request, send_from_directory
from werkzeug.utils import safe_join

from config import ModelConfig
from service import Service, get_service

blueprint = Blueprint("page", __name__)

# Nothing but what this program serves; no inline script or style; no markup from strings.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
STATIC = Path(__file__).parent / "static"
# Scripts and styles go out without their comments and indentation, a third of them. (rjsmin does not understand a
# backtick within a template's ${}.)
MINIFIERS = {".js": (rjsmin.jsmin, "text/javascript"), ".css": (rcssmin.cssmin, "text/css")}
NODE_MODULES = Path(__file__).parent / "node_modules"
# What the pages use of the packages in package-lock.json, by the name under /vendor.
PACKAGES = {
    "marked": "marked/lib",
    "katex": "katex/dist",
    "highlight": "@highlightjs/cdn-assets/es",
}
VENDOR_AGE = 3600  # seconds that a browser need not ask again; the packages change with a release


@blueprint.get("/")
def index() -> str:
    """The chat."""
    return render_template("index.html", page_config=page_config(get_service(current_app)))


@blueprint.get("/swarm")
def swarm() -> str:
    """Who holds which blocks, and how to add a machine."""
    service = get_service(current_app)
    config = {
        "page_token": service.access.page_token(),
        "own_swarm": not service.settings.INITIAL_PEERS,  # founded here, and not somebody else's
    }
    return render_template("swarm.html", page_config=config)


def static_file(filename: str) -> Response:
    """A file of our own."""
    path = Path(safe_join(str(STATIC), filename) or "")
    if path.suffix not in MINIFIERS or not path.is_file():
        return send_from_directory(STATIC, filename)
    text, content_type = minified(path, path.stat().st_mtime_ns)
    response = Response(text, content_type=f"{content_type}; charset=utf-8")
    response.headers["Cache-Control"] = "no-cache"  # ask each time whether it has changed
    response.add_etag()
    response.make_conditional(request)
    return response


@functools.lru_cache(maxsize=256)  # more than there are files
def minified(path: Path, modified: int) -> tuple[str, str]:
    """Return a script or style without what only people read, and its type."""
    minify, content_type = MINIFIERS[path.suffix]
    return minify(path.read_text()), content_type


@blueprint.get("/vendor/<package>/<path:name>")
def vendor_file(package: str, name: str) -> Response:
    """A file of a package that the pages use."""
    if package not in PACKAGES:
        abort(404)
    return send_from_directory(NODE_MODULES / PACKAGES[package], name, max_age=VENDOR_AGE)


def page_config(service: Service) -> dict[str, Any]:
    """Return what a page has to know from the beginning."""
    settings = service.settings
    return {
        "models": [describe(model) for model in settings.models()],
        "default_model": settings.default_model,
        "page_token": service.access.page_token(),
    }


def describe(model: ModelConfig) -> dict[str, Any]:
    """Return how the page names a model and talks to it."""
    return {
        "name": model.name,
        "max_length": model.session_length,
        "title": model.shown_title,
        "chat": {
            "system": model.chat.system,
            "first": model.chat.first,
            "user": model.chat.user,
            "turn_end": model.chat.turn_end,
            "stop": model.chat.stop,
        },
        "generation": dict(model.generation),
    }
