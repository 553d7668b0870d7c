"""Sending the same bytes again, until an answer settles what they did."""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gradpost.errors import DeadlineExceeded, GradpostError, RefusedError

T = TypeVar("T")
LOG = logging.getLogger("gradpost")


class Attempt(NamedTuple):
    """What `on_retry` is told: tries so far, the failure, and seconds until the next try."""

    tries: int
    error: GradpostError
    delay_s: float


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try, and how to wait in between.

    Attributes:
        deadline_s: Seconds for one call with all its retries and, of a push, with settling the one
            before it. An answer that arrives slowly is read to its end even so.
        attempt_s: Seconds that one attempt may wait for the network.
        base_s: The first wait, before jitter; doubles each time.
        cap_s: The longest wait, before jitter, unless the server asks for more.
        on_retry: Told before each wait.
        sleep: For tests.
        clock: For tests; seconds, monotonic.
    """

    deadline_s: float = 120.0
    attempt_s: float = 60.0
    base_s: float = 0.05
    cap_s: float = 5.0
    on_retry: Callable[[Attempt], None] | None = None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class Retrier:
    """Runs attempts under a policy; jitter comes from a seed.

    Args:
        policy: The times.
        seed: Of the jitter; None: from the system.
    """

    def __init__(self, policy: RetryPolicy, seed: int | None = None) -> None:
        self.policy = policy
        self.retries = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def end(self, deadline_s: float | None = None) -> float:
        """When the time of a call that begins now is used up, by the policy's clock."""
        return self.policy.clock() + (self.policy.deadline_s if deadline_s is None else deadline_s)

    def left_s(self, end: float) -> float:
        """Seconds until then."""
        return end - self.policy.clock()

    def run(
        self,
        attempt: Callable[[float], T],
        *,
        final: tuple[str, ...] = (),
        end: float | None = None,
    ) -> T:
        """Calls `attempt(timeout_s)` until it returns, at least once.

        Args:
            attempt: Sends the same bytes each time.
            final: Slugs of refusals to raise at once although they are retryable.
            end: When the time is used up; as the policy says where None.

        Raises:
            DeadlineExceeded: The time is used up.
            GradpostError: A failure that no retry mends.
        """
        policy = self.policy
        begin = policy.clock()
        end = begin + policy.deadline_s if end is None else end
        count = 0
        while True:
            try:
                return attempt(max(min(self.left_s(end), policy.attempt_s), 0.001))
            except GradpostError as error:
                if not error.retryable or getattr(error, "slug", "") in final:
                    raise
                delay = self._delay(count, error)
                if policy.clock() + delay >= end:
                    given = round(max(end - begin, 0.0), 3)
                    raise DeadlineExceeded(
                        f"No answer after {count + 1} tries in {given} s: {error}",
                        error,
                    ) from error
                count += 1
                with self._lock:
                    self.retries += 1
                if count == 1:
                    left = max(self.left_s(end), 0.0)
                    LOG.warning("%s Trying again, for %.0f s at most.", error, left)
                if policy.on_retry is not None:
                    policy.on_retry(Attempt(count, error, delay))
                policy.sleep(delay)

    def pause(self, count: int, end: float) -> None:
        """Waits before one asks again, for the time after `count` such waits; not beyond `end`."""
        self.policy.sleep(max(min(self._backoff(count), self.left_s(end)), 0.0))

    def _backoff(self, count: int) -> float:
        """Half of the backoff and a random half, in seconds."""
        backoff = min(self.policy.cap_s, self.policy.base_s * 2.0 ** min(count, 30))
        with self._lock:
            return backoff * (0.5 + 0.5 * self._random.random())

    def _delay(self, count: int, error: GradpostError) -> float:
        """Seconds to wait before a retry; no less than Retry-After."""
        delay = self._backoff(count)
        asked = error.retry_after_s if isinstance(error, RefusedError) else None
        return delay if asked is None else asked + delay
