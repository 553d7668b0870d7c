"""What every session object stands on: calls with retries, one thread behind it, and its end."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from gradpost.calls import Calls
from gradpost.errors import ClosedError
from gradpost.membership import Membership
from gradpost.retry import Retrier, RetryPolicy
from gradpost.transport import Answer, Transport

T = TypeVar("T")


class Connected:
    """Runs the calls of one session object until it is closed.

    Args:
        transport: The way to the server.
        id: Of the session.
        worker: Whose calls they are.
        api_key: Of the server.
        policy: Deadlines and retries.
        seed: Of the retries' jitter.
        close_transport: Whether the transport ends with this object.
    """

    def __init__(
        self,
        transport: Transport,
        id: str,
        worker: str,
        api_key: str | None,
        policy: RetryPolicy | None,
        seed: int | None,
        *,
        close_transport: bool,
    ) -> None:
        self._close_transport = close_transport
        self._calls = Calls(transport, api_key)
        self._retrier = Retrier(policy or RetryPolicy(), seed)
        self._membership = Membership(id, worker, self._calls, self._retrier)
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._admitted = threading.local()
        self._closed = False

    @property
    def retries(self) -> int:
        """Attempts beyond the first, so far."""
        return self._retrier.retries

    def join(self) -> None:
        """Takes a place among the session's workers, and keeps it until `close`.

        A thread renews the lease; if it lapsed meanwhile, that takes the place anew. Sessions in
        sync and bounded mode are joined when they are created or attached to. A process that was
        forked has not the place of its parent, and one that ends without `close` keeps its own
        until the lease has run out.

        Raises:
            WorkerRetired: This worker has left for good: make another session object.
        """
        self._check_open()
        self._membership.join()

    def close(self) -> None:
        """Waits for what runs in the background, leaves, closes the connections.

        The session stays. No gradient is sent: a push that is still pending is dropped, so settle
        it before. Leaving is tried for two seconds; if that fails the place is given up when the
        lease runs out.
        """
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        try:
            if thread is not None:
                thread.shutdown(wait=True)
            self._membership.leave()
        finally:
            self._membership.stop()
            if self._close_transport:  # one that was handed in may serve other sessions
                self._calls.close()

    def _run(
        self,
        attempt: Callable[[float], T],
        *,
        final: tuple[str, ...] = (),
        end: float | None = None,
    ) -> T:
        self._check_open()
        return self._retrier.run(attempt, final=final, end=end)

    def _check_open(self) -> None:
        if self._closed and not getattr(self._admitted, "now", False):
            raise ClosedError("This session object was closed; attach again.")

    def _document(
        self, method: str, path: str, value: Any = None, needs: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        return self._run(lambda timeout: self._calls.document(method, path, timeout, value, needs))

    def _request(
        self, method: str, path: str, read: Callable[[Answer], T], headers: Mapping[str, str]
    ) -> T:
        return self._run(
            lambda timeout: self._calls.send(method, path, read, timeout, headers=headers)
        )

    def _later(self, call: Callable[[], T]) -> "Future[T]":
        """Queues a call, which `close` lets run to its end."""

        def admitted() -> T:
            self._admitted.now = True
            try:
                return call()
            finally:
                self._admitted.now = False

        with self._lock:
            if self._closed:
                raise ClosedError("This session object was closed; attach again.")
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradpost")
            return self._thread.submit(admitted)
