"""Sums of contributions: one rounding for each addition, one at the end, whatever the chunks."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import accumulate

WIRE = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
}  # fmt: skip


def wire(values, dtype):
    """The stored array, and the same numbers in float64."""
    found = np.asarray(values).astype(WIRE[dtype])
    stored = found.view(np.uint16) if dtype in ("F16", "BF16") else found
    return stored, found.astype(np.float64)


def exactly(weight, x, total):
    """weight*x + total, rounded once."""
    return float(Fraction(weight) * Fraction(float(x)) + Fraction(float(total)))


@pytest.mark.parametrize("dtype", WIRE)
@pytest.mark.parametrize("size", [0, 1, 7, 64, 1001])
def test_each_addition_is_rounded_once(dtype, size):
    rng = np.random.default_rng([size, len(dtype)])
    total = rng.standard_normal(size)
    before = total.copy()
    stored, x = wire(rng.standard_normal(size), dtype)
    accumulate.add(total, stored, dtype, 0.3, 0, size)
    expected = [exactly(0.3, a, b) for a, b in zip(x, before, strict=True)]
    assert total.tobytes() == np.array(expected, np.float64).tobytes()


@given(st.floats(-1e30, 1e30), st.floats(-(2.0**99), 2.0**99, width=32), st.floats(-1e30, 1e30))
def test_any_addition_is_rounded_once(weight, x, before):
    total = np.array([before])
    accumulate.add(total, np.array([x], np.float32), "F32", weight, 0, 1)
    assert total[0] == exactly(weight, np.float32(x), before)


@pytest.mark.parametrize("dtype", WIRE)
def test_no_bit_depends_on_the_chunks(dtype):
    rng = np.random.default_rng(5)
    size = (1 << 16) + 13
    stored, _ = wire(rng.standard_normal(size), dtype)
    whole, parts = np.zeros(size), np.zeros(size)
    for weight in (1.0, -0.7, 1e-20):
        accumulate.add(whole, stored, dtype, weight, 0, size)
        for lo, hi in ((0, 1), (1, 8191), (8191, 1 << 16), (1 << 16, size)):
            accumulate.add(parts, stored, dtype, weight, lo, hi)
    assert whole.tobytes() == parts.tobytes()
    outs = [np.zeros(size, np.float32) for _ in range(2)]
    accumulate.finish(whole, 3.0, outs[0], "F32", 0, size)
    for lo, hi in ((0, 77), (77, size)):
        accumulate.finish(parts, 3.0, outs[1], "F32", lo, hi)
    assert outs[0].tobytes() == outs[1].tobytes()


@pytest.mark.parametrize("master", ["F32", "F64"])
def test_the_end_of_a_sum(master):
    kind = WIRE[master]
    total = np.random.default_rng(1).standard_normal(999)
    for divisor in (1.0, 3.0, 0.1):
        out = np.zeros(999, kind)
        accumulate.finish(total, divisor, out, master, 0, 999)
        assert out.tobytes() == (total / divisor).astype(kind).tobytes()


def test_what_is_too_large_becomes_infinite():
    out = np.zeros(3, np.float32)
    accumulate.finish(np.array([1e39, -1e39, 1.0]), 1.0, out, "F32", 0, 3)
    assert out.tolist() == [np.inf, -np.inf, 1.0]


def test_only_the_elements_asked_for_are_written():
    total, g = np.zeros(5), np.ones(5, np.float32)
    accumulate.add(total, g, "F32", 2.0, 1, 3)
    assert total.tolist() == [0, 2, 2, 0, 0]
    out = np.full(5, 9.0)
    accumulate.finish(total, 1.0, out, "F64", 2, 4)
    assert out.tolist() == [9, 9, 2, 0, 9]


@pytest.mark.parametrize(
    "call",
    [
        lambda t, g: accumulate.add(t, g, "F64", 1.0, 0, 4),
        lambda t, g: accumulate.add(t.astype(np.float32), g, "F32", 1.0, 0, 4),
        lambda t, g: accumulate.add(t, g, "F32", 1.0, 0, 5),
        lambda t, g: accumulate.add(t, g, "F32", 1.0, -1, 4),
        lambda t, g: accumulate.add(t, g[::2], "F32", 1.0, 0, 2),
        lambda t, g: accumulate.finish(t, 1.0, g, "F64", 0, 4),
        lambda t, g: accumulate.finish(t, 1.0, g.astype(np.float16), "F16", 0, 4),
        lambda t, g: accumulate.finish(t, 1.0, g, "F32", 3, 2),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"needs a contiguous|bounds|no dtype"):
        call(np.zeros(4), np.zeros(4, np.float32))
