"""Which tensor lies where in the flat vector of a session."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor; `offset` and `size` count elements of the flat vector."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    group: int = 0


class Span(NamedTuple):
    """The entries first to last (exclusive), which are elements lo to hi of the flat vector."""

    first: int
    last: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Layout:
    """Tensors by group, inside a group in order of first upload, packed with no holes.

    So a whole model, and each group of it, is one contiguous vector.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(
        cls, tensors: Sequence[tuple[str, str, tuple[int, ...]]], groups: Sequence[int] = ()
    ) -> "Layout":
        """Packs (name, dtype as uploaded, shape), each in its group; all in group 0 by default."""
        members = list(groups) or [0] * len(tensors)
        entries = []
        offset = 0
        for at in sorted(range(len(tensors)), key=members.__getitem__):  # stable inside a group
            name, dtype, shape = tensors[at]
            entries.append(Entry(name, dtype, shape, offset, prod(shape), members[at]))
            offset += entries[-1].size
        return cls(tuple(entries))

    def extended(self, tensors: Sequence[tuple[str, str, tuple[int, ...]]], group: int) -> "Layout":
        """This layout and behind it more tensors, in a group that comes after all others."""
        more = Layout.of(tensors, [group] * len(tensors)).entries
        moved = (entry._replace(offset=entry.offset + self.size) for entry in more)
        return Layout((*self.entries, *moved))

    @cached_property
    def index(self) -> dict[str, Entry]:
        """Entries by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def size(self) -> int:
        """Elements of the flat vector."""
        return sum(entry.size for entry in self.entries)

    def span(self, group: int) -> Span:
        """Where a group lies; empty, at its place, if it has no tensors."""
        first = sum(entry.group < group for entry in self.entries)
        last = first + sum(entry.group == group for entry in self.entries)
        lo = sum(entry.size for entry in self.entries[:first])
        return Span(first, last, lo, lo + sum(e.size for e in self.entries[first:last]))

    def name_at(self, position: int) -> tuple[str, int]:
        """The tensor that holds a flat position, and the index inside that tensor."""
        filled = [entry for entry in self.entries if entry.size]
        at = bisect_right(filled, position, key=lambda entry: entry.offset) - 1
        if at < 0 or position >= filled[at].offset + filled[at].size:
            raise IndexError(position)
        return filled[at].name, position - filled[at].offset
