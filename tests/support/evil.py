"""A member of the swarm that means harm: a real peer on loopback, which announces, answers and asks as it likes."""

import asyncio
import math
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
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.timed_storage import get_dht_time
from petals.data_structures import ServerInfo, ServerState
from petals.utils.dht import declare_active_modules

from swarm.client.span import ARGS_STRUCTURE
from swarm.wire.messages import receive
from swarm.wire.requests import NO_PROMPTS_AND_HYPOTHESES

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


# What is answered, and a part of the reason for which that server is left, by name.
ANSWERS = {
    "nested metadata": (metadata(bomb()), "nested"),
    "metadata that is a list": (metadata(MSGPackSerializer.dumps([1])), "metadata must be a dictionary"),
    "abilities that are no answers": (metadata(MSGPackSerializer.dumps({"rewind": [1]})), "abilities"),
    "a model that is none": (metadata(MSGPackSerializer.dumps({"model": [1]})), "a model"),
    "wrong dtype": (tensor(dtype="uint16", buffer=b"\0\0"), "dtype 'uint16'"),
    "whole numbers": (tensor(dtype="int64", buffer=b"\0" * 8), "dtype 'int64'"),
    "nonsense dtype": (tensor(dtype="nonsense\n"), "dtype"),
    "too few bytes": (tensor(buffer=b"\0" * 3), "3 bytes are no tensor"),
    "huge sizes": (tensor(size=[2**32 - 1] * 3), "shape"),
    "NaN": (filled(math.nan), "not finite"),
    "infinity": (filled(-math.inf), "not finite"),
    "8-bit compression": (tensor(compression=runtime_pb2.BLOCKWISE_8BIT), "the compression BLOCKWISE_8BIT is not"),
    "a compression of 200": (tensor(compression=200), "CompressionType"),
    "no tensor": (tensors(0), "0 tensors"),
    "two tensors": (tensors(2), "2 tensors"),
    "a huge length": (raw(framed(b"", size=2**60)), "is larger than"),
    "1 MB for 1 token": (raw(framed(bytes(2**20))), "is larger than"),
    "no message": (raw(framed(b"", marker=b"\x07")), "begins no message"),
    "no protobuf": (raw(framed(b"\xff" * 50)), "cannot be read"),
    "a long error": (
        raw(framed(RPCError(message="\n\x1b[31m" + "no " * 5000).SerializeToString(), marker=b"\x01")),
        r"refuses: \\n\\x1b\[31mno no",
    ),
}


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
            answer = receive(runtime_pb2.ExpertResponse, reader)
            try:
                _, error = await asyncio.wait_for(answer, ANSWER_TIMEOUT)
            except (asyncio.IncompleteReadError, ConnectionError):
                return "closed"
            if error is not None:
                return f"refused: {error.message}"
        return "answered"
    finally:
        writer.close()


def bad_requests(uids: list[str], hidden_size: int) -> dict[str, tuple[list[bytes], str]]:
    """Return what is sent, one message after the other, and what the last of it is answered with, by name.

    :param uids: of blocks that follow each other
    """
    one, plain = torch.zeros(1, 1, hidden_size), {"max_length": 8, "args_structure": ARGS_STRUCTURE}
    good = request(uids, one)
    nested = runtime_pb2.ExpertRequest(
        uid=" ".join(uids), tensors=[serialize_torch_tensor(one), *NO_PROMPTS_AND_HYPOTHESES], metadata=bomb()
    )
    mark = b"__T0"
    return {
        "float position": ([good, request(uids, one, start_from_position=0.0)], "cannot start from position 0.0"),
        "true position": ([good, request(uids, one, start_from_position=True)], "cannot start from position True"),
        "no rows": ([request(uids, torch.zeros(0, 1, hidden_size)), good], "the number of sequences must be"),
        "10,000 rows": ([request(uids, torch.zeros(10_000, 1, hidden_size))], "must be a whole number from 1 to 64"),
        "nested metadata": ([framed(nested.SerializeToString())], "nested"),
        "a huge message": ([framed(b"", size=2**60)], "closed"),
        "no protobuf": ([framed(b"\xff" * 20)], "closed"),
        "no message": ([framed(b"", marker=b"\x09")], "closed"),
        "8-bit compression": ([request(uids, blockwise(hidden_size))], "compression BLOCKWISE_8BIT"),
        "NaN": ([request(uids, torch.full((1, 1, hidden_size), math.nan))], "finite"),
        "whole numbers": ([request(uids, torch.zeros(1, 1, hidden_size, dtype=torch.int64))], "finite"),
        "nonsense dtype": ([request(uids, runtime_pb2.Tensor(size=[1, 1, hidden_size], dtype="\n"))], "dtype"),
        "huge size": (
            [request(uids, runtime_pb2.Tensor(size=[1, 2**32 - 1, hidden_size], dtype="float32"))],
            "too large",
        ),
        "true length": ([request(uids, one, max_length=True)], "Cannot allocate KV cache for True"),
        "float length": ([request(uids, one, max_length=8.0)], "Cannot allocate KV cache for 8.0"),
        "a text to wait": ([request(uids, one, alloc_timeout="\n")], r"alloc_timeout must be a number"),
        "NaN to wait": ([request(uids, one, alloc_timeout=math.nan)], "alloc_timeout must be a number"),
        "a long id": ([request(uids, one, session_id="x" * 10_000)], "session_id must be a text"),
        "an id that is a list": ([request(uids, one, session_id=[1])], "session_id must be a text"),
        "an adapter of numbers": ([request(uids, one, active_adapter=[1])], "active_adapter must be a text"),
        "no such tensor": ([request(uids, one, args_structure=((b"__T9",), {}))], "there is no tensor"),
        "nested arguments": ([request(uids, one, args_structure=(([[mark]],), {}))], "there is no tensor"),
        "no arguments": ([request(uids, one, args_structure="x")], "cannot be structured"),
        "a block twice": ([request([uids[0], uids[0]], one, **plain)], "names a block twice"),
        "other blocks": ([request(["x" * 5000], one, **plain)], "does not serve 'xxx"),
        "many blocks": ([request([uids[0]] * 10_000, one, **plain)], "does not serve"),
    }
