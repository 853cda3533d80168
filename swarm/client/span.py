"""One server's part of a session: its blocks, and the stream over which it computes them.

The wire protocol is petals' ``rpc_inference``: one stream per span, and for each step a request with new hidden states
and a reply with as many. A server of this project may get a step from another server instead, and pass its outputs on,
see ``swarm.wire.pushes``. Everything runs on hivemind's event-loop thread.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
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
from swarm.client.stream import Awaited, Refused, Stream
from swarm.client.terms import SessionTerms
from swarm.errors import CacheFull, ModelMismatch, SessionLengthExceeded, SwarmError, SwarmTimeout, format_blocks
from swarm.weights import Fingerprint
from swarm.wire.pushes import KEY_BYTES, Hop, Label, make_permit
from swarm.wire.replies import Abilities, StepNews, read_abilities, read_hidden, read_news, read_silence
from swarm.wire.requests import NO_PROMPTS_AND_HYPOTHESES
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
# What servers that compute in 16 bits make of their inputs, by the names that they announce.
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Numbers of steps, which only grow. All sessions share them, so that a step has one number on all its servers.
STEPS = itertools.count()


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
        # Whether the server takes steps from other servers and passes them on; then its replies name them. One that
        # holds all blocks has nobody to do that with.
        self.can_push = getattr(info.server_info, "pushing", False)
        alone = (info.start, info.end) == (0, terms.state.num_blocks)
        self.pushing = self.can_push and not alone and math.isfinite(terms.limits.push_from)
        trip = terms.state.round_trip(info.peer_id)
        self.far = trip >= terms.limits.push_from
        self._session_id, self._key = secrets.token_hex(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        self._dtype = info.server_info.torch_dtype if self.can_push else None
        # Whether it computes in 16 bits, and is not known to be far.
        self.rounds = info.server_info.torch_dtype in HALVES and not (self.far and math.isfinite(trip))
        self._abilities = Abilities()  # what the server can do; its replies say so
        self._must_rewind = False  # whether the next request must ask it to rewind
        self._terms = terms
        manager = terms.state.manager
        self._p2p: P2P = manager.state.p2p
        self._uid: str = CHAIN_DELIMITER.join(manager.block_uids[info.start : info.end])
        self._stream = Stream(self._p2p, self.peer_id)

    async def step(self, end: int) -> torch.Tensor:
        """Process all tokens of the history before ``end`` that the server has not processed yet, at least one.

        :returns: [1 or rows, n, hidden size], outputs that end with the token before ``end``
        :raises ServerFailed: if the server does not do it
        """
        rows = self._terms.rows
        if rows > 1 and not self.opened:
            await self.open(self.expect_opening(next(STEPS), self.history.read(self.processed, end).shape[2]))
        chunk = PREFILL_CHUNK if rows == 1 or self.spreads else max(1, PREFILL_CHUNK // rows)
        outputs = []
        while self.processed < end:
            inputs = self.history.read(self.processed, min(self.processed + chunk, end))
            awaited = self.expect(next(STEPS), inputs.shape)
            await self.send(inputs, Label(awaited.number, self.processed))
            output, _ = await self.answer(awaited, inputs.shape[0])
            outputs.append(output)
            self.processed += inputs.shape[1]
        if len(outputs) == 1:
            return outputs[0]
        widest = max(output.shape[0] for output in outputs)
        return torch.cat([output.expand(widest, -1, -1) for output in outputs], dim=1)

    @property
    def opened(self) -> bool:
        """Whether the server was asked for a session."""
        return self._stream.is_open

    @property
    def spreads(self) -> bool:
        """Whether the server computes for all rows what is sent once; those that can take pushes do."""
        return self.can_push or self._abilities.spread

    def rewinds_to(self, length: int) -> bool:
        """Whether the server can forget all but its first ``length`` tokens."""
        return self._abilities.rewind and (length == 0 or length >= self._abilities.earliest)

    def truncate(self, length: int) -> None:
        """Have the server forget all but its first ``length`` tokens, with the next step."""
        self.processed, self._must_rewind = length, True

    def expect_opening(self, number: int, width: int) -> Awaited:
        """Return the reply to come to a step without tokens; see ``open``.

        :param number: of the step
        :param width: hidden size
        """
        return self._stream.expect(number, (self._terms.rows, 0, width))

    async def open(self, opening: Awaited) -> None:
        """Open the session, and learn what the server can do, by a step without tokens.

        :param opening: its reply to come
        :raises ServerFailed: if the server has no room, or is lost
        """
        await self.send(torch.empty(opening.shape), Label(opening.number, 0))
        await self.answer(opening, self._terms.rows)

    def expect(self, number: int, shape: Sequence[int]) -> Awaited:
        """Return a reply to come, to a step that is sent later, by this program or a server.

        :param number: of the step, larger than those before
        :param shape: of its inputs: [1 or rows, n, hidden size]
        """
        shared = shape[0] == 1 and not self.spreads
        return self._stream.expect(number, (self._terms.rows, *shape[1:]) if shared else shape)

    def forget(self) -> bool:
        """Give up the steps that are not answered yet; return whether there were any."""
        return self._stream.forget()

    def hop(self, number: int, start: int, tokens: int) -> Hop:
        """Return what lets the server before this one pass a step on.

        :param start: position of its first token
        """
        permit = make_permit(self._key, number, start, tokens)
        return Hop(self.peer_id.to_base58(), self._session_id, self.start, self.end, permit)

    async def send(self, inputs: torch.Tensor, label: Label) -> None:
        """Send a step to the server; its first request opens the session.

        :param inputs: [1 or rows, n, hidden size]
        :raises ServerFailed: if it cannot be sent
        """
        if inputs.shape[0] == 1 and not self.spreads:
            inputs = inputs.expand(self._terms.rows, -1, -1)
        with self._failures():
            request = self._request(inputs, label)
            if not self._stream.is_open:
                await self._stream.open(self._terms.limits.connect_timeout)
            await self._stream.send(request)

    async def answer(self, awaited: Awaited, rows: int) -> tuple[torch.Tensor, StepNews]:
        """Wait for the reply to a step that is on its way.

        :param rows: of its inputs
        :returns: hidden states of their shape, and what the server says of the step
        :raises ServerFailed: if the reply does not come, or anything is wrong with it
        """
        with self._failures():
            await self._wait_while_alive(awaited.response)
            response = awaited.response.result()
            news = StepNews()
            if response.metadata:
                self._abilities = read_abilities(response.metadata, self._abilities)
                self._check_model(self._abilities)
                news = read_news(response.metadata)
            hidden = read_hidden(response.tensors, awaited.shape)
            return hidden[:rows], news

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Let whatever goes wrong be a failure of this server."""
        try:
            yield
        except ServerFailed:
            raise
        except Refused as failure:
            raise self._refusal(str(failure)) from failure
        except (TimeoutError, OSError, EOFError, P2PDaemonError, ControlFailure, P2PHandlerError) as failure:
            reason = clean(str(failure)) or type(failure).__name__
            error = SwarmTimeout(f"the server of {format_blocks(range(self.start, self.end))} was lost: {reason}")
            late = isinstance(failure, StepTooSlow)
            raise ServerFailed(error, self._terms.limits.recovery_timeout, offence=late) from failure
        except Malformed as failure:
            raise self._offence(f"sends what cannot be used: {failure}") from failure
        except Exception as failure:  # an unforeseen failure, caused by this server's reply
            log.exception("the reply of the server %s cannot be read", self.peer_id)
            raise self._offence(f"sends what cannot be read: {quoted(failure)}") from failure

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

    def _request(self, inputs: torch.Tensor, label: Label) -> runtime_pb2.ExpertRequest:
        metadata: dict[str, Any] = {}
        if not self.opened:
            metadata = {"max_length": self._terms.max_length, "args_structure": ARGS_STRUCTURE}
            if self.pushing:
                metadata |= {"session_id": self._session_id, "push_key": self._key}
        if self.pushing:
            metadata |= {"step_id": label.number, "start_from_position": label.start}
            if label.hops:
                metadata["next_servers"] = [hop.packed() for hop in label.hops]
        elif self._must_rewind:
            metadata["start_from_position"] = label.start
        self._must_rewind = False
        if self._dtype in HALVES and inputs.dtype == torch.float32:
            inputs = inputs.to(HALVES[self._dtype])  # as the server would
        return runtime_pb2.ExpertRequest(
            uid=self._uid,
            tensors=[serialize_torch_tensor(inputs), *NO_PROMPTS_AND_HYPOTHESES],
            metadata=MSGPackSerializer.dumps(metadata),
        )

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
        if "cannot go back to position" in message:  # it has computed steps that were given up
            blocks = format_blocks(range(self.start, self.end))
            error = SwarmTimeout(f"the server of {blocks} has lost the session's place: {message}")
            return ServerFailed(error, self._terms.limits.recovery_timeout)
        return self._offence(f"refuses: {message}")

    def close(self) -> None:
        """Close the stream, which makes the server free the attention cache. Does not wait."""
        self._stream.close()
