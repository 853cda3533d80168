"""How long a draft should be: what a step takes with it, by measurement, beside how many of its tokens will be taken.

A draft of k tokens costs what a step of k + 1 rows takes longer than a step of one. Far from the servers that is little
beside the round trip; on one machine, or among many users whose steps are computed together, it may be more than the
draft is worth. Nothing of this is known before it is measured, and it changes: so each time is an average that forgets,
and what is not known is tried. What all drafts have cost, beyond what they were worth, is kept account of, and never
exceeds a small share of all time: that is the bound on what drafting, its experiments included, can slow answers down.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Tokens of a draft: with the token before them, powers of two.
SIZES = (0, 1, 3, 7, 15, 31)
# What drafts may have cost of all time, beyond what they were worth.
SHARE = 0.01
SPARE = 5.0  # seconds; counted as time before there was any, so that experiments can begin
# The share of account and averages that the next step replaces.
FORGOTTEN, NEWEST = 0.002, 0.1
FRESH = 20.0  # seconds after which a time is measured anew, if it can be afforded
RECENT = 16  # steps after which a time is half as good as a new one
LEAST_STEPS = 3  # without a draft, before there are any
# A draft has to be better than none by this factor: times are uncertain.
MARGIN = 1.03
MOST_DRAFTED = 31  # steps with drafts before one without shows again what that takes
# Of one time that is this many times as long as usual, no more is believed: a server was lost, or the machine slept.
OUTLIER = 3.0


@dataclass
class _Time:
    """An average of times that forgets."""

    seconds: float
    count: int
    noted: float  # by the clock
    step: int  # the number of the step in which it was noted

    def add(self, seconds: float, now: float, step: int) -> None:
        """Add a time. The first ones count equally, and after a pause the newest counts most."""
        self.count += 1
        old = 0.5 if step - self.step > RECENT else 0.0
        newest = max(NEWEST, 1 / self.count, old, 1 - math.exp((self.noted - now) / FRESH))
        self.seconds += newest * (min(seconds, OUTLIER * self.seconds) - self.seconds)
        self.noted, self.step = now, step


class Pace:
    """What steps of one model take. Shared by all its answers; thread-safe.

    What others do counts. Steps of several answers are computed together, so what a draft adds to a step is taken to
    delay the others as well.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """:param clock: returns seconds; tests bring their own"""
        self.clock = clock
        self.running = 0  # answers
        self._lock = threading.Lock()
        # By how many answers run (the number of bits of all others), and the number of a size.
        self._times: dict[tuple[int, int], _Time] = {}
        self._steps = 0
        self._drafted = 0  # steps with a draft since the last one without
        self._gain = 1.0  # tokens of a step, on average
        self._total, self._lost = SPARE, 0.0  # seconds

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count the block as an answer that runs."""
        with self._lock:
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    @property
    def _crowd(self) -> int:
        return max(0, self.running - 1).bit_length()

    @property
    def _others(self) -> float:
        """Tokens that the other answers get in the time of a step."""
        return max(0, self.running - 1) * self._gain

    def choose(self, likelihood: float, longest: int, drafting: float = 0.0) -> int:
        """Return how many tokens a draft should have; 0: there should be none.

        :param likelihood: that a token of it is taken, if those before it are
        :param longest: as many as there is room for
        :param drafting: seconds that it takes to make each of its tokens
        """
        with self._lock:
            plain = self._times.get((self._crowd, 0))
            if plain is None or plain.count < LEAST_STEPS or self._drafted >= MOST_DRAFTED:
                return 0
            if self._lost > SHARE * self._total:
                return 0
            others, now = self._others, self.clock()
            best, best_rate = 0, MARGIN * (others + 1) / plain.seconds
            longest_time = plain.seconds
            for number, size in enumerate(SIZES[1:], 1):
                if size > longest:
                    break
                known = self._times.get((self._crowd, number))
                if known is not None and now - known.noted < FRESH:
                    longest_time = max(longest_time, known.seconds)
                rate = (others + expected(likelihood, size)) / (longest_time + size * drafting)
                if rate > best_rate:
                    best, best_rate = size, rate
                if known is None or now - known.noted >= FRESH:
                    break  # one experiment at a time, from small ones to large ones
            return best

    def note(self, size: int, seconds: float, tokens: int, drafting: float = 0.0) -> None:
        """Note a step.

        :param size: tokens of its draft
        :param seconds: that it took
        :param tokens: how many it has given: what was taken of the draft, and one more
        :param drafting: seconds that the draft took
        """
        with self._lock:
            number, now = SIZES.index(size), self.clock()
            self._steps += 1
            known = self._times.get((self._crowd, number))
            if known is None:
                self._times[self._crowd, number] = known = _Time(seconds, 0, now, self._steps)
            usual = known.seconds
            known.add(seconds, now, self._steps)
            self._gain += NEWEST * (tokens - self._gain)
            self._total += min(seconds, OUTLIER * usual) - FORGOTTEN * self._total
            self._lost *= 1 - FORGOTTEN
            self._drafted = self._drafted + 1 if size else 0
            plain = self._times.get((self._crowd, 0))
            if size and plain is not None:
                others = self._others
                worth = plain.seconds * (others + tokens) / (others + 1)
                self._lost = max(0.0, self._lost + min(seconds, OUTLIER * usual) + drafting - worth)


def expected(likelihood: float, size: int) -> float:
    """Return how many tokens a step gives on average.

    :param likelihood: that a token of its draft is taken, if those before it are
    :param size: tokens of the draft
    """
    if likelihood >= 1:
        return size + 1
    return (1 - likelihood ** (size + 1)) / (1 - likelihood)
