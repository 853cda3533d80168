"""The house rules, read from the source alone: who may import whom, and how large things may grow.

That ``import app`` really leaves petals and hivemind out is seen in tests/test_start.py; here it is read.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.processes import ROOT

# Which rooms a room may import from, anywhere in a file. A module is in the room with the longest name that fits it.
# What is not in a row is forbidden: no door is in another door's row, swarm.client is in none of swarm.server, ...
SWARM = "swarm swarm.errors swarm.waiter swarm.hardware"  # what all floors may know of the lower one
UNDER_SERVICE = f"admission models models.catalog generation config errors {SWARM} swarm.client"
UNDER_A_DOOR = f"service inference_sessions admission.addresses {UNDER_SERVICE}"
MAY_IMPORT = {
    # the upper floor, from the top
    "gunicorn.conf": "app front service admission admission.addresses config errors",
    "app": f"http_api websocket_api openai_api web {UNDER_A_DOOR}",
    "http_api": f"web {UNDER_A_DOOR}",
    "websocket_api": f"web {UNDER_A_DOOR}",
    "openai_api": f"web {UNDER_A_DOOR}",
    "web": UNDER_A_DOOR,
    "service": f"inference_sessions {UNDER_SERVICE}",
    "inference_sessions": f"admission generation errors {SWARM} swarm.client",
    "front": "admission admission.addresses config errors",
    "admission": f"admission.addresses generation config errors {SWARM}",
    "models": f"models.catalog config errors {SWARM} swarm.client swarm.families swarm.weights swarm.local "
    "swarm.compat swarm.options",
    "generation": f"errors {SWARM} swarm.client",
    "config": f"admission.addresses errors {SWARM} swarm.weights",
    "errors": "swarm.errors",
    "models.catalog": "",
    "admission.addresses": "",
    # the lower floor, which knows nothing of the upper one
    "swarm.local": f"{SWARM} swarm.client swarm.compat swarm.options swarm.weights",
    "swarm.client": f"{SWARM} swarm.families swarm.products swarm.wire swarm.compat swarm.weights",
    "swarm.server": f"{SWARM} swarm.families swarm.products swarm.wire swarm.compat swarm.weights swarm.options",
    "swarm.families": f"{SWARM} swarm.products swarm.compat swarm.weights",
    "swarm.products": f"{SWARM} swarm.compat",
    "swarm.compat": f"{SWARM} swarm.wire",
    "swarm.wire": SWARM,
    "swarm.options": f"{SWARM} swarm.weights",
    "swarm.weights": "swarm swarm.errors",
    "swarm.hardware": "swarm",
    "swarm": "swarm.errors swarm.waiter",
    "swarm.waiter": "swarm.errors",
    "swarm.errors": "",
}
# These stand outside and may import any room; of each other, only this.
OUTSIDE = {"tests": "tests.support benchmarks", "benchmarks": "tests.support", "tests.support": ""}

# Packages that only some rooms may import; tests and benchmarks may import all.
ONLY_IN = {
    "flask": "app http_api websocket_api openai_api web",
    "petals": "swarm swarm.client swarm.server swarm.families swarm.compat swarm.wire",
    "hivemind": "swarm swarm.client swarm.server swarm.compat swarm.wire",
}

# Modules, or packages, that may use names of other projects that begin with an underscore, and why.
PRIVATE_NAMES = {
    "swarm.compat": "its patches replace parts of petals and hivemind",
    "swarm.wire": "reads what peers send with the extensions that hivemind's serialiser keeps to itself",
    "swarm.lazy_imports": "what PyTorch and Transformers import at once is taken out of their way",
    "swarm.families": "petals registers families, and Transformers names layers and attention, in private only",
    "swarm.control_tokens": "Transformers does not tell in public what a chat template writes",
    "swarm.products.choice": "PyTorch has no public name for oneDNN's packed matrix product",
    "swarm.products.linear": "the same",
    "swarm.client.node": "hivemind's DHT gives up neither its process nor its daemon by a public name",
    "swarm.client.routing": "petals' manager of routes has no public way to be read without its thread",
    "swarm.client.stream": "petals names its handlers' methods in private",
    "swarm.server.blocks": "PyTorch has no public name for many copies at once",
    "swarm.server.handler": "petals' handler is extended by overriding what it calls itself",
    "swarm.server.announcing": "petals' server has no public hook before it pings others",
    "front.request_reader": "gunicorn's request keeps to itself that the client waits for leave to send",
    "web.logs": "a logging formatter does not tell its format",
    "web.openapi": "Flask's documents name this way to get at the app behind a proxy",
    "websocket_api": "the same: the thread of an answer outlives the request",
}

# Modules between rooms: what they take and give has a type. JSON is dict[str, Any] or Mapping[str, Any].
SEAMS = (
    "service",
    "inference_sessions",
    "admission",
    "generation",
    "models.loading",
    "models.catalog",
    "web.reply_stream",
    "swarm.waiter",
    "swarm.client.warm_sessions",
)
ANY_ALLOWED = {
    "generation.parameters": "a value of a request may be whatever JSON has",
    "generation.sampling": "Transformers' settings have no types",
}

# In lines, docstrings included. Tests may be longer: they are lists.
LONGEST_FUNCTION, LONGEST_FILE = 50, 400
LONG_FUNCTIONS = {
    "swarm.server.kernels._attend": "one nest of loops that is compiled as one, for every way of scoring keys",
    "benchmarks.serving.main": "an experiment from its options to its table, in the order in which it happens",
}
LONG_FILES = {
    "openai_api.schemas": "a flat list of what goes in and comes out",
    "inference_sessions": "its two locks are best read together",
    "front.worker": "one loop over all connections that are not yet requests",
    "web.websocket": "what one connection has is guarded by one lock, and best read together",
}


class Import(NamedTuple):
    module: str  # as it is written, with the name after ``from``
    line: int
    at_once: bool  # when the importing module is loaded, and not within a function or for type checkers only


Sources = Mapping[str, str]  # module to text


def read_sources(root: Path) -> dict[str, str]:
    """Return all modules of a checkout: files at its top and those of its packages."""
    packages = [directory for directory in sorted(root.iterdir()) if (directory / "__init__.py").is_file()]
    files = [*root.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file.read_text()
        for file in files
    }


def room_of(name: str) -> str:
    """Return the room that a module is in, or a name in it; empty for what is not of this project."""
    rooms = [room for room in (*MAY_IMPORT, *OUTSIDE) if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default="")


@functools.cache
def imports(text: str) -> list[Import]:
    """Return what a module imports, each name that is taken from a package as a module of its own."""
    found: list[Import] = []

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            at_once = False
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "imports are absolute"
            found.extend(Import(f"{node.module}.{alias.name}", node.lineno, at_once) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                visit(statement, False)
            for statement in node.orelse:
                visit(statement, at_once)
        else:
            for inner in ast.iter_child_nodes(node):
                visit(inner, at_once)

    visit(ast.parse(text), True)
    return found


def forbidden_imports(sources: Sources) -> Iterator[str]:
    for module, text in sources.items():
        room = room_of(module)
        if not room:
            yield f"{module} is in no room"
        for name, line, _ in imports(text):
            other = room_of(name)
            if not other or other == room:
                continue
            allowed = OUTSIDE[room].split() if room in OUTSIDE else MAY_IMPORT.get(room, "").split()
            if other not in allowed and not (room in OUTSIDE and other in MAY_IMPORT):
                yield f"{module}:{line} imports {name}, but {room} may not import from {other}"


def misplaced_packages(sources: Sources) -> Iterator[str]:
    for module, text in sources.items():
        for name, line, _ in imports(text):
            rooms = ONLY_IN.get(name.partition(".")[0])
            if rooms is not None and room_of(module) not in (*rooms.split(), *OUTSIDE):
                yield f"{module}:{line} imports {name}, which only these may: {rooms}"


def loaded_with(module: str, sources: Sources) -> dict[str, str]:
    """Return all that is loaded when a module is imported, each with the module that imports it first."""
    found, waiting = {module: ""}, [module]
    while waiting:
        current = waiting.pop()
        for name, _, at_once in imports(sources.get(current, "")):
            # Each package on the way is loaded too, and runs its __init__.py.
            parts = name.split(".")
            for part in (".".join(parts[: count + 1]) for count in range(len(parts))) if at_once else ():
                if part not in found:
                    found[part] = current
                    waiting.append(part)
    return found


def foreign_private_names(sources: Sources) -> Iterator[tuple[str, str]]:
    """Yield modules of this project, and where they use a private name that they do not define."""
    for module, text in sources.items():
        if room_of(module) in OUTSIDE:
            continue
        tree = ast.parse(text)
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)]
        own = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
        own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        for node in used:
            if ast.unparse(node) == "os._exit":  # whose name is public, and a warning
                continue
            if ast.unparse(node.value) == "super()" or node.attr not in own:
                yield module, f"{module}:{node.lineno} uses {ast.unparse(node)}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def untyped_seams(sources: Sources) -> Iterator[tuple[str, str]]:
    """Yield modules of ``SEAMS``, and what in them takes, gives or holds ``Any`` other than JSON."""
    for module, text in sources.items():
        if not any(module == seam or module.startswith(f"{seam}.") for seam in SEAMS):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = ast.walk(node.args)
                annotations = [argument.annotation for argument in arguments if isinstance(argument, ast.arg)]
                name, found = node.name, [*annotations, node.returns]
            elif isinstance(node, ast.ClassDef):
                found = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
                name = node.name
            else:
                continue
            if any(holds_any(annotation) for annotation in found if annotation is not None):
                yield module, f"{module}:{node.lineno} {name} has Any in its signature"


def holds_any(annotation: ast.expr) -> bool:
    words = ast.unparse(annotation)
    for json in ("dict[str, Any]", "Mapping[str, Any]"):
        words = words.replace(json, "JSON")
    return "Any" in words.replace("[", " ").replace("]", " ").replace(",", " ").replace("'", " ").split()


def long_functions(sources: Sources) -> Iterator[tuple[str, str]]:
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)) if room_of(module) != "tests" else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    yield f"{module}.{node.name}", f"{module}:{node.lineno} {node.name} has {lines} lines"


def long_files(sources: Sources) -> Iterator[tuple[str, str]]:
    for module, text in sources.items():
        lines = text.count("\n")
        if lines > LONGEST_FILE and room_of(module) != "tests":
            yield module, f"{module} has {lines} lines"


def unexplained(found: Iterator[tuple[str, str]], reasons: Mapping[str, str]) -> list[str]:
    """Return what breaks a rule without a reason, its own or its package's, and what has a reason without need."""
    broken = list(found)
    needed: set[str] = set()
    unlisted = []
    for name, words in broken:
        given = {reason for reason in reasons if name == reason or name.startswith(f"{reason}.")}
        needed |= given
        unlisted += [] if given else [words]
    return unlisted + [f"{name} stands in the list without need" for name in reasons if name not in needed]


SOURCES = read_sources(ROOT)


# The rules hold


def test_rooms_import_only_what_they_may() -> None:
    assert len(SOURCES) > 50
    assert list(forbidden_imports(SOURCES)) == []


def test_no_room_is_above_and_below_another() -> None:
    """The table has no circles, so the imports have none: those within functions count too."""
    left = {room: set(row.split()) for room, row in MAY_IMPORT.items()}
    assert all(row <= set(left) for row in left.values()), "a row names what is no room"
    while done := {room for room, row in left.items() if not row & set(left)}:
        left = {room: row for room, row in left.items() if room not in done}
    assert not left


def test_flask_petals_and_hivemind_stay_in_their_rooms() -> None:
    assert list(misplaced_packages(SOURCES)) == []


def test_importing_the_app_loads_no_petals() -> None:
    loaded = loaded_with("app", SOURCES)
    assert "service" in loaded and "swarm.client" in loaded
    assert [(name, loaded[name]) for name in ("petals", "hivemind") if name in loaded] == []


@pytest.mark.parametrize("package", ["swarm.client", "swarm.server"])
def test_packages_whose_start_is_empty(package: str) -> None:
    """A name offered there would load petals with every module of the package."""
    assert [type(node) for node in ast.parse(SOURCES[package]).body] in ([], [ast.Expr])


def test_private_names_of_others_stay_where_they_are_listed() -> None:
    assert unexplained(foreign_private_names(SOURCES), PRIVATE_NAMES) == []


def test_seams_have_types() -> None:
    assert unexplained(untyped_seams(SOURCES), ANY_ALLOWED) == []


def test_functions_fit_on_a_screen() -> None:
    assert unexplained(long_functions(SOURCES), LONG_FUNCTIONS) == []


def test_files_are_short() -> None:
    assert unexplained(long_files(SOURCES), LONG_FILES) == []


# The rules can be broken


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("http_api", "import websocket_api"),
        ("openai_api.routes", "from http_api import call"),
        ("web.openapi", "from openai_api.schemas import Error"),
        ("swarm.client.model", "from swarm.server import serve"),
        ("swarm.server.serve", "def late():\n    from swarm import client"),
        ("swarm.hardware", "import config"),
        ("swarm.client.session", "if TYPE_CHECKING:\n    from service import Service"),
        ("service", "def f():\n    import web.pages"),
        ("benchmarks.soak", "from tests.test_session import wait_until"),
        ("tests.support.tiny", "from tests import conftest"),
        ("stranger", ""),
    ],
)
def test_forbidden_imports_are_found(module: str, text: str) -> None:
    assert len(list(forbidden_imports({module: text}))) == 1


def test_allowed_imports_are_not_found() -> None:
    fine = {
        "app": "import http_api\nfrom web import pages",
        "http_api": "from service import Service\nimport json",
        "benchmarks.soak": "from tests.support.client import call\nfrom swarm.client.model import Swarm\nimport petals",
        "swarm.compat": "import petals",
        "tests.test_x": "import flask\nfrom tests.support import client\nimport swarm.server.serve",
    }
    assert [*forbidden_imports(fine), *misplaced_packages(fine)] == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("service", "from flask import Flask"),
        ("models.loading", "def f():\n    import petals.server"),
        ("swarm.weights.gguf", "import hivemind"),
    ],
)
def test_misplaced_packages_are_found(module: str, text: str) -> None:
    assert len(list(misplaced_packages({module: text}))) == 1


def test_what_is_loaded_at_once_is_found() -> None:
    sources = {
        "app": "import a.b\ndef f():\n    import late",
        "a": "from c import name",
        "c": "if TYPE_CHECKING:\n    import types_only\nelse:\n    import petals.client",
        "late": "import hivemind",
    }
    loaded = loaded_with("app", sources)
    assert {"a", "a.b", "c"} <= set(loaded) and not {"late", "hivemind"} & set(loaded)
    assert "petals" not in loaded_with("app", sources | {"a": ""})


@pytest.mark.parametrize("text", ["x._thread", "def f(dht):\n    return dht._ready", "super()._ping()"])
def test_foreign_private_names_are_found(text: str) -> None:
    assert [module for module, _ in foreign_private_names({"service": text})] == ["service"]
    own = "class A:\n    def _f(self):\n        self._x = A()._f() + other._x + self.__class__.__name__"
    assert list(foreign_private_names({"service": own})) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(x: Any): pass",
        "def f(*, x: 'Any | None' = None): pass",
        "async def f() -> list[Any]: pass",
        "def f(x: dict[int, Any]): pass",
        "class A:\n    outbox: Any",
    ],
)
def test_untyped_seams_are_found(text: str) -> None:
    assert [module for module, _ in untyped_seams({"admission.fair_queue": text})] == ["admission.fair_queue"]
    assert list(untyped_seams({"swarm.client.head": text})) == []
    fine = "def f(x: dict[str, Any], y: Mapping[str, Any]) -> AnyStr: pass\nclass A:\n    kept: int"
    assert list(untyped_seams({"service": fine})) == []


def test_long_ones_are_found() -> None:
    function = "def f():\n" + "    pass\n" * 49
    assert list(long_functions({"service": function})) == []
    assert [name for name, _ in long_functions({"service": function + "    pass\n"})] == ["service.f"]
    assert [name for name, _ in long_files({"service": "\n" * 401, "tests.test_x": "\n" * 401})] == ["service"]
    assert list(long_files({"service": "\n" * 400})) == []


def test_reasons_are_needed() -> None:
    found = [("a", "a is long"), ("b", "b is long")]
    assert unexplained(iter(found), {"a": "because"}) == ["b is long"]
    assert unexplained(iter([("a.part", "it is long")]), {"a": "because"}) == []
    assert unexplained(iter(found[:1]), {"a": "because", "b": "it was"}) == ["b stands in the list without need"]


def test_sources_are_read(tmp_path: Path) -> None:
    for name in ("top.py", "package/__init__.py", "package/inner/part.py", "no_package/file.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import os\n")
    assert set(read_sources(tmp_path)) == {"top", "package", "package.inner.part"}
