"""The start commands, and the ends: nothing is left running, whichever way the program goes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer, FalconForCausalLM
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.support.client import Socket, call, websocket
from tests.support.falcon import make_tiny_falcon
from tests.support.processes import GUNICORN, ROOT, Program, running, survivors
from tests.test_session import wait_until

PROMPT = "The quick brown fox"


def environment(tiny_bloom: Path, **more: str) -> dict[str, str]:
    """The tiny model in an embedded swarm of the program's own."""
    return {
        "MODELS": str(tiny_bloom),
        "TORCH_DTYPE": "float32",
        "SERVER_THREADS": "1",
        "CACHE_DIR": str(tiny_bloom.parent),
        **more,
    }


@pytest.fixture(scope="module")
def tiny_falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_falcon(tmp_path_factory.mktemp("models") / "tiny-falcon")


@pytest.fixture(scope="module")
def program(tiny_bloom: Path, tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """gunicorn with the published options, serving two good models and one whose hub cannot be reached."""
    log = tmp_path_factory.mktemp("start") / "gunicorn.log"
    command = [*GUNICORN, "--bind", "127.0.0.1:{port}", "--threads", "100", "--timeout", "1000"]
    models = {"MODELS": f"{tiny_bloom},{tiny_falcon},bigscience/bloom-560m", "HF_ENDPOINT": "http://127.0.0.1:9"}
    with running(command, log, **environment(tiny_bloom, **models)) as program:
        wait_until(lambda: generate(program) is not None, "not ready", timeout=120)
        yield program


def generate(program: Program, count: int = 12, **params: object) -> str | None:
    """Return the generated text, or None while the model is not ready."""
    try:
        body = {"inputs": PROMPT, "max_new_tokens": count, **params}
        status, _, answer = call(program.url, "/api/v1/generate", body=body)
    except OSError:
        return None
    return answer["outputs"] if status == 200 else None


def test_failed_hub_is_one_models_failure(program: Program) -> None:
    status, _, body = call(program.url, "/readyz")
    failed = body["models"]["bigscience/bloom-560m"]
    assert (status, failed["state"]) == (503, "failed")
    assert "bigscience/bloom-560m" in failed["message"]
    params = {"inputs": "a", "max_new_tokens": 1, "model": "bigscience/bloom-560m"}
    status, _, body = call(program.url, "/api/v1/generate", body=params)
    assert (status, body["error"]["code"]) == (503, "model_unavailable")


def test_several_models_at_once(program: Program, tiny_bloom: Path, tiny_falcon: Path) -> None:
    reference = FalconForCausalLM.from_pretrained(tiny_falcon).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_falcon)
    token_ids = tokenizer.encode(PROMPT)
    expected = reference.generate(torch.tensor([token_ids]), max_new_tokens=12, do_sample=False)[0, len(token_ids) :]
    wait_until(lambda: state(program, tiny_falcon) == "ready", "the second model is not ready", timeout=120)
    text = generate(program, 12, model=str(tiny_falcon))
    assert text == tokenizer.decode(expected, clean_up_tokenization_spaces=False)
    assert generate(program, 12, model=str(tiny_bloom)) == generate(program, 12) != text


def test_page_is_served_with_its_parts(program: Program) -> None:
    status, headers, page = call(program.url, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    parts = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert parts and not any(part.startswith(("http:", "https:", "//")) for part in parts)
    for part in parts:
        assert call(program.url, "/" + part.lstrip("/"))[0] == 200, part


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("static/**/*.js")))
def test_scripts_have_no_templates_within_templates(script: str) -> None:
    assert not re.search(r"`[^`]*\$\{[^}]*`", (ROOT / script).read_text()), (
        "rjsmin, see web/pages.py, would change them"
    )


def test_too_large_a_message_closes_the_connection(program: Program) -> None:
    with websocket(program.url.replace("http", "ws") + "/api/v2/generate") as ws:
        ws.send("x" * 1_100_000)
        with pytest.raises(ConnectionClosed) as closed:
            ws.receive()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_killed_server_comes_back_and_the_session_goes_on(program: Program, tiny_bloom: Path) -> None:
    whole = generate(program, 30)
    status, _, body = call(program.url, "/api/v1/open_inference_session", body={"max_length": 128})
    assert status == 200
    session_id = body["session_id"]
    first = generate(program, 10, session_id=session_id)
    server_of(program, tiny_bloom).kill()
    params = {"session_id": session_id, "max_new_tokens": 20}
    status, _, body = call(program.url, "/api/v1/generate", body=params)
    assert status == 200, body
    assert first is not None and first + body["outputs"] == whole


def server_of(program: Program, model: Path) -> psutil.Process:
    """The main process of a model's embedded server; it has children of the same command line."""
    servers = [process for process in program.family() if f"-m swarm.server {model} " in " ".join(process.cmdline())]
    return next(process for process in servers if process.parent() not in servers)


def test_prompts_and_answers_are_not_logged(program: Program) -> None:
    query = "/api/v1/generate?max_new_tokens=8&inputs=zyzzyva"
    status, _, body = call(program.url, query, data=b"")
    assert status == 200
    assert "zyzzyva" not in program.output
    assert "POST /api/v1/generate 200" in program.output


def test_sigterm_lets_the_running_answer_finish_and_leaves_nothing(tiny_bloom: Path, tmp_path: Path) -> None:
    with running(GUNICORN, tmp_path / "log", **environment(tiny_bloom)) as program:
        program.wait_ready()
        family = program.family()
        assert any(process.name() == "p2pd" for process in family)
        with websocket(program.url.replace("http", "ws") + "/api/v2/generate") as ws:
            ws.open(512)
            ws.send({"type": "generate", "inputs": PROMPT, "max_new_tokens": 10, "stop_sequence": "never to be seen"})
            replies = [ws.receive()]
            program.send(signal.SIGTERM)
            while not replies[-1]["stop"]:
                replies.append(ws.receive())
            assert sum(reply["token_count"] for reply in replies) > 450
        program.process.wait(timeout=120)
        assert survivors(family) == []
        assert "Traceback" not in program.output


@pytest.mark.parametrize("victim", ["master", "worker"])
def test_sigkill_leaves_nothing(tiny_bloom: Path, tmp_path: Path, victim: str) -> None:
    with running(GUNICORN, tmp_path / "log", **environment(tiny_bloom)) as program:
        program.wait_ready()
        family = program.family()
        if victim == "worker":
            (worker,) = psutil.Process(program.process.pid).children()
            family = [worker, *worker.children(recursive=True)]
            worker.kill()
        else:
            program.process.kill()
        assert survivors(family) == []


def test_ctrl_c_leaves_nothing(tiny_bloom: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole process group."""
    with running(GUNICORN, tmp_path / "log", **environment(tiny_bloom)) as program:
        program.wait_ready()
        family = program.family()
        os.killpg(program.process.pid, signal.SIGINT)
        program.process.wait(timeout=120)
        assert survivors(family) == []


def test_flask_run(tiny_bloom: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flask", "run", "--host=0.0.0.0", "--port={port}"]
    with running(command, tmp_path / "log", **environment(tiny_bloom)) as program:
        program.wait_ready()
        assert generate(program)
        family = program.family()
        program.send(signal.SIGINT)
        program.process.wait(timeout=120)
        assert survivors(family) == []


def test_ipv6(tmp_path: Path) -> None:
    """All addresses of the machine, of both kinds: the page, its WebSocket, and which sites are its own."""
    settings = {"HOST": "::", "MODELS": "/nowhere/model", "CORS_ORIGINS": "http://a.example"}
    settings["WEBSOCKET_ORIGINS"] = settings["CORS_ORIGINS"]
    with running(GUNICORN, tmp_path / "log", **settings) as program:
        program.wait_ready("/healthz")  # over IPv4
        assert f"Listening at: http://[::]:{program.port} " in program.output
        url = f"http://[::1]:{program.port}"
        assert call(url, "/")[0] == 200
        body = {"inputs": "a", "max_new_tokens": 1}
        own, foreign = {"Origin": url}, {"Origin": f"http://[::2]:{program.port}"}
        assert call(url, "/api/v1/generate", body=body, headers=own)[2]["error"]["code"].startswith("model_")
        assert call(url, "/api/v1/generate", body=body, headers=foreign)[2]["error"]["code"] == "origin_not_allowed"
        opening = {"type": "open_inference_session", "max_length": 8}
        address = url.replace("http", "ws") + "/api/v2/generate"
        with connect(address, additional_headers=own) as connection:
            assert Socket(connection).ask(opening)["error"]["code"].startswith("model_")
        with connect(address, additional_headers=foreign) as connection:
            with pytest.raises(ConnectionClosed, match="origin"):
                Socket(connection).ask(opening)


def test_more_workers_are_refused(tmp_path: Path) -> None:
    command = [*GUNICORN, "--workers", "2", "--bind", "127.0.0.1:0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "one worker" in result.stderr and "sessions live in the memory of one process" in result.stderr


def test_wrong_setting_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import app"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "MAX_SESSIONS": "many"}
    )
    assert result.returncode != 0 and "MAX_SESSIONS=many is not of type int" in result.stderr


def test_importing_the_app_starts_nothing() -> None:
    code = (
        "import sys, threading, psutil; import app; "
        "print(threading.active_count(), len(psutil.Process().children()), "
        "[name for name in ('petals', 'hivemind') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.split("\n")[0] == "1 0 []", result.stderr


def test_the_app_may_be_started_before_its_swarm(tiny_bloom: Path, tmp_path: Path) -> None:
    from swarm.client.membership import Swarm
    from swarm.local import LocalServer
    from tests.conftest import tiny_server

    port_holder = Swarm.found(["/ip4/127.0.0.1/tcp/0"])
    try:
        peers = ",".join(port_holder.initial_peers)
        with running(GUNICORN, tmp_path / "log", **environment(tiny_bloom, INITIAL_PEERS=peers)) as program:
            program.wait_ready("/healthz")
            wait_until(lambda: state(program, tiny_bloom) == "blocks_missing", "blocks_missing was not reported", 60)
            server = LocalServer(tiny_server(tiny_bloom, "0:4"), port_holder.initial_peers)
            try:
                program.wait_ready()
                assert generate(program)
            finally:
                server.close()
    finally:
        port_holder.close()


def state(program: Program, model: Path) -> str:
    return call(program.url, "/readyz")[2]["models"][str(model)]["state"]
