"""Exponential averages of parameters, updated in place on the CPU."""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy.typing as npt
from numba import types

from kernels import prims
from kernels.cache import compile_cached
from kernels.convert import stored

Array = npt.NDArray[Any]

_SOURCE: Final = """
def {name}(p, average, rest, lo, hi):
    a = p[lo:hi]
    b = average[lo:hi]
    for i in range(a.size):
        b[i] = fma(rest, a[i] - b[i], b[i])
"""
_SCALAR: Final[dict[str, Any]] = {"F32": types.float32, "F64": types.float64}

_lock = threading.Lock()
_loops: dict[str, Callable[..., None]] = {}


def _loop(dtype: str) -> Callable[..., None]:
    with _lock:
        if dtype not in _loops:
            name = f"average_{dtype}"
            scope: dict[str, Any] = {"__name__": __name__, "fma": prims.fma}
            exec(compile(_SOURCE.format(name=name), f"<{name}>", "exec"), scope)
            scalar = _SCALAR[dtype]
            signature = (scalar[::1], scalar[::1], scalar, types.int64, types.int64)
            _loops[dtype] = compile_cached(scope[name], signature, nogil=True)
        return _loops[dtype]


def ema(p: Array, average: Array, decay: float, dtype: str, lo: int, hi: int) -> None:
    """Takes average += (1 - decay)*(p - average) for elements lo to hi; releases the GIL.

    As torch's ``swa_utils.get_ema_multi_avg_fn``, which is a lerp by 1 - decay (Polyak & Juditsky
    1992 averaged with equal weights).

    Args:
        p: [n] of dtype, contiguous.
        average: [n] of dtype, contiguous, updated in place; must not overlap p.
        decay: in [0, 1); at 0 the average is p.
        dtype: F32 or F64.
        lo: first element.
        hi: one past the last element.

    Raises:
        ValueError: wrong dtype, or an array that is too short or not contiguous.
    """
    p, average = stored(p, dtype), stored(average, dtype)
    if not 0 <= lo <= hi <= min(p.size, average.size):
        raise ValueError(f"bounds {lo}:{hi} for {p.size} and {average.size} elements")
    _loop(dtype)(p, average, p.dtype.type(1.0 - decay), lo, hi)


def warm(dtype: str) -> None:
    """Compiles or loads the loop of a dtype."""
    _loop(dtype)
