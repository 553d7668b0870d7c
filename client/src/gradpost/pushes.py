"""Pushes of one worker: numbered, sent once, and settled when an answer was lost."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from gradpost import compress as compression
from gradpost.answers import Version, summary_of
from gradpost.calls import Calls, path_of, read_json
from gradpost.errors import DeadlineExceeded, GradpostError, NotPulled, RoundUnknown
from gradpost.pending import Push, Tries, Unsettled
from gradpost.protocol import SAFETENSORS
from gradpost.protocol.versions import format_version
from gradpost.retry import Retrier
from gradpost.rounds import Contribution, Rounds, patience_s, preferring
from gradpost.standing import Standing
from gradpost.summary import Summary
from gradpost.tensors import Tensors
from gradpost.transport import Answer

T = TypeVar("T")
Overrides = Mapping[str, Mapping[str, Any]]
Compress = str | compression.Codec | compression.ErrorFeedback | None

BINARY = {"Content-Type": SAFETENSORS}


class Terms(NamedTuple):
    """What a push states beside its gradient; `Session.push` documents each."""

    loss: float | None = None
    base_version: Version | None = None
    overrides: Overrides | None = None
    grad_scale: float | None = None
    weight: float | None = None

    @property
    def passes(self) -> bool:
        """Whether it sends no gradient."""
        return self.weight == 0

    def check(self) -> None:
        """Refuses what is no version, before anything is encoded.

        Raises:
            TypeError: It is not (epoch, version).
        """
        base = self.base_version
        if base is not None and not _is_version(base):
            raise TypeError(f"base_version is (epoch, version), as session.version; not {base!r}.")

    def query(self) -> list[tuple[str, str]]:
        """The control values, as a query carries them."""
        found = []
        if self.overrides:  # written shortly: a head has a limit
            text = json.dumps(self.overrides, allow_nan=False, separators=(",", ":"))
            found.append(("overrides", text))
        if self.grad_scale is not None and not self.passes:
            found.append(("grad_scale", repr(float(self.grad_scale))))
        if self.weight is not None:
            found.append(("weight", repr(float(self.weight))))
        return found


@dataclass(frozen=True)
class Reading(Generic[T]):
    """In what form the answer to a push is wanted.

    Attributes:
        read: Reads an answer of that form.
        lift: Makes the same of a summary that came another way.
        headers: That ask for it.
        asked: What the query asks for it, beginning with &.
    """

    read: Callable[[Answer], T]
    lift: Callable[[Summary], T]
    headers: Mapping[str, str] = field(default_factory=dict)
    asked: str = ""


PLAIN: Reading[Summary] = Reading(summary_of, lambda summary: summary)
"""The summary alone."""


class Pushes:
    """The pushes of one worker to its session.

    Args:
        id: Of the session.
        standing: Where the worker stands.
        calls: To the server.
        retrier: The times.
        run: Runs attempts while the session object is open: `run(attempt, end=…)`.
        compress: What makes gradients smaller; None: nothing does.
    """

    def __init__(
        self,
        id: str,
        standing: Standing,
        calls: Calls,
        retrier: Retrier,
        run: Callable[..., Any],
        compress: Compress,
    ) -> None:
        self._id = id
        self._standing = standing
        self._calls = calls
        self._retrier = retrier
        self._run = run
        self.compress = compression.chosen(compress)
        self._unsettled = Unsettled()
        self.rounds = Rounds(id, calls, retrier, run)

    @property
    def pending(self) -> int | None:
        """Sequence of the oldest push that no answer settled."""
        push = self._unsettled.oldest
        return None if push is None else push.sequence

    def send(self, grads: Tensors, terms: Terms, form: Reading[T], end: float) -> T:
        """Sends a push after those that are pending, and waits until it is applied.

        It is kept if that ends with its fate unknown.
        """
        return self._send(grads, terms, form, end, wait=True)[1]

    def post(self, grads: Tensors, terms: Terms, end: float) -> Contribution:
        """As `send`, but waits for no other worker."""

        def read(answer: Answer) -> Summary | Contribution:
            return summary_of(answer)

        form: Reading[Summary | Contribution] = Reading(read, lambda summary: summary)
        push, found = self._send(grads, terms, form, end, wait=False)
        if isinstance(found, Contribution):
            return found
        blank = Contribution(None, 0, 0, 0, self._standing.worker, push.sequence, push.base)
        return blank.closed(found)

    def settle(self, end: float) -> Summary | None:
        """Sends the oldest pending push again, and waits until an answer settles it."""

        def again(push: Push) -> Summary:
            attempt = self._attempt(push, PLAIN, wait=True)
            found: Summary | Contribution = self._run(attempt, end=end)
            return self._fate(found, attempt, PLAIN, end)

        return self._unsettled.settle(again, self._retrier.left_s(end))

    def _send(
        self, grads: Tensors, terms: Terms, form: Reading[T], end: float, *, wait: bool
    ) -> tuple[Push, T]:
        if self._unsettled:
            self._settle_all(end)
        push = self._push_of(grads, terms)
        attempt = self._attempt(push, form, wait=wait)
        tries = Tries(attempt)
        try:
            found = self._run(tries, end=end)
            if wait and isinstance(found, Contribution):
                tries.open = True
                found = self._fate(found, attempt, form, end)
        except BaseException as error:  # an interrupt, too, may come after the server has acted
            if not tries.unsettled(error):
                push.settled(None)
            else:
                self._unsettled.keep(push)
                if isinstance(error, DeadlineExceeded):
                    error.keep(push.sequence)
                else:
                    error.add_note(f"Push {push.sequence} may have been applied; call settle().")
            raise
        push.settled(found)
        return push, found

    def _attempt(
        self, push: Push, form: Reading[T], *, wait: bool
    ) -> Callable[[float], T | Contribution]:
        """One attempt of a push; the same bytes each time."""

        def read(answer: Answer) -> T | Contribution:
            if answer.status != 202:
                return form.read(answer)
            return Contribution.of(
                read_json(answer), self._standing.worker, push.sequence, push.base
            )

        def attempt(timeout_s: float) -> T | Contribution:
            headers = {**(BINARY if push.body else {}), **form.headers}
            if self._standing.waits:
                headers |= preferring(patience_s(timeout_s) if wait else 0.0)
            return self._calls.send(
                "POST", push.path + form.asked, read, timeout_s, headers=headers, body=push.body
            )

        return attempt

    def _fate(
        self,
        found: T | Contribution,
        attempt: Callable[[float], T | Contribution],
        form: Reading[T],
        end: float,
    ) -> T:
        """Waits for the round of a push that was received."""
        while isinstance(found, Contribution):
            try:
                return form.lift(self.rounds.wait(found, end))
            except RoundUnknown as error:  # the round can't tell, and a repeat of the push can
                if self._retrier.left_s(end) <= 0:
                    raise DeadlineExceeded(str(error), error) from error
            self._retrier.pause(0, end)
            found = self._run(attempt, end=end)
        return found

    def _settle_all(self, end: float) -> None:
        """Makes way for the next push."""
        try:
            while self._unsettled:
                self.settle(end)
            if self._retrier.left_s(end) <= 0:
                raise DeadlineExceeded("Settling the push before this one took all the time.")
        except GradpostError as error:
            error.add_note("The gradient of this call was not sent.")
            raise

    def _push_of(self, grads: Tensors, terms: Terms) -> Push:
        terms.check()
        control = terms.query()
        given: Tensors = {} if terms.passes else grads
        body, settled = compression.encoded(self.compress, given, self._standing.master)
        if terms.passes:
            body = []
        sequence, base = self._standing.following(terms.base_version)
        if base is None:
            settled(None)
            raise NotPulled(
                "Pull before the first push: it says which parameters a gradient was computed "
                "from (or pass base_version)."
            )
        query = [
            ("worker", self._standing.worker),
            ("sequence", str(sequence)),
            ("base_version", format_version(*base)),
            *control,
        ]
        if self._standing.incarnation is not None:
            query.append(("incarnation", self._standing.incarnation))
        loss = terms.loss
        if loss is not None and math.isfinite(loss):  # a history has no NaN; such a step may count
            query.append(("loss", repr(float(loss))))
        return Push(sequence, path_of(self._id, "steps", query=query), body, base, settled)


def _is_version(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value)
