"""A worker's place among those of its session."""

import logging
import os
import threading
import weakref

from gradpost.calls import Calls, path_of
from gradpost.errors import GradpostError, SessionGone, WorkerRetired
from gradpost.retry import Retrier

LOG = logging.getLogger("gradpost")

LEAVE_S = 2.0
"""How long leaving is tried: others wait for the lease then, and this process for nothing."""
_RENEW_S = 10.0
"""How long one renewal may wait for the network."""


class Membership:
    """A worker's place, kept by a thread that renews its lease.

    The thread knows this object weakly, so that a session which nobody holds any more does not
    live on for its lease, and it is a daemon that the end of the interpreter wakes and nobody
    waits for. In a forked process there is no such thread, and no place either: it is the parent's
    to keep and to leave.

    Args:
        id: Of the session.
        worker: That joins it.
        calls: To the server.
        retrier: The times.
    """

    def __init__(self, id: str, worker: str, calls: Calls, retrier: Retrier) -> None:
        self._path = path_of(id, "workers", worker)
        self._worker = worker
        self._calls = calls
        self._retrier = retrier
        self._lease_s = 0.0
        self._warned = False
        self._joined = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake: weakref.finalize[[], Membership] | None = None
        _ALL.add(self)

    @property
    def joined(self) -> bool:
        """Whether there is a place to leave."""
        return self._joined

    def join(self) -> None:
        """Takes the place, or renews it, and keeps it from now on.

        Raises:
            WorkerRetired: The worker has left before, and its id is used up.
        """
        try:
            self._lease_s = self._retrier.run(self._put)
        except WorkerRetired as error:
            error.add_note(
                f"{self._worker!r} has left session for good; make another Session object, which "
                "has an id of its own."
            )
            raise
        with self._lock:
            self._joined = True
            if self._thread is not None and self._thread.is_alive():
                return
            stop = threading.Event()
            self._wake = weakref.finalize(self, stop.set)
            self._thread = threading.Thread(
                target=_keep,
                args=(weakref.ref(self), stop, self._lease_s / 3),
                name="gradpost-lease",
                daemon=True,
            )
            self._thread.start()

    def stop(self) -> None:
        """Ends the renewals; the place stays until its lease runs out."""
        with self._lock:
            thread, self._thread = self._thread, None
            if self._wake is not None:
                self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(LEAVE_S)

    def leave(self) -> None:
        """Gives the place up, if that can be done in short time; never raises a failure of it."""
        self.stop()
        with self._lock:
            joined, self._joined = self._joined, False
        if not joined:
            return
        try:
            self._retrier.run(self._delete, end=self._retrier.end(LEAVE_S))
        except GradpostError as error:
            LOG.info("%s could not leave and will be missed: %s", self._worker, error)

    def renew(self) -> bool:
        """One renewal; says whether there is a place to renew any more, and raises nothing."""
        try:
            self._lease_s = self._put(min(self._lease_s / 3, _RENEW_S))
        except (WorkerRetired, SessionGone) as error:
            LOG.warning("The lease of %s is renewed no more: %s", self._worker, error)
            self._joined = False
            return False
        except Exception as error:  # whatever it is, a thread is no place to raise it
            if not self._warned:
                LOG.warning("The lease of %s was not renewed: %s", self._worker, error)
            self._warned = True
        else:
            self._warned = False
        return True

    def forget(self) -> None:
        """Begins without place and thread, as a forked process does: locks may be held there."""
        self._lock = threading.Lock()
        self._thread = None
        self._joined = False
        if self._wake is not None:
            self._wake.detach()
        self._wake = None

    @property
    def pause_s(self) -> float:
        """Seconds to the next renewal: two may fail before the lease is over."""
        return self._lease_s / 3

    def _put(self, timeout_s: float) -> float:
        found = self._calls.document("PUT", self._path, timeout_s, needs=("lease_s",))
        return float(found["lease_s"])

    def _delete(self, timeout_s: float) -> None:
        self._calls.document("DELETE", self._path, timeout_s)


def _keep(place: "weakref.ref[Membership]", stop: threading.Event, pause_s: float) -> None:
    """Renews a lease until there is nobody left to do so for."""
    while not stop.wait(pause_s):
        member = place()
        if member is None or not member.renew():
            return
        pause_s = member.pause_s
        del member


_ALL: "weakref.WeakSet[Membership]" = weakref.WeakSet()


def _forked() -> None:
    for member in list(_ALL):
        member.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
