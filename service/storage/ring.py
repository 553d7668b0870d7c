"""The ring of one session: records in pre-reserved places of one file, durable by one fdatasync.

A place is reserved, sealed (the payload is written, by any thread), and committed: only then is
its header written, and the record exists once the file is synced. A crash at any point leaves
either the whole record, or a header whose checksum or payload digest is wrong, or what the place
held before. Places are reused in no particular order, and only when a durable snapshot holds their
record: what tells laps apart is the record number, not the place.

The payload goes through `pwrite` from the caller's own buffer, not through a mapping of the file:
each page of a mapping costs a fault into the file system's journal after every sync, 2 to 3 times
the whole commit at 4 MB, and stalls the thread that fills it behind other commits (decision 0014).
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from service.storage.failures import Damaged
from service.storage.files import Bytes, Files, Sync
from service.storage.header import (
    NO_DIGEST,
    PAGE,
    Header,
    Key,
    Kind,
    Page,
    Shape,
    pack,
    pack_preamble,
    parse,
    parse_preamble,
    tail,
)

SLICE = 1 << 20
"""Bytes hashed and written at a time: what was just hashed is still in the cache."""


class Slot:
    """A place for one record, reserved until it is committed or released.

    Attributes:
        place: Which one.
        header: What was sealed, with the record's number once it is committed.
    """

    __slots__ = ("_hasher", "_ring", "_size", "header", "place")

    def __init__(self, ring: "Ring", place: int) -> None:
        self._ring = ring
        self._hasher = xxhash.xxh3_128()
        self._size = 0
        self.place = place
        self.header: Header | None = None

    @property
    def room(self) -> int:
        """Bytes of payload that still fit."""
        return self._ring.room(self.place) - self._size

    def write(self, payload: Bytes) -> None:
        """Appends bytes to the payload in its place; any one thread at a time may call.

        Args:
            payload: C-contiguous, at most `room` bytes.

        Raises:
            ValueError: They do not fit.
            NoSpace: The disk is full (on file systems that copy on write); release the slot.
            StorageFailure: The write failed.
        """
        data = memoryview(payload).cast("B")
        if len(data) > self.room:
            raise ValueError(f"{len(data)} bytes do not fit into place {self.place}")
        self._ring.fill(self.place, self._size, data, self._hasher)
        self._size += len(data)

    def seal(
        self,
        kind: Kind,
        *,
        key: Key | None = None,
        digest: bytes = NO_DIGEST,
        meta: bytes = b"",
        payload: Bytes = b"",
    ) -> None:
        """Ends the payload and says what the record is; nothing is promised yet.

        Args:
            kind: What the record is.
            key: Of a push.
            digest: 16 bytes that tell the push from another one with this key.
            meta: At most `META_BYTES`.
            payload: The rest of it, as for `write`.

        Raises:
            ValueError: Something is too long.
            NoSpace: As `write`.
            StorageFailure: As `write`.
        """
        tail(key, meta)
        if len(digest) != len(NO_DIGEST):
            raise ValueError(f"a digest has {len(NO_DIGEST)} bytes, not {len(digest)}")
        self.write(payload)
        self.header = Header(
            self._ring.session, 0, 0, kind, key, digest, self._hasher.digest(), self._size,
            bytes(meta),
        )  # fmt: skip

    def release(self) -> None:
        """Gives the place back; nothing has happened.

        Raises:
            ValueError: The record is committed, or the place was given back before.
        """
        if self.place < 0 or (self.header is not None and self.header.number):
            raise ValueError("this place is not reserved")
        place, self.place = self.place, -1
        self._ring.release(place)


class Ring:
    """An open ring file. `reserve` and `release` never wait for the disk; one thread commits.

    Args:
        files: The calls.
        fd: Of the file; owned.
        session: The incarnation, 16 bytes.
        shape: Of the file.
    """

    def __init__(self, files: Files, fd: int, session: bytes, shape: Shape) -> None:
        self._files = files
        self._fd = fd
        self.session = session
        self.shape = shape
        self.last = 0
        """The last committed record."""
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        self._free: tuple[list[int], list[int]] = ([], [])
        self._reserved: set[int] = set()
        self._live: dict[int, int] = {}
        self._retired = False

    # Making, opening, closing

    @classmethod
    def create(cls, files: Files, path: Path, session: bytes, shape: Shape, last: int) -> "Ring":
        """A new ring, durable except for its name, whose first record is `last` + 1.

        Raises:
            NoSpace: The disk can't hold it; an incomplete file is left.
        """
        fd = files.open(path, create=True)
        try:
            files.allocate(fd, shape.size, f"reserving {path.name}")
            files.write(fd, pack_preamble(session, shape), 0, f"writing {path.name}")
            files.fsync(fd, Sync.RING_CREATE)
        except BaseException:
            files.calls.close(fd)
            raise
        ring = cls(files, fd, session, shape)
        ring._start(last, {})
        return ring

    @classmethod
    def open(cls, files: Files, path: Path, session: bytes, *, writable: bool) -> "Ring":
        """The ring of a file, to be read; `resume` then makes a writable one accept records.

        Raises:
            Damaged: The file is no ring of this session.
            OSError: The disk can't read it.
        """
        fd = files.open(path) if writable else files.open_to_read(path)
        try:
            found = parse_preamble(files.read(fd, PAGE, 0))
            if isinstance(found, Page):
                raise Damaged(f"the first page {found.value}", path.name)
            owner, shape = found
            if owner != session:
                raise Damaged("the ring belongs to another session", path.name)
            if len(files.read(fd, 1, shape.size - 1)) != 1:
                raise Damaged(f"the ring is shorter than its {shape.size} bytes", path.name)
        except BaseException:
            files.calls.close(fd)
            raise
        return cls(files, fd, session, shape)

    def reserve_blocks(self) -> None:
        """Reserves what a copy of the file may have lost: unused blocks are holes to a copier.

        Raises:
            NoSpace: The disk is full; a commit that meets a hole then ends the process.
        """
        self._files.allocate(self._fd, self.shape.size, "reserving the ring")

    def resume(self, last: int, live: Mapping[int, int], leftovers: Iterable[int]) -> None:
        """Takes up a ring that recovery has read.

        What a killed process has written may still be in memory only, and recovery has believed it:
        it is synced before anyone builds on it. Headers of records that were given up are blanked,
        or they could follow a later record as if they had been committed after it.

        Args:
            last: The last record that counts.
            live: The number in each place that no snapshot holds.
            leftovers: Places whose records were given up.
        """
        for place in leftovers:
            offset = self.shape.offset(place)
            self._files.write(self._fd, bytes(PAGE), offset, "blanking a record", may_be_full=False)
        self._files.fdatasync(self._fd, Sync.RING_OPEN)
        self._start(last, live)

    def _start(self, last: int, live: Mapping[int, int]) -> None:
        self.last = last
        self._live = dict(live)
        for place in reversed(range(self.shape.places)):
            if place not in self._live:
                self._free[place >= self.shape.records].append(place)

    def retire(self) -> None:
        """Ends the ring; the file is closed once no slot is reserved."""
        with self._committing, self._lock:
            self._retired = True
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._reserved and self._fd >= 0:
            self._files.calls.close(self._fd)
            self._fd = -1

    # Places

    def reserve(self, *, payload: bool) -> Slot | None:
        """A free place with room for a payload or a record page; None if the ring is full."""
        with self._lock:
            free = self._free[payload]
            if self._retired or not free:
                return None
            place = free.pop()
            self._reserved.add(place)
            return Slot(self, place)

    def release(self, place: int) -> None:
        """Takes a reserved place back."""
        with self._lock:
            self._reserved.remove(place)
            self._free[place >= self.shape.records].append(place)
            self._close_if_done()

    def free(self) -> tuple[int, int]:
        """How many record pages and how many slots are free; none once it is retired."""
        if self._retired:
            return 0, 0
        records, slots = self._free
        return len(records), len(slots)

    def standing(self) -> tuple[int, dict[int, int]]:
        """The last record, and the numbers of those that no snapshot holds, by place."""
        with self._lock:
            return self.last, dict(self._live)

    def room(self, place: int) -> int:
        """Bytes of payload that a place has."""
        return self.shape.capacity if place >= self.shape.records else 0

    # Records

    def fill(self, place: int, at: int, data: memoryview, hasher: xxhash.xxh3_128) -> None:
        """Writes a part of a payload that begins at byte `at`, and adds it to the digest."""
        offset = self.shape.offset(place) + PAGE + at
        for start in range(0, len(data), SLICE):
            part = data[start : start + SLICE]
            hasher.update(part)
            self._files.write(self._fd, part, offset + start, "writing a payload")

    def commit(self, slots: Sequence[Slot]) -> list[Header]:
        """Makes sealed records durable, in this order, by one sync; returns them numbered.

        Raises:
            StorageFailure: Whether the records exist is for recovery to say.
        """
        with self._committing:
            if self._retired:
                raise ValueError("the ring is retired")
            synced = self.last
            done: list[Header] = []
            for number, slot in enumerate(slots, synced + 1):
                assert slot.header is not None, "commit before seal"
                header = slot.header._replace(number=number, synced=synced)
                page, offset = pack(header), self.shape.offset(slot.place)
                self._files.write(self._fd, page, offset, "writing a header", may_be_full=False)
                done.append(header)
            self._files.fdatasync(self._fd, Sync.RING_COMMIT)
            with self._lock:
                for slot, header in zip(slots, done, strict=True):
                    slot.header = header
                    self._live[slot.place] = header.number
                    self._reserved.remove(slot.place)
                self.last += len(done)
        return done

    def free_through(self, number: int) -> None:
        """Frees the places of records that a durable snapshot holds."""
        with self._lock:
            for place in [place for place, held in self._live.items() if held <= number]:
                del self._live[place]
                self._free[place >= self.shape.records].append(place)

    def advance(self, number: int) -> None:
        """Goes on behind a record that is not in the ring: a durable snapshot is all of it."""
        with self._committing:
            self.free_through(number)
            self.last = number

    # Reading

    def headers(self) -> Iterator[tuple[int, Header | Page]]:
        """What each place holds.

        Raises:
            OSError: The disk can't read it.
        """
        for place in range(self.shape.places):
            yield place, parse(self._files.read(self._fd, PAGE, self.shape.offset(place)))

    def is_whole(self, place: int, header: Header) -> bool:
        """Whether the payload of a record is the one that was sealed."""
        if header.length > self.room(place):
            return False
        hasher = xxhash.xxh3_128()
        offset = self.shape.offset(place) + PAGE
        for at in range(0, header.length, SLICE):
            size = min(SLICE, header.length - at)
            hasher.update(self._files.read(self._fd, size, offset + at))
        return hasher.digest() == header.payload_digest

    def payload(self, place: int, header: Header) -> bytes:
        """The payload of a record."""
        return self._files.read(self._fd, header.length, self.shape.offset(place) + PAGE)
