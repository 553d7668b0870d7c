"""A session without HTTP: the lane, budgets, versions and epochs as its users meet them."""

import asyncio
import threading

import numpy as np
import pytest

from gradpost.protocol.dtypes import NUMPY
from kernels.pool import Pool
from service.errors import (
    EpochChanged,
    InFlight,
    InsufficientMemory,
    Internal,
    Nonfinite,
    Overloaded,
    PreconditionFailed,
    SessionGone,
    SessionUnknown,
    ShuttingDown,
    TensorMismatch,
    TooManySessions,
    VersionPending,
)
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import PushControl, parse_spec
from service.sessions import session as module
from service.sessions import update
from service.sessions.conversion import converted
from service.sessions.pushes import Gradient
from service.sessions.registry import Sessions, revision_of
from service.sessions.session import Shared
from service.settings import Settings

TENSORS = [
    ("w", "F32", (3, 2), np.arange(6, dtype=np.float32)),
    ("b", "F32", (), np.ones(1, np.float32)),
]
NOBODY = PushControl(None, None, None, None)


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(params=[-1, module.SMALL], ids=["pool", "loop"])
def sessions(pool, request, monkeypatch):
    monkeypatch.setattr(module, "SMALL", request.param)
    settings = Settings(max_sessions=3, wait_cap_s=1.0)
    return Sessions(Shared(settings, pool, Budget(1 << 20), Metrics()))


def spec(rule="adam", **fields):
    return parse_spec({"optimizer": {"rule": rule}, **fields})[0]


def gradient(values, control=NOBODY, dtype="F32"):
    return Gradient(np.asarray(values, NUMPY[dtype]), dtype, control, lambda: None)


def key(sequence, base=(1, 1)):
    return PushControl("w", sequence, base, None)


def rows_of(pieces):
    """An exported state as it is uploaded."""
    return [(f"{p.slot}/{p.entry.name}", "F32", p.shape, p.flat.copy()) for p in pieces]


async def made(sessions, name="s", **fields):
    session = await sessions.create(name, spec(**fields))
    await session.load(TENSORS, first_only=True)
    return session


def test_the_same_key_is_applied_once_however_often_it_comes(sessions):
    async def scenario():
        session = await made(sessions)
        pushes = [session.push(gradient(np.ones(7), key(1)), hold=False) for _ in range(8)]
        outcomes = await asyncio.gather(*pushes)
        assert session.step == 1
        assert sorted(outcome.replayed for outcome in outcomes) == [False] + [True] * 7
        assert len({outcome.summary for outcome in outcomes}) == 1

    asyncio.run(scenario())


def test_a_key_is_in_flight_only_while_it_commits(sessions, monkeypatch):
    monkeypatch.setattr(module, "SMALL", -1)  # in a thread, where it can be looked at from here
    began, go_on = threading.Event(), threading.Event()
    plain = update._plain

    def slow(*arguments):
        began.set()
        assert go_on.wait(10)
        return plain(*arguments)

    monkeypatch.setattr(update, "_plain", slow)

    async def scenario():
        session = await made(sessions)
        pushing = asyncio.create_task(session.push(gradient(np.ones(7), key(1)), hold=False))
        await asyncio.sleep(0)
        while not began.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            with pytest.raises(InFlight):
                session.precheck(key(1))
        session.precheck(key(2))
        go_on.set()
        assert (await pushing).summary.step == 1
        session.precheck(key(1))  # a replay may come

    asyncio.run(scenario())


def test_a_cancelled_caller_does_not_stop_its_push(sessions, monkeypatch):
    monkeypatch.setattr(module, "SMALL", -1)

    async def scenario():
        session = await made(sessions)
        released = []
        push = Gradient(np.ones(7, np.float32), "F32", key(1), lambda: released.append(True))
        task = asyncio.create_task(session.push(push, hold=False))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.lane.idle()
        assert session.step == 1
        await asyncio.sleep(0)
        assert released == [True]

    asyncio.run(scenario())


AFTER_THE_FIRST_WRITE = {
    "kernel": lambda session: (update, "_plain"),
    "publishing": lambda session: (session.arena.versions, "publish"),
    "the ledger": lambda session: (session.ledger, "record"),
    "the history": lambda session: (session.history, "append"),
    "the metrics": lambda session: (session.shared.metrics, "observe_step"),
}


@pytest.mark.parametrize(
    "where", list(AFTER_THE_FIRST_WRITE.values()), ids=list(AFTER_THE_FIRST_WRITE)
)
def test_a_failure_inside_an_update_breaks_the_session_loudly(sessions, monkeypatch, where):
    def failing(*_, **__):
        raise RuntimeError("it failed")

    async def scenario():
        session = await made(sessions)
        with monkeypatch.context() as patched:
            owner, name = where(session)
            patched.setattr(owner, name, failing)
            with pytest.raises(RuntimeError):
                await session.push(gradient(np.ones(7), key(1)), hold=False)
        with pytest.raises(Internal):
            session.precheck(NOBODY)
        with pytest.raises(Internal):
            await session.hold(None, 0)
        other = await made(sessions, "other")
        assert other.version == 1

    asyncio.run(scenario())


def test_a_failure_before_the_first_write_breaks_nothing(sessions, monkeypatch):
    def no_compiler(*_, **__):
        raise MemoryError

    async def scenario():
        session = await made(sessions)
        with monkeypatch.context() as patched:
            patched.setattr(update.cpu, "kernel", no_compiler)
            with pytest.raises(MemoryError):
                await session.push(gradient(np.ones(7), key(1)), hold=False)
        assert session.step == 0
        outcome = await session.push(gradient(np.ones(7), key(1)), hold=False)
        assert not outcome.replayed

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_a_gradient_that_is_not_finite_changes_no_number(sessions, policy):
    async def scenario():
        session = await made(sessions, on_nonfinite=policy)
        values = np.ones(7)
        values[6] = np.inf
        if policy == "refuse":
            with pytest.raises(Nonfinite) as refused:
                await session.push(gradient(values, key(1)), hold=False)
            assert refused.value.context == {"tensor": "b", "index": 0}
            assert session.ledger.size() == 0
        else:
            outcome = await session.push(gradient(values, key(1)), hold=False)
            assert outcome.summary.skipped == "nonfinite"
            again = await session.push(gradient(values, key(1)), hold=False)
            assert again.replayed
        assert (session.step, session.version) == (0, 1)
        assert session.arena.state[0].max() == 0

    asyncio.run(scenario())


def test_squares_that_overflow_are_not_taken_for_infinities(sessions):
    async def scenario():
        session = await sessions.create("s", spec(dtype="F64", rule="sgd"))
        await session.load([("w", "F64", (2,), np.zeros(2))], first_only=True)
        outcome = await session.push(gradient([1e200, 1.0], dtype="F64"), hold=False)
        assert outcome.summary.applied
        assert outcome.summary.grad_norm is None

    asyncio.run(scenario())


def test_an_infinite_parameter_is_said(sessions):
    async def scenario():
        session = await sessions.create("s", spec(optimizer={"rule": "sgd", "lr": 1e38}))
        await session.load([("w", "F32", (1,), np.ones(1, np.float32))], first_only=True)
        outcome = await session.push(gradient([1e38]), hold=False)
        assert outcome.summary.applied
        assert not outcome.summary.params_finite

    def spec(**fields):
        return parse_spec(fields)[0]

    asyncio.run(scenario())


def test_a_later_upload_keeps_the_moments_and_starts_an_epoch(sessions):
    async def scenario():
        session = await made(sessions)
        await session.push(gradient(np.ones(7), key(1)), hold=False)
        before = session.arena.state[0].copy()
        await session.load([("b", "F32", (), np.full(1, 5, np.float32))], first_only=False)
        assert (session.epoch, session.version, session.step) == (2, 1, 1)
        np.testing.assert_array_equal(session.arena.state[0], before)
        held = await session.hold(None, 0)
        assert held.flat[6] == 5
        assert held.flat[1] != 0
        session.release(held)
        with pytest.raises(EpochChanged):
            await session.push(gradient(np.ones(7), key(2)), hold=False)
        again = await session.push(gradient(np.ones(7), key(1)), hold=False)
        assert again.replayed  # the replay comes before the epoch

    asyncio.run(scenario())


def test_uploads_that_do_not_fit_change_nothing(sessions):
    async def scenario():
        session = await made(sessions)
        used = sessions.shared.budget.used
        with pytest.raises(PreconditionFailed):
            await session.load(TENSORS, first_only=True)
        with pytest.raises(TensorMismatch):
            await session.load([("b", "F32", (1,), np.ones(1, np.float32))], first_only=False)
        bad = [TENSORS[0], ("b", "F32", (), np.full(1, np.nan, np.float32))]
        with pytest.raises(Nonfinite):
            await session.load(bad, first_only=False)
        assert (session.epoch, session.version) == (1, 1)
        assert sessions.shared.budget.used == used
        held = await session.hold(None, 0)
        np.testing.assert_array_equal(held.flat, [0, 1, 2, 3, 4, 5, 1])
        session.release(held)

    asyncio.run(scenario())


def test_memory_is_refused_before_it_is_taken_and_given_back_at_the_end(sessions):
    async def scenario():
        big = await sessions.create("big", spec())
        flat = np.zeros(1 << 18, np.float32)
        with pytest.raises(InsufficientMemory):
            await big.load([("w", "F32", flat.shape, flat)], first_only=True)
        assert big.arena is None
        assert sessions.shared.budget.used == 0
        session = await made(sessions)
        assert sessions.shared.budget.used == 7 * 4 * 5
        held = await session.hold(None, 0)
        await sessions.delete("s")
        assert sessions.shared.budget.used == 7 * 4
        session.release(held)
        assert sessions.shared.budget.used == 0

    asyncio.run(scenario())


def test_state_goes_round_and_training_goes_on_to_the_bit(sessions):
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((6, 7)).astype(np.float32)

    async def scenario():
        one = await made(sessions, "one")
        for values in grads[:3]:
            await one.push(gradient(values), hold=False)
        facts, pieces = await one.export_state()
        held = await one.hold(None, 0)
        two = await sessions.create("two", spec())
        await two.load([("w", "F32", (3, 2), held.flat[:6].copy()),
                        ("b", "F32", (), held.flat[6:].copy())], first_only=True)  # fmt: skip
        one.release(held)
        rows = rows_of(pieces)
        await two.load_state(rows, facts["step"], facts["counts"], {})
        assert (two.step, two.epoch, two.version) == (3, 2, 1)
        for values in grads[3:]:
            await one.push(gradient(values), hold=False)
            await two.push(gradient(values), hold=False)
        np.testing.assert_array_equal(one.arena.versions.head.flat, two.arena.versions.head.flat)
        for ours, theirs in zip(one.arena.state, two.arena.state, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    asyncio.run(scenario())


def test_tensors_updated_equally_often_run_together(sessions):
    async def scenario():
        session = await made(sessions)
        _, pieces = await session.export_state()
        rows = rows_of(pieces)
        await session.load_state(rows, 9, {"w": 9, "b": 2}, {})
        assert [run[2:5] for run in session.arena.runs] == [(0, 6, 9), (6, 7, 2)]
        await session.push(gradient(np.ones(7)), hold=False)
        assert [run[2:5] for run in session.arena.runs] == [(0, 6, 10), (6, 7, 3)]
        with pytest.raises(TensorMismatch):
            await session.load_state(rows, 9, {"w": 9}, {})
        with pytest.raises(TensorMismatch):
            await session.load_state(rows[1:], 9, {"w": 9, "b": 2}, {})

    asyncio.run(scenario())


def test_pulls_wait_for_a_version_and_no_longer_than_asked(sessions):
    async def scenario():
        session = await made(sessions)
        waiting = asyncio.create_task(session.hold((1, 2), 5))
        await asyncio.sleep(0.01)
        await session.push(gradient(np.ones(7)), hold=False)
        held = await waiting
        assert held.number == 2
        session.release(held)
        with pytest.raises(VersionPending):
            await session.hold((1, 9), 0.01)
        with pytest.raises(VersionPending):
            await session.hold((1, 9), 0)

    asyncio.run(scenario())


def test_deleting_wakes_those_who_wait_and_leaves_a_tombstone(sessions):
    async def scenario():
        session = await made(sessions)
        waiting = asyncio.create_task(session.hold((1, 9), 5))
        await asyncio.sleep(0.01)
        await sessions.delete("s")
        with pytest.raises(SessionGone):
            await waiting
        with pytest.raises(SessionGone):
            sessions.get("s")
        with pytest.raises(SessionUnknown):
            sessions.get("t")
        assert (await sessions.create("s", spec())).epoch == 2

    asyncio.run(scenario())


def test_forgotten_tombstones_still_move_the_epoch(sessions, monkeypatch):
    monkeypatch.setattr("service.sessions.registry.TOMBSTONES", 1)

    async def scenario():
        for _ in range(2):
            await sessions.create("a", spec())
            await sessions.delete("a")
        await sessions.create("b", spec())
        await sessions.delete("b")
        assert (await sessions.create("a", spec())).epoch == 3

    asyncio.run(scenario())


def test_the_number_of_sessions_is_bounded(sessions):
    async def scenario():
        for name in "abc":
            await sessions.create(name, spec())
        with pytest.raises(TooManySessions):
            await sessions.create("d", spec())

    asyncio.run(scenario())


def test_if_match_names_a_revision():
    assert revision_of(None) is None
    assert revision_of("*") is None
    assert revision_of('"spec-12"') == 12
    assert revision_of('"1-2-json"') == -1


def test_a_cancelled_push_with_parameters_pins_nothing(sessions, monkeypatch):
    monkeypatch.setattr(module, "SMALL", -1)

    async def scenario():
        session = await made(sessions)
        task = asyncio.create_task(session.push(gradient(np.ones(7), key(1)), hold=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.lane.idle()
        await asyncio.sleep(0)
        assert session.step == 1
        assert session.arena.versions.head.holders == 0

    asyncio.run(scenario())


def test_waits_that_ended_are_forgotten_and_pin_nothing(sessions):
    async def scenario():
        session = await made(sessions)
        for _ in range(3):
            with pytest.raises(VersionPending):
                await session.hold((1, 2), 0.001)
        task = asyncio.create_task(session.hold((1, 2), 5))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not len(session.waiting)
        task = asyncio.create_task(session.hold((1, 2), 5))
        await asyncio.sleep(0)
        await session.push(gradient(np.ones(7)), hold=False)
        task.cancel()  # it has its version, and never gets to use it
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(outcome, asyncio.CancelledError):
            session.release(outcome)
        assert session.arena.versions.head.holders == 0

    asyncio.run(scenario())


def test_a_closed_pool_is_a_stop_and_the_lane_is_not_stuck(sessions, monkeypatch):
    def closed(*_):
        raise RuntimeError("the pool is closed")

    monkeypatch.setattr(module, "SMALL", -1)

    async def scenario():
        session = await made(sessions)
        with monkeypatch.context() as patched:
            patched.setattr(sessions.shared.pool, "submit", closed)
            for _ in range(2):
                with pytest.raises(ShuttingDown):
                    await session.push(gradient(np.ones(7), key(1)), hold=False)
        outcome = await session.push(gradient(np.ones(7), key(1)), hold=False)
        assert not outcome.replayed

    asyncio.run(scenario())


def test_conversions_are_paid_for(sessions):
    async def scenario():
        session = await made(sessions)
        budget = sessions.shared.budget
        held = await session.hold(None, 0)
        entries = session.arena.layout.entries
        used = budget.used
        packed = await converted(session, held, entries, ["F64"] * len(entries))
        assert budget.used == used + 7 * 8
        packed.release()
        assert budget.used == used
        budget.reserve(budget.total - budget.used)
        with pytest.raises(Overloaded):
            await converted(session, held, entries, ["F64"] * len(entries))

    asyncio.run(scenario())
