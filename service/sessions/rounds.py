"""The rounds of a session in sync mode: the open one, and what became of those before it."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from service.errors import AlreadyContributed, OverridesDiffer, ServiceError
from service.schemas import Update
from service.sessions.ledger import Contributed, Summary
from service.sessions.members import Members
from service.sessions.records import Contribution
from service.storage.ring import Slot

if TYPE_CHECKING:
    from service.sessions.session import Session

KEPT = 1024
"""Closed rounds that can be asked for."""
SAVED = 64
"""Of those, how many a file keeps, and of how many it is told who was in them."""
GAP = 1_000_000
"""Numbers that are left out where rounds may be lost: more than there are between two snapshots."""


class Held(NamedTuple):
    """A contribution that is kept until its round is closed."""

    worker: str
    flat: Any
    dtype: str
    factor: float
    release: Callable[[], None]


@dataclass
class Open:
    """A round that has contributions.

    Attributes:
        number: From 1.
        base: Epoch and version of the parameters that its gradients are of.
        rules: What held when it began.
        overrides: Of all its contributions, JSON text.
        began: By the session's clock.
        opened_at: Seconds since 1970.
        contributions: By worker, in order of arrival. The lane adds to it while others read: who
            goes through it takes a list of it first.
        counted: Contributions that are more than passes.
        held: Those that are kept, in the same order.
        present: For each entry of the layout, whether any gradient has it; None: all.
        first: Number of its first record, where the session logs.
        slot: The place in the log for its end.
    """

    number: int
    base: tuple[int, int]
    rules: Update
    overrides: str | None
    began: float
    opened_at: float
    contributions: dict[str, Contribution] = field(default_factory=dict)
    counted: int = 0
    held: list[Held] = field(default_factory=list)
    present: tuple[bool, ...] | None = None
    first: int | None = None
    slot: Slot | None = None

    def add(self, one: Contribution) -> None:
        """Takes one in."""
        self.contributions[one.worker] = one
        self.counted += one.counts

    @property
    def weight(self) -> float:
        """The sum of the weights, in the order in which the gradients are added."""
        added = list(self.contributions.values())
        if self.rules.order == "worker":
            added.sort(key=lambda one: one.worker)
        return sum(one.weight for one in added if one.counts)

    @property
    def ends(self) -> float:
        """When it is closed at the latest, by the session's clock."""
        assert self.rules.round_timeout_s is not None
        return self.began + self.rules.round_timeout_s

    def missing(self, members: Members) -> int:
        """Live members that have not contributed, and workers that never joined."""
        return missing(self.rules, self.contributions, members)

    def due(self, members: Members, now: float) -> str | None:
        """Why it is to be closed now; None if it is not."""
        full = filled(self.rules, members, self.contributions)
        return full or ("timeout" if now >= self.ends else None)

    def ended(
        self, status: str, reason: str, at: tuple[int, int, int], closed_at: float,
        summary: Summary | None = None,
    ) -> "Closed":  # fmt: skip
        """What is remembered of it."""
        members = tuple(
            Part(one.worker, one.sequence, one.weight, one.lateness_s)
            for one in self.contributions.values()
        )
        passes = len(members) - self.counted
        return Closed(
            self.number, status, reason, self.base, at, self.counted, passes, self.opened_at,
            closed_at, members, summary,
        )  # fmt: skip

    def release(self) -> None:
        """Gives back what it holds."""
        for one in self.held:
            one.release()
        self.held = []
        if self.slot is not None:
            self.slot.release()
            self.slot = None


def missing(rules: Update, contributed: Container[str], members: Members) -> int:
    """Live members that have not contributed, and workers that never joined."""
    absent = sum(one.name not in contributed for one in members.live())
    return absent + max(0, (rules.workers or 0) - members.ever)


def filled(
    rules: Update, members: Members, contributed: Collection[str], ahead: Collection[str] = ()
) -> str | None:
    """Why a round with these contributions waits for nobody else; None if it does.

    Args:
        rules: Of the round.
        members: Of the session.
        contributed: Whose are in it.
        ahead: Whose will be in it next; nobody of `contributed`.
    """
    if len(contributed) + len(ahead) >= rules.closes_at:
        return "complete" if rules.closes_at == rules.workers else "quorum"
    if rules.on_lost == "wait" or members.ever < (rules.workers or 0):
        return None
    return "complete" if members.all_in(contributed, ahead) else None


class Part(NamedTuple):
    """What is remembered of a contribution once its round is over."""

    worker: str
    sequence: int
    weight: float
    lateness_s: float


class Closed(NamedTuple):
    """What became of a round.

    Attributes:
        number: From 1.
        status: applied, skipped or abandoned.
        reason: Why it ended.
        base: As of `Open`.
        at: Step, epoch and version after it.
        contributions: How many had a weight above 0.
        passes: The others.
        opened_at: Seconds since 1970.
        closed_at: Likewise.
        members: Who contributed what; None if a restart came since, or `SAVED` rounds.
        summary: What its update did.
    """

    number: int
    status: str
    reason: str
    base: tuple[int, int]
    at: tuple[int, int, int]
    contributions: int
    passes: int
    opened_at: float
    closed_at: float
    members: Sequence[Part] | None
    summary: Summary | None


class Rounds:
    """Numbers rounds and remembers them; contributions.py says what happens in one.

    Changed in the lane only; what waits, waits on the event loop.

    Args:
        members: Of the session.
        clock: Monotonic seconds.
    """

    def __init__(self, members: Members, clock: Callable[[], float] = time.monotonic) -> None:
        self._members = members
        self._clock = clock
        self.open: Open | None = None
        self.count = 0
        """Rounds that are closed; the open one, or the next, has the number after it."""
        self._closed: OrderedDict[int, Closed] = OrderedDict()
        self._waiting: dict[int, set[asyncio.Future[None]]] = {}
        self._refusal: ServiceError | None = None

    @property
    def number(self) -> int:
        """Of the open round, or of the next one."""
        return self.count + 1

    def get(self, number: int) -> Closed | None:
        """A closed round that is remembered."""
        return self._closed.get(number)

    def check_free(
        self, worker: str, overrides: str | None, ahead: Mapping[str, Contribution],
        at: Mapping[str, int],
    ) -> None:  # fmt: skip
        """Refuses a contribution that does not fit what the open round has.

        Args:
            worker: Whose.
            overrides: JSON text.
            ahead: Contributions that are decided and not in the round yet, by worker.
            at: Where the session stands, for a refusal.

        Raises:
            AlreadyContributed: It has one of this worker.
            OverridesDiffer: Its others have other overrides.
        """
        found = self.open
        there: Mapping[str, Contribution] = {} if found is None else found.contributions
        before = ahead.get(worker) or there.get(worker)
        if before is not None:
            raise AlreadyContributed(
                f"Worker {worker!r} has contributed to round {self.number} with sequence "
                f"{before.sequence}; a round takes one contribution of each worker. Wait for its "
                "end and pull (two trainers under one worker id do not work: give each its own).",
                worker=worker,
                round=self.number,
                sequence=before.sequence,
                **at,
            )
        first = next(iter((there or ahead).values()), None)
        if first is not None and overrides != first.overrides:
            raise OverridesDiffer(
                f"The contributions to round {self.number} have other overrides than this one, and "
                "an update has one set of them: send the same from every worker, or PATCH the "
                "session.",
                round=self.number,
                **at,
            )

    def begin(self, base: tuple[int, int], rules: Update, one: Contribution) -> Open:
        """Opens the next round for its first contribution."""
        self.open = Open(self.number, base, rules, one.overrides, self._clock(), one.at)
        return self.open

    def due(self) -> str | None:
        """Why the open round is to be closed now; None if it is not, or none is open."""
        return None if self.open is None else self.open.due(self._members, self._clock())

    def missing(self, rules: Update) -> int:
        """How many workers the open round waits for, or the next one under these rules."""
        found = self.open  # read once: the lane may close it meanwhile
        if found is None:
            return missing(rules, (), self._members)
        return found.missing(self._members)

    def deadline_in_s(self) -> float | None:
        """Seconds until the open round ends at the latest."""
        found = self.open  # read once: the lane may close it meanwhile
        return None if found is None else max(0.0, found.ends - self._clock())

    def close(
        self, status: str, reason: str, at: tuple[int, int, int], closed_at: float,
        summary: Summary | None,
    ) -> Closed:  # fmt: skip
        """Ends the open round; whoever waits is told by `wake`."""
        one = self.open
        assert one is not None
        one.release()
        closed = one.ended(status, reason, at, closed_at, summary)
        self.remember(closed)
        self.open = None
        return closed

    def remember(self, closed: Closed) -> None:
        """Takes in a closed round."""
        self._closed[closed.number] = closed
        self.count = closed.number
        old = self._closed.get(closed.number - SAVED)
        if old is not None:  # of a thousand workers they are 150 kB
            self._closed[old.number] = old._replace(members=None)
        if len(self._closed) > KEPT:
            self._closed.popitem(last=False)

    # Those who wait for the end of a round

    async def wait(self, number: int, wait_s: float) -> None:
        """Returns when a round is closed, or after so many seconds.

        Raises:
            ServiceError: Nothing will come any more.
        """
        if number <= self.count or wait_s <= 0:
            return
        if self._refusal is not None:
            raise self._refusal
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(number, set())
        waiting.add(future)
        # Lighter than asyncio.timeout: a thousand of these may wait.
        timer = future.get_loop().call_later(wait_s, _over, future)
        try:
            await future
        finally:
            timer.cancel()
            waiting.discard(future)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def wake(self) -> None:
        """Lets those go on whose round is closed; on the event loop."""
        for number in [number for number in self._waiting if number <= self.count]:
            for future in self._waiting.pop(number):
                if not future.done():
                    future.set_result(None)

    def stop(self, refusal: ServiceError) -> None:
        """As `fail`, and so ends every wait that is still to come."""
        self._refusal = refusal
        self.fail(refusal)

    def fail(self, refusal: ServiceError) -> None:
        """Ends every wait with a refusal."""
        waiting, self._waiting = self._waiting, {}
        for futures in waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(refusal)

    # Files

    def kept(self) -> list[Closed]:
        """The last closed rounds, without their members."""
        return [one._replace(members=None) for one in list(self._closed.values())[-SAVED:]]

    def begin_anew(self) -> None:
        """Leaves out numbers that rounds may have had that are lost, and that workers may know."""
        self.count += GAP

    def restore(self, count: int, closed: Sequence[Closed]) -> None:
        """Takes up what a file kept."""
        for one in closed:
            self.remember(one)
        self.count = count


def _over(future: "asyncio.Future[None]") -> None:
    """Ends a wait for which there is no time left."""
    if not future.done():
        future.set_result(None)


def give_up(session: "Session", reason: str) -> None:
    """Abandons the open round, if there is one; what says so is durable, where anything is."""
    found = session.rounds.open
    if found is None:
        return
    for one in found.contributions.values():
        fate = Contributed(found.number, reason)
        session.ledger.settle(one.worker, one.sequence, fate)
    session.rounds.close("abandoned", reason, session.at.numbers, time.time(), None)
    session.shared.metrics.round_ended("abandoned", time.time() - found.opened_at)


def closed_of(row: Sequence[Any]) -> Closed:
    """A closed round as a file has it: tuples have become lists."""
    one = Closed(*row)
    summary = None if one.summary is None else Summary(*one.summary)
    epoch, version = one.base
    step, *now = one.at
    return one._replace(
        base=(epoch, version), at=(step, now[0], now[1]), members=None, summary=summary
    )
