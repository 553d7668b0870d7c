"""What one session keeps on the disk: its folder with ring and snapshots, and its row.

```
sessions/<uuid>.creating/     a session whose row may not be committed yet
sessions/<uuid>/ring-<n>      the ring whose first record is n + 1, if the session logs
sessions/<uuid>/snap-<n>      everything up to record n
sessions/<uuid>/spare         room for the next snapshot
```

The order of things is what makes them durable. A record: payload, header, one sync, then the
caller applies and answers. A snapshot: bytes, sync, name, sync of the folder, transaction that
names it, then its places become free and the snapshot before it becomes the spare.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from service.storage import snapshots
from service.storage.ballast import Ballast
from service.storage.failures import NoSpace
from service.storage.files import Bytes, Files, Sync
from service.storage.header import Header, Shape
from service.storage.index import DELETED, Index, RecordRow, SessionRow
from service.storage.ring import Ring, Slot


def record_row(place: int, header: Header) -> RecordRow:
    """The witness of a durable record."""
    worker, sequence = header.key or ("", 0)
    return RecordRow(header.session, header.number, place, worker, sequence, header.digest)


class Standing(NamedTuple):
    """What is durable of a session at one moment.

    Attributes:
        row: Of the index; of a deleted session its tombstone.
        folder: Of the session.
        shape: Of the ring that the row names; None if it names none.
        last: The last durable record.
        live: The numbers of the records behind the snapshot, by place.
    """

    row: SessionRow
    folder: Path
    shape: Shape | None
    last: int
    live: dict[int, int]


class Journal:
    """The durable side of one session.

    `reserve` may be called anywhere. `commit`, `replace` and `delete` belong into the session's
    serial lane. `snapshot` may run beside them, with a copy of the state at some record; the other
    two wait for its end, a commit does not. After a `StorageFailure` the process must exit.

    Args:
        files: The calls.
        folder: Of the session.
        index: Of the data folder.
        row: As the index has it.
        ring: Open and resumed; None if the session logs nothing.
        ballast: Of the data folder.
    """

    def __init__(
        self,
        files: Files,
        folder: Path,
        index: Index,
        row: SessionRow,
        ring: Ring | None,
        ballast: Ballast,
    ) -> None:
        self._files = files
        self._folder = folder
        self._index = index
        self._ballast = ballast
        self._naming = threading.Lock()
        self.row = row
        self.ring = ring

    @property
    def last(self) -> int:
        """The last durable record."""
        return self.row.number if self.ring is None else self.ring.last

    # Records

    def reserve(self, *, payload: bool) -> Slot | None:
        """A place for a record; None if the ring is full until the next snapshot."""
        assert self.ring is not None, "the session logs nothing"
        return self.ring.reserve(payload=payload)

    def commit(self, slots: Sequence[Slot]) -> list[Header]:
        """Makes sealed records durable by one sync: when it returns they exist, numbered in order.

        Raises:
            StorageFailure: Whether they exist is for recovery to say.
        """
        assert self.ring is not None, "the session logs nothing"
        places = [slot.place for slot in slots]
        headers = self.ring.commit(slots)
        self._index.note(record_row(*pair) for pair in zip(places, headers, strict=True))
        return headers

    # Snapshots

    def snapshot(
        self, number: int, chunks: Iterable[Bytes], *, epoch: int, kernel_rev: str
    ) -> bool:
        """Replaces the snapshot by a newer one and frees the records that it holds.

        Args:
            number: The last record that it holds; one more than `last` if the session logs nothing.
            chunks: Its bytes.
            epoch: In which a recovery from it goes on.
            kernel_rev: Of the kernels that the records behind it are to be replayed by.

        Returns:
            False if the present one is as new: a `replace` came first, and nothing was written.

        Raises:
            NoSpace: The disk is full; the present one stands, and the ring stays as full as it is.
        """
        with self._naming:
            if number <= self.row.number:
                return False
            if number > self.last + (self.ring is None):
                raise ValueError(f"record {number} is not there yet")
            before = self.row
            self._name(before._replace(epoch=epoch, kernel_rev=kernel_rev), number, chunks)
            if self.ring is not None:
                self.ring.free_through(number)
            snapshots.recycle(self._files, self._folder, before.snapshot, before.reserved)
            return True

    def replace(
        self,
        chunks: Iterable[Bytes],
        *,
        epoch: int,
        kernel_rev: str,
        shape: Shape | None = None,
        reserved: int | None = None,
    ) -> int:
        """Commits a change that is a whole new state, as one record and its snapshot.

        Args:
            chunks: The snapshot.
            epoch: As in `snapshot`.
            kernel_rev: As in `snapshot`.
            shape: Of a new ring, where payloads get another size; None keeps the present one.
            reserved: Bytes that a snapshot may take from now on; None: as before.

        Returns:
            The number of the change.

        Raises:
            NoSpace: The disk is full; nothing has changed.
        """
        with self._naming:
            before, number = self.row, self.last + 1
            ring = None if shape is None else self._new_ring(number, shape)
            name = before.ring if ring is None else ring_name(number)
            reserved = before.reserved if reserved is None else reserved
            row = before._replace(ring=name, reserved=reserved, epoch=epoch, kernel_rev=kernel_rev)
            try:
                snapshots.reserve(self._files, self._folder, reserved)
                self._name(row, number, chunks)
            except Exception:
                if ring is not None:
                    ring.retire()
                    # A StorageFailure forbids this: the row may name the ring.
                    self._files.unlink(self._folder / name)
                raise
            # Committed: from here on nothing may look like a refusal.
            snapshots.recycle(self._files, self._folder, before.snapshot, reserved)
            if ring is not None:
                self._exchange(ring, before.ring)
            elif self.ring is not None:
                self.ring.advance(number)
            return number

    def _new_ring(self, number: int, shape: Shape) -> Ring:
        path = self._folder / ring_name(number)
        try:
            return Ring.create(self._files, path, self.row.uuid, shape, number)
        except NoSpace:
            self._files.unlink(path)
            raise

    def _exchange(self, ring: Ring, named: str) -> None:
        """Puts a named ring in the place of the one before it."""
        before, self.ring = self.ring, ring
        if before is not None:
            before.retire()
            with contextlib.suppress(NoSpace):
                self._files.unlink(self._folder / named)

    def _name(self, row: SessionRow, number: int, chunks: Iterable[Bytes]) -> None:
        """Writes a snapshot and names it in one transaction, with all that the row says."""
        made = snapshots.write(self._files, self._folder, number, chunks)
        row = row._replace(snapshot=made.name, number=number, size=made.size, digest=made.digest)
        try:
            self._index.put(row, Sync.INDEX_NAME)
        except NoSpace:
            snapshots.recycle(self._files, self._folder, made.name, row.reserved)
            raise
        self.row = row

    def begin(self, epoch: int, kernel_rev: str) -> None:
        """Says before anything new is promised in which epoch the next recovery goes on.

        Args:
            epoch: As in `snapshot`.
            kernel_rev: As in `snapshot`; another one only while there are no records behind it.
        """
        with self._naming:
            row = self.row._replace(epoch=epoch, kernel_rev=kernel_rev)
            if row != self.row:
                self._ballast.relieve(lambda: self._index.put(row, Sync.INDEX_NAME))
                self.row = row

    # Copying

    @contextlib.contextmanager
    def still(self) -> Iterator[Standing]:
        """Keeps the files of the session as they are during the block, except for new records.

        A snapshot, a replacement and the deletion wait for its end; a commit does not.
        """
        with self._naming:
            if self.ring is None:
                yield Standing(self.row, self._folder, None, self.last, {})
            else:
                yield Standing(self.row, self._folder, self.ring.shape, *self.ring.standing())

    # The end

    def delete(self, epoch: int) -> None:
        """Commits a tombstone, then removes the files; recovery finishes what a crash leaves.

        Raises:
            NoSpace: The disk is full, and the ballast did not help; nothing has changed.
        """
        with self._naming:
            row = tombstone(self.row.id, self.row.uuid, epoch)
            self._ballast.relieve(lambda: self._index.put(row, Sync.INDEX_BURY))
            self.row = row
            self.close()
            with contextlib.suppress(NoSpace):
                self._files.remove_folder(self._folder)
            self._ballast.refill()

    def close(self) -> None:
        """Ends the use of the ring."""
        if self.ring is not None:
            self.ring.retire()


def ring_name(number: int) -> str:
    """The file of the ring whose first record is `number` + 1."""
    return f"ring-{number}"


def tombstone(name: str, uuid: bytes, epoch: int) -> SessionRow:
    """What stays of a deleted session."""
    return SessionRow(name, uuid, epoch, DELETED, "", "", "", 0, "", 0, 0, b"")
