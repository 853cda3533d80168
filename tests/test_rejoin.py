"""The program's own DHT process or p2pd dies: it is in its swarm again, and answers go on undisturbed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import BloomForCausalLM

from swarm.client import Swarm, SwarmModel
from swarm.local import LocalSwarm
from tests.conftest import READY_TIMEOUT, greedy, load_model, tiny_server
from tests.test_session import PROMPTS, run_greedy, wait_until

TOKENS = 30


@pytest.fixture(scope="module")
def local(tiny_bloom: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm() as local:
        local.start_server(tiny_server(tiny_bloom, "0:4"))
        yield local


@pytest.fixture(scope="module")
def own_model(local: LocalSwarm, tiny_bloom: Path) -> Iterator[SwarmModel]:
    model = load_model(tiny_bloom, local)
    yield model
    model.close()


def kill_dht(swarm: Swarm) -> None:
    psutil.Process(swarm.dht.pid).kill()


def kill_p2pd(swarm: Swarm) -> None:
    (daemon,) = psutil.Process(swarm.dht.pid).children()
    daemon.kill()


@pytest.mark.parametrize("kill", [kill_dht, kill_p2pd])
def test_a_session_goes_on(
    local: LocalSwarm, own_model: SwarmModel, reference: BloomForCausalLM, kill: Callable[[Swarm], None]
) -> None:
    swarm, dht = local.swarm, local.swarm.dht
    peers, servers = list(swarm.initial_peers), [view.peer_id for view in own_model.state.servers()]
    token_ids = own_model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, TOKENS)
    with own_model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 10)
        kill(swarm)
        generated += run_greedy(session, generated[-1:], len(expected) - 10)
        assert generated == expected
    assert swarm.dht is not dht and own_model.state.manager.dht is swarm.dht
    assert swarm.initial_peers == peers  # by which everybody knows it
    wait_until(lambda: own_model.state.connected, "the DHT was not read again", READY_TIMEOUT)
    assert [view.peer_id for view in own_model.state.servers()] == servers
