"""Clients that come and go without a word: nothing may be left of them."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests.support.client import call, websocket
from tests.support.processes import GUNICORN, Program, running
from tests.test_session import wait_until
from tests.test_start import environment

# Enough for a leak to show; `CHURN=500 make test PYTEST_ARGS=tests/test_churn.py` makes more of them.
FIRST, ALL = 50, int(os.environ.get("CHURN", "200"))
AT_A_TIME = 8
# A leak of one session's smallest trace (a stream, a task, a history) over 150 sessions would be more than this.
MEMORY_TOLERANCE = 0.05


def test_dropped_sessions_leave_nothing(tiny_bloom: Path, tmp_path: Path) -> None:
    more = {"SESSION_TIMEOUT": "1", "MAX_SESSIONS": "1000", "CLIENT_THREADS": "1"}
    with running(GUNICORN, tmp_path / "log", **environment(tiny_bloom, **more)) as program:
        program.wait_ready()
        churn(program, FIRST, AT_A_TIME + 4)  # gunicorn's pool grows with the most requests there ever were at a time
        before = measure(program)
        churn(program, ALL - FIRST, AT_A_TIME)
        after = measure(program)
        print(f"after {FIRST}: {before}; after {ALL}: {after}")
        assert after["threads"] <= before["threads"]
        assert after["descriptors"] <= before["descriptors"]
        assert after["memory"] <= before["memory"] * (1 + MEMORY_TOLERANCE)
        assert call(program.url, "/api/v1/generate", body={"inputs": "a", "max_new_tokens": 3})[0] == 200


def churn(program: Program, count: int, at_a_time: int) -> None:
    """Open sessions, use each for three tokens and drop it: every second over HTTP, the others over WebSockets."""
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(lambda i: (drop_http if i % 2 else drop_websocket)(program), range(count)))
    wait_until(lambda: open_sessions(program) == 0, "sessions were not expired", timeout=30)


def drop_http(program: Program) -> None:
    status, _, body = call(program.url, "/api/v1/open_inference_session", body={"max_length": 64})
    assert status == 200, body
    params = {"session_id": body["session_id"], "inputs": "a b c", "max_new_tokens": 3}
    status, _, body = call(program.url, "/api/v1/generate", body=params)
    assert status == 200, body


def drop_websocket(program: Program) -> None:
    with websocket(program.url.replace("http", "ws") + "/api/v2/generate") as ws:
        ws.open(64)
        assert ws.generate(inputs="a b c", max_new_tokens=3)[-1]["ok"]
        ws.connection.socket.close()


def open_sessions(program: Program) -> int:
    return call(program.url, "/healthz")[2]["sessions"]["open"]


def measure(program: Program) -> dict[str, int]:
    """Threads, file descriptors and memory of the app's worker, once it has come to rest."""
    (worker,) = psutil.Process(program.process.pid).children()
    last, waiting = -1, threading.Event()
    for _ in range(100):
        threads, last_threads = worker.num_threads(), last
        if threads == last_threads:
            break
        last = threads
        waiting.wait(0.3)
    return {"threads": threads, "descriptors": worker.num_fds(), "memory": worker.memory_info().rss}
