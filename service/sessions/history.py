"""The last steps of a session, for people: kept in memory, bounded, never needed by a step."""

from collections import deque
from typing import NamedTuple


class Record(NamedTuple):
    """One push that was admitted. Times are seconds."""

    step: int
    epoch: int
    version: int
    worker: str | None
    sequence: int | None
    applied: bool
    skipped: str | None
    loss: float | None
    lr: float
    grad_norm: float | None
    staleness: int
    queued_s: float
    step_s: float
    at: float


class History:
    """A ring of records, the newest last."""

    def __init__(self, limit: int) -> None:
        self._records: deque[Record] = deque(maxlen=limit)

    def append(self, record: Record) -> None:
        """Adds a record and forgets the oldest beyond the limit."""
        self._records.append(record)

    def last(self, limit: int, after_step: int = 0) -> list[dict[str, object]]:
        """At most `limit` of the newest records whose step is above `after_step`, in order."""
        chosen = [r for r in self._records.copy() if r.step > after_step]
        return [record._asdict() for record in chosen[len(chosen) - min(limit, len(chosen)) :]]
