"""Which models are known: what each is, its chat format, and how the page samples.

An unknown model works too, with ``DIALOGUE``. Importing this loads nothing but the standard library.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# What a model that is served may be up to; models/loading.py says when.
State = Literal["loading", "ready", "blocks_missing", "stale", "rejoining", "failed"]


@dataclass(frozen=True)
class ChatFormat:
    """How turns of a conversation become model input; ``{text}`` is what the person wrote."""

    user: str  # a turn of the person, up to where the model continues
    turn_end: str  # between an answer and the next turn
    stop: tuple[str, ...]  # texts that end an answer
    first: str  # the first turn and what is before it, where there is a system prompt, ``{system}``
    system: str = ""  # the system prompt of chats that have none of their own
    alone: str = ""  # the first turn and what is before it, where there is no system prompt; default: ``user``

    @property
    def begin(self) -> str:
        """What is before the first turn, in chats that have no system prompt of their own."""
        return self.first.replace("{system}", self.system).removesuffix(self.user) if self.system else ""


@dataclass(frozen=True)
class Markup:
    """What stands around a part of an answer that is not for the reader."""

    begin: str
    end: str
    tokens: tuple[str, ...]  # of the tokenizers that have it, and in the templates that write it


# How models mark their thoughts, and their calls of tools.
THOUGHTS = (
    Markup("<think>", "</think>", ("<think>", "</think>")),
    Markup("[THINK]", "[/THINK]", ("[THINK]", "[/THINK]")),
    Markup("<|channel|>analysis<|message|>", "<|end|>", ("<|channel|>", "<|message|>", "<|end|>")),
)
TOOL_CALLS = (
    Markup("<tool_call>", "</tool_call>", ("<tool_call>", "</tool_call>")),
    Markup("[TOOL_CALLS]", "</s>", ("[TOOL_CALLS]",)),
    Markup("<|python_tag|>", "<|eom_id|>", ("<|python_tag|>",)),
    Markup("<|channel|>commentary", "<|call|>", ("<|channel|>", "<|call|>")),
)


@dataclass(frozen=True)
class AnswerMarkup:
    """What a model's answers are made of, beside text."""

    thoughts: Markup | None
    tool_calls: Markup | None


def markup_of(tokens: Collection[str], template: str) -> AnswerMarkup:
    """Return what a model's answers are made of.

    Tokenizers have tokens that a model was never taught to use, such as those of a sibling; the template tells.

    :param tokens: that its tokenizer has beside words
    :param template: for chats; empty: it has none
    """

    def first(known: Sequence[Markup]) -> Markup | None:
        return next((row for row in known if all(token in tokens and token in template for token in row.tokens)), None)

    return AnswerMarkup(first(THOUGHTS), first(TOOL_CALLS))


@dataclass(frozen=True)
class ModelConfig:
    """A model to serve."""

    name: str  # hub name, local directory, or name of the bundled package
    chat: ChatFormat
    title: str = ""  # shown on the pages; default: the last part of the name
    size: str = ""  # parameters, as people say it; empty: counted once the model is loaded
    licence: str = ""  # of the weights; empty: unknown
    session_length: int = 2048  # tokens of a conversation on the page
    # How the page samples. Programs say what they want with each request.
    generation: Mapping[str, Any] = field(default_factory=lambda: {"do_sample": 1, "temperature": 0.7, "top_p": 0.9})

    @property
    def shown_title(self) -> str:
        return self.title or self.name.rstrip("/").rpartition("/")[2]

    @property
    def link(self) -> str | None:
        """Where to read about the model: its page on the hub, if it is one of the hub's."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.name, re.ASCII) or os.path.isdir(self.name):
            return None
        return f"https://huggingface.co/{self.name}"


CHATML = ChatFormat(
    user="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    turn_end="<|im_end|>\n",
    stop=("<|im_end|>",),
    first="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
# The BLOOM models know no roles; named turns, as in a script, work best. The name of the other side ends an answer.
DIALOGUE = ChatFormat(
    user="Human: {text}\n\nAI:",
    turn_end="\n\n",
    stop=("\n\nHuman:",),
    first="{system}\n\nHuman: {text}\n\nAI:",
    system="A conversation between a curious human and a friendly, knowledgeable AI assistant.",
)
# BLOOMZ was tuned to follow single instructions and ends its answers itself.
INSTRUCTION = ChatFormat(
    user="Question: {text}\n\nAnswer:",
    turn_end="\n\n",
    stop=("\n\nQuestion:",),
    first="{system}\n\nQuestion: {text}\n\nAnswer:",
)
FALCON = ChatFormat(
    user="User: {text}\nFalcon:",
    turn_end="\n",
    stop=("\nUser:",),
    first="System: {system}\nUser: {text}\nFalcon:",
)
LLAMA_2 = ChatFormat(
    user="[INST] {text} [/INST]",
    turn_end="</s><s>",
    stop=("</s>",),
    first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
)

BLOOM_LICENCE = "bigscience-bloom-rail-1.0"

# Models that are known by name: what they are, and their chat formats. Any other name works too, with DIALOGUE.
KNOWN_MODELS = {
    model.name: model
    for model in (
        # The temperature is low, as its makers advise, for the model is small and easily led astray; and of two
        # beginnings that are about as likely, as "The" and "L'" for the capital of France, only the likelier is taken.
        # Without the penalty its poems never end.
        ModelConfig(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            CHATML,
            size="135M",
            licence="Apache-2.0",
            generation={"do_sample": 1, "temperature": 0.2, "top_p": 0.6, "repetition_penalty": 1.1},
        ),
        ModelConfig("bigscience/bloom", DIALOGUE, size="176B", licence=BLOOM_LICENCE),
        ModelConfig("bigscience/bloomz", INSTRUCTION, size="176B", licence=BLOOM_LICENCE),
        ModelConfig("bigscience/bloom-7b1", DIALOGUE, size="7.1B", licence=BLOOM_LICENCE),
        ModelConfig("bigscience/bloom-560m", DIALOGUE, size="560M", licence=BLOOM_LICENCE),
        ModelConfig(
            "meta-llama/Llama-2-70b-chat-hf", LLAMA_2, size="70B", licence="Llama 2 Community License Agreement"
        ),
        ModelConfig("tiiuae/falcon-180B-chat", FALCON, size="180B", licence="Falcon-180B TII License"),
    )
}


def configured(names: Sequence[str]) -> list[ModelConfig]:
    """Return the configurations of models by their names, in the same order."""
    return [KNOWN_MODELS.get(name) or ModelConfig(name, DIALOGUE) for name in names]
