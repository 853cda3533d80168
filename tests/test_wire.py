"""What peers send: an evil server beside honest ones, an evil client of honest servers, lies in the DHT, and noise."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import math
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import psutil
import pytest
import torch
from hivemind import MSGPackSerializer, serialize_torch_tensor
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.utils.timed_storage import get_dht_time
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from petals.client.config import ClientConfig
from petals.client.routing import RemoteSequenceManager
from petals.data_structures import RemoteModuleInfo, RemoteSpanInfo, ServerInfo, ServerState
from petals.utils.dht import compute_spans, declare_active_modules
from transformers import BloomForCausalLM

from swarm import compat
from swarm.client import routing as state_module
from swarm.client.cheapest_route import cheapest_route
from swarm.client.membership import Swarm
from swarm.client.model import SwarmModel
from swarm.client.routing import SwarmState, keep_some
from swarm.client.session import SwarmSession
from swarm.client.span import ARGS_STRUCTURE, Span
from swarm.client.terms import SessionLimits, SessionTerms
from swarm.errors import ModelMismatch
from swarm.local import LocalSwarm
from swarm.wire import messages, records
from swarm.wire.announcements import read_announcement, read_announcements
from swarm.wire.messages import bound_streams, receive
from swarm.wire.packing import MAX_LEVELS, read_metadata, unpack
from swarm.wire.pushes import Label
from swarm.wire.records import MAX_RECORD, is_sane, unpack_dictionary
from swarm.wire.replies import read_abilities, read_hidden, read_silence
from swarm.wire.requests import MAX_ROWS, check_call, read_session, read_step
from swarm.wire.tensors import read_tensor
from swarm.wire.text import MAX_NAME, MAX_TEXT, Malformed, clean
from tests.conftest import greedy, load_model, tiny_server
from tests.support import evil
from tests.support.evil import EvilServer, bomb, framed
from tests.test_session import run_greedy, wait_until

PROMPT = "The quick brown fox"
TOKENS = 12
HIDDEN = 64


# An evil server


@pytest.fixture(scope="module")
def battlefield(tiny_bloom: Path) -> Iterator[LocalSwarm]:
    """A swarm of its own: in another one the evil server would be asked by everybody's sessions."""
    with LocalSwarm() as local:
        for blocks in ("0:2", "2:4"):
            local.start_server(tiny_server(tiny_bloom, blocks))
        yield local


@pytest.fixture(scope="module")
def victim(tiny_bloom: Path, battlefield: LocalSwarm) -> Iterator[SwarmModel]:
    model = load_model(tiny_bloom, battlefield)
    yield model
    model.close()


@pytest.fixture(scope="module")
def enemy(battlefield: LocalSwarm, victim: SwarmModel) -> Iterator[EvilServer]:
    server = EvilServer(battlefield.swarm.initial_peers, victim.state.manager.block_uids)
    yield server
    server.close()


def preferred(model: SwarmModel) -> str:
    return str(model.state.route(0, 1, 0)[0].peer_id)


@pytest.fixture
def tempted(victim: SwarmModel, enemy: EvilServer) -> Iterator[SwarmModel]:
    """The client when it trusts the evil server and finds it the fastest."""
    victim.state.manager.state.banned_peers.clear()
    victim.state._offenders.clear()
    enemy.announce()
    assert victim.state.wait(lambda: preferred(victim) == str(enemy.peer_id), 30)
    yield victim
    enemy.answer, enemy.asked, enemy.info = None, 0, evil.ALIVE


@pytest.mark.parametrize(("answer", "reason"), evil.ANSWERS.values(), ids=evil.ANSWERS)
def test_a_bad_reply_is_a_bad_server(
    tempted: SwarmModel, enemy: EvilServer, reference: BloomForCausalLM, answer: evil.Answer, reason: str
) -> None:
    """The answer is the honest servers', and the other is banned, longer than for a loss."""
    enemy.answer = answer
    token_ids = tempted.tokenizer.encode(PROMPT)
    expected = greedy(reference, token_ids, TOKENS)
    with tempted.open_session(64) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
        (loss,) = session.losses
    assert enemy.asked and loss.peer_id == str(enemy.peer_id)
    assert re.search(reason, loss.reason), loss.reason
    assert len(loss.reason) < 400 and loss.reason.isprintable()
    assert enemy.peer_id in tempted.state.manager.state.banned_peers
    assert tempted.state._offenders[enemy.peer_id] == state_module.GOOD_STEPS


@pytest.mark.parametrize(
    ("info", "step_timeout"),
    [
        (evil.ALIVE, 1.0),
        (MSGPackSerializer.dumps({"silent_for": "\n" * 1000}), 120.0),
        (MSGPackSerializer.dumps({"silent_for": math.nan}), 120.0),
        (MSGPackSerializer.dumps([]), 120.0),
        (bomb(), 120.0),
    ],
    ids=["lives", "text", "NaN", "list", "nested"],
)
def test_silence_costs_one_wait(
    tempted: SwarmModel, enemy: EvilServer, reference: BloomForCausalLM, info: bytes, step_timeout: float
) -> None:
    enemy.info = info
    token_ids = tempted.tokenizer.encode(PROMPT)
    expected = greedy(reference, token_ids, TOKENS)
    limits = dataclasses.replace(tempted.limits, step_timeout=step_timeout, probe_after=0.2)
    with SwarmSession(tempted.head, SessionTerms(tempted.state, limits, tempted.budget, 64)) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
        (loss,) = session.losses
    assert enemy.asked == 1 and loss.peer_id == str(enemy.peer_id)
    assert loss.reason.isprintable() and len(loss.reason) < 400


def test_more_servers_refuse_than_patience_lasts(
    tempted: SwarmModel, enemy: EvilServer, reference: BloomForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many refuse, another one that can compute is found; and offenders are not forgiven for a good step."""
    monkeypatch.setattr("swarm.client.span.REFUSAL_PATIENCE", 0.5)
    fakes = [PeerID(bytes([0, 36]) + random.randbytes(36)) for _ in range(12)]
    honest = [*tempted.state.manager.state.sequence_info.spans_by_priority]
    spans = [RemoteSpanInfo(fake, 0, 4, ServerInfo(ServerState.ONLINE, 1.0, 0, 4, inference_rps=1e5)) for fake in fakes]
    sequence_info = tempted.state.manager.state.sequence_info
    monkeypatch.setattr(sequence_info, "_sort_spans", lambda infos: ([*spans, *honest], ()))
    sequence_info.spans_by_priority = [*spans, *honest]
    monkeypatch.setattr(tempted.state.manager.ping_aggregator, "to_dict", dict)  # nobody is near
    send, refused = Span.send, []

    async def refuse(self: Span, inputs: torch.Tensor, label: Label) -> None:
        if self.peer_id in fakes:
            refused.append(self.peer_id)
            await asyncio.sleep(0.1)
            raise self._offence("refuses")
        await send(self, inputs, label)

    monkeypatch.setattr(Span, "send", refuse)
    enemy.answer = evil.tensors(0)
    token_ids = tempted.tokenizer.encode(PROMPT)
    expected = greedy(reference, token_ids, TOKENS)
    with tempted.open_session(64) as session:
        assert run_greedy(session, token_ids, len(expected)) == expected
    assert sorted(refused) == sorted(fakes), "each is asked once"
    tempted.state.unban(fakes[0])
    assert fakes[0] in tempted.state.manager.state.banned_peers
    tempted.state.refresh()


def test_only_the_guilty_hidden_states_fail(model: SwarmModel) -> None:
    """What one thread wants computed does not fail what others wait for."""
    head = model.head
    good = torch.randn(HIDDEN)
    expected = head.logits(good[None])[0]
    for bad in (torch.zeros(3), torch.zeros(1, HIDDEN), torch.zeros(HIDDEN, dtype=torch.int64)):
        with pytest.raises(ModelMismatch):
            head.next_logits(bad)
    results: dict[str, Any] = {}

    def work(name: str, hidden: torch.Tensor) -> None:
        try:
            results[name] = head.next_logits(hidden)
        except Exception as error:
            results[name] = error

    compute, poison = head.logits, torch.full((HIDDEN,), 1e30)
    with head._all_together.computing, pytest.MonkeyPatch.context() as patch:
        threads = [
            threading.Thread(target=work, args=(name, hidden))
            for name, hidden in {"good": good, "bad": poison, "also good": good}.items()
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(head._all_together.waiting) == 3, "they do not wait")

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            if (hidden == 1e30).any():
                raise RuntimeError("out of memory")
            return compute(hidden)

        patch.setattr(head, "logits", logits)
        head._all_together._compute_waiting()
    for thread in threads:
        thread.join(10)
    torch.testing.assert_close(results["good"], expected)
    torch.testing.assert_close(results["also good"], expected)
    assert isinstance(results["bad"], RuntimeError)


# A session's own care


def test_a_closed_session_opens_no_streams(model: SwarmModel) -> None:
    session = model.open_session(8)
    inputs = session._head.embed([1, 2])
    session.close()
    forward = RemoteExpertWorker.run_coroutine(session._chain.forward(inputs, 0), return_future=True)
    with pytest.raises(Exception, match="closed"):
        forward.result(10)
    assert not session._chain.spans


def test_a_step_that_lingers_harms_no_other(model: SwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled step may take long to end; then the next one has begun, with spans of its own."""
    impatient = dataclasses.replace(model.limits, connect_timeout=0.2, push_from=math.inf)  # one server after the other
    session = SwarmSession(model.head, SessionTerms(model.state, impatient, model.budget, 64))
    expected = session.step([1, 2, 3])
    chain = session._chain
    cancelled, leave = asyncio.Event(), asyncio.Event()

    async def linger(*_: object) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            await leave.wait()
            raise

    with session:
        session.truncate(0)
        with monkeypatch.context() as patch:
            patch.setattr(Span, "step", linger)
            step = RemoteExpertWorker.run_coroutine(
                chain.forward(session._head.embed([1, 2, 3]), chain.position), return_future=True
            )
            wait_until(lambda: chain._task is not None, "the step did not begin")
            session.release()
            RemoteExpertWorker.run_coroutine(asyncio.wait_for(cancelled.wait(), 10))
        session.step([1, 2, 3])
        spans = chain.spans

        async def let_go() -> None:
            leave.set()

        RemoteExpertWorker.run_coroutine(let_go())
        with pytest.raises((asyncio.CancelledError, concurrent.futures.CancelledError)):
            step.result(10)
        assert chain.spans is spans and chain.position == 3
        torch.testing.assert_close(session.step(), expected, atol=1e-4, rtol=1e-4)


def test_losses_far_apart_do_not_add_up(model: SwarmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt may lose servers as often as it likes, if it goes on in between."""
    limits = dataclasses.replace(SessionLimits(), recovery_timeout=10.0)
    now = [0.0]
    with SwarmSession(model.head, SessionTerms(model.state, limits, model.budget, 2048)) as session:
        forward, calls = session._chain.forward, 0

        async def lossy(inputs: torch.Tensor, start: int) -> torch.Tensor | None:
            nonlocal calls
            calls += 1
            now[0] += 6.0
            return None if calls % 2 else await forward(inputs, start)

        monkeypatch.setattr(session._chain, "forward", lossy)
        monkeypatch.setattr("swarm.client.session.PIECE", 512)
        monkeypatch.setattr("swarm.client.session.time", SimpleNamespace(monotonic=lambda: now[0]))
        assert session.step([5] * 1600).shape == (model.head.vocab_size,)
        assert calls == 8


# An evil client


@pytest.fixture(scope="module")
def uids(model: SwarmModel) -> list[str]:
    return list(model.state.manager.block_uids[:2])


def processes_of(swarm: LocalSwarm) -> set[int]:
    return {child.pid for server in swarm.servers for child in psutil.Process(server.process.pid).children()}


def test_an_evil_client_harms_nobody(
    model: SwarmModel, reference: BloomForCausalLM, swarm: LocalSwarm, uids: list[str]
) -> None:
    """Each request is refused, by name; sessions beside it in the same batches get every token right."""
    token_ids = model.tokenizer.encode(PROMPT)
    expected = greedy(reference, token_ids, TOKENS)
    over, wrong = threading.Event(), []
    handlers = processes_of(swarm)

    def use() -> None:
        while not over.is_set():
            with model.open_session(64) as session:
                if (generated := run_greedy(session, token_ids, len(expected))) != expected or session.losses:
                    wrong.append((generated, session.losses))

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    p2p = model.state.manager.state.p2p
    peer_id = model.state.route(0, 2, 0)[0].peer_id
    try:
        for _ in range(2):
            for name, (messages, answer) in evil.bad_requests(uids, HIDDEN).items():
                got = RemoteExpertWorker.run_coroutine(evil.ask(p2p, peer_id, messages))
                assert answer in got and got.isprintable() and len(got) < 400, f"{name}: {got}"
    finally:
        over.set()
        for user in users:
            user.join(60)
    assert not wrong
    assert handlers == {
        child.pid for server in swarm.servers for child in psutil.Process(server.process.pid).children()
    }


class Stream:
    """A stream to hivemind's handler of streams, without p2pd: what is read and written, and whether it is closed."""

    def __init__(self) -> None:
        self.reader, self.written, self.closed = asyncio.StreamReader(), b"", asyncio.Event()
        self.wrote = asyncio.Event()

    def write(self, data: bytes) -> None:
        self.written += data
        self.wrote.set()

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self.closed.set()

    async def refuse(self) -> "asyncio.Task[None]":
        """Send a request, which is refused."""
        handlers = []

        async def add(name: str, handler: Any, balanced: bool) -> None:
            handlers.append(handler)

        async def refuse(requests: Any, context: Any) -> Any:
            async for _ in requests:
                raise Malformed("not like this")
                yield

        host: Any = SimpleNamespace(peer_id=PeerID(b"\0\1a"), add_binary_stream_handler=add)
        await P2P._add_protobuf_stream_handler(host, "refuse", refuse, runtime_pb2.ExpertRequest)
        self.reader.feed_data(framed(b""))
        info = SimpleNamespace(peer_id=PeerID(b"\0\1b"))
        task = asyncio.create_task(handlers[0](info, self.reader, self))
        await asyncio.wait_for(self.wrote.wait(), 10)
        return task


def test_who_is_refused_closes_the_stream() -> None:
    """p2pd may lose what comes right before an end, so that a refusal would be one without a reason."""

    async def scenario() -> None:
        stream = Stream()
        serving = await stream.refuse()
        assert b"not like this" in stream.written
        for _ in range(100):  # whatever the handler still does without being asked
            await asyncio.sleep(0)
        assert not stream.closed.is_set(), "the reason may be on its way"
        stream.reader.feed_eof()
        await asyncio.wait_for(serving, 10)
        assert stream.closed.is_set()

    asyncio.run(scenario())


def test_who_is_refused_has_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "REFUSAL_TIME", 0.01)

    async def scenario() -> None:
        stream = Stream()
        await asyncio.wait_for(await stream.refuse(), 10)
        assert stream.closed.is_set()

    asyncio.run(scenario())


def test_waiting_for_attention_cache_is_bounded(uids: list[str]) -> None:
    data = evil.request(uids, torch.zeros(1, 1, HIDDEN), alloc_timeout=600)[9:]
    session = read_session(runtime_pb2.ExpertRequest.FromString(data), 2048)
    assert (session.alloc_timeout, session.max_length, session.batch_size) == (10.0, 8, 1)
    with pytest.raises(Malformed, match="Cannot allocate KV cache for 8 tokens, max = 7"):
        read_session(runtime_pb2.ExpertRequest.FromString(data), 7)


def test_one_peer_has_so_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """More are closed; and of messages that are on their way it may have two of the largest."""
    monkeypatch.setattr(messages, "MAX_STREAMS", 2)

    class Writer:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    async def scenario() -> None:
        peer, other, over, writer = PeerID(b"\0\1a"), PeerID(b"\0\1b"), asyncio.Event(), Writer()

        async def handler(*_: object) -> None:
            await over.wait()

        handle = bound_streams(handler)
        infos = [type("Info", (), {"peer_id": one}) for one in (peer, peer, peer, other)]
        streams = [asyncio.create_task(handle(info, None, writer)) for info in infos]
        await asyncio.wait(streams, timeout=0.2)
        assert [stream.done() for stream in streams] == [False, False, True, False] and writer.closed == 1
        over.set()
        await asyncio.gather(*streams)
        assert peer not in messages._senders and other not in messages._senders

        monkeypatch.setitem(messages._limits, "message", 100)
        errors = []

        async def read(*_: object) -> None:
            reader = asyncio.StreamReader()
            reader.feed_data(framed(b"", size=90))
            try:
                await asyncio.wait_for(receive(runtime_pb2.ExpertRequest, reader), 0.2)
            except (TimeoutError, Malformed) as error:
                errors.append(type(error))

        monkeypatch.setattr(messages, "MAX_STREAMS", 3)
        await asyncio.gather(*(bound_streams(read)(infos[0], None, writer) for _ in range(3)))
        assert sorted(error.__name__ for error in errors) == ["Malformed", "TimeoutError", "TimeoutError"]

    asyncio.run(scenario())


# Lies in the DHT


def announcement(**fields: Any) -> tuple[int, float, dict[str, Any]]:
    return (2, 1.0, {"start_block": 0, "end_block": 4, "inference_rps": 5.0, **fields})


def member(value: Any) -> Any:
    return type("Member", (), {"value": value})


def test_what_announcements_may_say() -> None:
    peer = PeerID(bytes([0, 36]) + random.randbytes(36)).to_base58()
    (info,) = read_announcements(
        "m.1",
        {
            peer: member(
                announcement(public_name="a\n\x1b[31m" + "b" * 1000, inference_rps=1e9, next_pings={peer: math.inf})
            )
        },
    ).values()
    assert info.public_name.startswith("a\\n\\x1b[31mbbb") and len(info.public_name) == MAX_NAME
    assert info.inference_rps == 1e6 and info.next_pings == {peer: math.inf}
    assert (info.start_block, info.end_block, info.state) == (0, 4, ServerState.ONLINE)
    sound = read_announcements("m.1", {peer: member((2, 1.0)), "x": member(announcement())})
    assert [str(one) for one in sound] == [peer]


@pytest.mark.parametrize(
    "value",
    [
        announcement(inference_rps=0.0),
        announcement(inference_rps=math.nan),
        announcement(inference_rps=True),
        announcement(forward_rps="1"),
        announcement(start_block=2),
        announcement(start_block=-1),
        announcement(end_block=1),
        announcement(end_block=4.0),
        announcement(end_block=2**70),
        announcement(cache_tokens_left=-1),
        announcement(cache_tokens_left=1.5),
        announcement(public_name=5),
        announcement(next_pings=[1]),
        announcement(next_pings={"x": -1.0}),
        announcement(next_pings={str(n): 1.0 for n in range(1000)}),
        announcement(adapters="x"),
        announcement(adapters=["x" * 1000]),
        announcement(adapters=["x"] * 1000),
        (2, math.inf * 0, {}),
        (3, 1.0, {}),
        (True, 1.0, {}),
        (2, 1.0, []),
        (2,),
        "online",
        None,
        {},
    ],
)
def test_announcements_that_cannot_be_true_are_left_out(value: Any) -> None:
    good, bad = (PeerID(bytes([0, 36]) + random.randbytes(36)).to_base58() for _ in range(2))
    read = read_announcements("m.1", {bad: member(value), good: member(announcement())})
    assert [str(peer) for peer in read] == [good]


@pytest.mark.parametrize(
    "subkey", [123, None, b"Qm", "", "0OIl", "Qm", "x" * 5000, ("a",), PeerID(b"\x12\x20abc").to_base58()]
)
def test_what_is_no_peer_id(subkey: Any) -> None:
    assert not read_announcements("m.0", {subkey: member(announcement())})


@dataclasses.dataclass
class Members:
    """A first peer, a member that lies, and the view of a client of the first."""

    first: Swarm
    liar: EvilServer
    view: SwarmState


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    """A swarm of DHT nodes only, in which the first announces the blocks."""
    first = Swarm.found(["/ip4/127.0.0.1/tcp/0"])
    uids = [f"lies.{block}" for block in range(4)]
    liar = EvilServer(first.initial_peers, uids)
    info = ServerInfo(ServerState.ONLINE, 1.0, 0, 4, public_name="honest")
    declare_active_modules(first.dht, uids, info, get_dht_time() + 300)
    manager = RemoteSequenceManager(ClientConfig(initial_peers=[], dht_prefix="lies"), uids, dht=first.dht)
    view = SwarmState(manager, "lies")
    assert view.start(30)
    yield Members(first, liar, view)
    view.close()
    liar.close()
    first.close()


def wait_for_reading(view: SwarmState) -> None:
    """Wait until the DHT has been read once more."""
    read_at = view.manager.state.sequence_info.last_updated_time
    assert view.wait(lambda: view.manager.state.sequence_info.last_updated_time != read_at, 30)


def test_lies_of_a_node_hide_nobody(members: Members) -> None:
    """Records that stock nodes keep, and the swarm's own refuse: the honest server stays in view."""
    enemy, view = members.liar, members.view
    uids = enemy.uids
    fake = PeerID(bytes([0, 36]) + random.randbytes(36)).to_base58()
    dumps = MSGPackSerializer.dumps
    lies: list[tuple[Any, Any, float | None]] = [
        (dumps(announcement(inference_rps=0.0)), fake, None),
        (dumps(announcement()), 123, None),
        (dumps(announcement()), "no peer", None),
        (bomb(), fake + "1", None),
        (b"\xc1", "unreadable", None),
        (dumps(announcement(public_name="x" * 1000)), fake + "2", None),
        (dumps("online"), fake + "3", evil.FAR_AWAY),
    ]
    for uid in uids[:3]:
        for value, subkey, expiration in lies:
            enemy.plant(uid, value, subkey, expiration)
    enemy.plant(uids[3], dumps(1), None, evil.FAR_AWAY)
    enemy.announce()
    for _ in range(3):
        wait_for_reading(view)
        found = {server.peer_id: (server.start, server.end, server.public_name) for server in view.servers()}
        assert found[str(members.first.dht.peer_id)] == (0, 4, "honest")
        assert set(found) <= {str(members.first.dht.peer_id), str(enemy.peer_id)}
        assert [(span.start, span.end) for span in view.route(0, 4, 0)] == [(0, 4)]
    assert str(enemy.peer_id) in found, "what else this node keeps is read"


def test_our_nodes_keep_no_lies(members: Members) -> None:
    """The first peer takes what petals' servers store, and nothing that would stand in its way."""
    first, enemy = members.first.dht.peer_id, members.liar
    until, dumps = get_dht_time() + 60, MSGPackSerializer.dumps

    def store(subkey: bytes, value: bytes, expiration: float = until) -> Any:
        request = dht_pb2.StoreRequest(
            keys=[DHTID.generate("prefix-of-lies.0").to_bytes()],
            subkeys=[subkey],
            values=[value],
            expiration_time=[expiration],
            in_cache=[False],
        )
        stub = super(DHTProtocol, DHTProtocol).get_stub(enemy.p2p, first)
        try:
            return list(RemoteExpertWorker.run_coroutine(stub.rpc_store(request, timeout=10)).store_ok)
        except Exception as error:
            return error

    good = dumps(announcement())
    assert store(dumps(None), good) == [False]  # a plain value
    assert store(dumps("peer"), good, evil.FAR_AWAY) == [False]
    assert store(dumps("peer"), good, math.nan) == [False]
    assert store(dumps("peer"), bomb()) == [False]
    assert store(bomb(), good) == [False]
    assert store(dumps(123), good) == [False]
    assert store(dumps("peer"), bytes(MAX_RECORD + 1)) == [False]
    assert isinstance(store(b"", bomb()), Exception)  # a whole dictionary
    assert store(dumps("peer"), good) == [True], "and it still answers"


def test_dictionaries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from hivemind.dht.storage import DHTLocalStorage

    monkeypatch.setattr(records, "MAX_SUBKEYS", 3)
    storage, key, until = DHTLocalStorage(), DHTID.generate("x"), get_dht_time() + 60
    assert [storage.store_subkey(key, str(n), b"\xc0", until) for n in range(5)] == [True] * 3 + [False] * 2
    assert storage.store_subkey(key, "1", b"\xc0", until + 1), "those that are there may tell news"


def random_swarm(seed: int) -> tuple[list[RemoteModuleInfo], dict[PeerID, float]]:
    rng, blocks = random.Random(seed), 8
    peers = [PeerID(bytes([0, 36]) + rng.randbytes(36)) for _ in range(12)]
    infos = [RemoteModuleInfo(f"m.{block}", {}) for block in range(blocks)]
    for peer in peers:
        start = rng.randrange(blocks)
        end = min(blocks, start + rng.randint(1, 5))
        pings = {other.to_base58(): rng.random() for other in rng.sample(peers, 5)}
        info = ServerInfo(
            ServerState.ONLINE, 1.0, start, end,
            inference_rps=rng.choice([None, rng.uniform(1, 500)]),
            cache_tokens_left=rng.choice([None, 10, 10**6]),
            next_pings=rng.choice([None, pings]),
        )  # fmt: skip
        for block in range(start, end):
            infos[block].servers[peer] = info
    return infos, {peer: rng.random() for peer in rng.sample(peers, 8)}


@pytest.mark.parametrize("seed", range(40))
def test_routes_cost_what_petals_find(seed: int) -> None:
    """The same graph, and the same shortest path through it, as petals' own router finds."""
    infos, pings = random_swarm(seed)
    spans = list(compute_spans(infos, min_state=ServerState.ONLINE).values())
    start, end = sorted(random.Random(seed).sample(range(9), 2))
    route = cheapest_route(spans, start, end, pings, 100)
    sequence_info = type("Info", (), {})()
    sequence_info.spans_by_priority = spans
    sequence_info.spans_containing_block = [[s for s in spans if s.start <= block < s.end] for block in range(8)]
    manager = object.__new__(RemoteSequenceManager)
    manager.state = type("State", (), {"sequence_info": sequence_info})
    manager.ping_aggregator = type("Pings", (), {"to_dict": staticmethod(lambda: pings)})
    if not all(sequence_info.spans_containing_block[start:end]):
        assert route is None
        return
    import dijkstar

    graph = manager._build_inference_graph(start, end, cache_tokens_needed=100)
    path = dijkstar.find_path(graph, "start", "end")
    assert route is not None and (route[0].start, route[-1].end) == (start, end)
    nodes: list[Any] = ["start"]
    for span in route:
        nodes += [(span.peer_id, block) for block in range(span.start, span.end + 1)]
    nodes.append("end")
    cost = sum(graph.get_edge(a, b) for a, b in zip(nodes, nodes[1:], strict=False))
    assert cost == pytest.approx(path.total_cost)


def test_a_crowd_takes_no_time_and_hides_nobody() -> None:
    """A thousand fake servers of each block: those that were there before them stay in view."""
    blocks, rng = 70, random.Random(0)
    infos = [RemoteModuleInfo(f"m.{block}", {}) for block in range(blocks)]
    honest = [PeerID(bytes([0, 36]) + rng.randbytes(36)) for _ in range(14)]
    crowd = [PeerID(bytes([0, 36]) + rng.randbytes(36)) for _ in range(1000)]
    for index, peer in enumerate(honest):
        for block in range(5 * index, 5 * index + 5):
            infos[block].servers[peer] = ServerInfo(
                ServerState.ONLINE, 1.0, 5 * index, 5 * index + 5, inference_rps=9.0
            )
    for peer in crowd:
        first = rng.randrange(blocks)
        infos[first].servers[peer] = ServerInfo(ServerState.ONLINE, 1.0, 0, blocks, inference_rps=1e6)
    keep_some(infos, lambda peer: (peer in crowd, peer))
    spans = list(compute_spans(infos, min_state=ServerState.ONLINE).values())
    assert len(spans) <= state_module.MAX_SERVERS
    assert {span.peer_id for span in spans} >= set(honest)
    started = time.monotonic()
    assert cheapest_route(spans, 0, blocks, {}, 0)
    assert time.monotonic() - started < 1.0


# Noise


QUICK = settings(max_examples=1600, deadline=None, database=None, suppress_health_check=list(HealthCheck))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=12) | st.binary(max_size=4), inner, max_size=4)
        | st.tuples(st.sampled_from([0x40, 0x50, 0x51, 0x07]), st.binary(max_size=30)).map(
            lambda it: msgpack.ExtType(*it)
        )
    ),
    max_leaves=12,
)
packed = values.map(MSGPackSerializer.dumps) | st.binary(max_size=80)


@contextlib.contextmanager
def only_malformed() -> Iterator[None]:
    """Whatever is sent, this is the only thing that may come of it."""
    with contextlib.suppress(Malformed):
        yield


@QUICK
@given(packed)
def test_noise_for_packed_values(data: bytes) -> None:
    for read in (unpack, unpack_dictionary, read_metadata, read_abilities, read_silence):
        with only_malformed():
            read(data)
    assert is_sane("peer", data, get_dht_time() + 1) in (True, False)


@QUICK
@given(st.integers(0, 60), st.sampled_from([0x40, 0x50]))
def test_nesting_is_bounded(depth: int, code: int) -> None:
    data = msgpack.packb([])
    for _ in range(depth):
        data = msgpack.packb([msgpack.ExtType(code, data)])
    if code == 0x40 and depth <= MAX_LEVELS:
        unpack(data)
    elif depth:
        with pytest.raises(Malformed):
            unpack(data)


@QUICK
@given(values)
def test_noise_for_announcements(value: Any) -> None:
    read = read_announcements("m.1", {value if isinstance(value, str | bytes | int) else "x": member(value)})
    assert all(isinstance(info, ServerInfo) for info in read.values())
    with only_malformed():
        read_announcement(value, 1)


@QUICK
@given(
    st.fixed_dictionaries(
        {},
        optional={
            field.name: scalars
            | st.lists(scalars, max_size=2)
            | st.dictionaries(st.text(max_size=5), scalars, max_size=2)
            for field in dataclasses.fields(ServerInfo)
        },
    ),
    scalars,
)
def test_noise_in_announcements(fields: dict[str, Any], throughput: Any) -> None:
    with only_malformed():
        info = read_announcement((2, throughput, fields), 0)
        assert info.inference_rps is None or 0 < info.inference_rps <= 1e6
        assert info.public_name is None or len(info.public_name) <= 100 and info.public_name.isprintable()


proto_tensors = st.builds(
    runtime_pb2.Tensor,
    buffer=st.binary(max_size=64),
    size=st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**16, 2**32 - 1]), max_size=5),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int64", "uint8", "object", "", "O8"]),
    compression=st.integers(0, 7),
    requires_grad=st.booleans(),
)


@QUICK
@given(proto_tensors)
def test_noise_for_tensors(tensor: runtime_pb2.Tensor) -> None:
    with only_malformed():
        read = read_tensor(tensor)
        assert list(read.shape) == list(tensor.size)
        assert read.dtype == getattr(torch, tensor.dtype)
    with only_malformed():
        read = read_hidden([tensor], (1, 1, 4))
        assert read.shape == (1, 1, 4) and torch.isfinite(read).all()


step_fields = st.dictionaries(
    st.sampled_from(
        ["max_length", "alloc_timeout", "session_id", "active_adapter", "args_structure", "start_from_position"]
    ),
    values,
    max_size=3,
)


@QUICK
@given(st.lists(proto_tensors, max_size=4), step_fields)
def test_noise_for_requests(tensors: list[runtime_pb2.Tensor], fields: dict[str, Any]) -> None:
    good = {"max_length": 8, "args_structure": ARGS_STRUCTURE}
    metadata = MSGPackSerializer.dumps({**good, **fields})
    request = runtime_pb2.ExpertRequest(uid="m.0", tensors=tensors, metadata=metadata)
    with only_malformed():
        check_call(request)
    with only_malformed():
        session = read_session(request, 16)
        assert 1 <= session.batch_size <= MAX_ROWS and 0 <= session.alloc_timeout <= 10
        step = read_step(request, fields, session, position=3, num_blocks=1, hidden_size=4)
        assert 0 <= step.start <= 3 and step.hidden.shape[2] == 4


@QUICK
@given(st.binary(max_size=120), st.sampled_from([runtime_pb2.ExpertResponse, runtime_pb2.ExpertRequest]), st.booleans())
def test_noise_for_messages(data: bytes, kind: Any, whole: bool) -> None:
    async def read() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(framed(data, marker=data[:1] or b"\0") if whole else data)
        reader.feed_eof()
        with contextlib.suppress(EOFError):
            return await receive(kind, reader, lambda: 100)

    with only_malformed():
        message, error = LOOP.run_until_complete(read()) or (None, None)
        if error is not None:
            assert clean(error.message).isprintable()
        if isinstance(message, runtime_pb2.ExpertResponse):
            read_abilities(message.metadata)
            read_hidden(message.tensors, (1, 1, 4))
        if isinstance(message, runtime_pb2.ExpertRequest):
            read_session(message, 16)


LOOP = asyncio.new_event_loop()


@QUICK
@given(st.text())
def test_texts_of_peers(text: str) -> None:
    line = clean(text)
    assert line.isprintable() and len(line) <= MAX_TEXT
    if text.isprintable() and len(text) <= MAX_TEXT:
        assert line == text


def test_what_is_packed_honestly_is_read() -> None:
    value = {"a": (1, (2.5, None)), "b": [b"x", "y"], "structure": ARGS_STRUCTURE}
    assert MSGPackSerializer.loads(MSGPackSerializer.dumps(value)) == value
    with DictionaryDHTValue().freeze() as dictionary:
        dictionary.store("peer", MSGPackSerializer.dumps((2, 1.0)), get_dht_time() + 5)
    (read,) = MSGPackSerializer.loads(MSGPackSerializer.dumps([dictionary]))
    assert list(read.items()) == list(dictionary.items())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden = torch.randn(1, 3, 8).to(dtype)
        sent = serialize_torch_tensor(hidden)
        assert len(sent.buffer) == hidden.numel() * hidden.element_size(), "16 bits travel as 16"
        assert torch.equal(read_hidden([sent], hidden.shape), hidden)
        assert read_hidden([serialize_torch_tensor(hidden[:, :0])], (1, 0, 8)).shape == (1, 0, 8)
    hidden = torch.randn(1, 3, 8)
    for compression in (runtime_pb2.FLOAT16, runtime_pb2.MEANSTD_16BIT):
        decompressed = read_hidden([serialize_torch_tensor(hidden, compression)], hidden.shape)
        torch.testing.assert_close(decompressed, hidden, atol=0.01, rtol=0.01)
    with pytest.raises(Malformed, match="the compression UNIFORM_8BIT is not accepted"):
        serialize_torch_tensor(hidden, runtime_pb2.UNIFORM_8BIT)
