"""Everything that comes from a peer is read here: replies, requests, records of the DHT, and texts of errors.

A peer is whoever reaches the swarm. What it sends is checked for size, depth, types, shapes and finiteness before
native or recursive code sees it, with bounds that follow from the session that it is for. Whatever is wrong is
``Malformed``: for a client that is a failure of the server which sent it, for a server a refusal to the client.

``swarm.compat`` puts these functions in the place of hivemind's and petals' own, in every process. This module
therefore imports neither it nor petals while it is loaded.
"""

import asyncio
import contextlib
import math
import reprlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import swarm.lazy_imports  # noqa: F401

import msgpack
import torch
from google.protobuf.message import DecodeError, Message
from hivemind.compression import deserialize_torch_tensor
from hivemind.compression.serialization import _BASE_COMPRESSION_TYPES
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils import MSGPackSerializer, get_dht_time

# A line of a log, and of a chat page.
MAX_TEXT = 200  # characters
MAX_NAME = 100  # characters of a server's name, a version, a session's id
# What is packed goes in one message through p2pd, or in the metadata of one that carries tensors besides.
MAX_PACKED = DEFAULT_MAX_MSG_SIZE  # bytes
# A dictionary of the DHT has a member for each server of a block; nothing else has so many.
MAX_MEMBERS = 2**14
# A record has two levels of tuples, an argument structure has three. A level takes 40 kB of a stack of 8 MB.
MAX_LEVELS = 16
# Petals' servers send NONE, unless they are told otherwise; its 8-bit compressions read where the sender says.
COMPRESSIONS = ("NONE", "FLOAT16", "MEANSTD_16BIT")
COMPRESSION_NAMES = {number: name for name, number in runtime_pb2.CompressionType.items()}
FLOATING = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a value
DTYPES = {**FLOATING, "int64": 8}
MAX_DIMENSIONS = 4  # deep prompts: [blocks, sequences, tokens, hidden size]
MAX_VALUES = 2**32  # more than any message holds, and far from where a product overflows
# Streams are made of pieces of 4 MB. 64 MB are 4,096 tokens of the inputs of a 7B model, or deep prompts of 70 blocks.
MAX_MESSAGE = 64 * 2**20  # bytes
# Beside the tensors of a reply: names of dtypes, metadata, or the text of an error.
SLACK = 64 * 2**10  # bytes
# A client has a stream for each session, and reads or computes one message of each at a time.
MAX_STREAMS = 512  # of one peer to one process
# This program asks for 16 rows at the most; beams and batches of petals' clients are small. All rows of a session are
# in one batch with others' steps, who wait for them.
MAX_ROWS = 64
# Who waits longer for attention cache holds up all who would have room; this program's clients ask again themselves.
MAX_PATIENCE = 10.0  # seconds
MAX_ARGUMENTS = 8  # of a request: hidden states, deep prompts, hypotheses, and what petals may add
# Petals' servers announce for twice their period, which is a minute in the public swarm.
MAX_LIFE = 3600.0  # seconds
MAX_RECORD = 2**16  # bytes; an announcement with the pings of 60 neighbours has 4,000
MAX_SUBKEYS = 1024  # servers of one block that a node keeps records of
MAX_RPS = 1e6  # requests per second; a small block on the best GPU does 10,000 or so
MAX_BLOCKS = 10_000  # of a model
MAX_ADAPTERS = 64
MAX_PINGS = 256


class Malformed(ValueError):
    """What a peer has sent cannot be used. The message says why, in words that are safe to log and to show."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return a peer's text as one line of printable characters; others are escaped, and what is too long is cut."""
    head = text[: limit + 1]
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in head)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def quoted(value: object) -> str:
    """Return what is seen of a peer's value in a message: short, and printable."""
    return clean(reprlib.repr(value))


# Packed values


class _Nesting(threading.local):
    levels = 0


_nesting = _Nesting()


def unpack(data: bytes) -> Any:
    """Return what was packed by hivemind's ``MSGPackSerializer``.

    :raises Malformed: if it cannot be read, is too large or nested too deeply
    """
    if len(data) > MAX_PACKED:
        raise Malformed(f"{len(data)} bytes of packed values are more than {MAX_PACKED}")
    try:
        return msgpack.unpackb(
            data, ext_hook=unpack_extension, raw=False, max_array_len=MAX_MEMBERS, max_map_len=MAX_MEMBERS
        )
    except Malformed:
        raise
    except Exception as error:  # msgpack's own, UnicodeDecodeError, and whatever a registered type raises
        raise Malformed(f"packed values cannot be read: {clean(str(error)) or type(error).__name__}") from None


def unpack_extension(code: int, data: bytes) -> Any:
    """Read a tuple or one of hivemind's registered types; these call ``unpack`` for what is in them.

    :raises Malformed: if it is of another type, or nested too deeply: each level takes its part of the stack
    """
    if _nesting.levels >= MAX_LEVELS:
        raise Malformed(f"packed values are nested more than {MAX_LEVELS} levels deep")
    _nesting.levels += 1
    try:
        if code == MSGPackSerializer._TUPLE_EXT_TYPE_CODE:
            items = unpack(data)
            if not isinstance(items, list):
                raise Malformed(f"a packed tuple holds {quoted(items)}")
            return tuple(items)
        if code in MSGPackSerializer._ext_type_codes:
            return MSGPackSerializer._ext_type_codes[code].unpackb(data)
        raise Malformed(f"packed values of the unknown type {code}")
    finally:
        _nesting.levels -= 1


def unpack_dictionary(data: bytes) -> DictionaryDHTValue:
    """Read a dictionary of the DHT as another node keeps it; members that are not sane are left out, each for itself.

    :raises Malformed: if it is none
    """
    match unpack(data):
        case [_, _, list(members)]:
            pass
        case other:
            raise Malformed(f"a dictionary of the DHT is {quoted(other)}")
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():  # what has expired is looked at by those who read it
        for member in members:
            match member:
                case [subkey, bytes(value), int() | float() as expiration] if is_sane(subkey, value, expiration):
                    dictionary.store(subkey, value, float(expiration))
    return dictionary


def read_metadata(data: bytes) -> dict[str, Any]:
    """Return the metadata of a message.

    :raises Malformed: if it is no dictionary
    """
    metadata = unpack(data) if data else {}
    if not isinstance(metadata, dict):
        raise Malformed(f"metadata must be a dictionary, not {quoted(metadata)}")
    return metadata


def _text(value: object, name: str, limit: int = MAX_NAME) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise Malformed(f"{name} must be a text of at most {limit} characters, not {quoted(value)}")
    return value


def _integer(value: object, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # no bool and no float, which count and compare alike
        raise Malformed(f"{name} must be a whole number from {low} to {high}, not {quoted(value)}")
    return value


def _number(value: object, name: str, low: float = 0.0, high: float = math.inf) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]  # NaN is not between them
        raise Malformed(f"{name} must be a number from {low:g} to {high:g}, not {quoted(value)}")
    return float(value)  # type: ignore[arg-type]


# Messages


@dataclass
class _Sender:
    """What one peer has under way to this process."""

    streams: int = 0
    size: int = 0  # bytes of the messages that are being received


_senders: dict[PeerID, _Sender] = {}
_sender: ContextVar[_Sender | None] = ContextVar("sender", default=None)  # whose stream this task reads
_limits = {"message": MAX_MESSAGE}


def limit_messages(size: int) -> None:
    """Let this process take messages of up to ``size`` bytes, where nothing else is said."""
    _limits["message"] = size


async def receive(kind: type[Message], reader: asyncio.StreamReader, limit: int | None = None) -> tuple[Any, Any]:
    """Receive one of hivemind's messages: (it, None) or (None, the error that the peer answers with).

    :param limit: bytes; default: what the process takes
    :raises Malformed: if it is too large, or cannot be read. The stream is of no use then
    :raises EOFError: if the stream ends
    """
    limit = _limits["message"] if limit is None else limit
    header = await reader.readexactly(1 + P2P.HEADER_LEN)
    marker, size = header[:1], int.from_bytes(header[1:], P2P.BYTEORDER)
    if marker not in (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER):
        raise Malformed(f"{quoted(marker)} begins no message")
    if size > limit:
        raise Malformed(f"a message of {size} bytes is larger than {limit}")
    with _under_way(size):
        data = await reader.readexactly(size)
    message = kind() if marker == P2P.MESSAGE_MARKER else RPCError()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise Malformed(f"a message cannot be read: {clean(str(error))}") from None
    return (message, None) if marker == P2P.MESSAGE_MARKER else (None, message)


@contextlib.contextmanager
def _under_way(size: int) -> Iterator[None]:
    """Count what the peer of this task sends; it may send two of the largest messages at a time.

    :raises Malformed: if that is too much
    """
    sender = _sender.get()
    if sender is None:  # a stream that this process has opened, for one message
        yield
        return
    if sender.size + size > 2 * _limits["message"]:
        raise Malformed(f"messages of {sender.size + size} bytes at a time are more than one peer may send")
    sender.size += size
    try:
        yield
    finally:
        sender.size -= size


def bound_streams(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler of binary streams that takes a bounded number of them from each peer, and closes the others."""

    async def handle(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender = _senders.setdefault(info.peer_id, _Sender())
        if sender.streams >= MAX_STREAMS:
            writer.close()
            return
        sender.streams += 1
        _sender.set(sender)  # for this task, which is the stream's own, and those that it starts
        try:
            await handler(info, reader, writer)
        finally:
            sender.streams -= 1
            if not sender.streams:
                _senders.pop(info.peer_id, None)

    return handle


# Tensors


def check_tensor(tensor: runtime_pb2.Tensor) -> None:
    """Check a serialised tensor before it is read: what it says of itself, against the bytes that are there.

    :raises Malformed: naming what does not fit
    """
    sizes, dtype, kind = tuple(tensor.size), tensor.dtype, tensor.compression
    if dtype not in DTYPES:
        raise Malformed(f"tensors of dtype {quoted(dtype)} are not accepted")
    if len(sizes) > MAX_DIMENSIONS:
        raise Malformed(f"{quoted(sizes)} is no size of a tensor")
    if math.prod(max(1, size) for size in sizes) > MAX_VALUES:
        raise Malformed(f"a tensor of size {quoted(sizes)} is too large")
    values = math.prod(sizes)
    if kind == runtime_pb2.NONE:
        expected = [DTYPES[dtype] * values]
        if dtype == "bfloat16":
            expected.append(4 * values)  # some of hivemind's versions send it as float32
    elif kind not in (runtime_pb2.FLOAT16, runtime_pb2.MEANSTD_16BIT):
        raise Malformed(f"the compression {COMPRESSION_NAMES.get(kind, kind)} is not accepted")
    elif dtype not in ("float32", "float16"):
        raise Malformed(f"{dtype} cannot have been compressed to 16 bits")
    elif kind == runtime_pb2.FLOAT16:
        expected = [2 * values]
    else:  # two float32 for each vector
        expected = [2 * values + 8 * (values // sizes[-1])] if values and sizes else []
    if len(tensor.buffer) not in expected:
        raise Malformed(f"{len(tensor.buffer)} bytes are no tensor of size {quoted(sizes)} and dtype {dtype}")
    if tensor.requires_grad and dtype not in FLOATING:
        raise Malformed(f"tensors of dtype {dtype} have no gradient")


def check_compressions() -> None:
    """Let hivemind read only tensors that ``check_tensor`` lets pass, and refuse the other compressions by name."""
    for name, compression in _BASE_COMPRESSION_TYPES.items():
        if name in COMPRESSIONS:
            compression.extract = _checked(compression.extract)
        else:
            compression.extract = compression.compress = _refusing(name)


def _checked(extract: Callable[[runtime_pb2.Tensor], torch.Tensor]) -> Callable[[runtime_pb2.Tensor], torch.Tensor]:
    def checked(tensor: runtime_pb2.Tensor) -> torch.Tensor:
        check_tensor(tensor)
        return extract(tensor)

    return checked


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise Malformed(f"the compression {name} is not accepted")

    return refuse


def read_tensor(tensor: runtime_pb2.Tensor) -> torch.Tensor:
    """Return a tensor that a peer has sent.

    :raises Malformed: if it cannot be read
    """
    try:
        return deserialize_torch_tensor(tensor).detach()
    except Malformed:
        raise
    except Exception as error:  # numpy's and torch's, of which there are many
        raise Malformed(f"a tensor cannot be read: {clean(str(error))}") from None


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Takes a few microseconds for a token."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # one pass; NaN if there is one. A fifth of the time of `isfinite`
    return math.isfinite(low) and math.isfinite(high)


# Replies of a server


@dataclass(frozen=True)
class Abilities:
    """What a server of this project can do beyond petals; see ``swarm.server.handler``."""

    rewind: bool
    spread: bool


def reply_limit(shape: Sequence[int]) -> int:
    """Return how many bytes a reply with hidden states of this shape may have."""
    return 4 * math.prod(shape) + SLACK


def read_hidden(tensors: Sequence[runtime_pb2.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return the hidden states that a server answers with.

    :param shape: the one that they must have
    :raises Malformed: if there are none, or others, or they are not finite
    """
    if len(tensors) != 1:
        raise Malformed(f"it answers with {len(tensors)} tensors instead of 1")
    (tensor,) = tensors
    if tuple(tensor.size) != tuple(shape):
        raise Malformed(f"it answers with shape {quoted(list(tensor.size))} to {list(shape)}")
    if tensor.dtype not in FLOATING:
        raise Malformed(f"it answers with dtype {quoted(tensor.dtype)}")
    hidden = read_tensor(tensor)
    if not is_finite(hidden):
        raise Malformed("it answers with hidden states that are not finite")
    return hidden


def read_abilities(metadata: bytes) -> Abilities:
    """Return what the first reply of a session tells of the server.

    :raises Malformed: if the metadata cannot be read
    """
    told = read_metadata(metadata)
    rewind, spread = told.get("rewind", False), told.get("spread", False)
    if type(rewind) is not bool or type(spread) is not bool:
        raise Malformed(f"it tells of abilities {quoted(told)}")
    return Abilities(rewind, spread)


def read_silence(info: bytes) -> float:
    """Return from a server's ``rpc_info`` for how many seconds the process that computes has been silent.

    :raises Malformed: if it says nonsense
    """
    return _number(read_metadata(info).get("silent_for", 0.0), "silent_for")


# Requests of a client


@dataclass(frozen=True)
class SessionRequest:
    """What the first request of an inference session asks for."""

    max_length: int  # tokens
    batch_size: int  # sequences
    alloc_timeout: float  # seconds to wait for attention cache
    session_id: str | None
    adapter: str
    # Which tensors of a step are the hidden states, deep prompts and hypotheses; None: as they come.
    arguments: tuple[int, ...] | None


@dataclass(frozen=True)
class StepInputs:
    """What a step of a session brings."""

    start: int  # position of the first token
    hidden: torch.Tensor  # [1 or sequences, tokens, hidden size]
    prompts: torch.Tensor | None  # [blocks, sequences, tokens, hidden size]
    hypotheses: list[int] | None  # which sequence each of the sequences goes on from


def split_uids(text: str, known: Mapping[str, Any], delimiter: str) -> tuple[str, ...]:
    """Return the names of the blocks that a request is for.

    :param known: the blocks that are served here
    :raises Malformed: if there are none, or unknown ones, or some twice
    """
    uids = text.split(delimiter, len(known))
    for uid in uids:
        if uid not in known:
            raise Malformed(f"Remote peer does not serve {quoted(uid)}")
    if len(set(uids)) < len(uids):
        raise Malformed("a request names a block twice")
    return tuple(uids)


def read_session(request: runtime_pb2.ExpertRequest, longest: int) -> SessionRequest:
    """Return what the first request of a session asks for.

    :param longest: tokens of the longest session that the server takes
    :raises Malformed: if there is nothing that could be asked for
    """
    metadata = read_metadata(request.metadata)
    max_length = metadata.get("max_length")
    if type(max_length) is not int or not 0 <= max_length <= longest:
        # The words are petals': clients tell from them what is wrong.
        raise Malformed(f"Cannot allocate KV cache for {quoted(max_length)} tokens, max = {longest}")
    patience = _number(metadata.get("alloc_timeout", 0.0), "alloc_timeout")
    session_id = metadata.get("session_id")
    adapter = metadata.get("active_adapter") or ""
    arguments = read_arguments(metadata.get("args_structure"), len(request.tensors))
    batch_size = 1
    if request.tensors:
        hidden = request.tensors[arguments[0] if arguments else 0]
        batch_size = _integer(next(iter(hidden.size), None), "the number of sequences", 1, MAX_ROWS)
    return SessionRequest(
        max_length,
        batch_size,
        min(patience, MAX_PATIENCE),
        None if session_id is None else _text(session_id, "session_id"),
        _text(adapter, "active_adapter"),
        arguments,
    )


def read_arguments(structure: object, count: int) -> tuple[int, ...] | None:
    """Return the tensors' numbers in the order of the arguments, from petals' ``args_structure``.

    :param count: how many tensors there are
    :raises Malformed: if it is not what petals' clients send: marks of tensors, and no keywords
    """
    if structure is None:
        return None
    match structure:
        case [list() | tuple() as marks, dict() as keywords] if not keywords and 1 <= len(marks) <= MAX_ARGUMENTS:
            return tuple(_tensor_number(mark, count) for mark in marks)
    raise Malformed(f"arguments cannot be structured as {quoted(structure)}")


def _tensor_number(mark: object, count: int) -> int:
    digits = mark[3:] if isinstance(mark, bytes) and mark.startswith(b"__T") else b""
    if not digits.isdigit() or len(digits) > 2 or int(digits) >= count:
        raise Malformed(f"there is no tensor {quoted(mark)} among {count}")
    return int(digits)


def read_step(
    request: runtime_pb2.ExpertRequest,
    metadata: Mapping[str, Any],
    session: SessionRequest,
    *,
    position: int,
    num_blocks: int,
    hidden_size: int,
) -> StepInputs:
    """Return what a step of a session brings.

    :param metadata: the request's
    :param position: how many tokens the session has
    :raises Malformed: if it does not fit the session
    """
    if len(request.tensors) > MAX_ARGUMENTS:
        raise Malformed(f"a step brings {len(request.tensors)} tensors")
    tensors = [read_tensor(tensor) for tensor in request.tensors]
    if session.arguments is not None:
        if max(session.arguments) >= len(tensors):
            raise Malformed(f"a step brings only {len(tensors)} tensors")
        tensors = [tensors[number] for number in session.arguments]
    if len(tensors) < 3:
        raise Malformed(f"a step brings {len(tensors)} of 3: hidden states, deep prompts, hypotheses")
    hidden, prompts, hypotheses = tensors[:3]
    check_inputs(hidden, prompts, hypotheses, (num_blocks, session.batch_size, hidden_size))
    start = rewound(position, metadata.get("start_from_position"))
    check_room(start, hidden.shape[1], session.max_length)
    if not _is_dummy(prompts) and prompts.shape[2] > session.max_length:
        raise Malformed(f"deep prompts of {prompts.shape[2]} tokens exceed the session's {session.max_length}")
    return StepInputs(
        start, hidden, None if _is_dummy(prompts) else prompts, None if _is_dummy(hypotheses) else hypotheses.tolist()
    )


def _is_dummy(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for none, as petals' clients send it."""
    return tensor.numel() == 0


def rewound(position: int, wanted: object) -> int:
    """Return where a step begins.

    :raises Malformed: if the session has not come so far
    """
    if wanted is None:
        return position
    if type(wanted) is not int or not 0 <= wanted <= position:
        raise Malformed(f"cannot start from position {quoted(wanted)}: the session has {position} tokens")
    return wanted


def check_room(position: int, length: int, max_length: int) -> None:
    """Refuse tokens for which there is no attention cache.

    :raises Malformed: telling the numbers
    """
    if position + length > max_length:
        raise Malformed(
            f"Maximum length exceeded: {position} tokens and {length} more exceed the session's {max_length}"
        )


def check_inputs(
    hidden: torch.Tensor, prompts: torch.Tensor, hypotheses: torch.Tensor, sizes: tuple[int, int, int]
) -> None:
    """Refuse what does not fit the session: in a batch it would be others' failure too.

    :param sizes: blocks and sequences of the session, hidden size
    :raises Malformed: naming what does not fit
    """
    num_blocks, batch_size, hidden_size = sizes
    if hidden.ndim != 3 or hidden.shape[0] not in (1, batch_size) or hidden.shape[2] != hidden_size:
        shape = quoted(list(hidden.shape))
        raise Malformed(f"hidden states of shape {shape} are not [{batch_size}, tokens, {hidden_size}]")
    if not hidden.is_floating_point() or not is_finite(hidden):
        raise Malformed("hidden states must be finite numbers")
    if not _is_dummy(prompts):
        wanted = (num_blocks, batch_size, hidden_size)
        if prompts.ndim != 4 or (*prompts.shape[:2], prompts.shape[3]) != wanted:
            sizes_wanted = f"[{num_blocks}, {batch_size}, tokens, {hidden_size}]"
            raise Malformed(f"deep prompts of shape {quoted(list(prompts.shape))} are not {sizes_wanted}")
        if not prompts.is_floating_point() or not is_finite(prompts):
            raise Malformed("deep prompts must be finite numbers")
    if not _is_dummy(hypotheses):
        numbers = hypotheses.tolist() if hypotheses.ndim == 1 and hypotheses.dtype == torch.int64 else []
        if len(numbers) != batch_size or not all(0 <= number < batch_size for number in numbers):
            raise Malformed(f"hypotheses must be {batch_size} numbers of the session's sequences")


def check_call(request: runtime_pb2.ExpertRequest) -> None:
    """Check what petals itself will read of a request.

    :raises Malformed: if it cannot be read
    """
    if len(request.tensors) > MAX_ARGUMENTS:
        raise Malformed(f"a request brings {len(request.tensors)} tensors")
    for tensor in request.tensors:
        check_tensor(tensor)
    read_arguments(read_metadata(request.metadata).get("args_structure"), len(request.tensors))


async def bound_total(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield the pieces of a request that comes as a stream, as long as all together are no more than one may be.

    :raises Malformed: when they are
    """
    size = 0
    async for request in requests:
        size += request.ByteSize()
        if size > _limits["message"]:
            raise Malformed(f"a request of {size} bytes is larger than {_limits['message']}")
        yield request


# Records of the DHT


def is_sane(subkey: object, value: bytes, expiration: float) -> bool:
    """Whether a member of a dictionary of the DHT is what petals' nodes keep there: it can be read, and will expire."""
    if not isinstance(subkey, str) or len(subkey) > MAX_TEXT or len(value) > MAX_RECORD:
        return False
    if not expiration <= get_dht_time() + MAX_LIFE:  # nor NaN
        return False
    try:
        unpack(value)
    except Malformed:
        return False
    return True


class SaneRecords(RecordValidatorBase):
    """Refuses records that petals does not make: plain values, which would stand in the way of all servers' entries
    until they expire, times of expiry that are far away, and values that cannot be read.
    """

    def validate(self, record: DHTRecord) -> bool:
        try:
            subkey = unpack(record.subkey)
        except Malformed:
            return False
        return is_sane(subkey, record.value, record.expiration_time)


def bound_subkeys(store: Callable[..., bool]) -> Callable[..., bool]:
    """Return ``DHTLocalStorage.store_subkey`` for a bounded number of members of each dictionary."""

    def store_subkey(self: DHTLocalStorage, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        kept = self.get(key)
        dictionary = kept.value if kept is not None else None
        if isinstance(dictionary, DictionaryDHTValue) and subkey not in dictionary and len(dictionary) >= MAX_SUBKEYS:
            return False
        return store(self, key, subkey, value, expiration_time)

    return store_subkey


async def read_module_infos(
    dht: Any,
    node: Any,
    uids: Sequence[str],
    active_adapter: str | None,
    expiration_time: float | None,
    latest: bool,
) -> list[Any]:
    """Read who serves which blocks; in the place of petals' function of the same purpose, in the DHT's process.

    Petals' fails with the first record that is of a kind which it has not thought of, for all blocks.
    """
    from petals.data_structures import RemoteModuleInfo  # petals cannot be imported before compat

    workers = len(uids) if dht.num_workers is None else min(len(uids), dht.num_workers)
    wanted = math.inf if latest else get_dht_time() if expiration_time is None else expiration_time
    found = await node.get_many(uids, wanted, num_workers=workers)
    infos = []
    for uid in uids:
        servers = read_announcements(uid, getattr(found[uid], "value", None))
        kept = {peer: info for peer, info in servers.items() if not active_adapter or active_adapter in info.adapters}
        infos.append(RemoteModuleInfo(uid=uid, servers=kept))
    return infos


def read_announcements(uid: str, members: object) -> dict[PeerID, Any]:
    """Return the announcements of a block's servers; what is not sane is left out, each for itself.

    :param members: what the DHT keeps for the block: subkeys to values with times of expiry
    """
    servers: dict[PeerID, Any] = {}
    block = int(uid.rpartition(".")[2])
    if isinstance(members, dict):
        for subkey, member in members.items():
            with contextlib.suppress(Malformed):
                servers[read_peer_id(subkey)] = read_announcement(getattr(member, "value", None), block)
    return servers


def read_peer_id(text: object) -> PeerID:
    """Return the peer whose id this is, in base58.

    :raises Malformed: if it is none
    """
    try:
        peer = PeerID.from_base58(_text(text, "a peer id"))
    except Exception as error:  # base58 raises several kinds
        raise Malformed(f"{quoted(text)} is no peer id") from error
    data = peer.to_bytes()
    # A multihash: SHA-256, or a short public key itself. See the specification of libp2p's peer ids.
    if not (
        len(data) == 34 and data[:2] == b"\x12\x20" or 3 <= len(data) <= 44 and data[:2] == bytes((0, len(data) - 2))
    ):
        raise Malformed(f"{quoted(text)} is no peer id")
    return peer


def read_announcement(value: object, block: int) -> Any:
    """Return what a server announces of itself, as petals' ``ServerInfo``.

    :param value: (state, throughput, the rest)
    :param block: the number of the block under whose key it stands
    :raises Malformed: if it cannot be true
    """
    from petals.data_structures import ServerInfo, ServerState

    match value:
        case [state, throughput]:
            rest: Mapping[Any, Any] = {}
        case [state, throughput, dict(rest), *_]:
            pass
        case _:
            raise Malformed(f"{quoted(value)} is no announcement")
    start, end = rest.get("start_block"), rest.get("end_block")
    if (start, end) != (None, None):
        start = _integer(start, "start_block", 0, block)
        end = _integer(end, "end_block", block + 1, MAX_BLOCKS)
    cache = rest.get("cache_tokens_left")
    relay = rest.get("using_relay")
    return ServerInfo(
        state=ServerState(_integer(state, "state", 0, 2)),
        throughput=min(_number(throughput, "throughput", high=math.inf), MAX_RPS),
        start_block=start,
        end_block=end,
        public_name=_shown_text(rest, "public_name"),
        version=_shown_text(rest, "version"),
        network_rps=_rate(rest, "network_rps"),
        forward_rps=_rate(rest, "forward_rps"),
        inference_rps=_rate(rest, "inference_rps"),
        adapters=_adapters(rest.get("adapters") or ()),
        torch_dtype=_shown_text(rest, "torch_dtype"),
        quant_type=_shown_text(rest, "quant_type"),
        using_relay=relay if isinstance(relay, bool) else None,
        cache_tokens_left=None if cache is None else _integer(cache, "cache_tokens_left", 0, 2**62),
        next_pings=_pings(rest.get("next_pings")),
    )


def _shown_text(announced: Mapping[Any, Any], name: str) -> str | None:
    value = announced.get(name)
    return None if value is None else clean(_text(value, name, MAX_RECORD), MAX_NAME)


def _rate(announced: Mapping[Any, Any], name: str) -> float | None:
    """Return requests per second; what divides by them needs them to be more than nothing."""
    value = announced.get(name)
    return None if value is None else min(_number(value, name, 1 / MAX_RPS), MAX_RPS)


def _adapters(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ADAPTERS:
        raise Malformed(f"adapters must be a list of at most {MAX_ADAPTERS} names")
    return tuple(_text(name, "an adapter", MAX_TEXT) for name in value)


def _pings(value: object) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_PINGS:
        raise Malformed(f"next_pings must be a dictionary of at most {MAX_PINGS} peers")
    return {_text(peer, "a peer id"): _number(ping, "a ping") for peer, ping in value.items()}
