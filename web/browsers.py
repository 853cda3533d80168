"""What a request says of where it comes from: the name it asks the app by, the site whose page sends it, its cookies.

Browsers send what any page asks them to. So the name that the app is asked by, which anybody's DNS may point here, and
the site of the page are checked before anything else is done.
"""

import functools
import ipaddress
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask_cors.core import probably_regex, try_match_any_pattern

from admission.access import PageCookie
from admission.addresses import is_trusted
from errors import HostNotAllowed, InvalidParameter, OriginNotAllowed

if TYPE_CHECKING:
    from flask import Request

    from config import Settings

KEY_COOKIE = "petals_chat_key"  # the key that signed in on the page: a signed fingerprint, not the key
BROWSER_COOKIE = "petals_chat_browser"  # where the page is open: a random id
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?", re.ASCII | re.IGNORECASE)


def check_host(request: "Request", settings: "Settings") -> None:
    """Refuse a name that is not the app's: with DNS rebinding a page of another site would be of the same origin.

    An address is no name; and one that only this machine has cannot be pointed here by others.

    :raises InvalidParameter, HostNotAllowed:
    """
    host = request.environ.get("HTTP_HOST", "")
    if not host:  # no browser
        return
    found = HOST.fullmatch(host)
    if found is None:
        raise InvalidParameter("the Host header is malformed")
    name = found["name"].lower().rstrip(".")
    if is_address(name) or is_local(name):
        return
    if allowed := settings.ALLOWED_HOSTS:
        fine = "*" in allowed or name in map(str.lower, allowed)
    else:  # names without a dot are local ones: none can be registered (ICANN, SAC 053)
        fine = "." not in name or not is_local(request.environ.get("SERVER_NAME", ""))
    if fine:
        return
    raise HostNotAllowed(f"this app does not answer to the name {name!r}; to allow it, set ALLOWED_HOSTS={name}")


def is_local(host: str) -> bool:
    """Whether only this machine can reach a host by this name or address."""
    host = host.strip("[]").lower()
    if is_address(host):
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def origin_host(origin: str) -> str:
    """Return the host and port of an origin; empty if it has none."""
    try:
        return without_default_port(urlsplit(origin).netloc)
    except ValueError:  # as of http://[
        return ""


def is_foreign(request: "Request", settings: "Settings") -> bool:
    """Whether a browser sends it for a page of another site. Programs send no origin."""
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site == "same-origin" or origin is None:
        return site not in (None, "same-origin", "none")
    return origin_host(origin) not in own_hosts(request, settings)


def own_hosts(request: "Request", settings: "Settings") -> tuple[str, ...]:
    """Return the names, with ports, by which the app was asked: by the client, and by its proxy."""
    hosts = [request.environ.get("HTTP_HOST", "")]
    if is_behind_proxy(request, settings):
        hosts.append(request.headers.get("X-Forwarded-Host", ""))
    return tuple(without_default_port(host) for host in hosts if host)


def without_default_port(host: str) -> str:
    """Return a host as browsers write it; proxies may name the port of http or https too."""
    return host.lower().removesuffix(":80").removesuffix(":443")


def is_secure(request: "Request", settings: "Settings") -> bool:
    """Whether the client's end of the connection is encrypted."""
    if is_behind_proxy(request, settings):
        return request.headers.get("X-Forwarded-Proto", request.scheme).split(",")[0].strip() == "https"
    return request.is_secure


def is_behind_proxy(request: "Request", settings: "Settings") -> bool:
    """Whether a proxy that is believed passes the request on."""
    return is_trusted(request.environ.get("REMOTE_ADDR", ""), settings.trusted_proxies)


def check_origin(request: "Request", settings: "Settings") -> None:
    """Refuse requests of pages whose site may not use the app: that they cannot read the answer is not enough.

    A key shows that the operator wants it; with its header browsers ask before (CORS).

    :raises OriginNotAllowed:
    """
    if "*" in settings.CORS_ORIGINS or "Authorization" in request.headers or not is_foreign(request, settings):
        return
    origin = request.headers.get("Origin")
    if origin is None or not try_match_any_pattern(origin, _patterns(settings.CORS_ORIGINS), caseSensitive=False):
        raise OriginNotAllowed(f"pages of {origin or 'other sites'} may not use this app; CORS_ORIGINS can allow them")


@functools.lru_cache(maxsize=8)  # there is one setting
def _patterns(origins: Sequence[str]) -> list[str | re.Pattern[str]]:
    """Read origins as Flask-CORS does: there may be regular expressions among them."""
    return [re.compile(origin, re.IGNORECASE) if probably_regex(origin) else origin for origin in origins]


def page_cookie(request: "Request", settings: "Settings") -> PageCookie | None:
    """Return the cookie by which the page's own requests are known. Others' carry it too, and do not count."""
    cookie = request.cookies.get(KEY_COOKIE)
    return PageCookie(cookie) if cookie and not is_foreign(request, settings) else None


def browser_id(request: "Request") -> str | None:
    """Return the id that the page gave this browser."""
    found = request.cookies.get(BROWSER_COOKIE, "")
    return found if re.fullmatch(r"[\w-]{22}", found, re.ASCII) else None  # secrets.token_urlsafe(16)
