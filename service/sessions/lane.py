"""The serial lane of a session: everything that writes it runs here, one program after another."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from kernels.pool import Pool
from service.errors import ShuttingDown

T = TypeVar("T")
U = TypeVar("U")
Program = Generator[Sequence[Callable[[], Any]], list[Any], T]


class _Waiting(NamedTuple):
    program: Program[Any]
    result: asyncio.Future[Any]
    since: float
    here: Callable[[], bool]
    then: Callable[[Any], Any] | None


BURST = 32
"""Programs that run on the event loop in a row before other work there has its turn."""


def never() -> bool:
    """Says that a program belongs into the pool."""
    return False


async def on_pool(pool: Pool, program: Program[T]) -> T:
    """Runs a program that writes no session (a conversion, a parse) and awaits its result."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def done(value: T | None, error: BaseException | None) -> None:
        loop.call_soon_threadsafe(_settle, result, value, error)

    try:
        pool.submit(program, done)
    except RuntimeError:
        raise stopping() from None
    return await asyncio.shield(result)


async def in_pool(pool: Pool, work: Callable[[], T]) -> T:
    """Runs one function in the pool and awaits its result."""

    def program() -> Program[T]:
        found: list[T] = yield [work]
        return found[0]

    return await on_pool(pool, program())


def stopping() -> ShuttingDown:
    """The refusal of work that comes after the pool was closed."""
    return ShuttingDown(
        "The server is stopping; send the same request again when it is back.", retry_after_s=1
    )


def _settle(result: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if result.cancelled():
        return
    if error is not None:
        result.set_exception(error)
        # Whoever asked may have gone; the failure has been counted, it need not be reported twice.
        result.exception()
    else:
        result.set_result(value)


class Lane:
    """FIFO over the pool. A program once submitted runs to its end whether or not anyone listens.

    Args:
        pool: The threads that run programs.
        after: Called on the event loop after each program and before the next one starts, so that
            readers that waited get the version just published.
    """

    def __init__(self, pool: Pool, after: Callable[[], None]) -> None:
        self._pool = pool
        self._after = after
        self._waiting: deque[_Waiting] = deque()
        self._busy = False
        self.started_at = 0.0
        self.queued_s = 0.0

    async def run(self, program: Program[T]) -> T:
        """Queues a program and awaits its result; cancelling the caller does not stop it."""
        found: T = await asyncio.shield(self.submit(program))
        return found

    async def run_then(self, program: Program[T], then: Callable[[T], U]) -> U:
        """As `run`, and `then` with the result, as `submit` says; returns what that returns."""
        found: U = await asyncio.shield(self.submit(program, then=then))
        return found

    def submit(
        self,
        program: Program[T],
        *,
        here: Callable[[], bool] = never,
        then: Callable[[Any], Any] | None = None,
    ) -> asyncio.Future[Any]:
        """Queues a program.

        Args:
            program: What to run.
            here: Asked when its turn comes: run it on the event loop? For work shorter than the
                hop to a thread and back (docs/decisions/0007), which must not compile or wait.
            then: Called on the event loop with the result, before anything else runs there or in
                the lane; its own result counts. For changes that no reader may see half of.

        Returns:
            Its result. Await it shielded: cancelling it would not stop the program.
        """
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(program, result, time.perf_counter(), here, then))
        if not self._busy:
            self._go_on()
        return result

    def _go_on(self) -> None:
        """Starts what waits: one after another here, until one has to go to the pool."""
        loop = asyncio.get_running_loop()
        for _ in range(BURST):
            if self._busy or not self._waiting:
                return
            self._busy = True
            program, result, since, here, then = self._waiting.popleft()
            self.started_at = time.perf_counter()
            self.queued_s = self.started_at - since
            if here():
                self._end(result, then, *_drive(program))
                continue
            try:
                self._pool.submit(program, partial(self._back, loop, result, then))
            except RuntimeError:  # the pool is closed; the program has not begun
                program.close()
                self._end(result, None, None, stopping())
        if self._waiting and not self._busy:
            loop.call_soon(self._resume)

    def _resume(self) -> None:
        if not self._busy:
            self._go_on()

    def _back(
        self,
        loop: asyncio.AbstractEventLoop,
        result: asyncio.Future[Any],
        then: Callable[[Any], Any] | None,
        value: Any,
        error: BaseException | None,
    ) -> None:
        """Hands a result from a thread of the pool to the event loop."""
        loop.call_soon_threadsafe(self._finish, result, then, value, error)

    def _finish(
        self,
        result: asyncio.Future[Any],
        then: Callable[[Any], Any] | None,
        value: Any,
        error: BaseException | None,
    ) -> None:
        """Takes a result from the pool, on the event loop."""
        self._end(result, then, value, error)
        self._go_on()

    def _end(
        self,
        result: asyncio.Future[Any],
        then: Callable[[Any], Any] | None,
        value: Any,
        error: BaseException | None,
    ) -> None:
        self._busy = False
        if then is not None and error is None:
            try:
                value = then(value)
            except Exception as failure:
                error = failure
        _settle(result, value, error)
        self._after()

    async def idle(self) -> None:
        """Returns when nothing runs or waits."""
        while self._busy or self._waiting:
            await self.run(_nothing())


def _drive(program: Program[T]) -> tuple[T | None, Exception | None]:
    """Runs a program in this thread; the pool does the same, spread over its own."""
    try:
        thunks = next(program)
        while True:
            try:
                results = [thunk() for thunk in thunks]
            except Exception as error:
                thunks = program.throw(error)
            else:
                thunks = program.send(results)
    except StopIteration as end:
        return end.value, None
    except Exception as error:
        return None, error


def _nothing() -> Program[None]:
    return
    yield []
