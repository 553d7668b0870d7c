"""The small forms of a gradient: some rows, quantized values, the largest values.

```
t#idx  I64 [k],  t#rows    [k, *shape[1:]]   rows by index along the first dimension, repeated ones
                                             are summed
t#q8   I8 [n],   t#scale   F32 [n / block]   value = q8 * the scale of its block (`q8_block`)
t#topk I64 [k],  t#values  [k]               values by flat index; elsewhere it is 0
```

Which tensors come in which form is decided when the header of a safetensors body is parsed. If all
are plain they stream to their places as ever; otherwise the body is kept as it comes, everything in
it is checked, and only then is one dense vector in the session's dtype written from it. So a repeat
of a push in another form has the same digest.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import DTYPES, NUMPY, from_bf16
from gradpost.protocol.tensors import PUSHED, Header, TensorInfo
from service.errors import InvalidTensors, TensorMismatch
from service.wire.fit import check_whole
from service.wire.reader import (
    MAX_DIMS,
    Acquire,
    Bytes,
    EntryLike,
    Flat,
    LayoutLike,
    Scatter,
    check_width,
    listed,
)
from service.wire.rows import (
    ALL,
    BLOCK,
    SCRATCH,
    Given,
    Rows,
    Taking,
    check_range,
    check_shape,
    kept,
    put,
    width,
)
from service.wire.safetensors import SafetensorsReader, one_dtype, place_plain

__all__ = ["Compact", "Plan", "PushReader", "Rows", "check", "push_reader", "write"]

PAIRS = {"rows": ("idx", "rows"), "int8": ("q8", "scale"), "topk": ("topk", "values")}
"""Form → the suffixes of its two tensors, the whole numbers first."""
_FORM = {suffix: form for form, pair in PAIRS.items() for suffix in pair}
_WHOLE = {"idx": "I64", "topk": "I64", "q8": "I8"}
_NUMPY = {**NUMPY, "I64": np.dtype("<i8"), "I8": np.dtype("i1")}
_LOSSY = ("int8", "topk")
Q8_BLOCK = 256
Q8_BLOCKS = (16, BLOCK)
"""Values that share a scale: where the metadata do not say, and from how many to how many."""

Half = Mapping[str, TensorInfo]


class Compact(NamedTuple):
    """What a body in small forms held, beside the dense vector.

    Attributes:
        came: The tensors that came, and in which form each.
        rows: Those that were not scattered into the vector, where it is undefined.
        wire: The forms that lose something: "int8", "topk", "int8+topk", or None.
    """

    came: Mapping[str, str]
    rows: tuple[Rows, ...]
    wire: str | None


class Part(NamedTuple):
    """One tensor of the session as it comes: whole, or in the two tensors of a form."""

    at: int
    entry: EntryLike
    form: str
    tensors: tuple[TensorInfo, ...]
    lazy: bool = False


class Plan(NamedTuple):
    """What the header of a body says, checked against the session.

    Attributes:
        layout: The session's tensors.
        master: The session's dtype.
        parts: What comes.
        dtype: Of all floats but the scales.
        block: Values that share a scale.
        data_bytes: Of the body behind its header.
        lasting: Bytes of the rows that outlive the body.
        scratch: Bytes that decoding takes besides.
    """

    layout: LayoutLike
    master: str
    parts: tuple[Part, ...]
    dtype: str
    block: int
    data_bytes: int
    lasting: int
    scratch: int

    @property
    def nbytes(self) -> int:
        """What to reserve for all of it, but for the dense vector."""
        return self.data_bytes + self.lasting + self.scratch


Keep = Callable[[Plan], Bytes]
"""Reserves what a plan takes; returns uint8[plan.data_bytes], C-contiguous."""


class PushReader(SafetensorsReader):
    """Reads a gradient: plain tensors to their places, or anything else as it comes.

    Args:
        layout: The session's tensors.
        master: The session's dtype.
        length: Bytes of the body.
        acquire: Called for a plain body, as `grads_reader` says.
        keep: Called for any other, when its header is found sound.
        taking: What the session says to what comes.
    """

    def __init__(
        self,
        layout: LayoutLike,
        master: str,
        length: int,
        acquire: Acquire,
        keep: Keep,
        taking: Taking,
    ) -> None:
        super().__init__(length, self._placed, allowed=PUSHED)
        self._layout, self._master, self._taking = layout, master, taking
        self._acquire, self._keep = acquire, keep
        self.plan: Plan | None = None
        """What came in a small form; None for a plain body, and before the header."""
        self.data: Bytes = np.empty(0, np.uint8)
        """The data part, where there is a plan."""

    def _placed(self, header: Header) -> Scatter:
        if not _is_small(self._layout, header):
            taking = self._taking
            return place_plain(self._layout, self._master, header, self._acquire, taking.may_miss)
        plan = _planned(self._layout, self._master, header, self._taking)
        self.data = self._keep(plan)
        self.plan = plan
        return Scatter(self.data, [(0, plan.data_bytes)] if plan.data_bytes else [])


def push_reader(
    layout: LayoutLike,
    master: str,
    length: int,
    acquire: Acquire,
    keep: Keep,
    taking: Taking = ALL,
) -> PushReader:
    """A reader of one gradient in any form; arguments and errors as those of `PushReader`."""
    return PushReader(layout, master, length, acquire, keep, taking)


def check(plan: Plan, data: Bytes) -> None:
    """Everything that only the data of a body can tell; nothing is written.

    Args:
        plan: Of its header.
        data: uint8[plan.data_bytes].

    Raises:
        InvalidTensors: An index out of range or given twice, or a scale that is none.
    """
    for part in plan.parts:
        name = part.entry.name
        if part.form == "rows":
            idx = _values(data, part.tensors[0])
            check_range(name, idx, part.entry.shape[0], "rows")
        elif part.form == "topk":
            idx = _values(data, part.tensors[0])
            check_range(name, idx, part.entry.size, "elements")
            _check_unique(name, idx)
        elif part.form == "int8":
            _check_scales(name, _values(data, part.tensors[1]))


def write(plan: Plan, data: Bytes, flat: Flat) -> Compact:
    """Decodes a body that was checked into a dense vector.

    Args:
        plan: Of its header.
        data: uint8[plan.data_bytes].
        flat: master[layout.size]; written in place, with zeros where nothing came.
    """
    came = {part.entry.name: part.form for part in plan.parts}
    lazy: list[Rows] = []
    for entry in plan.layout.entries:
        if entry.name not in came:
            flat[entry.offset : entry.offset + entry.size] = 0
    with np.errstate(all="ignore"):  # an overflow is the finite check's business
        for part in plan.parts:
            if part.lazy:
                given = _given(plan, data, part)
                lazy.append(kept(given, part.at, part.entry, plan.master))
            else:
                entry = part.entry
                _WRITERS[part.form](plan, data, part, flat[entry.offset :][: entry.size])
    lossy = [form for form in _LOSSY if form in came.values()]
    return Compact(came, tuple(lazy), "+".join(lossy) or None)


# What the header tells


def _is_small(layout: LayoutLike, header: Header) -> bool:
    """Whether any tensor comes in a small form."""
    index = layout.index
    for tensor in header.tensors:
        if tensor.name not in index and _split(index, tensor.name):
            return True
    return False


def _split(index: Mapping[str, EntryLike], name: str) -> tuple[str, str] | None:
    """The tensor and the suffix that a name is made of, if the session has such a tensor."""
    base, mark, suffix = name.rpartition("#")
    return (base, suffix) if mark and suffix in _FORM and base in index else None


def _planned(layout: LayoutLike, master: str, header: Header, taking: Taking) -> Plan:
    """All checks of a header; the first fault is refused."""
    index = layout.index
    came: dict[str, tuple[int, ...]] = {}
    plain: dict[str, TensorInfo] = {}
    halves: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        found = None if tensor.name in index else _split(index, tensor.name)
        if found is None:
            came[tensor.name] = tensor.shape
            plain[tensor.name] = tensor
        else:
            halves.setdefault(found[0], {})[found[1]] = tensor
    forms = {name: _form(name, found, name in plain) for name, found in halves.items()}
    came.update((name, index[name].shape) for name in halves)
    check_whole(layout, came, may_miss=taking.may_miss)
    dtype = _dtype(plain, halves, master)
    block = _block(header.metadata) if "int8" in forms.values() else Q8_BLOCK
    parts = []
    for at, entry in enumerate(layout.entries):
        if entry.name in plain:
            parts.append(Part(at, entry, "plain", (plain[entry.name],)))
        elif entry.name in forms:
            part = _part(at, entry, forms[entry.name], halves[entry.name], block)
            if part.form == "rows":
                taking.check_rows(entry)
                part = part._replace(lazy=taking.lazy(entry))
            parts.append(part)
    lasting = sum(_lasting(part, master) for part in parts)
    scratch = max((_scratch(part) for part in parts), default=0)
    return Plan(layout, master, tuple(parts), dtype, block, header.data_bytes, lasting, scratch)


def _form(name: str, found: Half, also_plain: bool) -> str:
    """The one form that a tensor comes in, complete.

    Raises:
        InvalidTensors: It comes in several, or half of it is missing.
    """
    forms = sorted({_FORM[suffix] for suffix in found})
    marks = listed([f"{name[:80]}#{suffix}" for suffix in found])
    if also_plain:
        raise InvalidTensors(
            f"{name[:80]!a} comes whole and as {marks} too; send each tensor in one form.",
            name=name[:200],
        )
    if len(forms) > 1:
        raise InvalidTensors(
            f"{name[:80]!a} comes in {len(forms)} forms ({marks}); send each tensor in one form.",
            name=name[:200],
        )
    pair = PAIRS[forms[0]]
    lacking = [f"{name[:80]}#{suffix}" for suffix in pair if suffix not in found]
    if lacking:
        raise InvalidTensors(
            f"{marks} comes without {listed(lacking)}; send both.",
            name=name[:200],
        )
    return forms[0]


def _dtype(plain: Half, halves: Mapping[str, Half], master: str) -> str:
    """The dtype of all floats but the scales; the session's where there are none."""
    floats = list(plain.values())
    for found in halves.values():
        for suffix, tensor in found.items():
            expected = _WHOLE.get(suffix, "F32" if suffix == "scale" else None)
            if expected is None:
                floats.append(tensor)
            elif tensor.dtype != expected:
                raise InvalidTensors(
                    f"{tensor.name[:80]!a} has the dtype {tensor.dtype}; send it as {expected}.",
                    name=tensor.name[:200],
                    dtype=tensor.dtype,
                )
    if not floats:
        return master
    dtype = one_dtype(floats)
    check_width(dtype, master)
    return dtype


def _block(metadata: Mapping[str, str]) -> int:
    """How many values share a scale."""
    text = metadata.get("q8_block", str(Q8_BLOCK))
    least, most = Q8_BLOCKS
    if text.isascii() and text.isdecimal() and len(text) < 6 and least <= int(text) <= most:
        return int(text)
    raise InvalidTensors(
        f"q8_block in __metadata__ is {text[:40]!a}; write a whole number from {least} to {most}, "
        f"or leave it out for {Q8_BLOCK}.",
        q8_block=text[:40],
    )


def _part(at: int, entry: EntryLike, form: str, found: Half, block: int) -> Part:
    """A tensor in a small form, its shapes checked.

    Raises:
        TensorMismatch: They are not those of the session's tensor.
    """
    first, second = (found[suffix] for suffix in PAIRS[form])
    if form == "rows":
        check_shape(entry, first.shape, second.shape)
    elif form == "int8":
        _check_flat(first, (entry.size,), f"all {entry.size} elements of the tensor, flat")
        scales = -(-entry.size // block)
        _check_flat(second, (scales,), f"one scale for each {block} elements (q8_block)")
    else:
        if len(first.shape) != 1:
            raise _wrong_shape(first, None, "a list of flat indices")
        if first.shape[0] > entry.size:
            raise TensorMismatch(
                f"{first.name[:80]!a} has {first.shape[0]} indices and the tensor {entry.size} "
                "elements; send each index once, or the tensor whole.",
                name=first.name[:200],
            )
        _check_flat(second, first.shape, "one value for each index")
    return Part(at, entry, form, (first, second))


def _check_flat(tensor: TensorInfo, expected: tuple[int, ...], what: str) -> None:
    if tensor.shape != expected:
        raise _wrong_shape(tensor, expected, what)


def _wrong_shape(tensor: TensorInfo, expected: tuple[int, ...] | None, what: str) -> TensorMismatch:
    known: dict[str, Any] = {} if expected is None else {"expected": list(expected)}
    should = "" if expected is None else f" and should have {list(expected)}"
    return TensorMismatch(
        f"{tensor.name[:80]!a} has shape {list(tensor.shape[:MAX_DIMS])}{should}; send {what}.",
        name=tensor.name[:200],
        got=list(tensor.shape[: MAX_DIMS + 1]),
        **known,
    )


def _lasting(part: Part, master: str) -> int:
    """Bytes of the rows that are kept as such."""
    if not part.lazy:
        return 0
    count = part.tensors[0].shape[0]
    return count * (8 + width(part.entry) * DTYPES[master])


def _scratch(part: Part) -> int:
    """Bytes that checking or writing one tensor takes: copies for alignment, and sorted indices."""
    size = sum(t.end - t.begin for t in part.tensors if t.begin % _NUMPY[t.dtype].itemsize)
    if part.form in ("rows", "topk"):
        size += SCRATCH * (part.tensors[0].end - part.tensors[0].begin)
    return size


# What the data tell


def _values(data: Bytes, tensor: TensorInfo) -> Flat:
    """The values of one tensor, flat; copied only where they came off their alignment."""
    kind = _NUMPY[tensor.dtype]
    raw = data[tensor.begin : tensor.end]
    if raw.ctypes.data % kind.itemsize:
        raw = raw.copy()
    return raw.view(kind)


def _check_unique(name: str, idx: Flat) -> None:
    if np.all(idx[1:] > idx[:-1]):
        return
    ordered = np.sort(idx)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
        raise InvalidTensors(
            f"{name[:80]!a} has the index {int(twice[0])} more than once in #topk; send each "
            "index once, with the sum of its values.",
            name=name[:200],
            index=int(twice[0]),
        )


def _check_scales(name: str, scales: Flat) -> None:
    sound = np.isfinite(scales) & (scales >= 0)
    if sound.all():
        return
    at = int(np.argmin(sound))
    raise InvalidTensors(
        f"{name[:80]!a} has the scale {float(scales[at])!r} at position {at} of #scale; scales are "
        "finite and not negative (send a gradient that is not finite whole, and it is refused or "
        "skipped as the session has it).",
        name=name[:200],
        position=at,
    )


# Writing


def _given(plan: Plan, data: Bytes, part: Part) -> Given:
    idx, rows = part.tensors
    return Given(part.entry.name, _values(data, idx), rows.shape, _values(data, rows), plan.dtype)


def _write_plain(plan: Plan, data: Bytes, part: Part, dest: Flat) -> None:
    values = _values(data, part.tensors[0])
    for lo in range(0, values.size, BLOCK):
        dest[lo : lo + BLOCK] = _floats(values[lo : lo + BLOCK], plan.dtype)


def _write_rows(plan: Plan, data: Bytes, part: Part, dest: Flat) -> None:
    put(_given(plan, data, part), part.entry, dest)


def _write_topk(plan: Plan, data: Bytes, part: Part, dest: Flat) -> None:
    idx, values = (_values(data, tensor) for tensor in part.tensors)
    dest[:] = 0
    for lo in range(0, idx.size, BLOCK):
        dest[idx[lo : lo + BLOCK]] = _floats(values[lo : lo + BLOCK], plan.dtype)


def _write_int8(plan: Plan, data: Bytes, part: Part, dest: Flat) -> None:
    """Value = q8 * scale; in float32 too it is the exact product, rounded once."""
    q8, scales = (_values(data, tensor) for tensor in part.tensors)
    block, whole = plan.block, q8.size // plan.block
    step = max(1, BLOCK // block)
    for lo in range(0, whole, step):
        hi = min(lo + step, whole)
        at = slice(lo * block, hi * block)
        blocks, scale = q8[at].reshape(-1, block), scales[lo:hi, None]
        np.multiply(blocks, scale, out=dest[at].reshape(-1, block), dtype=dest.dtype)
    rest = slice(whole * block, q8.size)
    np.multiply(q8[rest], scales[whole:], out=dest[rest], dtype=dest.dtype)


def _floats(values: Flat, dtype: str) -> Flat:
    return from_bf16(values) if dtype == "BF16" else values


_WRITERS: Mapping[str, Callable[[Plan, Bytes, Part, Flat], None]] = {
    "plain": _write_plain,
    "rows": _write_rows,
    "topk": _write_topk,
    "int8": _write_int8,
}
