"""A model is connected to the node that the program has now, whoever says so first."""

from types import SimpleNamespace
from typing import Any

from swarm.client.membership import Swarm


class FakeNode:
    def __init__(self) -> None:
        self.dht, self.p2p, self.killed = object(), object(), False

    def kill(self) -> None:
        self.killed = True


class FakeState:
    """Where a model is connected to; before that changes for the first time, ``meanwhile`` happens."""

    def __init__(self, dht: object = None) -> None:
        self.manager = SimpleNamespace(dht=dht)
        self.connected = dht is not None
        self.calls = 0
        self.meanwhile: Any = None

    def _interrupt(self) -> None:
        self.calls += 1
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            meanwhile()

    def connect(self, dht: object, p2p: object) -> None:
        self._interrupt()
        self.manager.dht, self.connected = dht, True

    def disconnect(self) -> None:
        self._interrupt()
        self.connected = False


def swarm_of(node: FakeNode | None) -> Any:
    swarm: Any = Swarm()
    swarm._node = node
    return swarm


def test_a_model_that_is_connected_already_is_left_alone() -> None:
    node = FakeNode()
    state: Any = FakeState(node.dht)
    swarm_of(node).follow(state)
    assert state.connected and not state.calls


def test_a_model_that_comes_while_the_program_rejoins_has_the_new_node() -> None:
    first, second = FakeNode(), FakeNode()
    swarm, state = swarm_of(first), FakeState()

    def rejoin() -> None:
        swarm._leave(first)
        swarm._enter(second)

    state.meanwhile = rejoin
    swarm.follow(state)
    assert state.connected and state.manager.dht is second.dht and first.killed


def test_a_model_that_comes_just_before_the_program_has_rejoined_is_connected() -> None:
    node = FakeNode()
    swarm, state = swarm_of(None), FakeState()
    state.meanwhile = lambda: swarm._enter(node)
    swarm.follow(state)
    assert state.connected and state.manager.dht is node.dht


def test_a_model_that_comes_just_before_the_program_drops_out_is_not_connected() -> None:
    node = FakeNode()
    swarm, state = swarm_of(node), FakeState()
    state.meanwhile = lambda: swarm._leave(node)
    swarm.follow(state)
    assert not state.connected


def test_a_node_that_comes_after_the_end_is_killed() -> None:
    """Nobody else would: ``close`` has looked for it already."""
    swarm, node = swarm_of(None), FakeNode()
    lock = swarm._lock

    class EndsFirst:
        def __enter__(self) -> None:
            swarm._closing.set()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    swarm._lock = EndsFirst()
    swarm._enter(node)
    assert node.killed and swarm._node is None
