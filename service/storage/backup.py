"""A backup: a data folder that recovers to what another one held, made while that one goes on.

Each session is copied as it is at one moment between the beginning and the end: its journal keeps
snapshot and ring as they are, and the records behind the snapshot are copied up to the last one of
that moment. Commits go on meanwhile, for what they write is not copied. Checkpoints are files that
never change: those that are there from the beginning to the end are in it.

The folder is `<to>.partial` until all of it is written, read again, and durable. It takes no more
room than what it holds: what is reserved in a data folder is holes here, and is reserved again
when a server takes it up. What is damaged is copied as it is, and said.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from service.storage import lock
from service.storage.checkpoints import Checkpoints, is_draft, newest, read_folder
from service.storage.failures import CopyFailed, Damage, Damaged, Refused, StorageFailure
from service.storage.files import Calls, Files, Pace, Sync
from service.storage.header import PAGE, Header, Page, pack_preamble, parse
from service.storage.index import ALIVE, Index, RecordRow, Rows, SessionRow, sealed, sift
from service.storage.journal import Journal, Standing, record_row
from service.storage.recovery import CREATING, examine, folder_of, survey

PARTIAL = ".partial"
SLICE = 1 << 20
_ZEROS = bytes(SLICE)


class Backup(NamedTuple):
    """What a backup holds.

    Attributes:
        sessions: The last record of each living session, by id.
        checkpoints: How many.
        size: Bytes that were written.
        damaged: What is not whole in it, as it is not whole in the data folder.
    """

    sessions: dict[str, int]
    checkpoints: int
    size: int
    damaged: list[Damage]


class Members(NamedTuple):
    """Who was there when a backup began.

    Attributes:
        rows: Of the index.
        journals: Of the sessions that were taken up, by incarnation.
        others: Folders of sessions that recovery refuses; nobody changes them.
    """

    rows: Rows
    journals: dict[bytes, Journal]
    others: list[Path]


# The folder in the making


class Target:
    """The folder that a backup becomes.

    It has `Files` of its own: what fails here is no failure of the data folder.

    Attributes:
        files: The calls.
        path: Where it is by now.
        size: Bytes written so far.
        unreadable: What the disk could not read; zeros are in its place.
    """

    def __init__(self, calls: Calls, path: Path, stop: threading.Event) -> None:
        self.files = Files(calls)
        self.path = path
        self.size = 0
        self.unreadable: list[Damage] = []
        self._stop = stop

    def folder(self, *names: str) -> Path:
        """A folder in it, made if it is not there."""
        path = self.path.joinpath(*names)
        self.files.make_folder(path)
        return path

    def copy(self, source: Path, folder: Path) -> None:
        """Copies a file as it is, its time included; what is zero becomes a hole.

        Raises:
            FileNotFoundError: It is not there.
        """
        fd = self.files.open_to_read(source)
        try:
            facts = os.fstat(fd)
            with self.file(folder / source.name, facts.st_size) as out:
                self.part(source, fd, out, 0, facts.st_size)
                self.files.stamp(out, facts.st_mtime_ns, f"copying {source.name}")
        finally:
            self.files.calls.close(fd)

    @contextlib.contextmanager
    def file(self, path: Path, size: int) -> Iterator[int]:
        """A new file of this size to be written, durable at the end of the block."""
        with self.files.created(path) as fd:
            self.files.truncate(fd, size, f"copying {path.name}")
            yield fd
            self.files.fsync(fd, Sync.BACKUP_FILE)

    def part(self, source: Path, fd: int, out: int, offset: int, size: int) -> None:
        """Copies a part of an open file to the same place of another one."""
        pace = Pace(self.files, out, Sync.BACKUP_FILE)
        for at in range(offset, offset + size, SLICE):
            if self._stop.is_set():
                raise CopyFailed("the server is stopping; make the backup again later.")
            try:
                data = self.files.read(fd, min(SLICE, offset + size - at), at)
            except OSError as error:
                what = f"the disk can't read it: {error.strerror}"
                self.unreadable.append(Damage(source.parent.name, what, source.name))
                continue
            if data != _ZEROS[: len(data)]:
                self.files.write(out, data, at, f"copying {source.name}")
                self.size += len(data)
                pace.wrote(len(data))

    def tree(self, source: Path, *names: str) -> None:
        """Copies a folder with what is in it, except for drafts of checkpoints."""
        folder = self.folder(*names)
        for entry in sorted(source.iterdir()):
            if entry.is_symlink() or is_draft(entry.name):
                continue
            if entry.is_dir():
                self.tree(entry, *names, entry.name)
            else:
                self.copy(entry, folder)

    def finish(self, to: Path) -> None:
        """Makes all of it durable, then gives it its name."""
        for folder, _, _ in os.walk(self.path, topdown=False):
            self.files.fsync_folder(Path(folder), Sync.BACKUP_FOLDER)
        self.files.rename(self.path, to)
        self.path = to
        self.files.fsync_folder(to.parent, Sync.BACKUP_NAME)

    def abandon(self) -> None:
        """Removes it, as well as the disk lets it."""
        with contextlib.suppress(Exception):
            Files(self.files.calls).remove_folder(self.path)


@contextlib.contextmanager
def making(
    calls: Calls, data: Path, to: Path, stop: threading.Event | None = None
) -> Iterator[Target]:
    """A folder to be filled in the block, which then gets its name; nothing is left if it fails.

    Args:
        calls: Of the operating system.
        data: The data folder.
        to: What the backup is to be called.
        stop: Set by another thread, it makes the copying fail.

    Raises:
        Refused: It may not be made there.
        NoSpace: The disk is full.
        CopyFailed: A write or a sync failed, or a file could not be opened.
    """
    to = to.absolute()
    partial = to.parent / f"{to.name}{PARTIAL}"
    target = Target(calls, partial, stop or threading.Event())
    try:
        _refuse(data, to, partial)
        _make(target)
        try:
            yield target
            target.finish(to)
        except BaseException:
            target.abandon()
            raise
    except (StorageFailure, OSError) as failure:
        raise CopyFailed(
            f"The backup failed ({failure}) and nothing is left of it; the data folder is as it "
            f"was. Look after the disk of {to.parent}, or back up to another one."
        ) from failure


def _make(target: Target) -> None:
    with target.files.writing(f"making {target.path.name}"):
        target.files.calls.mkdir(target.path)


def _refuse(data: Path, to: Path, partial: Path) -> None:
    if to.exists():
        raise Refused(f"{to} exists, and a backup replaces nothing; choose another name.")
    if partial.exists():
        raise Refused(
            f"{partial} exists: another backup is being made there, or one was cut short; then "
            "remove it and try again."
        )
    if not to.parent.is_dir():
        raise Refused(f"{to} can't be made: there is no folder {to.parent}.")
    if to.parent.resolve().is_relative_to(data.resolve()):
        raise Refused(f"{to} lies in the data folder; choose a place outside of it.")


# A living data folder


class _Copied(NamedTuple):
    """A session of a moment: its row, witnesses of its records, the last of them."""

    row: SessionRow
    seen: list[RecordRow]
    last: int


def members(
    rows: Rows, journals: dict[bytes, Journal], refused: set[str], sessions: Path
) -> Members:
    """Sorts who is there.

    Args:
        rows: Of the index.
        journals: Of sessions that were taken up, by incarnation.
        refused: Ids of damaged sessions.
        sessions: The folder of all of them.

    Raises:
        Refused: A session is neither damaged nor taken up.
    """
    found = sift(rows)
    alive = {row.uuid.hex(): row.id for row in found.sessions if row.state == ALIVE}
    dead = {row.uuid.hex() for row in found.sessions if row.state != ALIVE}
    known = {uuid.hex() for uuid in journals}
    waiting = sorted({alive[name] for name in alive.keys() - known} - refused)
    if waiting:
        raise Refused(
            f"{len(waiting)} sessions are still to be recovered, among them {waiting[0]!r}; make "
            "the backup once the server is ready."
        )
    others = []
    for entry in sorted(sessions.iterdir()):
        name = entry.name.removesuffix(CREATING)
        unfinished = entry.name != name and name not in alive
        if entry.is_dir() and name not in known | dead and not unfinished:
            others.append(entry)
    return Members(rows, journals, others)


def fill(target: Target, files: Files, there: Members, checkpoints: Checkpoints) -> Backup:
    """Copies a data folder into an empty one, and reads the copy again.

    Args:
        target: The empty folder.
        files: The calls by which the data folder is read.
        there: Whom to copy.
        checkpoints: Of the data folder.
    """
    lock.make_folders(target.files, target.path)
    lock.make_free(target.files, target.path)
    lock.write_format(target.files, target.path)
    copied = _sessions(target, files, there)
    for entry in there.others:
        target.tree(entry, lock.SESSIONS, entry.name)
    rows = _rows(there, copied)
    index = Index(target.files, target.path / lock.INDEX)
    try:
        index.fill(rows)
    finally:
        index.close()
    count = _checkpoints(target, checkpoints)
    lasts = {name: one.last for name, one in copied.items() if one.row.state == ALIVE}
    damaged = [*target.unreadable, *_verify(target, rows, lasts)]
    return Backup(lasts, count, target.size, damaged)


def _sessions(target: Target, files: Files, there: Members) -> dict[str, _Copied]:
    """Copies the sessions that go on; those deleted by now are there by their tombstones."""
    copied: dict[str, _Copied] = {}
    for journal in there.journals.values():
        one = _session(target, files, journal)
        # An id that was deleted and used again meanwhile has two journals.
        if one.row.state == ALIVE or one.row.id not in copied:
            copied[one.row.id] = one
    return copied


def _session(target: Target, files: Files, journal: Journal) -> _Copied:
    with journal.still() as now:
        if now.row.state != ALIVE:
            return _Copied(now.row, [], 0)
        folder = target.folder(lock.SESSIONS, now.row.uuid.hex())
        with contextlib.suppress(FileNotFoundError):  # which `_verify` says
            target.copy(now.folder / now.row.snapshot, folder)
        return _Copied(now.row, _ring(target, files, now, folder), now.last)


def _ring(target: Target, files: Files, now: Standing, folder: Path) -> list[RecordRow]:
    """Copies the records behind a snapshot, each to its place; returns their witnesses."""
    if now.shape is None:
        return []
    source = now.folder / now.row.ring
    seen = []
    try:
        fd = files.open_to_read(source)
    except FileNotFoundError:
        return []
    try:
        with target.file(folder / source.name, now.shape.size) as out:
            preamble = pack_preamble(now.row.uuid, now.shape)
            target.files.write(out, preamble, 0, f"copying {source.name}")
            for place, number in sorted(now.live.items()):
                at = now.shape.offset(place)
                size = now.shape.offset(place + 1) - at
                header = _header(files, fd, at)
                if isinstance(header, Header) and header.number == number:
                    size = PAGE + header.length
                    seen.append(record_row(place, header))
                target.part(source, fd, out, at, size)
    finally:
        files.calls.close(fd)
    return seen


def _header(files: Files, fd: int, offset: int) -> Header | Page:
    try:
        return parse(files.read(fd, PAGE, offset))
    except OSError:
        return Page.TORN


def _later(row: SessionRow) -> SessionRow:
    """A row whose session goes on in the next epoch: the one that was copied has gone on in this.

    Else a gradient of steps that the copy does not have could pass for one of its own.
    """
    return row._replace(epoch=row.epoch + 1) if row.state == ALIVE else row


def _rows(there: Members, copied: dict[str, _Copied]) -> Rows:
    """The rows of the copy: of the moments of the sessions, and as they were of all else."""
    sessions: list[tuple[Any, ...]] = [sealed(_later(one.row)) for one in copied.values()]
    sessions += [values for values in there.rows.sessions if values[0] not in copied]
    records: list[tuple[Any, ...]] = [sealed(row) for one in copied.values() for row in one.seen]
    records += [values for values in there.rows.records if values[0] not in there.journals]
    return Rows(sessions, records)


def _checkpoints(target: Target, checkpoints: Checkpoints) -> int:
    """Copies the checkpoints of which one is there until it is copied; returns their number."""
    return sum(
        _checkpoint(target, checkpoints, uuid, one.name)
        for uuid in checkpoints.owners()
        for one in checkpoints.list(uuid)
    )


def _checkpoint(target: Target, checkpoints: Checkpoints, uuid: bytes, name: str) -> bool:
    while (found := checkpoints.find(uuid, name)) is not None:
        try:
            target.copy(checkpoints.open(found), target.folder(lock.CHECKPOINTS, uuid.hex()))
            return True
        except FileNotFoundError:  # another one has replaced it, or it was deleted
            continue
    return False


# The copy, read again


def _verify(target: Target, rows: Rows, lasts: dict[str, int]) -> list[Damage]:
    """What is damaged in a copy."""
    known = survey(sift(rows))
    damaged = list(known.damaged)
    for row, seen in known.sessions:
        try:
            _verify_session(target, row, seen, lasts.get(row.id))
        except Damaged as found:
            damaged.append(Damage(row.id, found.what, found.where))
    checkpoints = Checkpoints(target.files, target.path / lock.CHECKPOINTS)
    for uuid in checkpoints.owners():
        for one in newest(read_folder(target.path / lock.CHECKPOINTS / uuid.hex())):
            try:
                checkpoints.verify(one)
            except Damaged as found:
                damaged.append(Damage(f"session {uuid.hex()}", found.what, found.where))
    return damaged


def _verify_session(
    target: Target, row: SessionRow, seen: list[RecordRow], last: int | None
) -> None:
    folder = folder_of(target.path / lock.SESSIONS, row)
    ring, walk = examine(target.files, folder, row, seen, writable=False)
    if ring is not None:
        ring.retire()
    found = row.number + len(walk.records)
    if last is not None and found != last:
        raise Damaged(f"record {found + 1} can't be read", row.ring)
