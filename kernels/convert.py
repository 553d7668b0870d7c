"""Conversion between F64, F32, F16 and BF16 arrays, rounded once to nearest even.

F16 and BF16 arrays are uint16 bits (F16 may come as float16). From F64 to 16 bits the value is
first rounded to odd in float32, so that the second rounding gives what a single one would.
"""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import types

from kernels import prims
from kernels.cache import compile_cached

Array = npt.NDArray[Any]

_TYPES: Final[dict[str, Any]] = {
    "F64": types.float64, "F32": types.float32, "F16": types.uint16, "BF16": types.uint16,
}  # fmt: skip
_STORED: Final = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32),
    "F16": np.dtype(np.uint16), "BF16": np.dtype(np.uint16),
}  # fmt: skip
_WIDEN: Final = {"F64": "{}", "F32": "{}", "F16": "widen_f16({})", "BF16": "widen_bf16({})"}
_NARROW: Final = {
    "F64": "float64({})", "F32": "float32({})",
    "F16": "narrow_f16({})", "BF16": "narrow_bf16({})",
}  # fmt: skip

_SOURCE: Final = """
def {name}(src, dst, lo, hi):
    a = src[lo:hi]
    b = dst[lo:hi]
    none = {zero}
    top = none
    for i in range(a.size):
        x = {widen}
        y = {narrow}
        b[i] = y
        bits = absbits({back}) if absbits(x) < {finite} else none
        top = bits if bits > top else top
    return top < {infinity}
"""

_GLOBALS: Final[dict[str, Any]] = {
    "__name__": __name__, "absbits": prims.absbits, "round_odd": prims.round_odd,
    "widen_f16": prims.widen_f16, "widen_bf16": prims.widen_bf16,
    "narrow_f16": prims.narrow_f16, "narrow_bf16": prims.narrow_bf16,
    "float32": np.float32, "float64": np.float64, "int32": np.int32, "int64": np.int64,
}  # fmt: skip

_lock = threading.Lock()
_loops: dict[tuple[str, str], Callable[..., bool]] = {}


def _literal(dtype: str) -> str:
    return "int64(0x7FF0000000000000)" if dtype == "F64" else "int32(0x7F800000)"


def _loop(source: str, target: str) -> Callable[..., bool]:
    key = (source, target)
    found = _loops.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _loops:
            name = f"convert_{source}_{target}"
            small = source == "F64" and target in ("F16", "BF16")
            text = _SOURCE.format(
                name=name,
                widen=_WIDEN[source].format("a[i]"),
                narrow=_NARROW[target].format("round_odd(x)" if small else "x"),
                back=_WIDEN[target].format("y"),
                finite=_literal(source),
                infinity=_literal(target),
                zero="int64(0)" if target == "F64" else "int32(0)",
            )
            scope = dict(_GLOBALS)
            exec(compile(text, f"<{name}>", "exec"), scope)
            signature = (_TYPES[source][::1], _TYPES[target][::1], types.int64, types.int64)
            _loops[key] = compile_cached(scope[name], signature, nogil=True)
        return _loops[key]


def stored(array: Array, dtype: str) -> Array:
    """Returns array as it is stored in loops: float16 seen as uint16.

    Raises:
        ValueError: array is not a contiguous array of dtype.
    """
    if dtype == "F16" and array.dtype == np.float16:
        array = array.view(np.uint16)
    if array.dtype != _STORED[dtype] or not array.flags.c_contiguous:
        raise ValueError(f"needs a contiguous array of {dtype}, got {array.dtype}")
    return array


def convert(src: Array, src_dtype: str, dst: Array, dst_dtype: str, lo: int, hi: int) -> bool:
    """Converts elements lo to hi of src into the same places of dst, releasing the GIL.

    Args:
        src: [n] of src_dtype, contiguous.
        src_dtype: F64, F32, F16 or BF16.
        dst: [n] of dst_dtype, contiguous; must not overlap src.
        dst_dtype: F64, F32, F16 or BF16; values round to nearest even.
        lo: first element.
        hi: one past the last element.

    Returns:
        True iff no finite value became infinite.

    Raises:
        ValueError: wrong dtype, or an array that is too short or not contiguous.
    """
    src, dst = stored(src, src_dtype), stored(dst, dst_dtype)
    if not 0 <= lo <= hi <= min(src.size, dst.size):
        raise ValueError(f"bounds {lo}:{hi} for {src.size} and {dst.size} elements")
    if src_dtype == dst_dtype:
        dst[lo:hi] = src[lo:hi]
        return True
    return bool(_loop(src_dtype, dst_dtype)(src, dst, lo, hi))


def warm(src_dtype: str, dst_dtype: str) -> None:
    """Compiles or loads the loop from one dtype to another; between equal ones there is none."""
    if src_dtype != dst_dtype:
        _loop(src_dtype, dst_dtype)
