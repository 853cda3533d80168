"""The program's own DHT process or p2pd dies: it is in its swarm again, and answers go on undisturbed."""

import contextlib
import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

import swarm.client.node
from config import Settings
from swarm.client import membership
from swarm.client.membership import Swarm
from swarm.client.model import SwarmModel
from swarm.client.node import with_port
from swarm.local import LocalSwarm
from tests.conftest import READY_TIMEOUT, LiveApp, greedy, serve
from tests.support.client import call
from tests.test_session import PROMPTS, run_greedy, wait_until

TOKENS = 30


@pytest.fixture(scope="module")
def own_app(tiny_bloom: Path) -> Iterator[LiveApp]:
    """The app with an embedded swarm of its own."""
    settings = Settings(
        MODELS=(str(tiny_bloom),),
        TORCH_DTYPE="float32",
        DEVICE="cpu",
        SERVER_THREADS=1,
        ATTN_CACHE_TOKENS=65536,
        CACHE_DIR=str(tiny_bloom.parent),
        SHUTDOWN_TIMEOUT=1.0,
        WARM_SESSIONS=0,
    )
    with serve(settings) as live:
        yield live


@pytest.fixture(scope="module")
def local(own_app: LiveApp) -> LocalSwarm:
    local = own_app.service.models._local
    assert local is not None
    return local


@pytest.fixture(scope="module")
def own_model(own_app: LiveApp) -> SwarmModel:
    return own_app.service.models.find(own_app.model_name).loaded


def kill_dht(swarm: Swarm) -> None:
    psutil.Process(swarm.dht.pid).kill()


def kill_p2pd(swarm: Swarm) -> None:
    (daemon,) = psutil.Process(swarm.dht.pid).children()
    daemon.kill()


def stop_dht(swarm: Swarm) -> None:
    os.kill(swarm.dht.pid, signal.SIGSTOP)


@contextlib.contextmanager
def rejoined(swarm: Swarm, model: SwarmModel) -> Iterator[None]:
    """Wait, at the end of the block, until the program is in its swarm by another DHT process."""
    dht = swarm.dht
    yield
    wait_until(lambda: swarm._node is not None and swarm.dht is not dht, "it did not join again", READY_TIMEOUT)
    wait_until(lambda: model.state.connected, "the DHT was not read again", READY_TIMEOUT)


def generated(app: LiveApp, count: int = TOKENS) -> tuple[int, dict[str, Any]]:
    body = {"inputs": PROMPTS[0], "max_new_tokens": count}
    status, _, answer = call(app.url, "/api/v1/generate", body=body)
    return status, answer


@pytest.fixture(scope="module")
def expected_text(tokenizer: PreTrainedTokenizerBase, reference: BloomForCausalLM) -> str:
    token_ids = tokenizer.encode(PROMPTS[0])
    return tokenizer.decode(greedy(reference, token_ids, TOKENS), skip_special_tokens=True)


@pytest.mark.parametrize("kill", [kill_dht, kill_p2pd, stop_dht])
def test_a_session_goes_on(
    local: LocalSwarm,
    own_model: SwarmModel,
    reference: BloomForCausalLM,
    kill: Callable[[Swarm], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swarm.client.node, "SILENT_LOOKS", 8 if kill is stop_dht else swarm.client.node.SILENT_LOOKS)
    peers, servers = list(local.swarm.initial_peers), [view.peer_id for view in own_model.state.servers()]
    threads, token_ids = threading.active_count(), own_model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, TOKENS)
    with rejoined(local.swarm, own_model), own_model.open_session(128) as session:
        tokens = run_greedy(session, token_ids, 10)
        kill(local.swarm)
        tokens += run_greedy(session, tokens[-1:], len(expected) - 10)
        assert tokens == expected
    assert local.swarm.initial_peers == peers  # by which everybody knows it
    assert [view.peer_id for view in own_model.state.servers()] == servers
    assert threading.active_count() <= threads


def test_what_is_reported_meanwhile(
    own_app: LiveApp, local: LocalSwarm, own_model: SwarmModel, expected_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/readyz reports that the swarm is lost; a request that comes meanwhile waits, and is answered."""
    start, released = local.swarm._start, threading.Event()

    def start_late() -> Any:
        assert released.wait(READY_TIMEOUT)
        return start()

    def state() -> tuple[int, str]:
        status, _, body = call(own_app.url, "/readyz")
        return status, body["models"][own_app.model_name]["state"]

    wait_until(lambda: state() == (200, "ready"), "not ready", READY_TIMEOUT)
    monkeypatch.setattr(local.swarm, "_start", start_late)
    with ThreadPoolExecutor(1) as pool, rejoined(local.swarm, own_model):
        kill_p2pd(local.swarm)
        wait_until(lambda: state() == (503, "rejoining"), "the loss was not reported")
        answer = pool.submit(generated, own_app)
        assert state() == (503, "rejoining")
        released.set()
        assert answer.result(READY_TIMEOUT) == (200, {"ok": True, "outputs": expected_text})
    wait_until(lambda: state() == (200, "ready"), "not ready again", READY_TIMEOUT)
    body = call(own_app.url, "/readyz")[2]
    assert set(body["loops"]) == {
        "watch-swarm",
        "read-swarm",
        "keep-model",
        "expire-sessions",
        "expire-kept-sessions",
    }
    assert all(age < READY_TIMEOUT for age in body["loops"].values())
    model = body["models"][own_app.model_name]
    assert 0 <= model["view_age"] < READY_TIMEOUT and 0 <= model["answer_age"] < READY_TIMEOUT


def test_a_server_that_is_started_again_is_found(
    own_app: LiveApp, local: LocalSwarm, own_model: SwarmModel, expected_text: str
) -> None:
    """It has another identity, and knows the program's address only from before."""
    (before,) = [view.peer_id for view in own_model.state.servers()]
    local.servers[0].process.kill()
    assert generated(own_app) == (200, {"ok": True, "outputs": expected_text})
    wait_until(lambda: before not in {view.peer_id for view in own_model.state.servers()}, "", READY_TIMEOUT)


def test_both_at_once(own_app: LiveApp, local: LocalSwarm, own_model: SwarmModel, expected_text: str) -> None:
    """The server does not find the program when it starts, nor the program the server: nobody knows the other's."""
    with rejoined(local.swarm, own_model):
        local.servers[0].process.kill()
        kill_dht(local.swarm)
        assert generated(own_app) == (200, {"ok": True, "outputs": expected_text})


def test_the_port_is_taken(
    own_app: LiveApp, local: LocalSwarm, own_model: SwarmModel, expected_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else listens where the first peer did: it listens elsewhere, and connects to the servers it knows."""
    port = int(local.swarm.initial_peers[0].split("/")[4])
    wait_until(lambda: bool(local.swarm._known), "no peer is known")
    start = local.swarm._start
    with socket.socket() as other, rejoined(local.swarm, own_model):
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def take_port() -> bool:
            with contextlib.suppress(OSError):  # the process that was killed may still have it for a moment
                other.bind(("127.0.0.1", port))
                other.listen()
            return bool(other.getsockname()[1])

        def start_elsewhere() -> Any:
            wait_until(take_port, "the port is not free")
            return start()

        monkeypatch.setattr(membership, "SAME_PORT_TRIES", 2)  # each takes seconds to fail
        monkeypatch.setattr(local.swarm, "_start", start_elsewhere)
        kill_dht(local.swarm)
        assert generated(own_app) == (200, {"ok": True, "outputs": expected_text})
    assert port != int(local.swarm.initial_peers[0].split("/")[4])


def test_an_app_that_has_joined_joins_again(own_app: LiveApp, local: LocalSwarm, expected_text: str) -> None:
    peers = tuple(local.swarm.initial_peers)
    with serve(dataclasses.replace(own_app.service.settings, INITIAL_PEERS=peers)) as joined:
        joined_swarm = joined.service.models._swarm
        assert joined_swarm is not None
        for kill in (kill_dht, kill_p2pd):
            with rejoined(joined_swarm, joined.service.models.find(joined.model_name).loaded):
                kill(joined_swarm)
                assert generated(joined) == (200, {"ok": True, "outputs": expected_text})


def test_connections_are_not_inherited(local: LocalSwarm, own_model: SwarmModel) -> None:
    """A client's connection ends when the program closes it, although a process was forked meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=READY_TIMEOUT)
        served, _ = listener.accept()
        with rejoined(local.swarm, own_model):
            kill_dht(local.swarm)
        served.close()
        with client:
            assert client.recv(1) == b""


@pytest.mark.parametrize(
    ("maddr", "bound", "expected"),
    [
        ("/ip4/127.0.0.1/tcp/0", ["/ip4/127.0.0.1/tcp/31/p2p/Qm"], "/ip4/127.0.0.1/tcp/31"),
        ("/ip4/0.0.0.0/tcp/0", ["/ip6/::1/tcp/9", "/ip4/198.51.100.1/tcp/31/p2p/Qm"], "/ip4/0.0.0.0/tcp/31"),
        ("/ip4/0.0.0.0/udp/0/quic", ["/ip4/127.0.0.1/tcp/9", "/ip4/127.0.0.1/udp/31/quic"], "/ip4/0.0.0.0/udp/31/quic"),
        ("/ip4/0.0.0.0/tcp/31330", ["/ip4/127.0.0.1/tcp/9"], "/ip4/0.0.0.0/tcp/31330"),
        ("/ip6/::/tcp/0", ["/ip4/127.0.0.1/tcp/9"], "/ip6/::/tcp/0"),
    ],
)
def test_with_port(maddr: str, bound: list[str], expected: str) -> None:
    assert with_port(maddr, bound) == expected
