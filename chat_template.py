"""Conversations to text: the model's own chat template, or a plain format for models that have none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from config import KNOWN_MODELS, ModelConfig
from errors import InvalidParameter


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
    """
    if not messages:
        raise InvalidParameter("messages must not be empty")
    known = config.name in KNOWN_MODELS
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InvalidParameter(f"messages do not fit the model's chat template: {error}") from None
        return ChatPrompt(text, False, config.chat.stop if known else (), False)
    text = plain_text(config, messages, add_generation_prompt=add_generation_prompt)
    return ChatPrompt(text, True, config.chat.stop, True)


def plain_text(config: ModelConfig, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    """Write a conversation in the model's line of ``config.KNOWN_MODELS``, for the BLOOM models::

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
