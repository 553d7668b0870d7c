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


class Rows:
    """Marks some rows of a tensor's gradient, as an embedding's; elsewhere it is 0.

    Args:
        idx: Row numbers along the first dimension, in any order; the rows of one that is given
            several times are summed.
        values: One row for each, of the tensor's shape; as any other tensor.

    Raises:
        TypeError: `idx` is no list of whole numbers.
        ValueError: There is not one row for each index.
    """

    def __init__(self, idx: Any, values: Any) -> None:
        found = np.asarray(idx)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise TypeError("idx is a list of row numbers, or a one-dimensional array of integers.")
        self.idx: Array = found.astype(np.int64)
        self.values = values
        shape = np.asarray(getattr(values, "bits", values)).shape
        if shape[:1] != self.idx.shape:
            raise ValueError(f"{self.idx.size} indices, and values of shape {shape}.")


class Wire(NamedTuple):
    """A tensor in a small form, as it goes over the wire.

    Attributes:
        parts: (suffix of the name, wire dtype, array) of each.
        metadata: What the header says of the form.
    """

    parts: tuple[tuple[str, str, Array], ...]
    metadata: Mapping[str, str] = {}


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
            integers are converted to the session's dtype. Of a gradient also `Rows` and `Wire`.
        master: The session's dtype, F32 or F64.
        metadata: For the header.
        one_dtype: A gradient has one dtype: where they differ, all go in the session's.

    Raises:
        TypeError: Not real numbers, or uint16 that is not marked by `bf16`.
    """
    pieces: list[_Piece] = []
    facts = dict(metadata or {})
    small = False
    for name, value in tensors.items():
        if isinstance(value, Rows | Wire):
            small = True
            pieces += _small_pieces(name, value, master)
            facts.update(getattr(value, "metadata", {}))
        else:
            pieces.append(_Piece(name, *_wire(name, value, master)))
    if one_dtype and len({piece.dtype for piece in pieces if not piece.fixed}) > 1:
        pieces = [piece if piece.fixed else _widened(piece, master) for piece in pieces]
    if small:  # the widest first: then all of them are aligned
        pieces.sort(key=lambda piece: -piece.array.itemsize)
    rows = tuple((piece.name, piece.dtype, piece.array.shape) for piece in pieces)
    header = build_header(rows, facts) if metadata else _header(rows, tuple(facts.items()))
    return [header, *(_bytes(piece.array) for piece in pieces if piece.array.size)]


class _Piece(NamedTuple):
    """One entry of a body; `fixed`: of the dtype that its form has, whatever the others have."""

    name: str
    dtype: str
    array: Array
    fixed: bool = False


def _small_pieces(name: str, value: Rows | Wire, master: str) -> list[_Piece]:
    if isinstance(value, Rows):
        idx = _Piece(f"{name}#idx", "I64", np.ascontiguousarray(value.idx, "<i8"), True)
        return [idx, _Piece(f"{name}#rows", *_wire(name, value.values, master))]
    return [
        _Piece(name + suffix, dtype, array, dtype not in DTYPES or suffix == "#scale")
        for suffix, dtype, array in value.parts
    ]


def _widened(piece: _Piece, master: str) -> _Piece:
    value = bf16(piece.array) if piece.array.dtype == np.uint16 else piece.array
    return piece._replace(dtype=master, array=_cast(value, master))


@lru_cache(maxsize=32)
def _header(
    rows: tuple[tuple[str, str, tuple[int, ...]], ...], facts: tuple[tuple[str, str], ...]
) -> bytes:
    """A trainer sends the same header with each push."""
    return build_header(rows, dict(facts))


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
