"""Chat templates, rendered as Transformers' ``apply_chat_template`` renders them, but within bounds.

Templates come with checkpoints. Sensible ones write a conversation once, within milliseconds.
"""

import functools
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension

from errors import InvalidParameter, TooLong

# The largest conversation that a request holds by default has 2**20 bytes.
MAX_RENDERED = 2**22  # characters
RENDER_TIMEOUT = 5.0  # seconds

# What a template or its expressions raise.
FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)

_deadline: ContextVar[float] = ContextVar("deadline")  # of what is being rendered, on the clock of time.monotonic


class Deadline(Extension):
    """Ends what takes too long: each round of a loop and each call of a macro looks at the time."""

    def look(self) -> str:
        """Return nothing to write.

        :raises TooLong: if the time is over
        """
        if time.monotonic() > _deadline.get():
            raise TooLong(f"the model's chat template takes more than {RENDER_TIMEOUT:.0f} s")
        return ""

    def watch(self, tree: nodes.Template) -> nodes.Template:
        """Let a template look at the time."""
        bodies = [node.body for node in tree.find_all(nodes.For)]
        bodies += [node.body for node in tree.find_all(nodes.Macro)]
        bodies += [node.body for node in tree.find_all(nodes.CallBlock)]
        for body in bodies:
            body.insert(0, nodes.Output([self.call_method("look")]))
        return tree


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    :raises InvalidParameter: if the template refuses the variables, or cannot be used
    :raises TooLong: if it writes too much, or takes too long
    """
    token = _deadline.set(time.monotonic() + RENDER_TIMEOUT)
    text, size = [], 0
    try:
        for piece in compiled(template).generate(**variables):
            text.append(piece)
            size += len(piece)
            if size > MAX_RENDERED:
                raise TooLong(f"the model's chat template writes more than {MAX_RENDERED} characters")
    except FAILURES as error:
        raise InvalidParameter(f"messages do not fit the model's chat template: {error}") from None
    finally:
        _deadline.reset(token)
    return "".join(text)


@functools.lru_cache(maxsize=16)  # of the models' templates, which no user sends
def compiled(template: str) -> Template:
    """Compile a template.

    :raises TemplateSyntaxError: if it is none
    """
    tree = environment().parse(template)
    deadline: Deadline = environment().extensions[Deadline.identifier]  # type: ignore[assignment]
    return environment().from_string(deadline.watch(tree))


@functools.cache
def environment() -> Environment:
    """Return Transformers' environment of chat templates: its sandbox, tags, filters and functions."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    of_transformers: Environment = _compile_jinja_template("").environment
    return of_transformers.overlay(extensions=[Deadline])
