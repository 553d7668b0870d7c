import json
import threading
from itertools import pairwise

import numpy as np
import pytest

from kernels import cpu, rules
from kernels.pool import Pool
from kernels.registry import COEFFICIENTS, RULES
from tests.kernels import cases


def start(variant_case, size, master, grad, seed=0):
    rule, extra = variant_case
    h = cases.hyper(rule, **extra)
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(size).astype(cases.NUMPY[master])
    state = tuple(
        np.abs(rng.standard_normal(size)).astype(cases.NUMPY[master]) for _ in RULES[rule].slots(h)
    )
    g = cases.encode(rng.standard_normal(size), grad)
    return cases.kernel(rule, h, master, grad), p, g, state, cases.coefficients(rule, h, 3, master)


VARIANTS = {
    RULES[rule].variant(cases.hyper(rule, **extra)): (rule, extra) for rule, extra in cases.CASES
}


def test_every_variant_is_covered_and_declared():
    assert set(VARIANTS) == set(rules.VARIANTS) == set(COEFFICIENTS)
    for rule, extra in cases.CASES:
        h = cases.hyper(rule, **extra)
        variant = RULES[rule].variant(h)
        scalars = RULES[rule].start(h, 0.1)
        assert len(scalars) == len(RULES[rule].scalars) <= 2
        assert len(RULES[rule].advance(h, 0, 0.1, scalars)) == len(scalars)
        assert len(RULES[rule].coefficients(h, 0, 0.1, scalars)) == COEFFICIENTS[variant]
        assert len(RULES[rule].slots(h)) == cpu.slot_count(variant) <= 3


@pytest.mark.parametrize(("master", "grad"), cases.PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_equal_the_undecorated_rule(variant, master, grad):
    run, p, g, state, h = start(VARIANTS[variant], 257, master, grad)
    kind = cases.NUMPY[master]
    wide = [kind(x) for x in cases.decode(g, grad)]
    want = [
        rules.VARIANTS[variant](p[i], wide[i], *(s[i] for s in state), tuple(h)) for i in range(257)
    ]
    run(p, p, g, state, h, 0, 100)
    run(p, p, g, state, h, 100, 257)
    for ours, theirs in zip((p, *state), zip(*want, strict=True), strict=True):
        assert ours.tobytes() == np.array(theirs, kind).tobytes()


SPECIAL = [0.0, -0.0, 1e-45, -1e-30, 3e38, np.inf, -np.inf, np.nan, 1.0]


@pytest.mark.parametrize("rule", ["rprop", "lion", "yogi"])
def test_signs_of_special_values_equal_the_undecorated_rule(rule):
    h = cases.hyper(rule)
    g, last = (x.ravel().astype(np.float32) for x in np.meshgrid(SPECIAL, SPECIAL))
    size = g.size
    state = tuple(np.full(size, 0.5, np.float32) for _ in RULES[rule].slots(h))
    state[0][:] = last
    p, c = np.ones(size, np.float32), cases.coefficients(rule, h, 3, "F32")
    with np.errstate(all="ignore"):
        want = [
            rules.VARIANTS[rule](p[i], g[i], *(s[i] for s in state), tuple(c)) for i in range(size)
        ]
    cases.kernel(rule, h, "F32", "F32")(p, p, g, state, c, 0, size)
    for ours, theirs in zip((p, *state), zip(*want, strict=True), strict=True):
        np.testing.assert_array_equal(ours, np.array(theirs, np.float32))


@pytest.mark.parametrize("rule", cases.DEFAULTS)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(rule):
    h = cases.hyper(rule, **({"t0": 2} if rule == "asgd" else {}))
    entry, lr, size = RULES[rule], float(h["lr"]), 257
    rng = np.random.default_rng(5)
    grads = rng.standard_normal((8, size)).astype(np.float32)
    run = cases.kernel(rule, h, "F32", "F32")

    def advance(p, state, scalars, steps):
        for count in steps:
            c = np.array(entry.coefficients(h, count, lr, scalars), np.float32)
            run(p, p, grads[count], state, c, 0, size)
            scalars = entry.advance(h, count, lr, scalars)
        return p, state, scalars

    def begin():
        return np.ones(size, np.float32), cases.slots(rule, h, size, "F32"), entry.start(h, lr)

    def saved(p, state, scalars):
        return [array.tobytes() for array in (p, *state)], json.dumps(scalars)

    whole = saved(*advance(*begin(), range(8)))
    (first, *rest), scalars = saved(*advance(*begin(), range(3)))
    arrays = [np.frombuffer(raw, np.float32).copy() for raw in (first, *rest)]
    again = advance(arrays[0], tuple(arrays[1:]), tuple(json.loads(scalars)), range(3, 8))
    assert saved(*again) == whole


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_split_copy_or_form(variant):
    size = 70_001
    run, p, g, state, h = start(VARIANTS[variant], size, "F32", "F32")

    def after(cuts, *, copy, loop=None):
        out = np.full_like(p, np.nan) if copy else p.copy()
        own = tuple(slot.copy() for slot in state)
        for lo, hi in pairwise(cuts):
            if loop is None:
                assert run(p if copy else out, out, g, own, h, lo, hi)
            else:
                assert loop(p if copy else out, out, g, *own, h, lo, hi, copy) == 1
        return [array.tobytes() for array in (out, *own)]

    want = after([0, size], copy=False)
    assert after([0, size], copy=True) == want
    assert after([0, 1, 2, 9, 4096, 4097, 65_536, size], copy=False) == want
    assert after([0, 1, 2, 9, 4096, 4097, 65_536, size], copy=True) == want
    assert after([0, 3, size], copy=False, loop=run._held) == want
    assert after([0, 3, size], copy=True, loop=run._free) == want


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads):
    size = 1_500_007
    run, p, g, state, h = start(("adam", {}), size, "F32", "F32")
    alone = p.copy()
    own = tuple(slot.copy() for slot in state)
    run(alone, alone, g, own, h, 0, size)

    def program():
        finite = yield [
            lambda lo=lo, hi=hi: run(p, p, g, state, h, lo, hi) for lo, hi in cpu.chunks(0, size)
        ]
        return all(finite)

    pool = Pool(threads)
    try:
        assert pool.run(program())
    finally:
        pool.close()
    assert p.tobytes() == alone.tobytes()
    assert [a.tobytes() for a in state] == [a.tobytes() for a in own]


@pytest.mark.parametrize("rule", [rule for rule in cases.DEFAULTS])
def test_without_decay_an_infinite_parameter_stays_infinite(rule):
    h = cases.hyper(rule, weight_decay=0)
    p = np.array([np.inf, -np.inf, 1.0], np.float32)
    g = np.ones(3, np.float32)
    run = cases.kernel(rule, h, "F32", "F32")
    state = cases.slots(rule, h, 3, "F32")
    assert not run(p, p, g, state, cases.coefficients(rule, h, 0, "F32"), 0, 3)
    assert p[0] == np.inf
    assert p[1] == -np.inf
    assert p[2] < 1


@pytest.mark.parametrize("at", [0, 8, 99])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("master", ["F32", "F64"])
def test_says_when_a_parameter_is_not_finite(master, bad, at):
    run, p, g, state, h = start(("sgd", {}), 100, master, master)
    g[at] = bad
    assert not run(p, p, g, state, h, 0, 100)
    assert not np.isfinite(p[at])
    assert run(p, p, g, state, h, 0, at)
    assert run(p, p, g, state, h, at + 1, 100)


def test_float16_gradients_come_as_float16_or_bits():
    run, p, g, state, h = start(("sgd", {}), 100, "F32", "F16")
    q = p.copy()
    run(p, p, g, state, h, 0, 100)
    run(q, q, g.view(np.float16), state, h, 0, 100)
    assert p.tobytes() == q.tobytes()


def test_refuses_arrays_that_do_not_fit_and_writes_nothing():
    run, p, g, (m, v), h = start(("adam", {}), 100, "F32", "F32")
    kept = p.tobytes(), m.tobytes(), v.tobytes()
    wrong = [
        (p, p, g, (m, v), h, 0, 101),
        (p, p, g, (m, v), h, -1, 100),
        (p, p, g, (m, v), h, 60, 50),
        (p, p, g, (m,), h, 0, 100),
        (p, p, g, (m, v, v), h, 0, 100),
        (p, p, g, (m, v), h[:-1], 0, 100),
        (p, p, g, (m, v), h.astype(np.float64), 0, 100),
        (p, p, g[:50], (m, v), h, 0, 100),
        (p, p, g.view(np.int32), (m, v), h, 0, 100),
        (p, p, g, (m, v.view(np.int32)), h, 0, 100),
        (p, p, g, (m, np.zeros(200, np.float32)[::2]), h, 0, 100),
        (p[:50].copy(), p, g, (m, v), h, 0, 100),
        (p.astype(np.float64), p, g, (m, v), h, 0, 100),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="adam"):
            run(*call)
    assert kept == (p.tobytes(), m.tobytes(), v.tobytes())


@pytest.mark.parametrize("lo", [0, 100, 65_536])
@pytest.mark.parametrize("size", [0, 1, 524_287, 524_288, 1_000_003, 50_000_000])
def test_chunks_cover_everything_once_and_are_aligned(lo, size):
    parts = cpu.chunks(lo, lo + size)
    assert parts[0][0] == lo
    assert parts[-1][1] == lo + size
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(start % cpu.UNIT == 0 for start, _ in parts[1:])
    assert (len(parts) == 1) == (size < cpu.ALONE)
    assert all(hi - lo <= 5 << 20 for lo, hi in parts)


def test_concurrent_first_uses_compile_once(monkeypatch):
    made = []
    real = cpu.Kernel

    def counting(*key, **more):
        made.append(key)
        return real(*key, **more)

    monkeypatch.setattr(cpu, "Kernel", counting)
    monkeypatch.setattr(cpu, "_kernels", {})
    assert not cpu.ready("sgd", "F32", "F32")
    gate = threading.Barrier(4)
    got = []

    def ask():
        gate.wait()
        got.append(cpu.kernel("sgd", "F32", "F32"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len({id(found) for found in got}) == 1
    cpu.warm([("sgd", "F32", "F32")])
    assert cpu.ready("sgd", "F32", "F32")
    assert len(made) == 1
