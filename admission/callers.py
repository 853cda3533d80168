"""Callers of the APIs: what they may use, and how much of it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from admission.fair_queue import FairQueue, QueueFull, WaitedTooLong
from admission.keys import Key, Limits
from admission.rates import Exceeded, whole_seconds
from errors import ModelNotAllowed, TooManyRequests
from generation.parameters import GenerationParams
from swarm.waiter import PATIENT, Waiter

if TYPE_CHECKING:
    from admission.access import Access

# Of a prompt that is not yet tokenized. An estimate is enough: in the end what was really used is counted.
CHARACTERS_PER_TOKEN = 3


class Caller:
    """A user of an API, with a key or without."""

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
        :param limits: of a caller without a key; default: none
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
        """Whose share of scarce things it uses: that of everybody with its key or, without one, its address."""
        return f"key {self._key.name}" if self._key else f"address {self._address}"

    @property
    def owner(self) -> str:
        """The owner of its sessions, which nobody else shares."""
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

        :raises ModelNotAllowed: naming the reason
        """
        if not self.may_use(model):
            reason = "this API key does not include it" if self._key else "without an API key only the page may"
            raise ModelNotAllowed(f"you may not use the model {model!r}: {reason}")

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
        :raises TooManyRequests: if there are not that many left this minute. Who has used none may reserve any number
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
        """Reserve tokens for the time of a block, which reports how many were spent; see ``reserve``."""
        usage = self.reserve(tokens, least)
        try:
            yield usage
        finally:
            usage.close()

    def _exceeded(self, limit: int, kind: str, exceeded: Exceeded) -> TooManyRequests:
        who = "this API key allows" if self._key else "without an API key each address may have"
        wait = whole_seconds(exceeded.wait)
        error = TooManyRequests(f"{who} {limit} {kind if limit > 1 else kind[:-1]} a minute; try again in {wait} s")
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
                limit = f"{self.concurrent} {answers} computed at a time"
                raise TooManyRequests(f"{who} may have {limit}: wait for one to end") from None
            try:
                yield
            finally:
                places.give_back()


class Usage:
    """Tokens that were reserved for a request. For any thread."""

    def __init__(self, settle: Callable[[int], None]) -> None:
        """:param settle: called in the end with how many were spent"""
        self._settle = settle
        self._lock = threading.Lock()
        self._spent = 0
        self._closed = False

    def spent(self, tokens: int) -> None:
        """Tell that this many more were spent."""
        with self._lock:
            self._spent += max(0, tokens)

    def close(self) -> None:
        """Give back what was not spent. May be called twice."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._settle(self._spent)


class Places:
    """Places for the answers of each client. A client without a running answer is not remembered."""

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


def tokens_of(params: GenerationParams, held: int, room: int) -> tuple[int, int]:
    """Return how many tokens a request may add to its session, and how many of them it asks for.

    :param held: tokens of the session
    :param room: tokens that it has left
    """
    prompt = 1 + len(params.inputs) // CHARACTERS_PER_TOKEN
    asked = prompt + (params.max_new_tokens or 0) if params.max_length is None else params.max_length - held
    if params.stop_sequence is None:
        most = least = asked
    else:  # it continues in rounds, to a bound or to the end of the session
        bounds = (params.max_length and asked, params.max_answer_tokens and prompt + params.max_answer_tokens)
        most, least = min([room, *(bound for bound in bounds if bound is not None)]), prompt
    return max(1, min(most, room)), max(1, min(least, room))
