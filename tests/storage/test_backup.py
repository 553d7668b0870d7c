"""Backups: whole folders of one moment per session, while everything goes on."""

import copy
import errno
import os
import shutil
import sqlite3
import threading

import pytest

from service.storage import check
from service.storage.checkpoints import owner_of
from service.storage.failures import CopyFailed, NoSpace, Refused
from service.storage.files import Calls, Files
from service.storage.header import PAGE
from service.storage.store import Store
from tests.storage.counter import SHAPE, WIDER, Promise, Server, restored, resume, seeded, taken_up
from tests.storage.test_check import contents, flip
from tests.storage.test_store import create, push, reopened

GONE = bytes(range(16))


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def store(scratch, calls):
    store = Store(scratch / "data", Files(calls), ballast=0)
    yield store
    store.close()


def lived_in(path, calls=None):
    """An application with a history."""
    server = Server(calls, path, Promise(), seeded("backup"))
    for name in ("a", "b"):
        server.create(name)
        server.push(name, 2)
        server.snapshot(name)
        server.push(name, 2)
    server.create("silent", shape=None)
    server.create("gone")
    server.delete("gone")
    server.write_checkpoint(owner_of("a"), "best", 3000)
    server.write_checkpoint(GONE, "last", 10)
    return server


def test_it_recovers_to_the_same_and_goes_on(scratch, capsys):
    server = lived_in(scratch / "data")
    before = contents(scratch / "data" / "sessions")
    made = server.store.backup(scratch / "copy")
    assert made.sessions == {"a": 4, "b": 4, "silent": 0}
    assert (made.checkpoints, made.damaged) == (2, [])
    assert 0 < made.size < 100_000
    assert contents(scratch / "data" / "sessions") == before
    assert check.run(scratch / "copy") == 0
    assert "a: checkpoint best, 3000 bytes" in capsys.readouterr().out

    def go_on(again):
        again.push("a", 2)
        again.snapshot("a")
        again.replace("b", WIDER)
        again.create("gone")
        again.back_up()

    restored(scratch / "copy", server.promise.copy(), go_on)
    restored(scratch / "copy", server.promise.copy())
    server.push("a")
    server.close()


def test_its_files_are_as_those_of_any_data_folder(scratch, store):
    push(create(store))
    made = store.checkpoints.write(GONE, "best", [b"x"])
    os.utime(store.checkpoints.open(made), (5, 5))
    store.backup(scratch / "copy")
    assert sorted(path.name for path in (scratch / "copy").iterdir()) == [
        "FORMAT", "LOCK", "checkpoints", "index.db", "orphans", "sessions",
    ]  # fmt: skip
    for path in [scratch / "copy", *(scratch / "copy").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    again = Store(scratch / "copy")
    assert again.checkpoints.find(GONE, "best") == made._replace(made_at=5.0)
    again.close()


def test_it_takes_the_room_of_what_it_holds_and_reserves_the_rest_again(scratch, store):
    shape = SHAPE._replace(slots=64, capacity=100_000)
    push(create(store, shape=shape, reserved=1 << 20))
    store.backup(scratch / "copy")
    (ring,) = (scratch / "copy").glob("sessions/*/ring-0")
    assert ring.stat().st_size == shape.size
    assert ring.stat().st_blocks * 512 < 10 * PAGE
    again = Store(scratch / "copy", ballast=0)
    (found,) = taken_up(again).sessions.values()
    assert found.notes == []
    assert ring.stat().st_blocks * 512 >= shape.size
    assert push(found.journal, sequence=2) == 2
    again.close()


def test_a_checkpoint_that_is_replaced_or_deleted_meanwhile(scratch, store, calls):
    for name in ("a", "b"):
        store.checkpoints.write(GONE, name, [b"old"])
    opened = calls.open

    def opening(path, flags):
        if path.name.startswith("a.") and path.is_relative_to(scratch / "data"):
            del calls.open
            store.checkpoints.write(GONE, "a", [b"new"])
            store.checkpoints.delete(GONE, "b")
        return opened(path, flags)

    calls.open = opening
    assert store.backup(scratch / "copy").checkpoints == 1
    (path,) = (scratch / "copy").glob("checkpoints/*/*")
    assert path.read_bytes() == b"new"


def test_a_backup_in_which_a_record_rots_is_told_from_a_torn_one(scratch, store, capsys):
    push(create(store))
    store.backup(scratch / "copy")
    (ring,) = (scratch / "copy").glob("sessions/*/ring-0")
    flip(ring, SHAPE.offset(2) + PAGE)
    assert check.run(scratch / "copy") == 1
    assert "record 1 is torn and the index has seen record 1" in capsys.readouterr().out


# While everything goes on


class Busy:
    """Threads that use an application as long as the block lasts."""

    def __init__(self, server):
        self.server = server
        self.stop = threading.Event()
        self.locks = {name: threading.Lock() for name in ("a", "b", "brief")}
        self.told = {journal.row.uuid: server.promise.sessions[name]
                     for name, journal in server.journals.items()}  # fmt: skip
        self.errors = []
        work = [(self.push, "a"), (self.push, "b"), (self.snapshot, "a"), (self.live, "brief")]
        self.threads = [threading.Thread(target=self.repeat, args=one) for one in work]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert self.errors == []

    def repeat(self, action, name):
        own = copy.copy(self.server)  # all is shared but the dice
        own.rng = seeded(action.__name__, name)
        try:
            while not self.stop.wait(0.0005):
                action(own, name)
        except BaseException as error:
            self.errors.append(error)
            raise

    def push(self, server, name):
        with self.locks[name]:
            if server.rng.random() < 0.03:
                server.replace(name, server.rng.choice([None, SHAPE, WIDER]))
            server.push(name, server.rng.choice([1, 2, 3]))

    def snapshot(self, server, name):
        with self.locks[name]:
            journal, state = server.journals[name], copy.deepcopy(server.states[name])
            row = journal.row
        journal.snapshot(state.number, state.chunks(), epoch=row.epoch, kernel_rev="1")

    def live(self, server, name):
        server.create(name)
        self.told[server.journals[name].row.uuid] = server.promise.sessions[name]
        server.push(name, 2)
        server.write_checkpoint(server.journals[name].row.uuid, "best", 100)
        server.store.checkpoints.drop(server.journals[name].row.uuid)
        server.delete(name)


def test_each_session_is_as_it_was_at_one_moment(scratch, capsys):
    server = Server(None, scratch / "data", Promise(), seeded("busy"))
    for name in ("a", "b"):
        server.create(name)
    kinds = set()
    with Busy(server) as busy:
        for turn in range(12):
            began = {name: server.promise.sessions[name].acknowledged for name in ("a", "b")}
            epoch = server.promise.buried.get("brief", 0)
            made = server.store.backup(scratch / f"copy-{turn}")
            ended = {name: len(server.promise.sessions[name].attempts) for name in ("a", "b")}
            assert made.damaged == []
            assert check.run(scratch / f"copy-{turn}") == 0
            store = Store(scratch / f"copy-{turn}", ballast=0)
            found = taken_up(store)
            store.close()
            assert (found.damaged, found.orphans) == ({}, [])
            for name, one in found.sessions.items():
                state = resume(one)
                assert state.number == made.sessions[name]
                assert state == busy.told[one.row.uuid].state(state.number)
                assert one.row.epoch == busy.told[one.row.uuid].epoch + 1  # time was turned back
            for name in ("a", "b"):
                assert began[name] <= made.sessions[name] <= ended[name]
            kinds.add("brief" in found.sessions)
            gone = found.tombstones.get("brief", 0)
            assert "brief" in found.sessions or gone >= epoch
    assert server.promise.sessions["a"].acknowledged > 20
    assert len(server.store._journals) <= 3, "deleted sessions are forgotten"
    server.close()


class Paused(Calls):
    """Reading a file of this name waits until it may go on."""

    def __init__(self, name):
        self.name = name
        self.reached, self.go = threading.Event(), threading.Event()

    def pread(self, fd, size, offset):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(f"/data/sessions/{self.name}"):
            self.reached.set()
            assert self.go.wait(20)
        return super().pread(fd, size, offset)


@pytest.fixture
def paused(scratch):
    """A backup that stands still while it copies the snapshot of a session with one record."""
    calls = Paused("")
    store = Store(scratch / "data", Files(calls), ballast=0)
    store.journal = create(store)
    push(store.journal)
    store.flush()
    calls.name = f"{store.journal.row.uuid.hex()}/snap-0"
    store.outcome = []

    def back_up():
        try:
            store.outcome.append(store.backup(scratch / "copy"))
        except Exception as error:
            store.outcome.append(error)

    store.thread = threading.Thread(target=back_up)
    store.thread.start()
    assert calls.reached.wait(20)
    yield store
    resumed(store)
    store.close()


def resumed(store):
    store._files.calls.go.set()
    store.thread.join()
    return store.outcome[0]


def test_commits_do_not_wait_and_are_not_in_it(scratch, paused):
    assert [push(paused.journal, sequence=number) for number in (2, 3)] == [2, 3]
    paused.flush()
    other = create(paused, "b")
    push(other)
    assert resumed(paused).sessions == {"a": 1}
    again = Store(scratch / "copy", ballast=0)
    found = taken_up(again)
    assert (found.notes, found.orphans, list(found.sessions)) == ([], [], ["a"])
    assert found.sessions["a"].notes == []
    again.close()


def test_a_snapshot_and_a_deletion_wait(scratch, paused):
    steps = []

    def snapshot_and_delete():
        paused.journal.snapshot(1, [b"later"], epoch=1, kernel_rev="r")
        steps.append("snapshot")
        paused.journal.delete(1)
        steps.append("deleted")

    thread = threading.Thread(target=snapshot_and_delete)
    thread.start()
    thread.join(0.05)
    assert steps == []
    assert resumed(paused).sessions == {"a": 1}
    thread.join()
    assert steps == ["snapshot", "deleted"]
    store = Store(scratch / "copy", ballast=0)
    assert taken_up(store).sessions["a"].snapshot.read_bytes() == b"empty"
    store.close()


def test_there_is_one_at_a_time(scratch, paused):
    with pytest.raises(Refused, match="A backup is being made; wait"):
        paused.backup(scratch / "other")
    assert resumed(paused).damaged == []
    assert paused.backup(scratch / "other").sessions == {"a": 1}


def test_a_server_that_stops_does_not_wait_for_it(scratch, paused):
    paused.end_backup()
    assert "the server is stopping" in str(resumed(paused))
    assert isinstance(paused.outcome[0], CopyFailed)
    assert [path.name for path in scratch.iterdir()] == ["data"]


# Refusals


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("there", "exists, and a backup replaces nothing"),
        ("cut", "cut.partial exists: another backup"),
        ("no/where", "there is no folder"),
        ("..", "exists"),
        ("data/copy", "lies in the data folder"),
        ("link/copy", "lies in the data folder"),
    ],
)
def test_places_that_are_refused(scratch, store, to, sentence):
    (scratch / "there").mkdir()
    (scratch / "cut.partial").mkdir()
    (scratch / "link").symlink_to(scratch / "data" / "sessions")
    before = sorted(scratch.rglob("*"))
    with pytest.raises(Refused, match=sentence):
        store.backup(scratch / to)
    assert sorted(scratch.rglob("*")) == before


def test_a_name_that_no_disk_takes(scratch, store):
    with pytest.raises(CopyFailed, match="File name too long"):
        store.backup(scratch / ("x" * 255))


def test_before_all_sessions_are_taken_up(scratch, store):
    create(store)
    store.close()
    again = Store(scratch / "data", ballast=0)
    recovery = again.recover()
    with pytest.raises(Refused, match="1 sessions are still to be recovered, among them 'a'"):
        again.backup(scratch / "copy")
    again.take_up(recovery.pending[0])
    assert again.backup(scratch / "copy").sessions == {"a": 0}
    again.close()


# Damage


def test_a_damaged_session_is_copied_as_it_is_and_said(scratch, store):
    for name in ("a", "b"):
        push(create(store, name))
    store.close()
    (ring, _) = sorted((scratch / "data").glob("sessions/*/ring-0"))
    flip(ring, 9)
    again, recovery = reopened(scratch)
    (name,) = recovery.damaged
    made = again.backup(scratch / "copy")
    assert [str(one) for one in made.damaged] == [f"{name}: the first page is unreadable (ring-0)"]
    assert (scratch / "copy" / ring.relative_to(scratch / "data")).read_bytes() == ring.read_bytes()
    again.close()
    store = Store(scratch / "copy", ballast=0)
    copied = taken_up(store)
    assert (copied.damaged, copied.orphans) == (recovery.damaged, [])
    assert list(copied.sessions) == list(recovery.sessions)
    store.close()


def test_where_a_row_is_damaged_all_folders_are_copied(scratch, store):
    for name in ("a", "b"):
        create(store, name)
    store._index._connection.execute("UPDATE session SET uuid = x'00' WHERE id = 'a'")
    store.close()
    again, _ = reopened(scratch)
    made = again.backup(scratch / "copy")
    assert [str(one) for one in made.damaged] == ["a: its row is damaged (index.db)"]
    again.close()
    assert len(list((scratch / "copy" / "sessions").iterdir())) == 2
    store = Store(scratch / "copy", ballast=0)
    assert list(taken_up(store).damaged) == ["a"]
    store.close()


@pytest.mark.parametrize("at", [20, PAGE + 3])
@pytest.mark.parametrize("number", [1, 2])
def test_what_rots_under_a_living_session_is_said(scratch, store, number, at):
    journal = create(store)
    for sequence in (1, 2):
        push(journal, b"x" * 10, sequence)
    (place,) = [place for place, one in journal.ring.standing()[1].items() if one == number]
    (ring,) = (scratch / "data").glob("sessions/*/ring-0")
    flip(ring, journal.ring.shape.offset(place) + at)
    (damage,) = store.backup(scratch / "copy").damaged
    assert damage.session == "a"
    assert f"record {number}" in damage.what


def test_files_that_are_gone_or_unreadable_are_said(scratch, store, calls):
    gone, worn = create(store), create(store, "b")
    push(worn)
    folder = scratch / "data" / "sessions"
    (folder / gone.row.uuid.hex() / "snap-0").unlink()
    (folder / gone.row.uuid.hex() / "ring-0").unlink()
    ring = folder / worn.row.uuid.hex() / "ring-0"

    def bad(fd, size, offset):
        if os.readlink(f"/proc/self/fd/{fd}") == str(ring):
            raise OSError(errno.EIO, "Input/output error")
        return os.pread(fd, size, offset)

    calls.pread = bad
    said = [str(one) for one in store.backup(scratch / "copy").damaged]
    assert any(one == "a: the snapshot that the index names is missing (snap-0)" for one in said)
    assert any("the disk can't read it: Input/output error (ring-0)" in one for one in said)
    assert any(one.startswith("b: record 1") for one in said)


# Faults


class Faulty(Calls):
    """The n-th call in the copy fails."""

    def __init__(self, number, where):
        self.error, self.left, self.where = number, -1, where

    def fail(self, path):
        if path is not None and str(path).startswith(self.where):
            self.left -= 1
            if self.left == -1:
                raise OSError(self.error, os.strerror(self.error))

    def __getattribute__(self, name):
        call = object.__getattribute__(self, name)
        if name not in ("open", "pwrite", "allocate", "truncate", "stamp", "fsync", "fsync_folder",
                        "rename", "mkdir", "commit", "checkpoint"):  # fmt: skip
            return call

        def calling(first, *rest):
            path = first
            if isinstance(first, int):
                path = os.readlink(f"/proc/self/fd/{first}")
            elif isinstance(first, sqlite3.Connection):
                path = first.execute("PRAGMA database_list").fetchone()[2]
            self.fail(path)
            return call(first, *rest)

        return calling


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_fault_leaves_nothing_and_the_server_goes_on(scratch, number):
    calls = Faulty(number, f"{scratch}/copy")
    server = lived_in(scratch / "data", calls)
    faults, kinds = 0, set()
    while calls.left < 0:
        calls.left = faults
        try:
            server.store.backup(scratch / "copy")
            restored(scratch / "copy", server.promise.copy())
            shutil.rmtree(scratch / "copy")
        except (NoSpace, CopyFailed) as error:
            kinds.add(type(error))
        assert [path.name for path in scratch.iterdir()] == ["data"]
        faults += 1
    assert faults > 50
    # A failed sync is never taken for a full disk.
    assert kinds == {CopyFailed} | ({NoSpace} if number == errno.ENOSPC else set())
    server.push("a")
    server.close()
