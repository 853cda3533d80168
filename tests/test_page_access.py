"""Who may use the pages, by which names the app goes, and for whose pages it works: at the door, without a swarm."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from admission import access
from admission.access import WRONG_KEYS_PER_MINUTE, Access
from admission.callers import tokens_of
from app import create_app, start
from config import Settings
from errors import TooManyRequests, Unauthorized
from generation.parameters import GenerationParams
from service import Service, get_service
from web.browsers import BROWSER_COOKIE, KEY_COOKIE, PageCookie, is_local

PUBLIC, PRIVATE = "org/public", "org/private"
ANN, BOB = "the long secret of ann", "the long secret of bob"
LOCAL = {"SERVER_NAME": "127.0.0.1"}
EVERYWHERE = {"SERVER_NAME": "0.0.0.0"}


@pytest.fixture(autouse=True)
def no_swarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Service, "start", lambda self: None)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys.json"
    entries = [
        {"key": ANN, "name": "ann", "models": ["*"]},
        {"key": BOB, "name": "bob", "models": []},
        {"key": "the long secret of eve", "name": "eve"},
    ]
    path.write_text(json.dumps(entries))
    path.chmod(0o600)
    return str(path)


def client(**settings: Any) -> FlaskClient:
    options = {"MODELS": (PUBLIC, PRIVATE), "NON_PUBLIC_MODELS": (PRIVATE,), "SECRET_KEY": "s", **settings}
    return create_app(Settings(**options)).test_client()


def config_of(page: Any) -> dict[str, Any]:
    found = re.search(r'id="config">(.*?)</script>', page.text)
    assert found
    return json.loads(found[1])


def body(answer: Any) -> Any:
    return answer.json


def names_of(page: Any) -> list[str]:
    return [model["name"] for model in config_of(page).get("models", [])]


# The page asks for a key


@pytest.mark.parametrize("path", ["/", "/swarm"])
def test_the_page_asks_for_a_key_where_there_are_keys(path: str, keys: str) -> None:
    browser = client(API_KEYS_FILE=keys)
    page = browser.get(path)
    assert page.status_code == 200 and 'id="key-form"' in page.text
    assert config_of(page) == {} and PUBLIC not in page.text  # tells nothing, and has no token
    assert page.headers["Cache-Control"] == "no-store"
    assert browser.post("/page/key", json={"key": ANN}).status_code == 200
    page = browser.get(path)
    assert 'id="key-form"' not in page.text or 'id="key-dialog"' in page.text
    assert config_of(page)["key"] == "ann" and config_of(page)["page_token"] == ""
    assert ANN not in page.text
    assert page.headers["Cache-Control"] == "no-store"


def test_the_page_is_the_key(keys: str) -> None:
    browser = client(API_KEYS_FILE=keys)
    browser.post("/page/key", json={"key": ANN})
    assert names_of(browser.get("/")) == [PUBLIC, PRIVATE]
    browser.post("/page/key", json={"key": "the long secret of eve"})
    assert names_of(browser.get("/")) == [PUBLIC]
    browser.post("/page/key", json={"key": BOB})
    page = browser.get("/")
    assert names_of(page) == [] and "may use none of the models" in page.text


def test_the_cookie(keys: str) -> None:
    browser = client(API_KEYS_FILE=keys, TRUSTED_PROXIES=("127.0.0.1",))
    cookie = browser.post("/page/key", json={"key": ANN}).headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} < set(cookie.split("; ")) and "Secure" not in cookie
    assert ANN not in cookie and access.hash_key(ANN).hex() not in cookie
    proxied = {"X-Forwarded-Proto": "https"}
    assert "Secure" in browser.post("/page/key", json={"key": ANN}, headers=proxied).headers["Set-Cookie"]
    other = client(API_KEYS_FILE=keys)  # which trusts no proxy
    assert "Secure" not in other.post("/page/key", json={"key": ANN}, headers=proxied).headers["Set-Cookie"]


def test_the_cookie_opens_what_the_page_asks_for_and_nothing_else(keys: str) -> None:
    browser = client(API_KEYS_FILE=keys)
    assert browser.get("/api/v1/state").status_code == 401
    browser.post("/page/key", json={"key": ANN})
    assert [model["name"] for model in body(browser.get("/api/v1/state"))["models"]] == [PUBLIC, PRIVATE]
    assert browser.post("/v1/completions", json={"prompt": "x"}).status_code == 401
    assert browser.get("/api/v1/open_inference_session?max_length=5").status_code == 401
    cookie = browser.get_cookie(KEY_COOKIE)
    assert cookie is not None
    assert browser.get("/v1/models", headers={"Authorization": f"Bearer {cookie.value}"}).status_code == 401


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "same-site"}])
def test_other_pages_do_not_use_the_cookie(keys: str, headers: dict[str, str]) -> None:
    browser = client(API_KEYS_FILE=keys)
    assert browser.post("/page/key", json={"key": ANN}, headers=headers).status_code == 403
    browser.post(
        "/page/key", json={"key": ANN}, headers={"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    )
    assert browser.get("/api/v1/state", headers=headers).status_code == 401
    refused = browser.delete("/page/key", headers=headers)
    assert refused.status_code == 403 and body(refused)["error"]["code"] == "origin_not_allowed"
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert browser.get("/api/v1/state").status_code == 200


def test_signing_out(keys: str) -> None:
    browser = client(API_KEYS_FILE=keys)
    browser.post("/page/key", json={"key": ANN})
    assert browser.delete("/page/key").status_code == 200
    assert browser.get_cookie(KEY_COOKIE) is None
    assert config_of(browser.get("/")) == {}


@pytest.mark.parametrize("sent", ["", "x", "[]", '"x"', "{}", '{"key": 5}', '{"key": " "}', '{"key": "\\ud800"}'])
def test_what_is_no_key(keys: str, sent: str) -> None:
    answer = client(API_KEYS_FILE=keys).post("/page/key", data=sent)
    assert answer.status_code in (400, 401) and body(answer)["ok"] is False


def test_a_key_that_is_changed_or_revoked_ends_its_cookies(tmp_path: Path) -> None:
    def with_keys(*entries: dict[str, Any]) -> Access:
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(entries))
        return Access(Settings(API_KEYS_FILE=str(path), SECRET_KEY="s"))

    first = with_keys({"key": ANN, "name": "ann"}, {"key": BOB, "name": "bob"})
    cookie = first.sign_in(ANN)
    assert first.caller(cookie).client == "key ann"
    # Started anew it is as good as before, with other limits too.
    assert with_keys({"key": ANN, "name": "ann", "concurrent": 5}).caller(cookie).concurrent == 5
    for changed in ({"key": "another long secret", "name": "ann"}, {"key": BOB, "name": "bob"}):
        with pytest.raises(Unauthorized):
            with_keys(changed).caller(cookie)
    # The signature's last character has bits that no decoder looks at, so another one is changed.
    with pytest.raises(Unauthorized):
        first.caller(PageCookie(cookie[:-2] + ("A" if cookie[-2] != "A" else "B") + cookie[-1]))
    for mode in ("open", "off"):
        with pytest.raises(Unauthorized):
            Access(Settings(API_KEYS=(ANN,), SECRET_KEY="s", PAGE=mode)).caller(cookie)
    with pytest.raises(Unauthorized):
        first.caller(PageCookie(first.page_token("x")))  # signed for something else


def test_clocks_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    keyed = Access(Settings(API_KEYS=(ANN,), SECRET_KEY="s"))
    opened = Access(Settings(SECRET_KEY="s"))
    cookie, token = keyed.sign_in(ANN), opened.page_token("x")
    now = access.time.time()
    for step, (cookie_good, token_good) in {
        -60: (True, True),
        -2 * access.CLOCK_STEP: (False, False),
        access.PAGE_TOKEN_AGE + 60: (True, False),
        access.COOKIE_AGE + 60: (False, False),
    }.items():
        monkeypatch.setattr(access.time, "time", lambda step=step: now + step)
        for good, use in ((cookie_good, lambda: keyed.caller(cookie)), (token_good, lambda: opened.page(token))):
            if good:
                assert use()
            else:
                with pytest.raises(Unauthorized):
                    use()


# The page is open, or there is none


def test_an_open_page_has_an_owner_of_its_own_in_each_browser() -> None:
    browser = client()
    pages = [browser.get("/") for _ in range(2)]
    tokens = [config_of(page)["page_token"] for page in pages]
    service = get_service(browser.application)
    owners = {service.access.page(token).owner for token in tokens}
    assert len(owners) == 1 and owners != {""}  # the same after a reload
    assert {"HttpOnly", "SameSite=Strict"} < set(pages[0].headers["Set-Cookie"].split("; "))
    assert names_of(pages[0]) == [PUBLIC, PRIVATE]
    other = config_of(browser.application.test_client().get("/"))["page_token"]
    assert service.access.page(other).owner not in owners
    strange = browser.application.test_client()
    strange.set_cookie(BROWSER_COOKIE, "<script>")
    assert "<script>" not in service.access.page(config_of(strange.get("/"))["page_token"]).owner


def test_an_open_page_beside_keys_has_the_limits_of_a_key_for_each_address() -> None:
    settings: dict[str, Any] = {"KEY_REQUESTS_PER_MINUTE": 2, "KEY_TOKENS_PER_MINUTE": 100, "KEY_CONCURRENT": 1}
    with_keys = Access(Settings(API_KEYS=(ANN,), PAGE="open", SECRET_KEY="s", **settings))
    token = with_keys.page_token("x")
    for number in range(2):  # of whatever page in whatever browser
        with_keys.page(with_keys.page_token(str(number)), "192.0.2.1").count_request()
    with pytest.raises(TooManyRequests, match="each address may have 2 requests"):
        with_keys.page(token, "192.0.2.1").count_request()
    with_keys.page(token, "192.0.2.2").count_request()
    with_keys.page(token, "192.0.2.1").reserve(100)
    with pytest.raises(TooManyRequests, match="100 tokens"):
        with_keys.page(token, "192.0.2.1").reserve(1)
    with with_keys.page(token, "192.0.2.1").generating(), with_keys.page(token, "192.0.2.2").generating():
        with pytest.raises(TooManyRequests, match="1 answer "):
            with with_keys.page(token, "192.0.2.1").generating():
                pass
    assert not with_keys.places._queues  # nobody is remembered
    # Without keys there are no limits.
    without = Access(Settings(SECRET_KEY="s", **settings)).page(token, "192.0.2.1")
    for _ in range(5):
        without.count_request()
        without.reserve(1000)
    assert without.concurrent == 0


@pytest.mark.parametrize("settings", [{"PAGE": "off"}, {"PAGE": "off", "API_KEYS": (ANN,)}])
def test_there_may_be_no_page(settings: dict[str, Any]) -> None:
    browser = client(**settings)
    for path in ("/", "/swarm"):
        page = browser.get(path)
        assert page.status_code == 404 and "no page here" in page.text
    assert browser.post("/page/key", json={"key": ANN}).status_code == 404
    service = get_service(browser.application)
    with pytest.raises(Unauthorized, match="no page"):
        service.access.page(service.access.page_token("x"))


def test_tokens_are_for_the_open_page_only(keys: str) -> None:
    token = Access(Settings(SECRET_KEY="s")).page_token("x")
    answer = client(API_KEYS_FILE=keys).get("/api/v1/state", headers={"X-Page-Token": token})
    assert answer.status_code == 401 and "needs an API key" in body(answer)["error"]["message"]


@pytest.mark.parametrize("path", ["/api/v1/statex", "/api/v1/state/", "/api/v1/state/x", "/api/v1/nowhere"])
def test_a_token_tells_nothing_of_what_is_not_for_the_page(keys: str, path: str) -> None:
    browser = client(API_KEYS_FILE=keys, PAGE="open")
    token = {"X-Page-Token": config_of(browser.get("/"))["page_token"]}
    assert browser.get("/api/v1/state", headers=token).status_code == 200
    assert (
        browser.get(path, headers=token).status_code
        == browser.get("/api/v1/generate", headers=token).status_code
        == 401
    )


# Guessing


def test_guessing_is_slow() -> None:
    guarded = Access(Settings(API_KEYS=(ANN, BOB)))
    neighbour = guarded.caller(ANN, "192.0.2.1")
    for number in range(WRONG_KEYS_PER_MINUTE):
        with pytest.raises(Unauthorized):
            guarded.caller(f"guess {number}", "192.0.2.1")
    for presented in ("another", BOB):  # a right one tells nothing either
        with pytest.raises(TooManyRequests) as refused:
            guarded.caller(presented, "192.0.2.1")
        assert refused.value.retry_after and 1 <= refused.value.retry_after <= 60
    with pytest.raises(TooManyRequests):
        guarded.sign_in("another", "192.0.2.1")
    # Who used a key from there before, and everybody elsewhere, goes on.
    assert guarded.caller(ANN, "192.0.2.1").client == neighbour.client
    assert guarded.caller(BOB, "192.0.2.2")
    cookie = guarded.sign_in(BOB, "192.0.2.3")
    assert guarded.caller(cookie, "192.0.2.1")


def test_readyz_is_no_way_to_guess(keys: str) -> None:
    asking = client(API_KEYS_FILE=keys)
    for _ in range(WRONG_KEYS_PER_MINUTE):
        assert asking.get("/readyz", headers={"Authorization": "Bearer guess"}).status_code == 503
    assert PRIVATE not in body(asking.get("/readyz", headers={"Authorization": f"Bearer {ANN}"}))["models"]
    assert asking.get("/v1/models", headers={"Authorization": f"Bearer {ANN}"}).status_code == 429


# What strangers learn


def test_names_of_models_that_are_not_public(keys: str) -> None:
    asking = client(API_KEYS_FILE=keys)
    get_service(asking.application).models.served[PUBLIC].report("prepared in /home/somebody")
    ready = body(asking.get("/readyz"))
    assert (ready["ready"], set(ready["models"]), ready["others"]) == (False, {PUBLIC}, 1)
    assert (ready["models"][PUBLIC]["state"], ready["models"][PUBLIC]["message"]) == ("loading", "loading")
    ready = body(asking.get("/readyz", headers={"Authorization": f"Bearer {ANN}"}))
    assert set(ready["models"]) == {PUBLIC, PRIVATE} and ready["others"] == 0
    assert ready["models"][PUBLIC]["message"] == "prepared in /home/somebody"
    for key, known in ((ANN, True), ("the long secret of eve", False), (BOB, False)):
        headers = {"Authorization": f"Bearer {key}"}
        for answer in (
            asking.post("/v1/completions", json={"model": "nope", "prompt": "x"}, headers=headers),
            asking.get("/v1/models/nope", headers=headers),
        ):
            assert answer.status_code == 404 and (PRIVATE in answer.text) == known
    assert (PUBLIC in answer.text) is False  # bob may use none


def test_without_keys_the_open_page_lists_all_models() -> None:
    browser = client()
    token = config_of(browser.get("/"))["page_token"]
    assert set(body(browser.get("/readyz"))["models"]) == {PUBLIC}
    assert set(body(browser.get("/readyz", headers={"X-Page-Token": token}))["models"]) == {PUBLIC, PRIVATE}


def test_tracebacks_can_be_cut_down() -> None:
    for traced in (True, False):
        answer = client(TRACEBACKS=traced).post("/api/v1/generate", json={"inputs": 5})
        lines = body(answer)["traceback"].splitlines()
        assert lines[-1].startswith("errors.InvalidParameter: ") and (len(lines) > 1) == traced


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/healthz", "/static/css/theme.css", "/nothing", "/v1/x"]
)
def test_headers(path: str) -> None:
    answer = client().get(path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    if answer.mimetype == "text/html":
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


# Names of the app


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5000", "localhost", "LOCALHOST:80", "a.localhost", "[::1]:5000", "192.0.2.7"]
)
@pytest.mark.parametrize("allowed", [(), ("chat.example",)])
def test_own_addresses_are_always_fine(host: str, allowed: tuple[str, ...]) -> None:
    asking = client(ALLOWED_HOSTS=allowed)
    assert asking.get("/healthz", headers={"Host": host}, environ_overrides=LOCAL).status_code == 200


@pytest.mark.parametrize(
    ("allowed", "server", "host", "fine"),
    [
        ((), LOCAL, "rebound.example", False),
        ((), LOCAL, "localhost.rebound.example", False),
        ((), EVERYWHERE, "chat.example", True),
        ((), LOCAL, "chat-box:5000", True),
        (("chat.example",), LOCAL, "chat-box", False),
        (("chat.example",), LOCAL, "chat.example:443", True),
        (("Chat.Example",), LOCAL, "chat.example.", True),
        (("chat.example",), LOCAL, "rebound.example", False),
        (("chat.example",), EVERYWHERE, "rebound.example", False),
        (("*",), LOCAL, "rebound.example", True),
    ],
)
def test_names(allowed: tuple[str, ...], server: dict[str, str], host: str, fine: bool) -> None:
    asking = client(ALLOWED_HOSTS=allowed)
    for path in ("/", "/healthz", "/v1/models", "/api/v2/generate", "/docs"):
        answer = asking.get(path, headers={"Host": host}, environ_overrides=server)
        assert (answer.status_code != 421) == fine
        if not fine:
            assert "ALLOWED_HOSTS" in answer.text


@pytest.mark.parametrize("host", ["[", "a b", "a/b", "a@b", "http://a", "[::1", "a:b", "é", "a,b", ":80"])
def test_malformed_names(host: str) -> None:
    environ = {"HTTP_HOST": host.encode().decode("latin-1"), **EVERYWHERE}
    answer = client().get("/healthz", environ_overrides=environ)
    assert answer.status_code == 400 and "Host" in body(answer)["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_local(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example", "localhost.example", "", "::ffff:192.0.2.1"])
def test_not_local(host: str) -> None:
    assert not is_local(host)


# Sites whose pages may use it

FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Sec-Fetch-Site": "cross-site"},
]
OPEN_PATH = "/api/v1/open_inference_session?max_length=x"
# Those that browsers send without asking before.
SIMPLE: list[dict[str, Any]] = [
    {"method": "GET", "path": OPEN_PATH},
    {"method": "HEAD", "path": OPEN_PATH},
    {"method": "GET", "path": "/api/v1/close_inference_session?session_id=x"},
    {"method": "POST", "path": "/api/v1/generate", "data": {"inputs": "x"}},
    {"method": "POST", "path": "/v1/completions", "data": "{}", "content_type": "text/plain"},
    {"method": "POST", "path": "/tokenize", "data": "{}", "content_type": "text/plain"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("simple", SIMPLE)
def test_other_sites(simple: dict[str, Any], headers: dict[str, str]) -> None:
    restricted = client(CORS_ORIGINS=("https://friend.example", r"https://.*\.friends\.example"))
    refused = restricted.open(**simple, headers=headers)
    assert refused.status_code == 403
    assert simple["method"] == "HEAD" or "CORS_ORIGINS" in refused.text
    for fine in (
        {},
        {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://a.friends.example"},
        {"Origin": "http://localhost"},
        {"Origin": "https://LOCALHOST:443"},
        {"Origin": "http://behind.proxy.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {**headers, "Authorization": "Bearer x"},
    ):
        assert restricted.open(**simple, headers=fine).status_code != 403
    assert client().open(**simple, headers=headers).status_code != 403  # any site may


@pytest.mark.parametrize("headers", FOREIGN)
def test_what_changes_nothing_is_left_to_the_browser(headers: dict[str, str]) -> None:
    restricted = client(CORS_ORIGINS=("https://friend.example",))
    for path in ("/v1/models", "/api/v1/state", "/healthz"):
        answer = restricted.get(path, headers=headers)
        assert answer.status_code in (200, 503)
        assert answer.headers.get("Access-Control-Allow-Origin") != headers.get("Origin", "*")


# At start


def test_who_may_use_what_is_logged_at_start(caplog: pytest.LogCaptureFixture, keys: str) -> None:
    def logged(hosts: list[str], **settings: Any) -> list[tuple[int, str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            start(client(**settings).application, hosts)
        return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "petals_chat"]

    open_to_all = (logging.INFO, "the APIs are open to everybody; so is the page")
    assert logged(["127.0.0.1", "::1", "localhost"]) == [open_to_all]
    first, (level, words) = logged(["127.0.0.1", "0.0.0.0"])
    assert first == open_to_all and level == logging.WARNING
    assert "0.0.0.0" in words and "127.0.0.1" not in words and "without API_KEYS" in words
    assert logged(["0.0.0.0"], API_KEYS_FILE=keys) == [
        (logging.INFO, "the APIs need one of 3 API keys; so does the page")
    ]
    logged_open = logged([], API_KEYS_FILE=keys, PAGE="open")
    assert logged_open == [(logging.INFO, "the APIs need one of 3 API keys; the page is open to everybody")]


def test_warnings_of_keys(caplog: pytest.LogCaptureFixture, keys: str) -> None:
    Access(Settings(API_KEYS_FILE=keys))
    assert not caplog.records
    Path(keys).chmod(0o644)
    Access(Settings(API_KEYS_FILE=keys, API_KEYS=("hunter2",)))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "chmod o-r" in caplog.text and "is short" in caplog.text and "hunter2" not in caplog.text


# How much a request may cost


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (GenerationParams("x" * 300, max_new_tokens=50), (151, 151)),
        (GenerationParams("x" * 300, max_new_tokens=5000), (1000, 1000)),  # refused later
        (GenerationParams("", max_new_tokens=50), (51, 51)),
        (GenerationParams("x" * 300, max_length=900), (400, 400)),
        (GenerationParams("x" * 300, max_length=900, stop_sequence="."), (400, 101)),
        (GenerationParams("x" * 300, max_new_tokens=1, stop_sequence="."), (1000, 101)),
        (GenerationParams("x" * 300, max_new_tokens=1, stop_sequence=".", max_answer_tokens=60), (161, 101)),
    ],
)
def test_what_a_request_may_cost(params: GenerationParams, expected: tuple[int, int]) -> None:
    assert tokens_of(params, held=500, room=1000) == expected


def test_a_session_without_room() -> None:
    assert tokens_of(GenerationParams("x", max_new_tokens=5), held=9, room=0) == (1, 1)
