"""The README is true: every setting and route stands in it, and its examples run."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from admission.access import Access
from app import app
from config import Settings
from errors import SWARM_ERRORS, ApiError
from models.catalog import KNOWN_MODELS
from tests.support.processes import ROOT, Program

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_every_setting_is_documented(name: str) -> None:
    assert re.search(rf"^\| .*`{name}`.* \|", README, re.MULTILINE)


def test_every_documented_setting_exists() -> None:
    table = README.split("## Configuration")[1].split("## ")[0]
    rows = re.findall(r"^\| (`[A-Z_`, ]+) \|", table, re.MULTILINE)
    names = set(re.findall(r"\w+", " ".join(rows))) - {"HOST", "PORT"}
    assert names == {field.name for field in dataclasses.fields(Settings)}


def test_every_route_is_documented() -> None:
    routes = {
        rule.rule
        for rule in app.url_map.iter_rules()
        if rule.endpoint not in ("static", "page.index", "page.vendor_file")
    }
    assert routes and all(f"{route}`" in README for route in routes), routes


def test_every_error_code_is_documented() -> None:
    codes = {kind.code for kind in ApiError.__subclasses__()} | {code for _, code, _ in SWARM_ERRORS.values()}
    assert all(f"`{code}`" in README for code in codes), codes


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_model_is_documented(name: str) -> None:
    assert f"`{name}`" in README


def test_pictures_and_files_that_are_named_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def examples(language: str, containing: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language and containing in text]


def run(command: list[str], program: Program, text: str, tmp_path: Path) -> str:
    script = tmp_path / "example"
    script.write_text(text.replace("127.0.0.1:5000", f"127.0.0.1:{program.port}"))
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_curl_example(default_program: Program, tmp_path: Path) -> None:
    (example,) = examples("bash", "curl")
    (answer,) = examples("json", '"outputs"')
    assert run(["bash"], default_program, example, tmp_path) == answer


def test_http_session_example(default_program: Program, tmp_path: Path) -> None:
    (example,) = examples("python", 'open_inference_session", max_length')
    output = run([sys.executable], default_program, example, tmp_path)
    assert "Paris" in output and "Berlin" in output


def test_websocket_example(default_program: Program, tmp_path: Path) -> None:
    (example,) = examples("python", "websockets")
    assert run([sys.executable], default_program, example, tmp_path).endswith("The capital of France is Paris.")


def test_openai_example(default_program: Program, tmp_path: Path) -> None:
    (example,) = examples("python", "from openai")
    assert run([sys.executable], default_program, example, tmp_path) == "The capital of France is Paris."


def test_example_of_keys(tmp_path: Path) -> None:
    (example,) = examples("json", "requests_per_minute")
    (tmp_path / "keys.json").write_text(example)
    access = Access(Settings(API_KEYS_FILE=str(tmp_path / "keys.json")))
    assert access.caller("a long secret").owner == "key ann"


def test_server_example_is_a_valid_command_line() -> None:
    from swarm.server.serve import parse_args

    (example,) = examples("bash", "swarm.server")
    arguments = example.replace("\\\n", " ").split()[3:]
    assert parse_args(arguments).blocks == "0:15"
