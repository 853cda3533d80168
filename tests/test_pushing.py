"""Steps that servers pass on to one another: what they take, and that texts are the same whichever way a step comes."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import BloomForCausalLM

from swarm.client.chain import last_tokens
from swarm.client.flow import Flow, chunk_size
from swarm.client.links import Link
from swarm.client.model import SwarmModel
from swarm.client.session import SwarmSession
from swarm.client.span import ARGS_STRUCTURE, Span
from swarm.client.terms import SessionTerms
from swarm.server import pushing
from swarm.server.pushing import Inbox, Outbox, Store
from swarm.wire.pushes import KEY_BYTES, PERMIT_BYTES, Hop, Label, make_permit, read_label
from swarm.wire.replies import StepNews
from swarm.wire.requests import NO_PROMPTS_AND_HYPOTHESES
from swarm.wire.text import Malformed
from tests.conftest import greedy
from tests.test_session import PROMPTS, assert_restored, infos, run_greedy

from hivemind import MSGPackSerializer, serialize_torch_tensor  # isort: skip  after swarm.compat
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker  # isort: skip
from hivemind.p2p import PeerID  # isort: skip
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from petals.server.handler import TransformerConnectionHandler  # isort: skip

KEY, OTHER_KEY = bytes(KEY_BYTES), bytes([1] * KEY_BYTES)
UID = "tiny.0"
NOBODY = PeerID(bytes([0, 36]) + bytes([7] * 36))  # a peer that is nowhere
TOKENS = 20


# What a session takes


def step(number: int, start: int, tokens: int = 1, key: bytes | None = None, **fields: Any) -> Any:
    """Return a request; with a key, a push that it permits."""
    metadata: dict[str, Any] = {"step_id": number, "start_from_position": start}
    if key is not None:
        metadata |= {"session_id": "s", "pushed": True, "permit": make_permit(key, number, start, tokens)}
    hidden = serialize_torch_tensor(torch.zeros(1, tokens, 8))
    metadata = {"args_structure": ARGS_STRUCTURE, **metadata, **fields}
    tensors = [hidden, *NO_PROMPTS_AND_HYPOTHESES]
    return runtime_pb2.ExpertRequest(uid=UID, tensors=tensors, metadata=MSGPackSerializer.dumps(metadata))


def taken(pushes: list[Any], requests: list[Any], first: Any = None, store: Store | None = None) -> list[int]:
    """Return the numbers of the steps that a session computes, of which the pushes come before the client's."""

    async def collect() -> list[int]:
        inbox = Inbox(UID, KEY, store or Store())
        for push in pushes:
            inbox.put_nowait(push)

        async def stream() -> AsyncIterator[Any]:
            for request in requests:
                await asyncio.sleep(0)
                yield request

        found = []
        async for arrival in inbox.arrivals(first or step(0, 0), stream(), timeout=5.0):
            assert arrival.label is not None and arrival.label.start is not None
            inbox.newest = arrival.label.number
            inbox.position = arrival.label.start + arrival.request.tensors[0].size[1]
            found.append(arrival.label.number * (-1 if arrival.pushed else 1))
        return found

    return asyncio.run(collect())


def test_whichever_comes_first_is_computed() -> None:
    assert taken([], [step(1, 1), step(2, 2)]) == [0, 1, 2]
    assert taken([step(1, 1, key=KEY)], [step(1, 1), step(2, 2)]) == [0, -1, 2]
    assert taken([step(1, 1, key=KEY)] * 2, []) == [0, -1]


def test_pushes_out_of_order_are_computed_in_order() -> None:
    assert taken([step(3, 3, key=KEY), step(1, 1, key=KEY), step(2, 2, key=KEY)], []) == [0, -1, -2, -3]
    assert taken([step(2, 2, key=KEY)], [step(1, 1)]) == [0, 1, -2], "the first one was lost"


def test_steps_from_before_a_rewind_are_not_computed() -> None:
    late = [step(1, 1, key=KEY), step(2, 2, key=KEY)]
    assert taken(late, [step(9, 1)], first=step(8, 0)) == [8, 9]
    assert taken([step(9, 0, key=KEY)], [], first=step(8, 0, tokens=5)) == [8, -9], "a permitted step may go back"


@pytest.mark.parametrize(
    "push",
    [
        step(1, 1, key=OTHER_KEY),
        step(1, 1),
        step(1, 1, key=KEY, permit="no bytes"),
        step(1, 1, key=KEY, step_id=2),
        step(1, 1, key=KEY, start_from_position=0),
        step(1, 1, key=KEY, start_from_position=None),
        step(1, 1, key=KEY, step_id="1"),
        step(1, 1, key=KEY, next_servers=[["peer"]]),
        runtime_pb2.ExpertRequest(uid=UID, metadata=step(1, 1, key=KEY).metadata),
        runtime_pb2.ExpertRequest(uid="tiny.1", tensors=step(1, 1).tensors, metadata=step(1, 1, key=KEY).metadata),
        runtime_pb2.ExpertRequest(uid=UID, tensors=step(1, 1, 2).tensors, metadata=step(1, 1, key=KEY).metadata),
        runtime_pb2.ExpertRequest(uid=UID, tensors=step(1, 1).tensors, metadata=b"\xc1"),
    ],
)
def test_pushes_that_are_not_permitted(push: Any) -> None:
    store = Store()
    assert taken([push], [step(1, 1)], store=store) == [0, 1]
    assert store.used == 0


def test_pushes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = step(2, 2, key=KEY).ByteSize()

    async def hold(limit: int, count: int) -> tuple[int, int]:
        store = Store(limit)
        inbox = Inbox(UID, KEY, store)
        for number in range(2, 2 + count):
            inbox.put_nowait(step(number, number, key=KEY))
        used = store.used
        inbox.close()
        return used, store.used

    assert asyncio.run(hold(2 * size, 3)) == (2 * size, 0)
    used, left = asyncio.run(hold(2**30, 2 * pushing.MAX_HELD))
    assert used < (pushing.MAX_HELD + 1) * size and left == 0
    monkeypatch.setattr(pushing, "HOLD_TIME", 0.0)

    async def swept() -> int:
        store = Store()
        inbox = Inbox(UID, KEY, store)
        inbox.put_nowait(step(2, 2, key=KEY))
        assert store.used
        while store.used:
            await asyncio.sleep(0)
        inbox.close()
        return store.used

    assert asyncio.run(swept()) == 0


@pytest.mark.parametrize(
    "hops",
    [
        "peer",
        [["peer", "session", 0, 1]],
        [["peer", "session", 1, 1, bytes(PERMIT_BYTES)]],
        [["peer", "session", 0, 1, b"short"]],
        [[5, "session", 0, 1, bytes(PERMIT_BYTES)]],
        [["peer", "session", 0, 1, bytes(PERMIT_BYTES)]] * 300,
    ],
)
def test_malformed_hops(hops: Any) -> None:
    with pytest.raises(Malformed):
        read_label({"step_id": 1, "next_servers": hops})


# What a session passes on


def test_a_step_is_passed_on_with_the_rest_of_its_way() -> None:
    hops = tuple(Hop(NOBODY.to_base58(), f"session-{n}", n, n + 1, bytes([n] * PERMIT_BYTES)) for n in (4, 5))
    sent: list[Any] = []

    async def push(failing: Exception | None, size: int) -> list[str]:
        async def send(peer_id: PeerID, request: Any) -> None:
            sent.append((peer_id, request))
            if failing is not None:
                raise failing

        outbox = Outbox(send, "tiny")
        outbox.push(Label(7, None, hops), 3, serialize_torch_tensor(torch.zeros(1, 1, size)))
        for _ in range(5):
            await asyncio.sleep(0)
        return outbox.take_unreachable()

    assert asyncio.run(push(None, 8)) == []
    ((peer_id, request),) = sent
    metadata = MSGPackSerializer.loads(request.metadata)
    assert (peer_id, request.uid, metadata["session_id"]) == (NOBODY, "tiny.4", "session-4")
    label = read_label(metadata)
    assert label == Label(7, 3, hops[1:]) and metadata["permit"] == hops[0].permit
    assert asyncio.run(push(P2PDaemonError("failed to dial"), 8)) == [NOBODY.to_base58()]
    assert asyncio.run(push(ValueError("it does not want it"), 8)) == []
    sent.clear()
    assert asyncio.run(push(None, 2**21)) == [] and not sent, "p2pd carries none so large"


def test_patience() -> None:
    link = Link()
    assert link.patience(1) == 0.0, "nothing is known"
    for _ in range(50):
        link.note_push(1, 0.02)
    assert 0.02 < link.patience(1) < 0.04 and link.patience(100) == 0.0
    link.note_relay(1)
    assert link.patience(1) == 0.0, "pushes do not arrive"
    link.note_push(1, 0.02)
    assert link.patience(1) > 0.0 and link.usable
    link.note_unreachable()
    assert not link.usable


def test_the_last_tokens_of_several_outputs() -> None:
    one, more = torch.arange(6.0).view(1, 3, 2), torch.arange(6.0, 12.0).view(1, 3, 2)
    assert last_tokens([one], 2).equal(one[:, 1:])
    assert last_tokens([one, more], 5).equal(torch.cat([one, more], dim=1)[:, 1:])
    assert last_tokens([one, more], 3).equal(more)


# The texts are the same


@pytest.fixture
def pushed(model: SwarmModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StepNews]]:
    """Have all steps pushed that can be; what the servers say of those of the second server."""
    found: list[StepNews] = []
    learn = Flow._learn

    def note(self: Flow, index: int, chunk: Any, news: StepNews, seconds: float) -> None:
        if index == 1:
            found.append(news)
        learn(self, index, chunk, news, seconds)

    monkeypatch.setattr(Flow, "_learn", note)
    monkeypatch.setattr(model, "limits", dataclasses.replace(model.limits, push_from=0.0))
    yield found
    model.state.links._links.clear()


def patient(monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0) -> None:
    """Let the client wait so long before it sends a step that was pushed."""
    monkeypatch.setattr(Link, "patience", lambda *_: seconds)


def test_pushed_steps_make_the_same_text(
    model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews], monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch)
    for prompt in PROMPTS:
        token_ids = model.tokenizer.encode(prompt)
        expected = greedy(reference, token_ids, TOKENS)
        with model.open_session(128) as session:
            session.step(token_ids[:1])
            assert run_greedy(session, token_ids[1:], len(expected)) == expected
            assert session.recoveries == 0
    # The first push of a session may come before the session is there.
    assert pushed and sum(not news.pushed for news in pushed) <= len(PROMPTS)


def test_a_step_that_is_pushed_and_sent_is_computed_once(
    model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Link, "patience", lambda *_: 0.0)
    token_ids = model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, TOKENS)
    before = [info["inference_tokens"] for info in infos(model)]
    with model.open_session(128) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
    count = len(token_ids) + len(expected) - 1
    assert [info["inference_tokens"] for info in infos(model)] == [tokens + count for tokens in before]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_prompt_in_chunks(
    model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 1.0)  # on a busy machine what the client sends may be first each time
    token_ids = (model.tokenizer.encode(" ".join(PROMPTS)) * 60)[:1200]
    expected = greedy(reference, token_ids, 2)
    terms = SessionTerms(model.state, model.limits, model.budget, 1300, rows)
    with SwarmSession(model.head, terms) as session:
        logits = session.step(token_ids)
        assert int(logits.argmax()) == expected[0]
        following = session.step_rows_bounded(expected[:1] * rows) if rows > 1 else [session.step(expected[:1])]
        assert [int(torch.as_tensor(each.dense() if hasattr(each, "dense") else each).argmax()) for each in following]
        assert session.recoveries == 0
    assert any(news.pushed for news in pushed)


def test_rewound_session(model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews]) -> None:
    token_ids = model.tokenizer.encode(PROMPTS[1])
    expected = greedy(reference, token_ids, TOKENS)
    with model.open_session(128) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
        for length in (len(token_ids) + 5, len(token_ids), 1):
            session.step([9, 8, 7])
            session.truncate(length)
            rest = (token_ids + expected)[length:]
            assert int(session.step(rest[:-1]).argmax()) == rest[-1]
        assert session.recoveries == 0


def hops_changed(fields: dict[str, Any]) -> Callable[..., Hop]:
    """Return ``Span.hop`` whose hops have other fields."""
    hop = Span.hop
    return lambda *arguments: dataclasses.replace(hop(*arguments), **fields)


def test_lost_pushes(
    model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers pass steps on to sessions that are not there, or may not: the client sends them."""
    token_ids = model.tokenizer.encode(PROMPTS[2])
    expected = greedy(reference, token_ids, TOKENS)
    with model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 5)
        changes: list[dict[str, Any]] = [{"session_id": "somebody else's"}, {"permit": bytes(PERMIT_BYTES)}]
        for change in changes:
            with monkeypatch.context() as patch:
                patch.setattr(Span, "hop", hops_changed(change))
                del pushed[:]
                generated += run_greedy(session, generated[-1:], 5)
                assert pushed and not any(news.pushed for news in pushed)
        generated += run_greedy(session, generated[-1:], len(expected) - 15)
        assert generated == expected and session.recoveries == 0


def test_a_server_that_cannot_reach_the_next_is_not_asked_again(
    model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews], monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids = model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, TOKENS)
    told: list[StepNews] = []
    learn = Flow._learn

    def note(self: Flow, index: int, chunk: Any, news: StepNews, seconds: float) -> None:
        if index == 0 and news.unreachable:
            told.append(news)
            second = self._spans[1].peer_id.to_base58()
            news = StepNews(unreachable=[second if peer == NOBODY.to_base58() else peer for peer in news.unreachable])
        learn(self, index, chunk, news, seconds)

    monkeypatch.setattr(Flow, "_learn", note)
    monkeypatch.setattr(Span, "hop", hops_changed({"peer_id": NOBODY.to_base58()}))
    with model.open_session(128) as session:
        logits = session.step(token_ids)
        generated = [int(logits.argmax())]
        for _ in itertools.repeat(None, len(expected) - 1):
            generated.append(int(session.step(generated[-1:]).argmax()))
        assert generated == expected
        for _ in range(200):
            if told:
                break
            session.truncate(len(token_ids))
            session.step(expected[:1])
        assert [set(news.unreachable) for news in told[:1]] == [{NOBODY.to_base58()}]
        first, second = (PeerID.from_base58(peer) for peer, *_ in session.route)
        assert not model.state.links.between(first, second).usable
        assert session.recoveries == 0


def test_a_stranger_pushes_nothing_into_a_session(
    model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews]
) -> None:
    """Even one who knows the session's name, and the number and place of its next step."""
    token_ids = model.tokenizer.encode(PROMPTS[3])
    expected = greedy(reference, token_ids, TOKENS)
    with model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 5)
        span = session._chain.spans[1]
        assert isinstance(span, Span)
        before = infos(model)[1]["inference_tokens"]
        for number in range(10**6, 10**6 + 3):
            start = span.processed
            metadata = {"session_id": span._session_id, "step_id": number, "start_from_position": start}
            metadata |= {"permit": make_permit(OTHER_KEY, number, start, 1), "pushed": True}
            request = runtime_pb2.ExpertRequest(
                uid=span._uid,
                tensors=[serialize_torch_tensor(torch.ones(1, 1, 64)), *NO_PROMPTS_AND_HYPOTHESES],
                metadata=MSGPackSerializer.dumps(metadata),
            )
            stub = TransformerConnectionHandler.get_stub(model.state.manager.state.p2p, span.peer_id)
            RemoteExpertWorker.run_coroutine(stub.rpc_push(request))
        assert infos(model)[1]["inference_tokens"] == before
        generated += run_greedy(session, generated[-1:], len(expected) - 5)
        assert generated == expected and session.recoveries == 0


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
def test_lost_servers(model: SwarmModel, reference: BloomForCausalLM, pushed: list[StepNews], lost: list[int]) -> None:
    assert_restored(model, reference, lost, TOKENS)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("after", [1, 3])
def test_a_server_is_lost_amid_a_prompt(
    model: SwarmModel,
    reference: BloomForCausalLM,
    pushed: list[StepNews],
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
    after: int,
) -> None:
    """Some chunks have gone through all servers, others through some; what is lost is computed again."""
    token_ids = (model.tokenizer.encode(" ".join(PROMPTS)) * 60)[:1200]
    expected = greedy(reference, token_ids, 3)
    answer, answers = Span.answer, itertools.count()

    async def cut(self: Span, awaited: Any, rows: int) -> Any:
        if self.start == 2 * lost and awaited.shape[1] > 1 and next(answers) == after:
            assert self._stream._writer is not None
            self._stream._writer.close()
        return await answer(self, awaited, rows)

    monkeypatch.setattr(Span, "answer", cut)
    with model.open_session(1300) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
        assert session.recoveries == 1


def test_chunks_are_smaller_in_longer_chains(model: SwarmModel) -> None:
    terms = SessionTerms(model.state, model.limits, model.budget, 16)
    inputs = torch.empty(1, 2048, 64)
    spans: list[Any] = [object()] * 8
    sizes = [chunk_size(inputs, spans[:count], terms) for count in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 512
    wide = torch.empty(1, 1, 1, dtype=torch.float32).expand(1, 2048, 14336)
    assert chunk_size(wide, spans[:1], terms) * 14336 * 4 < 2**22
