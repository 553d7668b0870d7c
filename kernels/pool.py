"""A pool of threads that runs *programs*: generators that yield lists of independent parts.

Nothing waits inside the pool: a program that has handed out parts holds no thread, and the last
part to finish carries it on. So any number of programs share a few threads, first come, first
served. Parts that wait for something else than a processor are yielded as `Waits`, and have
threads of their own.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Thunk = Callable[[], object]
Program = Generator[Sequence[Thunk], list[Any], T]
Done = Callable[[T | None, BaseException | None], None]

WAITING = 32
"""The most parts that wait at once; more of them queue."""

_log = logging.getLogger(__name__)


class Waits(tuple[Thunk, ...]):
    """Parts that wait for a disk or another thread, and would only hold a core's thread up."""

    __slots__ = ()


class _Batch:
    """One yielded list: parts are claimed one by one; whoever finishes the last one is told so."""

    def __init__(self, thunks: Sequence[Thunk]) -> None:
        self.thunks = thunks if isinstance(thunks, Waits) else tuple(thunks)
        self.results: list[Any] = [None] * len(thunks)
        self.errors: list[BaseException | None] = [None] * len(thunks)
        self._lock = threading.Lock()
        self._claimed = 0
        self._left = len(thunks)

    def claim(self) -> int | None:
        """Returns the index of a part that nobody has taken, or None."""
        with self._lock:
            if self._claimed == len(self.thunks):
                return None
            self._claimed += 1
            return self._claimed - 1

    def work(self, index: int) -> bool:
        """Runs part index; returns True iff it was the last to finish."""
        try:
            self.results[index] = self.thunks[index]()
        except BaseException as error:
            self.errors[index] = error
        with self._lock:
            self._left -= 1
            return self._left == 0

    def error(self) -> BaseException | None:
        """Returns the error of the first part, by index, that failed."""
        return next((error for error in self.errors if error is not None), None)


class _Run(Generic[T]):
    """A program under way."""

    def __init__(self, program: Program[T], done: Done[T]) -> None:
        self._program = program
        self._done = done

    def advance(self, batch: _Batch | None) -> _Batch | None:
        """Carries the program on with batch's results; returns the next batch, None at its end."""
        try:
            error = batch.error() if batch is not None else None
            if error is not None:
                thunks = self._program.throw(error)
            elif batch is not None:
                thunks = self._program.send(batch.results)
            else:
                thunks = next(self._program)
            return _Batch(thunks)
        except StopIteration as stop:
            self._finish(stop.value, None)
        except BaseException as error:
            self._finish(None, error)
        return None

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        try:
            self._done(result, error)
        except Exception:  # a thread of the pool must survive its callers
            _log.exception("the callback of a finished program failed")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool:
    """Worker threads that run programs; see `submit`."""

    def __init__(self, threads: int | None = None) -> None:
        """Starts the threads: as many as this process may use cores, unless told otherwise.

        Raises:
            ValueError: threads is below 1.
        """
        if threads is None:
            threads = _cores()
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closed = False
        self._under_way = 0
        self._state = threading.Condition()
        self._waiting = ThreadPoolExecutor(WAITING, "gradpost-wait")
        self._workers = [
            threading.Thread(target=self._serve, name=f"gradpost-pool-{k}", daemon=True)
            for k in range(threads)
        ]
        for worker in self._workers:
            worker.start()

    def _serve(self) -> None:
        while (task := self._queue.get()) is not None:
            task()
            del task  # or it would keep a session's arrays alive until the next one comes

    def _put(self, task: Callable[[], None]) -> None:
        with self._state:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._queue.put(task)

    def submit(self, program: Program[T], done: Done[T]) -> None:
        """Runs a program in the pool's threads and returns at once.

        Args:
            program: a generator. Each list of callables that it yields is spread over the pool,
            and the list of
                their results, in order, is sent back into it; if some fail, the error of the first
                (by index) is thrown into it after all have finished. A list of one runs without a
                hop.
            done: called in a thread of the pool, once, as ``done(result, None)`` or ``done(None,
            error)``.

        Raises:
            RuntimeError: the pool is closed.
        """

        def ended(result: T | None, error: BaseException | None) -> None:
            try:
                done(result, error)
            finally:
                with self._state:
                    self._under_way -= 1
                    self._state.notify_all()

        run = _Run(program, ended)
        with self._state:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._under_way += 1
            self._queue.put(lambda: self._drive(run, None))

    def _drive(self, run: _Run[Any], batch: _Batch | None) -> None:
        """Carries a program on from a finished batch for as long as this thread finishes last."""
        while (batch := run.advance(batch)) is not None:
            if not batch.thunks:
                continue
            if isinstance(batch.thunks, Waits):
                for _ in batch.thunks:
                    self._waiting.submit(self._wait, run, batch)
                return
            for _ in range(len(batch.thunks) - 1):
                # straight into the queue: a program under way is finished even while the pool
                # closes
                self._queue.put(lambda batch=batch: self._part(run, batch))  # type: ignore[misc]
            index = batch.claim()
            if index is None or not batch.work(index):
                return

    def _part(self, run: _Run[Any], batch: _Batch) -> None:
        index = batch.claim()
        if index is not None and batch.work(index):
            self._drive(run, batch)

    def _wait(self, run: _Run[Any], batch: _Batch) -> None:
        """As `_part`, in a thread that waits; what comes after it is the pool's work again."""
        index = batch.claim()
        if index is not None and batch.work(index):
            self._queue.put(lambda: self._drive(run, batch))

    def run(self, program: Program[T]) -> T:
        """Runs a program and returns its result; the calling thread takes part. Not for the pool.

        Raises:
            BaseException: whatever the program raises.
            RuntimeError: the pool is closed.
        """
        outcome: list[Any] = []
        run: _Run[T] = _Run(program, lambda result, error: outcome.extend((result, error)))
        batch: _Batch | None = None
        while (batch := run.advance(batch)) is not None:
            self._together(batch)
        result, error = outcome
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _together(self, batch: _Batch) -> None:
        """Works through batch in the calling thread and at most threads - 1 others, and waits."""
        finished = threading.Event()

        def help_out() -> None:
            while (index := batch.claim()) is not None:
                if batch.work(index):
                    finished.set()

        for _ in range(min(self.threads, len(batch.thunks)) - 1):
            self._put(help_out)
        help_out()
        if batch.thunks:
            finished.wait()

    def close(self) -> None:
        """Refuses new programs, finishes those under way, ends the threads. Not for the pool."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.wait_for(lambda: not self._under_way)
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join()
        self._waiting.shutdown()
