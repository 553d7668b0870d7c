"""Every call that the storage makes of the operating system, and what its failures mean.

`Calls` are the bare calls, one line each; tests replace them to fail, to tear, to count and to
lose what was not synced. `Files` adds what all callers want: whole reads and writes, and one
meaning of errors. A full disk is `NoSpace`; any other failed write, and every failed sync, is a
`StorageFailure`, after which nothing is written or synced any more: an fsync is never retried.
"""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from service.storage.failures import NoSpace, StorageFailure

Bytes: TypeAlias = bytes | bytearray | memoryview
_FULL = (errno.ENOSPC, errno.EDQUOT)
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""The second is what a message becomes that quotes damaged bytes."""


PACE = 16 << 20
"""Bytes of a long file between two syncs."""


class Sync(StrEnum):
    """The places that make something durable. A test removes each in turn and must see a loss."""

    PARENT = "folder that holds the data folder"
    FORMAT = "format file"
    DATA_FOLDER = "data folder"
    SESSIONS_FOLDER = "folder of a new session"
    INDEX_OPEN = "index, opening"
    INDEX_CREATE = "index, new session"
    INDEX_NAME = "index, naming a snapshot"
    INDEX_BURY = "index, deleting a session"
    INDEX_WITNESS = "index, record rows"
    RING_CREATE = "new ring"
    RING_OPEN = "ring, opening"
    RING_COMMIT = "ring, commit"
    SNAPSHOT = "snapshot"
    SNAPSHOT_FOLDER = "folder of a snapshot"
    CHECKPOINT = "checkpoint"
    CHECKPOINT_NAME = "folder of a checkpoint"
    CHECKPOINTS_FOLDER = "folder of a session's checkpoints"
    CHECKPOINTS_OPEN = "checkpoints, opening"
    CHECKPOINT_REMOVED = "folder of a removed checkpoint"
    CHECKPOINTS_DROPPED = "folder of dropped checkpoints"
    BACKUP_FILE = "file of a backup"
    BACKUP_INDEX = "index of a backup"
    BACKUP_FOLDER = "folder in a backup"
    BACKUP_NAME = "folder that holds a backup"
    FORGET_ORPHANS = "orphans, setting a session aside"
    FORGET_SESSIONS = "sessions, setting one aside"


class Calls:
    """The bare calls."""

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor; a new file is its owner's alone."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        """Closes a descriptor."""
        os.close(fd)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes."""
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> int:
        """Writes a beginning of `data` and returns its length."""
        return os.pwrite(fd, data, offset)

    def allocate(self, fd: int, size: int) -> None:
        """Reserves blocks for the first `size` bytes; new ones read as zeros."""
        os.posix_fallocate(fd, 0, size)

    def truncate(self, fd: int, size: int) -> None:
        """Cuts a file."""
        os.ftruncate(fd, size)

    def stamp(self, fd: int, time_ns: int) -> None:
        """Sets when a file was last changed."""
        os.utime(fd, ns=(time_ns, time_ns))

    def fdatasync(self, fd: int, site: Sync) -> None:
        """Makes a file's bytes durable."""
        os.fdatasync(fd)

    def fsync(self, fd: int, site: Sync) -> None:
        """Makes a file durable."""
        os.fsync(fd)

    def fsync_folder(self, path: Path, site: Sync) -> None:
        """Makes the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replaces `target` at once."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Removes a file's name."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Makes a folder, its owner's alone."""
        os.mkdir(path, 0o700)

    def rmdir(self, path: Path) -> None:
        """Removes an empty folder."""
        os.rmdir(path)

    def connect(self, path: Path) -> sqlite3.Connection:
        """A connection in autocommit mode, for any thread; its owner serialises them."""
        # SQLite would leave the mode to the umask, and gives its log the mode of the database.
        os.close(Calls.open(self, path, os.O_RDWR | os.O_CREAT))
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def commit(self, connection: sqlite3.Connection, site: Sync) -> None:
        """Ends a transaction; durable, as the connection is `synchronous=FULL`."""
        connection.execute("COMMIT")

    def checkpoint(self, connection: sqlite3.Connection, site: Sync) -> None:
        """Syncs the write-ahead log, moves it into the database, syncs that, empties the log."""
        (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("the checkpoint was blocked")


class Files:
    """Whole reads and writes, and one meaning of errors."""

    def __init__(self, calls: Calls | None = None) -> None:
        self.calls = calls or Calls()
        self._failure: StorageFailure | None = None

    @contextlib.contextmanager
    def writing(self, what: str, *, may_be_full: bool = True) -> Iterator[None]:
        """Around calls that change something.

        Args:
            what: For the message.
            may_be_full: A full disk leaves things as they were; else it is a failure too.

        Raises:
            NoSpace: The disk is full.
            StorageFailure: Now, or earlier in this process.
        """
        if self._failure is not None:
            raise StorageFailure(f"{what}: after an earlier failure ({self._failure})")
        try:
            yield
        except OSError as error:
            if may_be_full and error.errno in _FULL:
                raise NoSpace(f"{what}: {error.strerror}") from error
            raise self._failed(what, error) from error
        except SQLITE_ERRORS as error:
            if may_be_full and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise NoSpace(f"{what}: {error}") from error
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> StorageFailure:
        self._failure = StorageFailure(f"{what}: {error}")
        return self._failure

    # Files

    def open(self, path: Path, *, create: bool = False) -> int:
        """A descriptor to read and write.

        Raises:
            FileNotFoundError: There is no such file and it is not to be created.
        """
        if not create:
            return self.calls.open(path, os.O_RDWR)
        with self.writing(f"creating {path.name}"):
            return self.calls.open(path, os.O_RDWR | os.O_CREAT)

    @contextlib.contextmanager
    def created(self, path: Path) -> Iterator[int]:
        """A descriptor of a file, made if it is not there, for the block."""
        fd = self.open(path, create=True)
        try:
            yield fd
        finally:
            self.calls.close(fd)

    def open_to_read(self, path: Path) -> int:
        """A descriptor that can only read."""
        return self.calls.open(path, os.O_RDONLY)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        parts: list[bytes] = []
        while size and (part := self.calls.pread(fd, size, offset)):
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(
        self, fd: int, data: Bytes, offset: int, what: str, *, may_be_full: bool = True
    ) -> None:
        """Writes all of `data`."""
        rest = memoryview(data)
        with self.writing(what, may_be_full=may_be_full):
            while rest:
                done = self.calls.pwrite(fd, rest, offset)
                if done <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                rest = rest[done:]
                offset += done

    def allocate(self, fd: int, size: int, what: str) -> None:
        """Reserves `size` bytes on the disk."""
        with self.writing(what):
            self.calls.allocate(fd, size)

    def truncate(self, fd: int, size: int, what: str) -> None:
        """Cuts a file."""
        with self.writing(what):
            self.calls.truncate(fd, size)

    def stamp(self, fd: int, time_ns: int, what: str) -> None:
        """Sets when a file was last changed."""
        with self.writing(what):
            self.calls.stamp(fd, time_ns)

    # What makes things durable

    def fdatasync(self, fd: int, site: Sync) -> None:
        """Makes a file's bytes durable; never retried."""
        with self.writing(site, may_be_full=False):
            self.calls.fdatasync(fd, site)

    def fsync(self, fd: int, site: Sync) -> None:
        """Makes a file durable; never retried."""
        with self.writing(site, may_be_full=False):
            self.calls.fsync(fd, site)

    def fsync_folder(self, path: Path, site: Sync) -> None:
        """Makes the names in a folder durable; never retried."""
        with self.writing(site, may_be_full=False):
            self.calls.fsync_folder(path, site)

    def replace(self, path: Path, data: bytes, site: Sync) -> None:
        """Writes a small file whole; its name is durable once the folder is synced."""
        draft = path.with_name(f"{path.name}.tmp")
        with self.created(draft) as fd:
            self.truncate(fd, 0, site)
            self.write(fd, data, 0, site)
            self.fsync(fd, site)
        self.rename(draft, path)

    # Names

    def rename(self, source: Path, target: Path) -> None:
        """Replaces `target` at once."""
        with self.writing(f"renaming {source.name}"):
            self.calls.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Removes a file's name, if it is there."""
        with self.writing(f"removing {path.name}"), contextlib.suppress(FileNotFoundError):
            self.calls.unlink(path)

    def make_folder(self, path: Path) -> None:
        """Makes a folder, if it is not there."""
        with self.writing(f"making {path.name}"), contextlib.suppress(FileExistsError):
            self.calls.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        """Removes a folder with what is in it."""
        for name in sorted(path.iterdir()):
            if name.is_dir() and not name.is_symlink():
                self.remove_folder(name)
            else:
                self.unlink(name)
        with self.writing(f"removing {path.name}"):
            self.calls.rmdir(path)


class Pace:
    """Syncs a long file as it grows: a commit of a session waits behind what the disk has to write.

    Nothing is promised by these syncs, only by the one at the end, which is of the same place.

    Args:
        files: The calls.
        fd: Of the file.
        site: Of its last sync.
    """

    def __init__(self, files: Files, fd: int, site: Sync) -> None:
        self._files = files
        self._fd = fd
        self._site = site
        self._written = 0

    def wrote(self, size: int) -> None:
        """Counts bytes that were written."""
        self._written += size
        if self._written >= PACE:
            self._files.fdatasync(self._fd, self._site)
            self._written = 0
