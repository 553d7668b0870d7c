"""The store of published versions: who gets which buffer, and what the budget sees."""

import numpy as np
import pytest

from service.limits import Budget
from service.sessions.versions import Versions

SIZE = 1000
BYTES = SIZE * 4


def published(limit=4, budget=None):
    budget = budget or Budget(100 * BYTES)
    budget.reserve(2 * BYTES)
    versions = Versions(SIZE, np.dtype(np.float32), limit, budget)
    first = versions.fresh()
    first[:] = 0
    versions.publish(1, 1, 0, first)
    return versions, budget


def step(versions):
    """What the lane does: reads the head, writes the next version."""
    number = versions.head.number + 1
    before, after = versions.begin()
    after[:] = before + 1
    return versions.publish(1, number, number - 1, after, hold=True)


def test_a_step_is_in_place_while_nobody_holds_the_head():
    versions, _ = published()
    flat = versions.head.flat
    versions.release(step(versions))
    assert versions.head.flat is flat


def test_a_held_version_never_changes():
    versions, _ = published()
    held = versions.hold()
    for _ in range(5):
        versions.release(step(versions))
    assert held.flat.max() == 0
    assert versions.head.flat.min() == 5
    versions.release(held)


def test_no_version_can_be_held_while_a_step_writes_in_place():
    versions, _ = published()
    before, after = versions.begin()
    assert before is after
    assert versions.hold() is None
    versions.publish(1, 2, 1, after)
    assert versions.hold() is not None


def test_at_most_limit_buffers_live_and_the_writer_always_finds_one():
    versions, _ = published(limit=4)
    held = [versions.hold()]
    while (got := step(versions)) is not None:
        held.append(got)
    assert len(held) == 3
    assert versions.hold() is None  # a later pull waits ...
    for _ in range(3):
        assert step(versions) is None  # ... and steps go on
    assert [v.flat[0] for v in held] == [0, 1, 2]
    versions.release(held.pop(0))
    newest = versions.hold()
    assert newest.number == versions.head.number
    assert len({v.flat.ctypes.data for v in [*held, newest]}) == 3


def test_readers_share_a_version():
    versions, _ = published(limit=2)
    one, two = versions.hold(), versions.hold()
    assert one is two
    versions.release(one)
    assert step(versions) is None  # still held, and only one spare: the new head can't be pinned
    assert two.flat.max() == 0
    versions.release(two)
    assert versions.hold().number == 2


def test_extra_buffers_are_paid_for_and_given_back():
    versions, budget = published()
    held = [versions.hold(), step(versions), step(versions)]
    assert budget.used == 4 * BYTES
    for version in held:
        versions.release(version)
    assert budget.used == 2 * BYTES


def test_without_budget_pulls_wait_and_steps_go_on():
    versions, budget = published(budget=Budget(2 * BYTES))
    held = versions.hold()
    assert step(versions) is None
    assert step(versions) is None
    assert budget.used == 2 * BYTES
    versions.release(held)
    assert versions.hold().number == 3


@pytest.mark.parametrize("holders", [0, 1, 2])
def test_close_gives_everything_back_once_the_readers_are_gone(holders):
    versions, budget = published()
    held = [versions.hold() if i == 0 else step(versions) for i in range(holders)]
    versions.close()
    assert budget.used == holders * BYTES
    for version in held:
        versions.release(version)
    assert budget.used == 0
