"""DHT records as a node stores them: which it accepts, how many, and for how long."""

from collections.abc import Callable
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import get_dht_time

from swarm.wire.packing import unpack
from swarm.wire.text import MAX_TEXT, Malformed, quoted

# Petals' servers announce for twice their update period, which is a minute in the public swarm.
MAX_LIFE = 3600.0  # seconds
MAX_RECORD = 2**16  # bytes; an announcement with the pings of 60 neighbours has 4,000
MAX_SUBKEYS = 1024  # servers of one block whose records a node keeps


def unpack_dictionary(data: bytes) -> DictionaryDHTValue:
    """Read a DHT dictionary as another node stores it; each malformed member is left out by itself.

    :raises Malformed: if it is not a dictionary
    """
    match unpack(data):
        case [_, _, list(members)]:
            pass
        case other:
            raise Malformed(f"a dictionary of the DHT is {quoted(other)}")
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():  # the readers check for expiration
        for member in members:
            match member:
                case [subkey, bytes(value), int() | float() as expiration] if is_sane(subkey, value, expiration):
                    dictionary.store(subkey, value, float(expiration))
    return dictionary


def is_sane(subkey: object, value: bytes, expiration: float) -> bool:
    """Whether a member of a DHT dictionary is one that petals' nodes would store: readable, and going to expire."""
    if not isinstance(subkey, str) or len(subkey) > MAX_TEXT or len(value) > MAX_RECORD:
        return False
    if not expiration <= get_dht_time() + MAX_LIFE:  # also refuses NaN
        return False
    try:
        unpack(value)
    except Malformed:
        return False
    return True


class SaneRecords(RecordValidatorBase):
    """Refuses records that petals never makes: plain values, which would block all servers' entries until they expire,
    distant expiration times, and unreadable values.
    """

    def validate(self, record: DHTRecord) -> bool:
        try:
            subkey = unpack(record.subkey)
        except Malformed:
            return False
        return is_sane(subkey, record.value, record.expiration_time)


def bound_subkeys(store: Callable[..., bool]) -> Callable[..., bool]:
    """Return ``DHTLocalStorage.store_subkey`` with a bound on the members of each dictionary."""

    def store_subkey(self: DHTLocalStorage, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        kept = self.get(key)
        dictionary = kept.value if kept is not None else None
        if isinstance(dictionary, DictionaryDHTValue) and subkey not in dictionary and len(dictionary) >= MAX_SUBKEYS:
            return False
        return store(self, key, subkey, value, expiration_time)

    return store_subkey
