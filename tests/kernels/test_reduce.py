import math
from itertools import pairwise

import numpy as np
import pytest

from kernels import reduce
from tests.kernels import cases

DTYPES = ["F64", "F32", "F16", "BF16"]


@pytest.mark.parametrize("size", [0, 1, 3, 17, 511, 513, 4097, 65_536, 65_537, 200_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_is_right_and_does_not_depend_on_the_split(dtype, size):
    g = cases.encode(np.random.default_rng(size).standard_normal(size), dtype)
    partials = reduce.sumsq(g, dtype, 0, size)
    assert partials.shape == (-(-size // reduce.BLOCK),)
    exact = math.fsum(x * x for x in cases.decode(g, dtype).tolist())
    assert reduce.total(partials) == pytest.approx(exact, rel=1e-14)
    cuts = [*range(0, size, reduce.BLOCK), size]
    parts = [reduce.sumsq(g, dtype, lo, hi) for lo, hi in pairwise(cuts)]
    assert np.concatenate([*parts, np.empty(0)]).tobytes() == partials.tobytes()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 511, 65_536, 199_999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_shows_in_the_sum_and_is_found(dtype, at, bad):
    values = np.ones(200_000)
    values[at] = bad
    g = cases.encode(values, dtype)
    assert not math.isfinite(reduce.total(reduce.sumsq(g, dtype, 0, g.size)))
    assert reduce.first_nonfinite(g, dtype) == at
    assert not reduce.all_finite(g, dtype)


def test_float32_cannot_overflow_and_float64_can():
    large = np.full(1 << 17, np.finfo(np.float32).max)
    assert math.isfinite(reduce.total(reduce.sumsq(large, "F32", 0, large.size)))
    huge = np.full(3, 1e200)
    assert reduce.total(reduce.sumsq(huge, "F64", 0, 3)) == np.inf
    assert reduce.all_finite(huge, "F64")
    assert reduce.first_nonfinite(huge, "F64") == -1


def test_float16_arrays_are_taken_as_they_are():
    g = np.full(3, 2, np.float16)
    assert reduce.total(reduce.sumsq(g, "F16", 0, 3)) == 12.0
    assert reduce.all_finite(g, "F16")


@pytest.mark.parametrize(("lo", "hi"), [(1, 65_536), (0, 100), (0, 70_001), (-65_536, 0)])
def test_bounds_off_the_blocks_are_refused(lo, hi):
    with pytest.raises(ValueError, match="blocks"):
        reduce.sumsq(np.ones(70_000, np.float32), "F32", lo, hi)
