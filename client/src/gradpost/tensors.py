"""From arrays to the parts of a body, and from a body to arrays."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradpost.errors import TransportError
from gradpost.protocol.dtypes import DTYPES, NUMPY, from_bf16, name_of
from gradpost.protocol.tensors import HeaderError, build_header, header_length, parse_header
from gradpost.transport import Answer, Part

Array = NDArray[Any]
Tensors = Mapping[str, Any]

_SMALL = 1 << 16
_SLICE = 1 << 20  # urllib3 reads fastest into slices of this size


class bf16:  # in lower case, as NumPy names its scalar types
    """Marks an array of uint16 as the bits of bfloat16 numbers, which NumPy does not have.

    Args:
        bits: uint16 of the tensor's shape; not copied.

    Raises:
        TypeError: Of another dtype.
    """

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        if np.asarray(bits).dtype != np.uint16:
            raise TypeError(
                f"bfloat16 bits are uint16, not {np.asarray(bits).dtype}; float32 is rounded by "
                "gradpost.protocol.dtypes.to_bf16."
            )
        self.bits = np.asarray(bits)


class Received(NamedTuple):
    """The tensors of an answer (views of one buffer) and its metadata."""

    tensors: dict[str, Array]
    metadata: dict[str, str]
    buffer: Array


def encode(
    tensors: Tensors,
    master: str,
    metadata: Mapping[str, str] | None = None,
    *,
    one_dtype: bool = False,
) -> list[Part]:
    """The parts of a safetensors body; contiguous arrays are not copied.

    Args:
        tensors: Anything NumPy takes. Floats as wide as the session's dtype or narrower go as they
            are (bfloat16 by its name, or as `bf16`); float64 for an F32 session, Python numbers and
            integers are converted to the session's dtype.
        master: The session's dtype, F32 or F64.
        metadata: For the header.
        one_dtype: A gradient has one dtype: where they differ, all go in the session's.

    Raises:
        TypeError: Not real numbers, or uint16 that is not marked by `bf16`.
    """
    arrays = {name: _wire(name, value, master) for name, value in tensors.items()}
    if one_dtype and len({dtype for dtype, _ in arrays.values()}) > 1:
        arrays = {name: (master, _cast(tensors[name], master)) for name in arrays}
    rows = tuple((name, dtype, array.shape) for name, (dtype, array) in arrays.items())
    header = _plain_header(rows) if metadata is None else build_header(rows, metadata)
    return [header, *(_bytes(array) for _, array in arrays.values() if array.size)]


@lru_cache(maxsize=32)
def _plain_header(rows: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """A header without metadata: a trainer sends the same one with each push."""
    return build_header(rows)


def _wire(name: str, value: Any, master: str) -> tuple[str, Array]:
    """The wire dtype and a C-contiguous array of one tensor."""
    if isinstance(value, bf16):
        return "BF16", np.ascontiguousarray(value.bits, NUMPY["BF16"]).reshape(value.bits.shape)
    array = np.asarray(value)
    if array.dtype == np.uint16:  # what a BF16 pull gives: as integers they would ruin the model
        raise TypeError(
            f"{name!r} is uint16: say gradpost.bf16(array) if these are the bits of bfloat16 "
            "numbers, or array.astype(numpy.float32) if they are integers."
        )
    try:
        dtype = name_of(array.dtype)
    except ValueError:
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name!r} holds {array.dtype}, no tensor of real numbers.") from None
        return master, _cast(array, master)
    if DTYPES[dtype] > DTYPES[master]:
        return master, _cast(array, master)
    little = array.dtype if dtype == "BF16" else NUMPY[dtype]  # the array may be big-endian
    shape = array.shape  # ascontiguousarray makes a scalar one-dimensional
    return dtype, np.ascontiguousarray(array, little).reshape(shape)


def _cast(value: Any, master: str) -> Array:
    array = from_bf16(value.bits) if isinstance(value, bf16) else np.asarray(value)
    return np.ascontiguousarray(array, NUMPY[master]).reshape(array.shape)


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def decode(answer: Answer, into: Array | None) -> Received:
    """Reads a safetensors answer; the data goes straight into `into`, or into a new buffer.

    Args:
        answer: Positioned at the start of its body.
        into: uint8 buffer to reuse if it is large enough; its former contents are lost.

    Raises:
        TransportError: The body broke off, or is no safetensors body.
    """
    length = _length(answer)
    whole = b""
    if length is not None and length <= _SMALL:
        whole = read_exactly(answer, length)  # each read of urllib3 costs more than a copy
    first = whole[:8] or read_exactly(answer, 8)
    try:
        size = header_length(first)
        header = parse_header(whole[8 : 8 + size] or read_exactly(answer, size), length)
    except HeaderError as error:
        raise TransportError(f"The answer is broken: {error}") from error
    if into is None or into.size < header.data_bytes:
        into = _room(header.data_bytes)
    if whole:
        into[: header.data_bytes] = np.frombuffer(whole, np.uint8)[8 + size :]
    else:
        _fill(answer, into[: header.data_bytes].data)
        if answer.readinto(memoryview(bytearray(1))):
            raise TransportError("The answer goes on after its last tensor.")
    tensors = {
        t.name: _view(into[t.begin : t.end], t.dtype).reshape(t.shape) for t in header.tensors
    }
    return Received(tensors, dict(header.metadata), into)


def _room(size: int) -> Array:
    """A buffer of the size that an answer claims."""
    try:
        return np.empty(size, np.uint8)
    except (MemoryError, ValueError) as error:
        raise TransportError(f"The answer claims {size} bytes; no memory for that.") from error


def _length(answer: Answer) -> int | None:
    text = answer.headers.get("Content-Length") or ""
    return int(text) if text.isdecimal() and len(text) < 20 else None


def read_exactly(answer: Answer, size: int) -> bytes:
    """The next `size` bytes of an answer.

    Raises:
        TransportError: It broke off.
    """
    out = bytearray(size)
    _fill(answer, memoryview(out))
    return bytes(out)


def _view(data: Array, dtype: str) -> Array:
    if data.ctypes.data % DTYPES[dtype]:
        data = data.copy()
    return data.view(NUMPY[dtype])


def _fill(answer: Answer, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = answer.readinto(view[done : done + _SLICE])
        if not got:
            raise TransportError(f"The answer broke off after {done} of {len(view)} bytes.")
        done += got
