"""The safetensors header, read strictly and written aligned.

`8 bytes of length, little-endian | JSON, spaces to a multiple of 8 | data`.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from gradpost.protocol.dtypes import DTYPES

MAX_HEADER_BYTES = 1 << 20
MAX_NAME = 1024
MAX_DIMS = 64  # NumPy's own limit
_OF_FORMS = ("I64", "I8")
PUSHED = (*DTYPES, *_OF_FORMS)
"""Dtypes of a push, whose small forms have indices and quantized values beside the floats."""
_SIZES = {**DTYPES, "I64": 8, "I8": 1, "U8": 1}
"""Bytes (U8) are no dtype of the wire; the server's own files have some."""
_LIMIT = 1 << 63
_PREFIX = 8
_METADATA = "__metadata__"


class TensorInfo(NamedTuple):
    """One tensor; `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A sound header, its tensors in header order."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_offset: int
    data_bytes: int


class HeaderError(ValueError):
    """The header is broken; the message says what to do."""


def header_length(first8: bytes, limit: int = MAX_HEADER_BYTES) -> int:
    """The length of the JSON from the first 8 bytes of a body.

    Args:
        first8: They.
        limit: The longest that is let in.

    Raises:
        HeaderError: Not 8 bytes, or not within 2 … limit.
    """
    if len(first8) != _PREFIX:
        raise HeaderError("A safetensors body begins with 8 bytes of header length; send them.")
    length = int.from_bytes(first8, "little")
    if not 2 <= length <= limit:
        raise HeaderError(
            f"The header length is {length}, but must lie from 2 to {limit} bytes; "
            "send the output of a safetensors library."
        )
    return length


def parse_header(
    raw: bytes, body_bytes: int | None, allowed: Collection[str] = tuple(DTYPES)
) -> Header:
    """Parses the JSON of a header (without the 8 bytes before it).

    Args:
        raw: The JSON as it came, padding included.
        body_bytes: Bytes of the whole body, the 8 and the JSON included; None: not checked.
        allowed: Dtype names to let in.

    Raises:
        HeaderError: For anything that is not exactly as the format has it.
    """
    fields = _load(raw)
    metadata = _metadata(fields.pop(_METADATA, {}))
    tensors = tuple(_tensor(name, entry, allowed) for name, entry in fields.items())
    data_bytes = _check_holes(tensors)
    offset = _PREFIX + len(raw)
    if body_bytes is not None and data_bytes != body_bytes - offset:
        raise HeaderError(
            f"The tensors take {data_bytes} bytes, but {body_bytes - offset} follow the header; "
            "send the body whole, with nothing behind the last tensor."
        )
    return Header(tensors, metadata, offset, data_bytes)


def build_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    limit: int = MAX_HEADER_BYTES,
) -> bytes:
    """Writes the header of tensors that follow each other in the order given.

    Args:
        tensors: (name, dtype, shape) of each.
        metadata: Text under `__metadata__`.
        limit: Bytes that the JSON may take.

    Returns:
        The 8 bytes of length and the JSON, padded so that the data begins at a multiple of 8.

    Raises:
        HeaderError: A name is double, reserved or unusable, a text no valid one, or the header
            too long.
    """
    fields: dict[str, Any] = {_METADATA: _metadata(dict(metadata))} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        _check_name(name)
        if name in fields or name == _METADATA:
            raise HeaderError(f"The tensor name {name[:80]!r} is double or reserved; rename it.")
        size = _SIZES[dtype]
        for dim in shape:
            size *= dim
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > limit:
        raise HeaderError(f"The header would take {len(text)} bytes; split the tensors over calls.")
    return len(text).to_bytes(_PREFIX, "little") + text


def _load(raw: bytes) -> dict[str, Any]:
    """The JSON object, duplicate keys and NaN refused at every depth."""
    if raw[:1] != b"{":
        raise HeaderError("The header must be a JSON object that begins with '{'.")
    try:
        fields = json.loads(
            raw.decode("utf-8").rstrip(" "), object_pairs_hook=_unique, parse_constant=_constant
        )
    except HeaderError:
        raise
    except UnicodeDecodeError:
        raise HeaderError("The header is not UTF-8; encode it as UTF-8.") from None
    except RecursionError:
        raise HeaderError("The header is nested too deeply; it needs three levels.") from None
    except ValueError as error:
        raise HeaderError(f"The header is not valid JSON ({str(error)[:120]}).") from None
    assert isinstance(fields, dict)
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        double = next(key for key, after in pairwise(keys) if key == after)
        raise HeaderError(f"The header has {double[:80]!r} twice; send each name once.")
    return fields


def _constant(text: str) -> NoReturn:
    raise HeaderError(f"The header has {text}, which is not JSON; numbers there are whole.")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError(f"{_METADATA} must map text to text; write numbers as text.")
    if not all(_encodes(key) and _encodes(text) for key, text in value.items()):
        raise HeaderError(f"{_METADATA} holds half a surrogate pair; send valid text.")
    return value


def _encodes(text: str) -> bool:
    """Whether UTF-8 has it: an escape in JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or "\0" in name:
        raise HeaderError(
            f"The tensor name {name[:80]!r} is empty, has a NUL or is longer than {MAX_NAME} "
            "characters; rename it."
        )
    if not _encodes(name):
        raise HeaderError(f"The tensor name {name[:80]!r} is no valid text; rename it.")


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT  # a bool is an int to isinstance


def _tensor(name: str, entry: Any, allowed: Collection[str]) -> TensorInfo:
    """One entry, checked by itself."""
    _check_name(name)
    shown = repr(name[:80])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"The tensor {shown} must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in allowed:
        raise HeaderError(
            f"The tensor {shown} has the dtype {str(dtype)[:40]!r}; use "
            f"{', '.join(name for name in allowed if name not in _OF_FORMS)}."
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_whole, shape)):
        raise HeaderError(
            f"The shape of {shown} must be a list of at most {MAX_DIMS} whole numbers from 0."
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise HeaderError(f"data_offsets of {shown} must be two whole numbers, begin and end.")
    size = _SIZES[dtype]
    for dim in shape:
        size *= dim
    begin, end = offsets
    if end - begin != size:
        raise HeaderError(
            f"The tensor {shown} says {end - begin} bytes, but its shape and dtype take "
            f"{str(size)[:40]}; make data_offsets fit."
        )
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _check_holes(tensors: tuple[TensorInfo, ...]) -> int:
    """Bytes of the data, where each begins as the one before it ends."""
    at = 0
    for tensor in sorted(tensors, key=lambda one: (one.begin, one.end)):
        if tensor.begin != at:
            fault = "overlaps the one before it" if tensor.begin < at else "leaves a hole before it"
            raise HeaderError(
                f"The tensor {tensor.name[:80]!r} {fault}; lay the tensors end to end from 0."
            )
        at = tensor.end
    return at
