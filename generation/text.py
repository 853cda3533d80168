"""Text in pieces: tokens that become text as they come, the sequences that end it, and text that becomes tokens."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from errors import InvalidParameter
from generation.parameters import GenerationParams
from generation.session import Session
from swarm.control_tokens import ControlTokens
from swarm.tokenization import TextTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens before the first generated one that are decoded along with it: sentence-piece tokenizers write the first token
# of a text without its space.
CONTEXT_TOKENS = 8


class HeldBack(NamedTuple):
    """What a detokenizer holds back."""

    token_ids: tuple[int, ...]
    start: int
    sent: int
    utf8: tuple[bytes, int]


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
    def state(self) -> "HeldBack":
        """What is held back, to be restored later."""
        return HeldBack(tuple(self._ids), self._start, self._sent, self._utf8.getstate())

    @state.setter
    def state(self, held: "HeldBack") -> None:
        self._ids, self._start, self._sent = list(held.token_ids), held.start, held.sent
        self._utf8.setstate(held.utf8)

    def restart(self, context: Sequence[int]) -> None:
        """Forget what is held back and continue after these tokens."""
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


def encode_inputs(params: GenerationParams, session: Session, tokenizer: TextTokenizer) -> list[int]:
    """Turn a request's inputs into tokens that continue the session; a new session begins as the model's texts begin.

    :raises InvalidParameter: if there is nothing to continue
    :raises SessionLengthExceeded: if the text cannot fit the session
    """
    if not session.token_ids:
        return encode_beginning(params, tokenizer, session.max_length)
    text = marked_inputs(params, tokenizer.control_tokens)
    return tokenizer.encode(text, add_special_tokens=False, room=session.max_length, marked=True) if text else []


def encode_beginning(params: GenerationParams, tokenizer: TextTokenizer, room: int) -> list[int]:
    """Turn inputs that a new session begins with into tokens.

    :param room: tokens of the session
    :raises InvalidParameter: if there is nothing to begin with
    :raises SessionLengthExceeded: if the text cannot fit the session
    """
    text = marked_inputs(params, tokenizer.control_tokens)
    token_ids = tokenizer.encode(text, room=room, marked=True) if text else []
    if not token_ids:
        raise InvalidParameter("inputs are required, and must not be empty, for a new session")
    return token_ids


def marked_inputs(params: GenerationParams, control_tokens: ControlTokens) -> str:
    """Return a request's inputs for ``TextTokenizer.encode``, with marks in what is plain text.

    What is plain ends where the next begins, if it does not end before.
    """
    if not params.plain_between:
        return control_tokens.escape(params.inputs)
    begin, end = params.plain_between
    first, *others = params.inputs.split(begin)
    text = control_tokens.escape(first)
    for other in others:
        plain, _, after = other.partition(end)
        text += control_tokens.mark(plain) + control_tokens.escape(after)
    return text
