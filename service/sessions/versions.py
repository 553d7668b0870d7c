"""The published parameters of a session: immutable versions in at most `limit` buffers."""

import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.errors import Overloaded
from service.limits import Budget
from service.sessions.layout import Layout

EMPTY = Layout(())


@dataclass(eq=False)
class Version:
    """One published version. `flat` must not be written while `holders` is positive."""

    owner: "Versions"
    epoch: int
    number: int
    step: int
    flat: NDArray[np.floating]
    holders: int = field(default=0)


class Versions:
    """Hands out the head to readers and a writable buffer to the one writer, the lane.

    Capacity, in buffers, is what the budget has granted: two from the start (the head and one
    spare), more while readers hold old versions. The invariant `pinned + 1 <= capacity <= limit`
    means that the writer always finds a buffer: a slow reader makes later *pulls* wait, never a
    step. Pulls that waited share the newest version.

    Thread-safe: readers hold and release on the event loop, the lane writes in pool threads.
    """

    def __init__(
        self,
        size: int,
        dtype: np.dtype,
        limit: int,
        budget: Budget,
        layout: Layout = EMPTY,
    ) -> None:
        self.layout = layout
        """Of every version here: a session whose layout grows gets other versions."""
        self._size = size
        self._dtype = dtype
        self._bytes = size * dtype.itemsize
        self._limit = limit
        self._budget = budget
        self._lock = threading.Lock()
        self._capacity = 2  # reserved by whoever made us; given back by close()
        self._pinned = 0
        self._spares: list[NDArray[np.floating]] = []
        self._head: Version | None = None
        self._in_place = False
        self._closed = False

    @property
    def head(self) -> Version:
        """The newest version; only its numbers may be read without `hold`."""
        assert self._head is not None
        return self._head

    def hold(self) -> Version | None:
        """Pins the newest version, or returns None when the caller has to wait.

        That is while a step writes in place, and when pinning one more version would leave the
        writer without a buffer.
        """
        with self._lock:
            head = self._head
            if head is None or self._in_place:
                return None
            if head.holders == 0:
                if not self._grow(self._pinned + 2):
                    return None
                self._pinned += 1
            head.holders += 1
            return head

    def release(self, version: Version) -> None:
        """Gives a held version back; its buffer is free when nobody else holds it."""
        with self._lock:
            version.holders -= 1
            if version.holders:
                return
            self._pinned -= 1
            if version is not self._head or self._closed:
                self._spares.append(version.flat)
            self._shrink()

    def begin(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Where the next version is read from and written to: the same buffer if nobody looks."""
        with self._lock:
            head = self.head
            if head.holders == 0:
                self._in_place = True
                return head.flat, head.flat
            return head.flat, self._take()

    def fresh(self) -> NDArray[np.floating]:
        """A buffer for a version that does not derive from the head in place.

        Only for the lane, which must publish it or give it back with `drop`. A head that is held
        is among the pinned; one that nobody holds needs a buffer beside the new one.

        Raises:
            Overloaded: Readers hold the buffers; nothing was changed.
        """
        with self._lock:
            beside = self._head is None or self._head.holders == 0
            if not self._grow(self._pinned + 1 + beside):
                raise Overloaded(
                    "Readers hold older versions and no buffer is left for a new one; send the "
                    "same request again, or raise GRADPOST_MAX_VERSIONS or GRADPOST_MEMORY_BYTES.",
                    retry_after_s=1,
                )
            return self._take()

    def drop(self, flat: NDArray[np.floating]) -> None:
        """Gives back a buffer from `fresh` that was not published."""
        with self._lock:
            self._spares.append(flat)
            self._shrink()

    def publish(
        self, epoch: int, number: int, step: int, flat: NDArray[np.floating], *, hold: bool = False
    ) -> Version | None:
        """Makes `flat` the head. With `hold`, pins it in the same moment (None: has to wait)."""
        with self._lock:
            old = self._head
            self._head = Version(self, epoch, number, step, flat)
            self._in_place = False
            if old is not None and old.holders == 0 and old.flat is not flat:
                self._spares.append(old.flat)
            self._shrink()
        return self.hold() if hold else None

    def close(self) -> None:
        """Gives every buffer back that no reader holds; the rest follow with their readers."""
        with self._lock:
            self._closed = True
            self._shrink()

    def _take(self) -> NDArray[np.floating]:
        return self._spares.pop() if self._spares else np.empty(self._size, self._dtype)

    def _grow(self, needed: int) -> bool:
        while self._capacity < needed:
            if self._capacity >= self._limit or not self._budget.try_reserve(self._bytes):
                return False
            self._capacity += 1
        return True

    def _shrink(self) -> None:
        """Returns capacity that no pin needs to the budget, and frees buffers beyond it."""
        keep = self._pinned if self._closed else max(2, self._pinned + 1)
        while self._capacity > keep:
            self._capacity -= 1
            self._budget.release(self._bytes)
        head = self._head  # None until the first upload has succeeded
        loose = head is not None and not self._closed and head.holders == 0
        alive = self._pinned + loose
        del self._spares[max(0, self._capacity - alive) :]
