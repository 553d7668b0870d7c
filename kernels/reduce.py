"""Reductions in fixed blocks of 64 Ki elements: the same bits for every chunking and thread count.

Within a block, element i is added to lane i mod 512 in float64, and the lanes are added as a fixed
tree; the blocks are added in the order of their index. For F32, F16 and BF16 the sum of squares
cannot overflow in float64, so that "the sum is finite" is "every element is finite".
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
BLOCK: Final = 1 << 16

_WIDEN: Final = {
    "F64": "{}", "F32": "float64({})",
    "F16": "float64(widen_f16({}))", "BF16": "float64(widen_bf16({}))",
}  # fmt: skip
_TYPES: Final[dict[str, Any]] = {
    "F64": types.float64, "F32": types.float32, "F16": types.uint16, "BF16": types.uint16,
}  # fmt: skip

_SOURCE: Final = """
def {name}({arrays}, lo, hi, out):
    lanes = empty(512, float64)
    for block in range(out.size):
        start = lo + block * 65536
        end = min(start + 65536, hi)
        lanes[:] = 0.0
        for row in range(start, end, 512):
            a = g[row:min(row + 512, end)]
{other}            for j in range(a.size):
                x = {widen}
                lanes[j] = fma(x, x, lanes[j])
        half = 256
        while half > 0:
            for j in range(half):
                lanes[j] = lanes[j] + lanes[half + j]
            half //= 2
        out[block] = lanes[0]
"""
_GLOBALS: Final[dict[str, Any]] = {
    "__name__": __name__, "empty": np.empty, "float64": np.float64, "fma": prims.fma,
    "widen_f16": prims.widen_f16, "widen_bf16": prims.widen_bf16,
}  # fmt: skip

_OTHER: Final = "            b = was[row:min(row + 512, end)]\n"

_lock = threading.Lock()
_loops: dict[tuple[str, bool], Callable[..., None]] = {}


def _loop(dtype: str, *, change: bool = False) -> Callable[..., None]:
    key = (dtype, change)
    found = _loops.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _loops:
            name = f"sumsq_{'change_' if change else ''}{dtype}"
            widen = _WIDEN[dtype].format("a[j]")
            text = _SOURCE.format(
                name=name,
                arrays="g, was" if change else "g",
                other=_OTHER if change else "",
                widen=f"{widen} - {_WIDEN[dtype].format('b[j]')}" if change else widen,
            )
            scope = dict(_GLOBALS)
            exec(compile(text, f"<{name}>", "exec"), scope)
            flat = _TYPES[dtype][::1]
            arrays = (flat, flat) if change else (flat,)
            signature = (*arrays, types.int64, types.int64, types.float64[::1])
            _loops[key] = compile_cached(scope[name], signature, nogil=True)
        return _loops[key]


def sumsq(g: Array, dtype: str, lo: int, hi: int) -> npt.NDArray[np.float64]:
    """Returns the sum of squares of elements lo to hi, one float64 per block; releases the GIL.

    Args:
        g: [n] of dtype, contiguous.
        dtype: F64, F32, F16 or BF16 (bits as uint16).
        lo: first element, a multiple of BLOCK.
        hi: one past the last element: a multiple of BLOCK too, or the end of the array.

    Raises:
        ValueError: wrong dtype or bounds.
    """
    g = stored(g, dtype)
    out = _room(g.size, lo, hi)
    _loop(dtype)(g, lo, hi, out)
    return out


def sumsq_change(now: Array, was: Array, dtype: str, lo: int, hi: int) -> npt.NDArray[np.float64]:
    """As `sumsq`, of the difference of two arrays of one dtype and size.

    Raises:
        ValueError: wrong dtype, sizes or bounds.
    """
    now, was = stored(now, dtype), stored(was, dtype)
    if now.size != was.size:
        raise ValueError(f"{now.size} and {was.size} elements")
    out = _room(now.size, lo, hi)
    _loop(dtype, change=True)(now, was, lo, hi, out)
    return out


def _room(size: int, lo: int, hi: int) -> npt.NDArray[np.float64]:
    """One float64 for each block, if the bounds lie on blocks."""
    if lo % BLOCK or not 0 <= lo <= hi <= size or (hi % BLOCK and hi != size):
        raise ValueError(f"bounds {lo}:{hi} of {size} are not on blocks of {BLOCK}")
    return np.empty(-(-(hi - lo) // BLOCK), np.float64)


def total(partials: Array) -> float:
    """Adds the blocks' sums in the order of their index."""
    result = 0.0
    for value in partials.tolist():
        result += value
    return result


def largest(g: Array, dtype: str) -> float:
    """Returns the size of the largest element, or NaN if one is NaN; 0 if there is none."""
    g = stored(g, dtype)
    if not g.size:
        return 0.0
    if dtype in ("F64", "F32"):
        return max(float(g.max()), -float(g.min()))
    top = np.array([max(int((g[k : k + BLOCK] & 0x7FFF).max()) for k in range(0, g.size, BLOCK))])
    if dtype == "F16":
        return float(top.astype(np.uint16).view(np.float16)[0])
    return float((top.astype(np.uint32) << 16).view(np.float32)[0])


def _finite(part: Array, dtype: str) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_]
    if dtype == "BF16":
        finite = (part & 0x7F80) != 0x7F80
    else:
        finite = np.isfinite(part.view(np.float16) if dtype == "F16" else part)
    return finite


def first_nonfinite(g: Array, dtype: str) -> int:
    """Returns the index of the first infinite or NaN element of g, or -1."""
    g = stored(g, dtype)
    for start in range(0, g.size, BLOCK):
        finite = _finite(g[start : start + BLOCK], dtype)
        if not finite.all():
            return start + int(np.argmin(finite))
    return -1


def all_finite(g: Array, dtype: str) -> bool:
    """Tells whether every element is finite: for F64, where a sum of squares can overflow."""
    return first_nonfinite(g, dtype) < 0


def ready(dtype: str) -> bool:
    """Tells whether `sumsq` would start at once."""
    return (dtype, False) in _loops


def warm(dtypes: Iterable[str]) -> None:
    """Compiles or loads the sums of squares for each wire dtype."""
    for dtype in dtypes:
        _loop(dtype)


def warm_change(dtype: str) -> None:
    """Compiles or loads `sumsq_change` for a dtype."""
    _loop(dtype, change=True)
