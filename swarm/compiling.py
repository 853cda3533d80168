"""Loops that Numba compiles, kept for the next start."""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


def kept(compiler: Callable[..., Any], function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function, as a rule when it is first called; keep what is compiled, if that can be.

    :param compiler: ``njit`` or the like: takes options and returns a decorator
    """
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError as error:  # neither beside its file nor in a cache directory can anything be written
        log.warning("%s; it is compiled at each start, which takes seconds", error)
        return compiler(**options)(function)


def typed(function: Any, signature: tuple[Any, ...]) -> Any:
    """Compile what ``njit`` has made for arguments of these Numba types, and for no others.

    Arguments may have types that can be converted to them without loss, as contiguous arrays to any.
    """
    function.compile(signature)
    function.disable_compile()
    return function


def load_compiler() -> None:
    """Load what Numba otherwise loads when a function is first called: much of itself, some tenths of a second.

    Processes that are forked afterwards share it.
    """
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
