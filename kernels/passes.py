"""Serial passes over one tensor, of which the rules per tensor are made; compiled on first use.

Each takes flat arrays of one master dtype, float32 or float64, contiguous and of one length, and
an array of float64 coefficients, rounded to the master dtype once. Every product that is added
goes through `fma`. Nothing is checked: `kernels.tensorwise.step` does that. In a loop all loads
come before all stores and a choice is a function's: else LLVM does not vectorise it, which costs
a factor of six.
"""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import register_jitable

from kernels.cache import Loop, compile_cached
from kernels.cpu import HOLD_GIL, MASTERS
from kernels.prims import absbits, fma, load, sqrt, store

Array = npt.NDArray[Any]


def _added(factor: Any, x: Any, y: Any) -> Any:
    """Returns factor*x + y; y if the factor is 0, for 0*inf would be NaN."""
    return fma(factor, x, y) if factor != 0 else y


def _least(x: Any, floor: Any) -> Any:
    """Returns x, or floor where x is below it; NaN stays NaN."""
    return floor if x < floor else x


def scaled(x: Any, h: Any) -> None:
    """Clips x to the size of h[1], then multiplies it by h[0]."""
    kind = x.dtype.type
    factor, limit = kind(h[0]), kind(h[1])
    for i in range(x.size):
        value = load(x, i)
        value = limit if value > limit else (-limit if value < -limit else value)
        store(x, i, factor * value)


def blended(y: Any, x: Any, h: Any) -> None:
    """Takes y = h[0]*y + h[1]*x."""
    kind = y.dtype.type
    keep, take = kind(h[0]), kind(h[1])
    for i in range(y.size):
        store(y, i, fma(take, load(x, i), keep * load(y, i)))


def moved(p_in: Any, p_out: Any, r: Any, h: Any, copy: bool) -> Any:
    """Takes p = (1 + h[1])*p + h[0]*r, from p_in to p_out; tells whether all of it is finite.

    Without copy they are one array. Otherwise a block is copied and then updated while it is hot:
    a loop from one to the other would not be vectorised where they are the same.
    """
    kind = p_out.dtype.type
    step, decay = kind(h[0]), kind(h[1])
    top = absbits(kind(0))
    block = 4096 if copy else max(p_out.size, 1)
    for start in range(0, p_out.size, block):
        end = min(start + block, p_out.size)
        if copy:
            for i in range(start, end):
                store(p_out, i, load(p_in, i))
        for i in range(start, end):
            p = load(p_out, i)
            p = fma(step, load(r, i), _added(decay, p, p))
            store(p_out, i, p)
            bits = absbits(p)
            top = bits if bits > top else top
    return top < absbits(kind(np.inf))


def adapted(p: Any, g: Any, m: Any, v: Any, h: Any) -> None:
    """Advances Adam's averages m and v, and turns g into m_hat/(sqrt(v_hat) + eps) + wd*p."""
    kind = g.dtype.type
    b1, rest1, b2, rest2 = kind(h[0]), kind(h[1]), kind(h[2]), kind(h[3])
    lift, unbias, eps, wd = kind(h[4]), kind(h[5]), kind(h[6]), kind(h[7])
    for i in range(g.size):
        x = load(g, i)
        first = fma(b1, load(m, i), rest1 * x)
        second = fma(b2, load(v, i), rest2 * x * x)
        r = _added(wd, load(p, i), lift * first / fma(sqrt(second), unbias, eps))
        store(m, i, first)
        store(v, i, second)
        store(g, i, r)


def whitened(g: Any, v: Any, h: Any) -> None:
    """Takes v = h[0]*v + h[1]*g*g and g = g/sqrt(max(v, h[2]))."""
    kind = g.dtype.type
    keep, take, floor = kind(h[0]), kind(h[1]), kind(h[2])
    for i in range(g.size):
        x = load(g, i)
        value = fma(keep, load(v, i), take * x * x)
        store(v, i, value)
        store(g, i, x / sqrt(_least(value, floor)))


def factored(g: Any, rows: Any, cols: Any, sums: Any, h: Any, height: int, width: int) -> None:
    """As `whitened`, with a v that is made of the mean squares of rows and of columns.

    v[i, j] = rows[i]*cols[j]/max(mean of rows, h[3]), for each matrix of a stack.

    Args:
        g: master[k*height*width].
        rows: master[k*height].
        cols: master[k*width].
        sums: float64[width], overwritten.
        h: What rows and cols keep and take, the least v, the least mean.
        height: Of each matrix, at least 1.
        width: Of each matrix, at least 1.
    """
    kind = g.dtype.type
    keep, take, floor, least = h[0], h[1], kind(h[2]), h[3]
    for stacked in range(rows.size // height):
        for j in range(width):
            store(sums, j, 0.0)
        total = 0.0
        for i in range(stacked * height, stacked * height + height):
            row = g[i * width : i * width + width]
            for j in range(width):
                x = np.float64(load(row, j))
                store(sums, j, fma(x, x, load(sums, j)))
            value = kind(fma(keep, np.float64(rows[i]), take * _sumsq(row) / width))
            rows[i] = value
            total += np.float64(value)
        mean = _least(total / height, least)
        col = cols[stacked * width : stacked * width + width]
        for j in range(width):
            store(col, j, kind(fma(keep, np.float64(load(col, j)), take * load(sums, j) / height)))
        for i in range(stacked * height, stacked * height + height):
            row = g[i * width : i * width + width]
            # Divided first: the product of a row and a column may overflow.
            factor = kind(np.float64(rows[i]) / mean)
            for j in range(width):
                value = factor * load(col, j)
                store(row, j, load(row, j) / sqrt(_least(value, floor)))


def _sumsq(row: Any) -> Any:
    """The sum of squares in float64, in four chains: element i belongs to chain i mod 4."""
    a = b = c = d = 0.0
    whole = row.size - row.size % 4
    for j in range(0, whole, 4):
        w, x = np.float64(load(row, j)), np.float64(load(row, j + 1))
        y, z = np.float64(load(row, j + 2)), np.float64(load(row, j + 3))
        a, b, c, d = fma(w, w, a), fma(x, x, b), fma(y, y, c), fma(z, z, d)
    for j in range(whole, row.size):
        x = np.float64(load(row, j))
        a = fma(x, x, a)
    return (a + b) + (c + d)


for _part in (_added, _least, _sumsq):
    register_jitable(error_model="numpy")(_part)

Signature = Callable[[Any], tuple[Any, ...]]
_H: Final[Any] = types.float64[::1]
_SIGNATURES: Final[dict[str, Signature]] = {
    "scaled": lambda x: (x, _H),
    "blended": lambda x: (x, x, _H),
    "moved": lambda x: (x, x, x, _H, types.boolean),
    "adapted": lambda x: (x, x, x, x, _H),
    "whitened": lambda x: (x, x, _H),
    "factored": lambda x: (x, x, x, _H, _H, types.int64, types.int64),
}
_FLAT: Final[dict[str, Any]] = {"F32": types.float32[::1], "F64": types.float64[::1]}

_lock = threading.Lock()
_loops: dict[tuple[str, str, bool], Loop] = {}


def _loop(function: Callable[..., Any], master: str, *, nogil: bool) -> Loop:
    name = function.__name__
    key = (name, master, nogil)
    found = _loops.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _loops:
            signature = _SIGNATURES[name](_FLAT[master])
            _loops[key] = compile_cached(function, signature, nogil=nogil)
        return _loops[key]


def run(
    function: Callable[..., Any], arrays: tuple[Array, ...], h: tuple[float, ...], *rest: Any
) -> Any:
    """Runs a pass over arrays, of which the first says the dtype; a long one releases the GIL."""
    first = arrays[0]
    master = "F32" if first.dtype == MASTERS["F32"] else "F64"
    loop = _loop(function, master, nogil=first.size >= HOLD_GIL)
    return loop(*arrays, np.array(h, np.float64), *rest)


def warm(functions: tuple[Callable[..., Any], ...], master: str) -> None:
    """Compiles or loads both forms of each."""
    for function in functions:
        for nogil in (True, False):
            _loop(function, master, nogil=nogil)
