"""When a connection reads, and how long its peer may take."""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


class Flow(FlowControl):
    """Reading that stays paused while `held`, whoever wants it resumed."""

    held = False

    def resume_reading(self) -> None:
        """Reads on, unless held."""
        if not self.held:
            super().resume_reading()

    def hold(self) -> None:
        """Stops reading until `let_go`."""
        self.held = True
        self.pause_reading()

    def let_go(self) -> None:
        """Reads on."""
        self.held = False
        self.resume_reading()


class Pace:
    """Watches a byte counter; calls `late` once when it stops for `idle_s` or falls behind `least`.

    One lazy timer instead of one per chunk, which would cost a tenth of a large upload. So it is
    late itself, by half of `idle_s` at most.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        idle_s: float,
        least: float,
        count: Callable[[], int],
        late: Callable[[], None],
    ) -> None:
        self.loop, self.idle_s, self.least, self.count, self.late = loop, idle_s, least, count, late
        self.first = self.last = count()
        self.start = self.moved = loop.time()
        self.held_at: float | None = None
        self.timer = loop.call_later(idle_s / 2, self._tick)

    def _tick(self) -> None:
        now = self.loop.time()
        if self.held_at is None:
            if (done := self.count()) != self.last:
                self.last, self.moved = done, now
            owed = self.least * (now - self.start - self.idle_s)
            if now - self.moved >= self.idle_s or done - self.first < owed:
                return self.late()
        self.timer = self.loop.call_later(self.idle_s / 2, self._tick)

    def hold(self) -> None:
        """Stops the clock: the peer is not the one that is awaited."""
        self.held_at = self.loop.time()

    def go(self) -> None:
        """Lets the clock run again."""
        if self.held_at is not None:
            away = self.loop.time() - self.held_at
            self.start, self.moved, self.held_at = self.start + away, self.moved + away, None

    def stop(self) -> None:
        """Ends the watch."""
        self.timer.cancel()
