import numpy as np
import pytest

from kernels.registry import RULES
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
        sure = ~oracle.doubtful(rule, h, p, seen, before, ULP[master])
        assert scale < 1e-10 or (~sure).sum() <= 0.001 * size
        old = p.copy()
        state = tuple(slot.copy() for slot in state)
        assert run(p, p, g, state, cases.coefficients(rule, h, count, master), 0, size)
        move = np.abs(want - old).max(initial=0)
        limit = 2 * ULP[master] * (np.abs(want) + 4 * move) + 4 * TINY[master]
        assert (np.abs(p - want) <= limit)[sure].all()
        for name, ours in zip(cases.names(rule, h), state, strict=True):
            top = np.abs(after[name]).max(initial=0)
            assert (
                np.abs(ours - after[name])[sure].max(initial=0)
                <= 16 * ULP[master] * top + 4 * TINY[master]
            )


@pytest.mark.parametrize("size", [0, 1, 3, 17, 4097])
@pytest.mark.parametrize(("master", "grad"), cases.PAIRS)
@pytest.mark.parametrize(("rule", "extra"), cases.CASES)
def test_every_option_is_within_the_bound(rule, extra, master, grad, size):
    steps = 8 if rule in ("radam", "asgd") else 4  # past their thresholds
    follow(rule, cases.hyper(rule, **extra), master, grad, size, steps, seed=size)


@pytest.mark.parametrize(("master", "grad"), cases.ALL_PAIRS)
@pytest.mark.parametrize(("rule", "extra"), [("adam", {}), ("sgd", {"momentum": 0.9})])
def test_every_pair_of_dtypes_is_within_the_bound(rule, extra, master, grad):
    follow(rule, cases.hyper(rule, **extra), master, grad, 4097, 3)


@pytest.mark.parametrize("grad", ["F64", "F16"])  # F32 and BF16 are above
@pytest.mark.parametrize("rule", cases.DEFAULTS)
def test_every_rule_takes_every_gradient(rule, grad):
    follow(rule, cases.hyper(rule), "F32", grad, 4097, 3)


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


def test_adam_decoupled_is_adamw():
    adam = cases.hyper("adam", decoupled_weight_decay=True, weight_decay=0.1)
    adamw = cases.hyper("adamw", weight_decay=0.1)
    for count in (0, 7):
        ours, theirs = (
            cases.coefficients(rule, h, count, "F64").tolist()
            for rule, h in (("adam", adam), ("adamw", adamw))
        )
        assert ours == theirs


def test_radam_begins_to_rectify_at_the_sixth_update():
    for count in range(12):
        slope, base = cases.coefficients("radam", cases.hyper("radam"), count, "F64")[5:7]
        assert (slope == 0) == (base == 1) == (count < 5)


def test_asgd_averages_from_t0_on():
    h = cases.hyper("asgd", t0=3)
    assert [cases.scalars("asgd", h, count)[1] for count in range(8)] == [
        *(1, 1, 1, 1, 1, 1 / 2, 1 / 3, 1 / 4),
    ]
    assert cases.scalars("asgd", h, 1)[0] == pytest.approx(0.01 * (1 + 1e-6) ** -0.75, rel=1e-15)


def test_scalars_change_with_the_lr_of_their_update():
    h = cases.hyper("asgd")
    eta, mu = RULES["asgd"].start(h, 0.5)
    assert (eta, mu) == (0.5, 1.0)
    assert RULES["asgd"].advance(h, 0, 0.0, (eta, mu)) == (0.0, 1.0)
    assert RULES["nadam"].advance(cases.hyper("nadam"), 0, 9.0, (1.0,)) == cases.scalars(
        "nadam", cases.hyper("nadam"), 1
    )


def test_rprop_takes_its_first_step_from_the_lr():
    h = cases.hyper("rprop", lr=0.25)
    p, state = np.zeros(3), cases.slots("rprop", h, 3, "F64")
    run = cases.kernel("rprop", h, "F64", "F64")
    run(p, p, np.array([2.0, -3.0, 0.0]), state, cases.coefficients("rprop", h, 0, "F64"), 0, 3)
    assert p.tolist() == [-0.25, 0.25, 0.0]
    run(p, p, np.array([1.0, 1.0, 1.0]), state, cases.coefficients("rprop", h, 1, "F64"), 0, 3)
    assert p.tolist() == [-0.55, 0.25, -0.25]  # grown; turned, which waits; first
    assert state[0].tolist() == [1.0, 0.0, 1.0]
    assert state[1].tolist() == [0.3, 0.125, 0.25]


def test_adam_holds_to_the_article_by_the_letter():
    # Algorithm 1, first step: both corrections make the step lr * g/(|g| + eps)
    h = cases.hyper("adam")
    p, g = np.array([1.0]), np.array([0.25])
    run = cases.kernel("adam", h, "F64", "F64")
    run(p, p, g, cases.slots("adam", h, 1, "F64"), cases.coefficients("adam", h, 0, "F64"), 0, 1)
    assert p[0] == pytest.approx(1 - 0.001 * 0.25 / (0.25 + 1e-8), rel=1e-15)
