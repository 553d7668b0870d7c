"""Eight mebibytes that help once, and are there again."""

import sqlite3

import pytest

from service.storage.ballast import SIZE
from service.storage.failures import NoSpace
from service.storage.files import Calls, Files
from service.storage.store import Store
from tests.storage.test_store import create, push, reopened


class Filled(Calls):
    """A disk that is full as long as the ballast lies on it."""

    def __init__(self, ballast):
        self.ballast = ballast
        self.full = False

    def commit(self, connection, site):
        if self.full and self.ballast.exists():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        super().commit(connection, site)


@pytest.fixture
def ballast(scratch):
    return scratch / "data" / "ballast"


@pytest.fixture
def calls(ballast):
    return Filled(ballast)


@pytest.fixture
def store(scratch, calls):
    store = Store(scratch / "data", Files(calls))
    assert store.recover().notes == []
    yield store
    store.close()


def test_a_start_makes_it(ballast, store):
    assert ballast.stat().st_blocks * 512 >= SIZE == 8 << 20


def test_a_deletion_on_a_full_disk(scratch, ballast, calls, store):
    journal, other = create(store), create(store, "b")
    push(other)
    calls.full = True
    with pytest.raises(NoSpace):
        other.snapshot(1, [b"x"], epoch=1, kernel_rev="r")
    journal.delete(epoch=4)
    assert ballast.stat().st_size == SIZE, "the deletion made room for another one"
    calls.full = False
    store.close()
    again, recovery = reopened(scratch)
    assert recovery.tombstones == {"a": 4}
    assert list(recovery.sessions) == ["b"]
    again.close()


def test_it_is_made_again_when_there_is_room(scratch, ballast, calls, store):
    journals = [create(store, name) for name in ("a", "b", "c")]
    calls.full = True

    def full(fd, size):
        raise OSError(28, "No space left on device")

    calls.allocate = full
    for journal in journals[:2]:
        journal.delete(epoch=1)
        assert not ballast.exists()
    del calls.allocate
    journals[2].delete(epoch=1)
    assert ballast.stat().st_size == SIZE
    ballast.unlink()
    store.close()
    reopened(scratch)[0].close()
    assert ballast.stat().st_size == SIZE


def test_where_there_is_none_a_full_disk_refuses(ballast, calls, store):
    journal = create(store)
    ballast.unlink()

    def fail(*_):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    calls.commit = fail
    with pytest.raises(NoSpace):
        journal.delete(epoch=1)
    del calls.commit
    assert push(journal) == 1
    journal.delete(epoch=1)


def test_a_start_on_a_full_disk(scratch, ballast, calls, store):
    push(create(store))
    store.close()
    calls.full = True
    again = Store(scratch / "data", Files(calls))
    assert not ballast.exists()
    assert len(again.recover().pending) == 1
    again.close()


def test_no_room_for_it_is_said(scratch):
    def full(fd, size):
        raise OSError(28, "No space left on device")

    calls = Calls()
    calls.allocate = full
    store = Store(scratch / "data", Files(calls))
    (note,) = store.recover().notes
    assert "there is no room for the ballast" in note
    assert not (scratch / "data" / "ballast").exists()
    store.close()


def test_none_is_made_where_none_is_wanted(scratch, ballast):
    store = Store(scratch / "data", ballast=0)
    assert store.recover().notes == []
    assert not ballast.exists()
    store.close()
