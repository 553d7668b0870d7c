"""A data folder from its first session to a deleted one, without crashes."""

import uuid
from itertools import count

import pytest

from service.storage.failures import NoSpace, Refused, StorageFailure
from service.storage.files import Calls, Files, Sync
from service.storage.header import Key, Kind, Shape
from service.storage.store import Store
from tests.storage.counter import same, taken_up

SHAPE = Shape(slots=3, capacity=5000, records=2)
NUMBERS = count(1)


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def store(scratch, calls):
    store = Store(scratch / "data", Files(calls))
    yield store
    store.close()


def create(store, name="a", **changes):
    facts = {
        "uuid": uuid.UUID(int=next(NUMBERS)), "epoch": 1, "spec": "{}", "kernel_rev": "r",
        "chunks": [b"empty"], "reserved": 1000, "shape": SHAPE,
    }  # fmt: skip
    return store.create(name, **(facts | changes))


def push(journal, payload=b"gradient", sequence=1):
    slot = journal.reserve(payload=True)
    slot.seal(Kind.PUSH, key=Key("w", sequence), payload=payload)
    return journal.commit([slot])[0].number


def reopened(scratch):
    store = Store(scratch / "data")
    return store, taken_up(store)


def files_of(scratch, journal):
    folder = scratch / "data" / "sessions" / journal.row.uuid.hex()
    return sorted(path.name for path in folder.iterdir())


def test_a_session_comes_back(scratch, store):
    journal = create(store)
    assert push(journal, b"one") == 1
    slot = journal.reserve(payload=False)
    slot.seal(Kind.PATCH, meta=b"lr")
    assert journal.commit([slot])[0].number == 2
    store.flush()
    store.close()
    again, recovery = reopened(scratch)
    assert (recovery.damaged, recovery.orphans, recovery.notes) == ({}, [], [])
    found = recovery.sessions["a"]
    assert found.row == journal.row
    assert found.snapshot.read_bytes() == b"empty"
    assert [(r.header.number, r.header.kind, r.header.key) for r in found.records] == [
        (1, Kind.PUSH, ("w", 1)),
        (2, Kind.PATCH, None),
    ]
    assert [record.payload() for record in found.records] == [b"one", b""]
    assert found.records[1].header.meta == b"lr"
    assert found.journal.last == 2
    assert push(found.journal) == 3
    again.close()


def test_one_sync_for_a_commit_however_many_records(store, calls):
    journal = create(store)
    slots = [journal.reserve(payload=True) for _ in range(3)]
    for slot in slots:
        slot.seal(Kind.PUSH, payload=b"x" * 4000)
    syncs = []
    calls.fdatasync = lambda fd, site: syncs.append(site)
    calls.commit = calls.fsync = None  # nothing else is durable work
    journal.commit(slots)
    assert syncs == [Sync.RING_COMMIT]
    del calls.commit, calls.fsync


def test_a_full_ring_is_emptied_by_a_snapshot(scratch, store):
    journal = create(store)
    for sequence in range(3):
        push(journal, sequence=sequence)
    assert journal.reserve(payload=True) is None
    journal.snapshot(2, [b"state ", b"after 2"], **same(journal))
    assert journal.ring.free() == (2, 2)
    assert journal.row.number == 2
    assert files_of(scratch, journal) == ["ring-0", "snap-2", "spare"]
    for old in (1, 2):
        assert not journal.snapshot(old, [b""], **same(journal))
    with pytest.raises(ValueError, match="not there yet"):
        journal.snapshot(4, [b""], **same(journal))
    assert push(journal, sequence=7) == 4
    store.close()
    again, recovery = reopened(scratch)
    found = recovery.sessions["a"]
    assert found.snapshot.read_bytes() == b"state after 2"
    assert [record.header.number for record in found.records] == [3, 4]
    again.close()


def test_a_payload_in_pieces_is_one_payload(scratch, store):
    journal = create(store)
    slot = journal.reserve(payload=True)
    slot.write(b"grad")
    slot.write(memoryview(b"ient"))
    assert slot.room == SHAPE.capacity - 8
    with pytest.raises(ValueError, match="do not fit"):
        slot.write(bytes(SHAPE.capacity))
    slot.seal(Kind.PUSH, payload=b" and numbers")
    journal.commit([slot])
    journal.close()
    store.close()
    again, recovery = reopened(scratch)
    (record,) = recovery.sessions["a"].records
    assert record.payload() == b"gradient and numbers"
    again.close()


def test_snapshots_without_a_ring_follow_each_other(scratch, store):
    journal = create(store, shape=None)
    assert journal.snapshot(1, [b"one"], epoch=3, kernel_rev="r")
    assert not journal.snapshot(1, [b"again"], epoch=4, kernel_rev="r")
    assert (journal.last, journal.row.epoch) == (1, 3)
    journal.begin(7, "s")
    store.close()
    again, recovery = reopened(scratch)
    found = recovery.sessions["a"]
    assert (found.row.epoch, found.row.kernel_rev) == (7, "s")
    assert found.snapshot.read_bytes() == b"one"
    again.close()


def test_a_change_that_is_a_whole_state(scratch, store):
    journal = create(store)
    push(journal)
    assert journal.replace([b"uploaded"], **same(journal)) == 2
    assert journal.last == 2
    assert push(journal) == 3
    store.close()
    again, recovery = reopened(scratch)
    found = recovery.sessions["a"]
    assert found.snapshot.read_bytes() == b"uploaded"
    assert [record.header.number for record in found.records] == [3]
    again.close()


def test_a_ring_of_another_shape(scratch, store):
    journal = create(store)
    push(journal)
    late = journal.reserve(payload=True)
    wider = Shape(slots=2, capacity=100_000, records=1)
    assert journal.replace([b"wider"], **same(journal), shape=wider, reserved=5000) == 2
    assert files_of(scratch, journal) == ["ring-2", "snap-2", "spare"]
    late.seal(Kind.PUSH, payload=b"for the ring before")
    with pytest.raises(ValueError, match="retired"):
        journal.ring.commit([late]) if late._ring is journal.ring else late._ring.commit([late])
    late.release()
    assert push(journal, bytes(100_000)) == 3
    store.close()
    again, recovery = reopened(scratch)
    found = recovery.sessions["a"]
    assert found.row.reserved == 5000
    assert found.journal.ring.shape == wider
    assert found.records[0].payload() == bytes(100_000)
    again.close()


def test_a_session_without_log_gets_one(scratch, store):
    journal = create(store, shape=None)
    assert files_of(scratch, journal) == ["snap-0", "spare"]
    assert journal.last == 0
    assert journal.replace([b"a model"], **same(journal)) == 1
    assert journal.last == 1
    assert journal.replace([b"a model, logged"], **same(journal), shape=SHAPE) == 2
    assert push(journal) == 3
    store.close()
    again, recovery = reopened(scratch)
    assert recovery.sessions["a"].journal.last == 3
    again.close()


def test_a_deleted_session_leaves_its_epoch(scratch, store):
    journal, other = create(store), create(store, "b")
    push(journal)
    push(other)
    store.flush()
    journal.delete(epoch=5)
    assert journal.reserve(payload=True) is None
    store.close()
    again, recovery = reopened(scratch)
    assert recovery.tombstones == {"a": 5}
    assert list(recovery.sessions) == ["b"]
    anew = create(again, epoch=6)
    assert push(anew) == 1
    again.close()
    last, recovery = reopened(scratch)
    assert recovery.tombstones == {}
    assert recovery.sessions["a"].row.epoch == 6
    last.close()


def test_a_living_session_is_not_replaced(scratch, store):
    journal = create(store)
    with pytest.raises(ValueError, match="session 'a' lives"):
        create(store)
    assert len(list((scratch / "data" / "sessions").iterdir())) == 1
    assert push(journal) == 1


def test_what_a_full_disk_kept_of_a_deleted_session_goes_before_its_row(scratch, store, calls):
    journal = create(store)
    calls.unlink = Full(calls.unlink)
    journal.delete(epoch=1)
    del calls.unlink
    assert files_of(scratch, journal) == ["ring-0", "snap-0", "spare"]
    anew = create(store, epoch=2)
    (folder,) = (scratch / "data" / "sessions").iterdir()
    assert folder.name == anew.row.uuid.hex()


class Full:
    """A call that finds the disk full from its n-th use on."""

    def __init__(self, call, after=0):
        self.call, self.left = call, after

    def __call__(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return self.call(*arguments)


@pytest.mark.parametrize("name", ["allocate", "pwrite", "truncate", "rename", "mkdir", "commit"])
@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_at_a_creation(scratch, store, calls, name, after):
    create(store, "before")
    setattr(calls, name, Full(getattr(calls, name), after))
    try:
        create(store)
        made = True
    except NoSpace:
        made = False
        assert len(list((scratch / "data" / "sessions").iterdir())) == 1
    delattr(calls, name)
    if not made:
        assert push(create(store)) == 1
    store.close()
    again, recovery = reopened(scratch)
    assert sorted(recovery.sessions) == ["a", "before"]
    assert (recovery.damaged, recovery.orphans) == ({}, [])
    again.close()


@pytest.mark.parametrize("name", ["allocate", "open", "pwrite", "truncate", "rename", "commit"])
@pytest.mark.parametrize("after", range(5))
def test_a_full_disk_at_a_change_of_shape(scratch, store, calls, name, after):
    journal = create(store)
    push(journal)
    setattr(calls, name, Full(getattr(calls, name), after))
    try:
        journal.replace([b"new"], **same(journal), shape=Shape(2, 9000, 1), reserved=3000)
        last = 2
    except NoSpace:
        last = 1
    delattr(calls, name)
    assert push(journal, sequence=2) == last + 1
    expected = ["ring-2", "snap-2"] if last == 2 else ["ring-0", "snap-0"]
    assert [name for name in files_of(scratch, journal) if name in expected] == expected
    store.close()
    again, recovery = reopened(scratch)
    found = recovery.sessions["a"]
    assert found.journal.last == last + 1
    assert files_of(scratch, found.journal) == [*expected, "spare"]
    again.close()


def test_a_failed_snapshot_leaves_the_present_one(scratch, store, calls):
    journal = create(store)
    push(journal)

    def chunks():
        yield b"half of it"
        raise RuntimeError("the copy failed")

    with pytest.raises(RuntimeError):
        journal.snapshot(1, chunks(), **same(journal))
    with pytest.raises(RuntimeError):
        journal.replace(chunks(), **same(journal), shape=SHAPE)
    assert files_of(scratch, journal) == ["ring-0", "snap-0", "spare"]
    assert push(journal, sequence=2) == 2
    journal.snapshot(2, [b"whole"], **same(journal))
    assert journal.row.number == 2


def test_a_creation_of_which_nobody_knows_keeps_its_files(scratch, store, calls):
    def fail(connection, site):
        Calls().commit(connection, site)
        raise OSError(5, "the answer is lost")

    calls.commit = fail
    with pytest.raises(StorageFailure):
        create(store)
    del calls.commit
    store.close()
    again, recovery = reopened(scratch)
    assert list(recovery.sessions) == ["a"]
    again.close()


def test_a_folder_in_use(scratch, store):
    with pytest.raises(Refused, match="in use"):
        Store(scratch / "data")
