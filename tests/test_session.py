"""The swarm session against plain Transformers, over real servers that are killed, full or slow to come."""

import asyncio
import concurrent.futures
import dataclasses
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError
from petals.server.memory_cache import AllocationFailed
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from swarm.client.history import HistoryBudget
from swarm.client.model import SwarmModel
from swarm.client.session import SwarmSession
from swarm.client.span import PREFILL_CHUNK, Span
from swarm.client.terms import SessionTerms
from swarm.errors import CacheFull, Cancelled, SessionClosed, SessionLengthExceeded
from swarm.local import LocalSwarm
from swarm.server.logs import shorten_refusal
from tests.conftest import greedy, load_model, tiny_server
from tests.support.swarms import server_info
from tests.support.waiters import Canceller

SETTLED = 8  # equal readings in a row, each a twentieth of a second and more after the last
PROMPTS = ["The quick brown fox", "Ein Schwarm von Servern", "分散された", "a"]


def infos(model: SwarmModel) -> list[dict[str, Any]]:
    """What the servers say of themselves, in the order of their blocks."""
    found = [server_info(model, view) for view in sorted(model.state.servers(), key=lambda view: view.start)]
    return [info for info in found if info is not None]


def free_cache(model: SwarmModel) -> list[int]:
    """Free attention cache of each server, in tokens times blocks."""
    return [info["cache_tokens_available"] for info in infos(model)]


def settled_cache(model: SwarmModel) -> list[int]:
    """The same, once the sessions that were closed before are gone from the servers: closing does not wait for them."""
    readings = [free_cache(model)]

    def settled() -> bool:
        readings.append(free_cache(model))
        return len(readings) > SETTLED and len({tuple(reading) for reading in readings[-SETTLED:]}) == 1

    wait_until(settled, "the attention cache does not settle")
    return readings[-1]


def run_greedy(session: SwarmSession, token_ids: list[int], count: int) -> list[int]:
    generated: list[int] = []
    logits = session.step(token_ids)
    while True:
        generated.append(int(logits.argmax()))
        if len(generated) == count:
            return generated
        logits = session.step(generated[-1:])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> None:
    token_ids = tokenizer.encode(prompt)
    expected = greedy(reference, token_ids, 40)
    with model.open_session(128) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
        assert [(start, end) for _, start, end in session.route] == [(0, 2), (2, 4)]


def test_long_prompt_in_chunks(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = (tokenizer.encode(" ".join(PROMPTS)) * 60)[:1200]  # more than two chunks of prefill
    expected = greedy(reference, token_ids, 5)
    with model.open_session(1300) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected


def test_long_step_after_a_short_one(model: SwarmModel, reference: BloomForCausalLM) -> None:
    """The second reply may be larger than the first."""
    token_ids = [5, 6, 7] * 200
    limits = dataclasses.replace(model.limits, pipelining=False)  # in the largest pieces
    with SwarmSession(model.head, SessionTerms(model.state, limits, model.budget, 700)) as session:
        session.step(token_ids[:1])
        logits = session.step(token_ids[1:])
        assert session.recoveries == 0
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_logits_equal_transformers(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode(PROMPTS[0])
    with model.open_session(64) as session, torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0, -1]
        torch.testing.assert_close(session.step(token_ids), expected)


def test_parallel_sessions_do_not_mix(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [greedy(reference, token_ids, 20) for token_ids in prompts]
    results: list[list[int] | None] = [None] * len(prompts)

    def work(i: int) -> None:
        with model.open_session(64) as session:
            results[i] = run_greedy(session, prompts[i], len(expected[i]))

    in_threads(work, len(prompts), timeout=60)
    assert results == expected


def test_too_long_leaves_the_session_as_it_was(model: SwarmModel) -> None:
    with model.open_session(8) as session:
        session.step([5, 6, 7])
        with pytest.raises(SessionLengthExceeded, match="3 tokens and 6 more exceed the session's 8"):
            session.step([1] * 6)
        assert session.token_ids == [5, 6, 7]
        session.step([8])
    with pytest.raises(SessionLengthExceeded, match="exceed the 2048"):
        model.open_session(2049)


def test_truncate_then_go_on(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, 10)
    with model.open_session(64) as session:
        run_greedy(session, [*token_ids, 9, 9, 9], 5)
        session.truncate(len(token_ids) - 1)
        assert run_greedy(session, token_ids[-1:], len(expected)) == expected


def test_cancelled_step_keeps_the_session(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode(PROMPTS[1])
    expected = greedy(reference, token_ids, 8)
    canceller = Canceller()
    canceller.cancel()
    with model.open_session(2048) as session:
        with pytest.raises(Cancelled):
            session.step([3] * 2000, waiter=canceller)
        session.truncate(0)
        assert run_greedy(session, token_ids, len(expected)) == expected


def test_cancel_from_another_thread(model: SwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object) -> None:
        await asyncio.sleep(60)

    canceller = Canceller()
    with model.open_session(64) as session:
        expected = session.step([3, 4])
        with monkeypatch.context() as patch:
            patch.setattr(Span, "answer", hang)
            threading.Timer(0.1, canceller.cancel).start()
            with pytest.raises(Cancelled):
                session.step([5], waiter=canceller)
        # The servers are let go, since nobody knows what they have processed; the tokens stay.
        assert (session.position, session.route, session.token_ids) == (0, [], [3, 4, 5])
        session.truncate(2)
        torch.testing.assert_close(session.step(), expected, atol=1e-4, rtol=1e-4)


def test_cancelled_between_the_pieces_of_a_prompt(model: SwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast each piece is: the waiter looks before the next one, and what is processed stays processed."""
    monkeypatch.setattr("swarm.client.session.CANCEL_POLL", 60.0)
    monkeypatch.setattr("swarm.client.session.PIECE", PREFILL_CHUNK)
    canceller = Canceller()
    canceller.cancel()
    with model.open_session(2048) as session:
        with pytest.raises(Cancelled):
            session.step([3] * 2000, waiter=canceller)
        assert (session.position, len(session.token_ids)) == (PREFILL_CHUNK, 2000)
        assert session.step().shape == (model.head.vocab_size,)


def test_closed_session(model: SwarmModel) -> None:
    session = model.open_session(16)
    session.step([5])
    session.close()
    session.close()
    with pytest.raises(SessionClosed):
        session.step([6])


def test_closing_frees_the_attention_cache(model: SwarmModel) -> None:
    before = settled_cache(model)
    session = model.open_session(512)
    session.step([5])
    assert all(now < then for now, then in zip(free_cache(model), before, strict=True))
    session.close()
    wait_until(lambda: free_cache(model) == before, "the cache was not freed")


def test_dropped_session_frees_the_attention_cache(model: SwarmModel) -> None:
    before = settled_cache(model)
    session = model.open_session(512)
    session.step([5])
    del session
    gc.collect()
    wait_until(lambda: free_cache(model) == before, "the cache was not freed")


def test_collecting_on_the_event_loop_thread_does_not_hang(model: SwarmModel) -> None:
    """A session that is collected on hivemind's event-loop thread must not wait for that thread."""
    sessions = [model.open_session(16)]
    sessions[0].step([5])

    async def collect() -> None:
        sessions.clear()
        gc.collect()

    RemoteExpertWorker.run_coroutine(collect(), return_future=True).result(timeout=10)
    with model.open_session(16) as session:
        session.step([5])


def test_petals_own_session_does_not_hang_either(model: SwarmModel) -> None:
    """Petals' session waits for the event loop in ``__del__``; without compat's remedy this blocks for ever."""
    from petals.client.inference_session import InferenceSession

    sessions = [InferenceSession(model.state.manager, 16)]
    with torch.inference_mode():
        sessions[0].step(model.head.embed([5]))

    async def collect() -> None:
        sessions.clear()
        gc.collect()

    RemoteExpertWorker.run_coroutine(collect(), return_future=True).result(timeout=10)


def test_servers_count_each_token_once(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = [info["inference_tokens"] for info in infos(model)]
    with model.open_session(64) as session:
        run_greedy(session, tokenizer.encode(PROMPTS[0]), 10)
        tokens = session.position
    assert [info["inference_tokens"] - count for info, count in zip(infos(model), before, strict=True)] == [tokens] * 2


def test_dropped_history_recovers_from_the_token_ids(
    model: SwarmModel, reference: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    token_ids = tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, 20)
    budget = HistoryBudget(limit=0)
    with SwarmSession(model.head, SessionTerms(model.state, model.limits, budget, 64)) as session:
        generated = run_greedy(session, token_ids, 10)
        for span in session._chain.spans:
            assert span.history.size == 0
        lose(session, 1)
        generated += run_greedy(session, generated[-1:], len(expected) - 10)
        assert generated == expected
    wait_until(lambda: budget.used == 0, "the budget was not given back")


def test_history_is_given_back(model: SwarmModel) -> None:
    budget = HistoryBudget(limit=2**20)
    with SwarmSession(model.head, SessionTerms(model.state, model.limits, budget, 64)) as session:
        session.step([5, 6, 7])
        assert budget.used == 2 * 3 * 64 * 4  # spans, tokens, hidden size, bytes
    wait_until(lambda: budget.used == 0, "the budget was not given back")


def lose(session: SwarmSession, index: int) -> None:
    """Cut the connection to a server under the session, as a network does."""

    async def cut() -> None:
        span = session._chain.spans[index]
        assert isinstance(span, Span) and span._stream._writer is not None
        span._stream._writer.close()

    RemoteExpertWorker.run_coroutine(cut())


def assert_restored(model: SwarmModel, reference: BloomForCausalLM, lost: list[int], tokens: int) -> None:
    """Lose the connections of these spans in the middle of an answer, which has the right text all the same."""
    token_ids = model.tokenizer.encode(PROMPTS[2])
    expected = greedy(reference, token_ids, tokens)
    with model.open_session(64) as session:
        generated = run_greedy(session, token_ids, 10)
        for index in lost:
            lose(session, index)
        generated += run_greedy(session, generated[-1:], len(expected) - 10)
        assert generated == expected
        assert session.recoveries == len(lost)


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
def test_lost_connection_is_restored_exactly(model: SwarmModel, reference: BloomForCausalLM, lost: list[int]) -> None:
    assert_restored(model, reference, lost, 30)


@pytest.mark.parametrize(
    ("error", "text"), [(AllocationFailed, "a session was refused: why"), (ValueError, "failed\n")]
)
def test_a_server_logs_a_refusal_in_one_line(error: type[Exception], text: str) -> None:
    record = logging.LogRecord("x", logging.WARNING, __file__, 1, "failed", (), (error, error("why"), None))
    assert shorten_refusal(record)
    line = logging.Formatter().format(record)
    assert line.startswith(text) and ("ValueError: why" in line) == (error is ValueError)


def test_full_cache_is_a_typed_error(tiny_bloom, swarm: LocalSwarm) -> None:  # type: ignore[no-untyped-def]
    with LocalSwarm() as local:
        local.start_server(tiny_server(tiny_bloom, "0:4", attn_cache_tokens=64))
        model = load_model(tiny_bloom, local, cache_timeout=0.5)
        with model.open_session(60) as first, model.open_session(60) as second:
            first.step([5])
            with pytest.raises(CacheFull, match="no attention cache is free for 60 tokens on .* blocks 0-3"):
                second.step([5])
            full = PeerID.from_base58(model.state.servers()[0].peer_id)
            assert full not in model.state.manager.state.banned_peers  # it has not failed
            first.close()
            wait_until(lambda: infos(model)[0]["cache_tokens_available"] >= 60 * 4, "the cache was not freed")
            second.step([])  # its token was kept
        model.close()


def in_threads(work: Callable[[int], None], count: int, timeout: float) -> None:
    """Call ``work`` with 0, 1, ... at the same time, and wait for each up to ``timeout`` seconds."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)


def wait_until(condition, message: str, timeout: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Wait for a condition that another process brings about."""
    waiting = threading.Event()
    for _ in range(int(timeout / 0.05)):
        if condition():
            return
        waiting.wait(0.05)
    pytest.fail(message)


def test_failed_dials_leave_no_descriptors(model: SwarmModel) -> None:
    """hivemind leaves the closing of its connection to p2pd to the garbage collector, which may come much later."""
    p2p = model.state.manager.state.p2p
    nobody = PeerID.from_base58("QmNLei78zWmzUdbeRB3CiUfAizWUrbeeZh5K1rhAQKCh51")
    failures: list[Exception] = []  # kept, and with them all that their frames know

    async def dial() -> None:
        try:
            await p2p.call_binary_stream_handler(nobody, "nothing")
        except (P2PDaemonError, ControlFailure) as failure:
            failures.append(failure)

    RemoteExpertWorker.run_coroutine(dial())
    before = psutil.Process().num_fds()
    for _ in range(20):
        RemoteExpertWorker.run_coroutine(dial())
    assert len(failures) == 21
    wait_until(lambda: psutil.Process().num_fds() <= before + 1, "descriptors are left")


class LateByAMoment(concurrent.futures.Future):
    """Is done just when the time of who waits for it is over."""

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(None if timeout is None else 0)
        except concurrent.futures.TimeoutError:
            super().result()
            raise


def test_step_done_in_the_moment_of_looking(model: SwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the soak, once in 12,000 answers: it failed with the time-out of looking for cancellation."""
    run = RemoteExpertWorker.run_coroutine

    def run_late(coroutine: Any, return_future: bool = False) -> Any:
        if not return_future:
            return run(coroutine)
        late = LateByAMoment()
        run(coroutine, return_future=True).add_done_callback(lambda done: late.set_result(done.result()))
        return late

    with model.open_session(8) as session:
        monkeypatch.setattr(RemoteExpertWorker, "run_coroutine", run_late)
        assert session.step([5]).shape == (model.head.vocab_size,)
        monkeypatch.undo()
