"""Where the last tokens of a text have stood before: what followed them there may follow again (prompt lookup)."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

# Places that are compared, and tokens of each: so that a look takes the same time, whatever the text is.
PLACES, LONGEST = 16, 32
NOWHERE = 0  # no place: it has nothing before it


class Match(NamedTuple):
    """An earlier place of a text's last tokens."""

    place: int  # of the token that followed them
    length: int  # tokens that are the same, ``LONGEST`` at most


class SuffixIndex:
    """Finds earlier places of a growing text's last tokens.

    A table has the newest place of each pair of tokens, and each place names the one before it, as in deflate (RFC
    1951). So a token is added in constant time.
    """

    def __init__(self) -> None:
        self._token_ids = array("q")
        self._newest: dict[tuple[int, int], int] = {}  # after each pair
        self._earlier = array("q")  # for each place, the one before it after the same pair

    def __len__(self) -> int:
        """How many tokens the text has."""
        return len(self._token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the text."""
        known, newest, earlier = self._token_ids, self._newest, self._earlier
        before, last = (known[-2], known[-1]) if len(known) > 1 else (-1, known[-1] if known else -1)
        for place, token_id in enumerate(token_ids, len(known)):
            pair = before, last
            earlier.append(newest.get(pair, NOWHERE) if place > 1 else NOWHERE)
            if place > 1:
                newest[pair] = place
            before, last = last, token_id
        known.extend(token_ids)

    def match(self) -> Match | None:
        """Return where most of the last tokens have stood before, the newest of such places; None: nowhere."""
        known, best = self._token_ids, None
        if len(known) < 2:
            return None
        place = self._newest.get((known[-2], known[-1]), NOWHERE)
        for _ in range(PLACES):
            if place == NOWHERE:
                break
            length = self._common(place)
            if best is None or length > best.length:
                best = Match(place, length)
            if length == LONGEST:
                break
            place = self._earlier[place]
        return best

    def _common(self, place: int) -> int:
        """Return how many tokens before a place are the text's last ones. The pair is."""
        known, end, length = self._token_ids, len(self._token_ids), 2
        most = min(LONGEST, place)
        while length < most and known[place - 1 - length] == known[end - 1 - length]:
            length += 1
        return length

    def following(self, place: int, count: int) -> list[int]:
        """Return the tokens from a place on; where the text ends, it repeats what it has said since the place."""
        found = self._token_ids[place : place + count].tolist()
        period = len(self._token_ids) - place
        while len(found) < count:
            found.append(found[-period])
        return found
