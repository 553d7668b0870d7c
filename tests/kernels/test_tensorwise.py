"""The rules per tensor against the oracle, and what holds of their passes."""

import math
import threading

import numpy as np
import pytest

from kernels import blas, passes, tensorwise
from kernels.registry import RULES
from tests import oracle
from tests.kernels import cases

ULP = {"F32": 2.0**-24, "F64": 2.0**-53}
TINY = {"F32": 2.0**-149, "F64": 5e-324}
WIDE = {"F32": np.float64, "F64": np.longdouble}
SHAPES = [(), (1,), (3,), (17, 5), (5, 17), (4, 3, 2), (1, 9), (9, 1), (0,), (0, 4), (2, 0, 3)]
PRODUCTS = 100
"""What muon may be off by, in units of rounding: its matrix products amplify it."""


def takes(rule, shape):
    return RULES[rule].dims in (None, len(shape))


def fields(rule, h, shape):
    """The names of what a tensor keeps, in the order of the function's state."""
    return [slot.name for slot in RULES[rule].slots(h) if slot.shape(shape) is not None]


def step(rule, h, count, p, g, state, *, grad=None, out=None, **scaling):
    """One update of arrays that have their shapes; p and state change unless out is given."""
    master = "F32" if p.dtype == np.float32 else "F64"
    wire = cases.encode(np.ravel(g), grad or master)
    scaling = {"factor": 1.0, "limit": None, **scaling}
    taken = tensorwise.gradient(wire, grad or master, master, h, **scaling)
    parts = tuple(state[name].reshape(-1) for name in fields(rule, h, p.shape))
    before = p.reshape(-1)
    after = before if out is None else out.reshape(-1)
    numbers = tensorwise.numbers(rule, h, count)
    return tensorwise.step(
        rule, before, after, taken, parts, p.shape, h, float(h["lr"]), numbers
    )  # fmt: skip


def start(rule, h, shape, master, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    p = np.asarray(rng.standard_normal(shape) * np.clip(scale, 1, 1e4), cases.NUMPY[master])
    state = oracle.start(rule, h, p)
    for slot in RULES[rule].slots(h):
        part = slot.shape(shape)
        assert (slot.name in state) == (part is not None)
        assert part is None or (state[slot.name].shape == part and slot.initial == 0)
    return rng, p, state


def follow(rule, h, master, grad, shape, steps, *, scale=1.0, seed=0):
    """Runs steps, each checked against the oracle started from our own parameters and state."""
    rng, p, state = start(rule, h, shape, master, seed, scale)
    for count in range(steps):
        wire = cases.encode(np.ravel(rng.standard_normal(shape) * scale), grad)
        g = cases.decode(wire, grad).reshape(shape)
        seen = g.astype(cases.NUMPY[master])
        want, after = oracle.step(rule, h, count, p, seen, state, WIDE[master])
        old, kept, state = p.copy(), state, {name: part.copy() for name, part in state.items()}
        assert step(rule, h, count, p, g, state, grad=grad)
        move = np.abs(want - old).max(initial=0)
        limit = 2 * ULP[master] * (np.abs(want) + 4 * move) + 4 * TINY[master]
        if rule == "muon":
            limit = ULP[master] * (2 * np.abs(want) + PRODUCTS * move) + 4 * TINY[master]
        assert (np.abs(p - want) <= limit).all()
        for name, ours in state.items():
            top = max(np.abs(part).max(initial=0) for part in (after[name], kept[name]))
            error = np.abs(ours - after[name]).max(initial=0)
            assert error <= 16 * ULP[master] * top + 4 * TINY[master], name


def test_every_rule_per_tensor_is_registered_and_covered():
    names = {name for name, rule in RULES.items() if rule.tensorwise}
    assert names == set(tensorwise.FUNCTIONS) == set(cases.TENSORWISE)
    assert not names & set(cases.DEFAULTS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize(("rule", "extra"), cases.TENSORWISE_CASES)
def test_every_option_is_within_the_bound(rule, extra, master, shape):
    if takes(rule, shape):
        follow(rule, cases.hyper(rule, **extra), master, master, shape, 4, seed=len(shape))


@pytest.mark.parametrize(("master", "grad"), cases.ALL_PAIRS)
@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_every_pair_of_dtypes_is_within_the_bound(rule, master, grad):
    follow(rule, cases.hyper(rule), master, grad, (33, 20), 3)


@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_large_odd_shapes_are_within_the_bound(rule):
    follow(rule, cases.hyper(rule), "F32", "F32", (257, 411), 3)
    if rule != "muon":
        follow(rule, cases.hyper(rule), "F32", "F32", (100_003,), 2)
        follow(rule, cases.hyper(rule), "F32", "F32", (3, 37, 1001), 2)


@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_many_steps_are_within_the_bound(rule):
    follow(rule, cases.hyper(rule, weight_decay=0.1), "F32", "F32", (4, 3), 300)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-12, 1e8, 1e15])
@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_denormal_tiny_and_huge_gradients_are_within_the_bound(rule, scale):
    if rule == "lamb":  # it makes a whole step even of averages that are denormal, of few bits
        scale = max(scale, 1e-36)
    follow(rule, cases.hyper(rule), "F32", "F32", (16, 17), 3, scale=scale)


@pytest.mark.parametrize("shape", [(7,), (70_001,), (300, 301)], ids=str)
@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_another_place_for_the_result_changes_no_bit(rule, shape):
    if not takes(rule, shape):
        return
    h = cases.hyper(rule, weight_decay=0.1)
    rng, p, state = start(rule, h, shape, "F32")
    g = rng.standard_normal(shape)
    kept = {name: part.copy() for name, part in state.items()}
    before, out = p.copy(), np.full_like(p, np.nan)
    assert step(rule, h, 0, p, g, state, out=out)
    assert p.tobytes() == before.tobytes()
    assert step(rule, h, 0, p, g, kept)
    assert p.tobytes() == out.tobytes()
    for name, part in state.items():
        assert part.tobytes() == kept[name].tobytes()


@pytest.mark.parametrize("rule", cases.TENSORWISE)
@pytest.mark.parametrize("eps", [0, 1e-3])
@pytest.mark.parametrize("zero", [False, True])
def test_zero_gradients_move_nothing_but_by_decay(rule, eps, zero):
    if rule in ("adafactor", "lamb"):
        eps = {"adafactor": (None, eps), "lamb": 1e-6}[rule]
    h = cases.hyper(rule, eps=eps)
    _, p, state = start(rule, h, (4, 3), "F32")
    p = p * 0 if zero else p
    before = p.copy()
    for count in range(3):
        assert step(rule, h, count, p, np.zeros((4, 3)), state)
        assert p.tobytes() == before.tobytes()
    assert step(rule, {**h, "weight_decay": 0.5}, 3, p, np.zeros((4, 3)), state)
    assert zero or (np.abs(p) < np.abs(before)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_says_when_a_parameter_is_not_finite(rule, bad):
    h = cases.hyper(rule)
    rng, p, state = start(rule, h, (5, 6), "F32")
    g = rng.standard_normal((5, 6))
    spoilt = p.copy()
    spoilt[2, 3] = bad
    assert not step(rule, h, 0, spoilt, g, {k: v.copy() for k, v in state.items()})
    g[2, 3] = np.nan
    assert not step(rule, h, 0, p, g, state)
    assert np.isnan(p[2, 3])


@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_maximizing_is_minimizing_the_opposite_to_the_bit(rule, master):
    h = cases.hyper(rule, weight_decay=0.1)
    rng, p, state = start(rule, h, (8, 5), master)
    g = rng.standard_normal((8, 5))
    other, theirs = p.copy(), {name: part.copy() for name, part in state.items()}
    assert step(rule, h, 0, p, g, state)
    assert step(rule, {**h, "maximize": True}, 0, other, -g, theirs)
    assert p.tobytes() == other.tobytes()


@pytest.mark.parametrize(("master", "grad"), cases.ALL_PAIRS)
def test_a_gradient_is_clipped_then_scaled(master, grad):
    h = {"maximize": False}
    values = np.random.default_rng(3).standard_normal(257) * 4
    wire = cases.encode(values, grad)
    seen = cases.decode(wire, grad).astype(cases.NUMPY[master])
    untouched = wire.copy()
    plain = tensorwise.gradient(wire, grad, master, h, 1.0, None)
    np.testing.assert_array_equal(plain, seen)
    clipped = tensorwise.gradient(wire, grad, master, h, 0.5, 2.0)
    np.testing.assert_array_equal(clipped, np.clip(seen, -2, 2) / 2)
    turned = tensorwise.gradient(wire, grad, master, {"maximize": True}, 0.25, None)
    np.testing.assert_array_equal(turned, seen / -4)
    assert wire.tobytes() == untouched.tobytes()


@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_bits_do_not_depend_on_who_else_computes(rule):
    h = cases.hyper(rule)

    def run():
        rng, p, state = start(rule, h, (190, 211), "F32")
        for count in range(3):
            assert step(rule, h, count, p, rng.standard_normal(p.shape), state)
        return p.tobytes()

    want, got = run(), []
    threads = [threading.Thread(target=lambda: got.append(run())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want] * 4


@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_refuses_arrays_that_do_not_fit_and_writes_nothing(rule):
    h = cases.hyper(rule)
    p, g = np.ones(6, np.float32), np.ones(6, np.float32)
    names = fields(rule, h, (2, 3))
    state = tuple(np.zeros(math.prod(s.shape((2, 3))), np.float32)
                  for s in RULES[rule].slots(h) if s.name in names)  # fmt: skip
    wrong = [
        (p[:5], p, g, state),
        (p, p, g[:5], state),
        (p, p, g, state[1:]),
        (p, p, g, (*state, g)),
        (p, p, g.astype(np.float64), state),
        (p, p, np.ones(12, np.float32)[::2], state),
        (p.astype(np.int32), p.astype(np.int32), g, state),
    ]
    for before, after, taken, parts in wrong:
        with pytest.raises(ValueError, match=rule):
            tensorwise.step(rule, before, after, taken, parts, (2, 3), h, 1e-3, ())
    assert (p == 1).all()
    assert (g == 1).all()
    assert not any(part.any() for part in state)


EXTREMES = [
    {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0), "momentum": 0.0},
    {"lr": 1e38, "eps": 1e38, "weight_decay": 1e38, "betas": (1 - 2**-53, 1 - 2**-53),
     "momentum": 1 - 2**-53, "beta2_decay": -1e300, "d": 1e38, "trust_coefficient": 1e38,
     "ns_coefficients": (1e38, 1e38, 1e38), "ns_steps": 99},
]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 10**6, 2**53])
@pytest.mark.parametrize("extreme", EXTREMES, ids=["small", "large"])
@pytest.mark.parametrize("rule", cases.TENSORWISE)
def test_nothing_raises_at_the_edges(rule, extreme, count):
    extra = {k: v for k, v in extreme.items() if k in cases.hyper(rule)}
    if rule == "adafactor":
        extra["eps"] = (extra["eps"], extra["eps"])
    h = cases.hyper(rule, **extra)
    rng, p, state = start(rule, h, (3, 2), "F32")
    step(rule, h, count, p, rng.standard_normal((3, 2)), state)


# --- what the papers say of a step ----------------------------------------------------------------


def test_a_step_of_lamb_is_as_long_as_lr_times_the_parameters():
    h = cases.hyper("lamb", lr=0.125, weight_decay=0.01)
    rng, p, state = start("lamb", h, (40, 30), "F64")
    for count in range(3):
        before = p.copy()
        step("lamb", h, count, p, rng.standard_normal(p.shape) * 10.0**count, state)
        moved, size = np.linalg.norm(p - before), np.linalg.norm(before)
        assert moved == pytest.approx(0.125 * size, rel=1e-12)


def test_a_first_step_of_lars_is_as_long_as_its_coefficient_times_the_parameters():
    h = cases.hyper("lars", lr=2.0, trust_coefficient=0.01)
    rng, p, state = start("lars", h, (40, 30), "F64")
    before = p.copy()
    step("lars", h, 0, p, rng.standard_normal(p.shape) * 1e6, state)
    size = np.linalg.norm(before)
    assert np.linalg.norm(p - before) == pytest.approx(0.02 * size, rel=1e-12)


def test_adafactor_keeps_rows_and_columns_only():
    h = cases.hyper("adafactor")
    assert fields("adafactor", h, (7,)) == ["variance"] == fields("adafactor", h, ())
    sizes = {s.name: s.shape((2, 300, 500)) for s in RULES["adafactor"].slots(h)}
    assert sizes == {"row_var": (2, 300, 1), "col_var": (2, 1, 500), "variance": None}


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)], ids=str)
def test_a_step_of_muon_has_singular_values_near_one(shape):
    h = cases.hyper("muon", lr=1.0, momentum=0.0)
    rng, p, state = start("muon", h, shape, "F64")
    before = p.copy()
    step("muon", h, 0, p, rng.standard_normal(shape), state)
    ratio = math.sqrt(max(1, shape[0] / shape[1]))
    values = np.linalg.svd((before - p) / ratio, compute_uv=False)
    assert values.max() < 1.25
    assert values.min() > (0.3 if shape[0] == shape[1] else 0.6)


# --- the passes and the BLAS ----------------------------------------------------------------------


@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize(
    ("function", "count", "h", "rest"),
    [
        (passes.scaled, 1, (0.7, 1.1), ()),
        (passes.blended, 2, (0.9, 0.1), ()),
        (passes.moved, 3, (-0.01, -0.1), (True,)),
        (passes.adapted, 4, (0.9, 0.1, 0.99, 0.01, 1.5, 1.2, 1e-8, 0.1), ()),
        (passes.whitened, 2, (0.9, 0.1, 1e-3), ()),
        (passes.factored, 3, (0.9, 0.1, 1e-3, 0.5), (7, 9)),
    ],
)
def test_bits_equal_the_undecorated_pass(function, count, h, rest, master):
    rng = np.random.default_rng(5)
    sizes = [126, 14, 18] if function is passes.factored else [126] * count
    arrays = [np.abs(rng.standard_normal(size)).astype(cases.NUMPY[master]) for size in sizes]
    theirs = [array.copy() for array in arrays]
    if function is passes.factored:
        arrays.append(np.full(9, np.nan))
        theirs.append(np.zeros(9))
    passes.run(function, tuple(arrays), h, *rest)
    function(*theirs, np.array(h), *rest)
    for one, other in zip(arrays, theirs, strict=True):
        assert one.tobytes() == other.tobytes()


def test_long_and_short_arrays_take_other_loops_of_the_same_bits():
    x = np.random.default_rng(1).standard_normal(passes.HOLD_GIL).astype(np.float32)
    short, long = x[:-1].copy(), x.copy()
    passes.run(passes.scaled, (short,), (0.3, 1.0))
    passes.run(passes.scaled, (long,), (0.3, 1.0))
    assert short.tobytes() == long[:-1].tobytes()


@pytest.mark.skipif(blas._found is None, reason="NumPy has another BLAS than OpenBLAS")
def test_openblas_has_one_thread_while_anyone_multiplies():
    read, write = blas._found
    before = read()
    try:
        write(2)
        with blas.one_thread():
            assert read() == 1
            with blas.one_thread():
                assert read() == 1
            assert read() == 1
        assert read() == 2
    finally:
        write(before)


def test_another_blas_keeps_its_threads(monkeypatch):
    monkeypatch.setattr(blas, "_found", None)
    with blas.one_thread():
        pass
    monkeypatch.setattr(blas, "_NAMES", ())
    assert blas._switches() is None
