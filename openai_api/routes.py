"""The OpenAI API, /v1: chat and text completions for any program that speaks it; and the tokenizer's endpoints.

What it takes and gives stands in ``openai_schemas``; what is computed, in ``answers``.
"""

import contextlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flask import Blueprint, Response, current_app, g, jsonify, request, stream_with_context

from admission.budgets import Budget, Exhausted
from errors import InvalidParameter, TooLong, TooManyRequests, describe, openai_error
from generation.lengths import stateless_length
from generation.loop import Chunk, TokenLogprob
from generation.parameters import MAX_SEED, SMALLEST_FACTOR, GenerationParams
from models.catalog import ModelConfig
from models.chat_template import apply_template
from openai_api.answers import Answers, Done, Piece, Scores, Task
from openai_api.schemas import (
    MAX_TOKEN_IDS,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    Content,
    DetokenizeRequest,
    Model,
    ModelList,
    Prompt,
    Sampling,
    TemplateRequest,
    TextCompletion,
    TokenizeRequest,
    Tokens,
)
from service import Service, get_service
from swarm.errors import Cancelled
from swarm.waiter import Waiter
from web.client_socket import RequestWaiter, client_socket, limit_sends
from web.openapi import documented

log = logging.getLogger(__name__)
blueprint = Blueprint("openai_api", __name__)

TAG, TOKENIZER_TAG = "OpenAI API", "Tokenizer"
# Of a completion without max_tokens, as at OpenAI.
DEFAULT_MAX_TOKENS = 16
# Tokens and log-probabilities that one request may ask for: 200 MB while they are written as JSON, of chats 400 MB.
MAX_TOLD = 1_000_000
# The same, of all requests at a time that are not streamed; those that ask for few do not count.
TOLD, FEW_TOLD = Budget(2 * MAX_TOLD), 10_000


@blueprint.get("/v1/models")
@documented(TAG, ModelList)
def list_models() -> Response:
    """The models that the caller may use."""
    service = get_service(current_app)
    names = [name for name in service.models.served if g.caller.may_use(name)]
    return jsonify(object="list", data=[model_object(service, name) for name in names])


@blueprint.get("/v1/models/<path:model>")
@documented(TAG, Model)
def get_model(model: str) -> Response:
    """One model."""
    service = get_service(current_app)
    if model not in service.models.served and f"/{model}" in service.models.served:
        model = f"/{model}"  # a directory: two slashes in a row do not survive the way here
    service.find(g.caller, model)
    return jsonify(model_object(service, model))


def model_object(service: Service, name: str) -> dict[str, Any]:
    served = service.models.served[name]
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": name.rpartition("/")[0] or "petals",
        "state": served.status.state,
        "max_model_len": served.model.max_length if served.model is not None else None,
    }


@blueprint.post("/v1/chat/completions")
@documented(TAG, ChatCompletion, request=ChatRequest, streams=True)
def chat_completions() -> Response:
    """Answer a conversation."""
    body: ChatRequest = ChatRequest.read(request.get_data(cache=False))
    service, model, config = begin(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs needs logprobs to be true", "top_logprobs")
    chat = apply_template(config, model.tokenizer, [message.plain() for message in body.messages])
    token_ids = model.tokenizer.encode(chat.text, chat.add_special_tokens, room=model.max_length)
    if not token_ids:
        raise InvalidParameter("the model's chat template makes no text of these messages", "messages")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted == 0:
        raise InvalidParameter("max_tokens must be at least 1", "max_tokens")
    length = chat_length(len(token_ids), wanted, min(config.session_length, model.max_length), model.max_length)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling(body, config, model, chat.stop, logprobs)
    open_ended, wanted = wanted is None, wanted or length - len(token_ids)
    choices = body.n or 1
    if choices > 1:
        length = len(token_ids) + wanted  # several rows are not gone on from
    told = check_work(len(token_ids) + wanted, choices, logprobs)
    task = Task(token_ids, wanted, length, params, choices, open_ended=open_ended)
    return respond(ChatFormat(model, chat.strip), service, model, body, [task], told)


@blueprint.post("/v1/completions")
@documented(TAG, TextCompletion, request=CompletionRequest, streams=True)
def completions() -> Response:
    """Continue texts."""
    body: CompletionRequest = CompletionRequest.read(request.get_data(cache=False))
    service, model, config = begin(body)
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo:
        raise InvalidParameter("max_tokens must be at least 1, or echo be true", "max_tokens")
    params = sampling(body, config, model, (), body.logprobs)
    scored = bool(body.echo) and body.logprobs is not None
    prompts = encode_prompts(model, prompts_of(body))
    told = check_work(sum(map(len, prompts)) + wanted * len(prompts), body.n or 1, body.logprobs)
    tasks = []
    for token_ids in prompts:
        check_length(len(token_ids), wanted, model.max_length)
        needed = len(token_ids) + wanted
        # Of several prompts or answers none is gone on from, and they would push out conversations that are.
        alone = len(prompts) == (body.n or 1) == 1 and not scored
        length = stateless_length(needed, model.max_length) if alone else needed
        tasks.append(Task(token_ids, wanted, length, params, body.n or 1, scored, keep_warm=alone))
    return respond(TextFormat(model, body, prompts), service, model, body, tasks, told)


@blueprint.post("/tokenize")
@documented(TOKENIZER_TAG, Tokens, request=TokenizeRequest)
def tokenize() -> Response:
    """Turn text into token ids."""
    body: TokenizeRequest = TokenizeRequest.read(request.get_data(cache=False))
    model = get_service(current_app).model(g.caller, body.model).loaded
    tokens: list[Any] = model.tokenizer.encode(body.content, add_special_tokens=bool(body.add_special))
    count = len(tokens)
    if body.with_pieces:
        if count > MAX_TOKEN_IDS:
            raise InvalidParameter(f"with_pieces tells {MAX_TOKEN_IDS} tokens, and these are {count}", "with_pieces")
        bytes_of = model.tokenizer.bytes_of
        tokens = [{"id": token_id, "piece": piece_of(bytes_of(token_id))} for token_id in tokens]
    return jsonify(tokens=tokens, count=count, max_model_len=model.max_length)


@blueprint.post("/detokenize")
@documented(TOKENIZER_TAG, Content, request=DetokenizeRequest)
def detokenize() -> Response:
    """Turn token ids into text."""
    body: DetokenizeRequest = DetokenizeRequest.read(request.get_data(cache=False))
    model = get_service(current_app).model(g.caller, body.model).loaded
    check_tokens(model, body.tokens, "tokens")
    return jsonify(content=model.tokenizer.decode(body.tokens))


@blueprint.post("/apply-template")
@documented(TOKENIZER_TAG, Prompt, request=TemplateRequest)
def template() -> Response:
    """Turn a conversation into the text that the model reads."""
    body: TemplateRequest = TemplateRequest.read(request.get_data(cache=False))
    service = get_service(current_app)
    model = service.model(g.caller, body.model).loaded
    messages = [message.plain() for message in body.messages]
    prompt = apply_template(
        service.models.served[model.name].config,
        model.tokenizer,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    return jsonify(prompt=prompt.text)


def begin(body: Sampling) -> tuple[Service, Any, ModelConfig]:
    """Return what every completion needs."""
    service = get_service(current_app)
    served = service.model(g.caller, body.model)
    return service, served.loaded, served.config


def sampling(
    body: Sampling, config: ModelConfig, model: Any, stop: Sequence[str], logprobs: int | None
) -> GenerationParams:
    """Return the parameters of a request; what it leaves out is as on the page for this model."""
    temperature = config.generation.get("temperature", 1.0) if body.temperature is None else body.temperature
    top_p = config.generation.get("top_p", 1.0) if body.top_p is None else body.top_p
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    bias = logit_bias(body, model)
    return GenerationParams(
        do_sample=temperature > 0,
        temperature=max(temperature, SMALLEST_FACTOR),
        top_k=max(body.top_k or 0, 0),
        top_p=top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        logprobs=logprobs,
        seed=None if body.seed is None else body.seed % (MAX_SEED + 1),
        extra_stop_sequences=(*(text for text in stops if text), *stop),
    )


def logit_bias(body: Sampling, model: Any) -> tuple[tuple[int, float], ...]:
    bias = {int(name): value for name, value in (body.logit_bias or {}).items()}
    check_tokens(model, list(bias), "logit_bias")
    return tuple(bias.items())


def check_tokens(model: Any, token_ids: Sequence[int], param: str) -> None:
    """Refuse ids that are none of the model's.

    :raises InvalidParameter: naming one
    """
    size = min(model.head.vocab_size, model.tokenizer.size)
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
        raise InvalidParameter(f"{param}: {wrong} is no token of this model, which has {size}", param)


def check_length(prompt: int, wanted: int, longest: int) -> None:
    """Refuse what does not fit.

    :raises TooLong: telling the numbers
    """
    if prompt + wanted > longest:
        raise TooLong(f"a prompt of {prompt} tokens and {wanted} new ones exceed the model's {longest}")


def chat_length(prompt: int, wanted: int | None, usual: int, longest: int) -> int:
    """Return the length of a chat's session: that of a conversation on the page, so that next turns find room in it.

    :param wanted: tokens that the answer may have; None: as many as there is room for, at least a quarter of the usual
    :raises TooLong: if even the longest is too short
    """
    if prompt + (usual // 4 if wanted is None else wanted) <= usual:
        return usual
    check_length(prompt, wanted or 1, longest)
    return longest


def check_work(tokens: int, choices: int, logprobs: int | None) -> int:
    """Return how many values an answer may tell; refuse what would take memory without end.

    :param tokens: of prompts and answers
    :raises InvalidParameter: telling the numbers
    """
    told = tokens * choices * (1 if logprobs is None else 2 + logprobs)
    if told > MAX_TOLD:
        raise InvalidParameter(
            f"{tokens} tokens, n={choices} and logprobs={logprobs} are {told} values in all, more than {MAX_TOLD}"
        )
    return told


def prompts_of(body: CompletionRequest) -> list[Any]:
    """Return the prompts of a request, each a text or a list of token ids."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def encode_prompts(model: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Return the tokens of prompts, all of them texts or all of them token ids."""
    if isinstance(prompts[0], str):
        encoded: list[list[int]] = model.tokenizer.encode_all(prompts, room=model.max_length)
        if not all(encoded):
            raise InvalidParameter("prompt must not be empty", "prompt")
        return encoded
    for token_ids in prompts:
        check_tokens(model, token_ids, "prompt")
    return list(prompts)


def piece_of(spelled: bytes) -> str | list[int]:
    """Return a token's text, or its bytes if they are a part of a character."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)


@dataclass
class ChatFormat:
    """How a chat completion is written."""

    model: Any
    strip: bool  # whether an answer's blank beginning is part of the format
    object = "chat.completion"
    prefix = "chatcmpl"
    begun: set[int] = field(default_factory=set)  # answers that have some text
    spelled: dict[int, dict[str, Any]] = field(default_factory=dict)  # tokens that were told: the same ones come again

    def text(self, index: int, text: str) -> str:
        """Return what to send of a piece of text."""
        if self.strip and index not in self.begun:
            text = text.lstrip()
        if text:
            self.begun.add(index)
        return text

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

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
class TextFormat:
    """How a text completion is written."""

    model: Any
    body: CompletionRequest
    prompts: Sequence[list[int]]
    object = "text_completion"
    prefix = "cmpl"
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each answer's tokens so far

    def prompt_of(self, index: int) -> list[int]:
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
        # Different tokens may have the same text, as parts of characters: the likeliest is told.
        tops = [{spell(token): finite(value) for token, value in reversed(one.top)} for one in found]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(one.logprob) for one in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes this for what is all but impossible."""
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


def respond(
    form: ChatFormat | TextFormat, service: Service, model: Any, body: Sampling, tasks: Sequence[Task], told: int
) -> Response:
    """Compute the answers and send them, as they come or together.

    :param told: values that they may tell, see ``check_work``
    """
    if body.stream and any(task.scored for task in tasks):
        raise InvalidParameter("echo with logprobs cannot be streamed", "stream")
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.object,
        "created": int(time.time()),
        "model": model.name,
    }
    tally = Tally(sum(len(task.token_ids) for task in tasks))
    gone = RequestWaiter(request.environ)
    if not body.stream:
        with room_to_tell(told, service.settings.QUEUE_TIMEOUT, gone):
            answers = Answers(service, g.caller, model, tasks, gone)
            try:
                return jsonify(head | collect(form, answers, tasks, tally, service))
            finally:
                answers.close()
    answers = Answers(service, g.caller, model, tasks, gone)
    try:
        if isinstance(form, ChatFormat):
            head["object"] = "chat.completion.chunk"
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = answers.events(service.settings.SSE_KEEP_ALIVE)
        events = itertools.chain([next(events)], events)  # a failure to begin has a status of its own
    except BaseException:
        answers.close()
        raise
    if (sock := client_socket(request.environ)) is not None:
        limit_sends(sock, service.settings.SEND_TIMEOUT)
    lines = stream(form, answers, events, head, tally, service, wants_usage=wants_usage)
    response = Response(stream_with_context(lines), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold the answer back
    response.call_on_close(answers.close)
    return response


@contextlib.contextmanager
def room_to_tell(told: int, timeout: float, gone: Waiter) -> Iterator[None]:
    """Have memory for an answer that is sent when it is whole.

    :raises TooManyRequests: if others take it for longer than ``timeout`` seconds
    """
    try:
        with TOLD.hold(told if told > FEW_TOLD else 0, timeout, gone):
            yield
    except Exhausted as error:
        raise TooManyRequests(f"values that answers may tell: {error}; stream, or ask for fewer") from None


def collect(
    form: ChatFormat | TextFormat, answers: Answers, tasks: Sequence[Task], tally: Tally, service: Service
) -> dict[str, Any]:
    """Wait for all answers; return choices and usage."""
    chunks: list[list[Chunk]] = [[] for task in tasks for _ in range(task.choices)]
    scores: dict[int, list[TokenLogprob]] = {}
    for event in answers.events():
        if isinstance(event, Piece):
            chunks[event.index].append(event.chunk)
        elif isinstance(event, Scores):
            scores[event.task] = event.logprobs
        elif event is not None:
            tally.add(event)
    choices = [form.choice(i, found, scores.get(i // tasks[0].choices)) for i, found in enumerate(chunks)]
    return {"choices": choices, "usage": tally.usage()}


def stream(
    form: ChatFormat | TextFormat,
    answers: Answers,
    events: Iterator[Any],
    head: dict[str, Any],
    tally: Tally,
    service: Service,
    *,
    wants_usage: bool,
) -> Iterator[str]:
    """Yield the answers as server-sent events."""
    if wants_usage:
        head["usage"] = None
    opened: set[int] = set()
    try:
        for event in events:
            if isinstance(event, Piece):
                if event.index not in opened:
                    opened.add(event.index)
                    if (opening := form.opening(event.index)) is not None:
                        yield sse(head | {"choices": [opening]})
                chunk = event.chunk
                if chunk.text or chunk.finish_reason or chunk.logprob:
                    yield sse(head | {"choices": [form.piece(event.index, chunk)]})
            elif isinstance(event, Done):
                tally.add(event)
                for choice in event.unwritten:
                    opening = form.opening(choice) or {"index": choice, "text": "", "logprobs": None}
                    yield sse(head | {"choices": [opening | {"finish_reason": "length"}]})
            else:
                yield ": the swarm is slow, the answer goes on\n\n"  # so that no proxy cuts the line
        if wants_usage:
            yield sse(head | {"choices": [], "usage": tally.usage()})
        yield "data: [DONE]\n\n"
    except Cancelled:
        log.info("the client has hung up")
    except Exception as error:
        if describe(error)[0] == 500:
            log.exception("a streamed answer failed")
        else:
            log.info("a streamed answer failed: %s", error)
        yield sse(openai_error(error)[0])
        yield "data: [DONE]\n\n"
    finally:
        answers.close()


def sse(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
