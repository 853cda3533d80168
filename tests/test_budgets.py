"""Memory that requests share."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from admission.budgets import Budget, Exhausted
from swarm.errors import Cancelled
from tests.support.waiters import Ends


def test_held_and_given_back() -> None:
    budget = Budget(10)
    with budget.hold(6, 1.0), budget.hold(4, 1.0), budget.hold(0, 1.0):
        with pytest.raises(Exhausted, match="1 of 10"), budget.hold(1, 0.0):
            pass
        with pytest.raises(Cancelled), budget.hold(1, 30.0, Ends(lambda: True)):
            pass
    with pytest.raises(KeyError), budget.hold(10, 1.0):
        raise KeyError
    with budget.hold(10, 0.0):
        pass
    with pytest.raises(ValueError, match="11 are more than the 10"), budget.hold(11, 1.0):
        pass


def test_first_come_first_served() -> None:
    """A large request is not overtaken for ever by small ones."""
    budget, order = Budget(10), []

    def use(amount: int) -> None:
        with budget.hold(amount, 30.0):
            order.append(amount)

    with ThreadPoolExecutor(2) as users:
        with budget.hold(5, 1.0):
            large = users.submit(use, 8)
            while not budget._waiting:
                assert not large.done()
            small = users.submit(use, 1)
            while len(budget._waiting) < 2:
                assert not small.done()
            assert order == []
        for user in (large, small):
            user.result(30)
    assert order == [8, 1]
