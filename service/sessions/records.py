"""What sessions write into their files beside arrays: records of the log, and the ledger.

Record of a push, in the meta of its header, or behind the gradient where it is too long for that:

```
 0  4  length of the facts            JSON: dtype, staleness, at; loss, overrides if any
 4  4  number of parts
 8  8  lr      16  8  norm            float64; a norm of NaN is none
24  1  flags: 1 clipped, 2 skipped    25  3  zeros
28     the facts, then the parts
```

Part, the numbers of one stretch of a group (`update.Part`):

```
 0  4  group          12  8  updates        28  1  number of values
 4  4  first          20  8  lr             29  1  number of scalars
 8  4  last                                 30     the values, then the scalars: float64
```

Ledger: `RETIRED_COUNT u32, {length u16, name}…, WORKER_COUNT u32, workers…`, each worker `length
u16, name, highest i64, seen_at f64, count u32`, and then for each of its pushes an `_ADMITTED`.

All numbers are little-endian; floats keep their bits.
"""

import json
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from service.sessions.ledger import Admitted, Contents, Known, Summary
from service.sessions.update import Part

_PUSH = struct.Struct("<IIddB3x")
_PART = struct.Struct("<IIIQdBB")
_WORKER = struct.Struct("<qdI")
_ADMITTED = struct.Struct("<Q16sQQQQdddd2B")
assert _PUSH.size == 28
assert _PART.size == 30
assert _ADMITTED.size == 90
_CLIPPED, _SKIPPED = 1, 2
_APPLIED, _IDENTIFIED, _SMALLER, _FINITE, _NORM, _UPDATE, _PARAMS, _MARKED = (
    1 << bit for bit in range(8)
)
_REASONS = (None, "nonfinite")


class Push(NamedTuple):
    """All that an admitted push did, but for its gradient and what the kernels find out.

    Attributes:
        worker: Who pushed; None if the push is not identified.
        sequence: Of the worker.
        digest: What tells the push from another one of this key; b"" without a key.
        dtype: Of the gradient.
        staleness: In versions.
        lr: Of the default group.
        norm: Of the gradient, before it was clipped; None if it is not finite.
        clipped: Whether any of it was.
        loss: As it was reported.
        overrides: JSON text, as the control values have it.
        at: Seconds since 1970.
        skipped: Why nothing was applied; None if it was.
        parts: The numbers of the update.
    """

    worker: str | None
    sequence: int | None
    digest: bytes
    dtype: str
    staleness: int
    lr: float
    norm: float | None
    clipped: bool
    loss: float | None
    overrides: str | None
    at: float
    skipped: str | None
    parts: tuple[Part, ...]


def pack_push(push: Push) -> bytes:
    """A push without its key, digest and gradient."""
    facts: dict[str, Any] = {"dtype": push.dtype, "staleness": push.staleness, "at": push.at}
    if push.loss is not None:
        facts["loss"] = push.loss
    if push.overrides:
        facts["overrides"] = push.overrides
    text = json.dumps(facts, separators=(",", ":")).encode()
    flags = _CLIPPED * push.clipped + _SKIPPED * (push.skipped is not None)
    norm = math.nan if push.norm is None else push.norm
    head = _PUSH.pack(len(text), len(push.parts), push.lr, norm, flags)
    return b"".join((head, text, *map(_pack_part, push.parts)))


def _pack_part(part: Part) -> bytes:
    values, scalars = part.values, part.scalars
    head = _PART.pack(
        part.group, part.first, part.last, part.updates, part.lr, len(values), len(scalars)
    )
    return head + struct.pack(f"<{len(values) + len(scalars)}d", *values, *scalars)


def unpack_push(data: bytes, worker: str | None, sequence: int | None, digest: bytes) -> Push:
    """The push of a record.

    Raises:
        ValueError: The record was not written by `pack_push`.
    """
    try:
        length, count, lr, norm, flags = _PUSH.unpack_from(data)
        at = _PUSH.size + length
        facts = json.loads(data[_PUSH.size : at])
        parts = []
        for _ in range(count):
            part, at = _unpack_part(data, at)
            parts.append(part)
    except (struct.error, KeyError, ValueError) as error:
        raise ValueError(f"a record of a push is no such: {error}") from None
    if at != len(data):
        raise ValueError("a record of a push is longer than it says")
    return Push(
        worker, sequence, digest, facts["dtype"], facts["staleness"], lr,
        None if math.isnan(norm) else norm, bool(flags & _CLIPPED), facts.get("loss"),
        facts.get("overrides"), facts["at"], _REASONS[bool(flags & _SKIPPED)], tuple(parts),
    )  # fmt: skip


def _unpack_part(data: bytes, at: int) -> tuple[Part, int]:
    group, first, last, updates, lr, values, scalars = _PART.unpack_from(data, at)
    at += _PART.size
    numbers = struct.unpack_from(f"<{values + scalars}d", data, at)
    part = Part(group, first, last, updates, lr, numbers[:values], numbers[values:])
    return part, at + 8 * len(numbers)


def largest_push(entries: int) -> int:
    """Bytes that a push to a session of so many tensors takes at most, without its overrides."""
    return _PUSH.size + 512 + entries * (_PART.size + 8 * 24)


# The ledger


def pack_ledger(contents: Contents) -> bytes:
    """A ledger as bytes."""
    parts = [struct.pack("<I", len(contents.retired)), *map(_text, contents.retired)]
    parts.append(struct.pack("<I", len(contents.workers)))
    for one in contents.workers:
        parts += (_text(one.name), _WORKER.pack(one.highest, one.seen_at, len(one.admitted)))
        parts += (_pack_admitted(number, done) for number, done in one.admitted.items())
    return b"".join(parts)


def _text(name: str) -> bytes:
    data = name.encode()
    return struct.pack("<H", len(data)) + data


def _pack_admitted(sequence: int, done: Admitted) -> bytes:
    one = done.summary
    flags = (
        _APPLIED * one.applied + _IDENTIFIED * one.identified + _SMALLER * one.clipped
        + _FINITE * one.params_finite + _NORM * (one.grad_norm is not None)
        + _UPDATE * (one.update_norm is not None) + _PARAMS * (one.param_norm is not None)
        + _MARKED * bool(done.digest)
    )  # fmt: skip
    return _ADMITTED.pack(
        sequence, done.digest, one.step, one.epoch, one.version, one.staleness, one.lr,
        one.grad_norm or 0.0, one.update_norm or 0.0, one.param_norm or 0.0, flags,
        _REASONS.index(one.skipped),
    )  # fmt: skip


def unpack_ledger(data: bytes) -> Contents:
    """A ledger from bytes.

    Raises:
        ValueError: They were not written by `pack_ledger`.
    """
    try:
        (count,) = struct.unpack_from("<I", data)
        at, retired = 4, []
        for _ in range(count):
            name, at = _read_text(data, at)
            retired.append(name)
        (count,) = struct.unpack_from("<I", data, at)
        at, workers = at + 4, []
        for _ in range(count):
            name, at = _read_text(data, at)
            highest, seen_at, admitted = _WORKER.unpack_from(data, at)
            at += _WORKER.size
            end = at + admitted * _ADMITTED.size
            workers.append(Known(name, highest, seen_at, dict(_read_admitted(data[at:end]))))
            at = end
    except struct.error as error:
        raise ValueError(f"this is no ledger: {error}") from None
    if at != len(data):
        raise ValueError("a ledger has another length than it says")
    return Contents(tuple(workers), tuple(retired))


def _read_text(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<H", data, at)
    at += 2
    return data[at : at + length].decode(), at + length


def _read_admitted(data: bytes) -> Iterator[tuple[int, Admitted]]:
    for (
        sequence, digest, step, epoch, version, staleness, lr, norm, update_norm, param_norm, flags,
        reason,
    ) in _ADMITTED.iter_unpack(data):  # fmt: skip
        yield sequence, Admitted(
            digest if flags & _MARKED else b"",
            Summary(
                step, epoch, version, bool(flags & _APPLIED), bool(flags & _IDENTIFIED), staleness,
                lr, norm if flags & _NORM else None, bool(flags & _SMALLER), _REASONS[reason],
                bool(flags & _FINITE), update_norm if flags & _UPDATE else None,
                param_norm if flags & _PARAMS else None,
            ),
        )  # fmt: skip
