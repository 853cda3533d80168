"""Conversations to text: the model's own chat template, or a plain format for models that have none."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import InvalidParameter, TooLong
from models.catalog import KNOWN_MODELS, ModelConfig

# Templates come with checkpoints. Sensible ones write a conversation once, within milliseconds, and the largest that a
# request holds by default has 2**20 bytes. An endless loop is stopped as well, unless it writes nothing.
MAX_RENDERED = 2**22  # characters
RENDER_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the model reads it, up to where its answer begins."""

    text: str
    add_special_tokens: bool  # whether the tokenizer adds those that texts of the model begin with
    stop: tuple[str, ...]  # texts that end the answer, beside the model's own end of text
    strip: bool  # whether an answer's blank beginning is part of the format


def apply_template(
    config: ModelConfig, tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> ChatPrompt:
    """Write a conversation as the model reads it.

    :param messages: with ``role``, one of system, user and assistant, and ``content``
    :param add_generation_prompt: end with what an answer begins after
    :raises InvalidParameter: if the model's template does not take such a conversation
    :raises TooLong: if it makes too much of it
    """
    if not messages:
        raise InvalidParameter("messages must not be empty")
    known = config.name in KNOWN_MODELS
    if getattr(tokenizer, "chat_template", None):
        try:
            text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError, ArithmeticError) as error:  # what the template or its expressions raise
            raise InvalidParameter(f"messages do not fit the model's chat template: {error}") from None
        return ChatPrompt(text, False, config.chat.stop if known else (), False)
    text = plain_text(config, messages, add_generation_prompt=add_generation_prompt)
    return ChatPrompt(text, True, config.chat.stop, True)


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """Write a conversation with the tokenizer's chat template, as Transformers does, but within bounds.

    :raises TemplateError: if the template refuses it
    :raises TooLong: if it becomes too long, or takes too long
    """
    pieces = compile_template(tokenizer.chat_template).generate(
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    text, size, deadline = [], 0, time.monotonic() + RENDER_TIMEOUT
    for piece in pieces:
        text.append(piece)
        size += len(piece)
        if size > MAX_RENDERED or time.monotonic() > deadline:
            raise TooLong(f"{len(messages)} messages are more than the model's chat template makes a prompt of")
    return "".join(text)


@functools.lru_cache(maxsize=16)  # of the models' templates, which no user sends
def compile_template(template: str) -> Template:
    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def plain_text(config: ModelConfig, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """Write a conversation in the model's line of ``catalog.KNOWN_MODELS``, for the BLOOM models::

        A conversation between a curious human and a friendly, knowledgeable AI assistant.

        Human: What is a swarm?

        AI: Many bees.

        Human: And a bee?

        AI:

    A system message takes the place of the first paragraph. What a person says ends where the answer begins.
    """
    chat = config.chat
    before, _, after = chat.user.partition("{text}")
    system = [message["content"].strip() for message in messages if message["role"] == "system"]
    text = "\n\n".join(system) + "\n\n" if system else chat.begin
    answered = True  # whether the last turn of the person has got its answer, or the beginning of one
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user":
            text += ("" if answered else chat.turn_end) + before + content
            answered = False
        elif message["role"] == "assistant":
            text += (before if answered else "") + after + " " + content + chat.turn_end
            answered = True
    if not answered:
        text += after if add_generation_prompt else ""
    elif add_generation_prompt:
        text += before + after
    return text
