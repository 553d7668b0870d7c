"""Means that a few bad gradients can't move: order statistics of each coordinate, on the CPU.

Yin et al. 2018 (coordinate-wise median and trimmed mean). The contributions are held by whoever
calls; beside them this takes as many blocks of 64 Ki float64 as there are contributions.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.convert import stored

Array = npt.NDArray[Any]
BLOCK: Final = 1 << 16
SCRATCH: Final = 1 << 22
"""Elements that the contributions of one block may take together: 32 MiB of each thread."""
_HALF: Final = np.dtype(np.float16)


class Held(NamedTuple):
    """A contribution: factor times flat, which is of a wire dtype (BF16 and F16 as uint16)."""

    flat: Array
    dtype: str
    factor: float


@cache
def network(size: int) -> tuple[tuple[int, int], ...]:
    """Pairs whose exchange, in this order, sorts so many rows: Batcher's odd-even merge sort."""
    found = []
    p = 1
    while p < size:
        k = p
        while k >= 1:
            for j in range(k % p, size - k, 2 * k):
                for i in range(min(k, size - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        found.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(found)


def trimmed_mean(
    held: Sequence[Held], trim: float, out: Array, master: str, lo: int, hi: int
) -> None:
    """Writes the mean of each coordinate without its largest and smallest values.

    Of m values floor(trim*m) are cut at each end; the rest are added in ascending order in float64,
    divided once and rounded to the master dtype.

    Args:
        held: Finite contributions, at least one, each of [n].
        trim: In [0, 0.5).
        out: [n] of master, contiguous, written in place.
        master: F32 or F64.
        lo: first element.
        hi: one past the last element.

    Raises:
        ValueError: no contribution, wrong dtype or bounds, or trim out of range.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim is {trim} and lies in [0, 0.5)")
    cut = int(trim * len(held))
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite
        for target, rows in _sorted(held, out, master, lo, hi):
            total = np.zeros(target.size)
            for row in rows[cut : len(rows) - cut]:
                total += row
            target[:] = total / (len(rows) - 2 * cut)
            target += 0.0  # no -0, also where the rounding made one


def median(held: Sequence[Held], out: Array, master: str, lo: int, hi: int) -> None:
    """Writes the middle value of each coordinate, or the mean of the two middle ones.

    Args:
        held: As for `trimmed_mean`.
        out: Likewise.
        master: Likewise.
        lo: first element.
        hi: one past the last element.

    Raises:
        ValueError: no contribution, or wrong dtype or bounds.
    """
    middle = len(held) // 2
    with np.errstate(over="ignore", invalid="ignore"):
        for target, rows in _sorted(held, out, master, lo, hi):
            found = rows[middle]
            if len(rows) % 2 == 0:
                found = (rows[middle - 1] + found) / 2.0
            target[:] = found
            target += 0.0


def _sorted(
    held: Sequence[Held], out: Array, master: str, lo: int, hi: int
) -> Iterator[tuple[Array, list[Array]]]:
    """Block by block: where to write, and the contributions' values, ascending per coordinate."""
    if not held:
        raise ValueError("there is no contribution")
    if master not in ("F32", "F64"):
        raise ValueError(f"{master} is no dtype of a session")
    out = stored(out, master)
    flats = [stored(one.flat, one.dtype) for one in held]
    if not 0 <= lo <= hi <= min(out.size, *(flat.size for flat in flats)):
        raise ValueError(f"bounds {lo}:{hi} of {out.size}")
    pairs = network(len(held))
    size = max(1024, min(BLOCK, SCRATCH // len(held)))
    spare = np.empty(min(size, hi - lo))
    for start in range(lo, hi, size):
        end = min(start + size, hi)
        rows = [
            _wide(flat[start:end], one.dtype) * one.factor
            for flat, one in zip(flats, held, strict=True)
        ]
        least = spare[: end - start]
        for a, b in pairs:
            np.minimum(rows[a], rows[b], out=least)
            np.maximum(rows[a], rows[b], out=rows[b])
            rows[a][:] = least
        yield out[start:end], rows


def _wide(part: Array, dtype: str) -> Array:
    """The values in float64, exactly."""
    if dtype == "BF16":
        return (part.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (part.view(_HALF) if dtype == "F16" else part).astype(np.float64)
