"""Primitives with one meaning in compiled loops and in plain Python: fma, sqrt, 16-bit floats.

Each is a plain function on NumPy scalars with a Numba overload. The overloads are written in LLVM's
terms because Numba widens ``uint32 + literal`` to 64 bits, which halves the vector width.
F16 and BF16 values travel as their uint16 bits. The integer forms are used on every CPU: LLVM's
``fpext half`` on a CPU without F16C calls a function that the JIT cannot find, which ends the
process.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_fma32 = _libm.fmaf
_fma32.restype, _fma32.argtypes = ctypes.c_float, [ctypes.c_float] * 3
_fma64 = _libm.fma
_fma64.restype, _fma64.argtypes = ctypes.c_double, [ctypes.c_double] * 3

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def fma(a: Any, b: Any, c: Any) -> Any:
    """Returns a*b + c rounded once; all three of one dtype, float32 or float64."""
    if type(c) is np.float32:
        return np.float32(_fma32(a, b, c))
    return np.float64(_fma64(a, b, c))


def sqrt(x: Any) -> Any:
    """Returns the correctly rounded square root in the dtype of x (NaN below zero)."""
    return np.sqrt(x)


def nonnegative(x: Any) -> Any:
    """Returns x, or 0 where x is below zero; NaN stays NaN."""
    return type(x)(0) if x < 0 else x


def signum(x: Any) -> Any:
    """Returns 1, 0 or -1 in the dtype of x, as its sign says; 0 for NaN, as torch has it."""
    return type(x)(int(x > 0) - int(x < 0))


def load(array: Any, index: Any) -> Any:
    """Returns array[index] of a contiguous array; compiled code checks nothing."""
    return array[index]


def store(array: Any, index: Any, value: Any) -> None:
    """Sets array[index] of a contiguous array; compiled code checks nothing."""
    array[index] = value


def absbits(x: Any) -> Any:
    """Returns the bits of ``|x|`` as int32 (float32) or int64 (float64): ordered like ``|x|``."""
    if type(x) is np.float32:
        return np.int32(x.view(np.int32) & 0x7FFFFFFF)
    return np.int64(np.float64(x).view(np.int64) & 0x7FFFFFFFFFFFFFFF)


def widen_bf16(bits: Any) -> Any:
    """Returns the float32 that the uint16 bits of a bfloat16 stand for."""
    return np.uint32(int(bits) << 16).view(np.float32)


def widen_f16(bits: Any) -> Any:
    """Returns the float32 that the uint16 bits of a float16 stand for."""
    return np.float32(np.uint16(bits).view(np.float16))


def narrow_bf16(x: Any) -> Any:
    """Returns the uint16 bits of float32 x as bfloat16, nearest even; NaN becomes quiet."""
    u = int(np.float32(x).view(np.uint32))
    if x != x:
        return np.uint16((u >> 16) & 0x8000 | 0x7FC0)
    return np.uint16(((u + 0x7FFF + ((u >> 16) & 1)) >> 16) & 0xFFFF)


def narrow_f16(x: Any) -> Any:
    """Returns the uint16 bits of float32 x as float16, nearest even; NaN becomes 0x7e00 | sign."""
    if x != x:
        return np.uint16((int(np.float32(x).view(np.uint32)) >> 16) & 0x8000 | 0x7E00)
    with np.errstate(over="ignore", under="ignore"):
        return np.float16(x).view(np.uint16)


def round_odd(x: Any) -> Any:
    """Returns float64 x as float32 rounded to odd: rounding that to 16 bits is rounding once."""
    with np.errstate(over="ignore", under="ignore"):
        near = np.float32(x)
    bits = int(near.view(np.uint32))
    if np.float64(near) == x or x != x or bits & 1:
        return near
    return np.uint32(bits - 1 if abs(np.float64(near)) > abs(x) else bits + 1).view(np.float32)


# --- the same for compiled code ------------------------------------------------------------------

Emit = Callable[[Any, Any, Any], Any]
"""(builder, LLVM arguments, Numba argument types) -> LLVM value"""


def _bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Strips annotations: Numba wants an overload's signature to equal its implementation's."""
    function.__annotations__ = {}
    return function


def _define(
    function: Callable[..., Any],
    returns: Callable[[Any], Any],
    accepts: tuple[Any, ...],
    emit: Emit,
) -> None:
    """Gives function, of one argument, a compiled form for the Numba types in accepts."""

    def typed(_context: Any, x: Any) -> Any:
        def generate(_cx: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args, signature.args)

        return returns(x)(x), generate

    emitted: Any = intrinsic(typed)

    @overload(function)  # type: ignore[untyped-decorator,unused-ignore]
    @_bare
    def _compiled(x: Any) -> Any:
        if x in accepts:
            return lambda x: emitted(x)
        return None


def _fma_typed(_context: Any, a: Any, b: Any, c: Any) -> Any:
    if isinstance(a, types.Float) and a == b == c:
        return a(a, a, a), lambda _cx, builder, _signature, args: builder.fma(*args)
    return None


_fma_emitted: Any = intrinsic(_fma_typed)


@overload(fma)  # type: ignore[untyped-decorator,unused-ignore]
@_bare
def _fma_compiled(a: Any, b: Any, c: Any) -> Any:
    if isinstance(a, types.Float) and a == b == c:
        return lambda a, b, c: _fma_emitted(a, b, c)
    return None


# An index that may be negative keeps a loop from being vectorised (3 to 10 times slower), and
# slicing first takes five times as long to compile as these two.
def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


def _load_typed(_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args))

    return array.dtype(array, index), generate


def _store_typed(_context: Any, array: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(array, index, array.dtype), generate


_load_emitted: Any = intrinsic(_load_typed)
_store_emitted: Any = intrinsic(_store_typed)


@overload(load)  # type: ignore[untyped-decorator,unused-ignore]
@_bare
def _load_compiled(array: Any, index: Any) -> Any:
    return lambda array, index: _load_emitted(array, index)


@overload(store)  # type: ignore[untyped-decorator,unused-ignore]
@_bare
def _store_compiled(array: Any, index: Any, value: Any) -> Any:
    return lambda array, index, value: _store_emitted(array, index, value)


def _emit_sqrt(b: Any, args: Any, kinds: Any) -> Any:
    kind = args[0].type
    root = b.module.declare_intrinsic("llvm.sqrt", [kind])
    return b.call(root, [args[0]])


def _emit_nonnegative(b: Any, args: Any, kinds: Any) -> Any:
    zero = ir.Constant(args[0].type, 0.0)
    return b.select(b.fcmp_ordered("<", args[0], zero), zero, args[0])


def _emit_signum(b: Any, args: Any, kinds: Any) -> Any:
    zero, one, minus = (ir.Constant(args[0].type, value) for value in (0.0, 1.0, -1.0))
    below = b.select(b.fcmp_ordered("<", args[0], zero), minus, zero)
    return b.select(b.fcmp_ordered(">", args[0], zero), one, below)


def _emit_absbits(b: Any, args: Any, kinds: Any) -> Any:
    kind, mask = (_I32, 0x7FFFFFFF) if args[0].type == _F32 else (_I64, 0x7FFFFFFFFFFFFFFF)
    return b.and_(b.bitcast(args[0], kind), ir.Constant(kind, mask))


def _c(value: int) -> Any:
    return ir.Constant(_I32, value)


def _emit_widen_bf16(b: Any, args: Any, kinds: Any) -> Any:
    return b.bitcast(b.shl(b.zext(args[0], _I32), _c(16)), _F32)


def _emit_widen_f16(b: Any, args: Any, kinds: Any) -> Any:
    h = b.zext(args[0], _I32)
    em = b.shl(b.and_(h, _c(0x7FFF)), _c(13))
    # multiplying by 2**112 moves the exponent's bias, and normalises subnormals exactly
    m = b.bitcast(b.fmul(b.bitcast(em, _F32), ir.Constant(_F32, 2.0**112)), _I32)
    m = b.select(b.icmp_unsigned(">=", em, _c(0x0F800000)), b.or_(em, _c(0x7F800000)), m)
    return b.bitcast(b.or_(m, b.shl(b.and_(h, _c(0x8000)), _c(16))), _F32)


def _emit_narrow_bf16(b: Any, args: Any, kinds: Any) -> Any:
    u = b.bitcast(args[0], _I32)
    top = b.lshr(u, _c(16))
    near = b.lshr(b.add(u, b.add(_c(0x7FFF), b.and_(top, _c(1)))), _c(16))
    nan = b.or_(b.and_(top, _c(0x8000)), _c(0x7FC0))
    return b.trunc(b.select(b.fcmp_unordered("uno", args[0], args[0]), nan, near), _I16)


def _emit_narrow_f16(b: Any, args: Any, kinds: Any) -> Any:
    u = b.bitcast(args[0], _I32)
    a = b.and_(u, _c(0x7FFFFFFF))
    odd = b.and_(b.lshr(a, _c(13)), _c(1))
    normal = b.lshr(b.add(a, b.add(_c(0xC8000FFF), odd)), _c(13))
    # 0.5 has the spacing of float16's subnormals, so that the addition itself rounds
    shifted = b.fadd(b.bitcast(a, _F32), ir.Constant(_F32, 0.5))
    small = b.sub(b.bitcast(shifted, _I32), _c(0x3F000000))
    out = b.select(b.icmp_unsigned("<", a, _c(0x38800000)), small, normal)
    out = b.select(b.icmp_unsigned(">=", a, _c(0x47800000)), _c(0x7C00), out)
    out = b.select(b.icmp_unsigned(">", a, _c(0x7F800000)), _c(0x7E00), out)
    return b.trunc(b.or_(out, b.and_(b.lshr(u, _c(16)), _c(0x8000))), _I16)


def _emit_round_odd(b: Any, args: Any, kinds: Any) -> Any:
    near = b.fptrunc(args[0], _F32)
    back = b.fpext(near, _F64)
    mask = ir.Constant(_I64, 0x7FFFFFFFFFFFFFFF)
    away = b.icmp_unsigned(
        ">", b.and_(b.bitcast(back, _I64), mask), b.and_(b.bitcast(args[0], _I64), mask)
    )
    bits = b.bitcast(near, _I32)
    moved = b.add(bits, b.select(away, _c(0xFFFFFFFF), _c(1)))
    even = b.icmp_unsigned("==", b.and_(bits, _c(1)), _c(0))
    inexact = b.fcmp_ordered("!=", back, args[0])
    return b.bitcast(b.select(b.and_(even, inexact), moved, bits), _F32)


_FLOATS = (types.float32, types.float64)
_define(sqrt, lambda x: x, _FLOATS, _emit_sqrt)
_define(nonnegative, lambda x: x, _FLOATS, _emit_nonnegative)
_define(signum, lambda x: x, _FLOATS, _emit_signum)
_define(
    absbits,
    lambda x: types.int32 if x == types.float32 else types.int64,
    _FLOATS,
    _emit_absbits,
)
_define(widen_bf16, lambda x: types.float32, (types.uint16,), _emit_widen_bf16)
_define(widen_f16, lambda x: types.float32, (types.uint16,), _emit_widen_f16)
_define(narrow_bf16, lambda x: types.uint16, (types.float32,), _emit_narrow_bf16)
_define(narrow_f16, lambda x: types.uint16, (types.float32,), _emit_narrow_f16)
_define(round_odd, lambda x: types.float32, (types.float64,), _emit_round_odd)
