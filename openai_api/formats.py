"""How the OpenAI API writes what was computed: chats, texts, usage and failures, as its objects."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from errors import ApiError, describe
from generation.loop import Chunk, TokenLogprob
from openai_api.answers import Done
from openai_api.schemas import CompletionRequest, prompts_of

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel

# OpenAI's words, by status: https://platform.openai.com/docs/guides/error-codes
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class ChatWriter:
    """How a chat completion is written."""

    model: "SwarmModel"
    strip: bool  # whether an answer's blank beginning is part of the format
    object = "chat.completion"
    chunk = "chat.completion.chunk"  # the object in which a piece is sent
    prefix = "chatcmpl"
    begun: set[int] = field(default_factory=set)  # answers that have some text
    spelled: dict[int, dict[str, Any]] = field(default_factory=dict)  # tokens reported so far: the same ones come again

    def text(self, index: int, text: str) -> str:
        """Return what to send of a piece of text."""
        if self.strip and index not in self.begun:
            text = text.lstrip()
        if text:
            self.begun.add(index)
        return text

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def empty(self, index: int) -> dict[str, Any]:
        return self.opening(index) | {"finish_reason": "length"}

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any]:
        logprobs = self.logprobs([chunk.logprob]) if chunk.logprob is not None else None
        delta = {"content": self.text(index, chunk.text)}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def choice(self, index: int, chunks: Sequence[Chunk], scores: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        text = "".join(self.text(index, chunk.text) for chunk in chunks)
        found = [chunk.logprob for chunk in chunks if chunk.logprob is not None]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self.logprobs(found) if found else None,
            "finish_reason": chunks[-1].finish_reason,
        }

    def logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            if token_id not in self.spelled:
                spelled = self.model.tokenizer.bytes_of(token_id)
                self.spelled[token_id] = {"token": spelled.decode(errors="replace"), "bytes": list(spelled)}
            return self.spelled[token_id] | {"logprob": finite(logprob)}

        content = [
            entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*likely) for likely in one.top]} for one in found
        ]
        return {"content": content, "refusal": None}


@dataclass
class TextWriter:
    """How a text completion is written."""

    model: "SwarmModel"
    body: CompletionRequest
    prompts: Sequence[Sequence[int]]  # their tokens
    object = chunk = "text_completion"
    prefix = "cmpl"
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each answer's tokens so far

    def prompt_of(self, index: int) -> Sequence[int]:
        return self.prompts[index // (self.body.n or 1)]

    def echoed(self, index: int) -> str:
        if not self.body.echo:
            return ""
        given = prompts_of(self.body)[index // (self.body.n or 1)]
        if isinstance(given, str):
            return given
        return self.model.tokenizer.decode(given)

    def opening(self, index: int) -> dict[str, Any] | None:
        text = self.echoed(index)
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None} if text else None

    def empty(self, index: int) -> dict[str, Any]:
        """Return what is sent of an answer for which only the prompt's text was wanted."""
        opening = self.opening(index) or {"index": index, "text": "", "logprobs": None}
        return opening | {"finish_reason": "length"}

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any]:
        logprobs = self.logprobs(index, [chunk.logprob]) if chunk.logprob is not None else None
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def choice(self, index: int, chunks: Sequence[Chunk], scores: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        found = [chunk.logprob for chunk in chunks if chunk.logprob is not None]
        logprobs = None
        if scores is not None:
            first = TokenLogprob(self.prompt_of(index)[0], 0.0, ())  # has nothing before it
            logprobs = self.logprobs(index, [first, *scores, *found])
            logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        elif found:
            logprobs = self.logprobs(index, found)
        return {
            "index": index,
            "text": self.echoed(index) + "".join(chunk.text for chunk in chunks),
            "logprobs": logprobs,
            "finish_reason": chunks[-1].finish_reason if chunks else "length",
        }

    def logprobs(self, index: int, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        def spell(token_id: int) -> str:
            return self.model.tokenizer.bytes_of(token_id).decode(errors="replace")

        tokens = [spell(one.token_id) for one in found]
        offset = self.offsets.get(index, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self.offsets[index] = offset
        # Different tokens may have the same text, as parts of characters: the likeliest is reported.
        tops = [{spell(token): finite(value) for token, value in reversed(one.top)} for one in found]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(one.logprob) for one in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


Writer = ChatWriter | TextWriter


def finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes this for a nearly impossible token."""
    return max(logprob, -9999.0)


@dataclass
class Tally:
    """What a request has used."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, done: Done) -> None:
        self.completion_tokens += done.completion_tokens
        self.cached_tokens += done.cached_tokens

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def openai_error(error: BaseException) -> tuple[dict[str, Any], int]:
    """Return the body that reports a failure to a client of the OpenAI API, and the status."""
    status, code, message, _ = describe(error)
    if code == "too_long":
        status, code = 400, "context_length_exceeded"
    kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = error.param if isinstance(error, ApiError) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status


def piece_of(spelled: bytes) -> str | list[int]:
    """Return a token's text, or its bytes if they are a part of a character."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)
