"""Pulls that pin a version, and those that wait for one."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from service.errors import ServiceError
from service.sessions.versions import Version, Versions

Target = tuple[int, int]


class _Waiter(NamedTuple):
    target: Target
    future: asyncio.Future[Version]


class Waiting:
    """Pins versions for readers. Used on the event loop only.

    Whether a version is new enough is read from the version that was pinned, never from the
    session's own numbers: a step may be about to publish.

    Args:
        versions: Gives the versions; None while there are none.
        refused: Why nothing will come any more; None while something may.
        late: The refusal of a wait that ended without a version.
    """

    def __init__(
        self,
        versions: Callable[[], Versions | None],
        refused: Callable[[], ServiceError | None],
        late: Callable[[Target], ServiceError],
    ) -> None:
        self._versions = versions
        self._refused = refused
        self._late = late
        self._waiters: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    async def hold(self, target: Target, wait_s: float, cap_s: float) -> Version:
        """Pins the newest version once it is at least `target`; give it back by `release`.

        Args:
            target: (epoch, version).
            wait_s: How long to wait for a version that does not exist yet.
            cap_s: How long to wait for a buffer, where the version is there.

        Raises:
            ServiceError: `target` was not reached in time, or never will be.
        """
        versions = self._versions()
        assert versions is not None
        held = self._take(target)
        if held is not None:
            return held
        head = versions.head
        reached = (head.epoch, head.number) >= target
        if not reached and wait_s <= 0:
            raise self._late(target)
        future: asyncio.Future[Version] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(target, future)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(max(cap_s if reached else wait_s, 0.001)):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif future.exception() is None:  # served in the moment in which the wait ended
                self.release(future.result())
            if isinstance(error, TimeoutError):
                raise self._late(target) from None
            raise

    def release(self, version: Version) -> None:
        """Gives a held version back; its buffer may be what somebody waits for."""
        version.owner.release(version)
        if self._waiters:
            self.wake()

    def wake(self) -> None:
        """Serves the pulls that waited; runs between two programs of the lane."""
        if not self._waiters:
            return
        refusal = self._refused()
        if refusal is not None:
            self.fail(refusal)
            return
        waiting, self._waiters = self._waiters, []
        for waiter in waiting:
            held = None if waiter.future.done() else self._take(waiter.target)
            if held is not None:
                waiter.future.set_result(held)
            elif not waiter.future.done():
                self._waiters.append(waiter)

    def fail(self, refusal: ServiceError) -> None:
        """Ends every wait with a refusal."""
        waiting, self._waiters = self._waiters, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(refusal)

    def _take(self, target: Target) -> Version | None:
        """Pins the newest version if it is at least `target` and may be pinned now."""
        versions = self._versions()
        held = None if versions is None else versions.hold()
        if held is not None and (held.epoch, held.number) < target:
            held.owner.release(held)
            return None
        return held
