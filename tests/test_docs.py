"""The documents are true: their examples run, their tables are the code's, and their links lead somewhere."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from admission.access import Access
from app import app
from config import Settings
from errors import SWARM_ERRORS, ApiError
from models.catalog import KNOWN_MODELS
from swarm.options import ServerOptions, flag, parse_args
from tests.support.processes import ROOT, Program
from tests.test_multiaddr import PEER
from tests.test_products import FORCED

DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
EVERYTHING = "\n".join(DOCUMENTS.values())
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
ANSWER = "The capital of France is Paris."
# Codes that no class of errors.py has: those of the router and of the handshake, and what nobody foresaw.
OTHER_CODES = {"not_found": {404}, "method_not_allowed": {405}, "bad_handshake": {400, 426}, "internal_error": {500}}


def section(document: str, heading: str) -> str:
    """Return what a document has below a heading, up to the next one of the same level."""
    level = heading.partition(" ")[0]
    return re.split(rf"^{level} ", DOCUMENTS[document].split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of a text's tables, their heads included."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def schema(name: str) -> Any:
    return app.test_client().get("/openapi.json").get_json()["components"]["schemas"][name]


# Tables


SETTINGS = {name: default for cell, default, _ in rows(DOCUMENTS["docs/configuration.md"]) for name in names(cell)}


def test_every_setting_is_documented() -> None:
    assert set(SETTINGS) == {*FIELDS, "HOST", "PORT"}


@pytest.mark.parametrize("name", FIELDS)
def test_defaults_are_documented(name: str) -> None:
    documented, default = SETTINGS[name], getattr(Settings(), name)
    if isinstance(default, bool):
        assert documented == f"`{str(default).lower()}`"
    elif isinstance(default, (int, float)):
        number, unit = re.match(r"(\d+)( MiB)?", documented).groups()  # type: ignore[union-attr]
        assert int(number) * (2**20 if unit and name.endswith("_BYTES") else 1) == default
    elif default:
        assert documented == f"`{default if isinstance(default, str) else ','.join(default)}`"
    else:
        assert documented.startswith(("none", "empty: "))


def test_every_flag_of_a_server_is_documented() -> None:
    """The table is what the rows of swarm/options.py make: paste it from the message."""
    model, *flags = dataclasses.fields(ServerOptions)
    expected = [f"| `{model.name.upper()}` | | {model.metadata['help']} |", *map(flag_row, flags)]
    table = section("docs/swarms.md", "## Flags of a server").splitlines()
    assert [line for line in table if line.startswith("| `")] == expected, "\n".join(expected)


def flag_row(row: "dataclasses.Field[Any]") -> str:
    """Return a flag's row of the table: how it is written, what it may be, what it does."""
    words, bounds, allowed = flag(row), row.metadata["bounds"], ""
    if row.metadata["choices"]:
        allowed = ", ".join(f"`{choice}`" for choice in row.metadata["choices"])
    elif bounds is not None:
        allowed = bounds.words
    if not isinstance(row.default, bool):
        words += f" {row.metadata['metavar'] or row.name.upper()}"
    if row.metadata["nargs"]:
        words += " ..."
    meaning = row.metadata["help"].replace("%(default)s", str(row.default))
    return f"| `{words}` | {allowed}{' ' * bool(allowed)}| {meaning} |"


def test_every_route_is_documented() -> None:
    routes = {
        rule.rule
        for rule in app.url_map.iter_rules()
        if rule.endpoint not in ("static", "page.index", "page.vendor_file")
    }
    assert routes and all(f"{route}`" in EVERYTHING for route in routes), routes


def test_every_error_is_documented() -> None:
    known = [(kind.status, kind.code) for kind in ApiError.__subclasses__()]
    known += [(status, code) for status, code, _ in SWARM_ERRORS.values()]
    expected = {code: {status for status, other in known if other == code} for _, code in known} | OTHER_CODES
    table = [row for row in rows(section("docs/http-api.md", "## Errors")) if row[0] != "status"]
    assert {names(code)[0]: set(map(int, status.split(", "))) for status, code, _ in table} == expected
    assert all(meaning for _, _, meaning in table)


def test_every_parameter_of_the_http_api_is_documented() -> None:
    table = rows(section("docs/http-api.md", "## Generate"))
    assert {name for row in table for name in names(row[0])} == set(schema("GenerateRequest")["properties"])


def test_every_parameter_of_the_openai_api_is_documented() -> None:
    documented = {name.partition(".")[0] for name in names(section("docs/openai-api.md", "## Parameters"))}
    for name, question in (("ChatRequest", "messages"), ("CompletionRequest", "prompt")):
        assert set(schema(name)["properties"]) - documented == {question}


def test_every_state_is_documented() -> None:
    table = rows(section("docs/http-api.md", "## State"))
    documented = {name for row in table for name in names(row[0])}
    assert documented == set(schema("ModelState")["properties"]["state"]["enum"])


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_model_is_documented(name: str) -> None:
    assert f"| `{name}`" in DOCUMENTS["docs/models.md"]


# Links


def anchors(document: str) -> set[str]:
    """Return what may stand behind the # of a link: a document's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", DOCUMENTS[document]), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(document: str, link: str) -> bool:
    if link.startswith("https://"):
        return True
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent.joinpath(path).resolve() if path else ROOT / document
    name = target.relative_to(ROOT).as_posix()
    return target.exists() and (not anchor or anchor in anchors(name))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", DOCUMENTS[document]))
    assert [link for link in links if not leads_somewhere(document, link)] == []


def test_the_design_names_files_that_exist() -> None:
    named = re.findall(r"`([a-z_]+/[a-z_/.]*|[a-z_]+\.py)`", DOCUMENTS["docs/design.md"])
    places = {
        ROOT,
        *(path.parent for path in ROOT.glob("*/__init__.py")),
        *(path.parent for path in ROOT.glob("*/*/__init__.py")),
        *(path.parent for path in ROOT.glob("*/*/*/__init__.py")),
    }
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_every_document_is_a_click_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)[^)]*\)", DOCUMENTS["README.md"]))
    assert set(DOCUMENTS) - linked == {"README.md"}


# Examples


def examples(language: str, containing: str = "") -> list[Any]:
    """Return the blocks of code in a language that contain a text, each named by its document."""
    found = []
    for document, text in DOCUMENTS.items():
        blocks = [block for kind, block in FENCE.findall(text) if kind == language and containing in block]
        found += [pytest.param(block, id=f"{document}-{number}") for number, block in enumerate(blocks, 1)]
    return found


def texts(language: str, containing: str = "") -> list[str]:
    return [example.values[0] for example in examples(language, containing)]


def run(command: list[str], program: Program, text: str, tmp_path: Path) -> str:
    script = tmp_path / "example"
    script.write_text(text.replace("127.0.0.1:5000", f"127.0.0.1:{program.port}"))
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("example", examples("bash", "curl"))
def test_curl_examples(example: str, default_program: Program, tmp_path: Path) -> None:
    (answer,) = set(texts("json", '"outputs"'))
    assert run(["bash"], default_program, example, tmp_path) == answer


SESSIONS = 'open_inference_session", max_length'


@pytest.mark.parametrize("example", examples("python", SESSIONS))
def test_http_session_example(example: str, default_program: Program, tmp_path: Path) -> None:
    output = run([sys.executable], default_program, example, tmp_path)
    assert "Paris" in output and "Berlin" in output


@pytest.mark.parametrize("example", examples("python", "websockets"))
def test_websocket_examples(example: str, default_program: Program, tmp_path: Path) -> None:
    assert run([sys.executable], default_program, example, tmp_path).endswith(ANSWER)


@pytest.mark.parametrize("example", examples("python", "from openai"))
def test_openai_examples(example: str, default_program: Program, tmp_path: Path) -> None:
    assert run([sys.executable], default_program, example, tmp_path) == ANSWER


def test_every_python_example_is_run() -> None:
    run = [*texts("python", SESSIONS), *texts("python", "websockets"), *texts("python", "from openai")]
    assert sorted(run) == sorted(texts("python"))


@pytest.mark.parametrize("example", examples("json"))
def test_json_examples(example: str) -> None:
    json.loads(example)


def test_example_of_keys(tmp_path: Path) -> None:
    (example,) = texts("json", "requests_per_minute")
    (tmp_path / "keys.json").write_text(example)
    access = Access(Settings(API_KEYS_FILE=str(tmp_path / "keys.json")))
    assert access.caller("a long secret").owner == "key ann"


# Commands


def commands() -> list[str]:
    """Return all commands but curl's: those of blocks, without line breaks, and those within sentences."""
    blocks = [block.replace("\\\n", " ") for block in texts("bash") if "curl" not in block]
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )*(?:make|\.venv/bin/\S+) [^`]+)`", FENCE.sub("", EVERYTHING))
    lines = (re.sub(" +# .*", "", line) for text in (*blocks, *inline) for line in text.splitlines())
    return sorted({" ".join(line.split()) for line in lines if line})


@pytest.mark.parametrize("command", commands())
def test_commands(command: str) -> None:
    """What they name exists: settings, targets, modules, files and flags."""
    words = shlex.split(command.replace("12D3KooW...", PEER.rpartition("/")[2]), comments=True)
    while words and (assignment := re.fullmatch("([A-Z_]+)=(.*)", words[0])):
        assert assignment[1] in {*FIELDS, "HOST", "PORT", "TMPDIR", "FAMILIES", *FORCED["AVX2"]}
        if assignment[1] in FIELDS:
            Settings.from_environment({"MODELS": "HuggingFaceTB/SmolLM2-135M-Instruct", assignment[1]: assignment[2]})
        words.pop(0)
    program, *arguments = words
    if program == "make":
        check_make(arguments)
    elif words[:2] == [".venv/bin/python", "-m"]:
        check_module(*words[2:])
    elif program.startswith(".venv/bin/"):
        assert (ROOT / program).exists()
    else:
        assert program in ("gunicorn", "flask", "git")  # tests/test_start.py starts the app by the first two


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        assert f"$({name})" in makefile if is_variable else re.search(rf"^{name}:", makefile, re.MULTILINE)


def check_module(module: str, *arguments: str) -> None:
    if module == "swarm.server":
        assert parse_args(arguments).model == arguments[0]
    elif module == "pytest":
        assert all((ROOT / argument).exists() for argument in arguments if "/" in argument)
    else:
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        source = file.read_text()
        assert all(f'"{argument}"' in source for argument in arguments if argument.startswith("--"))


def test_blocks_of_servers() -> None:
    """A model that is too large for one machine: together they serve all its blocks."""
    lines = [line for line in commands() if "swarm.server bigscience/bloom-7b1" in line]
    served = {parse_args(line.split()[3:6]).blocks for line in lines}
    assert served == {"0:15", "15:30"}
