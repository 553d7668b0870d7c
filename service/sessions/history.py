"""The last steps of a session, for people: kept in memory, bounded, never needed by a step."""

from collections import deque
from typing import NamedTuple


class Record(NamedTuple):
    """One push that was admitted. Times are seconds."""

    number: int
    """Counts the records of a session, from 1: pass the last one as `after` to go on."""
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
    clipped: bool
    update_norm: float | None
    param_norm: float | None
    staleness: int
    queued_s: float
    step_s: float
    at: float
    round: int | None = None
    weight: float | None = None
    lateness_s: float | None = None
    """Behind the first contribution of the round."""


class History:
    """A ring of records, the newest last."""

    def __init__(self, limit: int) -> None:
        self._records: deque[Record] = deque(maxlen=limit)
        self.count = 0
        """Records so far; the next one has the number after it."""

    def append(self, record: Record) -> None:
        """Adds a record and forgets the oldest beyond the limit."""
        self._records.append(record)
        self.count += 1

    def page(
        self, limit: int, after_step: int | None = None, after: int | None = None
    ) -> list[dict[str, object]]:
        """At most `limit` records in order: the newest, or the oldest behind a place.

        Args:
            limit: How many.
            after_step: Only later steps. A skipped push has the step at which it was skipped, and
                belongs to what follows that step.
            after: Only records of a larger number.
        """
        chosen = [
            record
            for record in self._records.copy()
            if (after is None or record.number > after)
            and (after_step is None or record.step + (not record.applied) > after_step)
        ]
        follows = after is not None or after_step is not None
        part = chosen[:limit] if follows else chosen[-limit:]
        return [record._asdict() for record in part]
