"""The pushes of a session that logs: those that wait are made durable together, by one sync.

They are decided one after another, each on what the one before it will have done, before any of
them is durable or applied (docs/decisions/0016).
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kernels.pool import Waits
from service.errors import ServiceError
from service.sessions import contributions
from service.sessions.lane import Program
from service.sessions.ledger import Contributed, Fate
from service.sessions.pushes import Ahead, Decided, Gradient, Outcome, Timing, apply, decide
from service.sessions.records import Contribution, entry_of
from service.storage.ring import Slot

if TYPE_CHECKING:
    from service.sessions.durable import Durable
    from service.sessions.session import Session


class _Queued(NamedTuple):
    gradient: Gradient
    hold: bool
    outcome: asyncio.Future[Outcome]
    since: float


class _Member(NamedTuple):
    """A push of a group commit."""

    queued: _Queued
    decided: Decided | contributions.Decided
    slot: Slot
    timing: Timing
    end: Slot | None = None
    """The place for the end of the round that this push begins."""


@dataclass
class _Group:
    """The pushes of one sync, as they are taken from the queue.

    Attributes:
        taken: All that this group has to answer.
        members: Those that are decided, in order.
        later: Those whose turn comes with the next group.
    """

    taken: list[_Queued] = field(default_factory=list)
    members: list[_Member] = field(default_factory=list)
    later: list[_Queued] = field(default_factory=list)


class Queue:
    """The pushes of a session that logs, until a program of the lane takes all that wait.

    Used on the event loop; `take` and `put_back` by that program, which runs one at a time.
    """

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._waiting: deque[_Queued] = deque()
        self._active = False

    def put(self, gradient: Gradient, *, hold: bool) -> "asyncio.Future[Outcome]":
        """Queues a push; its outcome comes once it is durable and applied."""
        loop = asyncio.get_running_loop()
        queued = _Queued(gradient, hold, loop.create_future(), time.perf_counter())
        self._waiting.append(queued)
        self.start()
        return queued.outcome

    def start(self) -> None:
        """Sends a program to the lane, if there is work and none is on its way."""
        if self._active or not self._waiting:
            return
        self._active = True
        loop = asyncio.get_running_loop()
        result = self._session.lane.submit(many(self._session, self, loop), then=self._ended)
        result.add_done_callback(self._check)

    def _ended(self, lacking: tuple[int, int] | None) -> None:
        """After a program: on with what came meanwhile, once there is room for it."""
        self._active = False
        durable = self._session.durable
        assert durable is not None
        if lacking is not None:
            durable.make_room(lacking)
        else:
            if durable.is_half_full():
                durable.make_room()
            self.start()

    def _check(self, result: "asyncio.Future[tuple[int, int] | None]") -> None:
        """Refuses what waits if the lane takes nothing any more."""
        error = result.exception()
        if error is not None:
            self._active = False
            self.refuse(error)

    def refuse(self, error: BaseException) -> None:
        """Ends everything that waits."""
        while self._waiting:
            refuse(self._waiting.popleft().outcome, error)

    def take(self) -> _Queued | None:
        """The push that has waited longest."""
        return self._waiting.popleft() if self._waiting else None

    def put_back(self, queued: Sequence[_Queued]) -> None:
        """Pushes whose turn comes later, in their old order and before all others."""
        self._waiting.extendleft(reversed(queued))


class _Ahead:
    """What the pushes that are decided and not applied yet will have done."""

    def __init__(self) -> None:
        self._updates: Ahead | None = None
        self._contributions: dict[str, Contribution] = {}

    def decide(
        self, session: "Session", gradient: Gradient, slot: Slot
    ) -> Program[Decided | contributions.Decided | Fate]:
        """Decides one more."""
        if session.spec.update.mode == "sync":
            return (yield from contributions.decide(session, gradient, self._contributions, slot))
        return (yield from decide(session, gradient, self._updates, slot))

    def add(self, found: Decided | contributions.Decided) -> None:
        """Takes note of one that was decided."""
        if isinstance(found, contributions.Decided):
            self._contributions[found.one.worker] = found.one
        else:
            self._updates = found.ahead

    def begins(self, session: "Session") -> bool:
        """Whether the next one begins a round."""
        sync = session.spec.update.mode == "sync"
        return sync and session.rounds.open is None and not self._contributions

    def is_complete(self, session: "Session") -> bool:
        """Whether they close a round, so that what comes behind them is of the next version."""
        return bool(self._contributions) and contributions.completes(session, self._contributions)


def refuse(outcome: "asyncio.Future[Outcome]", error: BaseException) -> None:
    """Tells the one who waits that it failed, on the event loop."""
    if not outcome.done():
        outcome.set_exception(error)
        outcome.exception()  # whoever asked may have gone; the failure has been counted


def many(
    session: "Session", queue: Queue, loop: asyncio.AbstractEventLoop
) -> Program[tuple[int, int] | None]:
    """Takes all pushes that wait through one sync.

    Returns:
        What was free in the log when some found no place there and went back; None: all did.
    """
    durable = session.durable
    assert durable is not None
    group, committed = _Group(), False
    try:
        try:
            lacking = yield from _decide_all(session, durable, queue, loop, group)
        finally:
            queue.put_back(group.later)
        if group.members:
            committed = True
            slots = [member.slot for member in group.members]
            yield Waits([session.guarded(partial(durable.commit, slots))])
        yield from _apply_all(session, group.members, loop)
    except BaseException as error:
        if not committed:  # nothing has happened
            for member in group.members:
                member.slot.release()
                if member.end is not None:
                    member.end.release()
        elif session.broken is None:
            session.broken = f"{type(error).__name__} between the log and step {session.step + 1}"
        for queued in group.taken:
            loop.call_soon_threadsafe(refuse, queued.outcome, error)
        raise
    finally:
        for queued in group.taken:
            if queued.gradient.control.key is not None:
                session.committing.discard(queued.gradient.control.key)
    return lacking


def _apply_all(
    session: "Session", members: Sequence[_Member], loop: asyncio.AbstractEventLoop
) -> Program[None]:
    """The effects of what is durable, in order, and the answers."""
    rounds: list[tuple[_Queued, contributions.Decided]] = []
    for member in members:
        if isinstance(member.decided, contributions.Decided):
            assert member.slot.header is not None
            number = member.slot.header.number
            yield from contributions.take(session, member.decided, number=number, slot=member.end)
            rounds.append((member.queued, member.decided))
            continue
        outcome = yield from apply(session, member.decided, member.timing, hold=member.queued.hold)
        loop.call_soon_threadsafe(session.settled, member.queued.outcome, outcome)
    yield from contributions.settle(session)
    for queued, decided in rounds:  # the fate of a round is that of all who are in it
        one = decided.one
        fate = contributions.fate_of(session, Contributed(one.round), one.worker, one.sequence)
        outcome = Outcome(fate, False, None, kept=contributions.is_kept(session, decided))
        loop.call_soon_threadsafe(session.settled, queued.outcome, outcome)


def _decide_all(
    session: "Session", durable: "Durable", queue: Queue, loop: asyncio.AbstractEventLoop,
    group: _Group,
) -> Program[tuple[int, int] | None]:  # fmt: skip
    """Decides one push after another, each with a place in the log; refusals go out at once.

    Args:
        session: In whose lane this runs.
        durable: Gives the places.
        queue: Whose pushes are taken.
        loop: Where refusals are told.
        group: Receives them.

    Returns:
        What was free in the log when one found no place; None: all did.
    """
    ahead = _Ahead()
    while not ahead.is_complete(session) and (queued := queue.take()) is not None:
        group.taken.append(queued)  # whatever happens now, it gets an answer
        key = queued.gradient.control.key
        if key is not None and key in session.committing:  # a repeat of one in this very group
            group.later.append(group.taken.pop())
            continue
        try:
            session.check_alive()  # the ring of a deleted session has no places, for ever
        except ServiceError as error:
            loop.call_soon_threadsafe(refuse, queued.outcome, error)
            continue
        free = durable.free()  # a snapshot may end at any moment, and make it more
        is_pass = queued.gradient.control.is_pass
        slot = durable.reserve(payload=not is_pass)
        end = durable.reserve_end() if ahead.begins(session) else None
        if slot is None or (end is None and ahead.begins(session)):
            for place in (slot, end):
                if place is not None:
                    place.release()
            group.later.append(group.taken.pop())
            return free
        if key is not None:
            session.committing.add(key)
        started_at = time.perf_counter()
        try:
            found = yield from ahead.decide(session, queued.gradient, slot)
            held = None
            if isinstance(found, Decided):
                durable.seal(slot, entry_of(found.push))
            elif isinstance(found, contributions.Decided):
                durable.seal(slot, entry_of(found.one))
            elif queued.hold:
                held = session.ready.versions.hold()
        except Exception as error:
            slot.release()
            if end is not None:
                end.release()
            loop.call_soon_threadsafe(refuse, queued.outcome, error)
            continue
        if not isinstance(found, Decided | contributions.Decided):
            slot.release()
            if end is not None:
                end.release()
            loop.call_soon_threadsafe(session.settled, queued.outcome, Outcome(found, True, held))
            continue
        ahead.add(found)
        timing = Timing(started_at, started_at - queued.since)
        group.members.append(_Member(queued, found, slot, timing, end))
    return None
