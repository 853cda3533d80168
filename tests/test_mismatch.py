"""Servers of another model under the name of this one are not used, whatever the name says."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from swarm import weights
from swarm.client.model import SwarmModel
from swarm.errors import ModelMismatch
from swarm.local import LocalSwarm
from swarm.weights import Fingerprint
from swarm.wire.replies import Abilities, read_abilities
from swarm.wire.text import Malformed
from tests.conftest import greedy, load_model, tiny_server
from tests.support.swarms import server_info
from tests.support.tiny import load_reference, make_tiny_bloom
from tests.test_session import run_greedy

from hivemind import MSGPackSerializer  # isort: skip  after swarm.compat

TOKENS = 12
STARTED = 90.0  # seconds


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bloom(tmp_path_factory.mktemp("this") / "one-name")


@pytest.fixture(scope="module")
def others_swarm(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[LocalSwarm]:
    """Servers of a model with other weights, one shape and one name; one of them computes as petals."""
    other = make_tiny_bloom(tmp_path_factory.mktemp("other") / "one-name", seed=7)
    prefix = weights.dht_prefix(str(model_files))
    assert prefix != weights.dht_prefix(str(other))
    with LocalSwarm() as local:
        for blocks, batching in (("0:4", True), ("0:2", False), ("2:4", True)):
            options = tiny_server(other, blocks, batching=batching)
            local.start_server(dataclasses.replace(options, dht_prefix=prefix))
        yield local


@pytest.fixture
def fooled(model_files: Path, others_swarm: LocalSwarm) -> Iterator[SwarmModel]:
    with contextlib.closing(load_model(model_files, others_swarm)) as model:
        assert model.state.wait(lambda: len(model.state.servers()) == len(others_swarm.servers), STARTED)
        yield model


def test_all_servers_compute_another_model(fooled: SwarmModel) -> None:
    told = [server_info(fooled, view) for view in fooled.state.servers()]
    assert len({info["model"]["weights"] for info in told if info}) == 1
    assert fooled.state.fingerprint is not None
    assert told[0]["model"]["config"] == fooled.state.fingerprint.config  # type: ignore[index]
    for rows in (1, 2):
        with fooled.open_session(16, rows=rows) as session, pytest.raises(ModelMismatch) as caught:
            session.step([1, 2, 3])
        assert str(caught.value).startswith("the server 12D3KooW")
        assert str(caught.value).endswith(
            "computes another model under this one's name: they differ in their weights; "
            "serve a copy of the same files, or give one of the two models another name with --dht-prefix"
        )


def test_the_right_server_is_used(model_files: Path, others_swarm: LocalSwarm, fooled: SwarmModel) -> None:
    """As soon as there is one: answers are exact, and those of the others are not asked again."""
    right = others_swarm.start_server(tiny_server(model_files, "0:4"))
    assert fooled.state.wait(lambda: len(fooled.state.servers()) == len(others_swarm.servers), STARTED)
    token_ids = AutoTokenizer.from_pretrained(model_files).encode("Nobody, said the swarm")
    expected = greedy(load_reference(model_files), token_ids, TOKENS)
    for _ in range(3):
        with fooled.open_session(64) as session:
            assert run_greedy(session, token_ids, len(expected)) == expected
    right.close()
    others_swarm.servers.remove(right)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (Fingerprint("a", "1"), Fingerprint("a", "1"), None),
        (Fingerprint("a", "1"), Fingerprint("a", "2"), "weights"),
        (Fingerprint("a", "1"), Fingerprint("b", "1"), "configuration"),
        (Fingerprint("a"), Fingerprint("a", "2"), None),
        (Fingerprint("a", "1"), Fingerprint("a"), None),
        (Fingerprint("a"), Fingerprint("b"), "configuration"),
    ],
)
def test_only_what_both_know_is_compared(ours: Fingerprint, theirs: Fingerprint, difference: str | None) -> None:
    assert ours.difference(theirs) == difference


def test_what_servers_report() -> None:
    def read(**told: object) -> Abilities:
        return read_abilities(MSGPackSerializer.dumps(told))

    assert read_abilities(b"") == read(rewind=False) == Abilities(False, False)  # a stock server
    assert read(model={"config": "a", "weights": "b", "more": 1}) == Abilities(False, False, "a", "b")
    for nonsense in (1, "a", ["config"], {"config": 1}, {"weights": "a" * 1000}):
        with pytest.raises(Malformed):
            read(model=nonsense)
