"""A machine whose clock is off can be in no swarm: it is told so, and not that nobody answers."""

import time
from collections.abc import Iterator

import hivemind.dht.protocol
import pytest

from config import Settings
from models.loading import Models
from swarm.client.membership import Swarm
from swarm.clock import clock_off
from swarm.errors import ClockOff, SwarmUnreachable
from swarm.server.dht import PatientDHT
from tests.test_session import wait_until

WORDS = "^the clock of this machine is 60 s {} that of a peer of the swarm, where 3 s are allowed: set it right"


@pytest.fixture(scope="module")
def founder() -> Iterator[Swarm]:
    swarm = Swarm.found(["/ip4/127.0.0.1/tcp/0"])
    yield swarm
    swarm.close()


@pytest.fixture
def shift(founder: Swarm, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Shift the clock of DHT processes that are started from here on, by seconds."""
    seconds: float = request.param
    monkeypatch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: time.time() + seconds)


@pytest.mark.parametrize(("shift", "words"), [(60, "ahead of"), (-60, "behind")], indirect=["shift"])
def test_a_client(founder: Swarm, shift: None, words: str) -> None:
    with pytest.raises(ClockOff, match=WORDS.format(words)):
        Swarm.join(founder.initial_peers)


@pytest.mark.parametrize("shift", [-60], indirect=True)
def test_a_server(founder: Swarm, shift: None) -> None:
    dht = PatientDHT(start=False, initial_peers=founder.initial_peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        with pytest.raises(ClockOff, match=WORDS.format("behind")):
            dht.run_in_background(await_ready=True)
    finally:
        dht.kill()
        dht.join(10)


def test_the_state_of_the_models(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An absent swarm may come yet; a clock does not mend itself."""
    models = Models(Settings(MODELS=("some/model",), INITIAL_PEERS=("/ip4/127.0.0.1/tcp/9",)))
    errors: list[SwarmUnreachable] = [SwarmUnreachable("nobody answers")]

    def connect() -> None:
        raise errors[0]

    monkeypatch.setattr(models, "_connect", connect)
    monkeypatch.setattr("models.loading.FIRST_RETRY", 0.01)

    def status() -> tuple[str, str]:
        found = models.status["some/model"]
        return found.state, found.message.partition(";")[0]

    models.start()
    try:
        wait_until(lambda: status() == ("loading", "waiting for the swarm: nobody answers"), "it does not wait")
        errors[0] = ClockOff("the clock is off")
        wait_until(lambda: status() == ("failed", "the clock is off"), "it is not told")
        assert "the clock is off" in caplog.text and "Traceback" not in caplog.text
    finally:
        models.close()


def test_other_failures_are_not_the_clocks() -> None:
    assert clock_off(RuntimeError("none of the initial_peers responded to a ping")) is None
