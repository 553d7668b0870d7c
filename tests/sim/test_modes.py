"""Thousands of seeded schedules: a session answers and ends where the model does, to the bit."""

import asyncio
import itertools
import os

import numpy as np
import pytest

from kernels.pool import Pool
from service.sessions import session as module
from service.sessions.durable import Durable
from tests.sim import arithmetic
from tests.sim.contract import Message, Spec, Update
from tests.sim.driver import Service
from tests.sim.play import failure, run, shrunk
from tests.sim.replica import Replicas
from tests.sim.schedule import SIZE, parameters, schedule
from tests.storage.counter import Scratch

CHUNK = 50
FORMS = {
    "sync": ({"mode": "sync"}, 500),
    "worker": ({"mode": "sync", "order": "worker"}, 200),
    "bounded": ({"mode": "bounded"}, 150),
    "async": ({"mode": "async"}, 150),
}
"""What schedules are asked to be, and how many of them there are."""
TIMES = int(os.environ.get("GRADPOST_TEST_SIM", "1"))
"""As many schedules as usual; more in a longer search."""


def chunks(form, many):
    asked = FORMS[form][0]
    return [
        pytest.param(asked, range(first, first + CHUNK), id=f"{form}-{first}")
        for first in range(0, many * TIMES, CHUNK)
    ]


async def first_failure(schedules, make):
    """The first schedule that fails in one long-lived service, if any does."""
    service = make()
    try:
        for one in schedules:
            try:
                await run(one, service)
            except Exception:
                return one
    finally:
        service.close()
    return None


def check(schedules, make=Service):
    failed = asyncio.run(first_failure(schedules, make))
    if failed is not None:
        small = shrunk(failed, lambda one: failure(one, make) is not None)
        pytest.fail(f"seed {failed.seed}: {failure(small, make)}\n{small!r}")


@pytest.mark.parametrize(
    ("asked", "seeds"), [one for form, (_, many) in FORMS.items() for one in chunks(form, many)]
)
def test_a_session_answers_and_ends_as_the_model(asked, seeds):
    check(schedule(seed, **asked) for seed in seeds)


@pytest.mark.parametrize(("asked", "seeds"), [chunks(form, 1)[0] for form in FORMS])
def test_the_same_in_the_threads_of_the_pool(asked, seeds, monkeypatch):
    monkeypatch.setattr(module, "SMALL", -1)
    check((schedule(seed, **asked) for seed in seeds[:20]), lambda: Service(Pool(2)))


@pytest.mark.parametrize(("asked", "seeds"), [chunks(form, 1)[0] for form in FORMS])
def test_the_same_in_sessions_that_log(asked, seeds, monkeypatch):
    groups, commit = [], Durable.commit

    def counted(durable, slots):
        groups.append(len(slots))
        commit(durable, slots)

    monkeypatch.setattr(Durable, "commit", counted)
    with Scratch() as folder:
        names = itertools.count()
        check(
            (schedule(seed, **asked, durability="log") for seed in seeds),
            lambda: Service(folder=folder / str(next(names))),
        )
    assert sum(many > 1 for many in groups) > 100, "one sync makes several durable"


@pytest.mark.parametrize("durability", ["none", "log"])
@pytest.mark.parametrize("order", ["arrival", "worker"])
def test_a_worker_may_leave_beside_its_push(durability, order):
    update = Update("sync", workers=2, order=order)
    spec = Spec(update, durability=durability)

    async def scenario(service):
        for before in ((), ("a",)) * 10:  # its round goes on, or ends with it
            session, values = await service.create(spec, parameters(1)), np.ones(SIZE)
            await session.join("b", None)
            for worker in before:
                await session.push(Message(worker, 1, (1, 1), values))
            pushed = session.push(Message("b", 1, (1, 1), values))
            answer, _ = await asyncio.gather(pushed, session.leave("b"))
            assert answer.slug in (None, "worker-retired")  # whichever came first
            if answer.slug is None and before:
                assert answer.summary["contributions"] == 2
            assert session.live == list(before)
            again = await session.push(Message("b", 2, session.at[:2], values))
            assert again.slug == "worker-retired"
            await session.delete()

    with Scratch() as folder:
        service = Service(Pool(2), folder)
        try:
            asyncio.run(scenario(service))
        finally:
            service.close()


# Many workers are one trainer


async def trained(service, spec, start, orders, gradients):
    """The parameters after each round of a fleet.

    Args:
        orders: Of each round, the workers as they arrive.
        gradients: Gives those of all workers, by name, at some parameters.
    """
    session, found = await service.create(spec, start), [start]
    for number, order in enumerate(orders, 1):
        shards = gradients(found[-1])
        for worker in order:
            values = shards[worker].astype(np.float64)
            answer = await session.push(Message(worker, number, (1, number), values))
            assert answer.slug is None
        assert session.at.step == number
        found.append(session.params)
    return found


async def alone(service, spec, start, gradients, many):
    """The parameters after each step of one trainer that pushes what `gradients` gives."""
    session, found = await service.create(spec, start), [start]
    for _ in range(many):
        values = gradients(found[-1]).astype(np.float64)
        await session.push(Message(None, None, None, values))
        found.append(session.params)
    return found


class Regression:
    """Least squares over equal shards of a data set; gradients in float32.

    Args:
        workers: Names, one for each shard.
    """

    def __init__(self, workers):
        rng = np.random.default_rng(11)
        self.workers = workers
        self.x = rng.standard_normal((len(workers), 8, SIZE)).astype(np.float32)
        self.y = rng.standard_normal((len(workers), 8)).astype(np.float32)

    def of_shards(self, params):
        return {
            name: (2 / 8 * x.T @ (x @ params - y)).astype(np.float32)
            for name, x, y in zip(self.workers, self.x, self.y, strict=True)
        }

    def of_whole(self, params):
        x, y = self.x.reshape(-1, SIZE), self.y.ravel()
        return (2 / y.size * x.T @ (x @ params - y)).astype(np.float32)

    def in_order(self, params):
        shards = self.of_shards(params)
        parts = [(1.0, shards[name].astype(np.float64)) for name in sorted(shards)]
        return arithmetic.weighted(parts, float(len(parts)), "F32")


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("many", [3, 4, 11])
@pytest.mark.parametrize("make", [Replicas, Service])
def test_workers_on_equal_shards_are_one_trainer_on_the_whole_batch(make, many, rule):
    if make is Replicas and rule == "adam":
        pytest.skip("the model knows no adam")
    workers = [f"w{number}" for number in range(many)]  # w10 comes before w2
    data, start, service = Regression(workers), parameters(1), make()
    rng = np.random.default_rng(12)
    orders = [[workers[n] for n in rng.permutation(many)] for _ in range(15)]
    plain = Spec(Update(), rule=rule, lr=0.01)

    async def scenario():
        whole = await alone(service, plain, start, data.of_whole, len(orders))
        for order in ("arrival", "worker"):
            spec = plain._replace(update=Update("sync", workers=many, order=order))
            fleet = await trained(service, spec, start, orders, data.of_shards)
            np.testing.assert_allclose(fleet, whole, rtol=2e-5, atol=2e-6)
        one = await alone(service, plain, start, data.in_order, len(orders))
        for ours, theirs in zip(fleet, one, strict=True):
            assert arithmetic.same_bits(ours, theirs)

    try:
        asyncio.run(scenario())
    finally:
        service.close()
