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
