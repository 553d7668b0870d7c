"""The outer loop of trainers that take many local steps between two pushes."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from gradpost.answers import Buffer, Params
from gradpost.errors import EpochChanged, MovedOn
from gradpost.session import Session
from gradpost.summary import Summary
from gradpost.tensors import Tensors
from gradpost.transport import Transport


def opened(
    outer: Session | str | Transport, id: str | None, params: Tensors, options: Mapping[str, Any]
) -> tuple[Session, bool]:
    """The session of an outer loop, and whether it was made for it.

    Raises:
        TypeError: A session and how to make one.
    """
    if not isinstance(outer, Session):
        return Session.create(outer, id, params=params, push="delta", **options), True
    if id is not None or options:
        given = ", ".join([*(["id"] if id is not None else []), *options])
        raise TypeError(f"A session was given, so {given} can't be: its creation says that.")
    return outer, False


class OuterLoop(ABC):
    """Counts local steps, and after each `every` of them lets the server apply what they changed.

    That is delta = end - start, of the parameters since the last time. The server takes
    g = -delta, so that a rule that subtracts its step moves the model towards end. Then the new
    outer parameters are written into the model, and it begins there again.

    When the server refuses a delta because the model moved on, it is dropped: the outer parameters
    are pulled, `dropped` is raised, and the first time there is a warning. After any other error
    the next call settles what is pending, and begins from the newest outer parameters.

    Attributes:
        session: On the server.
        every: Local steps between two pushes.
        weight: Of the deltas in a round of sync mode; 1 where None. May be changed at any time.
        steps: Local steps since the last push.
        dropped: Deltas that were refused because the model had moved on.
        summary: What the last push did; None before the first.

    Args:
        session: Whose pushes are deltas.
        owned: Whether `close` closes it.
        every: As above.
        weight: As above.
        on_refused: "drop", or "raise": the refusal is raised.
        deadline_s: Seconds for a push; as the session's policy says where None. A round may last
            as long as its timeout, so give it more than that.

    Raises:
        ValueError: An option, or the pushes of the session are gradients.
    """

    def __init__(
        self,
        session: Session,
        *,
        owned: bool,
        every: int,
        weight: float | None,
        on_refused: str,
        deadline_s: float | None,
    ) -> None:
        check(every, on_refused)
        if session.takes != "delta":
            session.info()  # it may never have asked
        if session.takes != "delta":
            raise ValueError(
                f"Session {session.id!r} takes gradients; local steps push what they changed, so "
                'create it with push="delta".'
            )
        if weight is not None and session.mode != "sync":
            raise ValueError(f"weight is of sync mode, and session {session.id!r} is not in it.")
        self.session = session
        self.every = every
        self.weight = weight
        self.steps = 0
        self.dropped = 0
        self.summary: Summary | None = None
        self._owned = owned
        self._on_refused = on_refused
        self._deadline_s = deadline_s
        self._buffer = Buffer()
        self._start: Params = {}
        self._whole = True  # `_start` is where the model began, not what a failed push left of it

    def count(self) -> Summary | None:
        """Counts one local step, and synchronises when it is the last of `every`.

        Returns:
            What the push did; None if there was none, or its delta was dropped.

        Raises:
            GradpostError: As `sync`.
        """
        if not self._whole:
            return self._resume()
        self.steps += 1
        return self.sync() if self.steps >= self.every else None

    def sync(self) -> Summary | None:
        """Pushes what the local steps changed, and goes on from the new outer parameters.

        Without a local step since the last time it only pulls, and in sync mode passes the round.

        Returns:
            What the push did; None if there was none, or its delta was dropped.

        Raises:
            DeadlineExceeded: No answer in time. The delta is kept: the next call settles it.
            RefusedError: The server refuses, but see `on_refused`.
        """
        if not self._whole:
            return self._resume()
        passes, sync = not self.steps, self.session.mode == "sync"
        if passes and not sync:
            self.pull()
            return None
        self._whole = False
        try:
            if passes:
                summary = self.session.skip_round(deadline_s=self._deadline_s)
            else:
                summary = self.session.push(
                    self._changes(),
                    weight=self.weight if sync else None,
                    deadline_s=self._deadline_s,
                )
        except MovedOn as error:
            self._drop(error)
            self.pull()
            return None
        self.summary = summary
        try:
            self._receive(min_version=summary.at)
        except EpochChanged:  # by an upload since: what is there now came after all the same
            self._receive()
        return summary

    def pull(self) -> None:
        """Begins anew from the newest outer parameters; what local steps changed is lost."""
        self._receive()

    def close(self) -> None:
        """Closes the session object, if it was made here; what local steps changed is lost."""
        if self._owned:
            self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the local steps began and how many there were, to go on after a restart.

        To be saved with the model as it is, and with its optimizer.
        """
        if not self._whole:
            self._resume()
        return {
            "start": {name: value.copy() for name, value in self._start.items()},
            "version": list(self.session.version or ()),
            "incarnation": self.session.incarnation,
            "steps": self.steps,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a `state_dict` was made; load the model of that moment too.

        If the server's model has moved on too far since, the next delta is dropped, as ever.

        Raises:
            ValueError: It is of another model.
        """
        start = state["start"]
        if {name: value.shape for name, value in start.items()} != {
            name: value.shape for name, value in self._start.items()
        }:
            raise ValueError("The state is that of another model: its tensors are others.")
        self._start = {name: value.copy() for name, value in start.items()}
        self._whole = True
        epoch, version = state["version"]
        self.session.count_from((int(epoch), int(version)), state["incarnation"])
        self.steps = int(state["steps"])
        self.dropped = int(state["dropped"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _dtype(self) -> str | None:
        """In which the outer parameters are asked for; None: the session's."""
        return None

    @abstractmethod
    def _changes(self) -> Tensors:
        """The delta of all local steps; `_start` may be overwritten by it."""

    @abstractmethod
    def _begin(self, params: Params) -> Params:
        """Writes outer parameters into the model, and returns what it has now, to subtract."""

    def _receive(self, min_version: tuple[int, int] | None = None) -> None:
        self._whole = False
        self._start = self._begin(
            self.session.pull(into=self._buffer, dtype=self._dtype, min_version=min_version)
        )
        self._whole = True
        self.steps = 0

    def _resume(self) -> Summary | None:
        """After a failure: learns what became of the delta, and begins anew."""
        found = None
        try:
            while self.session.pending is not None:
                found = self.session.settle(self._deadline_s)
        except MovedOn as error:
            self._drop(error)
        self.summary = found or self.summary
        self.pull()
        return found

    def _drop(self, error: MovedOn) -> None:
        if self._on_refused == "raise":
            raise error
        self.dropped += 1
        if self.dropped == 1:
            warnings.warn(
                f"The server dropped what {self.every} local steps changed, for the model had "
                f"moved on ({error.detail}) The new parameters were pulled. Further ones are only "
                "counted, in `dropped`.",
                RuntimeWarning,
                stacklevel=5,  # where the training loop calls step
            )


def check(every: int, on_refused: str) -> None:
    """Refuses options before a session is made with them.

    Raises:
        ValueError: One of them.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is a whole number from 1, not {every!r}.")
    if on_refused not in ("drop", "raise"):
        raise ValueError(f"on_refused is drop or raise, not {on_refused!r}.")
