"""The pages for people, and the files that they load: all from this program, none from elsewhere."""

import dataclasses
import functools
import gzip
import secrets
from pathlib import Path
from typing import Any

import rcssmin
import rjsmin
from flask import (
    Blueprint,
    Response,
    abort,
    current_app,
    jsonify,
    make_response,
    render_template,
    request,
    send_from_directory,
)
from werkzeug.utils import safe_join

from admission.access import COOKIE_AGE, PAGE_TOKEN_AGE, PageCookie
from admission.callers import Caller
from errors import ROOT, InvalidParameter, OriginNotAllowed, Unauthorized
from generation.parameters import require_text
from models.catalog import configured
from models.loading import ServedModel
from service import Service, get_service
from web.browsers import BROWSER_COOKIE, KEY_COOKIE, browser_id, is_foreign, is_secure
from web.callers import find_address
from web.doors import Door

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
STATIC = ROOT / "static"
# Scripts and styles go out without their comments and indentation, a third of them. (rjsmin does not understand a
# backtick within a template's ${}.)
MINIFIERS = {".js": (rjsmin.jsmin, "text/javascript"), ".css": (rcssmin.cssmin, "text/css")}
NODE_MODULES = ROOT / "node_modules"
# What the pages use of the packages in package-lock.json, by the name under /vendor.
PACKAGES = {
    "marked": "marked/lib",
    "katex": "katex/dist",
    "highlight": "@highlightjs/cdn-assets/es",
}
KEY_PATH = "/page/key"
DOORS = (
    Door((KEY_PATH,), cross_origin=False),
    Door(("/static/", "/vendor/"), for_programs=False, cross_origin=False, quiet=True),
    Door(("/",), for_programs=False, cross_origin=False),
)
VENDOR_AGE = 3600  # seconds that a browser need not ask again; the packages change with a release


@blueprint.get("/")
def index() -> Response:
    """The chat."""
    service = get_service(current_app)
    caller = visitor(service)
    models = [model for model in configured(service.settings.MODELS) if caller and caller.may_use(model.name)]
    if not models:
        return private_page("sign_in.html", service, caller)
    names = [model.name for model in models]
    default = service.settings.default_model
    return private_page(
        "index.html",
        service,
        caller,
        models=[page_settings(service.models.find(model.name)) for model in models],
        default_model=default if default in names else names[0],
    )


@blueprint.get("/swarm")
def swarm() -> Response:
    """Who holds which blocks, and how to add a machine."""
    service = get_service(current_app)
    caller = visitor(service)
    if caller is None:
        return private_page("sign_in.html", service, None)
    own_swarm = not service.settings.INITIAL_PEERS  # founded here, not joined
    return private_page("swarm.html", service, caller, own_swarm=own_swarm)


@blueprint.post(KEY_PATH)
def sign_in() -> Response:
    """Take a key, and keep in a cookie whose it is."""
    service = get_service(current_app)
    check_own(service)
    body = request.get_json(force=True, silent=True)
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be a JSON object")
    key = require_text(body, "key").strip()
    cookie = service.access.sign_in(key, find_address(request, service.settings))
    response = jsonify(ok=True)
    set_cookie(response, service, KEY_COOKIE, cookie, COOKIE_AGE)
    return response


@blueprint.delete(KEY_PATH)
def sign_out() -> Response:
    """Forget the key."""
    check_own(get_service(current_app))
    response = jsonify(ok=True)
    response.delete_cookie(KEY_COOKIE, path="/", httponly=True, samesite="Strict")
    return response


def check_own(service: Service) -> None:
    """Refuse requests of other sites' pages, which might try keys here or sign people out.

    :raises OriginNotAllowed:
    """
    if service.access.page_mode != "key":
        abort(404)
    if is_foreign(request, service.settings):
        raise OriginNotAllowed("only this app's own page may do this")


def visitor(service: Service) -> Caller | None:
    """Return the caller that the page is shown to; None if it has to ask for a key."""
    mode = service.access.page_mode
    if mode == "off":
        abort(404, "There is no page here. Programs find the APIs described at /docs.")
    address = find_address(request, service.settings)
    if mode == "open":
        browser = browser_id(request) or secrets.token_urlsafe(16)
        return service.access.page(service.access.page_token(browser), address)
    cookie = PageCookie(request.cookies.get(KEY_COOKIE, ""))  # whichever page sent it: no other page reads the answer
    try:
        return service.access.caller(cookie, address)
    except Unauthorized:
        return None


def private_page(template: str, service: Service, caller: Caller | None, **config: Any) -> Response:
    """Return a page that is for one browser only; it is known by a token, or by the cookie of a key."""
    if caller is not None and caller.browser:
        config["page_token"] = service.access.page_token(caller.browser)
    elif caller is not None:
        config |= {"key": caller.name, "page_token": ""}
    response = make_response(render_template(template, page_config=config))
    response.headers["Cache-Control"] = "no-store"
    if caller is not None and caller.browser:
        # So that a reloaded page finds its own sessions again, and only those.
        set_cookie(response, service, BROWSER_COOKIE, caller.browser, PAGE_TOKEN_AGE)
    return response


def set_cookie(response: Response, service: Service, name: str, value: str, age: int) -> None:
    """Keep something in the browser that no script reads and no other site's request carries."""
    secure = is_secure(request, service.settings)
    response.set_cookie(name, value, max_age=age, path="/", secure=secure, httponly=True, samesite="Strict")


def static_file(filename: str) -> Response:
    """A file of our own."""
    path = Path(safe_join(str(STATIC), filename) or "")
    if path.suffix not in MINIFIERS or not path.is_file():
        return send_from_directory(STATIC, filename)
    zipped = request.accept_encodings["gzip"] > 0
    response = Response(
        minified(path, path.stat().st_mtime_ns, zipped), content_type=f"{MINIFIERS[path.suffix][1]}; charset=utf-8"
    )
    if zipped:
        response.headers["Content-Encoding"] = "gzip"
    response.vary.add("Accept-Encoding")
    response.headers["Cache-Control"] = "no-cache"  # ask each time whether it has changed
    response.add_etag()
    response.make_conditional(request)
    return response


@functools.lru_cache(maxsize=256)  # more than there are files
def minified(path: Path, modified: int, zipped: bool) -> bytes:
    """Return a script or style without what only people read, compressed if that is wanted."""
    minify, _ = MINIFIERS[path.suffix]
    data: bytes = minify(path.read_text()).encode()
    return gzip.compress(data, mtime=0) if zipped else data


@blueprint.get("/vendor/<package>/<path:name>")
def vendor_file(package: str, name: str) -> Response:
    """A file of a package that the pages use."""
    if package not in PACKAGES:
        abort(404)
    return send_from_directory(NODE_MODULES / PACKAGES[package], name, max_age=VENDOR_AGE)


def page_settings(served: ServedModel) -> dict[str, Any]:
    """Return how the page names a model and talks to it, as far as that is known now."""
    model = served.config
    return {
        "name": model.name,
        "max_length": min(model.session_length, served.model.max_length if served.model else model.session_length),
        "title": model.shown_title,
        "chat": dataclasses.asdict(served.chat),
        "generation": dict(model.generation),
    }
