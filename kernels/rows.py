"""Loops over some rows of a tensor: the rule's own scalar function, and nothing else is touched.

A row is `width` neighbouring elements of the parameters and of each state array; its gradient lies
packed behind the one before it. Every element is computed as the dense loop of `kernels.cpu`
computes it, to the bit, so that the digests of that loop are those of this one too. As there, a
loop is serial and releases the GIL, a twin that keeps it serves small numbers, and the caller
splits the rows with `chunks`.
"""

import threading
from typing import Final

import numpy as np
from numba import types

from kernels import cpu
from kernels.cache import Loop
from kernels.cpu import ALONE, HOLD_GIL, MASTERS, SCALAR, Array
from kernels.registry import COEFFICIENTS

VARIANTS: Final = ("sgd", "adagrad", "adam")
"""Scalar functions that leave an element without gradient as it is, but for averages that would
fade: what it means to update some rows only is clear for these."""
LINE: Final = 16
"""A row costs as much as this many elements at least: a cache line of each array."""

_SOURCE: Final = """
def {name}(p, g, {slots}idx, h, width, lo, hi):
    if not ({sound}) or h.size != {count} or not 0 <= lo <= hi <= idx.size or width < 1:
        return -1
    rows, last = p.size // width, int64(-1)
    for r in range(lo, hi):
        row = load(idx, r)
        if row <= last or row >= rows:
            return -1
        last = row
    if g.size // width < hi:
        return -1
    c = ({coefficients})
    limit = h[h.size - 1]
    top = {top}(0)
    for r in range(lo, hi):
        at, start = load(idx, r) * width, r * width
        for j in range(width):
            i = at + j
            new = {rule}(load(p, i), {gradient}, {olds}c)
            store(p, i, new[0])
{stores}
            bits = absbits(new[0])
            top = bits if bits > top else top
    return 1 if top < {top}({infinity}) else 0
"""
_SOUND: Final = "{0}.size == p.size and ({0}.strides[0] == {0}.itemsize or {0}.size < 2)"


def _compile(variant: str, master: str, *, clamped: bool, nogil: bool) -> Loop:
    name = f"rows_{variant}_{master}{'_clamped' if clamped else ''}{'' if nogil else '_gil'}"
    slots = cpu.slot_names(variant)
    source = _SOURCE.format(
        name=name,
        gradient="clamp(load(g, start + j), limit)" if clamped else "load(g, start + j)",
        sound=" and ".join(_SOUND.format(array) for array in ("p", *slots)),
        count=COEFFICIENTS[variant] + clamped,
        **cpu.spelt(variant, master),
    )
    flat = SCALAR[master][::1]
    signature = (
        *(flat, flat), *([flat] * len(slots)),
        *(types.int64[::1], flat, types.int64, types.int64, types.int64),
    )  # fmt: skip
    return cpu.compile_loop(name, source, signature, nogil=nogil)


class Kernel:
    """One rule's loop over rows for one master dtype. Get it from `kernel`."""

    def __init__(self, variant: str, master: str, *, clamped: bool = False) -> None:
        """Compiles both forms, or loads them from the disk cache."""
        if variant not in VARIANTS:
            raise ValueError(f"{variant} has no loop over rows")
        self.variant, self.master = variant, master
        self._kind = MASTERS[master]
        self._slots = cpu.slot_count(variant)
        self._free = _compile(variant, master, clamped=clamped, nogil=True)
        self._held = _compile(variant, master, clamped=clamped, nogil=False)

    def __call__(
        self,
        p: Array,
        g: Array,
        slots: tuple[Array, ...],
        h: Array,
        idx: Array,
        width: int,
        lo: int,
        hi: int,
    ) -> bool:
        """Updates rows idx[lo:hi] of p and of each slot, in place.

        Args:
            p: master[n * width], the parameters of a tensor.
            g: master[idx.size * width], the gradients of its rows, one behind the other.
            slots: master[n * width] each, in the order of the rule's slots.
            h: master[k], as for `cpu.Kernel`.
            idx: int64, the numbers of the rows, ascending and unique from lo to hi.
            width: elements of a row, at least 1.
            lo: first place in idx.
            hi: one past the last.

        Returns:
            True iff every parameter written is finite.

        Raises:
            ValueError: wrong dtype, number of slots or coefficients, an array that is too short or
                not contiguous, or rows that there are not. Nothing was written.
        """
        if any(array.dtype != self._kind for array in (p, g, h, *slots)) or idx.dtype != np.int64:
            raise ValueError(f"{self.variant}: needs arrays of {self._kind}, and int64 for rows")
        if len(slots) != self._slots or not all(a.flags.c_contiguous for a in (g, h, idx)):
            raise ValueError(f"{self.variant}: {len(slots)} slots, or an array with gaps")
        loop = self._held if (hi - lo) * width < HOLD_GIL else self._free
        outcome = loop(p, g, *slots, idx, h, width, lo, hi)
        if outcome < 0:
            raise ValueError(f"{self.variant}: no such rows, or arrays that do not fit together")
        return outcome == 1  # type: ignore[no-any-return]


_lock = threading.Lock()
_kernels: dict[tuple[str, str, bool], Kernel] = {}


def kernel(variant: str, master: str, *, clamped: bool = False) -> Kernel:
    """Returns the loop over rows of a scalar function, compiled on first use, once whoever asks.

    Args:
        variant: one of `VARIANTS`.
        master: dtype of parameters, state and gradients, F32 or F64.
        clamped: clip the gradient by value before the rule sees it.
    """
    key = (variant, master, clamped)
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = Kernel(variant, master, clamped=clamped)
    return found


def ready(variant: str, master: str, *, clamped: bool = False) -> bool:
    """Tells whether `kernel` would answer at once."""
    return (variant, master, clamped) in _kernels


def cost(count: int, width: int) -> int:
    """Returns how many elements' work so many rows are."""
    return count * max(width, LINE)


def chunks(count: int, width: int) -> list[tuple[int, int]]:
    """Splits the rows 0:count into parts of about 512 Ki elements' work; one if they are few."""
    if cost(count, width) < ALONE:
        return [(0, count)]
    size = max(ALONE // max(width, LINE), 1)
    return [(lo, min(lo + size, count)) for lo in range(0, count, size)]
