"""Which pushes were admitted: the reason why a retry is never applied twice."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from service.errors import KeyReused, TooManyWorkers, TooOld, WorkerRetired

WINDOW = 1024
TOMBSTONES = 100_000
"""Workers that are remembered as retired; the oldest are forgotten."""


class Summary(NamedTuple):
    """What a push did; the answer to it and to every repeat of it."""

    step: int
    epoch: int
    version: int
    applied: bool
    identified: bool
    staleness: int
    lr: float
    grad_norm: float | None
    clipped: bool
    skipped: str | None
    params_finite: bool
    update_norm: float | None
    param_norm: float | None
    round: int | None = None
    contributions: int | None = None
    wire: str | None = None

    def answer(self, *, replayed: bool, ahead: bool | None = None) -> dict[str, object]:
        """The JSON members of the answer."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "version": self.version,
            "applied": self.applied,
            "replayed": replayed,
            "identified": self.identified,
            "staleness": self.staleness,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "clipped": self.clipped,
            "skipped": self.skipped,
            "params_finite": self.params_finite,
            "update_norm": self.update_norm,
            "param_norm": self.param_norm,
            "round": self.round,
            "contributions": self.contributions,
            "ahead": ahead,
            "wire": self.wire,
        }


class Contributed(NamedTuple):
    """What became of a contribution that no update has taken: its round is open, or abandoned."""

    round: int
    reason: str | None = None
    """Why the round was abandoned; None: it is open."""


Fate = Summary | Contributed


class Admitted(NamedTuple):
    """One consumed sequence number."""

    digest: bytes
    summary: Fate


@dataclass
class _Worker:
    highest: int = -1
    seen_at: float = 0.0
    admitted: dict[int, Admitted] = field(default_factory=dict)


class Known(NamedTuple):
    """What a ledger holds about one worker, for a file; times are in seconds since 1970."""

    name: str
    highest: int
    seen_at: float
    admitted: Mapping[int, Admitted]


class Contents(NamedTuple):
    """A copy of a ledger at one moment."""

    workers: tuple[Known, ...]
    retired: tuple[str, ...]


class Ledger:
    """Per worker, the last `WINDOW` sequence numbers and what each of them did.

    Sequences identify; they do not order: any unused number above (highest - WINDOW) is free.
    A worker that was silent for `retention_s` shrinks to a tombstone when another needs its place.
    Only the lane records; lookups change nothing and may come from the event loop at any time.

    Args:
        max_workers: Workers with a window at the same time.
        retention_s: Silence, in seconds, after which a worker is retired.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        max_workers: int,
        retention_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_workers = max_workers
        self._retention_s = retention_s
        self._clock = clock
        self._lock = threading.Lock()
        self._workers: dict[str, _Worker] = {}  # ordered by last admission, the oldest first
        self._retired: dict[str, None] = {}  # the oldest first

    def find(self, worker: str, sequence: int) -> Admitted | None:
        """The admitted push of this key, or None if the number is free.

        Raises:
            WorkerRetired: The worker left or was silent for too long.
            TooOld: The number lies below the worker's window.
            TooManyWorkers: A new worker has no place.
        """
        with self._lock:
            state = self._workers.get(worker)
            retired = worker in self._retired or (state is not None and self._expired(state))
            full = state is None and not self._has_room()
            known = None if state is None else state.admitted.get(sequence)
        if retired:
            raise self._refusal(worker)
        if full:
            raise TooManyWorkers(
                f"The session knows {self._max_workers} workers already; reuse a worker id per "
                "process, or raise GRADPOST_MAX_WORKERS.",
                max_workers=self._max_workers,
            )
        if state is not None and sequence <= state.highest - WINDOW:
            raise TooOld(
                f"Sequence {sequence} of worker {worker!r} lies {state.highest - sequence} below "
                f"its highest; only the last {WINDOW} are kept, so it can't be told whether this "
                "push was applied. Do not send it again.",
                worker=worker,
                sequence=sequence,
                oldest=state.highest - WINDOW + 1,
            )
        return known

    def fate(self, worker: str, sequence: int) -> Fate | None:
        """What an admitted push did, also of a worker that is being retired; None if it is gone."""
        with self._lock:
            one = self._workers.get(worker)
            known = None if one is None else one.admitted.get(sequence)
        return None if known is None else known.summary

    def check_retired(self, worker: str) -> None:
        """Refuses a worker whose numbers are forgotten.

        Raises:
            WorkerRetired: It left or was silent for too long.
        """
        with self._lock:
            one = self._workers.get(worker)
            retired = worker in self._retired or (one is not None and self._expired(one))
        if retired:
            raise self._refusal(worker)

    def _refusal(self, worker: str) -> WorkerRetired:
        return WorkerRetired(
            f"Worker {worker!r} has left, or was silent for more than {self._retention_s:.0f} s, "
            "and its sequence numbers are forgotten; go on under a new worker id.",
            worker=worker,
        )

    def record(self, worker: str, sequence: int, digest: bytes, summary: Fate) -> None:
        """Consumes a number. Called by the lane, together with the step."""
        with self._lock:
            if worker not in self._workers and len(self._workers) >= self._max_workers:
                self._retire_oldest()
            state = self._workers.pop(worker, None) or _Worker()
            self._workers[worker] = state
            state.seen_at = self._clock()
            state.admitted[sequence] = Admitted(digest, summary)
            if sequence > state.highest:
                state.highest = sequence
                # Numbers mostly come one by one: then this forgets exactly the one that falls out.
                state.admitted.pop(sequence - WINDOW, None)
                if len(state.admitted) > 2 * WINDOW:
                    floor = sequence - WINDOW
                    state.admitted = {s: a for s, a in state.admitted.items() if s > floor}

    def settle(self, worker: str, sequence: int, fate: Fate) -> None:
        """Says what became of a contribution; the number was consumed by `record`."""
        with self._lock:
            one = self._workers.get(worker)
            known = None if one is None else one.admitted.get(sequence)
            if one is not None and known is not None:
                one.admitted[sequence] = known._replace(summary=fate)

    def retire(self, worker: str) -> None:
        """Turns a worker that leaves into a tombstone."""
        with self._lock:
            self._workers.pop(worker, None)
            self._bury(worker)

    def _bury(self, worker: str) -> None:
        self._retired[worker] = None
        if len(self._retired) > TOMBSTONES:
            del self._retired[next(iter(self._retired))]

    def contents(self, abandoned: str | None = None) -> Contents:
        """A copy that later pushes do not change.

        Args:
            abandoned: Why the open round is abandoned in it; None: its contributions are left out,
                for whoever keeps the copy has them elsewhere or loses them.
        """
        offset = time.time() - self._clock()
        with self._lock:
            return Contents(
                tuple(
                    Known(name, one.highest, one.seen_at + offset, _closed(one.admitted, abandoned))
                    for name, one in self._workers.items()
                ),
                tuple(self._retired),
            )

    def restore(self, contents: Contents) -> None:
        """Takes up what a file kept, in place of all that is here."""
        offset = time.time() - self._clock()
        with self._lock:
            self._retired = dict.fromkeys(contents.retired)
            self._workers = {
                one.name: _Worker(one.highest, one.seen_at - offset, dict(one.admitted))
                for one in contents.workers
            }

    def standing(self, worker: str) -> Known | None:
        """What a push of one worker would meet; None if it never pushed or is retired."""
        offset = time.time() - self._clock()
        with self._lock:
            one = self._workers.get(worker)
            if one is None or self._expired(one):
                return None
            floor = one.highest - WINDOW  # what is below it is kept for a while, and refused
            admitted = {number: done for number, done in one.admitted.items() if number > floor}
            return Known(worker, one.highest, one.seen_at + offset, admitted)

    def glance(self, worker: str) -> tuple[int, float] | None:
        """The highest number of a worker and when it was seen, as `standing` has them."""
        offset = time.time() - self._clock()
        with self._lock:
            one = self._workers.get(worker)
            if one is None or self._expired(one):
                return None
            return one.highest, one.seen_at + offset

    def size(self) -> int:
        """Numbers that are remembered, over all workers."""
        return sum(len(worker.admitted) for worker in self._workers.values())

    @property
    def workers(self) -> int:
        """Workers with a window."""
        return len(self._workers)

    def _expired(self, state: _Worker) -> bool:
        return self._clock() - state.seen_at > self._retention_s

    def _has_room(self) -> bool:
        """Whether a new worker has a place, or the most silent one would make it."""
        if len(self._workers) < self._max_workers:
            return True
        return self._expired(next(iter(self._workers.values())))

    def _retire_oldest(self) -> None:
        """Turns the most silent worker into a tombstone if its time is over."""
        name, state = next(iter(self._workers.items()))
        if self._expired(state):
            del self._workers[name]
            self._bury(name)


def _closed(admitted: Mapping[int, Admitted], abandoned: str | None) -> dict[int, Admitted]:
    """The numbers with those of the open round left out, or abandoned."""
    found = {}
    for number, done in admitted.items():
        if isinstance(done.summary, Contributed) and done.summary.reason is None:
            if abandoned is None:
                continue
            done = done._replace(summary=done.summary._replace(reason=abandoned))
        found[number] = done
    return found


def same_push(known: Admitted, digest: bytes, worker: str, sequence: int) -> Fate:
    """What the original push did, if this is a repeat of it.

    Raises:
        KeyReused: The key was used for other bytes or other control values.
    """
    if known.digest != digest:
        raise KeyReused(
            f"Worker {worker!r} used sequence {sequence} for another push; every push needs a "
            "number of its own, and a retry must repeat the same gradients and control values.",
            worker=worker,
            sequence=sequence,
            **_where(known.summary),
        )
    return known.summary


def _where(fate: Fate) -> dict[str, int]:
    return {"round": fate.round} if isinstance(fate, Contributed) else {"step": fate.step}
