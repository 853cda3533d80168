"""Those who only want their answers, while somebody attacks: what they see decides."""

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.attacks.client import MONITOR, READER, STREAMER, Client

PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 16
STOP = "<|im_end|>"
ANSWER_LIMIT = 10.0  # seconds for a whole answer
HEALTH_LIMIT = 1.0  # seconds for /healthz
PAUSE = 0.25  # seconds between two questions of one bystander: they are no attack themselves


@dataclass
class Seen:
    """What one bystander has seen."""

    count: int = 0
    longest: float = 0.0  # seconds
    faults: list[str] = field(default_factory=list)


class Bystanders:
    """A reader over HTTP, one over WebSockets and one who looks whether the program lives, each at its own address."""

    def __init__(self, url: str, key: str, text: str) -> None:
        """Prepare them.

        :param text: the right answer
        """
        self.text = text
        self.seen = {"HTTP": Seen(), "WebSocket": Seen(), "/healthz": Seen()}
        self._stop = threading.Event()
        clients = [Client(url, address, key) for address in (READER, STREAMER, MONITOR)]
        loops = [self._read, self._stream, self._look]
        self._threads = [
            threading.Thread(target=self._repeat, args=(name, loop, client), daemon=True)
            for name, loop, client in zip(self.seen, loops, clients, strict=True)
        ]

    def __enter__(self) -> "Bystanders":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)

    def _repeat(self, name: str, ask: Callable[[Client], None], client: Client) -> None:
        seen = self.seen[name]
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                ask(client)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                seen.faults.append(f"after {time.monotonic() - began:.1f} s: {type(error).__name__}: {error}")
            seen.count += 1
            seen.longest = max(seen.longest, time.monotonic() - began)
            self._stop.wait(PAUSE)

    def _read(self, client: Client) -> None:
        status, body = client.post("/api/v1/generate", question(), timeout=60)
        assert status == 200, f"{status}: {str(body)[:300]}"
        assert body["outputs"] == self.text, f"a wrong answer: {body['outputs']!r}"

    def _stream(self, client: Client) -> None:
        websocket = client.websocket()
        try:
            opened = websocket.ask({"type": "open_inference_session", "max_length": 128, "api_key": client.key or None})
            assert opened["ok"], opened
            websocket.send({"type": "generate", **question(), "max_new_tokens": 1, "stop_sequence": STOP})
            text, stop = "", False
            while not stop:
                reply = websocket.receive()
                assert reply["ok"], reply
                text, stop = text + reply["outputs"], reply["stop"]
            assert text == self.text, f"a wrong answer: {text!r}"
        finally:
            websocket.close()

    @staticmethod
    def _look(client: Client) -> None:
        status, _ = client.call("GET", "/healthz", timeout=30)
        assert status == 200, str(status)

    def verdict(self, answer_limit: float = ANSWER_LIMIT) -> list[str]:
        """Return what they have to complain of."""
        complaints = []
        for name, seen in self.seen.items():
            complaints += [f"{name}: {fault}" for fault in seen.faults]
            limit = HEALTH_LIMIT if name == "/healthz" else answer_limit
            if seen.longest > limit:
                complaints.append(f"{name}: {seen.longest:.1f} s, more than {limit:.0f}")
            if not seen.count:
                complaints.append(f"{name}: no answer at all")
        return complaints

    def __str__(self) -> str:
        return ", ".join(f"{name} {seen.count} × up to {seen.longest:.2f} s" for name, seen in self.seen.items())


def question() -> dict[str, object]:
    """Return a question whose answer is always the same."""
    return {"inputs": PROMPT, "max_new_tokens": TOKENS}


def right_answer(client: Client) -> str:
    """Return the answer as it is when nobody attacks.

    :raises AssertionError: if there is none
    """
    status, body = client.post("/api/v1/generate", question())
    assert status == 200, f"{status}: {body}"
    return body["outputs"]
