"""Room for the time when there is none.

Whoever wants to free room on a full disk needs some: a deletion is a transaction before it is a
removal, and so is the start of a server. `DATA/ballast` is a file of reserved blocks with nothing
in them. It is given up when such a step finds the disk full, and made again once there is room:
after the deletion, or at the next start. Nothing is promised with it, so it is never synced.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from service.storage.failures import NoSpace
from service.storage.files import Files

T = TypeVar("T")
SIZE = 8 << 20


class Ballast:
    """The ballast of one data folder.

    Args:
        files: The calls.
        path: Of the file.
        size: Bytes that it reserves; with none there is no ballast.
    """

    def __init__(self, files: Files, path: Path, size: int = SIZE) -> None:
        self._files = files
        self._path = path
        self._size = size
        self._given_up = False

    def fill(self) -> None:
        """Makes the ballast, if it is not there.

        Raises:
            NoSpace: The disk can't hold it, and there is none.
        """
        if not self._size:
            return
        try:
            with self._files.created(self._path) as fd:
                self._files.allocate(fd, self._size, "reserving the ballast")
        except NoSpace:
            self._files.unlink(self._path)
            raise
        self._given_up = False

    def refill(self) -> None:
        """Makes the ballast again if it was given up and there is room by now."""
        if self._given_up:
            with contextlib.suppress(NoSpace):
                self.fill()

    def relieve(self, work: Callable[[], T]) -> T:
        """Does what must not fail for want of a little room.

        Args:
            work: A full disk leaves all as it was; it is then done once more without the ballast.

        Raises:
            NoSpace: That was not enough, or there was none.
        """
        try:
            return work()
        except NoSpace:
            self._files.unlink(self._path)
            self._given_up = True
            return work()
