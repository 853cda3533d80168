"""Take requests as petals' handler does, and compute inference sessions in batches.

The handler speaks petals' ``rpc_inference``, with two additions, which the first response of a session reports in its
metadata. ``rewind``: a step may carry ``start_from_position``, as of petals 2.3; the session drops what follows.
``spread``: hidden states of one sequence stand for all sequences of the session; they are computed once. The metadata
also has ``model``, the hashes of ``swarm.weights.fingerprint``, by which a client sees whether it is the one it wants,
and, in every response that changes it, ``earliest``: how far back the session can go from now on, see
``swarm.server.attention_cache.Reach``.

Sessions may also take steps from other servers and pass theirs on, see ``swarm.server.pushing``. Their responses name
the step, ``step_id``, and say whether it was ``pushed`` and which peers are ``unreachable``.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, AsyncIterator  # noqa: UP035  hivemind recognises streams by this type only

import swarm.compat  # noqa: F401

import torch
from async_timeout import timeout
from hivemind import MSGPackSerializer, serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.asyncio import achain, anext, as_aiter
from petals.data_structures import CHAIN_DELIMITER
from petals.server import handler as petals_handler
from petals.utils.misc import is_dummy

from swarm.lengths import STOCK_LENGTH_GROUPED
from swarm.server.attention_cache import CacheDescriptor, Reach
from swarm.server.channel import HandlerChannel
from swarm.server.pushing import Arrival, Inbox, Outbox, Store
from swarm.wire.messages import MAX_MESSAGE, bound_total, limit_messages
from swarm.wire.packing import read_metadata, read_text
from swarm.wire.requests import (
    SessionRequest,
    StepInputs,
    check_call,
    read_arguments,
    read_session,
    read_step,
    split_uids,
)
from swarm.wire.text import Malformed

log = logging.getLogger(__name__)

# Of a session of a stock client: a server pushes a step once it has answered its own, so one is waited for and one may
# be on its way.
MAX_PUSHED = 4
# Pushes on their way from the handler that takes them to the one that has the session.
MAX_ROUTED = 32


class TransformerConnectionHandler(petals_handler.TransformerConnectionHandler):
    """Petals' handler, which reports more. Its name is part of the wire protocol, so it stays."""

    # Shared memory, because each handler is a separate process.
    inference_tokens: Any  # tokens received for inference
    heartbeat: Any  # last time.monotonic() of the computing process
    # To the batcher; None if petals alone computes this server's blocks. Set before the process starts.
    channel: HandlerChannel | None = None
    cache_descriptor: Any  # see RaggedBlocks
    batches: Any  # batches computed
    model: Mapping[str, str] = {}  # hashes of its configuration and, if known, its weights
    pushes = Store()  # of all sessions of this process

    async def add_p2p_handlers(self, *args: Any, **kwargs: Any) -> None:
        hidden_size = next(iter(self.module_backends.values())).outputs_schema[0].shape[-1]
        # A step may bring all the tokens of a session that a stock server takes, and deep prompts besides.
        limit_messages(MAX_MESSAGE + 4 * hidden_size * min(self.inference_max_length, STOCK_LENGTH_GROUPED))
        if self.channel is not None:
            await self.channel.connect()
        await super().add_p2p_handlers(*args, **kwargs)

    async def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: petals_handler.P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Serve one inference session: in batches, or by petals if it wants an adapter."""
        async with timeout(self.session_timeout):
            request = await asyncio.wait_for(anext(requests), self.step_timeout)
            session = read_session(request, self.inference_max_length)
            responses: Any
            batched = False
            if self.channel is not None and not session.adapter and self._follow_each_other(request.uid):
                batched = True
                responses = self._serve_session(self.channel, request, session, requests, context)
            else:
                metadata = {**read_metadata(request.metadata), "alloc_timeout": session.alloc_timeout}
                if session.push_key is not None:
                    del metadata["session_id"]  # petals would take pushes, whoever sends them
                request.metadata = MSGPackSerializer.dumps(metadata)
                responses = super().rpc_inference(achain(as_aiter(request), requests), context)
            async with contextlib.aclosing(responses):  # once the client is gone, not at garbage collection
                first = {"rewind": batched, "spread": batched, "model": dict(self.model)}
                async for response in responses:
                    if first:
                        response.metadata = MSGPackSerializer.dumps(first | read_metadata(response.metadata))
                        first = {}
                    yield response

    def _follow_each_other(self, uids: str) -> bool:
        """Whether these are consecutive blocks of this server, as any sane client's session needs."""
        return f"{CHAIN_DELIMITER}{uids}{CHAIN_DELIMITER}" in CHAIN_DELIMITER.join(["", *self.module_backends, ""])

    def _check_uids(self, uids: str) -> tuple[str, ...]:
        return split_uids(uids, self.module_backends, CHAIN_DELIMITER)

    async def _serve_session(
        self,
        channel: HandlerChannel,
        request: runtime_pb2.ExpertRequest,
        wanted: SessionRequest,
        requests: AsyncIterator[runtime_pb2.ExpertRequest],
        context: petals_handler.P2PContext,
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        uids = self._check_uids(request.uid)
        self._log_request("rpc_inference.open", uids, context)
        first = list(self.module_backends).index(uids[0])
        memory_cache = self.module_backends[uids[0]].memory_cache
        session = None
        inbox = None if wanted.push_key is None else Inbox(request.uid, wanted.push_key, self.pushes)
        try:
            descriptor = self.cache_descriptor(first, first + len(uids), wanted.batch_size, wanted.max_length)
            async with memory_cache.allocate_cache(descriptor, timeout=wanted.alloc_timeout) as (handle,):
                session = await channel.open(handle, first, first + len(uids))
                if inbox is None:
                    steps: Any = self._iterate_stock_steps(request, requests, wanted.session_id, uids, context)
                else:
                    steps = self._iterate_steps(inbox, request, requests, wanted.session_id)
                responses: Any = self._compute_steps(channel, session, steps, wanted, descriptor, inbox)
                async with contextlib.aclosing(steps), contextlib.aclosing(responses):
                    async for response in responses:
                        yield response
        finally:
            if session is not None:
                await channel.close(session)  # after its cache is freed, so that the memory is returned at once
            self._log_request("rpc_inference.close", uids, context)

    async def _compute_steps(
        self,
        channel: HandlerChannel,
        session: int,
        steps: AsyncIterator[Arrival],
        wanted: SessionRequest,
        descriptor: CacheDescriptor,
        inbox: Inbox | None,
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        position, reach, told = 0, Reach(descriptor), 0
        num_blocks = len(descriptor.windows)
        schema = next(iter(self.module_backends.values())).outputs_schema[0]
        with contextlib.closing(Outbox(self._send_push, self.dht_prefix)) as outbox:
            async for arrival in steps:
                try:
                    step = read_step(
                        arrival.request,
                        arrival.metadata,
                        wanted,
                        position=position,
                        num_blocks=num_blocks,
                        hidden_size=schema.shape[-1],
                        earliest=reach.earliest,
                    )
                except Malformed as error:
                    if not arrival.pushed:
                        raise
                    log.debug("a push was refused: %s", error)  # the client sends the step itself
                    continue
                if inbox is not None and arrival.label is not None:
                    inbox.newest = arrival.label.number
                hidden = await compute_step(channel, session, step)
                position = step.start + hidden.shape[1]
                if inbox is not None:
                    inbox.position = position
                reach.advance(step.start, position)
                output = serialize_torch_tensor(hidden.to(schema.dtype), schema.compression, allow_inplace=True)
                if arrival.label is not None and arrival.label.hops and step.prompts is step.hypotheses is None:
                    outbox.push(arrival.label, step.start, output)
                    await asyncio.sleep(0)  # the push goes first: others wait for it longer
                news = describe(arrival, outbox.take_unreachable())
                if reach.earliest != told:
                    news["earliest"] = told = reach.earliest
                metadata = MSGPackSerializer.dumps(news) if news else b""
                yield runtime_pb2.ExpertResponse(tensors=[output], metadata=metadata)

    async def _iterate_stock_steps(self, *args: Any) -> AsyncIterator[Arrival]:
        """Yield the steps of a session that has no key, as those of stock clients."""
        async for request, metadata in self._iterate_inference_steps(*args):
            yield Arrival(request, metadata)

    async def _iterate_inference_steps(self, *args: Any) -> AsyncIterator[tuple[Any, dict]]:
        async for request, metadata in super()._iterate_inference_steps(*args):
            self._note(request)
            yield request, metadata

    async def _iterate_steps(
        self,
        inbox: Inbox,
        request: runtime_pb2.ExpertRequest,
        requests: AsyncIterator[runtime_pb2.ExpertRequest],
        session_id: str | None,
    ) -> AsyncIterator[Arrival]:
        """Yield the steps of a session that takes pushes."""
        assert session_id is not None  # one with a key has a name, see `read_session`
        with self._managed_session(session_id):
            self._session_queues[session_id] = inbox
            arrivals: Any = inbox.arrivals(request, requests, self.step_timeout)
            async with contextlib.aclosing(arrivals):
                async for arrival in arrivals:
                    self._note(arrival.request)
                    yield arrival

    def _note(self, request: runtime_pb2.ExpertRequest) -> None:
        """Check the parts of a step that are read first, and count its tokens."""
        check_call(request)
        batch_size, length = (*request.tensors[0].size, 0, 0)[:2]
        with self.inference_tokens.get_lock():
            self.inference_tokens.value += batch_size * length

    async def _send_push(self, peer_id: PeerID, request: runtime_pb2.ExpertRequest) -> None:
        await self.get_stub(self._p2p, peer_id).rpc_push(request)

    @contextlib.contextmanager
    def _managed_session(self, session_id: str) -> Iterator[None]:
        with super()._managed_session(session_id):
            self._session_queues[session_id] = Pushes()
            yield

    async def rpc_push(
        self, request: runtime_pb2.ExpertRequest, context: petals_handler.P2PContext
    ) -> runtime_pb2.ExpertResponse:
        check_call(request)
        read_text(read_metadata(request.metadata).get("session_id"), "session_id")
        return await super().rpc_push(request, context)

    def _put_into_session_queue(self, session_id: str, request: runtime_pb2.ExpertRequest) -> None:
        """Give a push to the handler that has the session, if that handler takes what it gets."""
        index = self._session_handlers.get(session_id)
        if index in (None, self._handler_index) or waiting_in(self._handler_event_queues[index]) < MAX_ROUTED:
            super()._put_into_session_queue(session_id, request)

    async def rpc_forward(
        self, request: runtime_pb2.ExpertRequest, context: petals_handler.P2PContext
    ) -> runtime_pb2.ExpertResponse:
        check_call(request)
        return await super().rpc_forward(request, context)

    async def rpc_backward(
        self, request: runtime_pb2.ExpertRequest, context: petals_handler.P2PContext
    ) -> runtime_pb2.ExpertResponse:
        check_call(request)
        return await super().rpc_backward(request, context)

    async def _gather_inputs(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: petals_handler.P2PContext
    ) -> tuple[str, list[torch.Tensor], dict]:
        bounded = bound_total(requests)
        uids, tensors, metadata = await super()._gather_inputs(bounded, context)
        read_arguments(metadata.get("args_structure"), len(tensors))
        return uids, tensors, metadata

    async def rpc_info(
        self, request: runtime_pb2.ExpertUID, context: petals_handler.P2PContext
    ) -> runtime_pb2.ExpertInfo:
        info = MSGPackSerializer.loads((await super().rpc_info(request, context)).serialized_info)
        info["inference_tokens"] = self.inference_tokens.value
        info["model"] = dict(self.model)
        # A handler answers even if the computing process is stopped or hangs, and waiting clients must learn of that.
        info["silent_for"] = time.monotonic() - self.heartbeat.value
        info["rewind"] = info["batching"] = self.channel is not None
        if self.channel is not None:
            info["inference_batches"] = self.batches.value
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))


class Pushes(asyncio.Queue):
    """Steps that other servers have pushed to a session. Drop all but a few: the client sends them too."""

    def put_nowait(self, item: Any) -> None:
        if item is None or self.qsize() < MAX_PUSHED:  # None marks the end
            super().put_nowait(item)


async def compute_step(channel: HandlerChannel, session: int, step: StepInputs) -> torch.Tensor:
    """Have the batcher compute a step; a client may send no tokens, to see whether the session has room."""
    if not step.hidden.numel():
        return step.hidden
    prompts = None if step.prompts is None else split_prompts(step.prompts.to(channel.dtype))
    return await channel.step(session, step.start, step.hidden.to(channel.dtype), prompts, step.hypotheses)


def describe(arrival: Arrival, unreachable: list[str]) -> dict[str, Any]:
    """Return what a response says of the step that it answers."""
    news: dict[str, Any] = {}
    if arrival.label is not None:
        news["step_id"] = arrival.label.number
    if arrival.pushed:
        news["pushed"] = True
    if unreachable:
        news["unreachable"] = unreachable
    return news


def waiting_in(queue: Any) -> int:
    """Return how many events wait in a queue between processes."""
    try:
        return queue.qsize()
    except NotImplementedError:  # macOS cannot tell
        return 0


def shorten_malformed(record: logging.LogRecord) -> bool:
    """Drop the traceback from the record of a malformed request: its sender has got the error."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, Malformed):
        record.msg, record.args, record.exc_info = "a request was refused: %s", (error,), None
    return True


for _name in ("hivemind.p2p.p2p_daemon", "petals.server.handler"):
    logging.getLogger(_name).addFilter(shorten_malformed)


def split_prompts(prompts: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the deep prompts of each block; None for a block without.

    :param prompts: [blocks, sequences, tokens, hidden size]
    """
    return [None if is_dummy(prompt) else prompt for prompt in prompts.unbind(0)]
