"""Values packed by hivemind: message metadata, DHT records, arguments."""

import math
import threading
from typing import Any

import msgpack
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.utils import MSGPackSerializer

from swarm.wire.text import MAX_NAME, Malformed, clean, quoted

# Packed values travel in one message through p2pd, or in the metadata of one that also carries tensors.
MAX_PACKED = DEFAULT_MAX_MSG_SIZE  # bytes
# A dictionary in the DHT has a member for each server of a block; nothing else has this many.
MAX_MEMBERS = 2**14
# A record has two levels of tuples, an argument structure three. Each level takes 40 kB of a stack of 8 MB.
MAX_LEVELS = 16


class _Nesting(threading.local):
    levels = 0


_nesting = _Nesting()


def unpack(data: bytes) -> Any:
    """Unpack what hivemind's ``MSGPackSerializer`` packed.

    :raises Malformed: if it cannot be read, is too large or is nested too deeply
    """
    if len(data) > MAX_PACKED:
        raise Malformed(f"{len(data)} bytes of packed values are more than {MAX_PACKED}")
    try:
        return msgpack.unpackb(
            data, ext_hook=unpack_extension, raw=False, max_array_len=MAX_MEMBERS, max_map_len=MAX_MEMBERS
        )
    except Malformed:
        raise
    except Exception as error:  # msgpack's own, UnicodeDecodeError, and any that a registered type raises
        raise Malformed(f"packed values cannot be read: {clean(str(error)) or type(error).__name__}") from None


def unpack_extension(code: int, data: bytes) -> Any:
    """Read a tuple or one of hivemind's registered types, which call ``unpack`` for their contents.

    :raises Malformed: if it is of another type or nested too deeply: each level takes some of the stack
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


def read_metadata(data: bytes) -> dict[str, Any]:
    """Return the metadata of a message.

    :raises Malformed: if it is not a dictionary
    """
    metadata = unpack(data) if data else {}
    if not isinstance(metadata, dict):
        raise Malformed(f"metadata must be a dictionary, not {quoted(metadata)}")
    return metadata


def read_text(value: object, name: str, limit: int = MAX_NAME) -> str:
    """Return ``value`` as a text.

    :raises Malformed: if it is not a text or longer than ``limit`` characters
    """
    if not isinstance(value, str) or len(value) > limit:
        raise Malformed(f"{name} must be a text of at most {limit} characters, not {quoted(value)}")
    return value


def read_integer(value: object, name: str, low: int, high: int) -> int:
    """Return ``value`` as a whole number.

    :raises Malformed: if it is not a whole number from ``low`` to ``high``
    """
    if type(value) is not int or not low <= value <= high:  # excludes bool and float, which compare like int
        raise Malformed(f"{name} must be a whole number from {low} to {high}, not {quoted(value)}")
    return value


def read_number(value: object, name: str, low: float = 0.0, high: float = math.inf) -> float:
    """Return ``value`` as a float.

    :raises Malformed: if it is not a number from ``low`` to ``high``
    """
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]  # NaN is not between them
        raise Malformed(f"{name} must be a number from {low:g} to {high:g}, not {quoted(value)}")
    return float(value)  # type: ignore[arg-type]
