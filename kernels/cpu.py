"""Loops over flat arrays on the CPU, compiled from the rules on first use and cached on disk.

A loop is serial and releases the GIL; the caller splits an array with `chunks` and runs the parts
in a `kernels.pool.Pool`. Every element is computed by itself, so that the bits do not depend on
the split. A twin that keeps the GIL serves small arrays: beside a busy Python thread, winning the
GIL back costs up to a whole switch interval (5 ms by default), a thousand times the work itself.
"""

import threading
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import register_jitable

from kernels import prims, rules
from kernels.cache import Loop, compile_cached
from kernels.registry import COEFFICIENTS

Array = npt.NDArray[Any]

UNIT: Final = 1 << 16
"""Chunks begin on multiples of this many elements."""
ALONE: Final = 1 << 19
"""Below this many elements handing parts to other threads costs more than it saves."""
CHUNK: Final = (1 << 20, 1 << 22)
"""Least and most elements per chunk: below, handing over costs more than the cache gives back."""
HOLD_GIL: Final = 1 << 15
"""Below this many elements (some 15 microseconds of work) a loop keeps the GIL."""

MASTERS: Final = {"F32": np.dtype(np.float32), "F64": np.dtype(np.float64)}
GRADS: Final = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32),
    "F16": np.dtype(np.uint16), "BF16": np.dtype(np.uint16),
}  # fmt: skip
_HALF: Final = np.dtype(np.float16)
_LOAD: Final = {"F64": "{}", "F32": "{}", "F16": "widen_f16({})", "BF16": "widen_bf16({})"}
SCALAR: Final[dict[str, Any]] = {"F32": types.float32, "F64": types.float64}
_STORED: Final[dict[str, Any]] = {**SCALAR, "F16": types.uint16, "BF16": types.uint16}
_TOP: Final = {"F32": ("int32", 0x7F800000), "F64": ("int64", 0x7FF0000000000000)}

# p_out is first filled with a block of p_in and then updated in place while it is hot: one loop
# serves both cases, and p_in is p_out never trips LLVM's overlap check, which would fall back to
# scalar code.
_SOURCE: Final = """
def {name}(p_in, p_out, g, {slots}h, lo, hi, copy):
    if not ({sound}) or h.size != {count}:
        return -1
    c = ({coefficients})
    limit = h[h.size - 1]
    top = {top}(0)
    block = 4096 if copy else max(hi - lo, 1)
    for start in range(lo, hi, block):
        end = min(start + block, hi)
        if copy:
            for i in range(start, end):
                store(p_out, i, load(p_in, i))
        for i in range(start, end):
            new = {rule}(load(p_out, i), {gradient}, {olds}c)
            store(p_out, i, new[0])
{stores}
            bits = absbits(new[0])
            top = bits if bits > top else top
    return 1 if top < {top}({infinity}) else 0
"""
_SOUND: Final = "{0}.size >= hi and ({0}.strides[0] == {0}.itemsize or {0}.size < 2)"


def _source(name: str, variant: str, master: str, grad: str, *, clamped: bool) -> str:
    cast = "float32" if master == "F32" else "float64"
    gradient = f"{cast}({_LOAD[grad].format('load(g, i)')})"
    arrays = ("p_in", "p_out", "g", *slot_names(variant))
    return _SOURCE.format(
        name=name,
        gradient=f"clamp({gradient}, limit)" if clamped else gradient,
        sound=" and ".join(_SOUND.format(array) for array in arrays),
        count=COEFFICIENTS[variant] + clamped,
        **spelt(variant, master),
    )


def spelt(variant: str, master: str) -> dict[str, Any]:
    """Returns what the sources of all loops of a scalar function have in common."""
    slots = slot_names(variant)
    top, infinity = _TOP[master]
    return {
        "rule": variant,
        "slots": "".join(f"{slot}, " for slot in slots),
        "coefficients": "".join(f"h[{k}], " for k in range(COEFFICIENTS[variant])),
        "olds": "".join(f"load({slot}, i), " for slot in slots),
        "stores": "\n".join(
            f"            store({slot}, i, new[{k}])" for k, slot in enumerate(slots, 1)
        ),
        "top": top,
        "infinity": infinity,
    }


def slot_names(variant: str) -> list[str]:
    """Returns how the sources call the state arrays."""
    return [f"s{k}" for k in range(slot_count(variant))]


def slot_count(variant: str) -> int:
    """Returns how many state arrays a scalar function takes."""
    return rules.VARIANTS[variant].__code__.co_argcount - 3


_GLOBALS: dict[str, Any] = {
    # must name a loaded module, or a later process cannot unpickle what the cache holds
    "__name__": __name__,
    "absbits": prims.absbits,
    "load": prims.load,
    "store": prims.store,
    "widen_f16": prims.widen_f16,
    "widen_bf16": prims.widen_bf16,
    "int32": np.int32,
    "int64": np.int64,
    "float32": np.float32,
    "float64": np.float64,
}


def _register() -> None:
    jitable = register_jitable(error_model="numpy")
    jitable(rules.direction)
    jitable(rules.shrunk)
    _GLOBALS["clamp"] = jitable(rules.clamp)
    for name, rule in rules.VARIANTS.items():
        _GLOBALS[name] = jitable(rule)


_register()


def _compile(variant: str, master: str, grad: str, *, clamped: bool, nogil: bool) -> Loop:
    name = f"{variant}_{master}_{grad}{'_clamped' if clamped else ''}{'' if nogil else '_gil'}"
    source = _source(name, variant, master, grad, clamped=clamped)
    flat = SCALAR[master][::1]
    signature = (
        *(flat, flat, _STORED[grad][::1]), *([flat] * slot_count(variant)),
        *(flat, types.int64, types.int64, types.boolean),
    )  # fmt: skip
    return compile_loop(name, source, signature, nogil=nogil)


def compile_loop(name: str, source: str, signature: Any, *, nogil: bool) -> Loop:
    """Compiles the loop of this name out of its source, in which rules and primitives are known."""
    scope = dict(_GLOBALS)
    exec(compile(source, f"<{name}>", "exec"), scope)
    return compile_cached(scope[name], signature, nogil=nogil)


class Kernel:
    """One rule's loop for one master dtype and one gradient dtype. Get it from `kernel`."""

    def __init__(self, variant: str, master: str, grad: str, *, clamped: bool = False) -> None:
        """Compiles both forms, or loads them from the disk cache."""
        self.variant, self.master, self.grad = variant, master, grad
        self._slots = slot_count(variant)
        self._same, self._stored = MASTERS[master], GRADS[grad]
        self._free = _compile(variant, master, grad, clamped=clamped, nogil=True)
        self._held = _compile(variant, master, grad, clamped=clamped, nogil=False)

    def __call__(
        self,
        p_in: Array,
        p_out: Array,
        g: Array,
        slots: tuple[Array, ...],
        h: Array,
        lo: int,
        hi: int,
    ) -> bool:
        """Updates elements lo to hi of p_out and of each slot, in place.

        Args:
            p_in: master[n], the parameters before; may be p_out itself, must not overlap it
            otherwise.
            p_out: master[n], receives the parameters after.
            g: the gradient, [n] in the wire dtype; BF16 as uint16, F16 as float16 or uint16.
            slots: master[n] each, in the order of the rule's slots.
            h: master[k], the rule's coefficients of this step; behind them, in a clamped kernel,
                the largest size that an element of the gradient may have.
            lo: first element.
            hi: one past the last element.

        Returns:
            True iff every parameter written is finite.

        Raises:
            ValueError: wrong dtype, number of slots or coefficients, or an array that is too short
            or
                not contiguous. Nothing was written.
        """
        if g.dtype is _HALF and self.grad == "F16":
            g = g.view(np.uint16)
        same = self._same
        if not (p_out.dtype is same is p_in.dtype and g.dtype is self._stored and h.dtype is same):
            self._check(p_in, p_out, g, h)
        for slot in slots:
            if slot.dtype is not same:
                self._check(slot)
        if not 0 <= lo <= hi or len(slots) != self._slots:
            raise ValueError(f"{self.variant}: {len(slots)} slots, bounds {lo}:{hi}")
        loop = self._held if hi - lo < HOLD_GIL else self._free
        # the loop itself checks lengths and strides: here that would double the cost of a call
        outcome = loop(p_in, p_out, g, *slots, h, lo, hi, p_in is not p_out)
        if outcome < 0:
            raise ValueError(f"{self.variant}: an array is not contiguous or ends before {hi}")
        return outcome == 1  # type: ignore[no-any-return]

    def _check(self, *arrays: Array) -> None:
        """Raises ValueError for a dtype that is not only another object but another dtype."""
        for place, array in enumerate(arrays):
            wanted = self._stored if place == 2 else self._same
            if array.dtype != wanted:
                raise ValueError(f"{self.variant}: needs an array of {wanted}, not {array.dtype}")


_lock = threading.Lock()
_kernels: dict[tuple[str, str, str, bool], Kernel] = {}


def kernel(variant: str, master: str, grad: str, *, clamped: bool = False) -> Kernel:
    """Returns the loop of a scalar function, compiled on first use, once whoever asks.

    Args:
        variant: a name in `kernels.rules.VARIANTS`.
        master: dtype of parameters and state, F32 or F64.
        grad: dtype of gradients, F64, F32, F16 or BF16; rounded to the master dtype if it is wider.
        clamped: clip the gradient by value, in the master dtype, before the rule sees it.
    """
    key = (variant, master, grad, clamped)
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                found = Kernel(variant, master, grad, clamped=clamped)
                _kernels[key] = found
    return found


def ready(variant: str, master: str, grad: str, *, clamped: bool = False) -> bool:
    """Tells whether `kernel` would answer at once."""
    return (variant, master, grad, clamped) in _kernels


def warm(wanted: Iterable[tuple[str, str, str]]) -> None:
    """Compiles or loads each (variant, master, grad)."""
    for variant, master, grad in wanted:
        kernel(variant, master, grad)


def chunks(lo: int, hi: int) -> list[tuple[int, int]]:
    """Splits lo:hi into parts of 1 to 4 Mi elements, cut at multiples of 64 Ki; one if small."""
    if hi - lo < ALONE:
        return [(lo, hi)]
    wanted = min(max((hi - lo) // 16, CHUNK[0]), CHUNK[1])
    parts = max(2, round((hi - lo) / wanted))
    size = -(-(hi - lo) // parts)
    inner = {(lo + k * size) // UNIT * UNIT for k in range(1, parts)}
    cuts = sorted({lo, hi} | {cut for cut in inner if cut > lo})
    return list(pairwise(cuts))
