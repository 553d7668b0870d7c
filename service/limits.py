"""Budgets that shed load before anything is allocated, and the table of every limit."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from gradpost.protocol import MAX_HEADER_BYTES
from service.errors import InsufficientMemory, Overloaded
from service.settings import Settings

# What /v1/server and docs/operations.md list: what bounds what one caller can take.
LIMITS = (
    "max_sessions",
    "memory_bytes",
    "max_versions",
    "max_uploads",
    "max_connections",
    "max_workers",
    "worker_retention_s",
    "wait_cap_s",
    "snapshot_interval_s",
    "history_steps",
    "json_elements",
    "json_bytes",
    "max_header_bytes",
    "header_timeout_s",
    "head_bytes",
    "body_idle_timeout_s",
    "body_min_bytes_per_s",
    "reader_idle_timeout_s",
    "reader_min_bytes_per_s",
    "drain_timeout_s",
    "drain_bytes",
    "keep_alive_s",
    "shutdown_timeout_s",
)


# No settings: a client holds itself to the same number.
_FIXED = {"max_header_bytes": MAX_HEADER_BYTES}


def table(settings: Settings) -> dict[str, Any]:
    """Every limit by name; units are the suffixes (`_s` seconds, `_bytes` bytes)."""
    return {name: _FIXED[name] if name in _FIXED else getattr(settings, name) for name in LIMITS}


class Budget:
    """Bytes that are promised before they are allocated; safe to use from any thread.

    Args:
        total: The most bytes that may be reserved at once.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def try_reserve(self, n: int) -> bool:
        """Reserves n bytes, or nothing if they do not fit."""
        with self._lock:
            if n < 0 or self._used + n > self.total:
                return False
            self._used += n
            return True

    def reserve(self, n: int) -> None:
        """Reserves n bytes.

        Raises:
            InsufficientMemory: They do not fit; nothing was reserved.
        """
        if not self.try_reserve(n):
            raise InsufficientMemory(
                f"This needs {n} bytes and {max(0, self.total - self._used)} of the server's"
                f" {self.total} are free. Delete sessions, or start it with a larger"
                " GRADPOST_MEMORY_BYTES.",
                needed_bytes=n,
                free_bytes=max(0, self.total - self._used),
                memory_bytes=self.total,
            )

    def borrow(self, n: int) -> None:
        """Reserves n bytes of one body, for a while.

        Raises:
            Overloaded: They do not fit now; the caller may try again after a second.
        """
        if not self.try_reserve(n):
            raise Overloaded(
                f"This body needs {n} bytes and {max(0, self.total - self._used)} of the server's"
                f" {self.total} are free (GRADPOST_MEMORY_BYTES). Send the same request again.",
                retry_after_s=1,
                needed_bytes=n,
                memory_bytes=self.total,
            )

    @contextmanager
    def lend(self, n: int) -> Iterator[None]:
        """Reserves n bytes for as long as the block runs.

        Raises:
            Overloaded: As `borrow` raises it.
        """
        self.borrow(n)
        try:
            yield
        finally:
            self.release(n)

    def release(self, n: int) -> None:
        """Gives back n bytes that were reserved.

        Raises:
            ValueError: More is given back than was reserved: a bug of the caller.
        """
        with self._lock:
            if not 0 <= n <= self._used:
                raise ValueError(f"released {n} bytes of {self._used} reserved")
            self._used -= n


class Uploads:
    """Slots for uploads in flight: `with uploads: ...`, on the event loop.

    Args:
        limit: The most uploads at once in the whole server.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0

    def __enter__(self) -> "Uploads":
        """Takes a slot.

        Raises:
            Overloaded: All are taken; the caller may try again after a second.
        """
        if self.active >= self.limit:
            raise Overloaded(
                f"{self.active} uploads are in flight, as many as this server admits"
                " (GRADPOST_MAX_UPLOADS). Send the same request again.",
                retry_after_s=1,
                max_uploads=self.limit,
            )
        self.active += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.active -= 1
