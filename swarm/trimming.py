"""Lets Transformers import less: it imports whatever it finds installed. Import this before Transformers."""

import functools
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Trimming(MetaPathFinder, Loader):
    """Stands in the way of one module of Transformers until that is imported, and changes some of its functions.

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
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
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


if "transformers" not in sys.modules:
    sys.meta_path.insert(0, _Trimming())
