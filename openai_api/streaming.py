"""How answers of the OpenAI API are sent: as server-sent events while they are computed, or when they are whole."""

import contextlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flask import Response, g, jsonify, request, stream_with_context

from admission.budgets import Budget, Exhausted
from errors import InvalidParameter, TooManyRequests, log_failure
from generation.loop import Chunk, TokenLogprob
from openai_api.answers import Answers, Done, Event, Piece, Scores, Task
from openai_api.formats import Tally, Writer, openai_error
from openai_api.reading import MAX_VALUES
from openai_api.schemas import Sampling
from service import Service
from swarm.errors import Cancelled
from swarm.waiter import Waiter
from web.client_socket import RequestWaiter, client_socket, limit_sends

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel

log = logging.getLogger(__name__)

# Values that answers may report, of all requests at a time that are not streamed; those that ask for few do not count.
VALUES, FEW_VALUES = Budget(2 * MAX_VALUES), 10_000


class Reply:
    """The reply to a request."""

    def __init__(
        self, service: Service, model: "SwarmModel", writer: Writer, tasks: Sequence[Task], num_values: int
    ) -> None:
        """Make a reply; nothing is computed before ``send``.

        :param num_values: values that it may report, see ``check_work``
        """
        self._service = service
        self._model = model
        self._writer = writer
        self._tasks = tasks
        self._num_values = num_values
        self._tally = Tally(sum(len(task.token_ids) for task in tasks))

    def send(self, body: Sampling) -> Response:
        """Compute the answers and send them, as they come or together.

        :raises TooManyRequests: if there is no room for them
        """
        if not body.stream:
            return self._whole()
        if any(task.scored for task in self._tasks):
            raise InvalidParameter("echo with logprobs cannot be streamed: omit one of the three", "stream")
        return self._streamed(wants_usage=bool(body.stream_options and body.stream_options.include_usage))

    def _head(self, kind: str) -> dict[str, Any]:
        """Return what each object that is sent begins with."""
        return {
            "id": f"{self._writer.prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._model.name,
        }

    def _whole(self) -> Response:
        head = self._head(self._writer.object)
        waiter = RequestWaiter(request.environ)
        with reserve_values(self._num_values, self._service.settings.QUEUE_TIMEOUT, waiter):
            answers = Answers(self._service, g.caller, self._model, self._tasks, waiter)
            try:
                return jsonify(head | self._collect(answers.events()))
            finally:
                answers.close()

    def _collect(self, events: Iterator[Event | None]) -> dict[str, Any]:
        """Wait for all answers; return choices and usage."""
        chunks: list[list[Chunk]] = [[] for task in self._tasks for _ in range(task.choices)]
        scores: dict[int, list[TokenLogprob]] = {}
        for event in events:
            if isinstance(event, Piece):
                chunks[event.index].append(event.chunk)
            elif isinstance(event, Scores):
                scores[event.task] = event.logprobs
            elif event is not None:
                self._tally.add(event)
        each = self._tasks[0].choices
        choices = [self._writer.choice(i, found, scores.get(i // each)) for i, found in enumerate(chunks)]
        return {"choices": choices, "usage": self._tally.usage()}

    def _streamed(self, *, wants_usage: bool) -> Response:
        head = self._head(self._writer.chunk)
        settings = self._service.settings
        answers = Answers(self._service, g.caller, self._model, self._tasks, RequestWaiter(request.environ))
        try:
            events = answers.events(settings.SSE_KEEP_ALIVE)
            events = itertools.chain([next(events)], events)  # a failure to begin has a status of its own
        except BaseException:
            answers.close()
            raise
        if (sock := client_socket(request.environ)) is not None:
            limit_sends(sock, settings.SEND_TIMEOUT)
        lines = self._lines(head, answers, events, wants_usage=wants_usage)
        response = Response(stream_with_context(lines), mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold the answer back
        response.call_on_close(answers.close)
        return response

    def _lines(
        self, head: dict[str, Any], answers: Answers, events: Iterator[Event | None], *, wants_usage: bool
    ) -> Iterator[str]:
        """Yield the answers as server-sent events; end them, whatever happens."""
        if wants_usage:
            head["usage"] = None
        try:
            for choice in self._pieces(events):
                if choice is None:
                    yield ": the swarm is slow, the answer continues\n\n"  # so that no proxy cuts the line
                else:
                    yield sse(head | {"choices": [choice]})
            if wants_usage:
                yield sse(head | {"choices": [], "usage": self._tally.usage()})
            yield "data: [DONE]\n\n"
        except Cancelled:
            log.info("the client has hung up")
        except Exception as error:
            log_failure(log, "a streamed answer", error)
            yield sse(openai_error(error)[0])
            yield "data: [DONE]\n\n"
        finally:
            answers.close()

    def _pieces(self, events: Iterator[Event | None]) -> Iterator[dict[str, Any] | None]:
        """Yield what to send of the answers; None when nothing has come for a while."""
        opened: set[int] = set()
        for event in events:
            if isinstance(event, Piece):
                if event.index not in opened:
                    opened.add(event.index)
                    if (opening := self._writer.opening(event.index)) is not None:
                        yield opening
                chunk = event.chunk
                if chunk.text or chunk.finish_reason or chunk.logprob:
                    yield self._writer.piece(event.index, chunk)
            elif isinstance(event, Done):
                self._tally.add(event)
                yield from map(self._writer.empty, event.unwritten)
            else:
                yield None


@contextlib.contextmanager
def reserve_values(num_values: int, timeout: float, waiter: Waiter) -> Iterator[None]:
    """Hold memory for an answer that is sent when it is whole.

    :raises TooManyRequests: if others take it for longer than ``timeout`` seconds
    """
    try:
        with VALUES.hold(num_values if num_values > FEW_VALUES else 0, timeout, waiter):
            yield
    except Exhausted as error:
        raise TooManyRequests(f"too many large answers at a time: {error}; stream, or ask for fewer values") from None


def sse(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
