from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from kernels import prims
from kernels.convert import convert

BITS = np.arange(1 << 16, dtype=np.uint16)
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
REAL = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def through(src, a, b):
    out = np.empty(src.size, STORED[b])
    finite = convert(src, a, out, b, 0, src.size)
    return out, finite


def awkward_floats():
    """Every F16 and BF16 value, every midpoint, their neighbours, and random bits."""
    with np.errstate(invalid="ignore"):
        exact = np.concatenate(
            [
                BITS.view(np.float16).astype(np.float32),
                BITS.view(ml_dtypes.bfloat16).astype(np.float32),
            ]
        )
    bits = exact.view(np.uint32)
    near = [
        bits + np.uint32(k)
        for k in (0, 1, 0xFFFFFFFF, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    ]
    rng = np.random.default_rng(1)
    return np.concatenate([*near, rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)]).view(
        np.float32
    )


def same(ours, theirs):
    """Equal bits, or both NaN."""
    real = ours.view(theirs.dtype)
    nan = np.isnan(theirs.astype(np.float64))
    assert (np.isnan(real.astype(np.float64)) == nan).all()
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[theirs.dtype.itemsize]
    assert (real.view(kind)[~nan] == theirs.view(kind)[~nan]).all()


@pytest.mark.parametrize("wide", ["F32", "F64"])
@pytest.mark.parametrize("narrow", ["F16", "BF16"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_widening_is_exact_for_every_pattern(narrow, wide):
    out, finite = through(BITS, narrow, wide)
    assert finite
    same(out, BITS.view(REAL[narrow]).astype(REAL[wide]))


@pytest.mark.parametrize("narrow", ["F16", "BF16"])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_narrowing_float32_equals_numpy_and_ml_dtypes(narrow):
    src = awkward_floats()
    out, finite = through(src, "F32", narrow)
    assert not finite
    same(out, src.astype(REAL[narrow]))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_narrowing_float64_to_float32_and_float16_equals_numpy():
    src = awkward_floats().astype(np.float64)
    src = np.concatenate([src, np.nextafter(src, np.inf), np.nextafter(src, -np.inf)])
    for narrow in ("F32", "F16"):
        out, _ = through(src, "F64", narrow)
        same(out, src.astype(REAL[narrow]))


def test_narrowing_float64_to_bfloat16_rounds_once():
    rng = np.random.default_rng(2)
    base = (rng.integers(0x3000, 0x5000, 3000, dtype=np.uint32) << 16) + np.uint32(0x8000)
    middle = base.view(np.float32).astype(np.float64)
    src = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, 0)])
    out, finite = through(src, "F64", "BF16")
    assert finite
    for value, bits in zip(src, out, strict=True):
        picks = [int(bits) + k for k in (-1, 0, 1)]
        reals = [Fraction(float(prims.widen_bf16(b))) for b in picks]
        best = min(range(3), key=lambda k: (abs(reals[k] - Fraction(value)), picks[k] & 1))
        assert picks[best] == bits


def test_between_the_16_bit_formats():
    with np.errstate(invalid="ignore", over="ignore"):
        want = BITS.view(np.float16).astype(np.float32).astype(ml_dtypes.bfloat16)
        back = BITS.view(ml_dtypes.bfloat16).astype(np.float32).astype(np.float16)
    same(through(BITS, "F16", "BF16")[0], want)
    same(through(BITS, "BF16", "F16")[0], back)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_plain_python_means_the_same():
    src = awkward_floats()[:: 1 << 9].copy()
    for narrow, function in (("F16", prims.narrow_f16), ("BF16", prims.narrow_bf16)):
        out, _ = through(src, "F32", narrow)
        assert [int(function(x)) for x in src] == out.tolist()
    doubles = src.astype(np.float64) * (1 + 2.0**-30)
    out, _ = through(doubles, "F64", "F16")
    assert [int(prims.narrow_f16(prims.round_odd(x))) for x in doubles] == out.tolist()
    for bits in BITS[::37]:
        f16, bf16 = (np.empty(1, np.float32) for _ in range(2))
        one = np.array([bits])
        convert(one, "F16", f16, "F32", 0, 1)
        convert(one, "BF16", bf16, "F32", 0, 1)
        np.testing.assert_array_equal(f16[0], prims.widen_f16(bits))
        np.testing.assert_array_equal(bf16[0], prims.widen_bf16(bits))


@pytest.mark.parametrize("size", [0, 1, 3, 17, 4097])
def test_any_bounds_and_nothing_outside_them(size):
    src = np.linspace(-2, 2, size + 7)
    out = np.full(size + 7, 0xABCD, np.uint16)
    assert convert(src, "F64", out, "BF16", 3, 3 + size)
    assert (out[:3] == 0xABCD).all()
    assert (out[3 + size :] == 0xABCD).all()
    assert (out[3 : 3 + size] == src[3 : 3 + size].astype(ml_dtypes.bfloat16).view(np.uint16)).all()


@pytest.mark.parametrize(
    ("source", "target", "top"),
    [
        ("F64", "F32", 3.5e38),
        ("F64", "F16", 65520.0),
        ("F32", "F16", 65520.0),
        ("F64", "BF16", 3.4e38),
        ("F32", "BF16", 3.4e38),
    ],
)
def test_says_when_a_finite_value_became_infinite(source, target, top):
    src = np.ones(100, STORED[source])
    assert through(src, source, target)[1]
    src[3] = np.inf
    src[4] = np.nan
    assert through(src, source, target)[1]
    src[77] = top
    assert not through(src, source, target)[1]


def test_same_dtype_is_a_copy_and_wrong_arrays_are_refused():
    src = np.arange(5.0)
    out, finite = through(src, "F64", "F64")
    assert finite
    assert (out == src).all()
    half = np.ones(4, np.float16)
    assert through(half, "F16", "F32")[0].tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="contiguous"):
        convert(src, "F32", out, "F64", 0, 5)
    with pytest.raises(ValueError, match="contiguous"):
        convert(src[::2], "F64", out, "F64", 0, 2)
    with pytest.raises(ValueError, match="bounds"):
        convert(src, "F64", out, "F32" if out.dtype == np.float32 else "F64", 0, 6)
