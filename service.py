"""What the transports share: settings, models and sessions, with one start and one end. Knows nothing of routes."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from admission.access import Access
from admission.callers import Caller, Usage, tokens_of
from admission.fair_queue import FairQueue, QueueFull, WaitedTooLong
from config import Settings
from errors import ModelNotFound, TooManyRequests
from generation.loop import Chunk, TokenLogprob
from generation.parameters import GenerationParams
from inference_sessions import InferenceSession, InferenceSessions
from models.loading import Models, ServedModel
from swarm.background import Loop
from swarm.client.warm_sessions import WarmSessions
from swarm.waiter import Waiter

log = logging.getLogger(__name__)

# For embedded servers to leave the swarm in order; a little more than each of them takes at most.
CLOSE_TIMEOUT = 15.0  # seconds


class Answer:
    """An answer whose turn has come."""

    def __init__(self, session: InferenceSession, params: GenerationParams, waiter: Waiter, *, noted: bool) -> None:
        """:param noted: whether ``texts`` is wanted"""
        self.session = session
        self._params = params
        self._waiter = waiter
        self._is_noted = noted
        self._pieces: dict[int, list[str]] = {}  # of each row

    @property
    def texts(self) -> list[str]:
        """The text so far of each row."""
        return ["".join(pieces) for pieces in self._pieces.values()]

    def encode(self) -> list[int]:
        """Turn the request's inputs into tokens that continue the session.

        :raises InvalidParameter, SessionLengthExceeded: if there is nothing to continue, or the text cannot fit
        """
        return self.session.encode(self._params)

    def score(self, token_ids: list[int], count: int) -> list[TokenLogprob]:
        """Return how likely each token of a prompt is, but for its first."""
        return self.session.score(token_ids, count, self._waiter)

    def generate(self, input_ids: list[int]) -> Iterator[tuple[int, Chunk]]:
        """Generate the answer; yield (row, chunk), as ``InferenceSession.generate`` does.

        :raises TooLong: at once, if it does not fit the session, which is then unchanged
        """
        chunks = self.session.generate(input_ids, self._params, self._waiter)
        return self._noted(chunks) if self._is_noted else chunks

    def _noted(self, chunks: Iterator[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
        for row, chunk in chunks:
            self._pieces.setdefault(row, []).append(chunk.text)
            yield row, chunk


class Service:
    """The program behind the routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.access = Access(settings)
        self.sessions = InferenceSessions(
            settings.MAX_SESSIONS,
            settings.SESSION_TIMEOUT,
            max_waiting=settings.MAX_QUEUE,
            queue_timeout=settings.QUEUE_TIMEOUT,
            resume_timeout=settings.RESUME_TIMEOUT,
            max_waiting_per_session=settings.MAX_WAITING_PER_SESSION,
            memory=WarmSessions(settings.WARM_SESSIONS, settings.WARM_TOKENS, settings.WARM_TIMEOUT),
            drafting=settings.DRAFTING == "auto",
        )
        self.models = Models(settings, relief=self.sessions)
        self._generations = FairQueue(
            settings.MAX_CONCURRENT_GENERATIONS, max_waiting=settings.MAX_QUEUE, timeout=settings.QUEUE_TIMEOUT
        )
        self.ending = threading.Event()  # set when the program begins to shut down
        self._lock = threading.Lock()
        self._started = False
        self._closing = False
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to load the models; may be called any number of times."""
        with self._lock:
            if self._started or self._closing:
                return
            self._started = True
        self.models.start()
        self.sessions.start()

    @contextlib.contextmanager
    def answering(
        self,
        caller: Caller,
        session: AbstractContextManager[InferenceSession],
        params: GenerationParams,
        waiter: Waiter,
        *,
        usage: Usage | None = None,
        patient: bool = False,
        undo: bool = False,
    ) -> Iterator[Answer]:
        """Give the block what an answer needs: its session, its places and the tokens that it may spend.

        They are taken in this order: the place among the answers of the caller's key, the session, the tokens, the
        place among all answers. A request with a later one never waits for an earlier one, so that no two wait for each
        other; and a key that is at its limit is refused at once, before waiting for a busy session.

        :param session: entered when its turn has come
        :param waiter: waits for all of this, and is sent its place in the queue
        :param usage: reserved already, for several answers; default: reserved here, by the request's parameters
        :param patient: wait for a place of the key, rather than be refused
        :param undo: restore the session if the block fails, so that its client can send the same request again
        :raises TooManyRequests: if too many wait already, or no place becomes free in time
        :raises Cancelled: if the wait was ended
        :raises: whatever entering the session raises
        """
        self.log_text("inputs", params.inputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(caller.generating(patient=patient, waiter=waiter))
            entry = stack.enter_context(session)
            if usage is None:
                usage = stack.enter_context(caller.reserving(*tokens_of(params, entry.length, entry.room)))
            stack.enter_context(self._place(caller.client, waiter))
            stack.enter_context(entry.counted(usage.spent))
            if undo:
                stack.enter_context(entry.undone_on_error())
            answer = Answer(entry, params, waiter, noted=self.settings.LOG_TEXTS)
            try:
                yield answer
            finally:
                for text in answer.texts:
                    self.log_text("outputs", text)

    @contextlib.contextmanager
    def _place(self, client: str, waiter: Waiter) -> Iterator[None]:
        """Hold a place among the answers computed at a time; wait for it in a fair queue."""
        try:
            self._generations.take(client=client, waiter=waiter)
        except (QueueFull, WaitedTooLong) as error:
            places = self._generations.places
            raise TooManyRequests(f"all {places} places for answers are taken: {error}") from None
        try:
            yield
        finally:
            self._generations.give_back(client)

    @property
    def loops(self) -> list[Loop]:
        """What runs in the background for as long as the program does."""
        return [*self.sessions.loops, *self.models.loops]

    def others_wait(self) -> bool:
        """Whether a client that is still connected waits for a session, or for an answer's turn."""
        return self.sessions.awaited or self._generations.awaited

    def find(self, caller: Caller, name: str | None) -> ServedModel:
        """Return a model in whatever state it is; without a name, the default model.

        ``ServedModel.loaded`` refuses one that is not ready. Models that the caller may not use are not named.

        :raises ModelNotFound, ModelNotAllowed: if there is none
        """
        name = name or self.settings.default_model
        if name not in self.models.served:
            names = ", ".join(filter(caller.may_use, self.models.served)) or "none"
            raise ModelNotFound(f"no model {name!r} is served here; you may use: {names}")
        caller.check_model(name)
        return self.models.find(name)

    def log_text(self, kind: str, text: str) -> None:
        """Log a prompt or an answer, if the operator wants that."""
        if self.settings.LOG_TEXTS:
            log.info("%s: %r", kind, text)

    def close(self, grace: float | None = None) -> None:
        """Shut down: take nothing new, let running answers finish, close everything. A second caller waits as well.

        :param grace: seconds that running answers have; default: ``SHUTDOWN_TIMEOUT``
        """
        grace = self.settings.SHUTDOWN_TIMEOUT if grace is None else grace
        self.ending.set()
        with self._lock:
            first, self._closing = not self._closing, True
        if not first:
            self._closed.wait(self.settings.SHUTDOWN_TIMEOUT + CLOSE_TIMEOUT)
            return
        try:
            if self._started:
                log.info("ending; running answers have %.0f s to finish", grace)
                self.sessions.shut_down(grace)
                self.models.close()
        finally:
            self._closed.set()


class WebApp(Protocol):
    """What holds a service: a Flask app, of which this module knows nothing."""

    extensions: dict[str, Any]


def get_service(app: WebApp) -> Service:
    """Return the service of an app."""
    found: Service = app.extensions["petals_chat"]
    return found
