"""The SQLite database of a data folder: which sessions there are, and witnesses of their records.

```
session   id, uuid, epoch, state, spec, kernel_rev, ring, reserved, snapshot, number, size, digest,
          row_digest
record    uuid, number, place, worker, sequence, digest, row_digest
```

A session row names the snapshot and the ring that count; its transaction is the commit of whatever
made that snapshot. A record row says that a record was durable: the ring holds the record itself,
so a lost row loses nothing, and a row without its record is damage. `row_digest` is xxh3_128 over
the other columns, because SQLite has no checksums outside its log.

One connection, `locking_mode=EXCLUSIVE`, the log synced at each commit. What changes a session row
is moved from the log into the database at once: a bad checksum in the log looks to SQLite like the
log's end, and all that may be lost that way is witnesses.
"""

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from service.storage.failures import NoSpace, Refused
from service.storage.files import SQLITE_ERRORS, Files, Sync

APPLICATION = 0x67706F73
MIGRATIONS = (
    """
    CREATE TABLE session (
        id TEXT PRIMARY KEY, uuid BLOB NOT NULL, epoch INTEGER NOT NULL, state TEXT NOT NULL,
        spec TEXT NOT NULL, kernel_rev TEXT NOT NULL, ring TEXT NOT NULL,
        reserved INTEGER NOT NULL, snapshot TEXT NOT NULL, number INTEGER NOT NULL,
        size INTEGER NOT NULL, digest BLOB NOT NULL, row_digest BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE record (
        uuid BLOB, number INTEGER, place INTEGER NOT NULL, worker TEXT NOT NULL,
        sequence INTEGER NOT NULL, digest BLOB NOT NULL, row_digest BLOB NOT NULL,
        PRIMARY KEY (uuid, number)
    ) WITHOUT ROWID;
    """,
)
"""The steps from an empty database to the newest version, each one script."""

ALIVE, DELETED = "alive", "deleted"
_ALL = (1 << 63) - 1


class SessionRow(NamedTuple):
    """A session as the index knows it.

    Attributes:
        id: Chosen by its caller.
        uuid: The incarnation; 16 bytes; names the folder.
        epoch: At creation; of a deleted session the last one.
        state: "alive", or "deleted": a tombstone.
        spec: What it was created with, the session layer's own text.
        kernel_rev: Of the kernels that its records are to be replayed by.
        ring: File name; "" if the session logs nothing.
        reserved: Bytes that each of two snapshots may take for sure.
        snapshot: File name.
        number: The last record that the snapshot holds.
        size: Bytes of the snapshot.
        digest: xxh3_128 of the snapshot.
    """

    id: str
    uuid: bytes
    epoch: int
    state: str
    spec: str
    kernel_rev: str
    ring: str
    reserved: int
    snapshot: str
    number: int
    size: int
    digest: bytes


class RecordRow(NamedTuple):
    """That a record was durable, where, and for which key ("" and 0 without one)."""

    uuid: bytes
    number: int
    place: int
    worker: str
    sequence: int
    digest: bytes


class Rows(NamedTuple):
    """All rows as they are, whether their digests are right or not; each has its digest last."""

    sessions: list[tuple[Any, ...]]
    records: list[tuple[Any, ...]]


class Found(NamedTuple):
    """All that an index says.

    Attributes:
        sessions: The intact session rows.
        records: The intact record rows.
        bad_sessions: Ids of session rows whose digest is wrong.
        bad_records: UUIDs of record rows whose digest is wrong.
    """

    sessions: list[SessionRow]
    records: list[RecordRow]
    bad_sessions: list[str]
    bad_records: list[bytes]


Row = TypeVar("Row", SessionRow, RecordRow)


def row_digest(row: SessionRow | RecordRow) -> bytes:
    """The digest of a row's values."""
    plain = [value.hex() if isinstance(value, bytes) else value for value in row]
    return xxhash.xxh3_128_digest(json.dumps(plain).encode())


def sealed(row: SessionRow | RecordRow) -> tuple[Any, ...]:
    """A row with its digest, as it is in the database."""
    return (*row, row_digest(row))


def sift(rows: Rows) -> Found:
    """Tells intact rows from others."""
    found = Found([], [], [], [])
    for values in rows.sessions:
        _sort(SessionRow(*values[:-1]), values[-1], found.sessions, found.bad_sessions, 0)
    for values in rows.records:
        _sort(RecordRow(*values[:-1]), values[-1], found.records, found.bad_records, 0)
    return found


class Index:
    """The open database. Any thread may call; one transaction runs at a time.

    `note` never waits for the disk: a commit calls it.

    Raises:
        Refused: It is damaged, of another program, newer, or in use.
        NoSpace: The disk is full.
        StorageFailure: It can't be written.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._noting = threading.Lock()
        self._pending: list[RecordRow] = []
        with files.writing(f"opening {path.name}"):
            self._connection = files.calls.connect(path)
        try:
            self._prepare()
        except SQLITE_ERRORS as error:
            self._connection.close()
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise NoSpace(f"opening {path.name}: {error}") from error
            raise Refused(
                f"{path} can't be read ({error}); nothing was changed. Restore it from a backup."
            ) from error
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        self._connection.text_factory = _shown
        for pragma in (
            "locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "cell_size_check=ON",
        ):  # fmt: skip
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        version = self._version()
        complaints = self._connection.execute("PRAGMA quick_check").fetchall()
        if complaints != [("ok",)]:
            raise Refused(
                f"index.db is damaged ({complaints[0][0]}); nothing was changed. Restore it from a "
                "backup."
            )
        with self._transaction(Sync.INDEX_OPEN):
            self._migrate(version)

    def _version(self) -> int:
        """The version of the schema; 0 for an empty database."""
        application, version, tables = (
            self._connection.execute(query).fetchone()[0]
            for query in (
                "PRAGMA application_id", "PRAGMA user_version",
                "SELECT count(*) FROM sqlite_master",
            )
        )  # fmt: skip
        if not (application or version or tables):
            return 0
        if application != APPLICATION or version < 1:
            raise Refused("index.db is damaged, or of another program; it was left as it is.")
        if version > len(MIGRATIONS):
            raise Refused(
                f"index.db has version {version} and this server reads up to {len(MIGRATIONS)}; "
                "start the newer version that wrote it."
            )
        return int(version)

    def _migrate(self, version: int) -> None:
        for script in MIGRATIONS[version:]:
            for statement in script.split(";"):
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id={APPLICATION}")
        self._connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    @contextlib.contextmanager
    def _transaction(self, site: Sync, *, settle: bool = True) -> Iterator[None]:
        """One transaction, durable at its end; `settle` also moves it out of the log."""
        with self._files.writing(site):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._files.calls.commit(self._connection, site)
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        if settle:  # on a full disk it stays in the log, as durable as before
            with contextlib.suppress(NoSpace), self._files.writing(site):
                self._files.calls.checkpoint(self._connection, site)

    # Sessions

    def put(self, row: SessionRow, site: Sync) -> None:
        """Writes a session's row, and forgets the witnesses that its snapshot makes needless.

        Raises:
            NoSpace: The disk is full; the row is as it was.
        """
        through = row.number if row.state == ALIVE else _ALL
        with self._lock:
            with self._transaction(site):
                marks = ",".join("?" * (len(row) + 1))
                self._connection.execute(
                    f"INSERT OR REPLACE INTO session VALUES ({marks})", sealed(row)
                )
                self._connection.execute(
                    "DELETE FROM record WHERE uuid = ? AND number <= ?", (row.uuid, through)
                )
            with self._noting:
                self._pending = [
                    one for one in self._pending if one.uuid != row.uuid or one.number > through
                ]

    def erase(self, name: str) -> None:
        """Removes rows whose damaged id is no text and is only shown as `name`.

        `put` can't replace them: it writes another row.
        """
        with self._lock:
            ids = self._connection.execute("SELECT CAST(id AS BLOB) FROM session").fetchall()
            wrong = [one for one in ids if one[0] != name.encode() and _shown(one[0]) == name]
            if wrong:
                with self._transaction(Sync.INDEX_BURY):
                    self._connection.executemany(
                        "DELETE FROM session WHERE CAST(id AS BLOB) = ?", wrong
                    )

    def find(self, name: str) -> SessionRow | None:
        """The row of an id, or of its tombstone."""
        with self._lock, self._files.writing("reading the index"):
            rows = self._select("session", SessionRow._fields, name)
        return SessionRow(*rows[0][:-1]) if rows else None

    # Witnesses

    def note(self, rows: Iterable[RecordRow]) -> None:
        """Remembers rows of durable records for the next `flush`."""
        with self._noting:
            self._pending.extend(rows)

    def flush(self) -> None:
        """Writes the rows that wait, in one transaction. To be called every 100 ms or sooner.

        Raises:
            NoSpace: The disk is full; the rows wait on.
        """
        with self._lock:  # which keeps `put` from forgetting what is written here
            with self._noting:
                rows = list(self._pending)
            if not rows:
                return
            with self._transaction(Sync.INDEX_WITNESS, settle=False):
                self._connection.executemany(
                    "INSERT OR REPLACE INTO record VALUES (?,?,?,?,?,?,?)", map(sealed, rows)
                )
            with self._noting:
                del self._pending[: len(rows)]

    # All of it

    def read(self) -> Found:
        """Every row, checked.

        Raises:
            Refused: The database is damaged.
        """
        return sift(self.rows())

    def rows(self) -> Rows:
        """Every row as it is, all of one moment.

        Raises:
            Refused: The database is damaged.
        """
        try:
            with self._lock:
                return Rows(
                    self._select("session", SessionRow._fields),
                    self._select("record", RecordRow._fields),
                )
        except SQLITE_ERRORS as error:
            raise Refused(f"index.db is damaged ({error}); restore it from a backup.") from error

    def fill(self, rows: Rows) -> None:
        """Writes the rows of another index into this one, which is of a backup.

        Raises:
            NoSpace: The disk is full.
        """
        with self._lock, self._transaction(Sync.BACKUP_INDEX):
            for table, values in (("session", rows.sessions), ("record", rows.records)):
                for one in values:
                    marks = ",".join("?" * len(one))
                    self._connection.execute(
                        f"INSERT OR REPLACE INTO {table} VALUES ({marks})", one
                    )

    def _select(self, table: str, columns: tuple[str, ...], name: str | None = None) -> list[Any]:
        """Rows, each with its digest last. By name: damage of the schema's text must show here."""
        where, values = ("", ()) if name is None else (" WHERE id = ?", (name,))
        query = f"SELECT {','.join(columns)}, row_digest FROM {table}{where} ORDER BY 1"
        return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Writes what waits and closes the database; its log is emptied."""
        try:
            self.flush()
        finally:
            self._connection.close()


def _shown(data: bytes) -> str:
    """Text of the database; damaged text must not be an error, as its digest is wrong already."""
    return data.decode("utf-8", "replace")


def _sort(row: Row, digest: object, good: list[Row], bad: list[Any], key: int) -> None:
    """Puts a row where it belongs: among the intact ones, or its key among the bad."""
    if row_digest(row) == digest:
        good.append(row)
    else:
        bad.append(row[key])
