"""How a server of this project takes requests: petals' handler, whose inference sessions are computed in batches.

What it speaks is petals' ``rpc_inference``, and beyond that two things, which the first answer of a session tells of in
its metadata. ``rewind``: a step may carry ``start_from_position``, as of petals 2.3; the session forgets what follows.
``spread``: hidden states of one sequence stand for all sequences of the session; they are computed once.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, AsyncIterator  # noqa: UP035  hivemind knows streams by this type only

import swarm.compat  # noqa: F401

import torch
from async_timeout import timeout
from hivemind import MSGPackSerializer, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.asyncio import achain, anext, as_aiter
from petals.data_structures import CHAIN_DELIMITER
from petals.server import handler as petals_handler
from petals.utils.misc import is_dummy
from petals.utils.packaging import unpack_args_kwargs

from swarm.batching import HandlerLine

# What the first answer of a session says of the server; see the module's docstring.
ABILITIES = MSGPackSerializer.dumps({"rewind": True, "spread": True})


class TransformerConnectionHandler(petals_handler.TransformerConnectionHandler):
    """Petals' handler, which tells more. The class keeps its name because the name is part of the wire protocol."""

    # Shared, because each handler is a process of its own.
    inference_tokens: Any  # tokens received for inference
    heartbeat: Any  # time.monotonic() of the computing process, as it last told
    # To the batcher; None if this server's blocks are computed by petals alone. Set before the process begins.
    line: HandlerLine | None = None
    cache_descriptor: Any  # see RaggedBlocks
    batches: Any  # batches computed

    async def add_p2p_handlers(self, *args: Any, **kwargs: Any) -> None:
        if self.line is not None:
            await self.line.connect()
        await super().add_p2p_handlers(*args, **kwargs)

    async def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: petals_handler.P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Serve one inference session: in batches, or by petals if it wants an adapter."""
        async with timeout(self.session_timeout):
            request = await asyncio.wait_for(anext(requests), self.step_timeout)
            metadata = MSGPackSerializer.loads(request.metadata) if request.metadata else {}
            responses: Any
            if self.line is not None and not metadata.get("active_adapter") and self._follow_each_other(request.uid):
                responses = self._serve_session(self.line, request, metadata, requests, context)
            else:
                responses = super().rpc_inference(achain(as_aiter(request), requests), context)
            async with contextlib.aclosing(responses):  # at once when the client is gone, not when it is collected
                async for response in responses:
                    yield response

    def _follow_each_other(self, uids: str) -> bool:
        """Whether blocks are served here one after the other, as a session of any sane client needs them."""
        return f"{CHAIN_DELIMITER}{uids}{CHAIN_DELIMITER}" in CHAIN_DELIMITER.join(["", *self.module_backends, ""])

    async def _serve_session(
        self,
        line: HandlerLine,
        request: runtime_pb2.ExpertRequest,
        metadata: dict[str, Any],
        requests: AsyncIterator[runtime_pb2.ExpertRequest],
        context: petals_handler.P2PContext,
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        uids = self._check_uids(request.uid)
        self._log_request("rpc_inference.open", uids, context)
        max_length = metadata.get("max_length")
        if not isinstance(max_length, int) or not 0 <= max_length <= self.inference_max_length:
            # The words are petals': clients tell from them what is wrong.
            raise ValueError(f"Cannot allocate KV cache for {max_length} tokens, max = {self.inference_max_length}")
        first = list(self.module_backends).index(uids[0])
        memory_cache = self.module_backends[uids[0]].memory_cache
        batch_size = request.tensors[0].size[0] if request.tensors else 1
        session = None
        try:
            descriptor = self.cache_descriptor(len(uids), batch_size, max_length)
            patience = float(metadata.get("alloc_timeout", 0.0))
            async with memory_cache.allocate_cache(descriptor, timeout=patience) as (handle,):
                session = await line.open(handle, first, first + len(uids))
                steps: Any = self._iterate_inference_steps(request, requests, metadata.get("session_id"), uids, context)
                sizes = len(uids), batch_size
                responses: Any = self._compute_steps(line, session, steps, metadata, max_length, sizes)
                async with contextlib.aclosing(steps), contextlib.aclosing(responses):
                    async for response in responses:
                        yield response
        finally:
            if session is not None:
                await line.close(session)  # after its cache was given back, so that the memory is free at once
            self._log_request("rpc_inference.close", uids, context)

    async def _compute_steps(
        self,
        line: HandlerLine,
        session: int,
        steps: AsyncIterator[tuple[runtime_pb2.ExpertRequest, dict[str, Any]]],
        metadata: dict[str, Any],
        max_length: int,
        sizes: tuple[int, int],
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        position, abilities = 0, ABILITIES
        num_blocks, batch_size = sizes
        schema = next(iter(self.module_backends.values())).outputs_schema[0]
        async for request, step in steps:
            tensors: Sequence[Any] = [deserialize_torch_tensor(tensor) for tensor in request.tensors]
            if (structure := metadata.get("args_structure")) is not None:
                tensors, _ = unpack_args_kwargs(tensors, structure)
            hidden, prompts, hypotheses, *_ = tensors
            check_inputs(hidden, prompts, hypotheses, (num_blocks, batch_size, schema.shape[-1]))
            position = rewound(position, step.get("start_from_position"))
            length = hidden.shape[1]
            check_room(position, length, max_length)
            if hidden.numel() > 0:  # a client may send no tokens, only to see whether there is room for the session
                hidden = await line.step(
                    session,
                    position,
                    hidden.to(line.dtype),
                    None if prompts is None or is_dummy(prompts) else split_prompts(prompts.to(line.dtype)),
                    None if is_dummy(hypotheses) else hypotheses.tolist(),
                )
            position += length
            output = serialize_torch_tensor(hidden.to(schema.dtype), schema.compression, allow_inplace=True)
            yield runtime_pb2.ExpertResponse(tensors=[output], metadata=abilities)
            abilities = b""

    async def _iterate_inference_steps(self, *args: Any) -> AsyncIterator[tuple[Any, dict]]:
        async for request, metadata in super()._iterate_inference_steps(*args):
            batch_size, length = (*request.tensors[0].size, 0, 0)[:2]
            with self.inference_tokens.get_lock():
                self.inference_tokens.value += batch_size * length
            yield request, metadata

    async def rpc_info(
        self, request: runtime_pb2.ExpertUID, context: petals_handler.P2PContext
    ) -> runtime_pb2.ExpertInfo:
        info = MSGPackSerializer.loads((await super().rpc_info(request, context)).serialized_info)
        info["inference_tokens"] = self.inference_tokens.value
        # A handler answers even if the process that computes is stopped or hangs: a waiting client must learn of it.
        info["silent_for"] = time.monotonic() - self.heartbeat.value
        info["rewind"] = info["batching"] = self.line is not None
        if self.line is not None:
            info["inference_batches"] = self.batches.value
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))


def rewound(position: int, wanted: int | None) -> int:
    """Return where a step begins.

    :raises ValueError: if the session has not come so far
    """
    if wanted is None:
        return position
    if not 0 <= wanted <= position:
        raise ValueError(f"cannot start from position {wanted}: the session has {position} tokens")
    return wanted


def check_room(position: int, length: int, max_length: int) -> None:
    """Refuse tokens for which there is no attention cache.

    :raises ValueError: telling the numbers
    """
    if position + length > max_length:
        raise ValueError(
            f"Maximum length exceeded: {position} tokens and {length} more exceed the session's {max_length}"
        )


def check_inputs(hidden: torch.Tensor, prompts: Any, hypotheses: torch.Tensor, sizes: tuple[int, int, int]) -> None:
    """Refuse what does not fit the session: in a batch it would be others' failure too.

    :param sizes: blocks and sequences of the session, hidden size
    :raises ValueError: naming what does not fit
    """
    num_blocks, batch_size, hidden_size = sizes
    if hidden.ndim != 3 or hidden.shape[0] not in (1, batch_size) or hidden.shape[2] != hidden_size:
        raise ValueError(f"hidden states of shape {list(hidden.shape)} are not [{batch_size}, tokens, {hidden_size}]")
    if prompts is not None and not is_dummy(prompts):
        wanted = (num_blocks, batch_size, hidden_size)
        if prompts.ndim != 4 or (*prompts.shape[:2], prompts.shape[3]) != wanted:
            sizes_wanted = f"[{num_blocks}, {batch_size}, tokens, {hidden_size}]"
            raise ValueError(f"deep prompts of shape {list(prompts.shape)} are not {sizes_wanted}")
    if not is_dummy(hypotheses):
        numbers = hypotheses.tolist() if hypotheses.ndim == 1 and hypotheses.dtype == torch.int64 else []
        if len(numbers) != batch_size or not all(0 <= number < batch_size for number in numbers):
            raise ValueError(f"hypotheses must be {batch_size} numbers of the session's sequences")


def split_prompts(prompts: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the deep prompts of each block, or None where it has none.

    :param prompts: [blocks, sequences, tokens, hidden size]
    """
    return [None if is_dummy(prompt) else prompt for prompt in prompts.unbind(0)]
