"""Tokens to text and text to tokens: one generator that every transport consumes.

It knows nothing of how logits come about (a session is anything that has the methods of ``Session``) and nothing of how
text goes out. The loop is ours, not Transformers', so that it can stream, stop exactly and be cancelled.
"""

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from transformers import GenerationConfig

from errors import InvalidParameter, TooLong
from generation.parameters import GenerationParams
from generation.sampling import Sampler
from swarm.errors import Cancelled
from swarm.tokenization import TextTokenizer

FinishReason = Literal["stop", "length", "time", "cancelled"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens before the first generated one that are decoded along with it: sentence-piece tokenizers write the first token
# of a text without its space.
CONTEXT_TOKENS = 8


class Session(Protocol):
    """What the generator needs of a session."""

    token_ids: list[int]
    max_length: int

    def append(self, token_ids: Sequence[int]) -> None: ...

    def step(self, token_ids: Sequence[int] = (), *, cancelled: Callable[[], bool] | None = None) -> torch.Tensor: ...


class RowsSession(Session, Protocol):
    """What it needs of one that has several rows, or that tells the logits of a prompt's tokens."""

    def step_rows(self, token_ids: Sequence[int], *, cancelled: Callable[[], bool] | None = None) -> torch.Tensor: ...

    def step_each(
        self, token_ids: Sequence[int], *, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[torch.Tensor]: ...


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


class Detokenizer:
    """Turns tokens into text piece by piece; what it has returned never changes and never ends inside a character."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # ids before this are context, whose text was returned or was input
        self._sent = 0  # characters of the ids from `_start` on that were returned
        self._continuations, self._bytes = tokenizer.continuations, tokenizer.byte_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def state(self) -> tuple[Any, ...]:
        """What is held back, to go back to later."""
        return tuple(self._ids), self._start, self._sent, self._utf8.getstate()

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        token_ids, self._start, self._sent, utf8 = state
        self._ids = list(token_ids)
        self._utf8.setstate(utf8)

    def restart(self, context: Sequence[int]) -> None:
        """Forget what is held back and go on after these tokens."""
        self._utf8.reset()
        self._ids = [token_id for token_id in context if token_id not in self._bytes][-CONTEXT_TOKENS:]
        self._start, self._sent = len(self._ids), 0

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is decided now."""
        if token_id in self._bytes:
            return self._utf8.decode(bytes([self._bytes[token_id]]))
        broken = self._utf8.decode(b"", final=True)  # bytes that this token does not continue
        self._ids.append(token_id)
        text = self._new_text()
        undecided = text.endswith(REPLACEMENT) and self._can_be_continued(text)
        decided = text[self._sent : len(text) - 1 if undecided else len(text)]
        if undecided:
            self._sent += len(decided)
        else:
            self.restart(self._ids)
        return broken + decided

    def flush(self) -> str:
        """Return what is held back as it is: the text ends here, so that a broken character stays broken."""
        text = self._new_text()[self._sent :] + self._utf8.decode(b"", final=True)
        self.restart(self._ids)
        return text

    def spell(self, token_id: int) -> str:
        """Return a single token's text."""
        return self._tokenizer.decode([token_id])

    def _new_text(self, more: Sequence[int] = ()) -> str:
        context = self._tokenizer.decode(self._ids[: self._start])
        return self._tokenizer.decode([*self._ids, *more])[len(context) :]

    def _can_be_continued(self, text: str) -> bool:
        """Whether the last character is the beginning of one, and not broken for good.

        A decoder writes one replacement character for the beginning of a character, and a second one if the next byte
        does not continue it.
        """
        if not self._continuations:
            return True
        broken = text.count(REPLACEMENT)
        return any(self._new_text([byte]).count(REPLACEMENT) <= broken for byte in self._continuations)


class StopMatcher:
    """Finds stop sequences in text that arrives in pieces, and holds back what may be the beginning of one.

    The sequence that is complete first ends the text, so that the result does not depend on the pieces.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = sequences
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Add text; return (decided text, the stop sequence that ended it or None)."""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._sequences if (start := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        hold = max((self._overlap(text, stop) for stop in self._sequences), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of ``text`` that is a beginning of ``stop``."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

    def flush(self) -> str:
        """Return what is held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def encode_inputs(text: str, session: Session, tokenizer: TextTokenizer) -> list[int]:
    """Turn input text into tokens that go on from the session; a new session begins as the model's texts begin.

    :raises InvalidParameter: if there is nothing to go on from
    :raises SessionLengthExceeded: if the text cannot fit the session
    """
    if session.token_ids:
        return tokenizer.encode(text, add_special_tokens=False, room=session.max_length) if text else []
    return encode_beginning(text, tokenizer, session.max_length)


def encode_beginning(text: str, tokenizer: TextTokenizer, room: int) -> list[int]:
    """Turn text that a new session begins with into tokens.

    :param room: tokens of the session
    :raises InvalidParameter: if there is nothing to begin with
    :raises SessionLengthExceeded: if the text cannot fit the session
    """
    token_ids = tokenizer.encode(text, room=room) if text else []
    if not token_ids:
        raise InvalidParameter("inputs are required, and must not be empty, for a new session")
    return token_ids


def token_budget(params: GenerationParams, session: Session, input_length: int) -> int:
    """Return how many tokens may be generated.

    With a stop sequence generation goes on in rounds, to the end of the session, of ``max_length`` or of
    ``max_answer_tokens`` if need be; a request without one asks for a number of tokens, which must fit.

    :raises TooLong: if the request does not fit the session
    """
    prefix = len(session.token_ids) + input_length
    room = session.max_length - prefix
    if room < 1:
        raise TooLong(f"{prefix} tokens of prefix and inputs leave no room in a session of {session.max_length} tokens")
    wanted = params.max_new_tokens if params.max_length is None else params.max_length - prefix
    if wanted is None or wanted < 1:
        raise TooLong(f"max_length={params.max_length} leaves no room after {prefix} tokens of prefix and inputs")
    if params.stop_sequence is not None:
        bounds = (wanted if params.max_length is not None else None, params.max_answer_tokens)
        return min([room, *(bound for bound in bounds if bound is not None)])
    if wanted > room:
        raise TooLong(f"{prefix} tokens and {wanted} new ones exceed the session's {session.max_length}")
    return wanted


def generate(
    session: Session,
    input_ids: Sequence[int],
    params: GenerationParams,
    *,
    budget: int,
    detokenizer: Detokenizer,
    defaults: GenerationConfig,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[Chunk]:
    """Generate an answer token by token; one chunk per token, the last one with a finish reason.

    The tokens are added to the session. Its last token is unprocessed afterwards: going on from it costs nothing.

    :param input_ids: tokens to add before; empty: go on where the session is
    :param budget: how many tokens may be generated, see ``token_budget``
    :param detokenizer: the session's; it may hold back the beginning of a character for a later request
    :param defaults: the model's own sampling parameters
    :param cancelled: looked at between and during steps; ends the answer with finish reason "cancelled"
    :raises SwarmError: if the swarm cannot compute; the tokens so far stay in the session
    """
    if input_ids:
        detokenizer.restart([*session.token_ids[-CONTEXT_TOKENS:], *input_ids])
    writer = _Writer(params, defaults, detokenizer)
    out_of_time = time_limit(params.max_time)
    session.append(input_ids)

    def stopped() -> bool:
        return out_of_time() or (cancelled is not None and cancelled())

    for left in range(budget - 1, -1, -1):
        try:
            if stopped():
                raise Cancelled("the answer was stopped")
            logits = session.step(cancelled=stopped)
        except Cancelled:
            yield writer.end("time" if out_of_time() else "cancelled")
            return
        chunk = writer.write(logits, session.token_ids, is_last=left == 0)
        session.append(chunk.token_ids)
        yield chunk
        if chunk.finish_reason is not None:
            return


def generate_rows(
    session: RowsSession,
    input_ids: Sequence[int],
    params: GenerationParams,
    *,
    rows: int,
    budget: int,
    tokenizer: TextTokenizer,
    defaults: GenerationConfig,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, Chunk]]:
    """Generate several answers to the same prompt; yield (row, chunk), as ``generate`` does for each row by itself.

    :param session: of so many rows, which have no tokens of their own yet
    """
    detokenizers = [Detokenizer(tokenizer) for _ in range(rows)]
    for detokenizer in detokenizers:
        detokenizer.restart([*session.token_ids[-CONTEXT_TOKENS:], *input_ids])
    writers = [_Writer(params, defaults, detokenizer, row) for row, detokenizer in enumerate(detokenizers)]
    open_rows = set(range(rows))
    texts = [[*session.token_ids, *input_ids] for _ in range(rows)]
    logits = None
    for left in range(budget - 1, -1, -1):
        try:
            if cancelled is not None and cancelled():
                raise Cancelled("the answer was stopped")
            if logits is None:
                logits = session.step(input_ids, cancelled=cancelled).expand(rows, -1)
            else:
                # Rows that have ended go on with their last token, which nobody sees.
                logits = session.step_rows([text[-1] for text in texts], cancelled=cancelled)
        except Cancelled:
            yield from ((row, writers[row].end("cancelled")) for row in sorted(open_rows))
            return
        for row in sorted(open_rows):
            chunk = writers[row].write(logits[row], texts[row], is_last=left == 0)
            texts[row] += chunk.token_ids
            if chunk.finish_reason is not None:
                open_rows.remove(row)
            yield row, chunk
        if not open_rows:
            return


def score(
    session: RowsSession, token_ids: Sequence[int], count: int, cancelled: Callable[[], bool] | None = None
) -> list[TokenLogprob]:
    """Process a prompt, all but its last token, and return how likely each of its tokens is after those before it.

    :param session: without tokens
    :param count: how many of the likeliest tokens to name beside each
    :returns: one entry less than there are tokens: the first has nothing before it
    """
    found: list[TokenLogprob] = []
    if len(token_ids) > 1:
        for logits in session.step_each(token_ids[:-1], cancelled=cancelled):
            found += logprobs_of(logits, token_ids[len(found) + 1 : len(found) + 1 + len(logits)], count)
    return found


class _Writer:
    """Writes one answer: chooses a token from logits, and makes a chunk of it."""

    def __init__(
        self, params: GenerationParams, defaults: GenerationConfig, detokenizer: Detokenizer, row: int = 0
    ) -> None:
        self._sampler, self._matcher = Sampler(params, defaults, row), StopMatcher(params.stop_sequences)
        self._ends = end_tokens(defaults)
        self._detokenizer = detokenizer
        self._logprobs = params.logprobs

    def write(self, logits: torch.Tensor, token_ids: Sequence[int], *, is_last: bool) -> Chunk:
        """Choose the token that follows ``token_ids``.

        :param logits: [vocabulary], float32
        :param is_last: whether the answer ends here in any case
        """
        token_id = self._sampler.choose(logits, token_ids)
        logprob = None if self._logprobs is None else logprobs_of(logits[None], [token_id], self._logprobs)[0]
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
        """Return the end of an answer that is broken off."""
        return Chunk(self._matcher.flush(), (), reason)


def time_limit(seconds: float | None) -> Callable[[], bool]:
    """Return a function that tells whether the time, which begins now, is over."""
    if seconds is None:
        return lambda: False
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


def end_tokens(defaults: GenerationConfig) -> frozenset[int]:
    """Return the ids of the tokens that end a text."""
    ends = defaults.eos_token_id
    return frozenset(ends if isinstance(ends, (list, tuple)) else () if ends is None else (ends,))
