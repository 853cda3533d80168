"""Who may use what, and how much of it: API keys, their models and limits. Knows nothing of routes.

Without API keys everybody may use everything but the models that are not public, which only the page may use.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict

from itsdangerous import BadSignature, TimestampSigner

from admission.callers import Caller, Places
from admission.keys import Key, Limits, default_limits, hash_key, read_keys
from admission.rates import MAX_CLIENTS, Exceeded, Rates, whole_seconds
from config import Settings
from errors import TooManyRequests, Unauthorized

# A page may stay open for a day; then it has to be loaded again.
PAGE_TOKEN_AGE = 24 * 3600  # seconds
# A person who has signed in on the page signs in again after a month.
COOKIE_AGE = 30 * 24 * 3600  # seconds
# What was signed holds the wall clock's time, which may be set back a little; what seems to come from later than that
# is refused, for it would be valid for that much longer.
CLOCK_STEP = 3600  # seconds
# From one address. A person errs a few times; at one a second a key of eight letters and digits lasts 90,000 years.
WRONG_KEYS_PER_MINUTE = 60


class PageCookie(str):
    """The page's cookie, presented in place of an API key."""


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
        # Of the page if it is open although there are keys.
        self._page_limits = default_limits(settings) if self._keys else Limits()
        self._familiar: OrderedDict[tuple[str, str], None] = OrderedDict()  # names of keys, and where they were used
        self._lock = threading.Lock()  # guards what is familiar
        # With a secret of its own a page stays valid when the program is started again.
        self._secret = settings.SECRET_KEY or secrets.token_hex()
        self._page_signer = TimestampSigner(self._secret, salt="page")
        self._cookie_signer = TimestampSigner(self._secret, salt="key of the page")

    @property
    def needs_key(self) -> bool:
        """Whether the APIs need a key."""
        return bool(self._keys)

    @property
    def stranger(self) -> Caller:
        """A caller who may use only what is public."""
        return Caller(self)

    def caller(self, presented: str | None, address: str = "") -> Caller:
        """Return the caller that presents a key, or none.

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
                raise Unauthorized("this sign-in is no longer valid: send an API key as Authorization: Bearer KEY")
            return Caller(self, self._key_of_cookie(presented), address=address)
        return Caller(self, self._key(presented, address), address=address)

    def _key(self, presented: str, address: str) -> Key:
        digest = hash_key(presented)
        # All are compared, and each in constant time: the time it takes reveals nothing.
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        # Guessing keeps out nobody who already uses a key from the same address, such as a proxy's.
        if not (found and self._is_familiar(found[0], address)) and (wait := self._tries.wait(address, "keys")):
            raise too_many_keys(wait)
        if not found:
            try:
                self._tries.take(address, "keys", WRONG_KEYS_PER_MINUTE)
            except Exceeded as exceeded:  # by another thread since we looked
                raise too_many_keys(exceeded.wait) from None
            raise Unauthorized("this API key is unknown: check it, or ask this server's operator for one")
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
        """Return the token that identifies a WebSocket as the open page's.

        :param browser: where the page is open
        """
        return self._page_signer.sign(f"page {browser}").decode()

    def page(self, token: str, address: str = "") -> Caller:
        """Return the open page as a caller.

        :param address: the client's, see ``addresses``
        :raises Unauthorized: if the token is not one of this program's, or too old, or the page is not open
        """
        if self.page_mode != "open":
            needed = "the page needs an API key: load it again"
            raise Unauthorized(needed if self.page_mode == "key" else "this server has no page")
        try:
            browser = unsign(self._page_signer, token, PAGE_TOKEN_AGE).removeprefix("page").strip()
        except BadSignature:
            raise Unauthorized("this page is too old: load it again") from None
        return Caller(self, is_page=True, browser=browser, limits=self._page_limits, address=address)

    def sign_in(self, presented: str, address: str = "") -> PageCookie:
        """Return the cookie that the page keeps in place of a key.

        :raises Unauthorized, TooManyRequests: see ``caller``
        """
        return PageCookie(self._cookie_signer.sign(self._fingerprint(self._key(presented, address))).decode())

    def _key_of_cookie(self, cookie: PageCookie) -> Key:
        try:
            fingerprint = unsign(self._cookie_signer, cookie, COOKIE_AGE)
        except BadSignature:
            raise Unauthorized("this sign-in has expired: enter the API key on the page again") from None
        for key in self._keys:
            if hmac.compare_digest(self._fingerprint(key), fingerprint):
                return key
        raise Unauthorized("the API key of this page is no longer valid: enter another one")

    def _fingerprint(self, key: Key) -> str:
        """Return what identifies a key to this program alone."""
        return hmac.new(self._secret.encode(), key.digest, hashlib.sha256).hexdigest()

    def summary(self) -> str:
        """Return who may use what."""
        apis = f"the APIs need one of {len(self._keys)} API keys" if self._keys else "the APIs are open to everybody"
        pages = {"open": "so is the page", "key": "so does the page", "off": "there is no page"}
        page = "the page is open to everybody" if self._keys and self.page_mode == "open" else pages[self.page_mode]
        return f"{apis}; {page}"


def too_many_keys(wait: float) -> TooManyRequests:
    """Return the refusal of an address that guesses keys.

    :param wait: seconds until it may try another
    """
    seconds = whole_seconds(wait)
    error = TooManyRequests(f"too many unknown API keys from this address; try again in {seconds} s")
    error.retry_after = seconds
    return error


def unsign(signer: TimestampSigner, signed: str, max_age: float) -> str:
    """Return what was signed.

    :raises BadSignature: if it was not, or too long ago
    """
    value, signed_at = signer.unsign(signed, return_timestamp=True)
    if not -CLOCK_STEP <= time.time() - signed_at.timestamp() <= max_age:
        raise BadSignature("too old")
    return value.decode()
