"""Who may use what, and how much of it: API keys, their models and limits. Knows nothing of routes.

Without API keys everybody may use everything but the models that are not public, which only the page may use.
"""

import contextlib
import functools
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itsdangerous import BadSignature, TimestampSigner
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from addresses import client_address
from admission import FairQueue, QueueFull, WaitedTooLong
from config import Settings
from errors import ConfigError, ModelNotAllowed, TooManyRequests, Unauthorized

if TYPE_CHECKING:
    from flask import Request

# A page may stay open for a day; then it has to be loaded again.
PAGE_TOKEN_AGE = 24 * 3600  # seconds
KEY_FIELDS = {
    "key": str,
    "name": str,
    "models": list,
    "requests_per_minute": int,
    "tokens_per_minute": int,
    "concurrent": int,
}


@dataclass(frozen=True)
class Key:
    """An API key: what it allows. Limits are 0 where there is none."""

    name: str
    digest: bytes  # SHA-256 of the key: digests are equally long, so that comparing them tells nothing of the key
    models: tuple[str, ...] | None  # that it may use; None: all that are public
    requests_per_minute: int
    tokens_per_minute: int  # of prompts and answers together
    concurrent: int  # answers computed at a time

    @functools.cached_property
    def limits(self) -> dict[str, RateLimitItem]:
        """What is counted by the minute, where there is a limit."""
        counts = {"requests": self.requests_per_minute, "tokens": self.tokens_per_minute}
        return {kind: RateLimitItemPerMinute(count) for kind, count in counts.items() if count}


class Caller:
    """Somebody who uses an API, with a key or without."""

    def __init__(self, access: "Access", key: Key | None, is_page: bool = False, address: str = "") -> None:
        self._access = access
        self._key = key
        self._is_page = is_page
        self._address = address

    @property
    def client(self) -> str:
        """With whom it shares what there is too little of: everybody with the same key or, without one, address."""
        return f"key {self._key.name}" if self._key else f"address {self._address}"

    @property
    def owner(self) -> str:
        """With whom alone its sessions are shared."""
        return f"key {self._key.name}" if self._key else ""

    def may_use(self, model: str) -> bool:
        """Whether a model is served to this caller."""
        if self._is_page:
            return True
        if self._key is not None and self._key.models is not None:
            return model in self._key.models or "*" in self._key.models
        return model not in self._access.not_public

    def check_model(self, model: str) -> None:
        """Refuse a model that is not served to this caller.

        :raises ModelNotAllowed: telling what would help
        """
        if not self.may_use(model):
            reason = "this API key may not use it" if self._key else "it is served to the chat page only"
            raise ModelNotAllowed(f"the model {model!r} is not for you: {reason}")

    def count_request(self) -> None:
        """Count a request.

        :raises TooManyRequests: if there were too many of them, or too many tokens, in this minute
        """
        if self._key is not None:
            self._access.count_request(self._key)

    def count_tokens(self, tokens: int) -> None:
        """Count tokens of a prompt or an answer; the next request may be refused for them."""
        if self._key is not None and tokens > 0:
            self._access.count_tokens(self._key, tokens)

    @property
    def concurrent(self) -> int:
        """How many answers may be computed at a time; 0: there is no limit."""
        return self._key.concurrent if self._key else 0

    @contextlib.contextmanager
    def generating(self, *, patient: bool = False, cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
        """Count an answer that is being computed.

        :param patient: wait while there are too many, until ``cancelled``
        :raises TooManyRequests: if there are too many already
        """
        places = self._access.places(self._key) if self._key is not None else None
        if places is None:
            yield
            return
        try:
            places.take(patient=patient, cancelled=cancelled)
        except (QueueFull, WaitedTooLong):
            raise TooManyRequests(f"this API key may have {places.places} answers computed at a time") from None
        try:
            yield
        finally:
            places.give_back()


class Access:
    """All API keys, and what was used with each."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys.

        :raises ConfigError: if the file of keys cannot be read
        """
        self.not_public = frozenset(settings.NON_PUBLIC_MODELS)
        self._keys = read_keys(settings)
        self._lock = threading.Lock()  # looking and counting are two steps
        self._places = {
            key.name: FairQueue(key.concurrent, max_waiting=0, timeout=settings.REQUEST_TIMEOUT)
            for key in self._keys
            if key.concurrent
        }
        # With a secret of its own a page stays valid when the program is started anew.
        self._signer = TimestampSigner(settings.SECRET_KEY or secrets.token_hex(), salt="page")

    @functools.cached_property
    def _limiter(self) -> FixedWindowRateLimiter:
        return FixedWindowRateLimiter(MemoryStorage())  # starts a thread, which an import must not

    def caller(self, presented: str | None, address: str = "") -> Caller:
        """Return who presents a key, or none.

        :param address: the client's, see ``addresses``
        :raises Unauthorized: if the key is unknown, or needed and not there
        """
        if not self._keys:
            return Caller(self, None, address=address)
        if not presented:
            raise Unauthorized("an API key is needed: send it as Authorization: Bearer KEY")
        digest = hash_key(presented)
        # All are compared, and each in constant time: how long it takes tells nothing.
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise Unauthorized("this API key is not known here")
        return Caller(self, found[0], address=address)

    def page_token(self) -> str:
        """Return what shows a WebSocket to be the page's."""
        return self._signer.sign("page").decode()

    def page(self, token: str, address: str = "") -> Caller:
        """Return the page as a caller.

        :param address: the client's, see ``addresses``
        :raises Unauthorized: if the token is not one of this program's, or too old
        """
        try:
            self._signer.unsign(token, max_age=PAGE_TOKEN_AGE)
        except BadSignature:
            raise Unauthorized("this page is too old: load it again") from None
        return Caller(self, None, is_page=True, address=address)

    def places(self, key: Key) -> FairQueue | None:
        return self._places.get(key.name)

    def count_request(self, key: Key) -> None:
        with self._lock:
            for kind, item in key.limits.items():
                if not self._limiter.test(item, key.name, kind):
                    raise self._exceeded(item, key, kind)
            self._hit(key, "requests", 1)

    def count_tokens(self, key: Key, tokens: int) -> None:
        with self._lock:
            self._hit(key, "tokens", tokens)

    def _hit(self, key: Key, kind: str, count: int) -> None:
        if (item := key.limits.get(kind)) is not None:
            self._limiter.hit(item, key.name, kind, cost=count)

    def _exceeded(self, item: RateLimitItem, key: Key, kind: str) -> TooManyRequests:
        error = TooManyRequests(f"this API key allows {item.amount} {kind} a minute")
        reset = self._limiter.get_window_stats(item, key.name, kind).reset_time
        error.retry_after = max(1, round(reset - time.time()))
        return error


def find_address(request: "Request", settings: Settings) -> str:
    """Return the address of who sends a request, or of who asked the trusted proxies for it."""
    peer = request.environ.get("REMOTE_ADDR", "")
    return client_address(peer, request.headers.get("X-Forwarded-For", ""), settings.trusted_proxies)


def presented_key(authorization: str | None) -> str | None:
    """Return the key of an ``Authorization`` header."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_keys(settings: Settings) -> Sequence[Key]:
    """Return the keys of ``API_KEYS`` and ``API_KEYS_FILE``.

    :raises ConfigError: telling what is wrong with the file, and nothing of a key
    """
    entries: list[Any] = [{"key": key} for key in settings.API_KEYS]
    if settings.API_KEYS_FILE:
        try:
            found = json.loads(Path(settings.API_KEYS_FILE).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"API_KEYS_FILE={settings.API_KEYS_FILE} cannot be read as JSON: {error}") from error
        if not isinstance(found, list):
            raise ConfigError(f"API_KEYS_FILE={settings.API_KEYS_FILE} must hold a list of keys")
        entries += found
        if not entries:
            raise ConfigError(f"API_KEYS_FILE={settings.API_KEYS_FILE} holds no key: everybody would be let in")
    keys = [read_key(entry, number, settings) for number, entry in enumerate(entries, 1)]
    if len({key.name for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
        raise ConfigError("API_KEYS and API_KEYS_FILE: a key or a name is there twice")
    return keys


def read_key(entry: Any, number: int, settings: Settings) -> Key:
    """Read one key.

    :raises ConfigError: if it is wrong
    """
    where = f"API key {number}"
    if not isinstance(entry, dict) or not entry.get("key"):
        raise ConfigError(f'{where} must be an object with a "key"')
    for name, value in entry.items():
        if name not in KEY_FIELDS:
            raise ConfigError(f"{where} has a field {name!r}; known are {', '.join(KEY_FIELDS)}")
        if not isinstance(value, KEY_FIELDS[name]) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} must be of type {KEY_FIELDS[name].__name__}")
    limits = {
        name: entry.get(name, default)
        for name, default in (
            ("requests_per_minute", settings.KEY_REQUESTS_PER_MINUTE),
            ("tokens_per_minute", settings.KEY_TOKENS_PER_MINUTE),
            ("concurrent", settings.KEY_CONCURRENT),
        )
    }
    if min(limits.values()) < 0:
        raise ConfigError(f"{where}: limits must not be negative")
    digest = hash_key(entry["key"])
    models = tuple(map(str, entry["models"])) if "models" in entry else None
    return Key(entry.get("name") or digest.hex()[:8], digest, models, **limits)
