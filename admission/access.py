"""Who may use what, and how much of it: API keys, their models and limits. Knows nothing of routes.

Without API keys everybody may use everything but the models that are not public, which only the page may use.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itsdangerous import BadSignature, TimestampSigner

from admission.addresses import client_address
from admission.fair_queue import FairQueue, QueueFull, WaitedTooLong
from admission.rates import MAX_CLIENTS, Exceeded, Rates, whole_seconds
from config import Settings
from errors import ConfigError, ModelNotAllowed, TooManyRequests, Unauthorized
from generation.parameters import GenerationParams
from swarm.waiter import PATIENT, Waiter
from web.browsers import PageCookie, page_cookie

if TYPE_CHECKING:
    from flask import Request

log = logging.getLogger(__name__)

# A page may stay open for a day; then it has to be loaded again.
PAGE_TOKEN_AGE = 24 * 3600  # seconds
# Who has signed in on the page does so again after a month.
COOKIE_AGE = 30 * 24 * 3600  # seconds
# What was signed tells the wall clock's time, which may be set back a little; what seems to come from later than that
# is refused, for it would be valid for as much longer.
CLOCK_STEP = 3600  # seconds
# From one address. A person errs a few times; at one a second a key of eight letters and digits lasts 90,000 years.
WRONG_KEYS_PER_MINUTE = 60
SHORT_KEY = 16  # characters; shorter ones are likely to be words
# Of a prompt that is not tokens yet. An estimate is enough: in the end what was really used is counted.
CHARACTERS_PER_TOKEN = 3
KEY_FIELDS = {
    "key": str,
    "name": str,
    "models": list,
    "requests_per_minute": int,
    "tokens_per_minute": int,
    "concurrent": int,
}


@dataclass(frozen=True)
class Limits:
    """How much somebody may use. 0 where there is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # of prompts and answers together
    concurrent: int = 0  # answers computed at a time


@dataclass(frozen=True)
class Key:
    """An API key: what it allows."""

    name: str
    digest: bytes  # SHA-256 of the key: digests are equally long, so that comparing them tells nothing of the key
    models: tuple[str, ...] | None  # that it may use; None: all that are public
    limits: Limits


class Caller:
    """Somebody who uses an API, with a key or without."""

    def __init__(
        self,
        access: "Access",
        key: Key | None = None,
        *,
        is_page: bool = False,
        browser: str = "",
        limits: Limits | None = None,
        address: str = "",
    ) -> None:
        """Make a caller.

        :param is_page: whether it is the page, open to everybody
        :param browser: where that page is open
        :param limits: of who has no key; default: none
        """
        self._access = access
        self._key = key
        self._is_page = is_page
        self.browser = browser
        self._limits = key.limits if key else limits or Limits()
        self._address = address

    @property
    def name(self) -> str | None:
        """Of its key, if it has one."""
        return self._key.name if self._key else None

    @property
    def client(self) -> str:
        """With whom it shares what there is too little of: everybody with the same key or, without one, address."""
        return f"key {self._key.name}" if self._key else f"address {self._address}"

    @property
    def owner(self) -> str:
        """With whom alone its sessions are shared."""
        if self._key:
            return f"key {self._key.name}"
        return f"page {self.browser}" if self._is_page else ""

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

        :raises TooManyRequests: if there were too many of them in this minute
        """
        if limit := self._limits.requests_per_minute:
            try:
                self._access.rates.take(self.client, "requests", limit)
            except Exceeded as error:
                raise self._exceeded(limit, "requests", error) from None

    def reserve(self, tokens: int, least: int | None = None) -> "Usage":
        """Reserve the tokens that a request may use; close what is returned in the end.

        :param tokens: of its prompt and its answer
        :param least: those that it needs, where the rest is not asked for but only possible; default: all
        :raises TooManyRequests: if there are not so many left in this minute. Who has used none may reserve any number
        """
        limit = self._limits.tokens_per_minute
        if not limit:
            return Usage(lambda spent: None)
        rates, client = self._access.rates, self.client
        try:
            taken = rates.take(client, "tokens", limit, tokens, least)
        except Exceeded as error:
            raise self._exceeded(limit, "tokens", error) from None
        return Usage(lambda spent: rates.settle(client, "tokens", limit, taken, spent))

    @contextlib.contextmanager
    def reserving(self, tokens: int, least: int | None = None) -> Iterator["Usage"]:
        """Reserve tokens for the time of a block, which tells how many were spent; see ``reserve``."""
        usage = self.reserve(tokens, least)
        try:
            yield usage
        finally:
            usage.close()

    def _exceeded(self, limit: int, kind: str, exceeded: Exceeded) -> TooManyRequests:
        who = "this API key allows" if self._key else "without an API key each address may have"
        wait = whole_seconds(exceeded.wait)
        error = TooManyRequests(f"{who} {limit} {kind if limit > 1 else kind[:-1]} a minute; again in {wait} s")
        error.retry_after = wait
        return error

    @property
    def concurrent(self) -> int:
        """How many answers may be computed at a time; 0: there is no limit."""
        return self._limits.concurrent

    @contextlib.contextmanager
    def generating(self, *, patient: bool = False, waiter: Waiter = PATIENT) -> Iterator[None]:
        """Count an answer that is being computed.

        :param patient: wait while there are too many
        :raises TooManyRequests: if there are too many already
        """
        if not self.concurrent:
            yield
            return
        with self._access.places.of(self.client, self.concurrent) as places:
            try:
                places.take(patient=patient, waiter=waiter)
            except (QueueFull, WaitedTooLong):
                who = "this API key" if self._key else "each address without an API key"
                answers = "answer" if self.concurrent == 1 else "answers"
                raise TooManyRequests(f"{who} may have {self.concurrent} {answers} computed at a time") from None
            try:
                yield
            finally:
                places.give_back()


class Usage:
    """Tokens that were reserved for a request. For any thread."""

    def __init__(self, settle: Callable[[int], None]) -> None:
        """:param settle: told in the end how many were spent"""
        self._settle = settle
        self._lock = threading.Lock()
        self._spent = 0
        self._closed = False

    def spent(self, tokens: int) -> None:
        """Tell that so many more were spent."""
        with self._lock:
            self._spent += max(0, tokens)

    def close(self) -> None:
        """Give back what was not spent. May be called twice."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._settle(self._spent)


class Places:
    """Places for the answers of each client. Who has no answer computed is not remembered."""

    def __init__(self, timeout: float) -> None:
        """:param timeout: seconds that a patient one may wait"""
        self._timeout = timeout
        self._lock = threading.Lock()
        self._queues: dict[str, tuple[FairQueue, int]] = {}  # with how many use it

    @contextlib.contextmanager
    def of(self, client: str, count: int) -> Iterator[FairQueue]:
        """The places of a client, for as long as it may use them."""
        with self._lock:
            queue, users = self._queues.get(client) or (FairQueue(count, max_waiting=0, timeout=self._timeout), 0)
            self._queues[client] = queue, users + 1
        try:
            yield queue
        finally:
            with self._lock:
                _, users = self._queues.pop(client)
                if users > 1:
                    self._queues[client] = queue, users - 1


class Access:
    """All API keys, and what was used with each."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys.

        :raises ConfigError: if the file of keys cannot be read
        """
        self.not_public = frozenset(settings.NON_PUBLIC_MODELS)
        self.page_mode = settings.page
        self.rates = Rates()
        self._tries = Rates()  # of addresses, with keys that are unknown; apart, so that they push out nothing else
        self.places = Places(settings.REQUEST_TIMEOUT)
        self._keys = read_keys(settings)
        # Of the page where it is open although there are keys.
        self._page_limits = default_limits(settings) if self._keys else Limits()
        self._familiar: OrderedDict[tuple[str, str], None] = OrderedDict()  # names of keys, and whence they were used
        self._lock = threading.Lock()  # guards what is familiar
        # With a secret of its own a page stays valid when the program is started anew.
        self._secret = settings.SECRET_KEY or secrets.token_hex()
        self._page_signer = TimestampSigner(self._secret, salt="page")
        self._cookie_signer = TimestampSigner(self._secret, salt="key of the page")

    @property
    def needs_key(self) -> bool:
        """Whether the APIs need a key."""
        return bool(self._keys)

    @property
    def stranger(self) -> Caller:
        """Who may use nothing but what is public."""
        return Caller(self)

    def caller(self, presented: str | None, address: str = "") -> Caller:
        """Return who presents a key, or none.

        :param presented: a key, or, as a ``PageCookie``, the page's cookie
        :param address: the client's, see ``addresses``
        :raises Unauthorized: if the key is unknown, or needed and not there
        :raises TooManyRequests: if too many unknown ones came from this address
        """
        if not self._keys:
            return Caller(self, address=address)
        if not presented:
            raise Unauthorized("an API key is needed: send it as Authorization: Bearer KEY")
        if isinstance(presented, PageCookie):
            if self.page_mode != "key":  # it is from before
                raise Unauthorized("an API key is needed: there is no page that asks for one")
            return Caller(self, self._key_of_cookie(presented), address=address)
        return Caller(self, self._key(presented, address), address=address)

    def _key(self, presented: str, address: str) -> Key:
        digest = hash_key(presented)
        # All are compared, and each in constant time: how long it takes tells nothing.
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        # Who guesses does not keep out whoever uses a key from the same address, as that of a proxy, already.
        if not (found and self._is_familiar(found[0], address)) and (wait := self._tries.wait(address, "keys")):
            error = TooManyRequests("too many unknown API keys came from this address")
            error.retry_after = whole_seconds(wait)
            raise error
        if not found:
            with contextlib.suppress(Exceeded):  # by another thread since we looked
                self._tries.take(address, "keys", WRONG_KEYS_PER_MINUTE)
            raise Unauthorized("this API key is not known here")
        self._remember(found[0], address)
        return found[0]

    def _is_familiar(self, key: Key, address: str) -> bool:
        with self._lock:
            return (key.name, address) in self._familiar

    def _remember(self, key: Key, address: str) -> None:
        with self._lock:
            self._familiar[key.name, address] = None
            self._familiar.move_to_end((key.name, address))
            if len(self._familiar) > MAX_CLIENTS:
                self._familiar.popitem(last=False)

    def page_token(self, browser: str = "") -> str:
        """Return what shows a WebSocket to be the open page's.

        :param browser: where the page is open
        """
        return self._page_signer.sign(f"page {browser}").decode()

    def page(self, token: str, address: str = "") -> Caller:
        """Return the open page as a caller.

        :param address: the client's, see ``addresses``
        :raises Unauthorized: if the token is not one of this program's, or too old, or the page is not open
        """
        if self.page_mode != "open":
            raise Unauthorized("the page needs an API key" if self.page_mode == "key" else "there is no page")
        try:
            browser = unsign(self._page_signer, token, PAGE_TOKEN_AGE).removeprefix("page").strip()
        except BadSignature:
            raise Unauthorized("this page is too old: load it again") from None
        return Caller(self, is_page=True, browser=browser, limits=self._page_limits, address=address)

    def sign_in(self, presented: str, address: str = "") -> PageCookie:
        """Return what the page keeps of a key.

        :raises Unauthorized, TooManyRequests: see ``caller``
        """
        return PageCookie(self._cookie_signer.sign(self._fingerprint(self._key(presented, address))).decode())

    def _key_of_cookie(self, cookie: PageCookie) -> Key:
        try:
            fingerprint = unsign(self._cookie_signer, cookie, COOKIE_AGE)
        except BadSignature:
            raise Unauthorized("an API key is needed: enter it on the page again") from None
        for key in self._keys:
            if hmac.compare_digest(self._fingerprint(key), fingerprint):
                return key
        raise Unauthorized("the API key of this page is not known here any more")

    def _fingerprint(self, key: Key) -> str:
        """Return what tells this program, and nobody else, which key it is."""
        return hmac.new(self._secret.encode(), key.digest, hashlib.sha256).hexdigest()

    def summary(self) -> str:
        """Return who may use what."""
        apis = f"the APIs need one of {len(self._keys)} API keys" if self._keys else "the APIs are open to everybody"
        pages = {"open": "so is the page", "key": "so does the page", "off": "there is no page"}
        page = "the page is open to everybody" if self._keys and self.page_mode == "open" else pages[self.page_mode]
        return f"{apis}; {page}"


def unsign(signer: TimestampSigner, signed: str, max_age: float) -> str:
    """Return what was signed.

    :raises BadSignature: if it was not, or too long ago
    """
    value, signed_at = signer.unsign(signed, return_timestamp=True)
    if not -CLOCK_STEP <= time.time() - signed_at.timestamp() <= max_age:
        raise BadSignature("too old")
    return value.decode()


def tokens_of(params: GenerationParams, held: int, room: int) -> tuple[int, int]:
    """Return how many tokens a request may add to its session, and how many of them it asks for.

    :param held: tokens of the session
    :param room: tokens that it has left
    """
    prompt = 1 + len(params.inputs) // CHARACTERS_PER_TOKEN
    asked = prompt + (params.max_new_tokens or 0) if params.max_length is None else params.max_length - held
    if params.stop_sequence is None:
        most = least = asked
    else:  # it goes on in rounds, to a bound or to the end of the session
        bounds = (params.max_length and asked, params.max_answer_tokens and prompt + params.max_answer_tokens)
        most, least = min([room, *(bound for bound in bounds if bound is not None)]), prompt
    return max(1, min(most, room)), max(1, min(least, room))


def find_caller(request: "Request", access: Access, settings: Settings, *, of_page: bool) -> Caller:
    """Return who sends a request.

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


def default_limits(settings: Settings) -> Limits:
    """Return the limits of whoever has none of their own."""
    return Limits(settings.KEY_REQUESTS_PER_MINUTE, settings.KEY_TOKENS_PER_MINUTE, settings.KEY_CONCURRENT)


def read_keys(settings: Settings) -> Sequence[Key]:
    """Return the keys of ``API_KEYS`` and ``API_KEYS_FILE``.

    :raises ConfigError: telling what is wrong with the file, and nothing of a key
    """
    entries: list[Any] = [{"key": key} for key in settings.API_KEYS]
    if settings.API_KEYS_FILE:
        entries += read_file(settings.API_KEYS_FILE)
        if not entries:
            raise ConfigError(f"API_KEYS_FILE={settings.API_KEYS_FILE} holds no key: everybody would be let in")
    keys = [read_key(entry, number, settings) for number, entry in enumerate(entries, 1)]
    if len({key.name for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
        raise ConfigError("API_KEYS and API_KEYS_FILE: a key or a name is there twice")
    return keys


def read_file(name: str) -> list[Any]:
    """Return what a file of keys lists.

    :raises ConfigError: if it is no list
    """
    path = Path(name).expanduser()
    try:
        found = json.loads(path.read_text())
        if path.stat().st_mode & stat.S_IROTH:
            log.warning("API_KEYS_FILE=%s can be read by every user of this machine: chmod o-r it", name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"API_KEYS_FILE={name} cannot be read as JSON: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(f"API_KEYS_FILE={name} must hold a list of keys")
    return found


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
    key, otherwise = entry["key"], default_limits(settings)
    if re.search(r"^\s|\s$|[\x00-\x1f\x7f]", key):  # in a header it could not be told
        raise ConfigError(f"{where} must neither begin nor end with a space, nor have control characters")
    limits = Limits(**{name: entry.get(name, value) for name, value in vars(otherwise).items()})
    if min(vars(limits).values()) < 0:
        raise ConfigError(f"{where}: limits must not be negative")
    digest = hash_key(key)
    name = entry.get("name") or digest.hex()[:8]
    if len(key) < SHORT_KEY:
        log.warning("the API key %r is short: of fewer than %d characters it may be guessed", name, SHORT_KEY)
    models = tuple(map(str, entry["models"])) if "models" in entry else None
    return Key(name, digest, models, limits)
