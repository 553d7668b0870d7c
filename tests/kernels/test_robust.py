"""Order statistics of contributions, against NumPy's sort."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import robust
from kernels.robust import Held

KINDS = {"F32": np.float32, "F64": np.float64}


def contributions(count, size, seed=0, dtypes=("F32", "BF16", "F16", "F64")):
    """Held contributions of several dtypes, and their values in float64."""
    rng = np.random.default_rng([count, size, seed])
    wire = {**KINDS, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    held, values = [], []
    for at in range(count):
        dtype, factor = dtypes[at % len(dtypes)], (1.0, -0.25)[at % 2]
        found = rng.integers(-4, 5, size).astype(wire[dtype])  # many are equal
        stored = found.view(np.uint16) if dtype in ("F16", "BF16") else found
        held.append(Held(stored, dtype, factor))
        values.append(found.astype(np.float64) * factor)
    return held, np.array(values)


def trimmed(values, trim):
    """In ascending order, as the definition says."""
    cut = int(trim * len(values))
    total = np.zeros(values.shape[1])
    for row in np.sort(values, axis=0)[cut : len(values) - cut]:
        total = total + row
    return total / (len(values) - 2 * cut)


@pytest.mark.parametrize("master", KINDS)
@pytest.mark.parametrize("size", [0, 1, 7, (1 << 16) - 1, (1 << 16) + 1])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_median_and_the_trimmed_mean(master, size, count):
    held, values = contributions(count, size)
    out = np.full(size, np.nan, KINDS[master])
    robust.median(held, out, master, 0, size)
    expected = np.median(values, axis=0) if size else np.zeros(0)
    assert np.array_equal(out, expected.astype(KINDS[master]))
    for trim in (0.0, 0.2, 0.34, 0.49):
        robust.trimmed_mean(held, trim, out, master, 0, size)
        assert out.tobytes() == trimmed(values, trim).astype(KINDS[master]).tobytes()


@pytest.mark.parametrize("count", range(1, 65))
def test_the_network_sorts(count):
    rng = np.random.default_rng(count)
    rows = [rng.integers(0, 2, 200) for _ in range(count)]  # the 0-1 principle, by sample
    rows = [np.append(row, at < count // 2) for at, row in enumerate(rows)]
    for a, b in robust.network(count):
        assert a < b < count
        rows[a], rows[b] = np.minimum(rows[a], rows[b]), np.maximum(rows[a], rows[b])
    found = np.array(rows)
    assert (np.diff(found, axis=0) >= 0).all()


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9))
def test_no_zero_is_negative_and_one_bad_value_does_not_count(values):
    held = [Held(np.array([v, -0.0]), "F64", 1.0) for v in values]
    out = np.zeros(2)
    robust.median(held, out, "F64", 0, 2)
    assert not np.signbit(out[1])
    robust.trimmed_mean(held, 0.4, out, "F64", 0, 2)
    assert not np.signbit(out[1])
    if len(values) >= 3:
        honest = sorted(values)
        held[0] = Held(np.array([1e300, 0.0]), "F64", 1.0)
        robust.median(held, out, "F64", 0, 2)
        assert honest[0] <= out[0] <= honest[-1]


def test_what_is_too_small_becomes_0_and_not_minus_0():
    held = [Held(np.full(3, -1e-60), "F64", 1.0)] * 3
    out = np.ones(3, np.float32)
    for call in (robust.median, lambda *args: robust.trimmed_mean(args[0], 0.1, *args[1:])):
        call(held, out, "F32", 0, 3)
        assert not np.signbit(out).any()


def test_no_bit_depends_on_the_chunks():
    size = (1 << 17) + 5
    held, _ = contributions(7, size)
    whole, parts = np.zeros(size, np.float32), np.zeros(size, np.float32)
    robust.trimmed_mean(held, 0.2, whole, "F32", 0, size)
    for lo, hi in ((0, 3), (3, 1 << 16), (1 << 16, size)):
        robust.trimmed_mean(held, 0.2, parts, "F32", lo, hi)
    assert whole.tobytes() == parts.tobytes()


def test_what_is_too_large_becomes_infinite():
    out = np.zeros(1, np.float32)
    robust.median([Held(np.array([1e39]), "F64", 1.0)], out, "F32", 0, 1)
    assert out[0] == np.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda held, out: robust.median([], out, "F32", 0, 1),
        lambda held, out: robust.median(held, out, "F16", 0, 1),
        lambda held, out: robust.median(held, out, "F64", 0, 1),
        lambda held, out: robust.median(held, out, "F32", 0, 5),
        lambda held, out: robust.trimmed_mean(held, 0.5, out, "F32", 0, 1),
        lambda held, out: robust.trimmed_mean(held, -0.1, out, "F32", 0, 1),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"no contribution|no dtype|contiguous|bounds|trim"):
        call(contributions(3, 4)[0], np.zeros(4, np.float32))
