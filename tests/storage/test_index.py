"""The database: rows with digests, one transaction each, and what is refused."""

import sqlite3
import threading

import pytest

from service.storage import index as module
from service.storage.failures import NoSpace, Refused, StorageFailure
from service.storage.files import Calls, Files, Sync
from service.storage.index import ALIVE, DELETED, Found, Index, RecordRow, SessionRow, row_digest

ROW = SessionRow(
    "a", b"u" * 16, 1, ALIVE, '{"rule": "adam"}', "rev1", "ring-0", 100, "snap-0", 0, 10, b"d" * 16
)


def record(number, uuid=ROW.uuid):
    return RecordRow(uuid, number, number % 3, "w", number, b"x" * 16)


@pytest.fixture
def path(scratch):
    return scratch / "index.db"


@pytest.fixture
def index(path):
    index = Index(Files(), path)
    yield index
    index.close()


def test_a_new_index_is_empty_and_reopens(path, index):
    assert index.read() == Found([], [], [], [])
    index.close()
    again = Index(Files(), path)
    assert again.read() == Found([], [], [], [])
    again.close()


def test_every_commit_is_synced(index):
    ask = index._connection.execute
    assert ask("PRAGMA synchronous").fetchone() == (2,)
    assert ask("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ask("PRAGMA locking_mode").fetchone() == ("exclusive",)


def test_rows_come_back(path, index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.note([record(1), record(2)])
    assert index.read().records == []
    index.flush()
    expected = Found([ROW], [record(1), record(2)], [], [])
    assert index.read() == expected
    index.close()
    again = Index(Files(), path)
    assert again.read() == expected
    again.close()


def test_naming_a_snapshot_forgets_what_it_holds(index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.note([record(1), record(2), record(3)])
    index.flush()
    index.note([record(4), record(5), record(1, b"v" * 16)])
    later = ROW._replace(snapshot="snap-4", number=4)
    index.put(later, Sync.INDEX_NAME)
    index.flush()
    assert index.read() == Found([later], [record(5), record(1, b"v" * 16)], [], [])


def test_noting_never_waits_for_the_disk(index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.note([record(1)])
    calls, kept = index._files.calls, []

    def commit(connection, site):
        done = threading.Thread(target=index.note, args=[[record(2)]])
        done.start()
        done.join(20)
        kept.append(done.is_alive())
        Calls().commit(connection, site)

    calls.commit = commit
    index.flush()
    del calls.commit
    assert kept == [False]
    assert index.read().records == [record(1)]
    index.flush()
    assert index.read().records == [record(1), record(2)]


def test_rows_of_one_index_fill_another(path, index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.put(ROW._replace(id="b", uuid=b"v" * 16), Sync.INDEX_CREATE)
    index.note([record(1), record(2)])
    index.flush()
    index._connection.execute("UPDATE session SET epoch = 9 WHERE id = 'b'")
    other = Index(Files(), path.with_name("other.db"))
    other.fill(index.rows())
    assert other.rows() == index.rows()
    assert other.read() == Found([ROW], [record(1), record(2)], ["b"], [])
    other.close()


def test_rows_whose_id_is_no_text_can_be_erased(index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.put(ROW._replace(id="b", uuid=b"v" * 16), Sync.INDEX_CREATE)
    index._connection.execute("UPDATE session SET id = CAST(x'ff' AS TEXT) WHERE id = 'b'")
    (shown,) = index.read().bad_sessions
    index.erase("a")
    assert index.read() == Found([ROW], [], [shown], [])
    index.erase(shown)
    assert index.read() == Found([ROW], [], [], [])


def test_a_tombstone_forgets_all_records(index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.note([record(1)])
    index.flush()
    index.note([record(2)])
    gone = ROW._replace(state=DELETED, number=0)
    index.put(gone, Sync.INDEX_BURY)
    index.flush()
    assert index.read() == Found([gone], [], [], [])


def test_session_rows_leave_the_log_at_once(path, index):
    index.put(ROW, Sync.INDEX_CREATE)
    assert path.with_name("index.db-wal").stat().st_size == 0
    index.note([record(1)])
    index.flush()
    assert path.with_name("index.db-wal").stat().st_size > 0


def test_rows_that_were_changed_outside_show(path, index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.put(ROW._replace(id="b", uuid=b"v" * 16), Sync.INDEX_CREATE)
    index.note([record(1), record(2)])
    index.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE session SET number = 9 WHERE id = 'b'")
        connection.execute("UPDATE record SET place = 9 WHERE number = 2")
    connection.close()
    again = Index(Files(), path)
    assert again.read() == Found([ROW], [record(1)], ["b"], [ROW.uuid])
    again.close()


def test_text_that_is_no_text_shows(path, index):
    index.put(ROW, Sync.INDEX_CREATE)
    index.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE session SET spec = CAST(x'ff' AS TEXT)")
    connection.close()
    again = Index(Files(), path)
    assert again.read().bad_sessions == ["a"]
    again.close()


def test_the_digest_covers_every_column():
    assert len(row_digest(ROW)) == 16
    for name in ROW._fields:
        value = getattr(ROW, name)
        other = value + 1 if isinstance(value, int) else value + value[:1]
        assert row_digest(ROW._replace(**{name: other})) != row_digest(ROW)


def test_a_newer_version_is_refused(path, index, monkeypatch):
    index.close()
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "CREATE TABLE more (x)"))
    Index(Files(), path).close()
    monkeypatch.undo()
    with pytest.raises(Refused, match="version 2 and this server reads up to 1; start the newer"):
        Index(Files(), path)


def test_a_migration_keeps_rows_and_is_one_transaction(path, index, monkeypatch):
    index.put(ROW, Sync.INDEX_CREATE)
    index.close()
    broken = "CREATE TABLE more (x); CREATE TABLE more (x)"
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, broken))
    with pytest.raises(StorageFailure):
        Index(Files(), path)
    monkeypatch.undo()
    again = Index(Files(), path)  # version 1 as before
    assert again.read() == Found([ROW], [], [], [])
    again.close()


@pytest.mark.parametrize("pragma", ["application_id = 5", "user_version = 0"])
def test_other_databases_are_left_alone(path, index, pragma):
    index.close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA {pragma}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(Refused, match="or of another program"):
        Index(Files(), path)
    assert path.read_bytes() == before


def test_no_database_at_all(path):
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(Refused, match="can't be read"):
        Index(Files(), path)


def test_a_full_disk_at_the_first_start(path, monkeypatch):
    class Full(sqlite3.Connection):
        def execute(self, sql, *rest):
            if "journal_mode" in sql:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return super().execute(sql, *rest)

    monkeypatch.setattr(
        Calls, "connect", lambda _, path: sqlite3.connect(path, isolation_level=None, factory=Full)
    )
    with pytest.raises(NoSpace, match=r"opening index.db: database or disk is full"):
        Index(Files(), path)


def test_a_database_that_somebody_else_has_open(path, index, monkeypatch):
    monkeypatch.setattr(
        Calls, "connect", lambda _, path: sqlite3.connect(path, timeout=0, isolation_level=None)
    )
    with pytest.raises(Refused, match="locked"):
        Index(Files(), path)


def test_a_full_disk_changes_nothing_and_witnesses_wait(index):
    index.put(ROW, Sync.INDEX_CREATE)
    connection = index._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    many = [record(number) for number in range(1, 2000)]
    index.note(many)
    with pytest.raises(NoSpace):
        index.flush()
    with pytest.raises(NoSpace):
        index.put(ROW._replace(id="b", spec="x" * 100_000), Sync.INDEX_CREATE)
    assert index.read() == Found([ROW], [], [], [])
    connection.execute("PRAGMA max_page_count=1000000")
    index.flush()
    assert index.read().records == many


def test_an_io_error_of_a_commit_ends_everything(path):
    calls = Calls()
    index = Index(Files(calls), path)

    def fail(*_):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error

    calls.commit = fail
    with pytest.raises(StorageFailure):
        index.put(ROW, Sync.INDEX_CREATE)
    del calls.commit
    with pytest.raises(StorageFailure, match="after an earlier failure"):
        index.put(ROW, Sync.INDEX_CREATE)
    index.close()


def test_a_checkpoint_that_finds_no_room_is_no_refusal(path):
    calls = Calls()
    index = Index(Files(calls), path)

    def fail(*_):
        raise OSError(28, "full")

    calls.checkpoint = fail
    index.put(ROW, Sync.INDEX_CREATE)
    assert index.read().sessions == [ROW]
    index.close()
