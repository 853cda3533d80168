"""A server of which a part has died leaves the swarm and begins anew, in the same process, within seconds."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from petals.data_structures import ServerInfo, ServerState
from petals.server.server import ModuleAnnouncerThread
from transformers import BloomForCausalLM

from swarm import supervision
from swarm.local import LocalServer, LocalSwarm
from swarm.server import announcing, restart
from swarm.server import dht as server_dht
from swarm.server.announcing import Announcer
from swarm.server.container import STEP_LIMIT, WatchedContainer
from swarm.server.dht import PatientDHT, find_daemon, is_running
from swarm.server.handler import TransformerConnectionHandler
from swarm.server.serve import beat
from swarm.supervision import LAST_BACKOFF, Part, Watcher, backoff
from tests.conftest import greedy, load_model, tiny_server
from tests.support.processes import ROOT, is_memory_manager
from tests.test_session import PROMPTS, run_greedy, wait_until

# A server whose batcher meets a fault of its own as soon as there is a file of the given name.
FRAGILE_SERVER = """
import pathlib, sys
import swarm.server.serve
from swarm.server.batching import Batcher
compute = Batcher._compute_next
def compute_or_fail(self):
    if pathlib.Path(sys.argv[1]).exists():
        pathlib.Path(sys.argv[1]).unlink()
        raise ZeroDivisionError("a fault of the batcher")
    compute(self)
Batcher._compute_next = compute_or_fail
sys.exit(swarm.server.serve.main(sys.argv[2:]))
"""


class Fragile:
    """A swarm of one server, whose parts can be made to die."""

    def __init__(self, path: Path, trigger: Path) -> None:
        self.trigger = trigger
        self.local = LocalSwarm()
        self.server = self.local.start_server(tiny_server(path, "0:4"))
        self.model = load_model(path, self.local)

    def close(self) -> None:
        self.model.close()
        self.local.close()

    def processes(self) -> tuple[psutil.Process, list[psutil.Process], psutil.Process]:
        """Return the DHT process, the handlers and p2pd."""
        children = psutil.Process(self.server.process.pid).children()
        (dht,) = [child for child in children if child.children()]
        (daemon,) = dht.children()
        return dht, [child for child in children if child != dht and "python" in child.name()], daemon

    def kill(self, part: str) -> None:
        dht, handlers, daemon = self.processes()
        match part:
            case "the DHT process":
                dht.kill()
            case "p2pd":
                daemon.kill()
            case "a handler":
                handlers[0].kill()
            case "the batcher":
                self.trigger.touch()


@pytest.fixture(scope="module")
def fragile(tiny_bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    trigger = tmp_path_factory.mktemp("fragile") / "fail"
    with pytest.MonkeyPatch.context() as patch:
        command = LocalServer.command

        def fragile_command(self: LocalServer) -> list[str]:
            original = command(self)
            start = original.index("-m")
            return [*original[:start], "-c", FRAGILE_SERVER, str(trigger), *original[start + 2 :]]

        patch.setattr(LocalServer, "command", fragile_command)
        swarm = Fragile(tiny_bloom, trigger)
        yield swarm
        swarm.close()


@pytest.mark.parametrize("part", ["the batcher", "a handler", "the DHT process", "p2pd"])
def test_a_part_of_a_server_dies(fragile: Fragile, reference: BloomForCausalLM, part: str) -> None:
    """In the middle of an answer, which goes on with the right text."""
    token_ids = fragile.model.tokenizer.encode(PROMPTS[0])
    expected = greedy(reference, token_ids, 40)
    process = psutil.Process(fragile.server.process.pid)
    with fragile.model.open_session(128) as session:
        generated = run_greedy(session, token_ids, 10)
        # PyTorch's manager of shared memory may end before or after the others.
        before = [child for child in process.children(recursive=True) if not is_memory_manager(child)]
        died = time.monotonic()
        fragile.kill(part)
        if part != "the batcher":  # which fails with the next step
            psutil.wait_procs(before, timeout=30)
        generated += run_greedy(session, generated[-1:], 1)
        print(f"{part}: the answer goes on after {time.monotonic() - died:.1f} s")
        generated += run_greedy(session, generated[-1:], len(expected) - len(generated))
        assert generated == expected
        assert session.recoveries == 1
    assert process.is_running() and fragile.server.process.poll() is None, "it is another process"
    assert not [child for child in before if child.is_running()]


@pytest.mark.parametrize("by_sentinel", [True, False])
def test_parts_are_watched_until_one_dies(by_sentinel: bool) -> None:
    """By their sentinels, or by looking at them."""
    dead: list[str] = []
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None
    sentinel = child.stdout.fileno() if by_sentinel else None
    parts = [Part("one", lambda: True), Part("two", lambda: child.poll() is None, sentinel)]
    beats = threading.Event()
    watcher = Watcher(lambda: parts, beats.set)
    watcher.watch(dead.append)
    assert beats.wait(timeout=10) and dead == []
    child.stdin.close()
    watcher.join(timeout=10)
    child.wait(timeout=10)
    child.stdout.close()
    assert dead == ["two"]


def test_a_watcher_that_stops_tells_of_no_deaths() -> None:
    dead: list[str] = []
    living = threading.Event()
    watcher = Watcher(lambda: [Part("one", lambda: not living.is_set())], lambda: None)
    watcher.watch(dead.append)
    watcher.stop()
    living.set()
    watcher.join(timeout=10)
    assert not watcher.is_alive() and dead == []


def test_what_cannot_be_watched_counts_as_dead() -> None:
    dead: list[str] = []
    watcher = Watcher(lambda: [Part("one", lambda: bool(1 / 0))], lambda: None)
    watcher.watch(dead.append)
    watcher.join(timeout=10)
    assert dead == ["the watcher"]


def test_early_deaths_wait_longer_and_longer() -> None:
    delays = [backoff(deaths) for deaths in range(20)]
    assert delays[:4] == [0.0, 0.5, 1.0, 2.0] and delays[-1] == LAST_BACKOFF
    assert delays == sorted(delays)
    assert backoff(5000) == LAST_BACKOFF


def test_a_process_begins_anew(tmp_path: Path) -> None:
    """With its number, its arguments and its standard input, without descriptors that a library has left open."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from swarm.supervision import replace_process\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get('TIMES'), len(os.listdir('/dev/fd')), flush=True)\n"
        "if 'TIMES' in os.environ:\n"
        "    print(input())\n"
        "else:\n"
        "    os.set_inheritable(os.open('/dev/null', os.O_RDONLY), True)\n"
        "    replace_process(TIMES='1')\n"
    )
    command = [sys.executable, str(program), "a", "b c"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output, _ = child.communicate("still here\n", timeout=60)
    first, second, third = output.splitlines()
    assert first.startswith(f"{child.pid} ['a', 'b c'] None ")
    assert second == first.replace("None", "1")
    assert third == "still here"


def test_a_server_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no memory or no descriptors left for a moment."""
    monkeypatch.setattr(LocalServer, "command", lambda self: [sys.executable, "-c", "input()"])
    options = tiny_server(Path("nowhere"), "0:4")
    local = LocalServer(options, [])
    first, failures = local.process, 0
    popen = subprocess.Popen

    def fail_twice(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise OSError(12, "Cannot allocate memory")
        return popen(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", fail_twice)
    try:
        first.kill()
        wait_until(lambda: local.process is not first, "it is not started again", timeout=30)
        assert failures == 3 and local.process.poll() is None
    finally:
        local.close()


def test_an_announcer_goes_on_when_an_announcement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[ServerState] = []

    def run(self: Announcer) -> None:
        turns.append(self.server_info.state)
        if len(turns) < 3:
            raise FutureTimeout
        while self.server_info.state != ServerState.OFFLINE:
            self.trigger.wait(10)

    monkeypatch.setattr(ModuleAnnouncerThread, "run", run)
    monkeypatch.setattr(announcing, "ANNOUNCEMENT_DELAY", 0.01)
    announcer = Announcer.__new__(Announcer)
    threading.Thread.__init__(announcer, daemon=True)
    announcer.server_info = ServerInfo(ServerState.JOINING, throughput=1.0)
    announcer.trigger = threading.Event()
    announcer.start()
    wait_until(lambda: len(turns) == 3, "it has ended", timeout=10)
    announcer.announce(ServerState.ONLINE)
    assert announcer.is_alive()
    announcer.announce(ServerState.OFFLINE)
    assert not announcer.is_alive()


async def never(dht: Any, node: Any) -> None:
    await asyncio.sleep(60)


async def own_timeout(dht: Any, node: Any) -> None:
    raise TimeoutError("of the coroutine itself")


def test_a_dht_is_not_waited_for_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it answers late, or has died, or its p2pd has."""
    dht = PatientDHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        daemon = find_daemon(dht.pid or 0)
        assert dht.get_visible_maddrs() and dht.is_answering() and is_running(daemon)
        monkeypatch.setattr(server_dht, "DHT_TIMEOUT", 0.1)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                dht.run_coroutine(own_timeout)
        assert dht.is_answering()
        for _ in range(server_dht.DHT_FAILURES):
            with pytest.raises(FutureTimeout):
                dht.run_coroutine(never)
        assert not dht.is_answering()
        daemon.kill()
        wait_until(lambda: not is_running(daemon), "it is a zombie, and counts", timeout=10)
    finally:
        dht.kill()
        dht.join(10)
    dead = PatientDHT(start=False)
    monkeypatch.setattr(dead, "is_alive", lambda: False)
    with pytest.raises(ConnectionError):
        dead.wait_until_ready()


def test_a_batcher_that_does_not_come_back_is_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = SimpleNamespace(busy_since=None)
    heartbeat = SimpleNamespace(value=0.0)
    monkeypatch.setattr(TransformerConnectionHandler, "heartbeat", heartbeat, raising=False)
    monkeypatch.setattr(WatchedContainer, "current", SimpleNamespace(batcher=batcher))
    for busy_since, beats in (
        (None, True),
        (time.monotonic() - STEP_LIMIT / 2, True),
        (time.monotonic() - STEP_LIMIT, False),
    ):
        heartbeat.value, batcher.busy_since = 0.0, busy_since
        beat()
        assert bool(heartbeat.value) is beats


@pytest.mark.parametrize(("deaths", "lived", "passed_on"), [(None, 3.0, "1"), ("1", 3.0, "2"), ("5", 60.0, "0")])
def test_a_server_that_dies_early_counts_its_deaths(
    monkeypatch: pytest.MonkeyPatch, deaths: str | None, lived: float, passed_on: str
) -> None:
    environments: list[dict[str, str]] = []
    monkeypatch.delenv(restart.EARLY_DEATHS, raising=False)
    if deaths:
        monkeypatch.setenv(restart.EARLY_DEATHS, deaths)
    monkeypatch.setattr(restart, "started", time.monotonic() - lived)
    monkeypatch.setattr(supervision, "backoff", lambda deaths: 0.0)
    monkeypatch.setattr(supervision, "replace_process", lambda **environment: environments.append(environment))
    restart.start_again(threading.Event())
    assert environments == [{restart.EARLY_DEATHS: passed_on}]
    stopped = threading.Event()
    stopped.set()
    restart.start_again(stopped)
    assert len(environments) == 1
