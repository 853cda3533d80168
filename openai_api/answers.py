"""Answers to several prompts at once, as one stream of events: the OpenAI API's lists of prompts, choices and streams.

Each prompt is computed by a thread of its own, so that a server that batches computes them together, and so that
whoever reads can do something else while nothing comes.
"""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from admission.access import Caller
from generation.loop import Chunk, TokenLogprob, generate, generate_rows, score
from generation.parameters import GenerationParams
from service import Service
from swarm.errors import Cancelled

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
    remember: bool = True  # whether the session may be kept for who goes on from it
    open_ended: bool = False  # whether the budget is what there is room for, and not what was asked for

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
    """A prompt is done with."""

    cached_tokens: int = 0  # of the prompt, how many did not have to be computed
    completion_tokens: int = 0
    unwritten: Sequence[int] = ()  # answers that have neither pieces nor scores: only the prompt's text was wanted


class Answers:
    """Computes answers in the background. Iterate for the events; in the end, or instead, ``close``."""

    def __init__(
        self, service: Service, caller: Caller, model: Any, tasks: Sequence[Task], gone: Callable[[], bool]
    ) -> None:
        """Begin.

        :param gone: whether the client has hung up; ends everything
        :raises TooManyRequests: if it would cost more tokens than the caller has left
        """
        self._service = service
        self._caller = caller
        self._model = model
        self._tasks = tasks
        self._gone = gone
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._numbers = iter(range(len(tasks)))
        workers = min(len(tasks), PROMPTS_AT_A_TIME, caller.concurrent or PROMPTS_AT_A_TIME)
        # All at once, so that a list of prompts is not refused in its midst.
        tokens = [task.tokens for task in tasks]
        self._usage = caller.reserve(sum(most for most, _ in tokens), sum(least for _, least in tokens))
        self._working = list(range(workers))  # its operations are atomic under the interpreter's lock
        for _ in range(workers):
            # In the request's context, so that the log names it. A daemon: the end of the program does not wait for it.
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(self._work,), name="answer", daemon=True).start()

    def events(self, patience: float | None = None) -> Iterator[Piece | Scores | Done | None]:
        """Yield what comes, in the order in which it comes, until all prompts are done with.

        :param patience: after so many seconds of silence yield None
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

    def _cancelled(self) -> bool:
        return self._stop.is_set() or self._gone()

    def _work(self) -> None:
        """Answer one prompt after the other, until none is left."""
        try:
            while (number := next(self._numbers, None)) is not None:  # atomic under the interpreter's lock
                if self._cancelled():
                    raise Cancelled("the client has hung up")
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
        service, cancelled = self._service, self._cancelled
        opened = service.sessions.temporary(
            self._model,
            task.length,
            rows=task.choices,
            owner=self._caller.owner,
            client=self._caller.client,
            remember=task.remember,
            cancelled=cancelled,
        )
        # The first prompt of a request may be refused for the key's limit; the others wait for their turn.
        allowed = self._caller.generating(patient=number > 0, cancelled=cancelled)
        with allowed, opened as entry, service.generating(self._caller, cancelled):
            written: list[int] = []  # an entry for each token
            try:
                self._write(entry, task, number, first, written)
            finally:
                self._usage.spent(len(task.token_ids) - entry.cached_tokens + len(written))
            return Done(entry.cached_tokens, len(written))

    def _write(self, entry: Any, task: Task, number: int, first: int, written: list[int]) -> None:
        token_ids = list(task.token_ids)
        if task.scored:
            assert task.params.logprobs is not None
            self._events.put(Scores(number, score(entry.session, token_ids, task.params.logprobs, self._cancelled)))
            token_ids = token_ids[-1:]
        elif task.choices == 1:
            token_ids = entry.recall(token_ids)
        for index, chunk in self._chunks(entry, task, token_ids) if task.budget else ():
            if chunk.finish_reason == "cancelled":
                raise Cancelled("the client has hung up")
            written += chunk.token_ids
            self._events.put(Piece(first + index, chunk))

    def _chunks(self, entry: Any, task: Task, token_ids: Sequence[int]) -> Iterator[tuple[int, Chunk]]:
        options: dict[str, Any] = {
            "budget": task.budget,
            "defaults": self._model.generation_config,
            "cancelled": self._cancelled,
        }
        if task.choices > 1:
            # The prompt's last token may be all that is left of it.
            return generate_rows(
                entry.session,
                token_ids,
                task.params,
                rows=task.choices,
                tokenizer=self._model.tokenizer,
                **options,
            )
        chunks = generate(entry.session, token_ids, task.params, detokenizer=entry.detokenizer, **options)
        return ((0, chunk) for chunk in chunks)
