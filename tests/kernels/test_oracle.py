import numpy as np
import pytest

from tests import oracle
from tests.kernels import cases

ULP = {"F32": 2.0**-24, "F64": 2.0**-53}
TINY = {"F32": 2.0**-149, "F64": 5e-324}
WIDE = {"F32": np.float64, "F64": np.longdouble}


def follow(rule, h, master, grad, size, steps, *, scale=1.0, seed=0):
    """Runs steps, each checked against the oracle started from our own parameters and state."""
    rng = np.random.default_rng(seed)
    p = (rng.standard_normal(size) * np.clip(scale, 1, 1e4)).astype(cases.NUMPY[master])
    state = cases.slots(rule, h, size, master)
    run = cases.kernel(rule, h, master, grad)
    for count in range(steps):
        g = cases.encode(rng.standard_normal(size) * scale, grad)
        seen = cases.decode(g, grad).astype(cases.NUMPY[master])
        before = dict(zip(cases.names(rule, h), state, strict=True))
        want, after = oracle.step(rule, h, count, p, seen, before, WIDE[master])
        old = p.copy()
        state = tuple(slot.copy() for slot in state)
        assert run(p, p, g, state, cases.coefficients(rule, h, count, master), 0, size)
        move = np.abs(want - old).max(initial=0)
        limit = 2 * ULP[master] * (np.abs(want) + 4 * move) + 4 * TINY[master]
        assert (np.abs(p - want) <= limit).all()
        for name, ours in zip(cases.names(rule, h), state, strict=True):
            top = np.abs(after[name]).max(initial=0)
            assert (
                np.abs(ours - after[name]).max(initial=0)
                <= 16 * ULP[master] * top + 4 * TINY[master]
            )


@pytest.mark.parametrize("size", [0, 1, 3, 17, 4097])
@pytest.mark.parametrize(("master", "grad"), cases.PAIRS)
@pytest.mark.parametrize(("rule", "extra"), cases.CASES)
def test_every_option_is_within_the_bound(rule, extra, master, grad, size):
    follow(rule, cases.hyper(rule, **extra), master, grad, size, 4, seed=size)


@pytest.mark.parametrize(("master", "grad"), cases.ALL_PAIRS)
@pytest.mark.parametrize(("rule", "extra"), [("adam", {}), ("sgd", {"momentum": 0.9})])
def test_every_pair_of_dtypes_is_within_the_bound(rule, extra, master, grad):
    follow(rule, cases.hyper(rule, **extra), master, grad, 4097, 3)


@pytest.mark.parametrize("rule", cases.DEFAULTS)
def test_a_large_odd_size_is_within_the_bound(rule):
    follow(rule, cases.hyper(rule), "F32", "F32", 100_003, 2)


@pytest.mark.parametrize("rule", cases.DEFAULTS)
def test_many_steps_are_within_the_bound(rule):
    follow(rule, cases.hyper(rule), "F32", "F32", 17, 500)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-12, 1e8, 1e15])
@pytest.mark.parametrize("rule", cases.DEFAULTS)
def test_denormal_tiny_and_huge_gradients_are_within_the_bound(rule, scale):
    follow(rule, cases.hyper(rule), "F32", "F32", 257, 3, scale=scale)


def test_adam_holds_to_the_article_by_the_letter():
    # Algorithm 1, first step: both corrections make the step lr * g/(|g| + eps)
    h = cases.hyper("adam")
    p, g = np.array([1.0]), np.array([0.25])
    run = cases.kernel("adam", h, "F64", "F64")
    run(p, p, g, cases.slots("adam", h, 1, "F64"), cases.coefficients("adam", h, 0, "F64"), 0, 1)
    assert p[0] == pytest.approx(1 - 0.001 * 0.25 / (0.25 + 1e-8), rel=1e-15)
