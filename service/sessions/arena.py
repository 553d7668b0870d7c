"""The arrays of a session, group by group, and how they are made."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradpost.protocol.dtypes import DTYPES, NUMPY
from kernels.registry import RULES, Rule, Slot
from service.errors import TensorMismatch
from service.limits import Budget
from service.schemas import Group, Terms, Update
from service.sessions.gradients import Gradients
from service.sessions.layout import Entry, Layout, Span
from service.sessions.runs import Run, whole
from service.sessions.versions import Versions
from service.settings import Settings

Array = NDArray[Any]
Tensor = tuple[str, str, tuple[int, ...], Array]
"""Name, wire dtype, shape, and the flat values as they are stored in that dtype."""


MATCHES = 100_000_000
"""Characters of patterns times characters of names that a creation may match: some seconds at
worst."""


class Piece(NamedTuple):
    """The part of a state array that belongs to one tensor; it begins at `offset`."""

    slot: str
    entry: Entry
    array: Array
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the part."""
        return prod(self.shape)

    @property
    def flat(self) -> Array:
        """The part alone."""
        return self.array[self.offset : self.offset + self.size]


@dataclass
class Ruled:
    """One group: its stretch of the flat vector, its rule, and its state.

    Attributes:
        rule: The update rule.
        slots: What it keeps.
        state: One array for each slot: the parts of the group's tensors, in their order. Under an
            elementwise rule it has the group's own length.
        span: Where the group lies.
        runs: Its tensors by how often they were updated.
    """

    rule: Rule
    slots: tuple[Slot, ...]
    state: tuple[Array, ...]
    span: Span
    runs: tuple[Run, ...]

    def pieces(self, layout: Layout) -> list[Piece]:
        """Every (slot, tensor), slot by slot; a slot may have no part for some tensors."""
        found: list[Piece] = []
        for slot, array in zip(self.slots, self.state, strict=True):
            offset = 0
            for entry in layout.entries[self.span.first : self.span.last]:
                shape = slot.shape(entry.shape)
                if shape is not None:
                    found.append(Piece(slot.name, entry, array, offset, shape))
                    offset += found[-1].size
        return found


@dataclass
class Arena:
    """The arrays of a session that has parameters.

    Attributes:
        layout: Which tensor lies where.
        versions: The parameters.
        groups: The default group first.
        gradients: Buffers for pushes.
        average: The exponential average of the parameters, if one is kept.
        total: The weighted sum of the open round, float64; None where rounds hold contributions,
            or there are none.
        reduced: The gradient of a round; None where there are none.
        reserved: Bytes of the budget that all this was reckoned at.
    """

    layout: Layout
    versions: Versions
    groups: tuple[Ruled, ...]
    gradients: Gradients
    average: Array | None
    total: Array | None
    reduced: Array | None
    reserved: int

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        return self.layout.size

    @property
    def state(self) -> tuple[Array, ...]:
        """All state arrays."""
        return tuple(array for group in self.groups for array in group.state)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, in layout order."""
        return tuple(run for group in self.groups for run in group.runs)

    def pieces(self) -> list[Piece]:
        """Every state array, tensor by tensor; the average is among them."""
        found = [piece for group in self.groups for piece in group.pieces(self.layout)]
        if self.average is not None:
            average = self.average
            found += [Piece("ema", e, average, e.offset, e.shape) for e in self.layout.entries]
        return found


def make(
    layout: Layout,
    terms: Sequence[Terms],
    dtype: str,
    *,
    average: bool,
    copied: bool,
    rounds: Update,
    settings: Settings,
    budget: Budget,
) -> Arena:
    """Reserves what a session of this layout needs, then makes it.

    Args:
        layout: Which tensor lies where.
        terms: Of each group.
        dtype: Of parameters and state.
        average: Whether an average of the parameters is kept.
        copied: Whether all of it is copied now and then, for snapshots.
        rounds: Whether there are rounds, and what they keep.
        settings: How many versions there may be.
        budget: Is asked for all of it.

    Raises:
        TensorMismatch: A tensor that the rule of its group can't take.
        InsufficientMemory: The budget has no room.
    """
    flat_bytes = layout.size * DTYPES[dtype]
    spans = [layout.span(index) for index in range(len(terms))]
    rules = [RULES[one.optimizer.rule] for one in terms]
    tensors = [layout.entries[span.first : span.last] for span in spans]
    for rule, entries in zip(rules, tensors, strict=True):
        _check_dims(rule, entries)
    slots = [rule.slots(one.hyper) for rule, one in zip(rules, terms, strict=True)]
    sizes = [
        [_elements(slot, entries) for slot in kept]
        for kept, entries in zip(slots, tensors, strict=True)
    ]
    state_bytes = sum(map(sum, sizes)) * DTYPES[dtype]
    # Two versions (the head and a spare), one gradient in flight, the average, the state; and for
    # a snapshot a copy of one version, the average and the state.
    reserved = flat_bytes * (3 + average) + state_bytes
    reserved += copied * (flat_bytes * (1 + average) + state_bytes)
    # A round: its gradient, and the sum of its contributions or, to be held, all of them.
    has_rounds = rounds.mode == "sync"
    sums = has_rounds and not rounds.holds
    held = (rounds.workers or 0) if rounds.holds else 0
    reserved += has_rounds * flat_bytes + sums * layout.size * 8 + held * flat_bytes
    budget.reserve(reserved)
    kind = np.dtype(NUMPY[dtype])
    try:
        groups = tuple(
            Ruled(rule, kept, tuple(map(_filled, kept, size, repeat(kind))), span, whole(span))
            for rule, span, kept, size in zip(rules, spans, slots, sizes, strict=True)
        )
        return Arena(
            layout,
            Versions(layout.size, kind, settings.max_versions, budget, layout),
            groups,
            Gradients(flat_bytes, budget, 1 + held),
            np.zeros(layout.size, kind) if average else None,
            np.zeros(layout.size) if sums else None,
            np.zeros(layout.size, kind) if has_rounds else None,
            reserved,
        )
    except BaseException:
        budget.release(reserved)
        raise


def _check_dims(rule: Rule, entries: Sequence[Entry]) -> None:
    wrong = [e for e in entries if rule.dims is not None and len(e.shape) != rule.dims]
    if wrong:
        raise TensorMismatch(
            f"{wrong[0].name!r} has shape {list(wrong[0].shape)}, and rule {rule.name} takes "
            f"tensors of {rule.dims} dimensions only; put it into a group with another rule, such "
            "as adamw.",
            names=[entry.name for entry in wrong[:20]],
        )


def _elements(slot: Slot, entries: Sequence[Entry]) -> int:
    """Of a group's array for a slot."""
    shapes = [slot.shape(entry.shape) for entry in entries]
    return sum(prod(shape) for shape in shapes if shape is not None)


def _filled(slot: Slot, size: int, kind: "np.dtype[Any]") -> Array:
    """A state array before the first update; what starts at lr is filled by that update."""
    return np.full(size, slot.initial or 0.0, kind)


def members(groups: Sequence[Group], names: Sequence[str]) -> list[int]:
    """The group of each tensor: 0 is the default one, n + 1 is groups[n].

    A group names tensors, or patterns with `*`, `?` and `[ ]`; a name that is a tensor's own is
    never a pattern.

    Raises:
        TensorMismatch: A tensor that two groups name, or a name or pattern that no tensor has.
    """
    known = set(names)
    found = dict.fromkeys(names, 0)
    patterns = {p for group in groups for p in group.params if p not in known}
    if sum(map(len, patterns)) * sum(map(len, names)) > MATCHES:
        raise TensorMismatch(
            f"{len(patterns)} patterns for {len(names)} tensors are too many to match; name the "
            "tensors, or write shorter patterns."
        )
    for index, group in enumerate(groups):
        for pattern in dict.fromkeys(group.params):
            matched = [pattern] if pattern in known else fnmatch.filter(names, pattern)
            if not matched:
                raise TensorMismatch(
                    f"{pattern!r} of groups.{index} names no tensor of the upload; name those it "
                    "has, or leave it out.",
                    names=[pattern[:200]],
                )
            for name in matched:
                if found[name] not in (0, index + 1):
                    raise TensorMismatch(
                        f"{name!r} belongs to groups.{found[name] - 1} and to groups.{index}; a "
                        "tensor has one group.",
                        names=[name],
                    )
                found[name] = index + 1
    return [found[name] for name in names]


def check_known(layout: Layout, tensors: Sequence[Tensor]) -> None:
    """Refuses an upload whose names or shapes the layout does not have.

    Raises:
        TensorMismatch: The first that does not fit.
    """
    for name, _, shape, _ in tensors:
        entry = layout.index.get(name)
        if entry is None or entry.shape != shape:
            what = (
                "is not one of the session's tensors"
                if entry is None
                else (f"has shape {list(shape)} and the session's has {list(entry.shape)}")
            )
            raise TensorMismatch(
                f"{name!r} {what}; the first upload fixed the layout.", names=[name]
            )


def by_entry(arena: Arena) -> list[Run]:
    """For each entry of the layout, the run it belongs to."""
    return [run for run in arena.runs for _ in range(run.first, run.last)]


def counts(arena: Arena) -> dict[str, int]:
    """Updates of each tensor."""
    return {
        entry.name: run.updates
        for entry, run in zip(arena.layout.entries, by_entry(arena), strict=True)
    }
