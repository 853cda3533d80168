"""One tiny BLOOM and one real private swarm for the whole run; the reference is plain Transformers."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flask import Flask
from transformers import AutoTokenizer, BloomForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from app import create_app
from config import Settings
from service import Service, get_service
from swarm.client.model import SwarmModel
from swarm.client.routing import CacheRelief
from swarm.client.terms import SessionLimits
from swarm.local import LocalSwarm
from swarm.options import ServerOptions
from tests.support.processes import GUNICORN, Program, listening, running
from tests.support.swarms import all_answer
from tests.support.tiny import load_reference, make_tiny_bloom

# A tiny model on two cores is ready within seconds; a busy machine may take several times as long.
READY_TIMEOUT = 90.0


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bloom(tmp_path_factory.mktemp("models") / "tiny-bloom")


@pytest.fixture(scope="session")
def reference(tiny_bloom: Path) -> BloomForCausalLM:
    torch.set_num_threads(1)
    return load_reference(tiny_bloom)


@pytest.fixture(scope="session")
def swarm(tiny_bloom: Path) -> Iterator[LocalSwarm]:
    """A chain of two servers."""
    with LocalSwarm() as local:
        for blocks in ("0:2", "2:4"):
            local.start_server(tiny_server(tiny_bloom, blocks))
        yield local


def tiny_server(model: Path, blocks: str, attn_cache_tokens: int = 65536, *, batching: bool = True) -> ServerOptions:
    return ServerOptions(
        str(model),
        blocks=blocks,
        dtype="float32",
        threads=1,
        attn_cache_tokens=attn_cache_tokens,
        batching=batching,
    )


def load_model(path: Path, swarm: LocalSwarm, relief: CacheRelief | None = None, **limits: Any) -> SwarmModel:
    """Load the client's part of a model and wait until all its blocks are served, and their servers answer."""
    model = SwarmModel.load(
        str(path),
        swarm.swarm,
        cache_dir=path.parent,
        device="cpu",
        torch_dtype="float32",
        limits=dataclasses.replace(SessionLimits(), **limits),
        relief=relief,
    )
    assert model.state.start(READY_TIMEOUT)
    assert model.state.wait(lambda: not model.state.missing_blocks(), READY_TIMEOUT), "the servers did not come up"

    # A server announces its blocks a moment before it takes requests.
    assert model.state.wait(lambda: all_answer(model), READY_TIMEOUT), "the servers do not answer"
    return model


@pytest.fixture(scope="session")
def model(tiny_bloom: Path, swarm: LocalSwarm) -> Iterator[SwarmModel]:
    model = load_model(tiny_bloom, swarm)
    yield model
    model.close()


@pytest.fixture(scope="session")
def tokenizer(tiny_bloom: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bloom)


@dataclasses.dataclass(eq=False)
class LiveApp:
    """The app behind a real port."""

    url: str  # http://127.0.0.1:PORT
    app: Flask
    service: Service
    model_name: str

    @property
    def websocket_url(self) -> str:
        return self.url.replace("http", "ws") + "/api/v2/generate"


@pytest.fixture(scope="session")
def live_app(tiny_bloom: Path, swarm: LocalSwarm, model: SwarmModel) -> Iterator[LiveApp]:
    """The app, joined to the swarm as to any other."""
    settings = Settings(
        MODELS=(str(tiny_bloom), "/nowhere/missing-model"),
        INITIAL_PEERS=tuple(swarm.swarm.initial_peers),
        TORCH_DTYPE="float32",
        DEVICE="cpu",
        CACHE_DIR=str(tiny_bloom.parent),
        MAX_SESSIONS=24,
        MAX_QUEUE=2,
        QUEUE_TIMEOUT=1.0,
        SHUTDOWN_TIMEOUT=1.0,
        WARM_SESSIONS=0,  # so that what a test does to the servers depends on no other test
    )
    with serve(settings) as live:
        yield live


@pytest.fixture(scope="module")
def warm_app(live_app: LiveApp) -> Iterator[LiveApp]:
    """The app as it is by default, which keeps sessions of finished answers."""
    with serve(dataclasses.replace(live_app.service.settings, MODELS=(live_app.model_name,), WARM_SESSIONS=32)) as live:
        yield live


@contextlib.contextmanager
def serve(settings: Settings) -> Iterator[LiveApp]:
    """Run an app behind a live port for the time of a block, its default model ready."""
    app = create_app(settings)
    service = get_service(app)
    with listening(app) as url:
        try:
            service.start()
            name = settings.default_model
            served = service.models.served[name]
            ready = threading.Event()
            deadline = READY_TIMEOUT
            while not served.ready and deadline > 0:  # one that failed is tried again
                ready.wait(0.1)
                deadline -= 0.1
            assert served.ready, served.status
            yield LiveApp(url, app, service, name)
        finally:
            service.close()


@pytest.fixture(scope="session")
def default_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The app as `make run` starts it, with SmolLM2 in its embedded swarm."""
    with running(GUNICORN, tmp_path_factory.mktemp("default") / "log") as program:
        program.wait_ready()
        yield program


def greedy(reference: PreTrainedModel, token_ids: list[int], count: int) -> list[int]:
    """Return the reference's next tokens, fewer than ``count`` if it ends the text."""
    output = reference.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False)
    return output[0, len(token_ids) :].tolist()
