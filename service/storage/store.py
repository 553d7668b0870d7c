"""A data folder, held by this process: its lock, its index, and the sessions in it."""

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from service.storage import backup, lock, recovery, snapshots
from service.storage.backup import Backup, Members
from service.storage.ballast import SIZE, Ballast
from service.storage.checkpoints import Checkpoints
from service.storage.failures import Damaged, NoSpace, Refused
from service.storage.files import Bytes, Files, Sync
from service.storage.header import Shape
from service.storage.index import ALIVE, DELETED, Index, SessionRow
from service.storage.journal import Journal, ring_name
from service.storage.recovery import CREATING, Pending, Recovered, Recovery
from service.storage.ring import Ring


class Store:
    """Opens a data folder, or makes one.

    Args:
        path: The folder; its parent exists.
        files: The calls; tests pass others.
        ballast: Bytes that are kept for the time when the disk is full.

    Attributes:
        checkpoints: Those of all sessions.

    Raises:
        Refused: It is in use, newer, damaged, or not to be made.
        NoSpace: The disk is full.
        StorageFailure: It can't be written.
    """

    def __init__(self, path: Path, files: Files | None = None, *, ballast: int = SIZE) -> None:
        self._path = path
        self._files = files or Files()
        self._ballast = Ballast(self._files, path / lock.BALLAST, ballast)
        self.checkpoints = Checkpoints(self._files, path / lock.CHECKPOINTS)
        self._births = threading.Lock()
        """Held while a session appears, so that its row and its journal appear together."""
        self._journals: dict[bytes, Journal] = {}
        self._refused: set[str] = set()
        self._copying = threading.Lock()
        self._ending = threading.Event()
        if not path.parent.is_dir():
            raise Refused(f"{path} can't be made: there is no folder {path.parent}.")
        self._files.make_folder(path)
        self._lock = lock.Lock(self._files, path)
        try:
            self._index = self._ballast.relieve(self._open)
            self._files.fsync_folder(path, Sync.DATA_FOLDER)
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> Index:
        lock.prepare(self._files, self._path)
        return Index(self._files, self._path / lock.INDEX)

    def recover(self) -> Recovery:
        """What the folder holds; to be called once, before anything else.

        Raises:
            Refused: The index is damaged.
            StorageFailure: Something can't be written.
        """
        with contextlib.suppress(NoSpace):
            self.checkpoints.tidy()
        found = recovery.begin(self._files, self._path, self._index)
        self._refused = set(found.damaged)
        try:
            self._ballast.fill()
        except NoSpace as error:
            found.notes.append(
                f"there is no room for the ballast ({error}): make room, or a deletion that is to "
                "free some may find none"
            )
        return found

    def take_up(self, pending: Pending) -> Recovered:
        """Takes up one of the sessions that `recover` found.

        Raises:
            Damaged: It is refused and left as it is.
            StorageFailure: Something can't be written.
        """
        row = pending.row
        self._refused.discard(row.id)
        try:
            found = recovery.take_up(self._files, self._path, self._index, self._ballast, pending)
        except Damaged:
            self._refused.add(row.id)
            raise
        with self._births:
            self._journals[row.uuid] = found.journal
        return found

    def create(
        self,
        name: str,
        *,
        uuid: UUID,
        epoch: int,
        spec: str,
        kernel_rev: str,
        chunks: Iterable[Bytes],
        reserved: int,
        shape: Shape | None,
    ) -> Journal:
        """Makes a session, durable when this returns. Its id is free or deleted.

        Args:
            name: Its id.
            uuid: The incarnation; new.
            epoch: Above that of the tombstone, if there is one.
            spec: What it is created with.
            kernel_rev: Of the kernels that its records are to be replayed by.
            chunks: Its first snapshot, of record 0.
            reserved: Bytes that each of two snapshots may take for sure.
            shape: Of its ring; None if it logs nothing, or nothing yet.

        Raises:
            ValueError: A living session has this id.
            NoSpace: The disk can't hold it; nothing has happened.
        """
        sessions = self._path / lock.SESSIONS
        before = self._index.find(name)
        if before is not None:
            self._bury(before, sessions / before.uuid.hex())
        row = SessionRow(
            name, uuid.bytes, epoch, ALIVE, spec, kernel_rev,
            "" if shape is None else ring_name(0), reserved, "", 0, 0, b"",
        )  # fmt: skip
        return self._build(sessions / uuid.hex, row, chunks, shape)

    def _build(
        self, folder: Path, row: SessionRow, chunks: Iterable[Bytes], shape: Shape | None
    ) -> Journal:
        """Makes the files of a session, then commits its row."""
        draft = folder.with_name(f"{folder.name}{CREATING}")
        ring: Ring | None = None
        self._files.make_folder(draft)
        try:
            if shape is not None:
                ring = Ring.create(self._files, draft / row.ring, row.uuid, shape, 0)
            snapshots.reserve(self._files, draft, row.reserved)
            made = snapshots.write(self._files, draft, 0, chunks)
            snapshots.reserve(self._files, draft, row.reserved)
            self._files.fsync_folder(draft.parent, Sync.SESSIONS_FOLDER)
            row = row._replace(snapshot=made.name, size=made.size, digest=made.digest)
            return self._commit(draft, folder, row, ring)
        except Exception:
            if ring is not None:
                ring.retire()
            self._files.remove_folder(draft)  # which a StorageFailure forbids: the row may be there
            raise

    def _commit(self, draft: Path, folder: Path, row: SessionRow, ring: Ring | None) -> Journal:
        """Commits the row of a session whose files are durable."""
        with self._births:
            self._index.put(row, Sync.INDEX_CREATE)
            # Recovery gives the folder its name where a crash comes first.
            try:
                self._files.rename(draft, folder)
            except NoSpace:
                folder = draft
            journal = Journal(self._files, folder, self._index, row, ring, self._ballast)
            self._forget_the_deleted()
            self._journals[row.uuid] = journal
        return journal

    def _bury(self, row: SessionRow, folder: Path) -> None:
        """Makes sure that nothing is left of a deleted session whose row is about to go."""
        if row.state == ALIVE:
            raise ValueError(f"session {row.id!r} lives; delete it first")
        if folder.exists():
            self._files.remove_folder(folder)

    def flush(self) -> None:
        """Writes the witnesses of committed records. To be called every 100 ms or sooner.

        Raises:
            NoSpace: The disk is full; they wait on, and nothing is lost.
        """
        self._index.flush()

    # Backups

    def backup(self, to: Path) -> Backup:
        """Makes a data folder that recovers to what this one holds, while its sessions go on.

        Each session is in it as it was at one moment of the call. Commits do not wait for it; a
        snapshot, a replacement or a deletion waits until its session is copied.

        Args:
            to: What is to be made; its parent exists, and it does not.

        Returns:
            What is in it. What is damaged here is damaged there, and is said.

        Raises:
            Refused: It may not be made there, another one is being made, or not all sessions are
                taken up.
            NoSpace: There is no room; nothing is left.
            CopyFailed: The copy could not be made, or `end_backup` came first; nothing is left.
        """
        if not self._copying.acquire(blocking=False):
            raise Refused("A backup is being made; wait for its end.")
        try:
            there = self._members()
            with backup.making(self._files.calls, self._path, to, self._ending) as target:
                return backup.fill(target, self._files, there, self.checkpoints)
        finally:
            self._copying.release()

    def _members(self) -> Members:
        with self._births:
            self._forget_the_deleted()
            rows = self._index.rows()
            return backup.members(
                rows, dict(self._journals), self._refused, self._path / lock.SESSIONS
            )

    def _forget_the_deleted(self) -> None:
        gone = [uuid for uuid, one in self._journals.items() if one.row.state == DELETED]
        for uuid in gone:
            del self._journals[uuid]

    def end_backup(self) -> None:
        """Makes a backup that is being made fail soon: the server stops and can't wait for it."""
        self._ending.set()

    def close(self) -> None:
        """Writes what waits, closes the index and lets go of the folder; journals are closed."""
        self.end_backup()
        with self._copying:
            try:
                self._index.close()
            finally:
                self._lock.release()
