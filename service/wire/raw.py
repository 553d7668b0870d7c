"""`application/octet-stream; dtype=F32`: the flat vector alone, in layout order.

No names and no shapes: sender and receiver must mean the same layout, and the length must be exact.
"""

from collections.abc import Iterable, Mapping

from gradpost.protocol.dtypes import DTYPES
from service.errors import InvalidTensors, TensorMismatch
from service.wire.fit import select
from service.wire.reader import (
    Acquire,
    Chunk,
    Flat,
    LayoutLike,
    Scatter,
    check_width,
    overlong,
    truncated,
)
from service.wire.safetensors import views


class RawReader:
    """Reads one flat vector of a known length; asks for its destination at the first bytes."""

    def __init__(self, dtype: str, length: int, acquire: Acquire) -> None:
        self._dtype = dtype
        self._length = length
        self._acquire = acquire
        self._scatter: Scatter | None = None

    @property
    def dtype(self) -> str:
        """The wire dtype of the vector."""
        return self._dtype

    @property
    def metadata(self) -> Mapping[str, str]:
        """Empty: a raw body has none."""
        return {}

    def feed(self, chunk: Chunk) -> None:
        """Takes the next bytes.

        Raises:
            InvalidTensors: The body is too long.
        """
        view = memoryview(chunk)
        scatter = self._begun()
        if len(view) > scatter.left:
            raise overlong(self._length)
        scatter.feed(view)

    def finish(self) -> None:
        """Takes the end of the body.

        Raises:
            InvalidTensors: The body is too short.
        """
        left = self._begun().left
        if left:
            raise truncated(self._length - left, self._length)

    def _begun(self) -> Scatter:
        """The copier, made when it is first needed."""
        if self._scatter is None:
            stretches = [(0, self._length)] if self._length else []
            self._scatter = Scatter(self._acquire(self._dtype), stretches)
        return self._scatter


def raw_reader(
    layout: LayoutLike, dtype: str, master: str, length: int, acquire: Acquire
) -> RawReader:
    """A reader of one gradient in the raw form.

    Args:
        layout: The session's tensors.
        dtype: What the media type says.
        master: The session's dtype, "F32" or "F64"; the gradient may be no wider.
        length: Bytes of the body; must be exactly those of the vector.
        acquire: Called once, with the dtype, when the first bytes come.

    Raises:
        InvalidTensors: The length is not that of the vector.
        TensorMismatch: The dtype is wider than the session's, or the session has no tensors.
    """
    check_width(dtype, master)
    if not layout.entries:
        raise TensorMismatch("The session has no tensors; upload its parameters first.")
    expected = layout.size * DTYPES[dtype]
    if length != expected:
        raise InvalidTensors(
            f"A raw body in {dtype} has exactly {expected} bytes here ({layout.size} elements) and "
            f"this one has {length}; send the whole vector in layout order, or safetensors.",
            expected=expected,
            received=length,
        )
    return RawReader(dtype, length, acquire)


def parts(layout: LayoutLike, flat: Flat, names: Iterable[str] | None) -> list[memoryview]:
    """The named tensors (all: None) of a flat vector as views of bytes, in layout order, no copy.

    Raises:
        TensorMismatch: A name that the session does not have.
    """
    return views((flat, entry.offset, entry.size) for entry in select(layout, names))
