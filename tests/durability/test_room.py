"""A log that is full for a moment: pushes wait for the next snapshot, and none is refused."""

import asyncio
import threading

import numpy as np

from kernels.pool import Pool
from service.schemas import PushControl, parse_spec
from service.sessions.pushes import Gradient
from tests.sim.driver import Service


def push(session, sequence):
    control = PushControl("a", sequence, (1, 1), None)
    gradient = Gradient(np.ones(4, np.float32), "F32", control, lambda: None)
    return session.push(gradient, hold=False)


async def overtaken(service):
    """Pushes that find the log full just before a snapshot frees a part of it, and ends."""
    spec = {"durability": "log", "log_slots": 8, "optimizer": {"rule": "sgd", "lr": 0.1}}
    session = await service.sessions.create(None, parse_spec(spec)[0])
    await session.load([("w", "F32", (4,), np.zeros(4, np.float32))], first_only=False)
    journal, durable = session.durable.journal, session.durable
    writing, full, freed = threading.Event(), threading.Event(), threading.Event()
    told = threading.Event()
    snapshot, commit, ended = journal.snapshot, durable.commit, session.queue._ended

    def slow(*args, **named):
        writing.set()
        assert full.wait(10)
        done = snapshot(*args, **named)
        freed.set()
        assert told.wait(10)
        return done

    def held(slots):
        commit(slots)
        if writing.is_set():
            full.set()
            assert freed.wait(10)

    def telling(lacking):
        ended(lacking)
        if freed.is_set():
            told.set()

    journal.snapshot, durable.commit, session.queue._ended = slow, held, telling
    await asyncio.gather(*(push(session, number) for number in range(5)))
    assert await asyncio.to_thread(writing.wait, 10)
    await asyncio.gather(*(push(session, number) for number in range(5, 20)))
    assert session.step == 20
    await service.sessions.delete(session.id)


def test_a_snapshot_that_ends_as_the_log_is_full_refuses_nobody(scratch):
    service = Service(Pool(2), scratch / "data")
    try:
        asyncio.run(overtaken(service))
    finally:
        service.close()
