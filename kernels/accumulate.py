"""Weighted sums of gradients in float64, and what a round makes of them, on the CPU.

A sum of any number of contributions is one fused multiply-add each, in the order in which they are
added, and is rounded to the session's dtype once, at its end: so a mean over shards differs from
the gradient of the whole batch by that one rounding.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import types

from kernels import prims
from kernels.cache import compile_cached
from kernels.convert import stored

Array = npt.NDArray[Any]

_ADD: Final = """
def {name}(total, g, weight, lo, hi):
    a = total[lo:hi]
    b = g[lo:hi]
    for i in range(a.size):
        a[i] = fma(weight, {widen}, a[i])
"""
_FINISH: Final = """
def {name}(total, divisor, out, lo, hi):
    a = total[lo:hi]
    b = out[lo:hi]
    for i in range(a.size):
        b[i] = {narrow}(a[i] / divisor)
"""
_WIDEN: Final = {
    "F64": "b[i]", "F32": "float64(b[i])",
    "F16": "float64(widen_f16(b[i]))", "BF16": "float64(widen_bf16(b[i]))",
}  # fmt: skip
_TYPES: Final[dict[str, Any]] = {
    "F64": types.float64, "F32": types.float32, "F16": types.uint16, "BF16": types.uint16,
}  # fmt: skip
_GLOBALS: Final[dict[str, Any]] = {
    "__name__": __name__, "fma": prims.fma, "float32": np.float32, "float64": np.float64,
    "widen_f16": prims.widen_f16, "widen_bf16": prims.widen_bf16,
}  # fmt: skip

_lock = threading.Lock()
_loops: dict[str, Callable[..., None]] = {}


def _compiled(name: str, text: str, signature: tuple[Any, ...]) -> Callable[..., None]:
    found = _loops.get(name)
    if found is not None:
        return found
    with _lock:
        if name not in _loops:
            scope = dict(_GLOBALS)
            exec(compile(text, f"<{name}>", "exec"), scope)
            _loops[name] = compile_cached(scope[name], signature, nogil=True)
        return _loops[name]


def _adding(dtype: str) -> Callable[..., None]:
    name = f"accumulate_{dtype}"
    total = types.float64[::1]
    signature = (total, _TYPES[dtype][::1], types.float64, types.int64, types.int64)
    return _compiled(name, _ADD.format(name=name, widen=_WIDEN[dtype]), signature)


def _finishing(master: str) -> Callable[..., None]:
    name = f"finish_{master}"
    narrow = "float32" if master == "F32" else "float64"
    out = _TYPES[master][::1]
    signature = (types.float64[::1], types.float64, out, types.int64, types.int64)
    return _compiled(name, _FINISH.format(name=name, narrow=narrow), signature)


def _check(sizes: Iterable[int], lo: int, hi: int) -> None:
    least = min(sizes)
    if not 0 <= lo <= hi <= least:
        raise ValueError(f"bounds {lo}:{hi} for {least} elements")


def add(total: Array, g: Array, dtype: str, weight: float, lo: int, hi: int) -> None:
    """Takes total += weight*g for elements lo to hi, each rounded once; releases the GIL.

    Args:
        total: float64[n], contiguous, updated in place.
        g: [n] of dtype, contiguous; widened exactly.
        dtype: F64, F32, F16 or BF16 (bits as uint16).
        weight: Of all elements.
        lo: first element.
        hi: one past the last element.

    Raises:
        ValueError: wrong dtype, or an array that is too short or not contiguous.
    """
    total, g = stored(total, "F64"), stored(g, dtype)
    _check((total.size, g.size), lo, hi)
    _adding(dtype)(total, g, weight, lo, hi)


def finish(total: Array, divisor: float, out: Array, master: str, lo: int, hi: int) -> None:
    """Writes total/divisor, rounded to the master dtype, for elements lo to hi; releases the GIL.

    Args:
        total: float64[n], contiguous.
        divisor: The sum of the weights for a mean; 1 for a sum.
        out: [n] of master, contiguous, written in place; what is too large for it becomes infinite.
        master: F32 or F64. The quotient is a float64 before it is rounded to F32, which is at most
            one half of the last place of a float64 away from rounding once.
        lo: first element.
        hi: one past the last element.

    Raises:
        ValueError: wrong dtype, or an array that is too short or not contiguous.
    """
    total, out = stored(total, "F64"), stored(out, master)
    if master not in ("F32", "F64"):
        raise ValueError(f"{master} is no dtype of a session")
    _check((total.size, out.size), lo, hi)
    _finishing(master)(total, divisor, out, lo, hi)


def ready(dtype: str, master: str) -> bool:
    """Tells whether a sum of gradients of this dtype would start at once, and end."""
    return f"accumulate_{dtype}" in _loops and f"finish_{master}" in _loops


def warm(dtypes: Iterable[str], master: str) -> None:
    """Compiles or loads the sums of these wire dtypes, and the end of a sum."""
    for dtype in dtypes:
        _adding(dtype)
    _finishing(master)
