"""The arrays of a session, and what may be put into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from kernels.registry import Slot
from service.errors import TensorMismatch
from service.sessions.gradients import Gradients
from service.sessions.layout import Layout
from service.sessions.versions import Versions

Array = NDArray[Any]
Tensor = tuple[str, str, tuple[int, ...], Array]
"""Name, wire dtype, shape, and the flat values as they are stored in that dtype."""


class Run(NamedTuple):
    """A stretch of the flat vector whose tensors have been updated equally often."""

    lo: int
    hi: int
    updates: int


@dataclass
class Arena:
    """The arrays of a session that has parameters."""

    layout: Layout
    versions: Versions
    slots: tuple[Slot, ...]
    state: tuple[Array, ...]
    gradients: Gradients
    runs: tuple[Run, ...]
    reserved: int = field(default=0)

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        return self.layout.size


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


def check_state(
    arena: Arena, dtype: str, tensors: Sequence[Tensor], counted: Mapping[str, int]
) -> None:
    """Refuses a state that is not exactly the session's.

    Raises:
        TensorMismatch: Not every `<slot>/<tensor>` in the session's dtype and shapes, or counts
            that do not name every tensor.
    """
    shapes = {
        f"{slot.name}/{entry.name}": entry.shape
        for slot in arena.slots
        for entry in arena.layout.entries
    }
    came = {name: shape for name, _, shape, _ in tensors}
    wrong = sorted(
        {name for name in shapes.keys() | came.keys() if shapes.get(name) != came.get(name)}
        | {name for name, other, _, _ in tensors if other != dtype}
    )
    if wrong:
        raise TensorMismatch(
            f"A state has every <slot>/<tensor> of the session in {dtype}; missing, "
            f"unexpected, misshapen or of another dtype: {', '.join(map(repr, wrong[:10]))}.",
            names=wrong[:20],
        )
    if counted.keys() != arena.layout.index.keys():
        raise TensorMismatch(
            "The counts must name every tensor of the session and no other; take them from "
            "the metadata of GET state.",
            names=sorted(counted.keys() ^ arena.layout.index.keys())[:20],
        )


def counts(arena: Arena) -> dict[str, int]:
    """Updates of each tensor."""
    return {
        entry.name: next(
            run.updates
            for run in arena.runs
            if run.lo <= entry.offset and entry.offset + entry.size <= run.hi
        )
        for entry in arena.layout.entries
    }


def runs_of(layout: Layout, counted: Mapping[str, int]) -> tuple[Run, ...]:
    """Maximal stretches of layout neighbours with equal counts."""
    runs: list[Run] = []
    for entry in layout.entries:
        end = entry.offset + entry.size
        if runs and runs[-1].updates == counted[entry.name]:
            runs[-1] = runs[-1]._replace(hi=end)
        else:
            runs.append(Run(entry.offset, end, counted[entry.name]))
    return tuple(runs) or (Run(0, 0, 0),)
