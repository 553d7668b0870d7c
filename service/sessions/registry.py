"""All sessions of a server, by id."""

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from service.errors import (
    DataDirMissing,
    DiskFull,
    InFlight,
    Recovering,
    SessionDamaged,
    SessionUnknown,
    SpecDiffers,
    TooManySessions,
)
from service.schemas import Spec, diff
from service.sessions.durable import Durable
from service.sessions.lane import stopping
from service.sessions.session import Session, Shared, check_workers, gone
from service.storage.checkpoints import owner_of
from service.storage.failures import Damage

TOMBSTONES = 100_000


class Sessions:
    """Creates, finds and ends sessions. Used on the event loop only.

    A deleted id leaves its last epoch behind, so that a trainer that still pushes to the old
    session is told so. Tombstones are bounded: when the oldest is forgotten, every later creation
    starts above its epoch, so the promise holds without it.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self._alive: dict[str, Session] = {}
        self._ended: dict[str, int] = {}
        self._floor = 0
        self._pending: set[str] = set()
        self.damaged: dict[str, Damage] = {}
        """Sessions of the data folder that can't be had, with why."""

    def __len__(self) -> int:
        return len(self._alive)

    def get(self, name: str) -> Session:
        """The session of this id.

        Raises:
            SessionUnknown: There never was one.
            SessionGone: It was deleted.
        """
        session = self._alive.get(name)
        if session is not None:
            return session
        self._check_disk(name)
        if name in self._ended:
            raise gone(name)
        raise SessionUnknown(
            f"There is no session {name[:128]!r}; PUT /v1/sessions/{{id}} creates one (sessions "
            "of durability none are forgotten when the server stops).",
            session=name[:128],
        )

    def _check_disk(self, name: str) -> None:
        """Refuses a session that is on the disk and not here.

        Raises:
            Recovering: Not yet.
            SessionDamaged: Not at all.
        """
        if name in self._pending:
            raise Recovering(
                f"Session {name!r} is being recovered from the disk; send the same request again.",
                retry_after_s=1,
                session=name,
            )
        damage = self.damaged.get(name)
        if damage is not None:
            raise SessionDamaged(
                f"Session {name!r} could not be recovered: {damage.what} ({damage.where}). Nothing "
                "of it was touched; stop the server and run python -m service check.",
                session=name,
                what=damage.what,
                where=damage.where,
            )

    async def attach(self, name: str, stated: dict[str, Any]) -> Session | None:
        """The session of this id if it exists and every stated field equals its specification.

        Raises:
            SpecDiffers: It exists and was created with other values.
            Recovering: It is on the disk, and not yet here.
            SessionDamaged: It is on the disk, and can't be recovered.
        """
        session = self._alive.get(name)
        if session is None:
            self._check_disk(name)
            return None
        if session.made is not None:  # its creator waits for the disk, and so does this
            await asyncio.wait([session.made])
            return await self.attach(name, stated)
        if session.deleted:
            raise InFlight(
                f"Session {name!r} is being deleted; send the same request again.", retry_after_s=1
            )
        differences = diff(session.created_with, stated)
        if differences:
            fields = ", ".join(str(item["field"]) for item in differences[:10])
            raise SpecDiffers(
                f"Session {name!r} exists and was created with other values of {fields}; attach "
                "with the same ones or leave them out, or take another id.",
                differences=differences,
            )
        session.attached = True
        return session

    async def create(self, name: str | None, spec: Spec) -> Session:
        """Makes an empty session under a free id, or under a generated one.

        It is durable when this returns, if it is to be.

        Raises:
            TooManySessions: The server holds as many as it may.
            DataDirMissing: It is to be durable, and there is no folder for it.
            DiskFull: There is no room for it.
        """
        limit = self.shared.settings.max_sessions
        if len(self._alive) >= limit:
            raise TooManySessions(
                f"The server holds {limit} sessions already; delete one, or raise "
                "GRADPOST_MAX_SESSIONS.",
                retry_after_s=10,
                max_sessions=limit,
            )
        if spec.durability != "none" and self.shared.disk is None:
            raise DataDirMissing(
                f"durability {spec.durability} needs a folder and the server has none; start it "
                "with GRADPOST_DATA_DIR, or create the session with durability none.",
                durability=spec.durability,
            )
        check_workers(spec, self.shared.settings)
        name = name or uuid.uuid4().hex
        before = self._ended.pop(name, 0)
        epoch = max(before, self._floor) + 1
        session = self._alive[name] = Session(name, spec, epoch, self.shared)
        if spec.durability != "none":
            try:
                await self._make(session)
            except BaseException:
                del self._alive[name]
                if before:
                    self._ended[name] = before
                raise
        return session

    async def _make(self, session: Session) -> None:
        """Makes a session's files; whoever attaches meanwhile waits for them."""
        disk = self.shared.disk
        assert disk is not None
        made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session.made = made
        try:
            session.durable = await Durable.create(session, disk)
        finally:
            session.made = None
            made.set_result(None)

    def expect(
        self, names: Iterable[str], damaged: dict[str, Damage], ended: dict[str, int]
    ) -> None:
        """Takes note of what a data folder holds, before any of it is here."""
        self._pending = set(names)
        self.damaged = dict(damaged)
        self._ended = dict(ended)

    @property
    def pending(self) -> list[str]:
        """Sessions that are still to be recovered."""
        return sorted(self._pending)

    def adopt(self, session: Session) -> None:
        """Takes in a session that was recovered."""
        self._alive[session.id] = session
        self._pending.discard(session.id)
        session.resume()

    def refuse(self, damage: Damage) -> None:
        """Takes note of a session that could not be recovered."""
        self.damaged[damage.session] = damage
        self._pending.discard(damage.session)

    async def forget(self, session: Session) -> None:
        """Takes a session back whose creation failed, unless it has parameters after all.

        Who attached to it in the meantime is told that it is gone.
        """
        if not await session.abandon() or self._alive.get(session.id) is not session:
            return
        if session.durable is not None:
            try:
                await session.durable.delete(session.epoch)
            except DiskFull:  # then it stays, empty, and can be deleted or used
                session.deleted = False
                return
        del self._alive[session.id]
        if session.attached or session.durable is not None:
            self._ended[session.id] = session.epoch
        elif session.epoch > self._floor + 1:
            self._ended[session.id] = session.epoch - 1

    async def delete(self, name: str) -> None:
        """Ends a session and leaves a tombstone."""
        session = self.get(name)
        if session.made is not None:  # until it is on the disk it can't be taken off it
            await asyncio.wait([session.made])
            return await self.delete(name)
        # The id is not free before all of it is gone: else it could hit what comes after it.
        await session.delete()
        disk = self.shared.disk
        try:
            if disk is not None:
                await disk.run(partial(disk.store.checkpoints.drop, owner_of(name)))
        finally:
            if self._alive.get(name) is session:
                del self._alive[name]
            self._ended[name] = session.epoch
            if len(self._ended) > TOMBSTONES:
                oldest = next(iter(self._ended))
                self._floor = max(self._floor, self._ended.pop(oldest))

    def page(self, after: str | None, limit: int) -> tuple[list[Session], str | None]:
        """Up to `limit` sessions in order of their ids behind `after`, and where to go on."""
        names = sorted(name for name in self._alive if after is None or name > after)
        chosen = names[:limit]
        more = chosen[-1] if len(names) > limit else None
        return [self._alive[name] for name in chosen], more

    def workers(self) -> tuple[Callable[[], int], Callable[[], int]]:
        """Two functions: how many workers are live, and how many pushes wait for others."""

        def live() -> int:
            return sum(len(one.members.live()) for one in list(self._alive.values()))

        def waiting() -> int:
            found = list(self._alive.values())
            return sum(one.rounds.waiting + len(one.turns) for one in found)

        return live, waiting

    def dismiss(self) -> None:
        """Ends every wait for a version and a backup, so that they do not hold up a stop."""
        for session in self._alive.values():
            session.dismiss()
        if self.shared.disk is not None:
            self.shared.disk.store.end_backup()

    async def drain(self) -> None:
        """Returns when no lane has work."""
        for session in list(self._alive.values()):
            await session.lane.idle()

    def durable(self) -> list[tuple[Session, Durable]]:
        """The sessions that are on the disk."""
        return [(one, one.durable) for one in self._alive.values() if one.durable is not None]

    @property
    def lost(self) -> int:
        """How many of them a stop ends."""
        return len(self._alive) - len(self.durable())

    async def save(self, *, everything: bool = False) -> None:
        """Makes the snapshots that are due by time, or those of all that has changed."""
        interval = 0.0 if everything else self.shared.settings.snapshot_interval_s
        for _, durable in self.durable():
            if durable.is_due and time.monotonic() - durable.saved_at >= interval:
                await durable.snapshot()

    async def finish(self) -> None:
        """Leaves every durable session in order for the next start; nothing may follow."""
        for session, durable in self.durable():
            session.queue.refuse(stopping())
            try:
                await durable.finish()
            except Exception as error:  # the others are saved all the same
                assert self.shared.disk is not None
                self.shared.disk.log.error(
                    "a session was not saved; the next start goes on from what is durable of it",
                    session=session.id, exc_info=error,
                )  # fmt: skip
            durable.close()


_SPEC_TAG = re.compile(r'"spec-(\d{1,18})"')


def revision_of(tag: str | None) -> int | None:
    """The revision named by an If-Match header; None if absent or `*`; -1 if it is another tag."""
    if tag is None or tag.strip() == "*":
        return None
    match = _SPEC_TAG.fullmatch(tag.strip())
    return int(match[1]) if match else -1
