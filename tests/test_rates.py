"""Sliding windows: what may be used in a minute, reserved and given back, and how little is remembered."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admission.rates import MINUTE, Exceeded, Rates, Window, whole_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_slides() -> None:
    window = Window(3)
    for second in (0, 10, 20):
        window.take(1, 1, second)
    with pytest.raises(Exceeded) as refused:
        window.take(1, 1, 25.5)
    assert refused.value.wait == 34.5
    window.take(1, 1, 60)  # the first counts no more
    with pytest.raises(Exceeded):
        window.take(1, 1, 69)


def test_what_is_given_back_can_be_taken() -> None:
    window = Window(100)
    taken = window.take(90, 90, 0)
    with pytest.raises(Exceeded):
        window.take(20, 20, 30)
    window.give_back(taken, 80)
    window.take(90, 90, 31)
    assert window.used == 100
    window.give_back(taken, 10)
    assert window.used == 90
    window.forget(200)
    window.give_back(taken, 10)  # late
    assert window.used == 0


def test_more_than_a_minutes_worth_counts_for_longer() -> None:
    window = Window(100)
    window.take(250, 250, 0)  # nothing was used: it may
    assert window.wait(1, 0) == 2.5 * MINUTE
    assert window.wait(1, 149.5) == 0.5 and window.wait(1, 150) == 0


def test_what_is_left_can_be_taken() -> None:
    window = Window(100)
    window.take(70, 70, 0)
    assert window.take(500, 10, 1).amount == 30
    with pytest.raises(Exceeded):
        window.take(500, 1, 2)


@given(
    limit=st.integers(1, 50),
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60), st.integers(0, 80)), max_size=60),
)
def test_no_minute_has_more(limit: int, steps: list[tuple[int, int, int]]) -> None:
    """Whoever takes and settles in whatever order gets no more than the limit a minute, on average since they began.

    But for the last: one request may always exceed it, and is paid for afterwards.
    """
    clock = Clock()
    rates = Rates(clock)
    spent, last, began = 0, 0, clock.now
    for pause, wanted, used in steps:
        clock.now += pause
        try:
            taken = rates.take("ann", "tokens", limit, wanted, 1)
        except Exceeded as error:
            assert error.wait > 0
            continue
        minutes = 1 + (clock.now - began) / MINUTE
        assert spent <= limit * (minutes + 1) + last
        rates.settle("ann", "tokens", limit, taken, used)
        spent, last = spent + used, used


def test_clients_and_kinds_do_not_share() -> None:
    rates = Rates(Clock())
    rates.take("ann", "requests", 1)
    rates.take("bob", "requests", 1)
    rates.take("ann", "tokens", 1)
    with pytest.raises(Exceeded):
        rates.take("ann", "requests", 1)


def test_idle_clients_are_forgotten() -> None:
    clock = Clock()
    rates = Rates(clock)
    for number in range(500):
        rates.take(f"address {number}", "requests", 5)
    assert len(rates) == 500
    clock.now += MINUTE + 1
    rates.take("ann", "requests", 5)
    assert len(rates) == 1


def test_there_is_a_bound_for_those_who_are_not_idle() -> None:
    rates = Rates(Clock(), max_clients=10)
    for number in range(100):
        rates.take(f"address {number}", "requests", 5)
        rates.take("ann", "requests", 1000)
    assert len(rates) == 10
    assert rates._windows["ann", "requests"].used == 100


def test_a_window_holds_few_numbers() -> None:
    clock = Clock()
    rates = Rates(clock)
    for _ in range(5000):
        clock.now += 0.05
        rates.take("ann", "requests", 10**6)
    assert len(rates._windows["ann", "requests"]._uses) <= MINUTE + 1


def test_threads() -> None:
    """As many get it as there is room for, whenever they come."""
    rates = Rates(Clock())
    got = []

    def ask() -> None:
        try:
            got.append(rates.take("ann", "tokens", 100, 7))
        except Exceeded:
            pass

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 100 // 7


def test_whole_seconds() -> None:
    assert [whole_seconds(wait) for wait in (0.01, 1, 1.5, 60)] == [1, 1, 2, 60]
