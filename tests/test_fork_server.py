"""Servers that are forked: how they end, what they inherit, and what happens when the process that forks them dies."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from swarm import fork_server
from swarm.fork_server import SERVER, Fork
from swarm.local import LocalSwarm
from tests.conftest import READY_TIMEOUT, load_model, tiny_server
from tests.test_session import PROMPTS, run_greedy


@pytest.fixture
def own_fork_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One of this test's own: it is killed, or started in another environment."""
    monkeypatch.setattr(fork_server, "_current", None)
    yield
    fork_server._forget()


def forking() -> psutil.Process:
    assert fork_server._current is not None
    return psutil.Process(fork_server._current[1]._process.pid)


def start(arguments: Sequence[str]) -> Fork:
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        fork = fork_server.start([*SERVER, *arguments], theirs)
    assert isinstance(fork, Fork)
    return fork


def test_forks_end_as_processes_do(capfd: pytest.CaptureFixture[str]) -> None:
    helped, refused = start(["--help"]), start(["model", "--threads", "none"])
    assert (helped.wait(READY_TIMEOUT), refused.wait(READY_TIMEOUT)) == (0, 2)
    assert (helped.poll(), refused.returncode) == (0, 2)
    out, err = capfd.readouterr()
    assert "--initial-peers" in out and "argument --threads" in err


def test_a_signal_before_there_is_a_process() -> None:
    fork = start(["model", "--end-with-parent"])
    fork.send_signal(signal.SIGKILL)
    assert fork.wait(READY_TIMEOUT) == -signal.SIGKILL


def test_another_environment_is_another_fork_server(own_fork_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read it when they are loaded."""
    fork_server.prepare()
    first = forking()
    monkeypatch.setenv("PETALS_IGNORE_DEPENDENCY_VERSION", "another")  # as petals' import sets it
    fork_server.prepare()
    assert forking() == first
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert start(["--help"]).wait(READY_TIMEOUT) == 0
    assert forking() != first
    first.wait(READY_TIMEOUT)  # it has no servers


def test_the_process_that_forks_is_killed(own_fork_server: None, tiny_bloom: Path) -> None:
    """Its servers go on, and their ends are noticed; the next ones are forked from another one."""
    with LocalSwarm() as local:
        server = local.start_server(tiny_server(tiny_bloom, "0:4"))
        model = load_model(tiny_bloom, local)
        token_ids = model.tokenizer.encode(PROMPTS[0])
        with model.open_session(64) as session:
            expected = run_greedy(session, token_ids, 20)
        first, pid = forking(), server.process.pid
        with model.open_session(64) as session:
            tokens = run_greedy(session, token_ids, 10)
            first.kill()
            first.wait(READY_TIMEOUT)
            tokens += run_greedy(session, tokens[-1:], 5)
            assert not session.recoveries
            os.kill(pid, signal.SIGKILL)
            tokens += run_greedy(session, tokens[-1:], 5)
            assert tokens == expected and session.recoveries
        assert server.process.pid != pid
        assert forking() != first
        model.close()
