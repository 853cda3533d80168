"""Sessions that are kept for who goes on from them."""

import threading
from typing import Any

import pytest
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from inference_sessions import InferenceSessions
from swarm.client.model import SwarmModel
from swarm.client.warm_sessions import WarmSessions, common_prefix
from swarm.errors import CacheFull
from swarm.local import LocalSwarm
from tests.conftest import LiveApp, greedy, load_model, tiny_server
from tests.support.client import websocket
from tests.test_openai_api import complete, post
from tests.test_session import infos, wait_until

MODEL, OWNER = "model", "me"


class Kept:
    """A session that has processed all its tokens but the last."""

    def __init__(self, token_ids: list[int], max_length: int = 100, rewinds: bool = True, earliest: int = 0) -> None:
        self.token_ids = list(token_ids)
        self.position = len(token_ids) - 1
        self.max_length = max_length
        self.rewinds_to = lambda length: rewinds and length >= earliest
        self.closed = False

    def truncate(self, length: int) -> None:
        del self.token_ids[length:]
        self.position = min(self.position, length)

    def drop_history(self) -> None:
        self.history = None

    def close(self) -> None:
        self.closed = True


def kept_session(*args: Any, **options: Any) -> Any:
    return Kept(*args, **options)


def memory(**options: Any) -> Any:
    return WarmSessions(**{"max_sessions": 3, "max_tokens": 1000, "timeout": 60.0, **options})


def test_the_longest_beginning_is_taken() -> None:
    kept, short = memory(), kept_session([1, 2, 3, 4])
    long = kept_session([1, 2, 3, 4, 5, 6, 7])
    for session in (short, long, kept_session([1, 9, 9, 9, 9])):
        kept.keep(MODEL, OWNER, session)
    assert kept.take(MODEL, OWNER, [1, 2, 3, 4, 5, 6, 7, 8], 100) is long
    assert long.token_ids == [1, 2, 3, 4, 5, 6]
    # It is in use now: the next one takes what there is, and does not wait.
    assert kept.take(MODEL, OWNER, [1, 2, 3, 4, 5, 6, 7, 8], 100) is short
    assert len(kept) == 1


def test_a_token_is_left_to_process() -> None:
    kept = memory()
    kept.keep(MODEL, OWNER, kept_session([1, 2, 3, 4, 5]))
    taken = kept.take(MODEL, OWNER, [1, 2, 3, 4], 100)
    assert taken is not None and taken.token_ids == [1, 2, 3]


@pytest.mark.parametrize(
    ("model", "owner", "tokens", "lengths"),
    [
        ("other", OWNER, [1, 2, 3, 4, 5], (100, None)),
        (MODEL, "other", [1, 2, 3, 4, 5], (100, None)),
        (MODEL, "", [1, 2, 3, 4, 5], (100, None)),
        (MODEL, OWNER, [2, 2, 3, 4, 5], (100, None)),  # nothing in common
        (MODEL, OWNER, [1, 9], (100, None)),  # more would be lost than saved
        (MODEL, OWNER, [1, 2, 3, 4, 5], (101, None)),  # too short
        (MODEL, OWNER, [1, 2, 3, 4, 5], (50, 50)),  # too long
    ],
)
def test_what_does_not_fit_is_left(model: str, owner: str, tokens: list[int], lengths: tuple[int, int | None]) -> None:
    kept, session = memory(), kept_session([1, 2, 3, 4, 5])
    kept.keep(MODEL, OWNER, session)
    assert kept.take(model, owner, tokens, *lengths) is None
    assert session.token_ids == [1, 2, 3, 4, 5] and not session.closed


def test_servers_that_cannot_forget() -> None:
    """With them a session serves only those who have all of its tokens."""
    kept = memory()
    kept.keep(MODEL, OWNER, kept_session([1, 2, 3, 4, 5], rewinds=False))
    assert kept.take(MODEL, OWNER, [1, 2, 3, 9, 9], 100) is None
    assert kept.take(MODEL, OWNER, [1, 2, 3, 4, 9], 100) is not None


def test_servers_that_can_go_back_only_so_far() -> None:
    kept = memory()
    kept.keep(MODEL, OWNER, kept_session([1, 2, 3, 4, 5], earliest=3))
    assert kept.take(MODEL, OWNER, [1, 2, 9, 9, 9], 100) is None
    assert kept.take(MODEL, OWNER, [1, 2, 3, 9, 9], 100) is not None


def test_bounds() -> None:
    now = 0.0
    kept = memory(max_tokens=350, clock=lambda: now)
    sessions = [kept_session([i, 2, 3]) for i in range(5)]
    for session in sessions[:4]:
        kept.keep(MODEL, OWNER, session)
    assert [session.closed for session in sessions[:4]] == [True, False, False, False]  # three at most
    large = kept_session([1, 2, 3], max_length=200)
    kept.keep(MODEL, OWNER, large)
    assert (kept.tokens, sessions[1].closed, sessions[2].closed) == (300, True, True)
    kept.keep(MODEL, OWNER, too_large := kept_session([1, 2, 3], max_length=400))
    assert too_large.closed and kept.tokens == 300
    kept.free_attention_cache("other", 50)
    assert not sessions[3].closed
    kept.free_attention_cache(MODEL, 50)
    assert (sessions[3].closed, large.closed) == (True, False)
    now = 60.0
    kept.expire()
    assert large.closed and len(kept) == 0


def test_useless_sessions_are_closed() -> None:
    kept, nothing, closed = memory(), kept_session([1]), kept_session([1, 2, 3])
    closed.closed = True
    kept.keep(MODEL, OWNER, nothing)
    kept.keep(MODEL, OWNER, closed)
    assert nothing.closed and len(kept) == 0
    kept.keep(MODEL, OWNER, last := kept_session([1, 2]))
    kept.close()
    kept.keep(MODEL, OWNER, late := kept_session([1, 2]))
    assert last.closed and late.closed


@pytest.mark.parametrize(
    ("first", "second", "length"), [("", "", 0), ("abc", "abd", 2), ("abc", "abcd", 3), ("b", "a", 0)]
)
def test_common_prefix(first: str, second: str, length: int) -> None:
    assert common_prefix(list(map(ord, first)), list(map(ord, second))) == length


def seen_by(model: SwarmModel, before: list[dict[str, Any]]) -> list[int]:
    return [now["inference_tokens"] - then["inference_tokens"] for now, then in zip(infos(model), before, strict=True)]


def test_a_conversation_of_twenty_turns(
    warm_app: LiveApp, model: SwarmModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """From the second turn on the servers see only what is new: by their own counts."""
    # Begins as no other conversation here.
    messages: list[dict[str, str]] = [{"role": "system", "content": "Ж: twenty turns."}]
    known: list[int] = []  # what the session has processed
    for turn in range(20):
        messages.append({"role": "user", "content": f"{turn}: a bee"})
        prompt = tokenizer.encode(post(warm_app, "/apply-template", messages=messages)["prompt"])
        before = infos(model)
        # Ends with a chosen token, so that the answer becomes the same tokens again when it is sent back.
        answer = post(warm_app, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=4,
                      logit_bias={str(tokenizer.encode(" servers")[0]): 100})  # fmt: skip
        cached = common_prefix(known, prompt)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        generated = answer["usage"]["completion_tokens"]
        assert seen_by(model, before) == [len(prompt) - cached + generated - 1] * 2
        if turn:
            assert len(prompt) - cached < 40 < len(prompt)
        text = answer["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": text})
        known = tokenizer.encode(
            post(warm_app, "/apply-template", messages=messages, add_generation_prompt=False)["prompt"]
        )
        known = known[: len(prompt) + generated - 1]


def test_answers_are_the_same_with_memory(
    warm_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Continued, regenerated, and branching off in the middle."""
    token_ids = tokenizer.encode("The quick brown fox jumps over the lazy dog, who said that?")
    first = greedy(reference, token_ids, 10)
    for prompt in (
        token_ids,
        token_ids,
        [*token_ids, *first],
        [*token_ids, *first[:5], 9],
        token_ids[:9],
        [*token_ids, 7],
    ):
        expected = tokenizer.decode(greedy(reference, prompt, 10), clean_up_tokenization_spaces=False)
        answer = complete(warm_app, prompt=prompt, max_tokens=10)
        assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_the_same_request_many_times_at_once(
    warm_app: LiveApp, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode("Une abeille, deux abeilles")
    expected = tokenizer.decode(greedy(reference, token_ids, 12), clean_up_tokenization_spaces=False)
    answers: list[str] = []
    for _ in range(3):
        threads = [
            threading.Thread(
                target=lambda: answers.append(complete(warm_app, prompt=token_ids, max_tokens=12)["choices"][0]["text"])
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert answers == [expected] * 18


def test_the_page_after_a_reload(warm_app: LiveApp, model: SwarmModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A connection that begins with what another one has said finds it computed."""
    text = "блоки модели хранятся на серверах, the lazy dog"
    tokens = len(tokenizer.encode(text))
    counts = []
    for inputs in (text, text + " and more"):
        before = infos(model)
        with websocket(warm_app.websocket_url) as ws:
            ws.send({"type": "open_inference_session", "max_length": 300})
            assert ws.receive()["ok"]
            ws.send({"type": "generate", "inputs": inputs, "max_new_tokens": 1})
            assert ws.receive()["ok"]
        counts.append(seen_by(model, before)[0])
        wait_until(lambda: len(warm_app.service.sessions) == 0, "the session is still open")
    assert counts == [tokens, len(tokenizer.encode(text + " and more")) - tokens]


def test_stateless_http_calls(warm_app: LiveApp, model: SwarmModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "分散された大規模言語モデル, wer sagt das?"
    before = infos(model)
    first = post(warm_app, "/api/v1/generate", inputs=text, max_new_tokens=4)["outputs"]
    again = post(warm_app, "/api/v1/generate", inputs=text, max_new_tokens=4)["outputs"]
    assert first == again
    assert seen_by(model, before) == [len(tokenizer.encode(text)) + 3 + 1 + 3] * 2


def test_kept_sessions_make_room(tiny_bloom: Any) -> None:
    """The servers have attention cache for two sessions only: who comes is given the place of those that are kept."""
    with LocalSwarm() as local:
        local.start_server(tiny_server(tiny_bloom, "0:4", attn_cache_tokens=256))
        kept, model_may_ask = WarmSessions(8, 10_000, 600.0), threading.Event()

        class Relief:
            def free_attention_cache(self, model: str, tokens: int) -> bool:
                return model_may_ask.is_set() and kept.free_attention_cache(model, tokens)

        model = load_model(tiny_bloom, local, Relief(), cache_timeout=5.0)
        sessions = InferenceSessions(8, 600.0, memory=kept)
        for number in range(2):
            with sessions.temporary(model, 120) as entry:
                entry.session.step([number + 5, 6, 7])
        assert len(kept) == 2
        with model.open_session(200) as session, pytest.raises(CacheFull):  # nobody gives way yet
            session.step([5])
        model_may_ask.set()
        with model.open_session(200) as session:
            session.step([5])
        assert len(kept) == 0
        model.close()
