"""What a session keeps on the disk: its journal, and when a snapshot is made.

`snapshot` and `log` differ in one thing: a session that logs writes each change into its ring
before it answers. In the epoch that the index names a recovery goes on: of a session that logs the
present one, for nothing is lost; of the other the next one, unless a stop has left all in order.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from gradpost.protocol.dtypes import DTYPES
from kernels.pool import Waits
from service.errors import DiskFull, InvalidRequest, LogFull, ServiceError
from service.sessions import contributions, image
from service.sessions.arena import Arena
from service.sessions.disk import Disk
from service.sessions.image import Image, Standing
from service.sessions.lane import Program
from service.sessions.records import Close, Entry, entry_of, largest_push
from service.storage.header import META_BYTES, Kind, Shape
from service.storage.journal import Journal
from service.storage.ring import Slot

if TYPE_CHECKING:
    from service.sessions.session import Session

PAGES = 64
"""Records without payload that a ring holds beside those of its rounds: patches."""
END = 512
"""Bytes of a round's end beside its update."""
EXTRA = 65_536
"""Bytes beside the gradient in a slot, for long overrides and many stretches."""
IN_META, IN_PAYLOAD = b"\0", b"\1"
PAUSE_S = 5.0
"""Before a snapshot that found no room is tried again."""


class _Captured(NamedTuple):
    """A copy of a session, and the last record that it holds."""

    image: Image
    number: int
    mark: object


def shape_of(session: "Session", arena: Arena) -> Shape:
    """The ring of a session: slots for its widest gradient and the numbers of the push."""
    entries = len(arena.layout.entries)
    widest = arena.size * DTYPES[session.spec.dtype]
    capacity = widest + largest_push(entries) + EXTRA
    rounds = session.spec.log_slots if session.spec.update.mode == "sync" else 0
    return Shape(session.spec.log_slots, capacity, PAGES + 2 * rounds)  # ends, and passes


class Durable:
    """The durable side of one session. Used on the event loop, or in the session's lane.

    Args:
        session: Whose.
        disk: Where.
        journal: Its files.
    """

    def __init__(self, session: "Session", disk: Disk, journal: Journal) -> None:
        self._session = session
        self._disk = disk
        self.journal = journal
        self.guarded: Callable[[Callable[[], Any]], Callable[[], Any]] = disk.guarded
        self._task: asyncio.Task[bool] | None = None
        self._saved: object = None
        self.saved_at = time.monotonic()
        self.trouble: str | None = None
        """Why the last snapshot could not be made; None if it could."""

    @classmethod
    async def create(cls, session: "Session", disk: Disk) -> "Durable":
        """Makes the files of a session that has no parameters yet.

        Raises:
            DiskFull: There is no room for them.
        """
        empty = image.of(session, Standing.of(session))
        logs = session.spec.durability == "log"
        create = partial(
            disk.store.create,
            session.id,
            uuid=UUID(session.incarnation),
            epoch=session.epoch if logs else session.epoch + 1,
            spec=json.dumps(image.stated(session.spec)),
            kernel_rev=empty.facts.kernel_rev,
            chunks=empty.chunks(),
            reserved=cls.image_bytes(empty),
            shape=None,
        )
        return cls(session, disk, await disk.run(create))

    @property
    def logs(self) -> bool:
        """Whether a change is durable before it is answered."""
        return self._session.spec.durability == "log"

    @property
    def disk_bytes(self) -> int:
        """What is reserved on the disk: two snapshots, and the ring."""
        ring = self.journal.ring
        return 2 * self.journal.row.reserved + (0 if ring is None else ring.shape.size)

    def _epoch(self, epoch: int, *, final: bool = False) -> int:
        """In which a recovery goes on from a snapshot of this epoch."""
        return epoch if self.logs or final else epoch + 1

    def begin(self) -> None:
        """Says before anything is promised in which epoch the next recovery goes on."""
        self._disk.guarded(self._beginning())()
        self._saved = self._mark()

    def _beginning(self, *, final: bool = False) -> Callable[[], None]:
        session = self._session
        epoch = self._epoch(session.epoch, final=final)
        return partial(self.journal.begin, epoch, image.kernel_rev(session.spec))

    # Records

    def reserve(self, *, payload: bool = True) -> Slot | None:
        """A place for a push; None if the log is full.

        Args:
            payload: Whether it has a gradient; one without takes a page of the small track.
        """
        return self.journal.reserve(payload=payload)

    def reserve_end(self) -> Slot | None:
        """A place for the end of a round, kept from its beginning: no round may lack one."""
        arena = self._session.ready
        # Of every tensor for itself: a PATCH may come in between that cuts the groups' runs.
        large = largest_push(len(arena.layout.entries)) > META_BYTES - END
        return self.journal.reserve(payload=large)

    def keep_end(self) -> None:
        """Reserves the place for the end of a round that has come back from the log."""
        found = self._session.rounds.open
        if found is not None:
            found.slot = self.reserve_end()
            assert found.slot is not None, "the place that was kept before is free again"

    def end_round(self, slot: Slot, end: Close) -> Program[None]:
        """Makes the end of a round durable, in the place that was reserved for it."""
        self.seal(slot, entry_of(end))
        yield Waits([self.guarded(partial(self.journal.commit, [slot]))])

    def seal(self, slot: Slot, entry: Entry) -> None:
        """Puts all of a push but its gradient, which the slot has, into a record.

        Raises:
            InvalidRequest: Its overrides are longer than a slot has room for.
        """
        facts = entry.facts
        meta, tail = IN_META + facts, b""
        if len(meta) > META_BYTES:
            meta, tail = IN_PAYLOAD + len(facts).to_bytes(4, "little"), facts
        if len(tail) > slot.room:
            raise InvalidRequest(
                f"The overrides of this push take more than the {EXTRA} bytes that a log has for "
                "them; send fewer, or PATCH the session.",
                errors=[{"field": "overrides", "message": "Too long for a session that logs."}],
            )
        seal = partial(
            slot.seal, entry.kind, key=entry.key, digest=entry.digest, meta=meta, payload=tail
        )
        self.guarded(seal)()

    def commit(self, slots: Sequence[Slot]) -> None:
        """Makes sealed records durable; waits for the disk."""
        self.journal.commit(slots)

    def record(self, kind: Kind, facts: dict[str, Any]) -> Program[bool]:
        """Logs a change without payload; False if there is no log yet, or no place for it there.

        A `replace` then makes it durable, and frees the log.
        """
        text = json.dumps(facts, separators=(",", ":")).encode()
        if self.journal.ring is None or len(text) > META_BYTES:
            return False
        slot = self.journal.reserve(payload=False)
        if slot is None:
            return False
        try:
            self.guarded(partial(slot.seal, kind, meta=text))()
        except BaseException:
            slot.release()
            raise
        yield Waits([self.guarded(partial(self.journal.commit, [slot]))])
        return True

    def full(self) -> LogFull:
        """The refusal of what finds no place in the log."""
        why = f" ({self.trouble})" if self.trouble else ""
        return LogFull(
            f"The log of session {self._session.id!r} is full and no snapshot could free a part of "
            f"it yet{why}. Send the same request again; if this goes on, make room on the disk.",
            retry_after_s=1,
            log_slots=self._session.spec.log_slots,
        )

    # Whole states

    def replace(self, standing: Standing, *, grown: bool) -> Program[None]:
        """Commits a change that makes a new state of the whole, before it is published.

        Args:
            standing: What the session will be.
            grown: Whether the arrays are new ones, for which room is reserved now.

        Raises:
            DiskFull: Nothing has changed.
        """
        session, arena = self._session, standing.arena
        made = image.of(session, standing)
        reserved = self.image_bytes(made) if grown else None
        shape = shape_of(session, arena) if grown and self.logs and arena is not None else None
        commit = partial(
            self.journal.replace,
            made.chunks(),
            epoch=self._epoch(standing.at.epoch),
            kernel_rev=made.facts.kernel_rev,
            shape=shape,
            reserved=reserved,
        )
        yield Waits([self.guarded(commit)])
        rounds = session.rounds.count + (session.rounds.open is not None)
        self._saved = standing.at, standing.revision, session.history.count, rounds
        self.saved_at = time.monotonic()

    @staticmethod
    def image_bytes(made: Image) -> int:
        """What a snapshot may come to take: its arrays, and a ledger and header that grow."""
        names = sum(300 + 3 * len(name.encode()) for name, _, _ in made.rows)
        return sum(array.nbytes for array in made.arrays) + names + (2 << 20)

    # Snapshots

    def _mark(self) -> object:
        """Changes whenever something that a snapshot holds has."""
        session = self._session
        return session.at, session.revision, session.history.count, session.rounds.count

    @property
    def _settled(self) -> int:
        """The last record that a snapshot may hold: an open round stays in the log."""
        found = self._session.rounds.open
        if found is None or found.first is None:
            return self.journal.last
        return found.first - 1

    @property
    def is_due(self) -> bool:
        """Whether anything happened since the last snapshot."""
        if self.logs:
            return self._settled > self.journal.row.number
        return self._mark() != self._saved

    def is_half_full(self) -> bool:
        """Whether half of the ring waits for a snapshot."""
        ring = self.journal.ring
        if ring is None:
            return False
        pages, slots = ring.free()
        return 2 * slots <= ring.shape.slots or 2 * pages <= ring.shape.records

    def free(self) -> tuple[int, int]:
        """Places of the log, without payload and with."""
        ring = self.journal.ring
        return (0, 0) if ring is None else ring.free()

    def make_room(self, lacking: tuple[int, int] | None = None) -> None:
        """Sees to it that a snapshot frees places of the log, and lets waiting pushes go on.

        Args:
            lacking: What was free when pushes found no place; None: none waits for one.
        """
        if self._has_more(lacking):  # a snapshot ended since
            self._session.queue.start()
            return
        if lacking is None and not self.is_due:
            return  # what fills it is an open round, which no snapshot frees
        fresh = self._task is None
        if fresh:
            if self.trouble is not None and time.monotonic() - self.saved_at < PAUSE_S:
                self._go_on(lacking, True, None)
                return
            self._begin()
        assert self._task is not None
        self._task.add_done_callback(partial(self._go_on, lacking, fresh))

    def _go_on(self, lacking: tuple[int, int] | None, fresh: bool, task: object) -> None:
        """After a snapshot: on with the pushes that wait for a place, if they do.

        Args:
            lacking: As for `make_room`.
            fresh: Whether it was begun since; another may have freed all it could before.
            task: The snapshot.
        """
        if lacking is None:
            return
        if self._has_more(lacking):
            self._session.queue.start()
        elif fresh:
            self._session.queue.refuse(self.full())
        else:
            self.make_room(lacking)

    def _has_more(self, lacking: tuple[int, int] | None) -> bool:
        """Whether a place of either kind came that was not there when pushes began to wait.

        Without one they would begin again, for ever.
        """
        if lacking is None:
            return False
        return any(now > was for now, was in zip(self.free(), lacking, strict=True))

    def _begin(self, *, final: bool = False) -> "asyncio.Task[bool]":
        task = asyncio.create_task(self._snapshot(final=final))
        self._task = task

        def ended(task: "asyncio.Task[bool]") -> None:
            self._task = None

        task.add_done_callback(ended)
        return task

    async def snapshot(self, *, final: bool = False) -> bool:
        """Makes a snapshot beside the steps; False if it could not be.

        Args:
            final: The server stops in order, and nothing comes after it.
        """
        while self._task is not None:  # which may have copied an earlier state
            await asyncio.wait([self._task])
        return await asyncio.shield(self._begin(final=final))

    async def _snapshot(self, *, final: bool) -> bool:
        session = self._session
        try:
            captured = await self._capture()
            if captured is None:
                return True
            write = partial(
                self.journal.snapshot,
                captured.number,
                captured.image.chunks(),
                epoch=self._epoch(captured.image.facts.epoch, final=final),
                kernel_rev=captured.image.facts.kernel_rev,
            )
            if await self._disk.run(write):
                self._saved = captured.mark
        except DiskFull as error:
            if self.trouble is None:
                self._disk.log.warning(
                    "no room for a snapshot", session=session.id, error=error.detail
                )
            self.trouble, self.saved_at = error.detail, time.monotonic()
            return False
        except ServiceError:  # the session was deleted, or the pool is closed
            return False
        except Exception as error:  # one session's trouble is no other's
            self._disk.log.error(
                "a snapshot failed unexpectedly", session=session.id, exc_info=error
            )
            self.trouble, self.saved_at = type(error).__name__, time.monotonic()
            return False
        self.trouble, self.saved_at = None, time.monotonic()
        return True

    async def _capture(self) -> _Captured | None:
        """A copy of all arrays, made in the lane into pages that are there already."""
        session = self._session
        if session.deleted or session.broken is not None:
            return None
        arena = session.arena
        like = () if arena is None else image.arrays(arena, arena.versions.head.flat)
        into = await self._disk.run(partial(image.buffers, like))

        def program() -> Program[_Captured | None]:
            if session.deleted or session.broken is not None or session.arena is not arena:
                return None
            made = image.of(session, Standing.of(session))
            number = self._settled if self.logs else self.journal.last + 1
            mark = self._mark()
            return _Captured((yield from image.copied(made, into)), number, mark)

        return await session.lane.run(program())

    # The end

    async def finish(self) -> None:
        """Leaves all in order for the next start, which then has nothing to apply again."""
        session = self._session
        if session.broken is not None:
            return
        if not self.logs:  # what is not in the arrays would be lost
            await session.lane.run(contributions.abandon(session, "stop"))
        if self.is_due:
            await self.snapshot(final=True)
        elif not self.logs:
            await self._disk.run(self._beginning(final=True))

    async def delete(self, epoch: int) -> None:
        """Ends the session on the disk."""
        if self._task is not None:
            await asyncio.wait([self._task])
        await self._disk.run(partial(self.journal.delete, epoch))

    def close(self) -> None:
        """Lets go of the files."""
        if self._session.rounds.open is not None:
            self._session.rounds.open.release()
        self.journal.close()
