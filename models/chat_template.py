"""Conversations to text: the model's own chat template, or a plain format for models that have none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import InvalidParameter
from models.catalog import KNOWN_MODELS, ModelConfig
from models.rendering import render

if TYPE_CHECKING:
    from swarm.tokenization import TextTokenizer


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the model reads it, up to where its answer begins."""

    marked: str  # for ``TextTokenizer.encode``: special tokens in what people have said are marked as plain text
    add_special_tokens: bool  # whether the tokenizer adds those that texts of the model begin with
    stop: tuple[str, ...]  # texts that end the answer, beside the model's own end of text
    strip: bool  # whether an answer's blank beginning is part of the format

    @property
    def text(self) -> str:
        """The text that the model reads."""
        from swarm.control_tokens import unmark

        return unmark(self.marked)


def apply_template(
    config: ModelConfig,
    tokenizer: "TextTokenizer",
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> ChatPrompt:
    """Write a conversation as the model reads it. Special tokens in it are plain text.

    :param messages: with ``role``, one of system, user and assistant, and ``content``
    :param add_generation_prompt: end with what an answer begins after
    :raises InvalidParameter: if the model's template does not take such a conversation
    :raises TooLong: if it makes too much of it
    """
    if not messages:
        raise InvalidParameter("messages must not be empty")
    mark = tokenizer.control_tokens.mark
    messages = [
        {**message, "content": mark(message["content"], own=message["role"] == "assistant")} for message in messages
    ]
    if template := template_of(tokenizer):
        stop = config.chat.stop if config.name in KNOWN_MODELS else ()
        marked = render_messages(template, tokenizer, messages, add_generation_prompt=add_generation_prompt)
        return ChatPrompt(marked, False, stop, False)
    text = plain_text(config, messages, add_generation_prompt=add_generation_prompt)
    return ChatPrompt(text, True, config.chat.stop, True)


def render_messages(
    template: str,
    tokenizer: "TextTokenizer",
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render a model's template as Transformers does; see ``render``."""
    variables = {
        **tokenizer.special_tokens_map,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return render(template, variables)


def template_of(tokenizer: "TextTokenizer") -> str | None:
    """Return the model's chat template for conversations without tools; None: it has none.

    :raises InvalidParameter: if it has several, none of which is the default
    """
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise InvalidParameter(f"the model has chat templates, but none by default: {', '.join(sorted(template))}")
    return template["default"]


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
