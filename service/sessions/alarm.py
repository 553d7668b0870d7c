"""One timer of a session: rings when a round or a lease runs out, though nobody calls."""

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings once at the earliest time that it was set to. Used on the event loop only.

    Args:
        clock: Monotonic seconds.
        ring: Called when the time has come.
    """

    def __init__(self, clock: Callable[[], float], ring: Callable[[], object]) -> None:
        self._clock = clock
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._at: float | None = None

    def set(self, at: float | None) -> None:
        """Rings at this time, by the clock, and no more at the one that was set before.

        Args:
            at: When; None: never.
        """
        if at == self._at:
            return
        self.cancel()
        if at is None:
            return
        self._at = at
        delay = max(0.0, at - self._clock())
        self._handle = asyncio.get_running_loop().call_later(delay, self._rung)

    def cancel(self) -> None:
        """Rings no more."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._at = None

    def _rung(self) -> None:
        self._handle = self._at = None
        self._ring()
