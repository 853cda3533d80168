"""How the page writes conversations for a model that is not in the catalogue: what the model's template makes of
conversations whose texts are known.

The page writes one turn after the other. So a template must do the same, as most do: what it makes of a conversation
must begin with what it made of the conversation before the last answer.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from errors import ApiError
from models.catalog import ChatFormat
from models.chat_template import render_messages, template_of

if TYPE_CHECKING:
    from swarm.tokenization import TextTokenizer

SYSTEM, *TURNS = "sysword", "askword", "sayword", "askedword", "saidword", "endword"  # no template has them
Render = Callable[..., str]


def derive_format(tokenizer: "TextTokenizer") -> ChatFormat | None:
    """Return the chat format of a model; None: it has no template, or one that does not write turn after turn."""
    try:
        if (template := template_of(tokenizer)) is None:
            return None

        def render(*turns: str, system: str = "") -> str:
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
            return render_messages(template, tokenizer, messages)

        return without_begin(derived(render, tokenizer.control_tokens.tokens), tokenizer)
    except (ApiError, ValueError):
        return None


def derived(render: Render, control_tokens: list[str]) -> ChatFormat:
    """Return the chat format of a template.

    :param render: makes the text of a conversation: questions and answers in turn
    :raises ValueError: if the template does not write turn after turn
    :raises ApiError: if it refuses a conversation
    """
    asked, said, *_ = TURNS
    alone = pattern(render(asked), {asked: "{text}"})
    answered = after(render(*TURNS[:3]), alone.replace("{text}", asked))
    blank = " " * answered.startswith(" ")  # which models of such templates write themselves
    turn = pattern(after(answered, blank + said), {TURNS[2]: "{text}"})
    stop = max((token for token in control_tokens if turn.startswith(token)), key=len, default="")
    if not stop:
        raise ValueError("no token ends an answer")
    try:
        first = pattern(render(asked, system=SYSTEM), {SYSTEM: "{system}", asked: "{text}"})
    except ApiError:  # it takes no system prompt: then it stands before the first question
        first = alone.replace("{text}", "{system}\n\n{text}")
    found = ChatFormat(user=turn, turn_end="", stop=(stop,), first=first, alone=alone)
    pairs = zip(TURNS[1::2], TURNS[2::2], strict=True)
    later = "".join(blank + said + turn.replace("{text}", text) for said, text in pairs)
    if render(*TURNS) != alone.replace("{text}", asked) + later:
        raise ValueError("what is said later changes what was written before")
    return found


def pattern(text: str, names: Mapping[str, str]) -> str:
    """Replace words, each of which a text must have once, by names."""
    for word, name in names.items():
        if text.count(word) != 1:
            raise ValueError(f"{name} is not written once")
        text = text.replace(word, name)
    return text


def after(text: str, beginning: str) -> str:
    """Return what comes after the beginning of a text."""
    if not text.startswith(beginning):
        raise ValueError("an answer does not begin where the prompt ends")
    return text.removeprefix(beginning)


def without_begin(found: ChatFormat, tokenizer: "TextTokenizer") -> ChatFormat:
    """Leave out what the tokenizer itself writes at the beginning of a text."""
    added = tokenizer.encode("")
    begin = tokenizer.decode(added[:1]) if added and added[0] != tokenizer.end_token else ""
    return ChatFormat(
        found.user, found.turn_end, found.stop, found.first.removeprefix(begin), alone=found.alone.removeprefix(begin)
    )
