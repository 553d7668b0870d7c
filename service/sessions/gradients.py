"""Recycled gradient buffers: one is part of a session's reservation, more as the budget allows."""

import threading

import numpy as np
from numpy.typing import NDArray

from service.errors import Overloaded
from service.limits import Budget


class Gradients:
    """Buffers of `nbytes` each, for pushes in flight.

    The first is paid for by the session's own reservation and kept until `close`; each further one
    is reserved while a push is in flight and freed after it.
    """

    def __init__(self, nbytes: int, budget: Budget) -> None:
        self.nbytes = nbytes
        self._budget = budget
        self._lock = threading.Lock()
        self._own: NDArray[np.uint8] | None = None
        self._own_free = True
        self._closed = False

    def acquire(self) -> NDArray[np.uint8]:
        """A buffer whose contents are undefined.

        Raises:
            Overloaded: The memory budget has no room for one more gradient now.
        """
        with self._lock:
            if self._own_free and not self._closed:
                if self._own is None:
                    self._own = np.empty(self.nbytes, np.uint8)
                self._own_free = False
                return self._own
        if not self._budget.try_reserve(self.nbytes):
            raise Overloaded(
                f"No memory for one more gradient of {self.nbytes} bytes while others are in "
                "flight; send the same push again after the pause.",
                retry_after_s=1,
                bytes=self.nbytes,
            )
        try:
            return np.empty(self.nbytes, np.uint8)
        except BaseException:
            self._budget.release(self.nbytes)
            raise

    def release(self, buffer: NDArray[np.uint8]) -> None:
        """Gives a buffer back, once nobody reads it any more."""
        with self._lock:
            if buffer is self._own and not self._closed:
                self._own_free = True
                return
        self._budget.release(self.nbytes)

    def close(self) -> int:
        """Ends the keeping of the first one; returns its bytes, or 0 while a push still has it.

        That push then gives them back by `release`.
        """
        with self._lock:
            self._closed = True
            if self._own_free:
                self._own = None
            return self.nbytes if self._own_free else 0
