"""Attacks on what keys and origins protect, and on the log."""

import contextlib
import re

from benchmarks.attacks.client import Client
from benchmarks.attacks.target import KEY, WITH_KEY, Target, attack

ONE_A_MINUTE = {**WITH_KEY, "NON_PUBLIC_MODELS": "HuggingFaceTB/SmolLM2-135M-Instruct"}
OWN_ORIGIN = {"CORS_ORIGINS": "http://127.0.0.1:1", "WEBSOCKET_ORIGINS": "http://127.0.0.1:1", "TORCH_DTYPE": "float32"}
FOREIGN = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
FORGED = "2026-01-01 00:00:00,000 CRITICAL [-] petals_chat: FORGED"


@attack("the page's token without a key", WITH_KEY)
def page_token(target: Target) -> str | None:
    token = ""
    for path in ("/", "/swarm"):
        _, text = target.stranger.call("GET", path)
        if found := re.search(r'"page_token":\s*"([^"]+)"', str(text)):
            token = found[1]
    for opening in ({"page_token": token}, {"page_token": "x"}, {}, {"api_key": KEY + "x"}):
        with contextlib.closing(target.stranger.websocket()) as websocket:
            reply = websocket.ask({"type": "open_inference_session", "max_length": 64, **opening})
            if reply["ok"]:
                return f"opened a session with {list(opening)}"
    return None


@attack("requests of pages of other origins", OWN_ORIGIN)
def cross_site(target: Target) -> str | None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    text = {"Content-Type": "text/plain"}
    tries = [
        ("GET", "/api/v1/open_inference_session?max_length=16", None, {}),
        ("POST", "/v1/completions", '{"prompt": "x", "max_tokens": 1}', text),
        ("POST", "/api/v1/generate", "inputs=x&max_new_tokens=1", form),
        ("POST", "/tokenize", '{"content": "x"}', text),
    ]
    done = [path for method, path, body, more in tries if refused(target.client, method, path, body, more) is None]
    status, _ = target.client.call("GET", "/healthz", headers={"Host": "rebound.evil.example"})
    if status == 200:
        done.append("GET /healthz under another name")
    return f"served: {', '.join(done)}" if done else None


def refused(client: Client, method: str, path: str, body: str | None, more: dict[str, str]) -> int | None:
    """Return the status of a refusal; None if there was none."""
    status, _ = client.call(method, path, body, {**FOREIGN, **more})
    return status if status >= 400 else None


@attack("lines of the log that others write")
def forged_log(target: Target) -> str | None:
    target.client.call("GET", "/api/v1/x%0a" + FORGED.replace(" ", "%20") + "%1b[31mred")
    target.client.post("/api/v1/close_inference_session", {"session_id": f"x\n{FORGED} TOO"})
    target.client.post("/api/v1/generate", {"inputs": ["a secret prompt"], "max_new_tokens": 1})
    forged = [line for line in target.program.output.splitlines() if line.startswith(FORGED)]
    if forged:
        return f"forged: {forged}"
    return "a prompt is in the log" if "a secret prompt" in target.program.output else None


@attack("500 wrong keys", WITH_KEY)
def guesses(target: Target) -> str | None:
    statuses = {Client(target.program.url, key=f"guess {number}").call("GET", "/v1/models")[0] for number in range(500)}
    return None if 429 in statuses and statuses <= {401, 429} else f"{statuses}"
