"""A server of the embedded swarm that dies before it serves: the program knows why, says so, and tries again."""

import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import create_app
from config import Settings
from service import get_service
from swarm import local as swarm_local
from swarm.errors import ModelUnavailable
from swarm.lifeline import LONGEST_REASON, describe_exit, one_line
from swarm.local import LocalServer
from tests.conftest import READY_TIMEOUT, tiny_server
from tests.support.client import call
from tests.support.processes import listening
from tests.test_session import wait_until

SAY = "from swarm.lifeline import program_line as line; line.hold(); "
# A server that fails for as long as there is a file.
UNTIL_MENDED = """
import pathlib, sys
trouble = pathlib.Path(sys.argv.pop(1))
if trouble.exists():
    sys.modules["petals"] = None
from swarm.server.__main__ import start
sys.exit(start())
"""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start servers again without a pause."""
    monkeypatch.setattr(swarm_local, "backoff", lambda deaths: 0.0)


def python(monkeypatch: pytest.MonkeyPatch, code: str) -> LocalServer:
    """Start a Python program as a server."""
    monkeypatch.setattr(LocalServer, "command", lambda self: [sys.executable, "-c", code])
    return LocalServer(tiny_server(Path("nowhere"), "0:4"), [])


@pytest.fixture
def started() -> Iterator[list[LocalServer]]:
    servers: list[LocalServer] = []
    yield servers
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (SAY + "line.say_failed(OSError('no room\\nat all')); raise SystemExit(1)", "OSError: no room"),
        ("raise SystemExit(3)", "it ended with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "it was killed by SIGKILL, as when memory runs out"),
        # What it said before it was killed is not what it died of.
        (SAY + "line.say_failed('p2pd has died'); import os; os.abort()", "it was killed by SIGABRT"),
    ],
)
def test_why_a_server_has_never_served(
    monkeypatch: pytest.MonkeyPatch, started: list[LocalServer], at_once: None, code: str, reason: str
) -> None:
    server = python(monkeypatch, code)
    started.append(server)
    wait_until(lambda: server.failure == reason, "the reason is not known", timeout=30)


def test_a_server_says_that_it_serves(
    monkeypatch: pytest.MonkeyPatch, started: list[LocalServer], at_once: None, tmp_path: Path
) -> None:
    code = f"import pathlib; {SAY} \nif pathlib.Path({str(tmp_path / 'mended')!r}).exists():\n"
    code += " line.say_serving(); line.say_failed('a part has died'); input()\nraise SystemExit(5)"
    server = python(monkeypatch, code)
    started.append(server)
    wait_until(lambda: server.failure == "it ended with status 5", "the reason is not known", timeout=30)
    (tmp_path / "mended").touch()
    wait_until(lambda: server.failure is None, "it has not recovered", timeout=30)
    first = server.process
    assert server.retry_in is None
    first.kill()  # once it has served, it is back soon: no reason to give up
    wait_until(lambda: server.process is not first, "it is not started again", timeout=30)
    assert server.failure is None


def test_deaths_before_the_first_announcement_wait_longer_and_longer(
    monkeypatch: pytest.MonkeyPatch, started: list[LocalServer]
) -> None:
    """However long the server has tried: a large model takes minutes to find that there is no memory for it."""
    deaths: list[int] = []
    monkeypatch.setattr(swarm_local, "HEALTHY_AFTER", 0.0)

    def backoff(count: int) -> float:
        if count not in deaths:
            deaths.append(count)
        return 0.0

    monkeypatch.setattr(swarm_local, "backoff", backoff)
    started.append(python(monkeypatch, "raise SystemExit(1)"))
    wait_until(lambda: deaths[:3] == [1, 2, 3], "it is not started again and again", timeout=30)


def test_a_server_ends_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the program has not read what it said."""
    server = python(monkeypatch, SAY + "line.say_serving(); import time; time.sleep(60)")
    wait_until(lambda: server._line.serving, "it does not serve", timeout=30)
    server._stopping.set()
    server._line.close()
    assert server.process.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (ModelUnavailable("/x: no such directory"), "/x: no such directory"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("\n  too\tlarge \nframe #0"), "RuntimeError: too large"),
        (ValueError("a  b\nc"), "ValueError: a b"),
        ("x" * 1000, "x" * (LONGEST_REASON - 1) + "…"),
    ],
)
def test_reasons_are_one_line(reason: Any, line: str) -> None:
    assert one_line(reason) == line


def test_exits_in_words() -> None:
    assert describe_exit(-signal.SIGSEGV) == "it was killed by SIGSEGV"
    assert describe_exit(-63) == "it was killed by signal 63"


def test_the_state_of_the_model(
    tiny_bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failed, with the reason, while its server dies; ready once it does not."""
    trouble = tmp_path / "trouble"
    trouble.touch()
    command = LocalServer.command

    def failing(self: LocalServer) -> list[str]:
        words = command(self)
        return [sys.executable, "-W", "ignore", "-c", UNTIL_MENDED, str(trouble), *words[words.index("-m") + 2 :]]

    monkeypatch.setattr(LocalServer, "command", failing)
    settings = Settings(
        MODELS=(str(tiny_bloom),), TORCH_DTYPE="float32", SERVER_THREADS=1, ATTN_CACHE_TOKENS=65536, SHUTDOWN_TIMEOUT=0
    )
    app = create_app(settings)
    service, name = get_service(app), str(tiny_bloom)

    def state() -> tuple[str, str]:
        told = call(url, "/readyz")[2]["models"][name]
        return told["state"], told["message"]

    with listening(app) as url, caplog.at_level(logging.WARNING):
        try:
            service.start()
            wait_until(lambda: state()[0] == "failed", "the failure is not told", READY_TIMEOUT)
            reason = "ModuleNotFoundError: import of petals halted; None in sys.modules"
            assert state()[1].startswith(f"its server fails: {reason}; again ")
            line = f"the server of {name} fails: {reason}; again in "
            wait_until(lambda: line in caplog.text, "the failure is not logged", timeout=30)
            status, _, body = call(url, "/api/v1/generate", body={"inputs": "a", "max_new_tokens": 1})
            assert (status, body["error"]["code"]) == (503, "model_unavailable") and reason in body["error"]["message"]
            trouble.unlink()
            wait_until(lambda: state()[0] == "ready", "it does not recover", READY_TIMEOUT)
        finally:
            service.close()
