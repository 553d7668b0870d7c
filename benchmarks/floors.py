"""What the machine allows at best: a bare read-modify-write of an update's bytes."""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels import cpu
from kernels.pool import Pool

Array = npt.NDArray[Any]


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _touch(a: Array, b: Array, c: Array, g: Array, nothing: Any) -> None:
    for i in range(a.size):
        x = g[i] * nothing
        a[i] += x
        b[i] += x
        c[i] += x


def spread(work: Callable[[int, int], object], size: int) -> Generator[Sequence[Any], Any, None]:
    """A program that runs work(lo, hi) over the chunks of size elements."""
    yield [lambda lo=lo, hi=hi: work(lo, hi) for lo, hi in cpu.chunks(0, size)]


def seconds(call: Callable[[], object], repeat: int = 1) -> float:
    """Wall seconds of one call, over repeat calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def touching(arrays: Sequence[Array], g: Array, pool: Pool) -> Callable[[], object]:
    """A call that moves the bytes of an update with three arrays, and changes nothing.

    Args:
        arrays: three of float32[n], each read and written.
        g: float32[n], read. So 28 bytes per element are moved.
        pool: runs the chunks.
    """
    a, b, c = arrays
    nothing = np.float32(0)

    def part(lo: int, hi: int) -> None:
        _touch(a[lo:hi], b[lo:hi], c[lo:hi], g[lo:hi], nothing)

    part(0, 1)
    return lambda: pool.run(spread(part, g.size))


def bandwidth(size: int = 50_000_000, threads: int | None = None, repeat: int = 7) -> float:
    """Returns the best read-modify-write bandwidth of this machine, in bytes per second."""
    pool = Pool(threads)
    try:
        a, b, c, g = (np.ones(size, np.float32) for _ in range(4))
        call = touching((a, b, c), g, pool)
        call()
        return 28 * size / min(seconds(call) for _ in range(repeat))
    finally:
        pool.close()
