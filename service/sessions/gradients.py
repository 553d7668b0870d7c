"""Recycled gradient buffers: some are of a session's reservation, more as the budget allows."""

import threading

import numpy as np
from numpy.typing import NDArray

from service.errors import Overloaded
from service.limits import Budget


class Gradients:
    """Buffers of `nbytes` each, for pushes in flight and for rounds that hold contributions.

    The first `kept` are paid for by the session's own reservation and kept until `close`; each
    further one is reserved while somebody has it and freed after it.
    """

    def __init__(self, nbytes: int, budget: Budget, kept: int = 1) -> None:
        self.nbytes = nbytes
        self.kept = kept
        self._budget = budget
        self._lock = threading.Lock()
        self._own: list[NDArray[np.uint8]] = []
        self._free: list[NDArray[np.uint8]] = []
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether nobody has any of those that are kept."""
        return len(self._own) == len(self._free)

    def acquire(self) -> NDArray[np.uint8]:
        """A buffer whose contents are undefined.

        Raises:
            Overloaded: The memory budget has no room for one more gradient now.
        """
        with self._lock:
            if not self._closed:
                if self._free:
                    return self._free.pop()
                if len(self._own) < self.kept:
                    self._own.append(np.empty(self.nbytes, np.uint8))
                    return self._own[-1]
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
            if not self._closed and any(buffer is one for one in self._own):
                self._free.append(buffer)
                return
        self._budget.release(self.nbytes)

    def close(self) -> int:
        """Ends the keeping; returns the bytes of those that nobody has.

        Whoever has one of the others gives its bytes back by `release`.
        """
        with self._lock:
            self._closed = True
            out = len(self._own) - len(self._free)
            self._own, self._free = [], []
            return self.nbytes * (self.kept - out)
