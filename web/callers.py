"""The caller and the address behind a request."""

from flask import Request

from admission.access import Access
from admission.addresses import client_address
from admission.callers import Caller
from config import Settings
from web.browsers import page_cookie


def find_caller(request: Request, access: Access, settings: Settings, *, of_page: bool) -> Caller:
    """Return the caller of a request.

    :param of_page: whether it is one that the page sends as well, which has a token or a cookie in place of a key
    :raises Unauthorized, TooManyRequests: see ``Access.caller`` and ``Access.page``
    """
    address = find_address(request, settings)
    presented = presented_key(request.headers.get("Authorization"))
    if of_page and (token := request.headers.get("X-Page-Token")):
        return access.page(token, address)
    if of_page and not presented:
        presented = page_cookie(request, settings)
    return access.caller(presented, address)


def find_address(request: Request, settings: Settings) -> str:
    """Return the address of a request's client, or of the client that asked the trusted proxies for it."""
    peer = request.environ.get("REMOTE_ADDR", "")
    return client_address(peer, request.headers.get("X-Forwarded-For", ""), settings.trusted_proxies)


def presented_key(authorization: str | None) -> str | None:
    """Return the key of an ``Authorization`` header."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None
