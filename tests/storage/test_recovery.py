"""What the walk makes of every kind of ring, and what becomes of other things in the folder."""

import os
import shutil

import pytest

from service.storage.files import Files
from service.storage.header import PAGE, Key, Kind, Shape, pack
from service.storage.store import Store
from tests.storage.counter import same, taken_up
from tests.storage.test_store import create, push, reopened

SHAPE = Shape(slots=4, capacity=3000, records=2)


class Ring:
    """A ring file whose pages a test can spoil: record n is in place n + 1."""

    def __init__(self, scratch, journal):
        self.path = scratch / "data" / "sessions" / journal.row.uuid.hex() / "ring-0"
        self.journal = journal

    def offset(self, number):
        return SHAPE.offset(number + 1)

    def flip(self, at):
        with self.path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    def blank(self, number):
        self.write(number, bytes(PAGE))

    def write(self, number, page):
        with self.path.open("r+b") as file:
            file.seek(self.offset(number))
            file.write(page)


@pytest.fixture
def ring(scratch):
    """Records 1, then 2 and 3 of one group, then 4; nothing witnessed but record 1."""
    store = Store(scratch / "data")
    journal = create(store, shape=SHAPE)
    create(store, "other", shape=SHAPE)
    assert push(journal, b"1" * 100, sequence=1) == 1
    store.flush()
    slots = [journal.reserve(payload=True) for _ in range(2)]
    for number, slot in enumerate(slots, 2):
        slot.seal(Kind.PUSH, key=Key("w", number), payload=b"%d" % number * 100)
    journal.commit(slots)
    push(journal, b"4" * 100, sequence=4)
    store._index._pending.clear()  # a killed process had no time for it
    store._index._connection.close()
    store._lock.release()
    return Ring(scratch, journal)


def recovered(scratch):
    store, recovery = reopened(scratch)
    store.close()
    assert "other" in recovery.sessions
    if "a" in recovery.damaged:
        return str(recovery.damaged["a"])
    found = recovery.sessions["a"]
    return [record.header.number for record in found.records], found.notes


def test_complete_records_without_rows_are_rolled_forward(scratch, ring):
    assert recovered(scratch) == ([1, 2, 3, 4], [])
    store = Store(scratch / "data")
    assert [row.number for row in store._index.read().records] == [1, 2, 3, 4]
    store.close()


@pytest.mark.parametrize("spoil", ["header", "payload", "absent"])
def test_the_last_record_was_in_flight(scratch, ring, spoil):
    place = 5
    if spoil == "absent":
        ring.blank(4)
    else:
        ring.flip(ring.offset(4) + (50 if spoil == "header" else PAGE + 50))
    numbers, notes = recovered(scratch)
    assert numbers == [1, 2, 3]
    unreadable = f"ring-0, place {place} is unreadable"
    why = "torn while it was written, or damaged after a snapshot held its record"
    assert (
        notes
        == {
            "header": [f"{unreadable}: {why}"],
            "payload": [f"record 4 in ring-0, place {place} was never acknowledged and is dropped"],
            "absent": [],
        }[spoil]
    )


def test_what_is_dropped_never_comes_back(scratch, ring):
    ring.flip(ring.offset(4) + PAGE + 50)
    store, recovery = reopened(scratch)
    journal = recovery.sessions["a"].journal
    assert push(journal, b"another 4", sequence=9) == 4
    store.close()
    ring.flip(ring.offset(4) + PAGE + 50)  # the payload is whole again, as a repeat would make it
    numbers, notes = recovered(scratch)
    assert (numbers, notes) == ([1, 2, 3, 4], [])


@pytest.mark.parametrize("spoil", ["header", "payload", "absent"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_hole_before_a_later_sync_is_damage(scratch, ring, number, spoil):
    before = ring.path.read_bytes()
    if spoil == "absent":
        ring.blank(number)
    else:
        ring.flip(ring.offset(number) + (50 if spoil == "header" else PAGE + 50))
    spoilt = ring.path.read_bytes()
    assert before != spoilt
    said = recovered(scratch)
    what = "torn" if spoil == "payload" else "missing"
    assert f"record {number} is {what}" in said
    assert ("record 4 was written after" in said) or ("has seen record 1" in said)
    assert ring.path.read_bytes() == spoilt, "nothing of a damaged session is touched"
    assert recovered(scratch) == said


def test_a_group_of_which_only_the_later_half_arrived(scratch, ring):
    ring.blank(4)
    ring.blank(2)
    place = 4
    assert recovered(scratch) == (
        [1],
        [f"record 3 in ring-0, place {place} was never acknowledged and is dropped"],
    )


def test_a_witnessed_record_at_the_end_that_is_gone(scratch, ring):
    for number in (4, 3, 2, 1):
        ring.blank(number)
    assert "record 1 is missing and the index has seen record 1" in recovered(scratch)


def test_a_stale_record_of_an_earlier_lap_is_no_record(scratch, ring):
    store, recovery = reopened(scratch)
    journal = recovery.sessions["a"].journal
    journal.snapshot(4, [b"state"], **same(journal))
    slot = journal.reserve(payload=True)
    slot.seal(Kind.PUSH, payload=b"half a push, over the payload of a stale record")
    store.close()
    assert recovered(scratch) == ([], [])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"session": bytes(16)}, "a record belongs to another session"),
        ({"number": 3}, "record 3 is there twice"),
        ({"kind": 99}, "a record is of a newer format"),
    ],
)
def test_pages_that_can_not_be(scratch, ring, change, what):
    header = next(h for _, h in ring.journal.ring.headers() if getattr(h, "number", 0) == 4)
    ring.write(4, pack(header._replace(**change)))
    assert what in recovered(scratch)


def test_a_record_that_is_not_the_witnessed_one(scratch, ring):
    header = next(h for _, h in ring.journal.ring.headers() if getattr(h, "number", 0) == 1)
    ring.write(1, pack(header._replace(key=Key("w", 77))))
    assert "record 1 is not the one that the index has seen" in recovered(scratch)


@pytest.mark.parametrize("name", ["ring-0", "snap-0", "."])
def test_what_the_index_names_is_missing(scratch, ring, name):
    path = ring.path.with_name(name) if name != "." else ring.path.parent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "missing" in recovered(scratch)


def test_a_disk_that_can_not_read_one_session(scratch, ring, monkeypatch):
    read = Files.read

    def bad(self, fd, size, offset):
        if os.readlink(f"/proc/self/fd/{fd}") == str(ring.path) and offset:
            raise OSError(5, "Input/output error")
        return read(self, fd, size, offset)

    monkeypatch.setattr(Files, "read", bad)
    assert "can't read" in recovered(scratch)
    monkeypatch.undo()
    assert recovered(scratch) == ([1, 2, 3, 4], [])


def test_leftovers_of_a_crash_are_removed(scratch, ring):
    folder = ring.path.parent
    for name in ("snap-9", "ring-7"):
        (folder / name).touch()
    (folder / "spare").unlink()
    assert recovered(scratch) == ([1, 2, 3, 4], [])
    assert sorted(path.name for path in folder.iterdir()) == ["ring-0", "snap-0", "spare"]


def test_unfinished_creations_and_deletions_and_what_nobody_knows(scratch, ring):
    sessions = scratch / "data" / "sessions"
    ring.path.parent.rename(f"{ring.path.parent}.creating")  # its row is there: it was committed
    (sessions / f"{'0' * 32}.creating").mkdir()
    (sessions / f"{'0' * 32}.creating" / "ring-0").touch()
    (sessions / ("1" * 32)).mkdir()
    (sessions / "a file").touch()
    (scratch / "data" / "orphans" / ("1" * 32)).mkdir()
    store, recovery = reopened(scratch)
    recovery.sessions["other"].journal.delete(3)
    store.close()
    assert recovery.orphans == ["1" * 32, "a file"]
    assert sorted(recovery.sessions) == ["a", "other"]
    assert [path.name for path in sessions.iterdir()] == [ring.path.parent.name]
    orphans = sorted(path.name for path in (scratch / "data" / "orphans").iterdir())
    assert orphans == ["1" * 32, f"{'1' * 32}-1", "a file"]
    (sessions / recovery.sessions["other"].row.uuid.hex()).mkdir()  # the crash came before its end
    store, recovery = reopened(scratch)
    store.close()
    assert recovery.orphans == []
    assert recovery.tombstones == {"other": 3}
    assert [path.name for path in sessions.iterdir()] == [ring.path.parent.name]


def test_where_a_row_is_damaged_no_folder_is_moved(scratch, ring):
    store, _ = reopened(scratch)
    store._index._connection.execute("UPDATE session SET uuid = x'00' WHERE id = 'a'")
    store.close()
    store, recovery = reopened(scratch)
    store.close()
    assert str(recovery.damaged["a"]) == "a: its row is damaged (index.db)"
    assert recovery.orphans == []
    assert "other" in recovery.sessions
    assert ring.path.exists()


def test_a_damaged_record_row_is_damage_of_its_session(scratch, ring):
    store, _ = reopened(scratch)
    store.flush()
    store._index._connection.execute("UPDATE record SET sequence = 5 WHERE number = 1")
    store._index._connection.execute(
        "INSERT INTO record SELECT x'09', 5, place, worker, sequence, digest, row_digest "
        "FROM record WHERE number = 2"
    )
    store.close()
    assert recovered(scratch) == "a: a record row of it is damaged (index.db)"
    store, recovery = reopened(scratch)
    store.close()
    assert recovery.notes == ["a damaged row of the unknown session b'\\t'"]


def test_no_room_for_the_next_snapshot_is_said(scratch, ring):
    (ring.path.parent / "spare").unlink()

    class Full(Files):
        def allocate(self, fd, size, what):
            with self.writing(what):
                raise OSError(28, "No space left on device")

    store = Store(scratch / "data", Full())
    recovery = taken_up(store)
    store.close()
    spare, ring = recovery.sessions["a"].notes
    assert "the next snapshot may find no room" in spare
    assert "a record may find no room" in ring
    assert [note for note in recovery.notes if "no room for the ballast" in note]
