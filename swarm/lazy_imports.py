"""Skips imports that a swarm's programs do not need, which take a third of their start-up time.

This brings a restarted server back sooner, and with it the answers that wait for it. Import this before petals and
hivemind.
"""

import contextlib
import importlib.util
import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import Loader
from types import ModuleType
from typing import Any

import swarm.trimming  # noqa: F401

import torch.distributed

_loading = threading.RLock()
# Modules that are not loaded yet, and what is to be called before one is.
_postponed: dict[str, tuple[Loader, Callable[[], None]]] = {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence modules that print to standard output at import: bitsandbytes complains there about a missing GPU."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Postponed(ModuleType):
    """A module that is loaded when something in it is first used.

    Unlike with ``importlib.util.LazyLoader``, merely reading ``__file__``, as ``inspect`` does for all modules, does
    not load it; and several threads may be the first to use it.
    """

    def __getattr__(self, name: str) -> Any:
        load(self.__name__)
        return super().__getattribute__(name)


def load(name: str) -> None:
    """Load a postponed module, unless it is loaded already."""
    with _loading:
        entry = _postponed.pop(name, None)  # now neither others nor the module's own code can load it again
        if entry is not None:
            loader, prepare = entry
            try:
                with _quiet():
                    prepare()
                    loader.exec_module(sys.modules[name])
            except BaseException:
                _postponed[name] = entry
                raise


def postpone(name: str, prepare: Callable[[], None] = lambda: None) -> None:
    """Load a module when something in it is first used, not when it is imported.

    :param prepare: called before it is loaded
    :raises ModuleNotFoundError: if there is no module of this name
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Postponed
    _postponed[name] = spec.loader, prepare
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _import_accelerate() -> None:
    """Import accelerate without PyTorch's distributed training, all of which it imports; petals uses one function.

    accelerate skips it where PyTorch reports it as unavailable. So PyTorch reports that here, during this import. It is
    the only patch outside ``swarm.compat``, which imports this module first.
    """
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        import accelerate  # noqa: F401
    finally:
        torch.distributed.is_available = is_available


class _GetItem:
    """Stands in for the one class of ``torch._dynamo`` that Transformers imports; loads it when it is used."""

    def __enter__(self) -> None:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        self._mode = TransformGetItemToIndex()
        self._mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)


def _import_transformers() -> None:
    """Import the core of Transformers without PyTorch's compiler, which it only wants to hint some functions to.

    The compiler takes more than a second of a processor, and is used by nobody here.
    """
    if "torch._dynamo" in sys.modules:
        return
    dynamo: Any = ModuleType("torch._dynamo")
    dynamo.allow_in_graph = dynamo.assume_constant_result = lambda function: function
    dynamo.disable = lambda function=None, *_, **__: (lambda decorated: decorated) if function is None else function
    wrapped: Any = ModuleType("torch._dynamo._trace_wrapped_higher_order_op")
    wrapped.TransformGetItemToIndex = _GetItem
    stand_ins = {module.__name__: module for module in (dynamo, wrapped)}
    sys.modules.update(stand_ins)
    torch_attributes: Any = torch
    torch_attributes._dynamo = dynamo
    try:
        import transformers.generation.utils
        import transformers.modeling_utils  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]
        del torch_attributes._dynamo


postpone("scipy.optimize")  # for hivemind's averaging of gradients
_import_accelerate()
_import_transformers()
