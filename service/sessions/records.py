"""What sessions write into their files beside arrays: records of the log, and the ledger.

Record of a push, in the meta of its header, or behind the gradient where it is too long for that:

```
 0  4  length of the facts            JSON: dtype, staleness, at; loss, overrides, rows if any
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

Contribution to a round: a length, JSON (`Contribution` without its key and digest, and what the
round began with if it is the first one), and behind it the gradient, unless it is a pass. End of a
round: a length, JSON (number, status, reason), then a push as above if it was applied.

Ledger: `RETIRED_COUNT u32, {length u16, name}…, WORKER_COUNT u32, workers…`, each worker `length
u16, name, highest i64, seen_at f64, count u32`, and then for each of its pushes an `_ADMITTED`.

All numbers are little-endian; floats keep their bits.
"""

import json
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from service.sessions.ledger import Admitted, Contents, Contributed, Fate, Known, Summary
from service.sessions.update import Part
from service.storage.header import NO_DIGEST, Key, Kind

_PUSH = struct.Struct("<IIddB3x")
_PART = struct.Struct("<IIIQdBB")
_WORKER = struct.Struct("<qdI")
_ADMITTED = struct.Struct("<Q16sQQQQdddd2BQI2B")
_ADMITTED_1 = struct.Struct("<Q16sQQQQdddd2B")
"""Of images of format 1, which know no rounds."""
_LENGTH = struct.Struct("<I")
assert _PUSH.size == 28
assert _PART.size == 30
assert _ADMITTED.size == 104
_CLIPPED, _SKIPPED = 1, 2
_APPLIED, _IDENTIFIED, _SMALLER, _FINITE, _NORM, _UPDATE, _PARAMS, _MARKED = (
    1 << bit for bit in range(8)
)
_REASONS = (None, "nonfinite", "passes")
_ABANDONED = ("timeout", "restore", "params", "state", "groups", "patch", "stop")
"""Why a round may be abandoned; the order is on the disk."""
_WIRES = (None, "int8", "topk", "int8+topk", "f16", "bf16")


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
        wire: The lossy form in which it came.
        rows: Of each tensor that is not frozen and of which some rows came, its entry and how
            many; the gradient is then kept as `sparse.payload` has it. None: no rows came.
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
    wire: str | None = None
    rows: tuple[tuple[int, int], ...] | None = None


class Contribution(NamedTuple):
    """A part of a round.

    Attributes:
        round: Its number.
        worker: Who pushed.
        sequence: Of the worker.
        digest: What tells the push from another one of this key.
        dtype: Of the gradient; "" of a pass.
        weight: As it was stated; 0 is a pass.
        scaled: What the gradient is multiplied by, clipping and its sign included.
        norm: Of the gradient; None of a pass.
        clipped: Whether it was made smaller.
        skipped: Why it became a pass; None if it is what it was sent as.
        loss: As it was reported.
        overrides: JSON text.
        at: Seconds since 1970.
        lateness_s: Since the first of the round.
        present: For each entry of the layout, whether it came; None: all.
        rules: What the round began with, as JSON; None if this is not the first of it.
        wire: The lossy form in which it came.
    """

    round: int
    worker: str
    sequence: int
    digest: bytes
    dtype: str
    weight: float
    scaled: float
    norm: float | None
    clipped: bool
    skipped: str | None
    loss: float | None
    overrides: str | None
    at: float
    lateness_s: float
    present: tuple[bool, ...] | None
    rules: dict[str, Any] | None
    wire: str | None = None

    @property
    def counts(self) -> bool:
        """Whether it is more than a pass."""
        return self.scaled != 0


class Close(NamedTuple):
    """The end of a round.

    Attributes:
        round: Its number.
        status: applied, skipped or abandoned.
        reason: Why it ended, or was skipped or abandoned.
        at: Seconds since 1970.
        push: The update, if there was one; its worker is None.
    """

    round: int
    status: str
    reason: str
    at: float
    push: Push | None


class Entry(NamedTuple):
    """What a record is sealed with, beside its payload."""

    kind: Kind
    key: Key | None
    digest: bytes
    facts: bytes


def entry_of(done: "Push | Contribution | Close") -> Entry:
    """A push, a contribution or the end of a round, as a record keeps it."""
    if isinstance(done, Close):
        return Entry(Kind.ROUND_CLOSE, None, NO_DIGEST, pack_close(done))
    if isinstance(done, Contribution):
        whose = Key(done.worker, done.sequence)
        return Entry(Kind.CONTRIBUTION, whose, done.digest, pack_contribution(done))
    key = None
    if done.worker is not None and done.sequence is not None:
        key = Key(done.worker, done.sequence)
    kind = Kind.PUSH if done.skipped is None else Kind.SKIP
    return Entry(kind, key, done.digest or NO_DIGEST, pack_push(done))


def pack_contribution(one: Contribution) -> bytes:
    """A contribution without its key, digest and gradient; floats keep their bits in JSON."""
    facts = one._asdict()
    for name in ("worker", "sequence", "digest"):
        del facts[name]
    kept = {name: value for name, value in facts.items() if value is not None}
    if one.present is not None:
        kept["present"] = "".join("01"[came] for came in one.present)
    return json.dumps(kept, separators=(",", ":")).encode()


def unpack_contribution(data: bytes, key: Key, digest: bytes) -> Contribution:
    """The contribution of a record.

    Raises:
        ValueError: The record was not written by `pack_contribution`.
    """
    try:
        facts = {name: None for name in Contribution._fields} | json.loads(data)
        present = facts["present"]
        facts["present"] = None if present is None else tuple(mark == "1" for mark in present)
        return Contribution(**{**facts, "worker": key.worker, "sequence": key.sequence,
                               "digest": digest})  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"a record of a contribution is no such: {error}") from None


def pack_close(close: Close) -> bytes:
    """The end of a round."""
    facts = {name: value for name, value in close._asdict().items() if name != "push"}
    text = json.dumps(facts, separators=(",", ":")).encode()
    push = b"" if close.push is None else pack_push(close.push)
    return _LENGTH.pack(len(text)) + text + push


def unpack_close(data: bytes) -> Close:
    """The end of a round, from its record.

    Raises:
        ValueError: The record was not written by `pack_close`.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        at = _LENGTH.size + length
        facts = json.loads(data[_LENGTH.size : at])
        push = unpack_push(data[at:], None, None, b"") if len(data) > at else None
        return Close(**facts, push=push)
    except (struct.error, TypeError, ValueError) as error:
        raise ValueError(f"a record of a round's end is no such: {error}") from None


def pack_push(push: Push) -> bytes:
    """A push without its key, digest and gradient."""
    facts: dict[str, Any] = {"dtype": push.dtype, "staleness": push.staleness, "at": push.at}
    if push.loss is not None:
        facts["loss"] = push.loss
    if push.overrides:
        facts["overrides"] = push.overrides
    if push.wire:
        facts["wire"] = push.wire
    if push.rows is not None:
        facts["rows"] = push.rows
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
    rows = facts.get("rows")
    return Push(
        worker, sequence, digest, facts["dtype"], facts["staleness"], lr,
        None if math.isnan(norm) else norm, bool(flags & _CLIPPED), facts.get("loss"),
        facts.get("overrides"), facts["at"], _REASONS[bool(flags & _SKIPPED)], tuple(parts),
        facts.get("wire"),
        None if rows is None else tuple((entry, count) for entry, count in rows),
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
    marked = _MARKED * bool(done.digest)
    if isinstance(one, Contributed):
        assert one.reason is not None, "an image knows no open round"
        fate = 1 + _ABANDONED.index(one.reason)
        numbers = (0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)
        return _ADMITTED.pack(sequence, done.digest, *numbers, marked, 0, one.round, 0, 0, fate)
    flags = (
        _APPLIED * one.applied + _IDENTIFIED * one.identified + _SMALLER * one.clipped
        + _FINITE * one.params_finite + _NORM * (one.grad_norm is not None)
        + _UPDATE * (one.update_norm is not None) + _PARAMS * (one.param_norm is not None) + marked
    )  # fmt: skip
    return _ADMITTED.pack(
        sequence, done.digest, one.step, one.epoch, one.version, one.staleness, one.lr,
        one.grad_norm or 0.0, one.update_norm or 0.0, one.param_norm or 0.0, flags,
        _REASONS.index(one.skipped), one.round or 0, one.contributions or 0,
        _WIRES.index(one.wire), 0,
    )  # fmt: skip


def unpack_ledger(data: bytes, *, rounds: bool = True) -> Contents:
    """A ledger from bytes.

    Args:
        data: They.
        rounds: Whether they know of rounds; those of format 1 do not.

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
            end = at + admitted * (_ADMITTED if rounds else _ADMITTED_1).size
            rows = _read_admitted(data[at:end], rounds=rounds)
            workers.append(Known(name, highest, seen_at, dict(rows)))
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


def _read_admitted(data: bytes, *, rounds: bool) -> Iterator[tuple[int, Admitted]]:
    if not rounds:
        for row in _ADMITTED_1.iter_unpack(data):
            yield _admitted_of(*(*row, 0, 0, 0, 0))
        return
    for row in _ADMITTED.iter_unpack(data):
        yield _admitted_of(*row)


def _admitted_of(
    sequence: int, digest: bytes, step: int, epoch: int, version: int, staleness: int, lr: float,
    norm: float, update_norm: float, param_norm: float, flags: int, reason: int, number: int,
    contributions: int, wire: int, fate: int,
) -> tuple[int, Admitted]:  # fmt: skip
    found: Fate
    if fate:
        found = Contributed(number, _ABANDONED[fate - 1])
    else:
        found = Summary(
            step, epoch, version, bool(flags & _APPLIED), bool(flags & _IDENTIFIED), staleness,
            lr, norm if flags & _NORM else None, bool(flags & _SMALLER), _REASONS[reason],
            bool(flags & _FINITE), update_norm if flags & _UPDATE else None,
            param_norm if flags & _PARAMS else None, number or None,
            contributions if number else None, _WIRES[wire],
        )  # fmt: skip
    return sequence, Admitted(digest if flags & _MARKED else b"", found)
