"""Who takes part in a session: leases, clocks, and what each worker has done."""

import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from service.errors import TooManyWorkers


@dataclass
class Tally:
    """The last, the largest and the sum of some numbers."""

    count: int = 0
    last: float = 0.0
    most: float = 0.0
    total: float = 0.0

    def add(self, value: float) -> None:
        """Takes one in."""
        self.count += 1
        self.last = value
        self.most = max(self.most, value)
        self.total += value

    def told(self) -> dict[str, float | None]:
        """Last, mean and max; all None before the first."""
        if not self.count:
            return {"last": None, "mean": None, "max": None}
        return {"last": self.last, "mean": self.total / self.count, "max": self.most}


@dataclass
class Member:
    """A worker that has joined.

    Attributes:
        name: Its id.
        lease_s: Seconds without a word after which it is no longer waited for.
        joined_at: Seconds since 1970.
        seen: When it was heard of last, by the session's clock.
        live: Whether its lease holds.
        clock: Applied pushes since it joined, beginning at the slowest live clock.
        pushes: Admitted pushes; the passes among them are counted too.
        passes: Contributions without a gradient.
        late: Refusals for a gradient that came too late.
        staleness: Of its pushes, in versions.
        lateness_s: Of its contributions, behind the first of their round.
    """

    name: str
    lease_s: float
    joined_at: float
    seen: float
    live: bool = True
    clock: int = 0
    pushes: int = 0
    passes: int = 0
    late: int = 0
    staleness: Tally = field(default_factory=Tally)
    lateness_s: Tally = field(default_factory=Tally)


class Kept(NamedTuple):
    """What a file keeps of a member."""

    name: str
    lease_s: float
    clock: int


class Members:
    """The workers of a session, from their first word until they leave.

    A worker whose lease ran out stays known, and is live again at its next word. Safe to use from
    any thread: calls that name a worker renew its lease on the event loop, pushes do in the lane.

    Args:
        lease_s: Of a worker that states none; asked for at each joining.
        limit: Workers that may be live at once; asked for likewise.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        lease_s: Callable[[], float],
        limit: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._all: dict[str, Member] = {}
        self._ever: set[str] = set()
        self.lapsed = 0
        """Leases that ran out, so far."""

    def all(self) -> list[Member]:
        """Everyone who joined and did not leave, live or not."""
        with self._lock:
            return list(self._all.values())

    def get(self, name: str) -> Member | None:
        """A worker that has joined and not left."""
        return self._all.get(name)

    def check_room(self, name: str) -> None:
        """Refuses a worker that would be one too many.

        Raises:
            TooManyWorkers: As many are live as may be.
        """
        one = self._all.get(name)
        if one is not None and one.live:
            return
        limit = self._limit()
        if len(self.live()) >= limit:
            self.lapse()
        if len(self.live()) >= limit:
            raise TooManyWorkers(
                f"{limit} workers are live in this session, as many as it takes (GRADPOST_MAX_"
                "WORKERS, or half of log_slots in a session that logs rounds); wait until one "
                "leaves.",
                max_workers=limit,
            )

    def touch(self, name: str, lease_s: float | None = None) -> bool:
        """Joins a worker or renews its lease.

        Args:
            name: Its id.
            lease_s: Another length of its lease, from now on.

        Returns:
            Whether it joined now, for the first time or again.
        """
        with self._lock:
            joins = (one := self._all.get(name)) is None or not one.live
            one = self._touched(name)
            one.lease_s = lease_s or one.lease_s
            return joins

    def renew(self, name: str) -> None:
        """As `touch`, but nobody joins by it."""
        if name in self._all:
            self.touch(name)

    def _touched(self, name: str) -> Member:
        """The worker, live; under the lock."""
        one = self._all.get(name)
        if one is not None and one.live:
            one.seen = self._clock()
            return one
        clock = min((other.clock for other in self._all.values() if other.live), default=0)
        if one is None:
            self._make_room()
            one = self._all[name] = Member(name, self._lease_s(), time.time(), self._clock())
            if len(self._ever) <= self._limit():
                self._ever.add(name)
        one.live, one.seen, one.clock = True, self._clock(), clock
        return one

    def _make_room(self) -> None:
        """Forgets those whose leases ran out longest ago."""
        if len(self._all) < 2 * self._limit():
            return
        gone = [one for one in self._all.values() if not one.live]
        if gone:
            del self._all[min(gone, key=lambda one: one.seen).name]

    def leave(self, name: str) -> bool:
        """Forgets a worker; False if it was not known."""
        with self._lock:
            return self._all.pop(name, None) is not None

    def lapse(self) -> list[str]:
        """Ends the leases that have run out; returns whose."""
        now = self._clock()
        with self._lock:
            found = [
                one for one in self._all.values() if one.live and now >= one.seen + one.lease_s
            ]
            for one in found:
                one.live = False
            self.lapsed += len(found)
        return [one.name for one in found]

    def next_lapse(self) -> float | None:
        """When the next lease runs out, by the clock."""
        with self._lock:
            return min(
                (one.seen + one.lease_s for one in self._all.values() if one.live), default=None
            )

    def live(self) -> list[Member]:
        """Those whose lease holds."""
        with self._lock:
            return [one for one in self._all.values() if one.live]

    @property
    def ever(self) -> int:
        """Distinct workers that ever joined; no more than one above the limit are told apart."""
        return len(self._ever)

    def left_s(self, one: Member) -> float:
        """Seconds until a lease runs out; 0 if it did."""
        return max(0.0, one.seen + one.lease_s - self._clock()) if one.live else 0.0

    # What they do

    def pushed(
        self, name: str, staleness: int, *, applied: bool = False, passes: bool = False
    ) -> None:
        """Counts an admitted push, by which a worker joins or renews its lease.

        Args:
            name: Whose.
            staleness: Of it, in versions.
            applied: Whether the worker's clock goes on.
            passes: Whether it had no gradient.
        """
        with self._lock:
            one = self._touched(name)
            one.pushes += 1
            one.passes += passes
            one.clock += applied
            one.staleness.add(staleness)

    def late(self, name: str) -> None:
        """Counts a refusal for coming too late."""
        with self._lock:
            one = self._all.get(name)
            if one is not None:
                one.late += 1

    def late_by(self, name: str, seconds: float) -> None:
        """Counts by how much a contribution came behind the first of its round."""
        with self._lock:
            one = self._all.get(name)
            if one is not None:
                one.lateness_s.add(seconds)

    def is_ahead(self, name: str, slack: int) -> bool:
        """Whether a worker is more than `slack` pushes ahead of the slowest live one."""
        one, slowest = self._all.get(name), self.slowest()
        return one is not None and slowest is not None and one.clock > slowest + slack

    def slowest(self) -> int | None:
        """The clock of the slowest live worker; None if there is none."""
        with self._lock:
            return min((one.clock for one in self._all.values() if one.live), default=None)

    def level(self) -> None:
        """Lets all begin alike: a log tells who pushed, not who joined or whose lease ran out."""
        with self._lock:
            for one in self._all.values():
                one.clock = 0

    def all_in(self, names: Container[str], more: Container[str] = ()) -> bool:
        """Whether everyone whose lease holds is among these."""
        with self._lock:
            live = (one.name for one in self._all.values() if one.live)
            return all(name in names or name in more for name in live)

    # Files

    def kept(self) -> tuple[list[Kept], list[str]]:
        """The members, and the names of all that ever joined."""
        with self._lock:
            rows = [
                Kept(one.name, one.lease_s, one.clock) for one in self._all.values() if one.live
            ]
            return rows, sorted(self._ever)

    def restore(self, rows: Iterable[Kept], ever: Iterable[str]) -> None:
        """Takes up what a file kept; every lease begins afresh."""
        now = self._clock()
        with self._lock:
            self._all = {
                row.name: Member(row.name, row.lease_s, time.time(), now, clock=row.clock)
                for row in rows
            }
            self._ever = set(ever)
