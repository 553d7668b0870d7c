"""Answers that wait until their worker is within the bound of the slowest one (mode bounded)."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from service.errors import ServiceError
from service.sessions.members import Members


class _Waiter(NamedTuple):
    worker: str
    slack: int
    future: asyncio.Future[None]


class Turns:
    """Holds the answers of workers that are ahead. Used on the event loop only.

    The stale synchronous parallel model (Ho et al. 2013), with the answer to a push in place of the
    read that waits there: a worker that has no answer computes no further gradient.

    Args:
        members: Their clocks.
        begun: Called when somebody begins to wait: a lease may have to be watched now.
    """

    def __init__(self, members: Members, begun: Callable[[], None]) -> None:
        self._members = members
        self._begun = begun
        self._waiters: list[_Waiter] = []
        self._refusal: ServiceError | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, worker: str, slack: int, wait_s: float) -> bool:
        """Waits until a worker is no more than `slack` pushes ahead of the slowest live one.

        Args:
            worker: Which.
            slack: The bound.
            wait_s: For so long at most.

        Returns:
            Whether it is still ahead.

        Raises:
            ServiceError: Nothing will come any more.
        """
        if wait_s <= 0 or not self._members.is_ahead(worker, slack):
            return self._members.is_ahead(worker, slack)
        if self._refusal is not None:
            raise self._refusal
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(worker, slack, future)
        self._waiters.append(waiter)
        self._begun()
        try:
            async with asyncio.timeout(wait_s):
                await future
        except TimeoutError:
            return self._members.is_ahead(worker, slack)
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        return False

    def wake(self) -> None:
        """Lets those go on whose turn has come."""
        if not self._waiters:
            return
        waiting, self._waiters = self._waiters, []
        slowest = self._members.slowest()  # once: this is done after each push
        for waiter in waiting:
            if waiter.future.done():
                continue
            one = self._members.get(waiter.worker)
            if one is not None and slowest is not None and one.clock > slowest + waiter.slack:
                self._waiters.append(waiter)
            else:
                waiter.future.set_result(None)

    def stop(self, refusal: ServiceError) -> None:
        """As `fail`, and so ends every wait that is still to come."""
        self._refusal = refusal
        self.fail(refusal)

    def fail(self, refusal: ServiceError) -> None:
        """Ends every wait with a refusal."""
        waiting, self._waiters = self._waiters, []
        for waiter in waiting:
            if not waiter.future.done():
                waiter.future.set_exception(refusal)
