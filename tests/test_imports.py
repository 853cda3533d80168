"""Modules that are loaded when they are used."""

import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from swarm.lazy_imports import postpone

import pytest

SOURCE = """
print("not to be seen")
import {package}.count
{package}.count.loaded += 1
value = 7

def __getattr__(name):
    if name == "computed":
        return 8
    raise AttributeError(name)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module ``lazy`` that counts in ``count`` how often it was loaded."""
    name = f"package_{tmp_path.name}"
    directory = tmp_path / name
    directory.mkdir()
    (directory / "__init__.py").touch()
    (directory / "count.py").write_text("loaded = 0\n")
    (directory / "lazy.py").write_text(SOURCE.format(package=name))
    (directory / "broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_loaded_by_its_first_use(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    postpone(f"{package}.lazy")
    lazy = importlib.import_module(f"{package}.lazy")
    count = importlib.import_module(f"{package}.count")
    assert inspect.getmodule(test_loaded_by_its_first_use) is sys.modules[__name__]  # looks at the files of all modules
    assert count.loaded == 0
    assert sys.modules[package].lazy is lazy
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(lazy.value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert found == [7] * 8
    assert count.loaded == 1
    assert lazy.computed == 8
    with pytest.raises(AttributeError, match="missing"):
        _ = lazy.missing
    postpone(f"{package}.lazy")  # is loaded, and stays
    assert importlib.import_module(f"{package}.lazy") is lazy
    assert capsys.readouterr().out == ""


def test_one_that_cannot_be_loaded(package: str) -> None:
    postpone(f"{package}.broken")
    broken = importlib.import_module(f"{package}.broken")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            _ = broken.value
    with pytest.raises(ModuleNotFoundError, match="absent"):
        postpone(f"{package}.absent")
