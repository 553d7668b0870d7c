"""What the answers of a session hold."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradpost.calls import read_json
from gradpost.errors import TransportError
from gradpost.protocol import EPOCH, INCARNATION, SUMMARY, VERSION
from gradpost.summary import Summary
from gradpost.tensors import Received, decode
from gradpost.transport import Answer

Params = dict[str, NDArray[Any]]
Version = tuple[int, int]


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
        version: (epoch, version) of what it holds.
    """

    def __init__(self) -> None:
        self.flat: NDArray[np.uint8] | None = None
        self.version: Version | None = None


def summary_of(answer: Answer) -> Summary:
    """What a push did."""
    return Summary.of(read_json(answer))


_SAID = (EPOCH, VERSION, INCARNATION, SUMMARY)


def state_of(answer: Answer) -> State:
    """The optimizer state."""
    received = decode(answer, None)
    facts = received.metadata
    counts = {str(name): int(count) for name, count in json.loads(facts["counts"]).items()}
    scalars = json.loads(facts.get("scalars", "{}"))
    where = int(facts["epoch"]), int(facts["version"])
    return State(received.tensors, counts, int(facts["step"]), facts["rule"], scalars, *where)


def tensors_of(answer: Answer, into: Buffer | None) -> tuple[Received, dict[str, str]]:
    """Tensors of an answer, and the headers that say what they are."""
    said = {name: answer.headers.get(name) for name in _SAID}
    if said[EPOCH] is None or said[VERSION] is None:
        raise TransportError("The answer names no version; is this a gradpost server?")
    received = decode(answer, None if into is None else into.flat)
    found = {name: text for name, text in said.items() if text is not None}
    if into is not None:
        into.flat = received.buffer
        into.version = int(found[EPOCH]), int(found[VERSION])
    return received, found
