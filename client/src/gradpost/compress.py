"""Smaller gradients: what a trainer sends in fewer bytes, and what is lost on the way.

| codec | bytes of a float32 gradient | what is lost |
|---|---|---|
| `bf16()`, `f16()` | 1/2 | digits |
| `int8(block=256)` | 1/4 | all below 1/254 of the largest value of each block |
| `topk(0.01)` | 3/100 | all but the largest values of each tensor |

`ErrorFeedback` keeps what a codec loses and adds it to the next gradient, so that nothing is lost
for ever (Seide et al. 2014; Karimireddy et al. 2019, Algorithm 1); training with `topk` needs it.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gradpost.protocol.dtypes import from_bf16, to_bf16
from gradpost.tensors import Rows, Tensors, Wire, encode
from gradpost.tensors import bf16 as bits_of_bf16
from gradpost.transport import Part

F32 = NDArray[np.float32]
Settled = Callable[[Any], None]
"""Told what a push returned once it was admitted; None: that it was not."""


class Codec(Protocol):
    """Makes one tensor of a gradient smaller; the same tensor always becomes the same bytes."""

    @property
    def floats(self) -> str | None:
        """The wire dtype, where all it does is to narrow; None: it has a form of its own."""

    def nbytes(self, size: int) -> int:
        """Bytes that a tensor of so many elements takes."""

    def encode(self, name: str, array: F32) -> Wire:
        """What goes over the wire for a tensor; `array` is finite, of any shape, and only read."""

    def decode(self, wire: Wire, shape: tuple[int, ...]) -> F32:
        """What the server makes of it."""


class _Narrow:
    """Rounds to a narrower float."""

    def __init__(self, floats: str) -> None:
        self.floats: str | None = floats

    def nbytes(self, size: int) -> int:
        """Two for each."""
        return 2 * size

    def encode(self, name: str, array: F32) -> Wire:
        """Rounds to nearest, ties to even; what is beyond the range becomes infinite."""
        if self.floats == "BF16":
            return Wire((("", "BF16", to_bf16(array)),))
        with np.errstate(over="ignore"):
            return Wire((("", "F16", array.astype("<f2")),))

    def decode(self, wire: Wire, shape: tuple[int, ...]) -> F32:
        """Widens."""
        _, dtype, array = wire.parts[0]
        found: F32 = from_bf16(array) if dtype == "BF16" else array.astype(np.float32)
        return found


def bf16() -> Codec:
    """bfloat16: the range of float32, 8 bits of precision."""
    return _Narrow("BF16")


def f16() -> Codec:
    """float16: 11 bits of precision, up to 65,504; a larger gradient is refused as not finite."""
    return _Narrow("F16")


class int8:  # in lower case, as `bf16()` and the others
    """Whole numbers from -127 to 127, times one scale for each block of values.

    Args:
        block: Values that share a scale, 16 to 65,536.
    """

    floats: str | None = None

    def __init__(self, block: int = 256) -> None:
        if not (isinstance(block, int) and 16 <= block <= 65_536):
            raise ValueError(f"block is a whole number from 16 to 65,536, not {block!r}.")
        self.block = block

    def nbytes(self, size: int) -> int:
        """One for each, and four for each block."""
        return size + 4 * -(-size // self.block)

    def encode(self, name: str, array: F32) -> Wire:
        """Rounds to nearest; the largest value of a block is 127 times its scale."""
        size, blocks = array.size, -(-array.size // self.block)
        rows = np.zeros((blocks, self.block), np.float32)
        rows.reshape(-1)[:size] = array.reshape(-1)
        scale = (np.maximum(rows.max(axis=1), -rows.min(axis=1)) / 127).astype("<f4")
        np.divide(rows, np.where(scale > 0, scale, np.inf)[:, None], out=rows, dtype=np.float32)
        np.clip(np.rint(rows, out=rows), -127, 127, out=rows)
        q8 = rows.astype(np.int8).reshape(-1)[:size]
        parts = (("#q8", "I8", q8), ("#scale", "F32", scale))
        return Wire(parts, {"q8_block": str(self.block)})

    def decode(self, wire: Wire, shape: tuple[int, ...]) -> F32:
        """Each value times the scale of its block."""
        (_, _, q8), (_, _, scale) = wire.parts
        found: F32 = q8 * np.repeat(scale, self.block)[: q8.size]
        return found.reshape(shape)


class topk:
    """The values that are largest, whatever their sign, and where they are.

    Args:
        amount: A float: which part of each tensor, above 0 to 1; a whole number: how many.
    """

    floats: str | None = None

    def __init__(self, amount: float) -> None:
        whole = isinstance(amount, int) and not isinstance(amount, bool)
        if not (amount >= 1 if whole else isinstance(amount, float) and 0 < amount <= 1):
            raise ValueError(f"Give a part above 0 to 1.0, or how many from 1, not {amount!r}.")
        self.amount = amount

    def nbytes(self, size: int) -> int:
        """Twelve for each that is sent."""
        return 12 * self._count(size)

    def _count(self, size: int) -> int:
        if isinstance(self.amount, int):
            return min(self.amount, size)
        return min(math.ceil(self.amount * size), size)

    def encode(self, name: str, array: F32) -> Wire:
        """The largest, in the order of their indices."""
        flat = array.reshape(-1)
        count = self._count(flat.size)
        if count == flat.size:
            idx = np.arange(count)
        else:
            idx = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
        parts = (("#topk", "I64", idx.astype("<i8")), ("#values", "F32", flat[idx]))
        return Wire(parts)

    def decode(self, wire: Wire, shape: tuple[int, ...]) -> F32:
        """Zero elsewhere."""
        (_, _, idx), (_, _, values) = wire.parts
        found = np.zeros(math.prod(shape), np.float32)
        found[idx] = values
        return found.reshape(shape)


class _Taken(NamedTuple):
    """A tensor on its way: what its form loses, and what was left of those before it."""

    wire: Wire
    lost: F32
    former: F32 | None


class ErrorFeedback:
    """Adds what a codec has lost so far to the next gradient: one float32 for each parameter.

    What is lost counts once the push was admitted. Until then it is on its way: a push that is
    refused, or skipped as not finite, gives back what it took.

    Args:
        codec: What makes the gradients smaller.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._left: dict[str, F32] = {}
        self._lock = threading.Lock()

    def state(self) -> dict[str, F32]:
        """A copy of what is left of each tensor: for the trainer's own checkpoint.

        Take it between two pushes, with none pending: what is on its way is not in it.
        """
        with self._lock:
            return {name: array.copy() for name, array in self._left.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave, in place of all there is."""
        left = {name: np.array(value, np.float32) for name, value in state.items()}
        with self._lock:
            self._left = left

    def take(self, name: str, array: F32) -> _Taken:
        """Encodes a tensor and what is left of it."""
        with self._lock:
            former = self._left.pop(name, None)
        try:
            whole = array if former is None else array + former
            wire = self.codec.encode(name, whole)
            return _Taken(wire, whole - self.codec.decode(wire, whole.shape), former)
        except BaseException:
            self._put({name: former})
            raise

    def settle(self, taken: Mapping[str, _Taken], *, admitted: bool) -> None:
        """Keeps what was lost, or takes back what was left before."""
        self._put({name: one.lost if admitted else one.former for name, one in taken.items()})

    def _put(self, more: Mapping[str, F32 | None]) -> None:
        with self._lock:
            for name, array in more.items():
                if array is None:
                    continue
                there = self._left.get(name)  # of a push by another thread
                self._left[name] = array if there is None else there + array


def chosen(compress: "str | Codec | ErrorFeedback | None") -> "Codec | ErrorFeedback | None":
    """The codec that a text names; int8 and topk with error feedback.

    Raises:
        ValueError: It names none.
    """
    if not isinstance(compress, str):
        return compress
    name, _, amount = compress.partition(":")
    if name in ("bf16", "f16") and not amount:
        return bf16() if name == "bf16" else f16()
    try:
        number = int(amount) if amount.isdecimal() else float(amount or "nan")
        if name == "int8":
            return ErrorFeedback(int8(int(number)) if amount else int8())
        if name == "topk":
            return ErrorFeedback(topk(number))
    except ValueError as error:
        raise ValueError(f"compress={compress!r}: {error}") from None
    raise ValueError(
        f"compress={compress!r} is not known; say 'int8', 'topk:0.01', 'bf16' or 'f16'."
    )


def encoded(
    compress: Codec | ErrorFeedback | None, grads: Tensors, master: str
) -> tuple[Sequence[Part], Settled]:
    """The body of a push, and what to tell once its fate is known.

    A tensor goes whole where its form would not be smaller, or if it is not finite: then the server
    has to see that.

    Args:
        compress: What makes it smaller; None: nothing does.
        grads: As `tensors.encode` takes them.
        master: The session's dtype.
    """
    if compress is None:
        return encode(grads, master, one_dtype=True), _forget
    feedback = compress if isinstance(compress, ErrorFeedback) else None
    codec: Codec = compress.codec if isinstance(compress, ErrorFeedback) else compress
    taken: dict[str, _Taken] = {}

    def settled(found: Any) -> None:
        if feedback is not None:
            feedback.settle(taken, admitted=_counts(found))

    try:
        sent: dict[str, Any] = {}
        for name, value in grads.items():
            if isinstance(value, Rows | Wire):
                sent[name] = _rows(codec, name, value)
                continue
            array = _float32(value)
            if not _pays(codec, array):
                sent[name] = value
            elif feedback is None:
                sent[name] = codec.encode(name, array)
            else:
                taken[name] = feedback.take(name, array)
                sent[name] = taken[name].wire
        return encode(sent, master, one_dtype=True), settled
    except BaseException:
        settled(None)
        raise


def _forget(found: Any) -> None:
    """Of a push that loses nothing."""


def _counts(found: Any) -> bool:
    """Whether a push was admitted and its gradient used; `found` is its summary, or begins so."""
    summary = found[0] if isinstance(found, tuple) else found
    return summary is not None and getattr(summary, "skipped", None) != "nonfinite"


def _float32(value: Any) -> F32:
    if isinstance(value, bits_of_bf16):
        return from_bf16(value.bits)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(np.float32, copy=False)


def _pays(codec: Codec, array: F32) -> bool:
    """Whether a tensor goes in the codec's form."""
    small = codec.nbytes(array.size) < 4 * array.size or not array.size
    return small and bool(np.isfinite(array).all())


def _rows(codec: Codec, name: str, value: Rows | Wire) -> Rows | Wire:
    """Rows are small as they are; a codec that only narrows makes them narrower."""
    if codec.floats is None or isinstance(value, Wire):
        return value
    ((_, dtype, array),) = codec.encode(name, _float32(value.values)).parts
    return Wire((("#idx", "I64", value.idx.astype("<i8")), ("#rows", dtype, array)))
