"""A member of the swarm that means harm: a real peer on loopback, which announces, answers and asks as it likes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import swarm.compat  # noqa: F401

import hivemind
import msgpack
import torch
from hivemind import MSGPackSerializer, serialize_torch_tensor
from hivemind.dht.routing import DHTID
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.timed_storage import get_dht_time
from petals.data_structures import ServerInfo, ServerState
from petals.utils.dht import declare_active_modules

from swarm import wire
from swarm.session import ARGS_STRUCTURE, NO_PROMPTS_AND_HYPOTHESES

STREAM = "TransformerConnectionHandler.rpc_inference"
INFO = "TransformerConnectionHandler.rpc_info"
ANSWER_TIMEOUT = 20.0  # seconds for a server on loopback to answer or refuse, on a busy machine
ALIVE = MSGPackSerializer.dumps({"silent_for": 0.0})  # what a sound server tells whoever asks
FAR_AWAY = 10.0**18
LIFE = 60.0  # seconds that what it announces lives

Answer = Callable[[runtime_pb2.ExpertRequest, asyncio.StreamWriter], Awaitable[None]]


def bomb(depth: int = 400) -> bytes:
    """Return nested tuples, which end a process that reads them level by level."""
    data = msgpack.packb([])
    for _ in range(depth):
        data = msgpack.packb([msgpack.ExtType(0x40, data)])
    return data


def framed(data: bytes, *, marker: bytes = P2P.MESSAGE_MARKER, size: int | None = None) -> bytes:
    """Return a message as hivemind sends it; ``size``: what it says of its length."""
    length = len(data) if size is None else size
    return marker + length.to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER) + data


class EvilServer:
    """Announces blocks as the fastest server of a swarm, and answers with what ``answer`` writes."""

    def __init__(self, initial_peers: Sequence[str], uids: Sequence[str]) -> None:
        self.uids = list(uids)
        self.answer: Answer | None = None  # None: silence
        self.info = ALIVE  # what it tells whoever asks whether it lives
        self.asked = 0  # requests that have come
        self.dht = hivemind.DHT(
            initial_peers=list(initial_peers), host_maddrs=["/ip4/127.0.0.1/tcp/0"], use_auto_relay=False, start=True
        )
        self.peer_id: PeerID = self.dht.peer_id
        self.p2p: P2P = RemoteExpertWorker.run_coroutine(self.dht.replicate_p2p())
        RemoteExpertWorker.run_coroutine(self.p2p.add_binary_stream_handler(STREAM, self._serve))
        RemoteExpertWorker.run_coroutine(self.p2p.add_protobuf_handler(INFO, self._tell, runtime_pb2.ExpertUID))

    async def _serve(self, _: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request, _ = await P2P.receive_protobuf(runtime_pb2.ExpertRequest, reader)
                self.asked += 1
                if self.answer is not None:
                    await self.answer(request, writer)
                    await writer.drain()
        except (EOFError, ConnectionError):
            writer.close()

    async def _tell(self, _: runtime_pb2.ExpertUID, __: P2PContext) -> runtime_pb2.ExpertInfo:
        return runtime_pb2.ExpertInfo(serialized_info=self.info)

    def announce(self, state: ServerState = ServerState.ONLINE) -> None:
        end = len(self.uids)
        info = ServerInfo(state, 1e6, 0, end, inference_rps=1e6, cache_tokens_left=10**9, torch_dtype="float32")
        declare_active_modules(self.dht, self.uids, info, get_dht_time() + LIFE)

    def plant(self, uid: str, value: Any, subkey: Any = None, expiration: float | None = None) -> None:
        """Keep a record as a stock node does, which takes anything; the others find it here. At most 3 kB: it goes
        through a pipe from which the DHT process reads what is there, and fails if that is not all.
        """
        expiration = get_dht_time() + LIFE if expiration is None else expiration
        self.dht.run_coroutine(partial(_plant, uid=uid, value=value, subkey=subkey, expiration=expiration))

    def close(self) -> None:
        self.announce(ServerState.OFFLINE)
        RemoteExpertWorker.run_coroutine(self.p2p.shutdown())
        self.dht.shutdown()


async def _plant(_: Any, node: Any, uid: str, value: bytes, subkey: Any, expiration: float) -> None:
    key = DHTID.generate(uid)
    if subkey is None:
        del node.protocol.storage[key]
        node.protocol.storage.store(key, value, expiration)
    else:
        node.protocol.storage.store_subkey(key, subkey, value, expiration)


# Answers


def reply(change: Callable[[runtime_pb2.ExpertResponse, list[int]], None]) -> Answer:
    """Answer with zeros of the right shape, but for a change."""

    async def answer(request: runtime_pb2.ExpertRequest, writer: asyncio.StreamWriter) -> None:
        size = list(request.tensors[0].size)
        response = runtime_pb2.ExpertResponse(tensors=[serialize_torch_tensor(torch.zeros(size))])
        change(response, size)
        writer.write(framed(response.SerializeToString()))

    return answer


def raw(data: bytes) -> Answer:
    """Answer with these bytes."""

    async def answer(_: runtime_pb2.ExpertRequest, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def filled(value: float) -> Answer:
    """Answer with the right shape and wrong values."""

    def change(response: runtime_pb2.ExpertResponse, size: list[int]) -> None:
        response.tensors[0].CopyFrom(serialize_torch_tensor(torch.full(size, value)))

    return reply(change)


def tensor(**fields: Any) -> Answer:
    """Answer with a tensor that says other things of itself."""

    def change(response: runtime_pb2.ExpertResponse, _: list[int]) -> None:
        for name, value in fields.items():
            if name == "size":
                del response.tensors[0].size[:]
                response.tensors[0].size.extend(value)
            else:
                setattr(response.tensors[0], name, value)

    return reply(change)


def metadata(data: bytes) -> Answer:
    """Answer with zeros, and this metadata."""

    def change(response: runtime_pb2.ExpertResponse, _: list[int]) -> None:
        response.metadata = data

    return reply(change)


def tensors(count: int) -> Answer:
    """Answer with another number of tensors."""

    def change(response: runtime_pb2.ExpertResponse, _: list[int]) -> None:
        first = response.tensors.pop()
        response.tensors.extend([first] * count)

    return reply(change)


def blockwise(values: int) -> runtime_pb2.Tensor:
    """Return a tensor whose indices point beyond its code book."""
    numbers = torch.tensor([1, 1]).numpy().tobytes() + torch.ones(2).numpy().tobytes()
    return runtime_pb2.Tensor(
        compression=runtime_pb2.BLOCKWISE_8BIT, buffer=numbers + b"\xff" * values, size=[1, 1, values], dtype="float32"
    )


# Requests


def request(uids: Sequence[str], hidden: torch.Tensor | runtime_pb2.Tensor, **fields: Any) -> bytes:
    """Return a framed request, as petals' clients send it but for ``fields`` of its metadata."""
    first = hidden if isinstance(hidden, runtime_pb2.Tensor) else serialize_torch_tensor(hidden)
    given = {"max_length": 8, "args_structure": ARGS_STRUCTURE, **fields}
    message = runtime_pb2.ExpertRequest(
        uid=" ".join(uids), tensors=[first, *NO_PROMPTS_AND_HYPOTHESES], metadata=MSGPackSerializer.dumps(given)
    )
    return framed(message.SerializeToString())


async def ask(p2p: P2P, peer_id: PeerID, messages: Sequence[bytes]) -> str:
    """Send messages on a stream of their own, waiting for an answer to each; return what came back for the last."""
    _, reader, writer = await p2p.call_binary_stream_handler(peer_id, STREAM)
    try:
        for message in messages:
            writer.write(message)
            answer = wire.receive(runtime_pb2.ExpertResponse, reader)
            try:
                _, error = await asyncio.wait_for(answer, ANSWER_TIMEOUT)
            except (asyncio.IncompleteReadError, ConnectionError):
                return "closed"
            if error is not None:
                return f"refused: {error.message}"
        return "answered"
    finally:
        writer.close()
