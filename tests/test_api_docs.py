"""The OpenAPI document is true: Schemathesis finds no 5xx and no answer outside its schema; and the page for it."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import app
from generation.parameters import GenerationParams
from tests.conftest import LiveApp, serve
from tests.support.browser import axe_violations, browser_page
from tests.support.client import call
from tests.support.processes import ROOT
from web.schemas import CloseRequest, GenerateRequest, OpenRequest

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
TIMEOUT = 240  # seconds
SHORT = 48  # tokens: requests are many, and their answers may be as long as a session


@pytest.fixture(scope="module")
def short_app(live_app: LiveApp) -> Iterator[LiveApp]:
    """An app with one model that takes short sessions only, and whose completions are short."""
    settings = dataclasses.replace(live_app.service.settings, MODELS=(live_app.model_name,))
    with serve(settings) as live, pytest.MonkeyPatch.context() as patch:
        # Two of the requests have as many prompts as are allowed, and do not say how long the answers may be.
        patch.setattr("openai_api.reading.DEFAULT_MAX_TOKENS", 2)
        model = live.service.models.served[live.model_name].model
        assert model is not None
        model.context_length = SHORT
        yield live


def test_schemathesis(short_app: LiveApp, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{short_app.url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "coverage,fuzzing", "--max-examples", "2", "--seed", "1", "--workers", "2"]
    # Most texts that it makes for the model in /v1/models/{model} are no path, and it says so.
    command += ["--request-timeout", "60", "--no-color", "--suppress-health-check", "filter_too_much"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "Tested: 15" in result.stdout, result.stdout[-2000:]


def openapi() -> Any:
    return app.test_client().get("/openapi.json").json


def test_every_route_is_in_the_document() -> None:
    paths = openapi()["paths"]
    others = {"/static/<path:filename>", "/docs", "/docs/<path:name>", "/openapi.json", "/api/v2/generate"}
    pages = {rule.rule for rule in app.url_map.iter_rules() if rule.endpoint.startswith("page.")}
    rules = {rule.rule for rule in app.url_map.iter_rules()} - others - pages
    assert {rule.replace("<path:model>", "{model}") for rule in rules} == set(paths)


def test_parameters_of_the_http_api_are_in_the_document() -> None:
    read = {field.name for field in dataclasses.fields(GenerationParams)} - {"logit_bias", "logprobs"}
    assert set(GenerateRequest.model_fields) == read | {"model", "session_id"}
    assert set(OpenRequest.model_fields) == {"max_length", "model"}
    assert set(CloseRequest.model_fields) == {"session_id"}


def test_the_websocket_protocol_stands_beside_it() -> None:
    description = openapi()["info"]["description"]
    assert "open_inference_session" in description and "finish_reason" in description
    document = (ROOT / "docs" / "websocket-api.md").read_text()
    assert document.startswith("# ") and document.count("\n# ") == 0
    headings = re.findall("^#+ .*$", document, re.MULTILINE)
    assert [line for line in description.splitlines() if line.startswith("#")] == [f"#{line}" for line in headings]
    assert "](" in document and "](" not in description  # links to files that are not served


def test_page(short_app: LiveApp) -> None:
    with browser_page() as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{short_app.url}/docs")
        page.get_by_text("/v1/chat/completions").first.wait_for(timeout=30_000)
        assert not errors
        page.locator(".opblock").first.wait_for()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert axe_violations(page) == []
        assert all(url.startswith((short_app.url, "data:")) for url in requests)


def test_files_of_the_page(short_app: LiveApp) -> None:
    assert call(short_app.url, "/docs/../app.py")[0] == 404
    assert call(short_app.url, "/docs/swagger-ui.css")[0] == 200
