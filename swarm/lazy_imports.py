"""Imports that a swarm's programs can do without: a third of the time that they take to start.

A server that died is back the sooner, and so is the answer that waits for it. Import this before petals and hivemind.
"""

import contextlib
import importlib.util
import io
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.abc import Loader
from types import ModuleType
from typing import Any

import torch.distributed

_loading = threading.RLock()
_postponed: dict[str, Loader] = {}  # modules that are not loaded yet


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Import modules that print on standard output at import: bitsandbytes complains there of a missing GPU."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Postponed(ModuleType):
    """A module that is loaded when something in it is used.

    Unlike those of ``importlib.util.LazyLoader`` it is not loaded by whoever only looks at ``__file__``, as ``inspect``
    does with all modules; and several threads may be the first to use it.
    """

    def __getattr__(self, name: str) -> Any:
        load(self.__name__)
        return super().__getattribute__(name)


def load(name: str) -> None:
    """Load a module that was postponed, if that has not been done."""
    with _loading:
        loader = _postponed.pop(name, None)  # nobody else's from now on, nor that of the code that it runs
        if loader is not None:
            try:
                with _quiet():
                    loader.exec_module(sys.modules[name])
            except BaseException:
                _postponed[name] = loader
                raise


def postpone(name: str) -> None:
    """Let a module be loaded when something in it is first used, not when it is imported.

    :raises ModuleNotFoundError: if there is none of this name
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Postponed
    _postponed[name] = spec.loader
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _import_accelerate() -> None:
    """accelerate, of which petals uses one function, imports all of PyTorch's training over several machines.

    It does not where PyTorch says that it cannot do that. So PyTorch says so here, for as long as this import takes. It
    is the only patch outside of ``swarm.compat``, which imports this module first.
    """
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        import accelerate  # noqa: F401
    finally:
        torch.distributed.is_available = is_available


postpone("scipy.optimize")  # for hivemind's averaging of gradients
_import_accelerate()
