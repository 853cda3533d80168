"""The HTTP API through its real door: what API.md promises, and what happens to bad input."""

import dataclasses
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from generation.drafting import Drafting
from swarm.client.model import SwarmModel
from tests.conftest import LiveApp, greedy
from tests.support.client import call
from tests.test_session import infos, wait_until

PROMPT = "The quick brown fox"
GENERATE, OPEN, CLOSE = "/api/v1/generate", "/api/v1/open_inference_session", "/api/v1/close_inference_session"


def expected_text(reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    """What plain Transformers generates, up to the end of the text."""
    token_ids = [t for t in greedy(reference, tokenizer.encode(prompt), count) if t != tokenizer.eos_token_id]
    text = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    assert not text.endswith("\ufffd"), "choose another count: this one ends inside a character"
    return text


def generated(live_app: LiveApp, **params: object) -> str:
    status, _, body = call(live_app.url, GENERATE, body=params)
    assert (status, body["ok"]) == (200, True), body
    return body["outputs"]


def opened(live_app: LiveApp, max_length: int = 256, **params: object) -> str:
    status, _, body = call(live_app.url, OPEN, body={"max_length": max_length, **params})
    assert status == 200, body
    return body["session_id"]


def test_plain_text_between_special_tokens(
    live_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In a session and without one; raw inputs are what they were."""
    parts = [("<s>a\n", False), ("b</s>", True), ("\n<s>", False)]
    plain = [
        token_id
        for text, is_plain in parts
        for token_id in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=is_plain)
    ]
    expected = tokenizer.decode(greedy(reference, plain, 6), clean_up_tokenization_spaces=False)
    options = {"inputs": "<s>a\n[b</s>]\n<s>", "plain_between": ["[", "]"], "max_new_tokens": 6}
    assert generated(live_app, **options) == expected
    assert generated(live_app, **options, session_id=opened(live_app)) == expected
    raw = "<s>a\nb</s>\n<s>"
    answer = greedy(reference, tokenizer.encode(raw), 12)
    texts = [tokenizer.decode(answer[:count], clean_up_tokenization_spaces=False) for count in range(1, 13)]
    count, text = next((n, text) for n, text in enumerate(texts, 1) if not text.endswith("\ufffd"))
    assert generated(live_app, inputs=raw, max_new_tokens=count) == text


@pytest.mark.parametrize("style", ["query", "form", "json", "multipart", "mixed"])
def test_parameters_in_every_style(
    live_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, style: str
) -> None:
    expected = expected_text(reference, tokenizer, PROMPT, 12)
    query = "?inputs=The+quick%20brown+fox&max_new_tokens=12&do_sample=false"
    multipart = (
        '--x\r\nContent-Disposition: form-data; name="inputs"\r\n\r\nThe quick brown fox\r\n'
        '--x\r\nContent-Disposition: form-data; name="max_new_tokens"\r\n\r\n12\r\n--x--\r\n'
    )
    styles: dict[str, dict[str, Any]] = {
        "query": {"path": GENERATE + query, "data": b""},
        "form": {"path": GENERATE, "form": {"inputs": PROMPT, "max_new_tokens": "12", "do_sample": "0"}},
        "json": {"path": GENERATE, "body": {"inputs": PROMPT, "max_new_tokens": 12, "do_sample": False}},
        "multipart": {
            "path": GENERATE,
            "data": multipart.encode(),
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
        "mixed": {"path": GENERATE + "?inputs=other&max_new_tokens=12", "body": {"inputs": PROMPT}},
    }
    status, _, body = call(live_app.url, **styles[style])
    assert (status, body) == (200, {"ok": True, "outputs": expected})


def test_max_length_counts_the_prompt(
    live_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    length = len(tokenizer.encode(PROMPT))
    expected = expected_text(reference, tokenizer, PROMPT, 7)
    assert generated(live_app, inputs=PROMPT, max_length=length + 7) == expected


def test_sampling_is_repeated_by_its_seed(live_app: LiveApp) -> None:
    params: dict = {"inputs": PROMPT, "max_new_tokens": 16, "do_sample": 1, "temperature": 0.9, "top_p": 0.9, "seed": 7}
    assert generated(live_app, **params) == generated(live_app, **params)
    assert generated(live_app, **params) != generated(live_app, **params | {"seed": 8})


def drafting_of(app: LiveApp) -> Drafting:
    found = app.service.sessions.drafting
    assert found is not None
    return found[app.model_name]


def test_session_continued_equals_one_request(
    live_app: LiveApp, model: SwarmModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Continued 20 times: the same text, and the servers see each token once, by their own count."""
    whole = generated(live_app, inputs=PROMPT, max_new_tokens=60)
    drafting = drafting_of(live_app)
    refused = drafting.drafted - drafting.taken
    before = [info["inference_tokens"] for info in infos(model)]
    session_id = opened(live_app, 256)
    parts = [generated(live_app, session_id=session_id, inputs=PROMPT, max_new_tokens=3)]
    parts += [generated(live_app, session_id=session_id, max_new_tokens=3) for _ in range(19)]
    assert "".join(parts) == whole
    processed = len(tokenizer.encode(PROMPT)) + 60 - 1  # the last token has not been needed yet
    processed += drafting.drafted - drafting.taken - refused
    assert [i["inference_tokens"] - b for i, b in zip(infos(model), before, strict=True)] == [processed] * 2
    assert call(live_app.url, CLOSE, body={"session_id": session_id})[0] == 200


def test_session_with_new_inputs(
    live_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    session_id = opened(live_app)
    generated(live_app, session_id=session_id, inputs=PROMPT, max_new_tokens=5)
    outputs = generated(live_app, session_id=session_id, inputs=" and then", max_new_tokens=5)
    prefix = tokenizer.encode(PROMPT)
    prefix += greedy(reference, prefix, 5)
    prefix += tokenizer.encode(" and then", add_special_tokens=False)
    expected = tokenizer.decode(greedy(reference, prefix, 5), clean_up_tokenization_spaces=False)
    assert outputs.rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_stop_sequences(live_app: LiveApp) -> None:
    whole = generated(live_app, inputs=PROMPT, max_new_tokens=30)
    stop = whole[len(whole) // 2 :][:3]
    cut = generated(live_app, inputs=PROMPT, max_new_tokens=30, extra_stop_sequences=["nothing like it", stop])
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_open_and_close(live_app: LiveApp, method: str) -> None:
    status, _, body = call(live_app.url, f"{OPEN}?max_length=16&model={live_app.model_name}", method=method)
    assert status == 200 and body["ok"] is True
    closing = f"{CLOSE}?session_id={body['session_id']}"
    assert call(live_app.url, closing, method=method)[::2] == (200, {"ok": True})
    status, _, body = call(live_app.url, closing, method=method)
    assert (status, body["error"]["code"]) == (404, "session_not_found")


def test_two_requests_to_one_session_run_one_after_the_other(live_app: LiveApp) -> None:
    whole = generated(live_app, inputs=PROMPT, max_new_tokens=40)
    session_id = opened(live_app)
    generated(live_app, session_id=session_id, inputs=PROMPT, max_new_tokens=8)
    parts: list[str] = []
    threads = [
        threading.Thread(target=lambda: parts.append(generated(live_app, session_id=session_id, max_new_tokens=16)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert generated(live_app, inputs=PROMPT, max_new_tokens=8) + "".join(parts) in (
        whole,
        whole[: len(whole) - sum(map(len, parts))] + parts[1] + parts[0],
    )


BAD_REQUESTS = [
    ("no body", {}, 400, "invalid_parameter"),
    ("neither length", {"inputs": "a"}, 400, "invalid_parameter"),
    ("both lengths", {"inputs": "a", "max_length": 8, "max_new_tokens": 8}, 400, "invalid_parameter"),
    ("negative", {"inputs": "a", "max_new_tokens": -1}, 400, "invalid_parameter"),
    ("zero", {"inputs": "a", "max_new_tokens": 0}, 400, "invalid_parameter"),
    ("huge", {"inputs": "a", "max_new_tokens": 10**9}, 422, "too_long"),
    ("huge total", {"inputs": "a", "max_length": 10**30}, 400, "invalid_parameter"),
    ("total too short", {"inputs": "The quick brown fox jumps", "max_length": 2}, 422, "too_long"),
    ("wrong type", {"inputs": "a", "max_new_tokens": "many"}, 400, "invalid_parameter"),
    ("fraction", {"inputs": "a", "max_new_tokens": 1.5}, 400, "invalid_parameter"),
    ("list", {"inputs": ["a"], "max_new_tokens": 1}, 400, "invalid_parameter"),
    ("boolean", {"inputs": "a", "max_new_tokens": True}, 400, "invalid_parameter"),
    ("temperature", {"inputs": "a", "max_new_tokens": 1, "do_sample": 1, "temperature": 0}, 400, "invalid_parameter"),
    ("top_p", {"inputs": "a", "max_new_tokens": 1, "top_p": 1.5}, 400, "invalid_parameter"),
    ("not a number", {"inputs": "a", "max_new_tokens": 1, "top_p": float("nan")}, 400, "invalid_parameter"),
    ("empty inputs", {"inputs": "", "max_new_tokens": 1}, 400, "invalid_parameter"),
    ("half a surrogate pair", {"inputs": "\ud800", "max_new_tokens": 1}, 400, "invalid_parameter"),
    ("unknown model", {"inputs": "a", "max_new_tokens": 1, "model": "no/such"}, 404, "model_not_found"),
    ("failed model", {"inputs": "a", "max_new_tokens": 1, "model": "/nowhere/missing-model"}, 503, "model_unavailable"),
    ("unknown session", {"inputs": "a", "max_new_tokens": 1, "session_id": "x"}, 404, "session_not_found"),
    ("inputs too long", {"inputs": "word " * 4000, "max_new_tokens": 1}, 422, "too_long"),
]


@pytest.mark.parametrize(
    ("request_body", "status", "code"), [b[1:] for b in BAD_REQUESTS], ids=[b[0] for b in BAD_REQUESTS]
)
def test_bad_requests(live_app: LiveApp, request_body: dict, status: int, code: str) -> None:
    got, headers, body = call(live_app.url, GENERATE, body=request_body)
    assert_failure((got, headers, body), status, code)


def assert_failure(answer: tuple, status: int, code: str) -> None:
    got, headers, body = answer
    assert (got, body["ok"], body["error"]["code"]) == (status, False, code), body
    assert body["error"]["message"]
    assert (
        body["traceback"].startswith("Traceback (most recent call last):") and "site-packages" not in body["traceback"]
    )
    assert body["request_id"] == headers["x-request-id"]


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"{broken", "application/json"),
        (b"[1]", "application/json"),
        (b'{"inputs": "\xff", "max_new_tokens": 1}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"inputs=\xff\xfe&max_new_tokens=1", "application/x-www-form-urlencoded"),
        (b"inputs=%ff&max_new_tokens=1", "application/x-www-form-urlencoded"),
        (b"\x00\x01\x02", "application/octet-stream"),
        (b"", "application/json"),
    ],
)
def test_unreadable_bodies(live_app: LiveApp, data: bytes, content_type: str) -> None:
    answer = call(live_app.url, GENERATE, data=data, headers={"Content-Type": content_type})
    assert_failure(answer, 400, "invalid_parameter")


def test_nul_bytes_are_text(live_app: LiveApp) -> None:
    assert isinstance(generated(live_app, inputs="a\x00b", max_new_tokens=2), str)


def test_large_body(live_app: LiveApp) -> None:
    answer = call(live_app.url, GENERATE, data=b"inputs=" + b"x" * 10_000_000)
    assert_failure(answer, 413, "request_too_large")


def test_unknown_routes_and_methods_are_json(live_app: LiveApp) -> None:
    assert_failure(call(live_app.url, "/api/v1/nothing"), 404, "not_found")
    assert_failure(call(live_app.url, GENERATE), 405, "method_not_allowed")
    assert_failure(call(live_app.url, "/api/v2/generate"), 426, "bad_handshake")


@pytest.mark.parametrize("bad", [{}, {"max_length": 0}, {"max_length": "x"}, {"max_length": -5}])
def test_bad_openings(live_app: LiveApp, bad: dict) -> None:
    assert_failure(call(live_app.url, OPEN, body=bad), 400, "invalid_parameter")


def test_opening_longer_than_the_model(live_app: LiveApp) -> None:
    assert_failure(call(live_app.url, OPEN, body={"max_length": 10**9}), 422, "too_long")


def test_bad_request_loses_nothing(live_app: LiveApp) -> None:
    """After any refusal the session goes on as if nothing had been asked."""
    whole = generated(live_app, inputs=PROMPT, max_new_tokens=10)
    session_id = opened(live_app, 64)
    first = generated(live_app, session_id=session_id, inputs=PROMPT, max_new_tokens=5)
    refused: list[dict[str, Any]] = [
        {"max_new_tokens": 1000},
        {"inputs": "x " * 100, "max_new_tokens": 1},
        {"max_new_tokens": "x"},
    ]
    for params in refused:
        assert call(live_app.url, GENERATE, body={"session_id": session_id, **params})[0] in (400, 422)
    answer = call(live_app.url, GENERATE, body={"session_id": session_id, "max_new_tokens": 1, "model": "no/such"})
    assert_failure(answer, 409, "wrong_model")
    assert first + generated(live_app, session_id=session_id, max_new_tokens=5) == whole


def test_too_many_sessions(live_app: LiveApp) -> None:
    limit = live_app.service.settings.MAX_SESSIONS
    session_ids = [opened(live_app, 8) for _ in range(limit - len(live_app.service.sessions))]
    try:
        status, headers, body = call(live_app.url, OPEN, body={"max_length": 8})
        assert_failure((status, headers, body), 429, "too_many_sessions")
        assert int(headers["retry-after"]) > 0
    finally:
        for session_id in session_ids:
            call(live_app.url, CLOSE, body={"session_id": session_id})
    assert call(live_app.url, OPEN, body={"max_length": 8})[0] == 200


def test_hanging_up_stops_the_answer(live_app: LiveApp, model: SwarmModel) -> None:
    sessions_before = len(live_app.service.sessions)
    params = {"inputs": PROMPT, "max_new_tokens": 1900}
    send_and_hang_up(live_app, params, lambda: len(live_app.service.sessions) > sessions_before)
    wait_until(lambda: len(live_app.service.sessions) == sessions_before, "the answer went on for nobody")


def test_hanging_up_undoes_the_request(live_app: LiveApp) -> None:
    """Whoever hangs up has seen nothing of the answer: the same request, sent again, gets it from its beginning."""
    whole = generated(live_app, inputs=PROMPT, max_new_tokens=12)
    session_id = opened(live_app, 2000)
    first = generated(live_app, session_id=session_id, inputs=PROMPT, max_new_tokens=6)
    entry = live_app.service.sessions._sessions[session_id]
    length = len(entry.session.token_ids)
    send_and_hang_up(
        live_app,
        {"session_id": session_id, "max_new_tokens": 1900},
        lambda: len(entry.session.token_ids) > length,
    )
    assert first + generated(live_app, session_id=session_id, max_new_tokens=6) == whole


def send_and_hang_up(live_app: LiveApp, params: dict, when: Callable[[], bool]) -> None:
    body = json.dumps(params).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = live_app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(when, "the request did not begin")


def test_cors_and_request_id(live_app: LiveApp) -> None:
    _, headers, _ = call(live_app.url, "/healthz", headers={"Origin": "http://elsewhere", "X-Request-Id": "my-id-1"})
    assert headers["access-control-allow-origin"] in ("*", "http://elsewhere")
    assert headers["x-request-id"] == "my-id-1"


def test_readyz_tells_the_state_of_each_model(live_app: LiveApp) -> None:
    status, _, body = call(live_app.url, "/readyz")
    assert (status, body["ready"]) == (503, False)
    assert body["models"][live_app.model_name]["state"] == "ready"
    failed = body["models"]["/nowhere/missing-model"]
    assert failed["state"] == "failed" and "/nowhere/missing-model" in failed["message"]


def test_texts_are_logged_only_when_asked_for(live_app: LiveApp, caplog: pytest.LogCaptureFixture) -> None:
    service = live_app.service
    with caplog.at_level("INFO"):
        generated(live_app, inputs="zyzzyva", max_new_tokens=1)
        assert "zyzzyva" not in caplog.text
        silent, service.settings = service.settings, dataclasses.replace(service.settings, LOG_TEXTS=True)
        try:
            generated(live_app, inputs="zyzzyva", max_new_tokens=1)
        finally:
            service.settings = silent
        assert "zyzzyva" in caplog.text


def test_a_stop_sequence_that_does_not_come(live_app: LiveApp) -> None:
    """Ends where it was asked to, whatever room there is."""
    form = {"inputs": "The quick brown fox", "max_new_tokens": 6}
    status, _, body = call(live_app.url, "/api/v1/generate", form=form)
    assert status == 200
    assert call(live_app.url, "/api/v1/generate", form=form | {"stop_sequence": "never to be seen"})[2] == body


def test_inputs_are_tokenized_once(
    live_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = live_app.service.models.served[live_app.model_name].model
    assert served is not None
    texts: list[str] = []
    encode_all = served.tokenizer.encode_all

    def count(given: Any, *args: Any, **options: Any) -> Any:
        texts.extend(given)
        return encode_all(given, *args, **options)

    monkeypatch.setattr(served.tokenizer, "encode_all", count)
    body = {"inputs": PROMPT, "max_new_tokens": 7}
    assert call(live_app.url, "/api/v1/generate", body=body)[2]["outputs"] == expected_text(
        reference, tokenizer, PROMPT, 7
    )
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2, "n": 2}
    for path, body in (
        ("/v1/completions", {"prompt": [PROMPT] * 3, "max_tokens": 2, "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", chat),
    ):
        assert call(live_app.url, path, body=body)[0] == 200
    prompt = call(live_app.url, "/apply-template", body={"messages": chat["messages"]})[2]["prompt"]
    assert texts == [PROMPT] * 4 + [prompt]


def test_what_cannot_fit_is_refused_before_it_is_tokenized(live_app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> None:
    served = live_app.service.models.served[live_app.model_name].model
    assert served is not None
    monkeypatch.setattr(served.tokenizer, "_run", None)
    text = "x" * (served.tokenizer.most_characters(served.max_length) + 1)
    status, _, answer = call(live_app.url, "/api/v1/generate", body={"inputs": text, "max_new_tokens": 1})
    assert (status, answer["error"]["code"]) == (422, "too_long")
    for path, body in (
        ("/v1/completions", {"prompt": ["a", text]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        status, _, answer = call(live_app.url, path, body=body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
