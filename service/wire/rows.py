"""Some rows of a tensor, by index along its first dimension: what an embedding's gradient is.

They come in any order, and one may come several times: those are summed in float64, one after
another in the order in which they came, and rounded once to the session's dtype. The order is part
of what a push means: another would be another sum, and a repeat of the push no repeat.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from gradpost.protocol.dtypes import NUMPY, from_bf16
from service.errors import InvalidTensors, TensorMismatch
from service.wire.fit import MayMiss, none_missing
from service.wire.reader import MAX_DIMS, EntryLike, Flat

BLOCK = 65536
"""Elements that are summed at a time: in the cache, and no second copy of them in memory."""
OFTEN = 512
"""Rows of one index up to which all indices take their turns together."""
SCRATCH = 4
"""Arrays as long as the indices that sorting them takes, at most."""


class Rows(NamedTuple):
    """A tensor of which some rows came, for a rule that takes them lazily.

    Attributes:
        entry: Its number in the layout.
        width: Elements of a row.
        idx: int64[k], ascending, each once.
        values: In the master dtype, [k * width].
    """

    entry: int
    width: int
    idx: Flat
    values: Flat


class Given(NamedTuple):
    """Rows as they came; `shape` is that of `values`, which are flat and in `dtype`."""

    name: str
    idx: Flat
    shape: tuple[int, ...]
    values: Flat
    dtype: str


Lazy = Callable[[EntryLike], bool]
"""Whether rows of a tensor are kept as such, for a rule that reads and writes no others."""
CheckRows = Callable[[EntryLike], None]
"""Refuses rows of a tensor whose rule can't take any."""


def never(entry: EntryLike) -> bool:
    """Says that the gradient of a tensor is wanted whole."""
    return False


def welcome(entry: EntryLike) -> None:
    """Refuses nothing."""


class Taking(NamedTuple):
    """How a session takes the tensors of a push."""

    may_miss: MayMiss = none_missing
    lazy: Lazy = never
    check_rows: CheckRows = welcome


ALL = Taking()
"""Every tensor comes, and its gradient is wanted whole."""


def width(entry: EntryLike) -> int:
    """Elements of one row."""
    return prod(entry.shape[1:])


def check_shape(
    entry: EntryLike, indices: tuple[int, ...], shape: tuple[int, ...], *, fits: bool | None = None
) -> None:
    """Requires one index for each row, and rows of the tensor's shape.

    Args:
        entry: The tensor.
        indices: Shape of the indices.
        shape: Of the rows.
        fits: Whether that shape will do; None: it must be exactly this.

    Raises:
        TensorMismatch: They are not.
    """
    name = entry.name
    if not entry.shape:
        raise TensorMismatch(
            f"{name[:80]!a} is a scalar and has no rows; send it whole, as {name[:80]!a}.",
            name=name[:200],
        )
    if len(indices) != 1:
        raise TensorMismatch(
            f"The indices of {name[:80]!a} have {len(indices)} dimensions; send a list of row "
            "numbers.",
            name=name[:200],
        )
    expected = (*indices, *entry.shape[1:])
    if not (shape == expected if fits is None else fits):
        raise TensorMismatch(
            f"The rows of {name[:80]!a} have shape {list(shape[:MAX_DIMS])} and {indices[0]} "
            f"indices make it {list(expected)}; send one row for each index.",
            name=name[:200],
            expected=list(expected),
            got=list(shape[: MAX_DIMS + 1]),
        )


def check_range(name: str, idx: Flat, size: int, what: str) -> None:
    """Requires indices from 0 to below `size`.

    Raises:
        InvalidTensors: Names the first that is none.
    """
    if not idx.size or (int(idx.min()) >= 0 and int(idx.max()) < size):
        return
    at = int(np.argmax((idx < 0) | (idx >= size)))
    raise InvalidTensors(
        f"{name[:80]!a} has the index {int(idx[at])} at position {at} and {size} {what}; indices "
        f"lie from 0 to {size - 1}, negative ones do not count from the end."
        if size
        else f"{name[:80]!a} has no {what}; send no index.",
        name=name[:200],
        position=at,
        index=int(idx[at]),
    )


def put(given: Given, entry: EntryLike, dest: Flat) -> None:
    """Writes a tensor's gradient whole: the sums of its rows, and zeros elsewhere.

    Args:
        given: Checked by `check_shape` and `check_range`.
        entry: The tensor.
        dest: Its stretch of the flat vector, in the master dtype; written in place.
    """
    dest[:] = 0
    order = _ordered(given.idx)
    if given.values.size:
        wide = width(entry)
        _sum(given, order, wide, dest.reshape(-1, wide), order.unique)


def kept(given: Given, at: int, entry: EntryLike, master: str) -> Rows:
    """The sums of a tensor's rows, by ascending index.

    Args:
        given: Checked by `check_shape` and `check_range`.
        at: The tensor's number in the layout.
        entry: The tensor.
        master: The session's dtype.
    """
    order, wide = _ordered(given.idx), width(entry)
    values = np.empty((order.unique.size, wide), NUMPY[master])
    if values.size:
        _sum(given, order, wide, values, np.arange(order.unique.size))
    return Rows(at, wide, order.unique, values.reshape(-1))


class _Order(NamedTuple):
    """Where each index occurs: positions[begins[i]:begins[i + 1]], in order of appearance."""

    unique: Flat
    positions: Flat
    begins: Flat


def _ordered(idx: Flat) -> _Order:
    positions = np.argsort(idx, kind="stable")
    ordered = idx[positions]
    begins = np.flatnonzero(np.r_[idx.size > 0, ordered[1:] != ordered[:-1]][: idx.size])
    return _Order(ordered[begins], positions, np.append(begins, idx.size))


def _sum(given: Given, order: _Order, wide: int, dest: Flat, where: Flat) -> None:
    """Writes the sum of the rows of the i-th index to dest[where[i]], for each i."""
    values = given.values.reshape(-1, wide)
    counts = np.diff(order.begins)
    with np.errstate(all="ignore"):  # an overflow is the finite check's business
        for block in _blocks(np.flatnonzero(counts == 1), wide):
            dest[where[block]] = _floats(values[order.positions[order.begins[block]]], given.dtype)
        many = np.flatnonzero(counts > 1)
        many = many[np.argsort(-counts[many], kind="stable")]
        often = int(np.count_nonzero(counts[many] > OFTEN))
        for one in many[:often]:
            mine = order.positions[order.begins[one] : order.begins[one + 1]]
            dest[where[one]] = _total(values, given.dtype, mine)
        for block in _blocks(many[often:], wide):
            dest[where[block]] = _totals(values, given.dtype, order, block, counts[block])


def _blocks(chosen: Flat, wide: int) -> Iterator[Flat]:
    rows = max(1, BLOCK // wide)
    for begin in range(0, chosen.size, rows):
        yield chosen[begin : begin + rows]


def _floats(values: Flat, dtype: str) -> Flat:
    return from_bf16(values) if dtype == "BF16" else values


def _totals(values: Flat, dtype: str, order: _Order, block: Flat, counts: Flat) -> Flat:
    """Sums of the rows of several indices, the most frequent first: each adds its next in turn."""
    begins = order.begins[block]
    total = _floats(values[order.positions[begins]], dtype).astype(np.float64)
    for turn in range(1, int(counts[0])):
        live = int(np.searchsorted(-counts, -turn))  # those that have so many
        total[:live] += _floats(values[order.positions[begins[:live] + turn]], dtype)
    return total


def _total(values: Flat, dtype: str, mine: Flat) -> Flat:
    """The sum of the rows of one index; `accumulate` adds in order, which `sum` would not."""
    total = _floats(values[mine[:1]], dtype).astype(np.float64)
    for block in _blocks(mine[1:], values.shape[1]):
        rows = np.concatenate([total, _floats(values[block], dtype)])
        total = np.add.accumulate(rows, axis=0)[-1:]
    found: Flat = total[0]
    return found
