"""Loops that go on whatever happens, and what depends on them: expiry, models that are tried again, /readyz."""

import itertools
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config import Settings
from inference_sessions import InferenceSessions
from models import loading as models
from models.loading import Models
from swarm.background import Loop, forever, growing_delays
from swarm.client.warm_sessions import WarmSessions
from swarm.errors import CacheFull, ModelUnavailable, SwarmTimeout
from swarm.waiter import Waiter
from tests.conftest import LiveApp
from tests.support.client import call
from tests.test_session import wait_until

MODEL = "/models/some"


def test_growing_delays() -> None:
    assert list(itertools.islice(growing_delays(1.0, 5.0), 5)) == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_loop_outlives_its_failures(caplog: pytest.LogCaptureFixture) -> None:
    turns: list[int] = []
    done = threading.Event()

    def step() -> None:
        turns.append(len(turns))
        if len(turns) <= 9:
            raise ValueError(f"turn {len(turns)}")
        done.set()

    with caplog.at_level(logging.ERROR):
        loop = forever("test-loop", step, 0.01, first_delay=0.01, last_delay=0.01)
        assert done.wait(10)
    loop.stop()
    loop.join(10)
    count = len(turns)
    assert loop.stopped and count >= 10
    logged = [record.getMessage() for record in caplog.records if "test-loop" in record.getMessage()]
    assert logged == [
        "test-loop failed, again in 0.0 s: turn 1",
        "test-loop failed 2 times, again in 0.0 s: turn 2",
        "test-loop failed 4 times, again in 0.0 s: turn 4",
        "test-loop failed 8 times, again in 0.0 s: turn 8",
    ]
    assert [record.exc_info is not None for record in caplog.records if "test-loop" in record.getMessage()] == [
        True,  # with its traceback
        False,
        False,
        False,
    ]


def test_a_loop_tells_its_age_and_when_it_tries_again() -> None:
    fail, turned = threading.Event(), threading.Event()

    def step() -> None:
        turned.set()
        if fail.is_set():
            raise ValueError

    loop = Loop("test-loop", step, 60.0, first_delay=60.0, last_delay=60.0)
    wake = loop._wake
    loop.start().start()  # it begins once
    assert turned.wait(10)
    assert loop.retry_in is None and loop.age < 10
    fail.set()
    wake.set()
    wait_until(lambda: loop.retry_in is not None, "the failure was not reported")
    assert 0 < (loop.retry_in or 0) <= 60
    fail.clear()
    wake.set()
    wait_until(lambda: loop.retry_in is None, "the success was not reported")
    loop.stop()
    loop.join(10)


def test_the_expirer_outlives_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sessions, and of those that are kept: neither keeps the other from going on."""
    memory = WarmSessions(1, 10, 1.0)
    sessions = InferenceSessions(1, 1.0, memory=memory)
    expire, calls = sessions.expire, itertools.count()
    expired = threading.Event()

    def fail_first() -> int:
        if next(calls) == 0:
            raise MemoryError
        expired.set()
        return expire()

    kept = threading.Event()
    monkeypatch.setattr(sessions, "expire", fail_first)
    monkeypatch.setattr(memory, "expire", kept.set)
    sessions.start()
    assert kept.wait(10) and expired.wait(10)
    assert {loop.name for loop in sessions.loops} == {"expire-sessions", "expire-kept-sessions"}
    sessions.shut_down(0)
    assert all(loop.stopped for loop in sessions.loops)


class FakeModel:
    """A model in a swarm that has all blocks, whose steps fail as often as is wanted."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.name = MODEL
        self.tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0})
        self.state = SimpleNamespace(
            connected=True,
            stale=False,
            doubtful=False,
            missing_blocks=list,
            start=lambda timeout: True,
            wait=lambda condition, timeout: condition(),
            reader=Loop("read-swarm", lambda: None, 1.0),
        )

    def open_session(self, max_length: int) -> "FakeModel":
        return self

    def step(self, token_ids: list[int], waiter: Waiter) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.state.doubtful = False

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *_: object) -> None: ...

    close = __exit__


def keep(monkeypatch: pytest.MonkeyPatch, loads: list[Any], connects: list[Exception] = []) -> Models:  # noqa: B006
    """Let a model be loaded, each try with the next of ``loads``: an exception, or the model."""
    monkeypatch.setattr(models, "FIRST_RETRY", 0.01)
    monkeypatch.setattr(models, "KEEP_PERIOD", 0.01)
    all_models = Models(Settings(MODELS=(MODEL,), INITIAL_PEERS=() if connects else ("/ip4/127.0.0.1/tcp/9",)))
    connects = list(connects)

    def connect() -> None:
        if connects:
            raise connects.pop(0)

    def load(served: Any) -> Any:
        loaded = loads.pop(0)
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    monkeypatch.setattr(all_models, "_connect", connect)
    monkeypatch.setattr(all_models, "_load_client", load)
    return all_models


def test_a_model_that_could_not_be_loaded_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel([SwarmTimeout("no answer"), SwarmTimeout("no answer")])
    all_models = keep(monkeypatch, [ModelUnavailable("the hub is away"), RuntimeError("whatever"), model])
    served = all_models.find(MODEL)
    all_models.start()
    try:
        wait_until(lambda: served.status.state == "ready", "it was not tried again")
        wait_until(lambda: served.error is None, "the error is still reported")
        assert all_models.find(MODEL).loaded is model
    finally:
        all_models.close()


def test_when_it_is_tried_again_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    all_models = keep(monkeypatch, [ModelUnavailable("the hub is away")])
    monkeypatch.setattr(models, "FIRST_RETRY", 30.0)
    served = all_models.find(MODEL)
    all_models.start()
    try:
        wait_until(lambda: served.retry_in() is not None, "the failure was not reported")
        assert (served.status.state, served.status.message) == ("failed", "the hub is away; again in 30 s")
        with pytest.raises(ModelUnavailable, match="the hub is away"):
            _ = all_models.find(MODEL).loaded
    finally:
        all_models.close()


def test_founding_the_swarm_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    all_models = keep(monkeypatch, [FakeModel([])], [OSError("too busy"), OSError("too busy")])
    all_models.start()
    try:
        wait_until(lambda: all_models.find(MODEL).status.state == "ready", "it was not tried again")
    finally:
        all_models.close()


def test_readiness_is_by_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was given up puts the model in doubt: it is asked itself, and is not ready while it fails."""
    model = FakeModel([])
    all_models = keep(monkeypatch, [model])
    served = all_models.find(MODEL)
    all_models.start()
    try:
        wait_until(lambda: served.status.state == "ready", "not ready")
        model.failures = [SwarmTimeout("no answer")] * 3
        model.state.doubtful = True
        wait_until(lambda: served.error is not None or not model.failures, "it was not asked")
        assert all_models.find(MODEL).loaded is model  # requests are not refused for it
        wait_until(lambda: served.error is None and served.status.state == "ready", "it was not asked again")
        model.failures = [CacheFull("busy")] * 3  # that is no failure
        model.state.doubtful = True
        wait_until(lambda: not model.failures and not model.state.doubtful, "it was not asked")
        assert served.error is None and served.status.state == "ready"
    finally:
        all_models.close()


def test_a_stale_view_is_reported(live_app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> None:
    served = live_app.service.models.served[live_app.model_name]
    assert served.model is not None and served.status.state == "ready"
    assert 0 < served.model.state.stale_after < 600
    monkeypatch.setattr(served.model.state, "stale_after", -1.0)
    status, _, body = call(live_app.url, "/readyz")
    state = body["models"][live_app.model_name]
    assert (status, state["state"]) == (503, "stale")
    assert "the swarm was last read" in state["message"] and state["view_age"] >= 0


def test_readyz_waits_for_nothing(live_app: LiveApp) -> None:
    """A thread that hangs may hold the lock of the view."""
    served = live_app.service.models.served[live_app.model_name]
    assert served.model is not None
    with served.model.state.manager.lock_changes:
        assert call(live_app.url, "/readyz")[2]["models"][live_app.model_name]["state"] == "ready"


def test_a_failed_model_says_when_it_is_tried_again(live_app: LiveApp, tiny_bloom: Path) -> None:
    state = call(live_app.url, "/readyz")[2]["models"]["/nowhere/missing-model"]
    assert state["state"] == "failed" and "no such directory; again " in state["message"]
    assert state["view_age"] is None and state["answer_age"] is None
