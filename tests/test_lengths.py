"""How long sessions may be: by the model's configuration, and by what servers announce; and longer than stock ones."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swarm.compat import CALL_TIMEOUT

import pytest
import torch
from hivemind.p2p import PeerID
from petals.data_structures import RemoteSpanInfo, ServerInfo, ServerState
from transformers import BloomConfig, GptOssConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config

from swarm.client.model import LOADING
from swarm.client.routing import SwarmState
from swarm.errors import SessionLengthExceeded
from swarm.lengths import context_length, served_length, stock_length
from swarm.local import LocalSwarm
from swarm.wire.announcements import read_announcement
from swarm.wire.server_info import extended
from swarm.wire.text import Malformed
from tests.conftest import load_model, tiny_server
from tests.support.tiny import save_random

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_theta": 1e6, **settings}


@pytest.mark.parametrize(
    ("config", "tokenizer_limit", "length"),
    [
        (LlamaConfig(max_position_embeddings=8192), 512, 8192),
        # Its length is the one with scaling, as in the checkpoints of Llama 3.1.
        (LlamaConfig(max_position_embeddings=131072, rope_parameters=rope(**LLAMA_3)), None, 131072),
        # Its length is the one before, as in those of Qwen 3 with yarn.
        (
            Qwen3Config(
                max_position_embeddings=40960,
                rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
            ),
            None,
            131072,
        ),
        (GptOssConfig(), None, 131072),
        (LlamaConfig(max_position_embeddings=2048, rope_parameters=rope(rope_type="linear", factor=4.0)), None, 8192),
        (SimpleNamespace(max_position_embeddings=2048, rope_scaling={"type": "linear", "factor": 2}), None, 4096),
        # Its positions have no end.
        (BloomConfig(), None, None),
        (BloomConfig(), 2048, 2048),
        (BloomConfig(), 1000000000000000019884624838656, None),
    ],
)
def test_the_length_that_a_model_has(config: Any, tokenizer_limit: int | None, length: int | None) -> None:
    assert context_length(config, tokenizer_limit) == length


@pytest.mark.parametrize(
    ("context", "grouped", "cache", "length"),
    [
        (131072, True, 65536, 65536),
        (131072, True, 1 << 20, 131072),
        (131072, True, None, 16384),  # petals' cache
        (4096, True, 1 << 20, 4096),
        (131072, False, 256, 2048),  # less than that no server takes: who wants it waits for cache
        (1024, False, 65536, 1024),
        (None, False, 65536, 2048),
    ],
)
def test_the_length_that_a_server_takes(context: int | None, grouped: bool, cache: int | None, length: int) -> None:
    config = SimpleNamespace(max_position_embeddings=context, num_key_value_groups=4 if grouped else 1)
    assert served_length(config, cache) == length


def test_servers_announce_it_and_stock_ones_do_not() -> None:
    stock = ServerInfo(ServerState.ONLINE, 1.0, start_block=0, end_block=2, version="2.2.0")
    own = extended(stock, 65536)
    assert (own.version, own.end_block) == ("2.2.0", 2)
    assert read_announcement(own.to_tuple(), 1).longest_session == 65536
    assert read_announcement(stock.to_tuple(), 1).longest_session is None
    # A stock client reads what it knows.
    assert ServerInfo.from_tuple(own.to_tuple()) == stock


@pytest.mark.parametrize("length", [0, -1, 1.5, "8192", 2**40, True])
def test_lengths_that_cannot_be_true(length: Any) -> None:
    with pytest.raises(Malformed):
        read_announcement((2, 1.0, {"longest_session": length}), 0)


def view_of(*servers: tuple[int, int, int | None]) -> SwarmState:
    """What a client sees of servers: (first block, block after the last, the longest session) each."""
    spans = []
    for number, (start, end, longest) in enumerate(servers):
        info: ServerInfo = ServerInfo(ServerState.ONLINE, 1.0, start_block=start, end_block=end)
        info = extended(info, longest) if longest else info
        spans.append(RemoteSpanInfo(PeerID(bytes([0, 36]) + bytes([number]) * 36), start, end, info))
    blocks = [[span for span in spans if span.start <= block < span.end] for block in range(4)]
    manager = Manager(SimpleNamespace(spans_by_priority=spans, spans_containing_block=blocks))
    return SwarmState(manager, "m")


@dataclasses.dataclass
class Manager:
    """What the state needs of petals' manager."""

    sequence_info: Any

    def __post_init__(self) -> None:
        self.state = SimpleNamespace(sequence_info=self.sequence_info)
        self.config = SimpleNamespace(update_period=CALL_TIMEOUT, num_key_value_groups=4)
        self._thread = SimpleNamespace(trigger=threading.Event())
        self.lock_changes = threading.Lock()
        self.ping_aggregator = SimpleNamespace(to_dict=dict)

    def __len__(self) -> int:
        return 4


def test_the_longest_session_of_a_swarm() -> None:
    """As long as servers take it that together hold all blocks; stock ones take 8,192 tokens of such a model."""
    assert view_of((0, 4, 65536)).longest_session() == 65536
    assert view_of((0, 4, 65536), (0, 4, None), (2, 4, 99999)).longest_session() == 65536
    assert view_of((0, 2, 65536), (2, 4, None)).longest_session() == 8192
    assert view_of((0, 2, 65536), (2, 4, 512)).longest_session() == 512
    assert view_of((0, 2, 65536)).longest_session() == 65536  # nobody knows what the others will take
    assert view_of().longest_session() == stock_length(SimpleNamespace(num_key_value_groups=4))


def test_a_server_that_is_lost_shortens_nothing() -> None:
    view = view_of((0, 4, 65536))
    assert view.longest_session() == 65536
    view.manager.state.sequence_info.spans_containing_block = [[], [], [], []]
    assert view.longest_session() == 65536


def test_long_sessions_go_to_servers_that_take_them() -> None:
    view = view_of((0, 4, None), (0, 2, 65536), (2, 4, 65536), (2, 4, 512))

    def route(length: int) -> list[int]:
        return [span.peer_id.to_bytes()[-1] for span in view.route(0, 4, 0, length=length)]

    assert route(8192) == [0]
    assert route(8193) == route(65536) == [1, 2]
    assert route(65537) == [0]  # which says how much it takes


LONG = 9000  # tokens: more than a stock server takes


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 160}
    directory = tmp_path_factory.mktemp("models") / "tiny-long-llama"
    return save_random(LlamaForCausalLM, LlamaConfig, directory, max_position_embeddings=12_000, **options)


def test_a_session_longer_than_stock_servers_take(long_llama: Path) -> None:
    """And exact: a token after all of them is the one that plain Transformers chooses. Beyond is a typed error."""
    token_ids = torch.randint(5, 400, (LONG,), generator=torch.Generator().manual_seed(1)).tolist()
    with LOADING:
        plain = LlamaForCausalLM.from_pretrained(long_llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = plain(torch.tensor([token_ids]), logits_to_keep=1).logits[0, -1]
    with LocalSwarm() as local:
        local.start_server(tiny_server(long_llama, "0:2"))
        model = load_model(long_llama, local)
        try:
            assert model.max_length == 12_000
            with model.open_session(12_000) as session:
                torch.testing.assert_close(session.step(token_ids), expected, rtol=1e-3, atol=1e-3)
            with pytest.raises(SessionLengthExceeded, match="12001 tokens exceed the 12000"):
                model.open_session(12_001)
        finally:
            model.close()
