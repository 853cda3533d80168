"""Answers to several prompts at once, as one stream of events: the OpenAI API's lists of prompts, choices and streams.

Each prompt is computed by a thread of its own, so that a server that batches computes them together, and so that
the reader can do something else while nothing comes.
"""

import contextvars
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from admission.callers import Caller
from generation.loop import Chunk, TokenLogprob
from generation.parameters import GenerationParams
from service import Answer, Service
from swarm.errors import Cancelled
from swarm.waiter import Until, Waiter

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel

# Prompts of one request that are computed at a time: as a server computes 8 in hardly more time than 1, and others are
# left places.
PROMPTS_AT_A_TIME = 8


@dataclass(frozen=True)
class Task:
    """One prompt, and what is wanted of it."""

    token_ids: Sequence[int]
    budget: int  # tokens that each answer may have; 0: only the prompt's log-probabilities
    length: int  # tokens of the session: prompt and answer, and room for more
    params: GenerationParams
    choices: int = 1
    scored: bool = False  # whether the prompt's own log-probabilities are wanted
    keep_warm: bool = True  # whether the session may be kept for requests that continue it
    open_ended: bool = False  # whether the budget is the room there is, not a number that was asked for

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens it may cost, and how many of them it asks for."""
        most = len(self.token_ids) + self.budget * self.choices
        return most, len(self.token_ids) + 1 if self.open_ended else most


@dataclass(frozen=True)
class Piece:
    """A chunk of one answer."""

    index: int  # of the answer: those of the first prompt come first
    chunk: Chunk


@dataclass(frozen=True)
class Scores:
    """How likely the tokens of a prompt are, but for its first."""

    task: int
    logprobs: list[TokenLogprob]


@dataclass(frozen=True)
class Done:
    """A prompt is finished."""

    cached_tokens: int = 0  # of the prompt, how many did not have to be computed
    completion_tokens: int = 0
    unwritten: Sequence[int] = ()  # answers that have neither pieces nor scores: only the prompt's text was wanted


Event = Piece | Scores | Done


class Answers:
    """Computes answers in the background. Iterate for the events; in the end, or instead, ``close``."""

    def __init__(
        self, service: Service, caller: Caller, model: "SwarmModel", tasks: Sequence[Task], waiter: Waiter
    ) -> None:
        """Begin.

        :param waiter: waits for them; when it gives up, everything ends
        :raises TooManyRequests: if it would cost more tokens than the caller has left
        """
        self._service = service
        self._caller = caller
        self._model = model
        self._tasks = tasks
        self._stop = threading.Event()
        self._waiter = Until(self._stop, waiter)
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._numbers = iter(range(len(tasks)))
        workers = min(len(tasks), PROMPTS_AT_A_TIME, caller.concurrent or PROMPTS_AT_A_TIME)
        # All at once, so that a list of prompts is not refused halfway.
        tokens = [task.tokens for task in tasks]
        self._usage = caller.reserve(sum(most for most, _ in tokens), sum(least for _, least in tokens))
        self._working = list(range(workers))  # its operations are atomic under the interpreter's lock
        for _ in range(workers):
            # In the request's context, so that the log names it. A daemon: the end of the program does not wait for it.
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(self._work,), name="answer", daemon=True).start()

    def events(self, patience: float | None = None) -> Iterator[Event | None]:
        """Yield what comes, in the order in which it comes, until all prompts are finished.

        :param patience: after this many seconds of silence yield None
        :raises Exception: whatever a prompt failed with; the others are ended
        """
        left = len(self._tasks)
        while left:
            try:
                event = self._events.get(timeout=patience)
            except queue.Empty:
                yield None
                continue
            if isinstance(event, BaseException):
                self.close()
                raise event
            left -= isinstance(event, Done)
            yield event

    def close(self) -> None:
        """End what is still being computed; does not wait."""
        self._stop.set()

    def _work(self) -> None:
        """Answer one prompt after the other, until none is left."""
        try:
            while (number := next(self._numbers, None)) is not None:  # atomic under the interpreter's lock
                self._waiter.look()
                task = self._tasks[number]
                first = number * task.choices  # of each prompt there are equally many
                if task.budget or task.scored:
                    self._events.put(self._answer(number, task, first))
                else:  # only the prompt's own text is wanted
                    self._events.put(Done(unwritten=range(first, first + task.choices)))
        except BaseException as error:
            self._events.put(error)
        finally:
            if self._working.pop() == 0:  # the last to end
                self._usage.close()

    def _answer(self, number: int, task: Task, first: int) -> Done:
        session = self._service.sessions.temporary(
            self._model,
            task.length,
            rows=task.choices,
            owner=self._caller.owner,
            client=self._caller.client,
            keep_warm=task.keep_warm,
            waiter=self._waiter,
        )
        # For the log: a prompt may have come as tokens.
        inputs = self._model.tokenizer.decode(task.token_ids) if self._service.settings.LOG_TEXTS else ""
        params = replace(task.params, inputs=inputs, max_new_tokens=task.budget)
        # The first prompt of a request may be refused for the key's limit; the others wait for their turn.
        answering = self._service.answering(
            self._caller, session, params, self._waiter, usage=self._usage, patient=number > 0
        )
        with answering as answer:
            written = self._write(answer, task, number, first)
            return Done(answer.session.cached_tokens, written)

    def _write(self, answer: Answer, task: Task, number: int, first: int) -> int:
        """Put the events of a prompt; return how many tokens its answers have."""
        token_ids, written = list(task.token_ids), 0
        if task.scored:
            assert task.params.logprobs is not None
            self._events.put(Scores(number, answer.score(token_ids, task.params.logprobs)))
            token_ids = token_ids[-1:]  # which is all that is left of the prompt
            if not task.budget:
                self._usage.spent(1)  # for it: no answer begins with it
        for row, chunk in answer.generate(token_ids) if task.budget else ():
            if chunk.finish_reason == "cancelled":
                raise Cancelled("the client has hung up")
            written += len(chunk.token_ids)
            self._events.put(Piece(first + row, chunk))
        return written
