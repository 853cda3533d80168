"""One server's part of a session: its blocks, and the stream over which it computes them.

The wire protocol is petals' ``rpc_inference``: one stream per span, and for each step a request with new hidden states
and a reply with as many. Everything runs on hivemind's event-loop thread.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import swarm.compat  # noqa: F401

import torch
from hivemind import MSGPackSerializer, serialize_torch_tensor
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from petals.data_structures import CHAIN_DELIMITER, RemoteSpanInfo
from petals.server.handler import TransformerConnectionHandler
from petals.utils.misc import DUMMY, DUMMY_INT64
from petals.utils.packaging import pack_args_kwargs

from swarm.client.history import History
from swarm.client.terms import SessionTerms
from swarm.errors import CacheFull, ModelMismatch, SessionLengthExceeded, SwarmError, SwarmTimeout, format_blocks
from swarm.weights import Fingerprint
from swarm.wire.messages import receive
from swarm.wire.replies import Abilities, read_abilities, read_hidden, read_silence, reply_limit
from swarm.wire.text import Malformed, clean, quoted

log = logging.getLogger(__name__)

# Prompts go through the swarm in chunks, so that cancelling takes effect between them and each chunk stays far below
# the largest message that hivemind accepts: 512 tokens of BLOOM-176B are 15 MB.
PREFILL_CHUNK = 512  # tokens, of all rows together
# A server that answers with an error will answer the same again. When all have been tried, the chain keeps asking for
# this long, for the swarm may change.
REFUSAL_PATIENCE = 3.0  # seconds
# A request carries hidden states, deep prompts and beam hypotheses; this program sends only the first.
ARGS_STRUCTURE = pack_args_kwargs(torch.empty(1), DUMMY, DUMMY_INT64)[1]
NO_PROMPTS_AND_HYPOTHESES = (serialize_torch_tensor(DUMMY), serialize_torch_tensor(DUMMY_INT64))


class ServerFailed(Exception):
    """A server did not do its part of a step. Internal: it leads to recovery, or becomes ``error`` for the caller."""

    def __init__(self, error: SwarmError, patience: float, *, offence: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.patience = patience  # seconds for which retrying makes sense once all servers have been tried
        self.offence = offence  # whether the server did what no sound server does


class OtherModel(ServerFailed):
    """A server computes another model under the name of this one, and says so."""

    def __init__(self, peer_id: PeerID, difference: str) -> None:
        error = ModelMismatch(
            f"the server {peer_id} computes another model under this one's name: they differ in their {difference}; "
            "serve a copy of the same files, or give one of the two models another name with --dht-prefix"
        )
        super().__init__(error, REFUSAL_PATIENCE, offence=True)


class StepTooSlow(asyncio.TimeoutError):
    """A live server has not answered within the time limit of a step."""


@dataclass(frozen=True, eq=False)
class Gap:
    """Blocks [start, end) of a chain that have no server: not yet, or no longer."""

    start: int
    end: int
    history: History = field(default_factory=History)  # the inputs the blocks have received


class Span:
    """Blocks [start, end) of a chain, computed by one server."""

    def __init__(self, info: RemoteSpanInfo, history: History, terms: SessionTerms) -> None:
        """Make a span, whose first step opens its stream.

        :param history: the inputs its blocks have received
        """
        self.start: int = info.start
        self.end: int = info.end
        self.peer_id = info.peer_id
        self.history = history
        self.processed = 0  # tokens in the server's attention cache
        self._abilities = Abilities()  # what the server can do; its replies say so
        self._must_rewind = False  # whether the next request must ask it to rewind
        self._terms = terms
        manager = terms.state.manager
        self._p2p: P2P = manager.state.p2p
        self._uid: str = CHAIN_DELIMITER.join(manager.block_uids[info.start : info.end])
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def step(self, hidden: torch.Tensor, end: int) -> torch.Tensor:
        """Process all tokens before ``end`` that the server has not processed yet.

        :param hidden: [1 or rows, n, hidden size], inputs that end with the token before ``end``
        :returns: [1 or rows, m, hidden size], outputs that end with it; m > n if the server had to catch up
        :raises ServerFailed: if the server does not do it
        """
        self.history.extend(hidden, end)
        if self._terms.rows > 1 and self._streams is None:  # no tokens: only to learn what the server can do
            await self._exchange(hidden.new_empty(self._terms.rows, 0, hidden.shape[2]))
        chunk = PREFILL_CHUNK if self._terms.rows == 1 or self.spreads else max(1, PREFILL_CHUNK // self._terms.rows)
        outputs = []
        while self.processed < end:
            inputs = self.history.read(self.processed, min(self.processed + chunk, end))
            shared = inputs.shape[0] == 1
            if shared and not self.spreads:
                inputs = inputs.expand(self._terms.rows, -1, -1)
            output = await self._exchange(inputs)
            outputs.append(output[:1] if shared else output)
            self.processed += inputs.shape[1]
        if len(outputs) == 1:
            return outputs[0]
        rows = max(output.shape[0] for output in outputs)
        return torch.cat([output.expand(rows, -1, -1) for output in outputs], dim=1)

    @property
    def spreads(self) -> bool:
        """Whether the server computes for all rows what is sent once."""
        return self._abilities.spread

    def rewinds_to(self, length: int) -> bool:
        """Whether the server can forget all but its first ``length`` tokens."""
        return self._abilities.rewind and (length == 0 or length >= self._abilities.earliest)

    def truncate(self, length: int) -> None:
        """Have the server forget all but its first ``length`` tokens, with the next step."""
        self.processed, self._must_rewind = length, True

    async def _exchange(self, inputs: torch.Tensor) -> torch.Tensor:
        """Send inputs to the server and wait for its outputs.

        :raises ServerFailed: if the reply does not come, or anything is wrong with it
        """
        request = self._request(inputs)
        reply = asyncio.ensure_future(self._call(request, reply_limit(inputs.shape)))
        try:
            await self._wait_while_alive(reply)
            response, error = reply.result()
            if error is not None:
                raise self._refusal(clean(error.message))
            return self._read(response, inputs.shape)
        except ServerFailed:
            raise
        except (TimeoutError, OSError, EOFError, P2PDaemonError, ControlFailure, P2PHandlerError) as failure:
            reason = clean(str(failure)) or type(failure).__name__
            error_ = SwarmTimeout(f"the server of {format_blocks(range(self.start, self.end))} was lost: {reason}")
            late = isinstance(failure, StepTooSlow)
            raise ServerFailed(error_, self._terms.limits.recovery_timeout, offence=late) from failure
        except Malformed as failure:
            raise self._offence(f"sends what cannot be used: {failure}") from failure
        except Exception as failure:  # an unforeseen failure, caused by this server's reply
            log.exception("the reply of the server %s cannot be read", self.peer_id)
            raise self._offence(f"sends what cannot be read: {quoted(failure)}") from failure
        finally:
            reply.cancel()

    def _read(self, response: runtime_pb2.ExpertResponse, shape: torch.Size) -> torch.Tensor:
        if response.metadata:
            self._abilities = read_abilities(response.metadata, self._abilities)
            self._check_model(self._abilities)
        return read_hidden(response.tensors, shape)

    def _check_model(self, abilities: Abilities) -> None:
        """Refuse a server of another model, before anything that it has computed is used.

        :raises OtherModel: if it reports one; stock servers report nothing
        """
        ours = self._terms.state.fingerprint
        if ours is None or abilities.config is None:
            return
        if difference := ours.difference(Fingerprint(abilities.config, abilities.weights)):
            raise OtherModel(self.peer_id, difference)

    def _offence(self, what: str) -> ServerFailed:
        return ServerFailed(ModelMismatch(f"the server {self.peer_id} {what}"), REFUSAL_PATIENCE, offence=True)

    def _request(self, inputs: torch.Tensor) -> runtime_pb2.ExpertRequest:
        metadata: dict[str, Any] = {}
        if self._streams is None:
            metadata = {"max_length": self._terms.max_length, "args_structure": ARGS_STRUCTURE}
        if self._must_rewind:
            metadata["start_from_position"] = self.processed
            self._must_rewind = False
        return runtime_pb2.ExpertRequest(
            uid=self._uid,
            tensors=[serialize_torch_tensor(inputs), *NO_PROMPTS_AND_HYPOTHESES],
            metadata=MSGPackSerializer.dumps(metadata),
        )

    async def _call(self, request: runtime_pb2.ExpertRequest, limit: int) -> tuple[Any, Any]:
        if self._streams is None:
            handle = TransformerConnectionHandler._get_handle_name(None, "rpc_inference")
            _, *streams = await asyncio.wait_for(
                self._p2p.call_binary_stream_handler(self.peer_id, handle), self._terms.limits.connect_timeout
            )
            self._streams = (streams[0], streams[1])
        reader, writer = self._streams
        if writer.is_closing():  # uvloop would raise a RuntimeError
            raise ConnectionResetError("the connection is closed")
        await P2P.send_protobuf(request, writer)
        return await receive(runtime_pb2.ExpertResponse, reader, limit)

    async def _wait_while_alive(self, reply: asyncio.Future) -> None:
        """Wait for a reply; while it is late, probe whether the server is alive.

        This notices a dead server within seconds, while a slow live one has its full time.

        :raises asyncio.TimeoutError, P2PDaemonError, P2PHandlerError: if the server is silent or too slow
        """
        deadline = time.monotonic() + self._terms.limits.step_timeout
        while not (await asyncio.wait({reply}, timeout=self._terms.limits.probe_after))[0]:
            if time.monotonic() > deadline:
                raise StepTooSlow(f"no answer within {self._terms.limits.step_timeout:.0f} s")
            await self._probe()

    async def _probe(self) -> None:
        """Ask the server whether it is alive; ours also report whether their computing process is.

        :raises asyncio.TimeoutError, P2PDaemonError, P2PHandlerError: if not
        """
        stub = TransformerConnectionHandler.get_stub(self._p2p, self.peer_id)
        uid = self._uid.split(CHAIN_DELIMITER)[0]
        try:
            reply = await stub.rpc_info(runtime_pb2.ExpertUID(uid=uid), timeout=self._terms.limits.probe_timeout)
        except TimeoutError:
            raise TimeoutError(f"silent for {self._terms.limits.probe_timeout:.1f} s") from None
        silent_for = read_silence(reply.serialized_info)
        if silent_for > self._terms.limits.probe_timeout:
            raise TimeoutError(f"its process has been silent for {silent_for:.1f} s")

    def _refusal(self, message: str) -> ServerFailed:
        """Translate a server's error reply into ours. The texts are those of petals 2.2.0.

        :param message: from any peer, as ``clean`` returns it
        """
        if "allocate" in message and "max =" in message:
            error: SwarmError = SessionLengthExceeded(f"the server takes no session this long: {message}")
            return ServerFailed(error, REFUSAL_PATIENCE)
        if "allocate" in message:
            blocks = format_blocks(range(self.start, self.end))
            tokens = self._terms.max_length
            error = CacheFull(f"no attention cache is free for {tokens} tokens on the servers of {blocks}")
            return ServerFailed(error, self._terms.limits.cache_timeout)
        return self._offence(f"refuses: {message}")

    def close(self) -> None:
        """Close the stream, which makes the server free the attention cache. Does not wait."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None
