"""The OpenAI API, /v1: chat and text completions for any program that speaks it; and the tokenizer's endpoints.

What it takes and gives stands in ``schemas``; what a request asks for, in ``reading``; what is computed, in
``answers``; how it is written, in ``formats``; and how it is sent, in ``streaming``.
"""

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, current_app, g, jsonify, request

from errors import InvalidParameter
from models.catalog import ModelConfig
from models.chat_template import apply_template
from openai_api.formats import ChatWriter, TextWriter, openai_error, piece_of
from openai_api.reading import chat_task, check_tokens, completion_tasks, read_chat
from openai_api.schemas import (
    MAX_TOKEN_IDS,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    Content,
    DetokenizeRequest,
    Error,
    Model,
    ModelList,
    Prompt,
    Sampling,
    TemplateRequest,
    TextCompletion,
    TokenizeRequest,
    Tokens,
)
from openai_api.streaming import Reply
from service import Service, get_service
from web.doors import Door
from web.openapi import documented

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel

blueprint = Blueprint("openai_api", __name__)
DOORS = (Door(("/v1/", "/tokenize", "/detokenize", "/apply-template"), needs_key=True, failure=openai_error),)
TAG, TOKENIZER_TAG = "OpenAI API", "Tokenizer"


@blueprint.get("/v1/models")
@documented(TAG, ModelList, failure=Error)
def list_models() -> Response:
    """The models that the caller may use."""
    service = get_service(current_app)
    names = [name for name in service.models.served if g.caller.may_use(name)]
    return jsonify(object="list", data=[model_object(service, name) for name in names])


@blueprint.get("/v1/models/<path:model>")
@documented(TAG, Model, failure=Error)
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
@documented(TAG, ChatCompletion, failure=Error, request=ChatRequest, streams=True)
def chat_completions() -> Response:
    """Answer a conversation."""
    body: ChatRequest = ChatRequest.read(request.get_data(cache=False))
    service, model, config = begin(body)
    chat = read_chat(body, config, model)
    task, num_values = chat_task(body, config, model, chat)
    return Reply(service, model, ChatWriter(model, chat.strip), [task], num_values).send(body)


@blueprint.post("/v1/completions")
@documented(TAG, TextCompletion, failure=Error, request=CompletionRequest, streams=True)
def completions() -> Response:
    """Continue texts."""
    body: CompletionRequest = CompletionRequest.read(request.get_data(cache=False))
    service, model, config = begin(body)
    tasks, num_values = completion_tasks(body, config, model)
    writer = TextWriter(model, body, [task.token_ids for task in tasks])
    return Reply(service, model, writer, tasks, num_values).send(body)


@blueprint.post("/tokenize")
@documented(TOKENIZER_TAG, Tokens, failure=Error, request=TokenizeRequest)
def tokenize() -> Response:
    """Turn text into token ids."""
    body: TokenizeRequest = TokenizeRequest.read(request.get_data(cache=False))
    model = get_service(current_app).find(g.caller, body.model).loaded
    tokens: list[Any] = model.tokenizer.encode(body.content, add_special_tokens=bool(body.add_special))
    count = len(tokens)
    if body.with_pieces:
        if count > MAX_TOKEN_IDS:
            raise InvalidParameter(f"with_pieces allows {MAX_TOKEN_IDS} tokens at most, not {count}", "with_pieces")
        bytes_of = model.tokenizer.bytes_of
        tokens = [{"id": token_id, "piece": piece_of(bytes_of(token_id))} for token_id in tokens]
    return jsonify(tokens=tokens, count=count, max_model_len=model.max_length)


@blueprint.post("/detokenize")
@documented(TOKENIZER_TAG, Content, failure=Error, request=DetokenizeRequest)
def detokenize() -> Response:
    """Turn token ids into text."""
    body: DetokenizeRequest = DetokenizeRequest.read(request.get_data(cache=False))
    model = get_service(current_app).find(g.caller, body.model).loaded
    check_tokens(model, body.tokens, "tokens")
    return jsonify(content=model.tokenizer.decode(body.tokens))


@blueprint.post("/apply-template")
@documented(TOKENIZER_TAG, Prompt, failure=Error, request=TemplateRequest)
def template() -> Response:
    """Turn a conversation into the text that the model reads."""
    body: TemplateRequest = TemplateRequest.read(request.get_data(cache=False))
    served = get_service(current_app).find(g.caller, body.model)
    tokenizer = served.loaded.tokenizer
    messages = [message.plain() for message in body.messages]
    prompt = apply_template(
        served.config,
        tokenizer,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    return jsonify(prompt=prompt.text)


def begin(body: Sampling) -> tuple[Service, "SwarmModel", ModelConfig]:
    """Return what every completion needs."""
    service = get_service(current_app)
    served = service.find(g.caller, body.model)
    return service, served.loaded, served.config
