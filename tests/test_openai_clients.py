"""Programs that others wrote for the OpenAI API: npm's openai, the llm command line, langchain-openai.

OpenAI's Python package is used all over test_openai_api.py; lm-eval in test_lm_eval.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.conftest import LiveApp
from tests.support.processes import ROOT
from tests.test_openai_api import CHAT, ENDLESS, complete, post
from tests.test_session import wait_until

TIMEOUT = 120  # seconds for a whole program
LLM = [sys.executable, "-m", "llm"]
# The machine's own, or the one that came with npm: see bin/get-npm-packages.
NODE = shutil.which("node") or shutil.which("node", path=str(Path(sys.executable).parent))


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **environment}, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def chat_text(app: LiveApp, **options: Any) -> str:
    answer = post(app, "/v1/chat/completions", messages=CHAT, temperature=0, **options)
    return answer["choices"][0]["message"]["content"]


@pytest.mark.skipif(not (ROOT / "node_modules/openai").exists(), reason="make test installs npm's packages")
def test_javascript(live_app: LiveApp) -> None:
    assert NODE is not None
    opened = len(live_app.service.sessions)
    seen = json.loads(run([NODE, "tests/support/openai_client.mjs", f"{live_app.url}/v1", live_app.model_name]))
    assert live_app.model_name in seen["models"]
    assert seen["whole"] == seen["streamed"] == chat_text(live_app, max_tokens=20)
    assert seen["logprobs"] == seen["tokens"] == seen["usage"]["completion_tokens"]
    assert len(set(seen["several"])) == 2
    assert seen["stopped"]["text"] == seen["text"][: seen["text"].index(seen["stop"])]
    assert seen["stopped"]["finish_reason"] == "stop"
    assert seen["unknown"] == {"status": 404, "code": "model_not_found"}
    assert seen["tooLong"] == {"status": 400, "code": "context_length_exceeded"}
    # What it hung up on, aborted and did not wait for has ended here as well.
    wait_until(lambda: len(live_app.service.sessions) <= opened, "a session is still open")


def test_llm_command_line(live_app: LiveApp, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: swarm\n  model_name: {json.dumps(live_app.model_name)}\n  api_base: {live_app.url}/v1\n"
        f"- model_id: swarm-text\n  model_name: {json.dumps(live_app.model_name)}\n  api_base: {live_app.url}/v1\n"
        "  completion: true\n"
        f"- model_id: unknown\n  model_name: gpt-4\n  api_base: {live_app.url}/v1\n"
    )
    # The bundled model's package has a plugin for llm, whose own needs are not installed.
    environment = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": "none"}
    options = ["-o", "temperature", "0", "-o", "max_tokens", "20"]
    expected = chat_text(live_app, max_tokens=20)
    for extra in ([], ["--no-stream"]):
        found = run([*LLM, "-m", "swarm", *options, *extra, CHAT[0]["content"]], **environment)
        assert found.strip() == expected.strip()
    # It keeps the conversation and sends it again.
    assert run([*LLM, "-c", *options, "And why?"], **environment).strip()
    text = complete(live_app, prompt="The quick brown fox", max_tokens=20)["choices"][0]["text"]
    found = run([*LLM, "-m", "swarm-text", *options, "--no-stream", "The quick brown fox"], **environment)
    assert found.strip() == text.strip()
    with pytest.raises(AssertionError, match="gpt-4"):
        run([*LLM, "-m", "unknown", "x"], **environment)
    opened = len(live_app.service.sessions)
    command = [*LLM, "-m", "swarm", "-o", "max_tokens", "1900", "-o", "logit_bias", json.dumps(ENDLESS), "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **environment}) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.kill()  # in the middle of its answer
    wait_until(lambda: len(live_app.service.sessions) <= opened, "a session is still open")


def test_langchain(live_app: LiveApp) -> None:
    options: dict[str, Any] = {
        "base_url": f"{live_app.url}/v1",
        "api_key": "none",
        "model": live_app.model_name,
        "temperature": 0,
        "max_tokens": 20,
        "max_retries": 0,
    }
    chat = ChatOpenAI(**options, stream_usage=True)
    expected = chat_text(live_app, max_tokens=20)
    answer = chat.invoke([HumanMessage(CHAT[0]["content"])])
    assert isinstance(answer, AIMessage) and answer.content == expected
    assert answer.usage_metadata is not None and 0 < answer.usage_metadata["output_tokens"] <= 20
    pieces = list(chat.stream([HumanMessage(CHAT[0]["content"])]))
    assert "".join(str(piece.content) for piece in pieces) == expected
    several = chat.model_copy(update={"n": 2, "temperature": 1.0}).generate([[HumanMessage("x")]])
    assert len(several.generations[0]) == 2
    logprobs = chat.bind(logprobs=True, top_logprobs=2).invoke("x")
    assert len(logprobs.response_metadata["logprobs"]["content"]) > 0
    text = complete(live_app, prompt="The quick brown fox", max_tokens=20)["choices"][0]["text"]
    assert OpenAI(**options).invoke("The quick brown fox") == text
    stop = text[5:8]
    assert OpenAI(**options).invoke("The quick brown fox", stop=[stop]) == text[: text.index(stop)]
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        ChatOpenAI(**{**options, "model": "gpt-4"}).invoke("x")
    with pytest.raises(openai.BadRequestError, match="exceed the model's"):
        ChatOpenAI(**{**options, "max_tokens": 9999}).invoke("x")
    with pytest.raises(openai.APITimeoutError):
        ChatOpenAI(**{**options, "timeout": 0.001}).invoke("x")
    opened = len(live_app.service.sessions)
    endless: Any = ChatOpenAI(**{**options, "max_tokens": 1900, "logit_bias": ENDLESS}).stream("x")
    next(endless)
    endless.close()  # hangs up
    wait_until(lambda: len(live_app.service.sessions) <= opened, "a session is still open")
