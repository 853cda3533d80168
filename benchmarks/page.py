"""What showing a streamed answer costs the browser: script time per frame of the chat page and of a naive renderer.

    python -m benchmarks.page        or        python -m benchmarks.page --shapes --seconds 10

The page is the real one, in Chromium; a model behind the real WebSocket protocol sends a prepared answer token by token
at a fixed rate. The naive renderer, on its own page, renders the whole text again in each frame. ``--shapes`` streams
the hardest texts, one giant list, table, code block or paragraph, into the module alone.
"""

import argparse
import functools
import itertools
import json
import logging
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from playwright.sync_api import Page

from config import Settings
from errors import ROOT
from service import Service
from tests.support.browser import browser_page
from tests.support.processes import listening
from web import openapi as api_docs
from web import pages as page
from web.websocket import WebSocket
from web.websocket_handshake import accept_handshake
from websocket_api import Upgraded, WebSockets

# Events of the main thread in which scripts run; nested ones are counted once. A layout that a script requests is part
# of it. The time is the thread's own, so other programs on the machine do not count.
SCRIPT = {
    "FunctionCall",
    "EvaluateScript",
    "v8.run",
    "v8.evaluateModule",
    "RunMicrotasks",
    "TimerFire",
    "EventDispatch",
}
SCRIPT |= {"FireAnimationFrame", "FireIdleCallback", "v8.callFunction", "MinorGC", "MajorGC"}
FRAME = "BeginCommitCompositorFrame"  # ends a frame for the main thread
CATEGORIES = ["devtools.timeline", "disabled-by-default-devtools.timeline", "devtools.timeline.frame", "v8.execute"]
LONG_TASK = 50.0  # milliseconds
SECTION = """## {n}. How a swarm serves a model

A model with **{n}0 layers** does not fit on one machine, so *several* share it: each serves a span of blocks, and a
client sends its hidden states from one to the next, which the table below shows in `order`. See
[the paper](https://arxiv.org/abs/2209.01188) for what happens when one of them leaves.

1. **Find a route.** The client asks the DHT who serves which blocks, and takes the fastest way through all of them.
2. **Prefill.** All tokens of the prompt go through the route at once; each server keeps their *attention keys*:
   - one cache for each session, of a size that was agreed on before;
   - freed when the session ends, or when nobody has asked for it for a while.
3. **Decode.** From then on it is one token at a time, and `max_length` bounds it.

| Server | Blocks | Tokens/s | Remark |
|:-------|:------:|---------:|--------|
| alpha | 0 to {n}0 | 31.5 | the **first** in the route |
| beta | {n}1 to {n}9 | 28.0 | has `int8` weights |
| gamma | {n}0 to 70 | 12.25 | slow, but it is *there* |

The attention of one head is $A = \\mathrm{{softmax}}(QK^T / \\sqrt{{d}})\\,V$, and what it costs grows with the square:

$$
T(n) = \\sum_{{i=1}}^{{n}} \\left(c_1 i + c_2\\right) = O(n^2)
$$

```python
def route(servers: list[Server], blocks: int) -> list[Span]:
    \"\"\"Take the fastest way through all blocks.\"\"\"
    spans, block = [], {n}
    while block < blocks:
        server = max(candidates(servers, block), key=lambda each: each.throughput)
        spans.append(Span(server, block, min(server.end, blocks)))
        block = spans[-1].end  # go on where it ends
    return spans
```

> A cache can always be rebuilt: the *token ids* are the truth.

"""
WORDS = (
    "the swarm of **peers** serves all `blocks` of a [model](https://example.org/m) to *anybody* who asks for it and"
)


def answer(tokens: int) -> str:
    """Return an answer with prose, lists, tables, code and formulas."""
    return "".join(itertools.islice(split("".join(SECTION.format(n=n) for n in range(1, 40))), tokens))


def shapes(tokens: int) -> dict[str, str]:
    """Return the texts that are hardest to show while they grow: blocks that end only with the text."""
    words = itertools.cycle(WORDS.split())

    def line(count: int) -> str:
        return " ".join(itertools.islice(words, count))

    texts = {
        "prose": ("", lambda i: f"{line(60)}.\n\n"),
        "list": ("", lambda i: f"{i + 1}. {line(12)}\n"),
        "table": ("| a | b | c |\n|---|:-:|--:|\n", lambda i: f"| {line(4)} | {i} | {line(5)} |\n"),
        "code": ("```python\n", lambda i: f"def f{i}(x: int) -> int:\n    return x + {i}  # and so on\n\n"),
        "paragraph": ("", lambda i: f"{line(20)} "),
    }
    made = {}
    for name, (head, part) in texts.items():
        text = head + "".join(part(i) for i in range(tokens // 4))
        made[name] = "".join(itertools.islice(split(text), tokens))
    return made


def split(text: str) -> Iterator[str]:
    """Split a text roughly as tokenizers do: words with the space before them, long ones in parts."""
    return (match[0] for match in re.finditer(r" ?\w{1,8}|\n+| ?[^\w\s]{1,2}|\s", text))


def main() -> None:
    """Measure; print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=4000, help="of the answer (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, help="tokens per second (default: %(default)s)")
    parser.add_argument("--shapes", action="store_true", help="the module alone, with one giant block each")
    args = parser.parse_args()
    results = {}
    with serving(answer(args.tokens), args.rate) as url, browser_page() as browser:
        if args.shapes:
            for name, text in shapes(args.tokens).items():
                results[name] = measure(browser, functools.partial(stream, browser, url, text, args.rate, "module"))
        else:
            results["chat page"] = measure(browser, lambda: chat(browser, url, args.tokens / args.rate))
            text = answer(args.tokens)
            results["module alone"] = measure(browser, lambda: stream(browser, url, text, args.rate, "module"))
            results["naive"] = measure(browser, lambda: stream(browser, url, text, args.rate, "naive"))
    report(results)


@contextmanager
def serving(text: str, rate: float) -> Iterator[str]:
    """Serve the pages, with a model that gives this answer to everything."""
    app = Flask(__name__, root_path=str(ROOT), static_folder=None)
    service = Service(Settings(MODELS=("writer",)))  # not started: there is no model
    app.extensions["petals_chat"] = service
    app.register_blueprint(page.blueprint)
    app.register_blueprint(api_docs.blueprint)  # the page links to it
    app.add_url_rule("/static/<path:filename>", "static", page.static_file)
    app.add_url_rule("/readyz", "ready", lambda: {"ready": True, "models": {"writer": {"state": "ready"}}})
    app.add_url_rule("/module", "module", lambda: BLANK)
    app.add_url_rule("/naive", "naive", lambda: BLANK)
    websockets = WebSockets(service.settings, service.ending)

    @app.get("/api/v2/generate", websocket=True)
    def generate_stream() -> Response:
        websocket = websockets.adopt(request.environ, "browser", accept_handshake(request.environ))
        websocket.start(lambda: websockets.pool.submit("browser", lambda: write(websocket, text, rate)))
        return Upgraded(websocket)

    @app.after_request
    def protect(response: Response) -> Response:
        if response.mimetype == "text/html" and request.path != "/naive":  # the policy would block it
            response.headers["Content-Security-Policy"] = page.CONTENT_SECURITY_POLICY
        return response

    logging.getLogger("werkzeug").disabled = True
    with listening(app) as url:
        yield url
    service.close()


def write(websocket: WebSocket, text: str, rate: float) -> None:
    """Speak the protocol of /api/v2/generate."""
    while (message := websocket.take()) is not None:
        if json.loads(message)["type"] != "generate":
            websocket.send(json.dumps({"ok": True, "session_id": "0", "resume_timeout": 60}))
            continue
        tokens = list(split(text))
        started = time.monotonic()
        for i, token in enumerate(tokens):
            time.sleep(max(0.0, started + i / rate - time.monotonic()))
            last = i == len(tokens) - 1
            response = {"ok": True, "outputs": token, "token_count": 1, "position": i + 1, "stop": last}
            end = {"finish_reason": "stop", "stop_sequence": "</s>"} if last else {}
            websocket.send(json.dumps(response | end))
    (websocket.done if websocket.connected else websocket.finish)()


BLANK = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Answer</title>
<link rel="stylesheet" href="/static/css/theme.css"><link rel="stylesheet" href="/static/css/markdown.css">
<body><main id="scroll"><div id="answer"></div></main></body></html>"""
OBSERVE = """
window.observed = { shift: 0, long: 0 };
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) observed.shift += entry.hadRecentInput ? 0 : entry.value;
}).observe({ type: "layout-shift", buffered: true });
const longTasks = new PerformanceObserver((list) => (observed.long += list.getEntries().length));
longTasks.observe({ type: "longtask", buffered: true });
"""
# Naive: marked as in its manual, the whole text in each frame.
STREAM = """async ([tokens, rate, kind]) => {
  const { MarkdownView, ready } = await import("/static/js/markdown/view.js");
  const { marked } = await import("/vendor/marked/marked.esm.js");
  await ready;
  const element = document.getElementById("answer");
  const follow = () => scrollTo(0, document.body.scrollHeight);
  const view = kind === "module" && new MarkdownView(element, { changed: follow });
  let text = "";
  let frame = 0;
  const append = view ? (token) => view.append(token) : (token) => {
    text += token;
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      element.innerHTML = marked.parse(text);
      follow();
    });
  };
  const started = performance.now();
  await new Promise((resolve) => {
    let sent = 0;
    const timer = setInterval(() => {
      const due = Math.min(tokens.length, ((performance.now() - started) / 1000) * rate);
      while (sent < due) append(tokens[sent++]);
      if (sent === tokens.length) resolve(clearInterval(timer));
    }, 1000 / rate);
  });
  view && view.end();
}"""


def chat(browser: Page, url: str, seconds: float) -> None:
    """Ask on the page as a user does, and wait for the answer to end."""
    browser.goto(url)
    browser.wait_for_selector("body[data-state=ready]")
    browser.evaluate(OBSERVE)
    browser.fill("#prompt", "How does a swarm serve a model?")
    browser.press("#prompt", "Enter")
    browser.wait_for_selector("article[data-role=assistant][aria-busy=true]")
    browser.wait_for_selector("article[data-role=assistant][aria-busy=false]", timeout=(seconds * 3 + 60) * 1000)


def stream(browser: Page, url: str, text: str, rate: float, kind: str) -> None:
    """Let a text grow on an empty page."""
    browser.goto(f"{url}/{kind}")
    browser.evaluate(OBSERVE)
    browser.evaluate(STREAM, [list(split(text)), rate, kind])


@dataclass(frozen=True)
class Cost:
    """Script time (processor time) of the frames that had any, in milliseconds."""

    frames: int
    median: float
    p99: float
    max: float
    long_tasks: int
    layout_shift: float


def measure(browser: Page, run: Callable[[], None]) -> Cost:
    """Trace a run and return its costs."""
    context = browser.context.browser
    assert context is not None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        context.start_tracing(page=browser, path=path, categories=CATEGORIES)
        run()
        browser.wait_for_timeout(500)
        observed = browser.evaluate("observed")
        context.stop_tracing()
        frames = script_times(json.loads(path.read_text())["traceEvents"])
    p99 = frames[min(len(frames) - 1, int(len(frames) * 0.99))]
    median = statistics.median(frames)
    return Cost(len(frames), median, p99, frames[-1], observed["long"], observed["shift"])


def script_times(events: list[dict[str, Any]]) -> list[float]:
    """Return the milliseconds of script in each frame that has some, in ascending order."""
    frames_of: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        frames_of.setdefault((event["pid"], event["tid"]), []).append(event)
    # The page's main thread is the one that fires animation frames.
    main = max(frames_of.values(), key=lambda them: sum(event["name"] == "FireAnimationFrame" for event in them))
    ends = sorted(event["ts"] for event in main if event["name"] == FRAME)
    times = [0.0] * (len(ends) + 1)
    frame, covered = 0, 0.0
    for event in sorted(
        (event for event in main if event["name"] in SCRIPT and "dur" in event), key=lambda it: it["ts"]
    ):
        start, end = event["ts"], event["ts"] + event["dur"]
        while frame < len(ends) and ends[frame] <= start:
            frame += 1
        if start >= covered:  # not within another one
            times[frame] += event.get("tdur", event["dur"]) / 1000
            covered = end
    return sorted(spent for spent in times[1:] if spent > 0) or [0.0]  # the page loads before the first frame


def report(results: dict[str, Cost]) -> None:
    """Print the costs of each."""
    print(
        f"{'script per frame':16}{'frames':>8}{'median ms':>11}{'p99 ms':>9}{'max ms':>9}{'long tasks':>12}{'shift':>9}"
    )
    for name, cost in results.items():
        figures = f"{cost.frames:8}{cost.median:11.2f}{cost.p99:9.2f}{cost.max:9.2f}"
        print(f"{name:16}{figures}{cost.long_tasks:12}{cost.layout_shift:9.4f}")
    print(json.dumps({name: vars(cost) for name, cost in results.items()}))


if __name__ == "__main__":
    main()
