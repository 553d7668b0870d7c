"""Pushes of which some tensors came as rows alone, for rules that are lazy (docs/optimizers.md).

The rows lie beside the flat gradient, whose elements at those tensors, and at tensors that did not
come, are garbage that nothing may read. All that is done with such a push costs what came of it,
whatever the size of the tensors.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import NUMPY
from kernels import rows as by_row
from service.errors import SparseUnsupported
from service.hyper import LAZY
from service.schemas import Terms
from service.sessions.arena import Arena, Array
from service.sessions.layout import Entry, Layout
from service.wire.reader import EntryLike
from service.wire.rows import Rows

if TYPE_CHECKING:
    from service.sessions.pushes import Gradient
    from service.sessions.records import Push
    from service.sessions.session import Session

MODES: frozenset[str] = frozenset({"async", "bounded"})
"""Modes that apply each push by itself: a round adds up whole gradients."""
MOST_ROWS = 1 << 32
"""A log numbers rows in 32 bits, so that no push takes more of it than the dense gradient does."""
_WHOLE, _ABSENT = -1, -2


class Stretch(NamedTuple):
    """Elements of a gradient that lie side by side: neighbouring tensors, or the rows of one.

    Attributes:
        group: Whose tensors they are.
        values: The elements.
        lo: Where the tensors begin in the flat vector; of rows, where their tensor does.
        rows: Which rows they are, if they are rows.
    """

    group: int
    values: Array
    lo: int
    rows: Rows | None

    def name_at(self, layout: Layout, at: int) -> tuple[str, int]:
        """The tensor of one of the elements, and its flat index inside that tensor."""
        if self.rows is None:
            return layout.name_at(self.lo + at)
        row, rest = divmod(at, self.rows.width)
        index = int(self.rows.idx[row]) * self.rows.width + rest
        return layout.entries[self.rows.entry].name, index


# What may come as rows


def has_lazy_form(session: "Session", entry: EntryLike) -> bool:
    """Whether the rule of a tensor may take rows alone, whether or not it does so now."""
    return session.terms[getattr(entry, "group", 0)].optimizer.rule in LAZY


def check_rows(session: "Session", entry: EntryLike, terms: Sequence[Terms] | None = None) -> bool:
    """Refuses rows of a tensor whose rule, or the session's update mode, has no use for them.

    Args:
        session: Which the push is for.
        entry: Of its layout; rows of it came.
        terms: What holds in this update; None: what holds in the session.

    Returns:
        Whether the rows are taken lazily; else they are the gradient of the whole tensor, which is
        0 in all other rows.

    Raises:
        SparseUnsupported: Send the tensor dense.
    """
    one = (terms or session.terms)[getattr(entry, "group", 0)]
    rule, mode = one.optimizer.rule, session.spec.update.mode
    if rule not in LAZY:
        raise SparseUnsupported(
            f"Rows of {entry.name!r} came, and rule {rule} of its group {one.name!r} updates whole "
            f"tensors only; send the tensor dense or as topk, or use {', '.join(sorted(LAZY))}.",
            tensor=entry.name,
            rule=rule,
        )
    if not one.hyper["lazy"]:
        return False
    if mode not in MODES:
        raise SparseUnsupported(
            f"Rows of {entry.name!r} came, and a round of mode {mode} has no lazy updates; set "
            f"lazy false in group {one.name!r}, or send the tensor dense.",
            tensor=entry.name,
            mode=mode,
        )
    if entry.shape[0] >= MOST_ROWS:
        raise SparseUnsupported(
            f"{entry.name!r} has {entry.shape[0]} rows, and lazy updates know less than "
            f"{MOST_ROWS}; set lazy false, or split the tensor.",
            tensor=entry.name,
        )
    return True


def settled(arena: Arena, terms: Sequence[Terms], gradient: "Gradient") -> "Gradient":
    """A push as the rules of now take it: they may have ceased to be lazy while it came."""
    entries = arena.layout.entries

    def stays(rows: Rows) -> bool:
        one = terms[entries[rows.entry].group]
        return rows.width > 0 and (one.frozen or bool(one.hyper.get("lazy")))

    kept = tuple(rows for rows in gradient.rows if stays(rows))
    return gradient if len(kept) == len(gradient.rows) else scattered(arena, gradient, kept)


def scattered(arena: Arena, gradient: "Gradient", kept: tuple[Rows, ...] = ()) -> "Gradient":
    """A push whose rows, but for some, are in the flat vector: it is written.

    Where no rows are left, there are zeros for what did not come.

    Args:
        arena: Of the session.
        gradient: Its vector is its own.
        kept: Those of its rows that stay beside it.
    """
    held = {rows.entry for rows in kept}
    for rows in gradient.rows:
        entry = arena.layout.entries[rows.entry]
        if rows.entry in held or not entry.size:
            continue
        table = gradient.flat[entry.offset : entry.offset + entry.size].reshape(-1, rows.width)
        table[:] = 0
        table[rows.idx] = rows.values.reshape(-1, rows.width)
    if not kept and gradient.present is not None:
        for entry, came in zip(arena.layout.entries, gradient.present, strict=False):
            if not came:
                gradient.flat[entry.offset : entry.offset + entry.size] = 0
    return gradient._replace(rows=kept)


# What a push covers


def stretches(
    arena: Arena,
    terms: Sequence[Terms],
    flat: Array,
    present: Sequence[bool] | None = None,
    rows: Sequence[Rows] = (),
) -> list[Stretch]:
    """What counts of a gradient, in layout order: nothing that is frozen.

    Without rows that is the whole of each group, with zeros for what did not come; with rows it is
    only what came.
    """
    found = []
    for index, (group, one) in enumerate(zip(arena.groups, terms, strict=True)):
        span = group.span
        if one.frozen:
            continue
        if rows:
            cut = _cut(arena.layout.entries, (span.first, span.last), flat, present, rows)
            found += [Stretch(index, *piece) for piece in cut]
        elif span.hi > span.lo:
            found.append(Stretch(index, flat[span.lo : span.hi], span.lo, None))
    return found


def dense(
    entries: Sequence[Entry], flat: Array, present: Sequence[bool] | None, rows: Sequence[Rows]
) -> list[Array]:
    """What came of the flat vector, frozen or not, in layout order: all but the rows."""
    cut = _cut(entries, (0, len(entries)), flat, present, rows)
    return [values for values, _, taken in cut if taken is None]


def _cut(
    entries: Sequence[Entry],
    span: tuple[int, int],
    flat: Array,
    present: Sequence[bool] | None,
    rows: Sequence[Rows],
) -> Iterator[tuple[Array, int, Rows | None]]:
    """The elements that came of some entries, none of them empty: (values, offset, rows)."""
    taken = {one.entry: one for one in rows}

    def kind(at: int) -> int:
        if at in taken:
            return at
        return _WHOLE if present is None or present[at] else _ABSENT

    for what, members in groupby(range(*span), kind):
        at = list(members)
        lo, end = entries[at[0]].offset, entries[at[-1]]
        one = taken.get(what)
        values = flat[lo : end.offset + end.size] if one is None else one.values
        if what != _ABSENT and values.size:
            yield values, lo, one


def work(arena: Arena, terms: Sequence[Terms], gradient: "Gradient") -> int:
    """About how many elements' work a push is: what came of it, where nothing else is touched.

    Something else is where rows turn out to be no lazy ones, where a group came meanwhile, and
    where readers hold the parameters, of which each tensor is then copied whole.
    """
    entries, rows = arena.layout.entries, gradient.rows
    lazy = all(terms[entries[one.entry].group].hyper.get("lazy") for one in rows)
    is_old = gradient.flat.size != arena.size or (
        gradient.present is not None and len(gradient.present) != len(entries)
    )
    if not rows or not lazy or is_old or arena.versions.head.holders:
        return arena.size
    return touched(entries, gradient)


def touched(entries: Sequence[Entry], gradient: "Gradient") -> int:
    """The elements that came: all where no rows did; a row counts as a cache line at least."""
    if not gradient.rows:
        return int(gradient.flat.size)
    whole = dense(entries, gradient.flat, gradient.present, gradient.rows)
    some = sum(by_row.cost(one.idx.size, one.width) for one in gradient.rows)
    return some + sum(values.size for values in whole)


# In a log


def live(arena: Arena, terms: Sequence[Terms], rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """The rows that are not frozen."""
    entries = arena.layout.entries
    return tuple(one for one in rows if not terms[entries[one.entry].group].frozen)


def payload(arena: Arena, terms: Sequence[Terms], gradient: "Gradient") -> Iterator[Array]:
    """What a log keeps of a push, in its order; an iterator, for it may have to compute.

    Without rows the flat vector as it is. With rows what an update reads of it, in layout order,
    and then for each tensor of rows their numbers (`_numbers`) and their values.
    """
    if not gradient.rows:
        yield gradient.flat
        return
    found = stretches(arena, terms, gradient.flat, gradient.present, gradient.rows)
    yield from (one.values for one in found if one.rows is None)
    for rows in live(arena, terms, gradient.rows):
        yield _numbers(rows.idx, arena.layout.entries[rows.entry].shape[0])
        yield rows.values


def _numbers(idx: Array, count: int) -> Array:
    """The numbers of the rows that came, or of those that did not: whichever are fewer."""
    return (idx if 2 * idx.size <= count else _others(idx, count)).astype("<u4")


def _others(idx: Array, count: int) -> Array:
    others = np.ones(count, np.bool_)
    others[idx] = False
    return np.flatnonzero(others)


def unlogged(layout: Layout, push: "Push", data: memoryview) -> tuple[Array, tuple[Rows, ...]]:
    """The gradient and the rows of a record, in memory of their own.

    Args:
        layout: Of the session when the record was made.
        push: Its facts, rows among them.
        data: What `payload` gave.

    Raises:
        ValueError: It has another length than its facts say.
    """
    kind, rows_of = np.dtype(NUMPY[push.dtype]), push.rows or ()
    taken = {entry for entry, _ in rows_of}
    flat = np.empty(layout.size, kind)  # only what is filled takes memory
    if push.skipped is not None:  # nobody reads it
        return flat, ()
    take = _Taker(data)
    for at in (at for part in push.parts for at in range(part.first, part.last)):
        if at not in taken:
            entry = layout.entries[at]
            flat[entry.offset : entry.offset + entry.size] = take(entry.size, kind)
    found = []
    for at, count in rows_of:
        rows, size = layout.entries[at].shape[0], layout.entries[at].size
        fewer = take(min(count, rows - count), np.dtype("<u4")).astype(np.int64)
        idx = fewer if 2 * count <= rows else _others(fewer, rows)
        found.append(Rows(at, size // rows, idx, take(count * (size // rows), kind)))
    take.end()
    return flat, tuple(found)


class _Taker:
    """Takes arrays off bytes, one behind the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def __call__(self, size: int, kind: np.dtype[Any]) -> Array:
        begin, self._at = self._at, self._at + size * kind.itemsize
        # a copy, for the bytes may not be aligned
        return np.frombuffer(bytearray(self._data[begin : self._at]), kind)

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data)} bytes of gradient and not {self._at}")
