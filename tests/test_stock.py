"""This program and released petals, on the packages it was released with, in one swarm: all compute the same."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind import PeerID
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm import weights
from swarm.client.model import SwarmModel
from swarm.local import LocalSwarm
from tests.conftest import READY_TIMEOUT, greedy, load_model, tiny_server
from tests.support.stock_process import PYTHON, Stock
from tests.support.swarms import all_answer
from tests.support.tiny import make_tiny_bloom, make_tiny_llama
from tests.test_session import PROMPTS, run_greedy

MAKERS = {"bloom": make_tiny_bloom, "llama": make_tiny_llama}
SPANS = ((0, 2), (2, 4))
# Whose server computes the first span, and whose the second.
CHAINS = (("ours", "stock"), ("stock", "ours"), ("ours", "ours"), ("stock", "stock"))
TOKENS = 20
BEAMS = {"num_beams": 3, "max_new_tokens": 8}

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 13) or not PYTHON.exists(),
    reason="make test installs the packages, on Pythons that they have wheels for",
)


@dataclass
class Mixed:
    """One model in the swarm: four servers, this program's client, and plain Transformers."""

    path: Path
    model: SwarmModel
    reference: PreTrainedModel
    peers: Mapping[tuple[str, int], str]  # by whose it is and its first block

    def chain(self, owners: tuple[str, str]) -> list[str]:
        """Return the peer ids of these owners' servers."""
        return [self.peers[owner, start] for owner, (start, _) in zip(owners, SPANS, strict=True)]

    def prompts(self) -> list[list[int]]:
        return [self.model.tokenizer.encode(prompt) for prompt in PROMPTS]

    def beams(self, prompt: list[int]) -> list[int]:
        output = self.reference.generate(torch.tensor([prompt]), do_sample=False, **BEAMS)
        return output[0, len(prompt) :].tolist()

    def expected(self) -> list[list[int]]:
        return [greedy(self.reference, prompt, TOKENS) for prompt in self.prompts()]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stock]]:
    """The two processes, which import while others do; they wait for their tasks."""
    with contextlib.ExitStack() as ends:
        processes = {}
        for command in ("serve", "ask"):
            processes[command] = Stock(command, tmp_path_factory.mktemp("stock") / command)
            ends.callback(processes[command].kill)
        yield processes


@pytest.fixture(scope="module")
def mixed(stock: dict[str, Stock], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Mixed]]:
    """By model: whole chains of both kinds of servers."""
    paths = {name: make(tmp_path_factory.mktemp("models") / f"tiny-{name}") for name, make in MAKERS.items()}
    with LocalSwarm() as local, contextlib.ExitStack() as ends:
        tasks: list[dict[str, Any]] = []
        for path in paths.values():
            for start, end in SPANS:
                local.start_server(dataclasses.replace(tiny_server(path, f"{start}:{end}"), public_name="ours"))
                tasks.append({"model": str(path), "block_indices": f"{start}:{end}", "public_name": "stock"})
        for task in tasks:
            task |= {"dht_prefix": weights.dht_prefix(task["model"]), "initial_peers": local.swarm.initial_peers}
        stock["serve"].tell(tasks)
        found = {}
        for name, path in paths.items():
            model = load_model(path, local, push_from=0.0)  # among ours; stock servers get what the client sends
            ends.callback(model.close)
            peers = await_servers(model, 2 * len(SPANS))
            reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            found[name] = Mixed(path, model, reference, peers)
        yield found


def await_servers(model: SwarmModel, count: int) -> dict[tuple[str, int], str]:
    """Wait until so many servers answer; return their peer ids by whose they are and their first blocks."""
    assert model.state.wait(lambda: all_answer(model, count), READY_TIMEOUT), model.state.servers()
    return {(view.public_name or "", view.start): view.peer_id for view in model.state.servers()}


@pytest.mark.parametrize("owners", CHAINS)
@pytest.mark.parametrize("name", MAKERS)
def test_our_client(mixed: dict[str, Mixed], name: str, owners: tuple[str, str]) -> None:
    one = mixed[name]
    chain = one.chain(owners)
    state = one.model.state
    state.manager.allowed_servers = set(map(PeerID.from_base58, chain))
    assert state.wait(lambda: {view.peer_id for view in state.servers()} == set(chain), READY_TIMEOUT)
    for prompt, expected in zip(one.prompts(), one.expected(), strict=True):
        with one.model.open_session(128) as session:
            assert run_greedy(session, prompt, len(expected)) == expected
            assert [peer for peer, *_ in session.route] == chain
            assert session.can_verify == ("stock" not in owners)  # drafts need servers that can go back


def test_stock_client(mixed: dict[str, Mixed], stock: dict[str, Stock]) -> None:
    """Greedy texts, beams, and deep prompts with their gradients are what Transformers, or a chain of stock servers,
    makes of them."""
    tasks: list[dict[str, Any]] = []
    for one in mixed.values():
        same = {
            "model": str(one.path),
            "dht_prefix": weights.dht_prefix(str(one.path)),
            "initial_peers": one.model.swarm.initial_peers,
        }
        ways, chains = [{"max_new_tokens": TOKENS}, BEAMS], [one.chain(owners) for owners in CHAINS]
        tasks.append(same | {"what": "generate", "prompts": one.prompts(), "ways": ways, "chains": chains})
        tasks.append(same | {"what": "tune", "prompt": one.prompts()[0], "chains": chains[-2:]})
    stock["ask"].tell(tasks)
    answers = iter(stock["ask"].answer())
    for one in mixed.values():
        beams = [one.beams(prompt) for prompt in one.prompts()]
        assert next(answers) == [[one.expected(), beams]] * len(CHAINS)
        by_ours, by_stock = next(answers)
        assert any(gradient != 0 for gradient in by_stock["gradients"])
        for name, values in by_stock.items():
            torch.testing.assert_close(torch.tensor(by_ours[name]), torch.tensor(values), rtol=1e-3, atol=1e-4)
