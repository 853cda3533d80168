"""Skips imports that a swarm's programs do not need, which take a third of their start-up time.

This brings a restarted server back sooner, and with it the answers that wait for it. Import this before petals and
hivemind.
"""

import contextlib
import functools
import importlib.util
import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

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


class _Trimming(MetaPathFinder, Loader):
    """Lets Transformers find fewer packages than there are: it imports whatever it finds.

    Nothing here distributes a model over machines, compiles masks, looks at images, or matches boxes in pictures.
    """

    name = "transformers.utils.import_utils"
    absent = (
        "is_torch_distributed_available",
        "is_torch_flex_attn_available",
        "is_vision_available",
        "is_torchvision_available",
        "is_scipy_available",
    )

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.name else None
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name in self.absent:
            setattr(module, name, lambda: False)
        # Transformers splits 1,700 files into their lines, to find the last one that begins so.
        names_in = module.fetch__all__
        module.fetch__all__ = lambda text: names_in(_from_last_line(text, "__all__"))  # type: ignore[attr-defined]
        # It reads each of them twice.
        read = functools.cache(module.create_import_structure_from_path)
        module.create_import_structure_from_path = lambda path: read(  # type: ignore[attr-defined]
            str(path) if os.path.isdir(path) else os.path.dirname(path)
        )


def _from_last_line(text: str, start: str) -> str:
    """Return the text from the last line on that begins so; empty if none does."""
    place = f"\n{text}".rfind(f"\n{start}")
    return text[place:] if place >= 0 else ""


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
    if "torch._dynamo" in sys.modules or "transformers" in sys.modules:
        return
    dynamo: Any = ModuleType("torch._dynamo")
    dynamo.allow_in_graph = dynamo.assume_constant_result = lambda function: function
    dynamo.disable = lambda function=None, *_, **__: (lambda decorated: decorated) if function is None else function
    wrapped: Any = ModuleType("torch._dynamo._trace_wrapped_higher_order_op")
    wrapped.TransformGetItemToIndex = _GetItem
    stand_ins = {module.__name__: module for module in (dynamo, wrapped)}
    finder = _Trimming()
    sys.meta_path.insert(0, finder)
    sys.modules.update(stand_ins)
    torch_attributes: Any = torch
    torch_attributes._dynamo = dynamo
    try:
        import transformers.generation.utils
        import transformers.modeling_utils  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        for name in stand_ins:
            del sys.modules[name]
        del torch_attributes._dynamo


postpone("scipy.optimize")  # for hivemind's averaging of gradients
_import_accelerate()
_import_transformers()
