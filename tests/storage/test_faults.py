"""One fault at each call, in turn: never wrong, never stuck, and what was promised comes back."""

import errno
import os
import sqlite3

import pytest

from service.storage.failures import NoSpace, StorageFailure
from tests.storage.counter import SHAPE, WIDER, Loss, Promise, Scratch, Server, seeded
from tests.storage.disk import Crash, Folder, Mode, Recording

SQLITE = {errno.EIO: sqlite3.SQLITE_IOERR_WRITE, errno.ENOSPC: sqlite3.SQLITE_FULL}
SHORT = "short write"


class Faulty(Recording):
    """The n-th call fails, once."""

    def __init__(self, root, disk, fault, number):
        super().__init__(root, disk)
        self.fault, self.number, self.count = fault, number, -1
        self.synced_by_sqlite = False

    def due(self):
        self.count += 1
        return self.count == self.number

    def step(self):
        if self.dead:
            raise Crash
        if self.due() and self.fault != SHORT:
            number = errno.EIO if self.synced_by_sqlite else self.fault
            raise OSError(number, os.strerror(number))

    def pwrite(self, fd, data, offset):
        if self.fault == SHORT and self.count + 1 == self.number:
            data = data[: len(data) // 2 + 1]
        return super().pwrite(fd, data, offset)

    def pread(self, fd, size, offset):
        return super().pread(fd, size // 2 + 1 if self.fault == SHORT else size, offset)

    def commit(self, connection, site):
        self._sqlite(super().commit, connection, site)

    def checkpoint(self, connection, site):
        self._sqlite(super().checkpoint, connection, site)

    def _sqlite(self, call, connection, site):
        self._fail()
        self.synced_by_sqlite = True  # its own sync never says that the disk is full
        call(connection, site)
        self.synced_by_sqlite = False

    def _fail(self):
        if self.due() and self.fault != SHORT:
            error = sqlite3.OperationalError("a fault")
            error.sqlite_errorcode = SQLITE[self.fault]
            raise error


def script(server):
    """All that an application does, each action a call of its own."""

    def push_b():
        if server.journals["b"].ring is not None:
            server.push("b")

    yield from (
        lambda: server.create("a"),
        lambda: server.push("a", 2),
        lambda: server.patch("a"),
        lambda: server.store.flush(),
        lambda: server.snapshot("a"),
        lambda: server.push("a", 3),
        lambda: server.replace("a"),
        lambda: server.push("a"),
        lambda: server.replace("a", WIDER),
        lambda: server.push("a"),
        lambda: server.create("b", None),
        lambda: server.replace("b", SHAPE),
        push_b,
        lambda: server.delete("b"),
        lambda: server.create("b"),
        push_b,
        lambda: server.store.flush(),
        lambda: server.push("a"),
        lambda: server.close(),
    )


def start(calls, promise, rng):
    """Starts the application; once more if the disk was full or a session could not be read."""
    for _ in range(2):
        try:
            return Server(calls, calls.root / "data", promise, rng)
        except NoSpace:
            pass
        except Loss as loss:
            assert "the disk can't read it" in str(loss)
        calls.abandon()
    raise AssertionError("the fault came twice")


def play(calls, promise, rng):
    """Runs the script and a second life; returns which refusals came."""
    said = set()

    def attempt(action):
        try:
            action()
        except NoSpace:
            said.add(NoSpace)
        except KeyError:
            assert NoSpace in said  # of a session that found no room

    try:
        server = start(calls, promise, rng)
        for action in script(server):
            attempt(action)
        calls.abandon()
        server = start(calls, promise, rng)
        attempt(lambda: server.push("a", 2))
        attempt(server.close)
    except StorageFailure:
        said.add(StorageFailure)
    return said


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, SHORT], ids=str)
def test_one_fault_at_every_call(fault):
    number, said, faults = 0, set(), 0
    while True:
        promise, rng = Promise(), seeded("faults")
        with Scratch() as root:
            calls = Faulty(root, Folder(), fault, number)
            try:
                said |= play(calls, promise, rng)
            finally:
                calls.dead = True
                calls.abandon()
        with Scratch() as root:
            disk = calls.disk.after((Mode.KILL, Mode.LOSE)[number % 2], rng)
            disk.build(root)
            again = Recording(root, disk)
            Server(again, root / "data", promise, rng).close()
            again.abandon()
        if calls.count < number:
            break
        number += 1
        faults += 1
    assert faults > 150
    assert said == {errno.EIO: {StorageFailure}, errno.ENOSPC: {NoSpace, StorageFailure}}.get(
        fault, set()
    )
