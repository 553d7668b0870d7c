"""What the answers of a session hold."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradpost.calls import read_json
from gradpost.errors import TransportError
from gradpost.protocol import EPOCH, INCARNATION, SINCE, SUMMARY, VERSION
from gradpost.summary import Summary
from gradpost.tensors import Received, decode
from gradpost.transport import Answer

Params = dict[str, NDArray[Any]]
Version = tuple[int, int]
Form = tuple[str | None, tuple[str, ...] | None]
"""In which dtype parameters were asked for, and which of them; None: the session's, and all."""


class State(NamedTuple):
    """The optimizer state: `<slot>/<tensor>` → array, and how often each tensor was updated.

    `scalars` are the numbers that some rules keep beside a tensor's arrays, for each tensor that
    was updated. `epoch` and `version` say when it was read: parameters of another version do not
    belong to it.
    """

    tensors: Params
    counts: dict[str, int]
    step: int
    rule: str
    scalars: Mapping[str, Mapping[str, float]] = {}
    epoch: int = 0
    version: int = 0


class Buffer:
    """Memory for pulled parameters, to be used again: pass it as `into`.

    Attributes:
        flat: The memory itself; None before the first answer.
        version: (epoch, version) of what it holds; None while it is being written.
        tensors: What it holds.
    """

    def __init__(self) -> None:
        self.flat: NDArray[np.uint8] | None = None
        self.version: Version | None = None
        self.tensors: Params = {}
        self._form: Form | None = None
        self._incarnation: str | None = None

    def holds(self, form: Form) -> Version | None:
        """The version that the server may add to; None if it must send everything."""
        return self.version if form == self._form and self._incarnation is not None else None

    def take(self, received: Received, said: Mapping[str, str], form: Form | None) -> None:
        """Takes note of an answer that was received into it, whole."""
        self.flat, self.tensors = received.buffer, received.tensors
        self._form, self._incarnation = form, said.get(INCARNATION)
        self.version = int(said[EPOCH]), int(said[VERSION])

    def merge(self, changed: Params, said: Mapping[str, str]) -> bool:
        """Puts the tensors that have changed in their places; False: they are not of this model."""
        mine = self.tensors
        if said.get(INCARNATION) != self._incarnation or not changed.keys() <= mine.keys():
            return False
        pairs = [(mine[name], array) for name, array in changed.items()]
        if any((old.shape, old.dtype) != (new.shape, new.dtype) for old, new in pairs):
            return False
        for old, new in pairs:
            np.copyto(old, new)
        self.version = int(said[EPOCH]), int(said[VERSION])
        return True


def summary_of(answer: Answer) -> Summary:
    """What a push did."""
    return Summary.of(read_json(answer))


_SAID = (EPOCH, VERSION, INCARNATION, SUMMARY, SINCE)


def state_of(answer: Answer) -> State:
    """The optimizer state."""
    received = decode(answer, None)
    facts = received.metadata
    counts = {str(name): int(count) for name, count in json.loads(facts["counts"]).items()}
    scalars = json.loads(facts.get("scalars", "{}"))
    where = int(facts["epoch"]), int(facts["version"])
    return State(received.tensors, counts, int(facts["step"]), facts["rule"], scalars, *where)


def tensors_of(
    answer: Answer, into: Buffer | None, form: Form | None = None
) -> tuple[Received, dict[str, str]]:
    """Tensors of an answer, and the headers that say what they are."""
    found = _said(answer)
    if into is not None:
        into.version = None  # if it breaks off, the memory holds a mixture
    received = decode(answer, None if into is None else into.flat)
    if into is not None:
        into.take(received, found, form)
    return received, found


def changes_of(answer: Answer, into: Buffer, form: Form) -> tuple[Params | None, dict[str, str]]:
    """As `tensors_of`, of an answer that may hold only what a buffer lacks.

    Returns:
        All that the buffer holds then; None if what came does not belong to it.
    """
    if answer.headers.get(SINCE) is None:
        received, found = tensors_of(answer, into, form)
        return received.tensors, found
    found = _said(answer)
    merged = into.merge(decode(answer, None).tensors, found)
    return dict(into.tensors) if merged else None, found


def _said(answer: Answer) -> dict[str, str]:
    said = {name: answer.headers.get(name) for name in _SAID}
    if said[EPOCH] is None or said[VERSION] is None:
        raise TransportError("The answer names no version; is this a gradpost server?")
    return {name: text for name, text in said.items() if text is not None}
