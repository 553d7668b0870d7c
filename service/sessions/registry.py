"""All sessions of a server, by id."""

import re
import uuid
from typing import Any

from service.errors import SessionUnknown, SpecDiffers, TooManySessions
from service.schemas import Spec, diff
from service.sessions.session import Session, Shared, gone

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
        if name in self._ended:
            raise gone(name)
        raise SessionUnknown(
            f"There is no session {name[:128]!r}; PUT /v1/sessions/{{id}} creates one (a server "
            "without durability forgets its sessions when it stops).",
            session=name[:128],
        )

    def attach(self, name: str, stated: dict[str, Any]) -> Session | None:
        """The session of this id if it exists and every stated field equals its specification.

        Raises:
            SpecDiffers: It exists and was created with other values.
        """
        session = self._alive.get(name)
        if session is None:
            return None
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

    def create(self, name: str | None, spec: Spec) -> Session:
        """Makes an empty session under a free id, or under a generated one.

        Raises:
            TooManySessions: The server holds as many as it may.
        """
        limit = self.shared.settings.max_sessions
        if len(self._alive) >= limit:
            raise TooManySessions(
                f"The server holds {limit} sessions already; delete one, or raise "
                "GRADPOST_MAX_SESSIONS.",
                retry_after_s=10,
                max_sessions=limit,
            )
        name = name or uuid.uuid4().hex
        epoch = max(self._ended.pop(name, 0), self._floor) + 1
        session = self._alive[name] = Session(name, spec, epoch, self.shared)
        return session

    async def forget(self, session: Session) -> None:
        """Takes a session back whose creation failed, unless it has parameters after all.

        Who attached to it in the meantime is told that it is gone.
        """
        if not await session.abandon() or self._alive.get(session.id) is not session:
            return
        del self._alive[session.id]
        if session.attached:
            self._ended[session.id] = session.epoch
        elif session.epoch > self._floor + 1:
            self._ended[session.id] = session.epoch - 1

    async def delete(self, name: str) -> None:
        """Ends a session and leaves a tombstone."""
        session = self.get(name)
        del self._alive[name]
        self._ended[name] = session.epoch
        if len(self._ended) > TOMBSTONES:
            oldest = next(iter(self._ended))
            self._floor = max(self._floor, self._ended.pop(oldest))
        await session.delete()

    def page(self, after: str | None, limit: int) -> tuple[list[Session], str | None]:
        """Up to `limit` sessions in order of their ids behind `after`, and where to go on."""
        names = sorted(name for name in self._alive if after is None or name > after)
        chosen = names[:limit]
        more = chosen[-1] if len(names) > limit else None
        return [self._alive[name] for name in chosen], more

    def dismiss(self) -> None:
        """Ends every wait for a version, so that long polls do not hold up a stop."""
        for session in self._alive.values():
            session.dismiss()

    async def drain(self) -> None:
        """Returns when no lane has work."""
        for session in list(self._alive.values()):
            await session.lane.idle()


_SPEC_TAG = re.compile(r'"spec-(\d{1,18})"')


def revision_of(tag: str | None) -> int | None:
    """The revision named by an If-Match header; None if absent or `*`; -1 if it is another tag."""
    if tag is None or tag.strip() == "*":
        return None
    match = _SPEC_TAG.fullmatch(tag.strip())
    return int(match[1]) if match else -1
