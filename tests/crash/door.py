"""Where workers wait while there is no server, and learn which one to ask."""

import threading
import time

SHUT, OPEN, LAST, ABANDONED = "shut", "open", "last", "abandoned"


class Abandoned(Exception):
    """The test has given up."""


class Door:
    """Opened for one server at a time, by the test; passed by workers.

    Args:
        workers: How many there are.
    """

    def __init__(self, workers):
        self._changed = threading.Condition()
        self._workers = workers
        self._waiting = 0
        self._left = 0
        self._state = SHUT
        self._turn = 0
        self.port = None

    # The test's side

    def open(self, port, *, last=False):
        """Lets workers ask a server; at the last one they end what they have begun, and leave."""
        with self._changed:
            self._turn += 1
            self.port, self._state = port, LAST if last else OPEN
            self._changed.notify_all()

    def shut(self, timeout_s=60):
        """The server is gone, or to be left alone: returns when all workers wait."""
        with self._changed:
            self._state = SHUT
            done = self._changed.wait_for(
                lambda: self._waiting + self._left == self._workers, timeout_s
            )
        if not done:
            raise TimeoutError("workers do not come to rest")

    def abandon(self):
        """No server comes any more: workers end where they are."""
        with self._changed:
            self._state = ABANDONED
            self._changed.notify_all()

    # The workers' side

    @property
    def closing(self):
        """Whether nothing new is to be begun."""
        return self._state == LAST

    @property
    def shutting(self):
        """Whether workers are to come to rest."""
        if self._state == ABANDONED:
            raise Abandoned
        return self._state == SHUT

    def leave(self):
        """A worker is done for good."""
        with self._changed:
            self._left += 1
            self._changed.notify_all()

    def wait(self, after):
        """Waits for a server later than turn `after`; its turn and port."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._state == ABANDONED or (self._state != SHUT and self._turn > after)
            )
            self._waiting -= 1
            if self._state == ABANDONED:
                raise Abandoned
            return self._turn, self.port


def rest():
    """A moment between two polls."""
    time.sleep(0.005)
