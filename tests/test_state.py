"""GET /api/v1/state: the swarm as it is, and who may see it."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomForCausalLM

from models.catalog import KNOWN_MODELS, ModelConfig
from models.loading import ServedModel
from swarm.local import LocalServer, LocalSwarm
from tests.conftest import LiveApp, serve, tiny_server
from tests.support.client import call
from tests.support.tiny import make_tiny_bloom
from tests.test_session import wait_until
from web.status import model_report, short_count

MISSING = "/nowhere/missing-model"


def state(app: LiveApp, headers: dict[str, str] | None = None) -> Any:
    status, _, body = call(app.url, "/api/v1/state", headers=headers)
    assert (status, body["ok"]) == (200, True), body
    return body


def test_the_swarm_as_it_is(live_app: LiveApp, swarm: LocalSwarm, reference: BloomForCausalLM) -> None:
    wait_until(lambda: state(live_app)["models"][0]["servers"][0]["ping"] is not None, "nobody was pinged")
    body = state(live_app)
    assert body["initial_peers"] == swarm.swarm.initial_peers
    assert body["sessions"] == {"open": len(live_app.service.sessions), "max": 24}
    assert body["time"] > 1.7e9
    ready, failed = body["models"]
    assert (ready["name"], ready["title"], ready["state"]) == (live_app.model_name, "tiny-bloom", "ready")
    assert (ready["num_blocks"], ready["blocks"], ready["context_length"]) == (4, [1, 1, 1, 1], 2048)
    assert ready["parameters"] == reference.num_parameters()
    assert (ready["size"], ready["licence"], ready["link"], ready["progress"]) == ("228K", None, None, None)
    first, second = ready["servers"]
    assert (first["start"], first["end"], second["start"], second["end"]) == (0, 2, 2, 4)
    assert first["peer_id"] != second["peer_id"] and first["name"] is None
    assert first["torch_dtype"] == "float32" and first["version"] and first["throughput"] > 0
    assert 0 < first["cache_tokens_left"] <= 2 * 2 * 65536 and 0 < first["ping"] < 5
    assert (failed["name"], failed["state"], failed["blocks"], failed["servers"]) == (MISSING, "failed", [], [])
    assert "no such directory" in failed["message"] and failed["num_blocks"] is failed["parameters"] is None


def test_a_peer_that_does_not_answer_makes_no_bad_json(live_app: LiveApp, monkeypatch: pytest.MonkeyPatch) -> None:
    model = live_app.service.models.served[live_app.model_name].model
    assert model is not None
    peers = [span.peer_id for span in model.state.manager.state.sequence_info.spans_by_priority]
    monkeypatch.setattr(model.state.manager.ping_aggregator, "to_dict", lambda: dict.fromkeys(peers, math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = live_app.app.test_client().get("/api/v1/state").text
    assert json.loads(text, parse_constant=refuse)["models"][0]["servers"][0]["ping"] is None


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that only the tests of this module serve."""
    return make_tiny_bloom(tmp_path_factory.mktemp("models") / "tiny-bloom-of-state", seed=2)


@pytest.fixture(scope="module")
def keyed(live_app: LiveApp, grown: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """An app with keys and a model that is not public, which looks at the swarm every moment."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps([{"key": "all", "models": ["*"]}, {"key": "plain"}]))
    models = (live_app.model_name, str(grown))
    with serve(
        dataclasses.replace(
            live_app.service.settings,
            MODELS=models,
            NON_PUBLIC_MODELS=models[1:],
            API_KEYS_FILE=str(keys),
            PAGE="open",
            UPDATE_PERIOD=0.5,
        )
    ) as live:
        yield live


def test_who_sees_what(keyed: LiveApp, grown: Path) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Page-Token": "wrong"}):
        status, _, body = call(keyed.url, "/api/v1/state", headers=headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    page_token = keyed.service.access.page_token()
    every, public = [keyed.model_name, str(grown)], [keyed.model_name]
    for headers, expected in (
        ({"X-Page-Token": page_token}, every),
        ({"Authorization": "Bearer all"}, every),
        ({"Authorization": "Bearer plain"}, public),
    ):
        assert [model["name"] for model in state(keyed, headers)["models"]] == expected
    # The token opens nothing else.
    body = {"inputs": "a", "max_new_tokens": 1}
    assert call(keyed.url, "/api/v1/generate", body=body, headers={"X-Page-Token": page_token})[0] == 401


def test_servers_come_and_go(keyed: LiveApp, swarm: LocalSwarm, grown: Path) -> None:
    def now() -> dict[str, Any]:
        return state(keyed, {"Authorization": "Bearer all"})["models"][1]

    wait_until(lambda: now()["num_blocks"] == 4, "the model was not loaded")
    assert (now()["state"], now()["blocks"], now()["servers"]) == ("blocks_missing", [0, 0, 0, 0], [])
    server = LocalServer(tiny_server(grown, "1:4"), swarm.swarm.initial_peers)
    try:
        wait_until(lambda: now()["blocks"] == [0, 1, 1, 1], "the server did not come", timeout=60)
        assert (now()["state"], now()["message"]) == ("blocks_missing", "no server holds block 0")
        assert [(one["start"], one["end"]) for one in now()["servers"]] == [(1, 4)]
    finally:
        server.close()
    wait_until(lambda: now()["blocks"] == [0, 0, 0, 0], "the server did not go", timeout=30)
    assert now()["servers"] == []


def test_a_model_that_is_loading() -> None:
    served = ServedModel(KNOWN_MODELS["HuggingFaceTB/SmolLM2-135M-Instruct"])
    served.report("SmolLM2-135M-Instruct: block 16 of 30")
    served.report_fraction(0.5)
    found = model_report(served, None)
    assert (found["state"], found["progress"]) == ("loading", 0.5)
    assert found["message"] == "SmolLM2-135M-Instruct: block 16 of 30"
    assert (found["size"], found["licence"]) == ("135M", "Apache-2.0")
    assert found["link"] == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
    served.report("starting a server of the embedded swarm")
    assert model_report(served, None)["progress"] is None


@pytest.mark.parametrize("name", ["/models/some", "./some/model", "some-model", "a/b/c", "tests/tiny", "org/<script>"])
def test_only_names_of_the_hub_have_a_link(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(name, next(iter(KNOWN_MODELS.values())).chat).link is None


@pytest.mark.parametrize(
    ("count", "words"),
    [(134515008, "135M"), (559214592, "559M"), (7069016064, "7.1B"), (176247271424, "176B"), (999_999, "1M"), (7, "7")],
)
def test_short_count(count: int, words: str) -> None:
    assert short_count(count) == words
