"""A reader takes a body as it streams and puts the bytes where they belong.

The chunks come in any size; a reader copies each to its place by slices of memoryviews and
allocates nothing of the size of the body (the header of a safetensors body, at most 1 MiB, is
gathered first). Everything that the first bytes can tell is checked before a destination is
asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradpost.protocol.dtypes import DTYPES
from service.errors import InvalidTensors, TensorMismatch

Bytes = NDArray[np.uint8]
Flat = NDArray[Any]
Chunk = bytes | bytearray | memoryview
Acquire = Callable[[str], Bytes]
"""Given a wire dtype, returns uint8[layout.size * itemsize], C-contiguous: the destination."""
Allocate = Callable[[int], Bytes]
"""Given a number of bytes, returns uint8[that many], C-contiguous."""

MAX_DIMS = 32
"""Dimensions of a tensor: as many as older NumPy can hold, and well inside our depth of JSON."""
SHOWN = 20
"""Names that a refusal lists before it says how many more there are."""


class EntryLike(Protocol):
    """One tensor of a layout; `offset` and `size` count elements of the flat vector."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        ...

    @property
    def dtype(self) -> str:
        """The wire dtype it was uploaded in."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; () is a scalar."""
        ...

    @property
    def offset(self) -> int:
        """Where it begins."""
        ...

    @property
    def size(self) -> int:
        """How many elements it has."""
        ...


class LayoutLike(Protocol):
    """What the wire needs of a session's layout (service/sessions/layout.py has it)."""

    @property
    def entries(self) -> tuple[EntryLike, ...]:
        """The tensors in layout order, packed."""
        ...

    @property
    def index(self) -> Mapping[str, EntryLike]:
        """The same by name."""
        ...

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        ...


class Reader(Protocol):
    """Feeds on chunks of one body; `finish` says that the body has ended."""

    @property
    def dtype(self) -> str | None:
        """The wire dtype of the tensors, once known."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The body's own metadata; empty where the form has none."""
        ...

    def feed(self, chunk: Chunk) -> None:
        """Takes the next bytes.

        Raises:
            ServiceError: The body is broken, does not fit, or is longer than it said.
        """
        ...

    def finish(self) -> None:
        """Takes the end of the body.

        Raises:
            InvalidTensors: Bytes are missing.
        """
        ...


class Scatter:
    """Copies a stream of bytes to stretches of one buffer, in the order of arrival.

    Args:
        target: uint8, C-contiguous; written in place.
        stretches: (begin, end) in bytes of the target, none of them empty.
    """

    __slots__ = ("_at", "_end", "_next", "_stretches", "_target", "left")

    def __init__(self, target: Bytes, stretches: Sequence[tuple[int, int]]) -> None:
        self._target = target.data
        self._stretches = stretches
        self._next = self._at = self._end = 0
        self.left = sum(end - begin for begin, end in stretches)
        """Bytes still to come."""

    def feed(self, chunk: memoryview) -> None:
        """Copies the chunk onward; the caller has checked that it is no longer than `left`."""
        done, size = 0, len(chunk)
        self.left -= size
        while done < size:
            if self._at == self._end:
                self._at, self._end = self._stretches[self._next]
                self._next += 1
            n = min(self._end - self._at, size - done)
            self._target[self._at : self._at + n] = chunk[done : done + n]
            self._at += n
            done += n


def overlong(length: int) -> InvalidTensors:
    """The refusal of a body that goes on after its end."""
    return InvalidTensors(
        f"The body goes on after the {length} bytes it was to have; send exactly what "
        "Content-Length says."
    )


def truncated(got: int, length: int) -> InvalidTensors:
    """The refusal of a body that ends too early."""
    return InvalidTensors(
        f"The body ended after {got} of {length} bytes; send all of it.",
        received=got,
        expected=length,
    )


def check_width(dtype: str, master: str) -> None:
    """Refuses a gradient wider than the session's master dtype.

    Raises:
        TensorMismatch: `dtype` holds more than `master` does; converting it is the sender's choice.
    """
    if DTYPES[dtype] > DTYPES[master]:
        raise TensorMismatch(
            f"The gradient is {dtype} and the session's dtype is {master}; send it as {master} or "
            "narrower, or create the session with dtype F64.",
            dtype=dtype,
            session_dtype=master,
        )


def listed(names: Sequence[str]) -> str:
    """Names as they stand in a message: the first few, each cut, and how many more there are."""
    shown = ", ".join(ascii(name[:80]) for name in names[:SHOWN])
    more = len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def clipped(names: Sequence[str]) -> list[str]:
    """Names as they stand in the context of a refusal."""
    return [name[:200] for name in names[:SHOWN]]
