"""The loop: tokens of a prompt in, an answer out, token by token. Every door uses this one.

It knows nothing of how logits come about (a session is anything that has the methods of ``Session``) and nothing of how
text goes out. The loop is ours, not Transformers', so that it can stream, stop exactly and be cancelled.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GenerationConfig

from generation.drafting import Drafting, Lookahead
from generation.parameters import GenerationParams
from generation.sampling import Sampler
from generation.session import Session
from generation.text import CONTEXT_TOKENS, Detokenizer, StopMatcher
from swarm.client.bounds import Logits, all_of
from swarm.errors import Cancelled
from swarm.waiter import PATIENT, Relay, Waiter

FinishReason = Literal["stop", "length", "time", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model itself: before penalties, bias, temperature and the like."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability) of the likeliest ones, likeliest first


@dataclass(frozen=True)
class Chunk:
    """What one token, or the end, added to an answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # set on the last chunk
    stop_sequence: str | None = None  # the text that ended the answer, if one did
    logprob: TokenLogprob | None = None  # of its token, if it was asked for


@torch.inference_mode()
def logprobs_of(logits: torch.Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprob]:
    """Return how likely tokens are, each after its own logits.

    :param logits: [tokens, vocabulary], float32
    :param count: how many of the likeliest tokens to name beside each
    """
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64)[:, None])[:, 0].tolist()  # there may be none
    values, indices = (found.tolist() for found in logprobs.topk(min(count, logits.shape[1])))
    return [
        TokenLogprob(token_id, logprob, tuple(zip(likely, likelihoods, strict=True)))
        for token_id, logprob, likely, likelihoods in zip(token_ids, own, indices, values, strict=True)
    ]


class TimeLimit(Relay):
    """A waiter with a time limit, which begins now."""

    def __init__(self, waiter: Waiter, seconds: float | None) -> None:
        """:param seconds: None: without a limit of its own"""
        super().__init__(waiter)
        self._deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def look(self) -> None:
        if self.over:
            raise Cancelled("the answer's time is over")
        super().look()


def generate(
    session: Session,
    input_ids: Sequence[int],
    params: GenerationParams,
    *,
    budget: int,
    detokenizers: Sequence[Detokenizer],
    defaults: GenerationConfig,
    waiter: Waiter = PATIENT,
    drafting: Drafting | None = None,
) -> Iterator[tuple[int, Chunk]]:
    """Generate an answer in each row, token by token; yield (row, chunk): one per token, a row's last with its reason.

    The tokens of a single row are added to the session, whose last token is unprocessed afterwards: continuing from
    it costs nothing. Several rows are separate answers to the same prompt, and nothing continues them.

    :param input_ids: tokens to add before; empty: continue where the session is
    :param budget: how many tokens each row may have, see ``token_budget``
    :param detokenizers: of each row; they may hold back the beginning of a character for a later request
    :param defaults: the model's own sampling parameters
    :param waiter: looked after between and during steps; when it gives up, the answer ends as "cancelled"
    :param drafting: whereby several tokens of a single row may be computed at once, if there is room for them
    :raises SwarmError: if the swarm cannot compute; the tokens so far stay in the session
    """
    if input_ids:
        for detokenizer in detokenizers:
            detokenizer.restart([*session.token_ids[-CONTEXT_TOKENS:], *input_ids])
    limit = TimeLimit(waiter, params.max_time)
    session.append(input_ids)
    rows = [
        _Row(_Writer(params, defaults, detokenizer, number), list(session.token_ids))
        for number, detokenizer in enumerate(detokenizers)
    ]
    with contextlib.ExitStack() as stack:
        ahead = None
        if drafting is not None and len(rows) == 1 and budget > 1:
            ahead = stack.enter_context(drafting.answering(session))
        yield from _write(session, rows, budget, limit, ahead)


def _write(
    session: Session, rows: Sequence["_Row"], budget: int, limit: TimeLimit, ahead: Lookahead | None
) -> Iterator[tuple[int, Chunk]]:
    """Write all rows, token by token; see ``generate``."""
    running = dict(enumerate(rows))
    for left in range(budget - 1, -1, -1):
        try:
            limit.look()
            if ahead is not None:
                logits: Sequence[Logits] = [ahead.next_logits(left, limit)]
            else:
                logits = _step(session, rows, limit, is_first=left == budget - 1)
        except Cancelled:
            for number, row in running.items():
                yield number, row.writer.end("time" if limit.over else "cancelled")
            return
        for number, row in list(running.items()):
            chunk = row.writer.write(logits[number], row.token_ids, is_last=left == 0)
            row.token_ids.extend(chunk.token_ids)
            if len(rows) == 1:
                session.append(chunk.token_ids)
            if chunk.finish_reason is not None:
                del running[number]
            yield number, chunk
        if not running:
            return


def _step(session: Session, rows: Sequence["_Row"], waiter: Waiter, *, is_first: bool) -> Sequence[Logits]:
    """Return the logits of each row's next token: [vocabulary], float32, or what is known of them."""
    if len(rows) == 1 or is_first:
        return [session.step_bounded(waiter=waiter)] * len(rows)
    # Rows that have ended repeat their last token; nobody sees the result.
    return session.step_rows_bounded([row.token_ids[-1] for row in rows], waiter=waiter)


def score(session: Session, token_ids: Sequence[int], count: int, waiter: Waiter = PATIENT) -> list[TokenLogprob]:
    """Process a prompt, all but its last token, and return how likely each of its tokens is after those before it.

    :param session: without tokens
    :param count: how many of the likeliest tokens to name beside each
    :returns: one entry less than there are tokens: the first has nothing before it
    """
    found: list[TokenLogprob] = []
    if len(token_ids) > 1:
        for logits in session.step_each(token_ids[:-1], waiter=waiter):
            found += logprobs_of(logits, token_ids[len(found) + 1 : len(found) + 1 + len(logits)], count)
    return found


@dataclass(frozen=True)
class _Row:
    """An answer that is being written, and its tokens with those before it."""

    writer: "_Writer"
    token_ids: list[int]


class _Writer:
    """Writes one answer: chooses a token from logits, and makes a chunk of it."""

    def __init__(
        self, params: GenerationParams, defaults: GenerationConfig, detokenizer: Detokenizer, row: int = 0
    ) -> None:
        self._sampler, self._matcher = Sampler(params, defaults, row), StopMatcher(params.stop_sequences)
        self._ends = end_tokens(defaults)
        self._detokenizer = detokenizer
        self._logprobs = params.logprobs

    def write(self, logits: Logits, token_ids: Sequence[int], *, is_last: bool) -> Chunk:
        """Choose the token that follows ``token_ids``.

        :param logits: [vocabulary], float32, or what is known of them
        :param is_last: whether the answer ends here in any case
        """
        logprob = None
        if self._logprobs is None:
            token_id = self._sampler.choose(logits, token_ids)
        else:  # they need all logits
            logits = all_of(logits)
            token_id = self._sampler.choose(logits, token_ids)
            logprob = logprobs_of(logits[None], [token_id], self._logprobs)[0]
        is_end = token_id in self._ends
        text, stop = self._matcher.feed(self._detokenizer.flush() if is_end else self._detokenizer.add(token_id))
        if stop is None and is_end:
            text, stop = text + self._matcher.flush(), self._detokenizer.spell(token_id)
        if stop is not None:
            self._detokenizer.restart([*token_ids[-CONTEXT_TOKENS:], token_id])
            return Chunk(text, (token_id,), "stop", stop, logprob)
        if is_last:
            return Chunk(text + self._matcher.flush(), (token_id,), "length", None, logprob)
        return Chunk(text, (token_id,), logprob=logprob)

    def end(self, reason: FinishReason) -> Chunk:
        """Return the end of an answer that is interrupted."""
        return Chunk(self._matcher.flush(), (), reason)


def end_tokens(defaults: GenerationConfig) -> frozenset[int]:
    """Return the ids of the tokens that end a text."""
    ends = defaults.eos_token_id
    return frozenset(ends if isinstance(ends, (list, tuple)) else () if ends is None else (ends,))
