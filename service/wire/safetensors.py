"""`application/vnd.safetensors`: read as it streams, written without a copy.

```
8 bytes   length of the header, little-endian
header    JSON {"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}, spaces to 8
data      the tensors, little-endian, C order, with no holes
```

The header codec is gradpost.protocol.tensors, shared with the client. Both sides of the wire and
every machine we run on are little-endian, so bytes are copied as they are.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gradpost.protocol.dtypes import DTYPES
from gradpost.protocol.tensors import (
    MAX_HEADER_BYTES,
    Header,
    HeaderError,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
)
from service.errors import InvalidTensors, TensorMismatch
from service.wire.fit import MayMiss, check_whole, none_missing, select
from service.wire.reader import (
    MAX_DIMS,
    SHOWN,
    Acquire,
    Allocate,
    Bytes,
    Chunk,
    Flat,
    LayoutLike,
    Scatter,
    check_width,
    clipped,
    listed,
    overlong,
    truncated,
)

Place = Callable[[Header], Scatter]

_PREFIX = 8
_REMEMBERED = 16_384
"""Bytes of a header up to which it is remembered: a trainer sends the same one with each push."""


@lru_cache(maxsize=256)
def _parsed(raw: bytes, length: int, allowed: Collection[str]) -> Header:
    """As `parse_header`; nobody may change what it returns."""
    return parse_header(raw, length, allowed)


class Piece(NamedTuple):
    """One tensor of an answer: `size` elements of a flat vector, beginning at `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    flat: Flat
    offset: int
    size: int


class SafetensorsReader:
    """Reads one safetensors body of a known length.

    Args:
        length: Bytes of the whole body (Content-Length).
        place: Called once with the header, as soon as it is whole and sound; says where the data
            goes, or refuses.
        header_bytes: The longest header that is let in.
        allowed: Dtypes that are let in.

    Raises:
        InvalidTensors: The length can not be that of a safetensors body.
    """

    def __init__(
        self,
        length: int,
        place: Place,
        header_bytes: int = MAX_HEADER_BYTES,
        allowed: tuple[str, ...] = tuple(DTYPES),
    ) -> None:
        if length < _PREFIX + 2:
            raise InvalidTensors(
                f"A body of {length} bytes can not be safetensors, which begins with 8 bytes of "
                "length and a JSON header; send the output of a safetensors library.",
            )
        self._length = length
        self._place = place
        self._header_limit = header_bytes
        self._allowed = allowed
        self._head = bytearray()
        self._needed = _PREFIX
        self._scatter: Scatter | None = None
        self._header: Header | None = None

    @property
    def header(self) -> Header:
        """The header; only after it has arrived."""
        assert self._header is not None, "the header has not arrived"
        return self._header

    @property
    def dtype(self) -> str | None:
        """The dtype of the first tensor (of all, in a gradient); None before the header."""
        if self._header is None or not self._header.tensors:
            return None
        return self._header.tensors[0].dtype

    @property
    def names(self) -> Mapping[str, TensorInfo]:
        """The tensors by name; only after the header has arrived."""
        return {tensor.name: tensor for tensor in self.header.tensors}

    @property
    def metadata(self) -> Mapping[str, str]:
        """`__metadata__`; empty before the header."""
        return {} if self._header is None else self._header.metadata

    def feed(self, chunk: Chunk) -> None:
        """Takes the next bytes.

        Raises:
            InvalidTensors: The header is broken, or the body too long.
            TensorMismatch: The tensors are not those of the session.
        """
        view = memoryview(chunk)
        if self._scatter is None:
            view = self._feed_head(view)
        if not view:
            return
        assert self._scatter is not None
        if len(view) > self._scatter.left:
            raise overlong(self._length)
        self._scatter.feed(view)

    def finish(self) -> None:
        """Takes the end of the body.

        Raises:
            InvalidTensors: The body is too short.
        """
        if self._scatter is None:
            raise truncated(len(self._head), self._length)
        if self._scatter.left:
            raise truncated(self._length - self._scatter.left, self._length)

    def _feed_head(self, view: memoryview) -> memoryview:
        """Gathers the header from the front of the stream; returns what lies behind it."""
        while True:
            take = self._needed - len(self._head)
            self._head += view[:take]
            view = view[take:]
            if len(self._head) < self._needed:
                return view
            if self._needed == _PREFIX:
                self._needed = _PREFIX + self._header_length()
                continue
            self._header = self._parse()
            self._scatter = self._place(self._header)
            self._head = bytearray()
            return view

    def _header_length(self) -> int:
        """The length of the header, checked against its limit and against the body's length."""
        try:
            length = header_length(bytes(self._head), self._header_limit)
        except HeaderError as error:
            raise InvalidTensors(str(error)) from None
        if _PREFIX + length > self._length:
            raise InvalidTensors(
                f"The header says that it has {length} bytes, but the whole body has "
                f"{self._length}; send the output of a safetensors library, whole."
            )
        return length

    def _parse(self) -> Header:
        """The parsed header."""
        raw = bytes(self._head[_PREFIX:])
        try:
            if len(raw) > _REMEMBERED:
                return parse_header(raw, self._length, self._allowed)
            return _parsed(raw, self._length, self._allowed)
        except HeaderError as error:
            raise InvalidTensors(str(error)) from None


def grads_reader(
    layout: LayoutLike,
    master: str,
    length: int,
    acquire: Acquire,
    may_miss: MayMiss = none_missing,
) -> SafetensorsReader:
    """A reader of one plain gradient; for any form see service.wire.compact.

    Args:
        layout: As `place_plain` says, and so the others.
        master: The session's dtype.
        length: Bytes of the body.
        acquire: Called once, with the dtype, when the header is found sound.
        may_miss: Tells which tensors may be left out.

    Raises:
        InvalidTensors: The body is too short to be safetensors.
    """
    return SafetensorsReader(
        length, lambda header: place_plain(layout, master, header, acquire, may_miss)
    )


def place_plain(
    layout: LayoutLike, master: str, header: Header, acquire: Acquire, may_miss: MayMiss
) -> Scatter:
    """Where the tensors of a gradient go: to layout order, whatever order they come in.

    Where tensors do not come, the vector is filled with zeros.

    Args:
        layout: The session's tensors; they come in their shapes, in one dtype.
        master: The session's dtype, "F32" or "F64"; the gradient may be no wider.
        header: Of the body.
        acquire: Called once, with the dtype, when the header is found sound.
        may_miss: Tells which tensors may be left out.

    Raises:
        TensorMismatch: The tensors are not those of the session.
        InvalidTensors: A tensor holds whole numbers.
    """
    dtype = one_dtype(header.tensors)
    came = {tensor.name: tensor.shape for tensor in header.tensors}
    check_whole(layout, came, may_miss=may_miss)
    check_width(dtype, master)
    target = acquire(dtype)
    if len(came) < len(layout.entries):
        _clear(layout, came, target, DTYPES[dtype])
    return Scatter(target, _stretches(layout, header.tensors, DTYPES[dtype]))


class TensorsReader(SafetensorsReader):
    """Reads any tensors (parameters, state) and keeps their bytes together, as they came."""

    def __init__(self, length: int, allocate: Allocate, header_bytes: int) -> None:
        super().__init__(length, self._keep, header_bytes)
        self._allocate = allocate
        self._data: Bytes = np.empty(0, np.uint8)

    @property
    def data(self) -> Bytes:
        """The data part: uint8[header.data_bytes]; offsets of the header count from its start."""
        return self._data

    def _keep(self, header: Header) -> Scatter:
        """Asks for a buffer as large as the data part."""
        deep = [tensor.name for tensor in header.tensors if len(tensor.shape) > MAX_DIMS]
        if deep:
            raise InvalidTensors(
                f"Tensors may have at most {MAX_DIMS} dimensions; reshape {listed(deep)}.",
                names=clipped(deep),
            )
        self._data = self._allocate(header.data_bytes)
        return Scatter(self._data, [(0, header.data_bytes)] if header.data_bytes else [])


def tensors_reader(
    length: int, allocate: Allocate, header_bytes: int = MAX_HEADER_BYTES
) -> TensorsReader:
    """A reader of parameters or state: any names and shapes, each tensor with its own dtype.

    Args:
        length: Bytes of the body.
        allocate: Called once, with the bytes of the data part, when the header is found sound.
        header_bytes: The longest header that is let in.

    Raises:
        InvalidTensors: The body is too short to be safetensors.
    """
    return TensorsReader(length, allocate, header_bytes)


def answer_parts(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> list[memoryview]:
    """A safetensors body as read-only views of bytes: the header, then the data in place.

    Neighbours in one flat vector come as one view; nothing is copied.
    """
    header = build_header(((p.name, p.dtype, p.shape) for p in pieces), metadata)
    return [memoryview(header), *views((p.flat, p.offset, p.size) for p in pieces)]


def parts(
    layout: LayoutLike,
    flat: Flat,
    dtype: str,
    names: Iterable[str] | None,
    metadata: Mapping[str, str],
) -> list[memoryview]:
    """The named tensors (all: None) of one flat vector as a safetensors body, in layout order.

    Args:
        layout: Where the tensors lie.
        flat: The vector, C-contiguous, in `dtype` (BF16 as uint16).
        dtype: Its wire dtype.
        names: Which tensors; order and repetition do not matter.
        metadata: For `__metadata__`.

    Raises:
        TensorMismatch: A name that the session does not have.
    """
    pieces = [Piece(e.name, dtype, e.shape, flat, e.offset, e.size) for e in select(layout, names)]
    return answer_parts(pieces, metadata)


def views(stretches: Iterable[tuple[Flat, int, int]]) -> list[memoryview]:
    """Read-only views of bytes of stretches (flat, offset, size), neighbours merged, none empty."""
    merged: list[tuple[Flat, int, int]] = []
    for flat, offset, size in stretches:
        if not size:
            continue
        if merged and merged[-1][0] is flat and merged[-1][2] == offset:
            merged[-1] = (flat, merged[-1][1], offset + size)
        else:
            merged.append((flat, offset, offset + size))
    return [flat[lo:hi].view(np.uint8).data.toreadonly() for flat, lo, hi in merged]


def one_dtype(tensors: Sequence[TensorInfo]) -> str:
    """The float dtype that all tensors of a gradient share.

    Raises:
        TensorMismatch: There are none, or they differ.
        InvalidTensors: Whole numbers, which only a small form has.
    """
    found = sorted({tensor.dtype for tensor in tensors})
    if not found:
        raise TensorMismatch("The push holds no tensors; send every tensor of the session.")
    if not DTYPES.keys() >= set(found):
        whole = next(tensor for tensor in tensors if tensor.dtype not in DTYPES)
        raise InvalidTensors(
            f"The tensor {whole.name[:80]!a} has the dtype {whole.dtype}; use {', '.join(DTYPES)}.",
            name=whole.name[:200],
        )
    if len(found) > 1:
        odd = [tensor.name for tensor in tensors if tensor.dtype != tensors[0].dtype]
        raise TensorMismatch(
            f"A push has one dtype, and this one has {' and '.join(found)} (from {listed(odd)}); "
            "convert the tensors to one of them.",
            dtypes=found,
            names=clipped(odd[:SHOWN]),
        )
    return found[0]


def _clear(layout: LayoutLike, came: Mapping[str, object], target: Bytes, itemsize: int) -> None:
    """Fills the places of tensors that do not come with zeros."""
    for entry in layout.entries:
        if entry.name not in came:
            target[entry.offset * itemsize : (entry.offset + entry.size) * itemsize] = 0


def _stretches(
    layout: LayoutLike, tensors: Iterable[TensorInfo], itemsize: int
) -> list[tuple[int, int]]:
    """Where the data goes, in order of arrival: bytes of the flat vector, neighbours merged."""
    merged: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=lambda t: t.begin):
        entry = layout.index[tensor.name]
        if not entry.size:
            continue
        begin, end = entry.offset * itemsize, (entry.offset + entry.size) * itemsize
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
