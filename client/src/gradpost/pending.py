"""What a call leaves open: attempts that may have acted, and pushes that no answer settled."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from gradpost.answers import Version
from gradpost.errors import CertificateError, DeadlineExceeded, InFlight, RefusedError
from gradpost.transport import Part

T = TypeVar("T")


def _nothing(found: Any) -> None:
    """Of a push in which nothing was lost."""


class Push(NamedTuple):
    """A push as it goes over the wire: worker, sequence and control values are in the path.

    Attributes:
        sequence: Its number.
        path: With the query.
        body: The gradient; none for a pass.
        base: The version that it was computed from.
        settled: Called once, with what its call returned, or with None if it was not applied.
    """

    sequence: int
    path: str
    body: Sequence[Part]
    base: Version
    settled: Callable[[Any], None] = _nothing


class Tries(Generic[T]):
    """The attempts of one call; `open` once one of them may have acted and nobody said so.

    Args:
        attempt: As `Retrier.run` takes it.
    """

    def __init__(self, attempt: Callable[[float], T]) -> None:
        self._attempt = attempt
        self._begun = False
        self.open = False

    def __call__(self, timeout_s: float) -> T:
        """One attempt."""
        self._begun = True
        try:
            return self._attempt(timeout_s)
        except CertificateError:  # before anything was sent
            raise
        except RefusedError as error:
            self.open = self.open or error.status >= 500 or isinstance(error, InFlight)
            raise
        except BaseException:
            self.open = True
            raise

    def unsettled(self, error: BaseException) -> bool:
        """Whether a push that ends in this error has to be asked for again.

        That is so whenever an attempt may have been applied, and for simplicity's sake after every
        deadline and interrupt: the latter may come when the answer has been read.
        """
        if isinstance(error, RefusedError):
            return self.open and not error.settles
        if isinstance(error, CertificateError):
            return self.open
        return self._begun


class Unsettled:
    """Pushes that may have been applied, in the order in which their calls ended."""

    def __init__(self) -> None:
        self._kept: dict[int, Push] = {}
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def oldest(self) -> Push | None:
        """The one to settle next."""
        with self._lock:
            return next(iter(self._kept.values()), None)

    def keep(self, push: Push) -> None:
        """Keeps a copy: the trainer may use the memory of its gradients again."""
        copy = push._replace(body=[b"".join(push.body)] if push.body else [])
        with self._lock:
            self._kept[push.sequence] = copy

    def settle(self, send: Callable[[Push], T], patience_s: float) -> T | None:
        """Sends the oldest one; it is kept until an answer settles it.

        Args:
            send: Sends until there is an answer.
            patience_s: Seconds to wait for a thread that settles one at this moment.

        Returns:
            What `send` returns; None if nothing is kept.

        Raises:
            RefusedError: As `send` raises it; if it settles the push, that was not applied.
            DeadlineExceeded: Not in time; it stays kept.
        """
        if not self._turn.acquire(timeout=min(max(patience_s, 0.0), threading.TIMEOUT_MAX)):
            raise DeadlineExceeded("Another thread is settling a push of this session.")
        try:
            push = self.oldest
            if push is None:
                return None
            try:
                found = send(push)
            except RefusedError as error:
                error.add_note(f"This is about push {push.sequence}, which was pending.")
                if error.settles:
                    self._drop(push)
                    push.settled(None)
                raise
            self._drop(push)
            push.settled(found)
            return found
        finally:
            self._turn.release()

    def _drop(self, push: Push) -> None:
        with self._lock:
            self._kept.pop(push.sequence, None)
