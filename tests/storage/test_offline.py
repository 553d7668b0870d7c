"""What an operator does to a folder that no server holds: backup and forget."""

import shutil
import sqlite3

import pytest

from service.__main__ import main
from service.storage import check, offline
from service.storage.files import Calls, Files, Sync
from service.storage.store import Store
from tests.storage.counter import Scratch, restored, seeded, taken_up
from tests.storage.disk import Crash, Database, File, Folder, Mode, Recording
from tests.storage.test_backup import lived_in
from tests.storage.test_check import contents, flip
from tests.storage.test_store import create, push, reopened


@pytest.fixture
def folder(scratch):
    """Sessions a and b with one record each, a deleted one, a checkpoint."""
    store = Store(scratch / "data", ballast=0)
    for name in ("a", "b", "gone"):
        push(create(store, name))
    store.close()
    store, recovery = reopened(scratch)
    recovery.sessions["gone"].journal.delete(7)
    store.checkpoints.write(recovery.sessions["a"].row.uuid, "best", [b"content"])
    store.close()
    return scratch / "data"


def ring_of(folder, name):
    store = Store(folder, ballast=0)
    row = store._index.find(name)
    store.close()
    return folder / "sessions" / row.uuid.hex() / row.ring


def spoil_row(folder, change):
    with sqlite3.connect(folder / "index.db") as connection:
        connection.execute(f"UPDATE session SET {change} WHERE id = 'a'")
    connection.close()


# Backup


def test_a_backup_is_the_same_folder(scratch, capsys):
    server = lived_in(scratch / "data")
    server.store.flush()
    server.close()
    before = contents(scratch / "data")
    command = ["backup", "--data-dir", str(scratch / "data"), "--to", str(scratch / "copy")]
    assert main(command) == 0
    assert "copy is a backup of" in capsys.readouterr().out
    assert contents(scratch / "data") == before
    here = {path.relative_to(scratch / "data"): data for path, data in before.items()
            if path.name not in ("LOCK", "ballast")}  # fmt: skip
    there = contents(scratch / "copy")
    assert there.pop(scratch / "copy" / "LOCK") == b""
    assert {path.relative_to(scratch / "copy"): data for path, data in there.items()} == here
    assert check.run(scratch / "copy") == 0
    restored(scratch / "copy", server.promise.copy(), lambda again: again.push("a"), later=0)
    assert main(command) == 2
    assert "exists, and a backup replaces nothing" in capsys.readouterr().err


def test_rows_that_were_not_yet_moved_into_the_database(scratch, folder):
    store, recovery = reopened(scratch)
    push(recovery.sessions["a"].journal, sequence=2)
    store.flush()
    store._lock.release()  # as after a kill
    assert (folder / "index.db-wal").stat().st_size
    assert offline.backup(folder, scratch / "copy") == 0
    again = Store(scratch / "copy", ballast=0)
    assert len(again._index.read().records) == 3
    assert len(taken_up(again).sessions["a"].records) == 2
    again.close()
    store._index._connection.close()


def test_what_is_damaged_is_copied_as_it_is(scratch, folder, capsys):
    ring = ring_of(folder, "a")
    flip(ring, 0)
    (folder / "orphans" / "old").mkdir()
    (folder / "orphans" / "old" / "ring-0").write_bytes(b"x")
    assert offline.backup(folder, scratch / "copy") == 1
    out = capsys.readouterr().out
    assert "a: the first page is unreadable (ring-0)" in out
    assert "orphans/old: set aside" in out
    assert "What is said above is in it" in out
    assert (scratch / "copy" / ring.relative_to(folder)).read_bytes() == ring.read_bytes()
    assert (scratch / "copy" / "orphans" / "old" / "ring-0").read_bytes() == b"x"


def test_what_the_disk_can_not_read_is_said(scratch, folder, capsys):
    ring = ring_of(folder, "a")

    class Bad(Calls):
        def open(self, path, flags):
            fd = super().open(path, flags)
            if path == ring:
                self.fd = fd
            return fd

        def pread(self, fd, size, offset):
            if fd == getattr(self, "fd", None):
                raise OSError(5, "Input/output error")
            return super().pread(fd, size, offset)

    assert offline.backup(folder, scratch / "copy", Files(Bad())) == 1
    assert "the disk can't read it: Input/output error (ring-0)" in capsys.readouterr().out


def test_a_backup_that_is_not_made(scratch, folder, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    calls = Calls()
    calls.pwrite = full
    assert offline.backup(folder, scratch / "copy", Files(calls)) == 2
    assert "nothing is left of the backup. Make room there." in capsys.readouterr().err
    (folder / "index.db").write_bytes(b"x" * 9999)
    assert offline.backup(folder, scratch / "copy") == 2
    assert "can't be read" in capsys.readouterr().err
    assert offline.backup(scratch / "nowhere", scratch / "copy") == 2
    assert "no data folder" in capsys.readouterr().err
    assert [path.name for path in scratch.iterdir()] == ["data"]


def test_a_folder_in_use(scratch, folder, capsys):
    store = Store(folder, ballast=0)
    assert offline.backup(folder, scratch / "copy") == 2
    assert offline.forget(folder, "a") == 2
    assert capsys.readouterr().err.count("in use by process") == 2
    store.close()


# Forget


def test_check_backup_forget(scratch, folder, capsys):
    """The steps of docs/operations.md, as a user takes them."""
    ring = ring_of(folder, "a")
    flip(ring, 0)
    spoilt = ring.read_bytes()
    where = ["--data-dir", str(folder)]
    assert main(["check", *where]) == 1
    assert main(["backup", "--to", str(scratch / "copy"), *where]) == 1
    capsys.readouterr()
    assert main(["forget", "--session", "a", *where]) == 0
    out = capsys.readouterr().out
    assert "a: the first page is unreadable (ring-0)" in out
    assert f"a is forgotten; its files are in orphans/{ring.parent.name}" in out
    assert "Its id is free, from epoch 1002 on." in out
    assert (folder / "orphans" / ring.parent.name / "ring-0").read_bytes() == spoilt
    store, recovery = reopened(scratch)
    assert recovery.tombstones == {"gone": 7, "a": 1001}
    assert (recovery.damaged, list(recovery.sessions)) == ({}, ["b"])
    assert "1 checkpoints of a session that is gone" in recovery.notes[0]
    anew = create(store, "a", epoch=1002)
    assert push(anew) == 1
    store.close()
    assert (folder / "orphans" / ring.parent.name / "ring-0").read_bytes() == spoilt


def test_a_session_that_lost_its_folder(scratch, folder, capsys):
    shutil.rmtree(ring_of(folder, "a").parent)
    assert offline.forget(folder, "a") == 0
    assert "it has no folder" in capsys.readouterr().out
    store, recovery = reopened(scratch)
    assert recovery.tombstones["a"] == 1001
    store.close()


@pytest.mark.parametrize(
    ("session", "sentence"),
    [
        ("b", "'b' is not damaged, as far as the storage can tell"),
        ("gone", "'gone' is deleted already"),
        ("nobody", "knows no session 'nobody'"),
    ],
)
def test_sessions_that_are_not_to_be_forgotten(folder, capsys, session, sentence):
    before = contents(folder / "sessions")
    assert offline.forget(folder, session) == 2
    assert sentence in capsys.readouterr().err
    assert contents(folder / "sessions") == before


def test_folders_in_which_nothing_can_be_forgotten(scratch, folder, capsys):
    (folder / "index.db").unlink()
    assert offline.forget(folder, "a") == 2
    assert offline.forget(scratch, "a") == 2
    err = capsys.readouterr().err
    assert "has no index.db; restore it" in err
    assert "no data folder" in err


def test_a_damaged_record_row(scratch, folder):
    with sqlite3.connect(folder / "index.db") as connection:
        connection.execute("UPDATE record SET sequence = 9")
    connection.close()
    store, recovery = reopened(scratch)
    assert list(recovery.damaged) == ["a", "b"]
    store.close()
    assert offline.forget(folder, "a") == 0
    assert offline.forget(folder, "b") == 0
    store, recovery = reopened(scratch)
    assert (recovery.sessions, recovery.damaged) == ({}, {})
    assert len(list((folder / "orphans").iterdir())) == 2
    store.close()


@pytest.mark.parametrize("change", ["epoch = 9", "uuid = x'00'", "spec = CAST(x'ff' AS TEXT)"])
def test_a_damaged_session_row(scratch, folder, capsys, change):
    uuid = ring_of(folder, "a").parent.name
    spoil_row(folder, change)
    assert offline.forget(folder, "a") == 0
    assert "a: its row is damaged (index.db)" in capsys.readouterr().out
    store, recovery = reopened(scratch)
    assert recovery.tombstones == {"a": 1 << 20, "gone": 7}
    assert (recovery.damaged, list(recovery.sessions)) == ({}, ["b"])
    # By `forget`, or by the start: the row did not say any more whose folder it is.
    assert [path.name for path in (folder / "orphans").iterdir()] == [uuid]
    store.close()


def test_a_row_whose_damaged_uuid_is_that_of_another_session(scratch, folder):
    other = ring_of(folder, "b").parent
    spoil_row(folder, f"uuid = x'{other.name}'")
    assert offline.forget(folder, "a") == 0
    assert other.is_dir()
    store, recovery = reopened(scratch)
    assert list(recovery.sessions) == ["b"]
    store.close()


def test_a_row_whose_damaged_id_is_no_text(scratch, folder):
    spoil_row(folder, "id = CAST(x'e1' AS TEXT)")
    store, recovery = reopened(scratch)
    (shown,) = recovery.damaged
    assert shown == "\ufffd"
    store.close()
    assert offline.forget(folder, shown) == 0
    store, recovery = reopened(scratch)
    assert (recovery.damaged, list(recovery.sessions)) == ({}, ["b"])
    store.close()


def test_a_full_disk_and_the_ballast(scratch, folder, capsys):
    flip(ring_of(folder, "a"), 0)
    ballast = folder / "ballast"

    class Filled(Calls):
        def commit(self, connection, site):
            if ballast.exists():
                error = sqlite3.OperationalError("full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            super().commit(connection, site)

    ballast.touch()
    assert offline.forget(folder, "a", Files(Filled())) == 0
    assert not ballast.exists()


def mirrored(path):
    """A folder as a disk of the tests: all of it is durable."""
    if path.name == "index.db":
        database = Database()
        database.commit(path.read_bytes())
        database.sync()
        return database
    if path.is_file():
        return File(path.read_bytes())
    found = Folder()
    found.now = {entry.name: mirrored(entry) for entry in path.iterdir()}
    found.sync()
    return found


def forgotten(folder, without, stop, mode):
    """What is on the disk after a stop at a step, or at the end, and the exit status, if any."""
    with Scratch() as root:
        shutil.copytree(folder, root / "data")
        calls = Recording(root, mirrored(root), without)
        calls.left = stop
        try:
            code = offline.forget(root / "data", "a", Files(calls))
            calls.left = None
            calls.step()  # power is lost after the answer
        except Crash:
            code = None
        finally:
            calls.abandon()
        return calls.disk.after(mode, seeded("forget", stop)), code


def lost(disk, ring):
    """Whether a start leaves the bytes of the session nowhere.

    The mirror is asked, for it knows what no folder can show: one that has two names.
    """
    with Scratch() as root:
        disk.build(root)
        calls = Recording(root, disk)
        store = Store(root / "data", Files(calls), ballast=0)
        taken_up(store)
        calls.abandon()
    folders = [*disk.now["data"].now["sessions"].now.values(),
               *disk.now["data"].now["orphans"].now.values()]  # fmt: skip
    return all(folder.now.get("ring-0", File()).now != ring for folder in folders)


@pytest.mark.parametrize("mode", [Mode.LOSE, Mode.SKIP, Mode.KILL])
def test_a_crash_at_any_step_keeps_the_bytes(scratch, folder, mode):
    flip(ring_of(folder, "a"), 0)
    ring = ring_of(folder, "a").read_bytes()
    stop, code = 0, None
    while code is None:
        disk, code = forgotten(folder, (), stop, mode)
        assert not lost(disk, ring)
        stop += 1
    assert stop > 5


@pytest.mark.parametrize("site", [Sync.FORGET_ORPHANS, Sync.FORGET_SESSIONS])
def test_no_sync_of_forget_can_be_left_out(scratch, folder, site):
    flip(ring_of(folder, "a"), 0)
    disk, code = forgotten(folder, [site], None, Mode.LOSE)
    assert code == 0
    assert lost(disk, ring_of(folder, "a").read_bytes())
