"""API keys, their models and limits, on all APIs; and who may use what without keys."""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from admission.access import Access
from admission.rates import Rates
from config import Settings
from errors import ConfigError, TooManyRequests, Unauthorized
from tests.conftest import LiveApp, serve
from tests.support.client import call, websocket
from tests.test_openai_api import ENDLESS
from tests.test_session import wait_until

CHAT: list[Any] = [{"role": "user", "content": "Who said that?"}]
KEYS = [
    {"key": "secret-all", "name": "all", "models": ["*"]},
    {"key": "secret-plain", "name": "plain"},
    {"key": "secret-slow", "name": "slow", "models": ["*"], "requests_per_minute": 2},
    {"key": "secret-small", "name": "small", "models": ["*"], "tokens_per_minute": 10},
    {"key": "secret-one", "name": "one", "models": ["*"], "concurrent": 1},
    {"key": "secret-hundred", "name": "hundred", "models": ["*"], "tokens_per_minute": 100},
    {"key": "secret-list", "name": "list", "models": ["*"], "tokens_per_minute": 100},
    {"key": "secret-open", "name": "open", "models": ["*"], "tokens_per_minute": 100},
]


@pytest.fixture(scope="module")
def locked(live_app: LiveApp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """An app with keys, whose only model is not public."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps(KEYS))
    settings = dataclasses.replace(
        live_app.service.settings,
        MODELS=(live_app.model_name,),
        NON_PUBLIC_MODELS=(live_app.model_name,),
        API_KEYS_FILE=str(keys),
        API_KEYS=("env-key",),
        WARM_SESSIONS=32,
        WEBSOCKET_ORIGINS=("https://friend.example",),
    )
    with serve(settings) as live:
        yield live


def client(app: LiveApp, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(app: LiveApp, key: str, **options: Any) -> Any:
    options = {"model": app.model_name, "messages": CHAT, "max_tokens": 2, **options}
    return client(app, key).chat.completions.create(**options)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", None),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"content": "a"}),
        ("/api/v1/generate", {"inputs": "a", "max_new_tokens": 1}),
        ("/api/v1/open_inference_session", {"max_length": 5}),
        ("/api/v1/close_inference_session", {"session_id": "x"}),
    ],
)
@pytest.mark.parametrize("key", [None, "wrong", "secret-al", "sécret"])
def test_a_key_is_needed(locked: LiveApp, path: str, body: Any, key: str | None) -> None:
    headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")} if key else {}
    status, found, answer = call(locked.url, path, body=body, headers=headers)
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert found["www-authenticate"] == "Bearer"


def test_keys_open_everything(locked: LiveApp) -> None:
    assert ask(locked, "secret-all").choices
    headers = {"Authorization": "Bearer secret-all"}
    body = {"inputs": "a", "max_new_tokens": 1}
    assert call(locked.url, "/api/v1/generate", body=body, headers=headers)[0] == 200
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/"):  # need none
        assert call(locked.url, path)[0] == 200


def test_models_that_are_not_public(locked: LiveApp) -> None:
    for key in ("secret-plain", "env-key"):
        assert client(locked, key).models.list().data == []
        with pytest.raises(openai.PermissionDeniedError) as refused:
            ask(locked, key)
        assert refused.value.code == "model_not_allowed"
    assert [model.id for model in client(locked, "secret-all").models.list()] == [locked.model_name]


def open_session(app: LiveApp, headers: dict[str, str] | None = None, **message: Any) -> dict[str, Any]:
    with connect(app.websocket_url, additional_headers=headers) as ws:
        ws.send(json.dumps({"type": "open_inference_session", "max_length": 16, **message}))
        return json.loads(ws.recv(timeout=60))


def test_websocket(locked: LiveApp) -> None:
    assert open_session(locked)["error"]["code"] == "invalid_api_key"
    assert open_session(locked, api_key="wrong")["error"]["code"] == "invalid_api_key"
    assert open_session(locked, page_token="page.wrong")["error"]["code"] == "invalid_api_key"
    assert open_session(locked, api_key="secret-plain")["error"]["code"] == "model_not_allowed"
    assert open_session(locked, api_key="secret-all") == {"ok": True}
    assert open_session(locked, headers={"Authorization": "Bearer secret-all"}) == {"ok": True}


def test_websocket_origins(locked: LiveApp) -> None:
    for origin in ("https://friend.example", locked.url):
        assert open_session(locked, headers={"Origin": origin}, api_key="secret-all") == {"ok": True}
    with pytest.raises(ConnectionClosed, match="origin"):
        open_session(locked, headers={"Origin": "https://foe.example"}, api_key="secret-all")


def test_sessions_belong_to_their_key(locked: LiveApp) -> None:
    def request(path: str, key: str, **body: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        status, _, answer = call(locked.url, f"/api/v1/{path}", body=body, headers=headers)
        return status, answer

    _, opened = request("open_inference_session", "secret-all", max_length=16)
    session = {"session_id": opened["session_id"]}
    assert request("generate", "secret-one", inputs="a", max_new_tokens=1, **session)[0] == 404
    assert request("close_inference_session", "secret-one", **session)[0] == 404
    assert request("generate", "secret-all", inputs="a", max_new_tokens=1, **session)[0] == 200
    assert request("close_inference_session", "secret-all", **session)[0] == 200


def test_keys_share_no_computed_tokens(locked: LiveApp) -> None:
    prompt = "Ein Schwarm von Servern hält die Blöcke. " * 3

    def cached(key: str) -> int:
        answer = client(locked, key).completions.create(model=locked.model_name, prompt=prompt, max_tokens=2)
        assert answer.usage and answer.usage.prompt_tokens_details
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("secret-all") == 0
    assert cached("secret-one") == 0
    assert cached("secret-all") > 0


def test_requests_a_minute(locked: LiveApp) -> None:
    ask(locked, "secret-slow")
    headers = {"Authorization": "Bearer secret-slow"}
    assert call(locked.url, "/api/v1/generate", body={"inputs": "a", "max_new_tokens": 1}, headers=headers)[0] == 200
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as refused:
        ask(locked, "secret-slow")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    status, found, answer = call(
        locked.url, "/api/v1/generate", body={"inputs": "a", "max_new_tokens": 1}, headers=headers
    )
    assert (status, answer["error"]["code"]) == (429, "too_many_requests") and found["retry-after"]


def test_tokens_a_minute(locked: LiveApp) -> None:
    # More than a minute's worth, which can be asked for only when nothing has been used.
    assert ask(locked, "secret-small").usage.total_tokens > 10
    with pytest.raises(openai.RateLimitError, match="10 tokens a minute") as refused:
        ask(locked, "secret-small")
    assert int(refused.value.response.headers["retry-after"]) > 60  # it counts for as many minutes
    with websocket(locked.websocket_url) as ws:
        ws.send({"type": "open_inference_session", "max_length": 16, "api_key": "secret-small"})
        assert ws.receive()["ok"]
        ws.send({"type": "generate", "inputs": "a", "max_new_tokens": 1})
        assert ws.receive()["error"]["code"] == "too_many_requests"
    headers = {"Authorization": "Bearer secret-small"}
    status, _, answer = call(locked.url, "/api/v1/generate", body={"inputs": "a", "max_new_tokens": 1}, headers=headers)
    assert (status, answer["error"]["code"]) == (429, "too_many_requests")


def test_tokens_are_reserved_before_they_are_used(locked: LiveApp) -> None:
    """Of requests at the same time only those begin whose tokens are there; what was not used comes back."""
    body = {"inputs": "a", "max_new_tokens": 40}
    headers = {"Authorization": "Bearer secret-hundred"}

    def request(_: int) -> int:
        return call(locked.url, "/api/v1/generate", body=body, headers=headers)[0]

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(request, range(12)))
    assert sorted(set(statuses)) == [200, 429] and statuses.count(200) == 2  # 41 or 42 tokens each, of 100
    caller = locked.service.access.caller("secret-hundred", "elsewhere")
    with pytest.raises(TooManyRequests):
        caller.reserve(100)
    left = 100 - 2 * 41  # a prompt of one token
    caller.reserve(left).close()


def test_a_list_of_prompts_reserves_all_of_them(locked: LiveApp) -> None:
    prompts = [[5, 6, 7]] * 16
    completions = client(locked, "secret-list").completions
    completions.create(model=locked.model_name, prompt=prompts, max_tokens=2)  # 80 of 100
    with pytest.raises(openai.RateLimitError, match="100 tokens a minute"):
        completions.create(model=locked.model_name, prompt=prompts, max_tokens=2)


def test_open_ended_answers_take_what_is_left(locked: LiveApp) -> None:
    """As those of the page: they ask for no number of tokens, and may have what is left."""
    caller = locked.service.access.caller("secret-open", "")
    caller.reserve(60)
    taken = caller.reserve(2000, least=20)
    with pytest.raises(TooManyRequests):
        caller.reserve(1)
    taken.spent(140)  # ten times what was left: it counts in full
    taken.close()
    with pytest.raises(TooManyRequests) as refused:
        caller.reserve(1)
    assert 60 < (refused.value.retry_after or 0) <= 120  # 200 tokens of 100 a minute


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": "malformed"}),
        ("/v1/completions", {"prompt": "a", "model": "missing"}),
        ("/v1/nothing/here", {}),
        ("/tokenize", {"content": "a"}),
        ("/detokenize", {"tokens": [1]}),
        ("/apply-template", {"messages": CHAT}),
        ("/api/v1/generate", {"inputs": ["malformed"]}),
        ("/api/v1/open_inference_session", {"max_length": "malformed"}),
        ("/api/v1/open_inference_session?max_length=malformed", None),
    ],
)
def test_every_request_that_costs_is_counted(locked: LiveApp, path: str, body: Any) -> None:
    locked.service.access.rates = Rates()
    headers = {"Authorization": "Bearer secret-slow"}
    for _ in range(2):
        assert call(locked.url, path, body=body, headers=headers)[0] != 429
    assert call(locked.url, path, body=body, headers=headers)[0] == 429
    # What costs nothing, and closing, which gives something back, go on.
    assert call(locked.url, "/v1/models", headers=headers)[0] == 200
    assert call(locked.url, "/api/v1/close_inference_session", body={"session_id": "x"}, headers=headers)[0] == 404


def test_malformed_messages_are_counted(locked: LiveApp) -> None:
    locked.service.access.rates = Rates()
    with websocket(locked.websocket_url) as ws:
        ws.open(api_key="secret-slow")
        assert ws.ask({"type": "generate", "inputs": 5})["error"]["code"] == "invalid_parameter"
        assert ws.ask({"type": "generate", "inputs": 5})["error"]["code"] == "too_many_requests"
    assert open_session(locked, api_key="secret-slow")["error"]["code"] == "too_many_requests"


def test_answers_at_a_time(locked: LiveApp) -> None:
    stream = ask(locked, "secret-one", max_tokens=1500, logit_bias=ENDLESS, stream=True)
    next(stream)
    with pytest.raises(openai.RateLimitError, match="1 answer computed at a time"):
        ask(locked, "secret-one")
    stream.close()
    wait_until(lambda: len(locked.service.sessions) == 0, "the session is still open")
    ask(locked, "secret-one")
    # A list of prompts of its own does not exceed it.
    answer = client(locked, "secret-one").completions.create(
        model=locked.model_name, prompt=["a", "b", "c"], max_tokens=2
    )
    assert len(answer.choices) == 3


def test_without_keys_a_model_that_is_not_public_is_for_the_page(live_app: LiveApp) -> None:
    settings = dataclasses.replace(live_app.service.settings, NON_PUBLIC_MODELS=(live_app.model_name,))
    access = Access(settings)
    assert not access.caller(None).may_use(live_app.model_name)
    assert access.page(access.page_token()).may_use(live_app.model_name)
    assert access.caller(None).may_use("another")


def test_page_tokens_of_another_program_and_of_yesterday(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access(Settings(SECRET_KEY="one"))
    token = access.page_token()
    assert Access(Settings(SECRET_KEY="one")).page(token)
    with pytest.raises(Unauthorized):
        Access(Settings(SECRET_KEY="two")).page(token)
    monkeypatch.setattr("admission.access.PAGE_TOKEN_AGE", -1)
    with pytest.raises(Unauthorized, match="load it again"):
        access.page(token)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "must hold a list"),
        ("[]", "holds no keys"),
        ('["x"]', 'with a "key"'),
        ('[{"name": "x"}]', 'with a "key"'),
        ('[{"key": "  "}]', "a space"),
        ('[{"key": "x "}]', "a space"),
        ('[{"key": 5}]', "key must be of type str"),
        ('[{"key": "x", "colour": 1}]', "'colour'"),
        ('[{"key": "x", "concurrent": true}]', "concurrent must be of type int"),
        ('[{"key": "x", "concurrent": -1}]', "must not be negative"),
        ('[{"key": "x"}, {"key": "x"}]', "twice"),
        ('[{"key": "x", "name": "a"}, {"key": "y", "name": "a"}]', "twice"),
    ],
)
def test_wrong_files_of_keys(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        Access(Settings(API_KEYS_FILE=str(path)))
    assert '"x"' not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(Settings(API_KEYS_FILE=str(tmp_path / "missing")))
