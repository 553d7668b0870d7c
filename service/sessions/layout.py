"""Which tensor lies where in the flat vector of a session."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple


class Entry(NamedTuple):
    """One tensor of the layout; `offset` and `size` count elements of the flat vector."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Tensors in order of first upload, packed with no holes: a model is one contiguous vector."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tensors: list[tuple[str, str, tuple[int, ...]]]) -> "Layout":
        """Packs (name, dtype as uploaded, shape) in the given order."""
        entries = []
        offset = 0
        for name, dtype, shape in tensors:
            size = prod(shape)
            entries.append(Entry(name, dtype, shape, offset, size))
            offset += size
        return cls(tuple(entries))

    @cached_property
    def index(self) -> dict[str, Entry]:
        """Entries by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def size(self) -> int:
        """Elements of the flat vector."""
        return sum(entry.size for entry in self.entries)

    def name_at(self, position: int) -> tuple[str, int]:
        """The tensor that holds a flat position, and the index inside that tensor."""
        for entry in self.entries:
            if entry.offset <= position < entry.offset + entry.size:
                return entry.name, position - entry.offset
        raise IndexError(position)
