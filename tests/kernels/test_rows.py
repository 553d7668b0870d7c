"""Loops over rows: the bits of the dense loops, and not a byte beside them."""

import threading

import numpy as np
import pytest

from kernels import cpu, digests, rows, rules
from kernels.pool import Pool
from kernels.registry import RULES
from tests import oracle
from tests.kernels import cases

MASTERS = ("F32", "F64")
BOUND = 0.5


def start(variant, master, count, width, *, clamped=False, seed=0):
    """A kernel, a tensor of count rows, its state, and coefficients of the fourth update."""
    h = cases.hyper(variant, lr=0.1)
    rng = np.random.default_rng(seed)
    kind = cases.NUMPY[master]
    p = rng.standard_normal(count * width).astype(kind)
    state = tuple(abs(rng.standard_normal(p.size)).astype(kind) for _ in RULES[variant].slots(h))
    c = cases.coefficients(variant, h, 3, master)
    if clamped:
        c = np.append(c, kind(BOUND))
    return rows.kernel(variant, master, clamped=clamped), p, state, c


def some(count, taken, width, master, seed=1):
    rng = np.random.default_rng(seed)
    idx = np.sort(rng.choice(count, taken, replace=False)).astype(np.int64)
    return idx, rng.standard_normal(taken * width).astype(cases.NUMPY[master])


def copies(p, state):
    return p.copy(), tuple(slot.copy() for slot in state)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("variant", rows.VARIANTS)
@pytest.mark.parametrize(("count", "taken", "width"), [(9, 4, 1), (50, 20, 3), (40, 40, 17),
                                                       (300, 64, 64), (7, 1, 257)])  # fmt: skip
def test_rows_have_the_bits_of_the_dense_loop(variant, master, count, taken, width, clamped):
    run, p, state, c = start(variant, master, count, width, clamped=clamped)
    idx, g = some(count, taken, width, master)
    dense = cpu.kernel(variant, master, master, clamped=clamped)
    want, kept = copies(p, state)
    for place, row in enumerate(idx):  # each alone, as a tensor of one row
        at = slice(row * width, (row + 1) * width)
        one = g[place * width : (place + 1) * width]
        assert dense(want[at], want[at], one, tuple(s[at] for s in kept), c, 0, width)
    assert run(p, g, state, c, idx, width, 0, taken)
    for ours, theirs in zip((p, *state), (want, *kept), strict=True):
        assert ours.tobytes() == theirs.tobytes()  # the other rows among them


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("variant", rows.VARIANTS)
def test_the_digests_of_the_dense_loops_are_theirs(variant, master, clamped):
    """On the inputs of `kernels.digests`: so the table of revisions needs no rows of its own."""
    size, kind = digests.SIZE, cases.NUMPY[master]
    run = rows.kernel(variant, master, clamped=clamped)
    dense = cpu.kernel(variant, master, master, clamped=clamped)
    seen = 0
    for hyper in digests.configurations(variant):
        if RULES[variant].variant(hyper) != variant:
            continue
        p = digests.values(master, 0).copy()
        state = tuple(np.full(size, slot.initial, kind) for slot in RULES[variant].slots(hyper))
        want, kept = copies(p, state)
        for step, numbers in enumerate(digests.coefficients(variant, hyper)):
            c = np.array((*numbers, BOUND) if clamped else numbers, kind)
            g = digests.values(master, step + 1)
            finite = dense(want, want, g, kept, c, 0, size)
            idx = np.arange(size // 4)
            assert run(p, g, state, c, idx, 4, 0, idx.size) == finite
            for ours, theirs in zip((p, *state), (want, *kept), strict=True):
                np.testing.assert_array_equal(ours, theirs)
                assert (np.signbit(ours) == np.signbit(theirs)).all()
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("variant", rows.VARIANTS)
def test_bits_equal_the_undecorated_rule(variant):
    run, p, state, c = start(variant, "F32", 12, 5)
    idx, g = some(12, 6, 5, "F32")
    want, kept = copies(p, state)
    for place, row in enumerate(idx):
        for j in range(5):
            i = row * 5 + j
            after = rules.VARIANTS[variant](
                want[i], g[place * 5 + j], *(s[i] for s in kept), tuple(c)
            )
            for array, value in zip((want, *kept), after, strict=True):
                array[i] = value
    run(p, g, state, c, idx, 5, 0, 6)
    for ours, theirs in zip((p, *state), (want, *kept), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("variant", rows.VARIANTS)
def test_a_step_is_as_close_to_exact_arithmetic_as_a_dense_one(variant, master):
    run, p, state, c = start(variant, master, 200, 24)
    idx, g = some(200, 90, 24, master)
    h = cases.hyper(variant, lr=0.1)
    table, names = p.reshape(200, 24).copy(), cases.names(variant, h)
    old = {n: s.reshape(200, 24)[idx].copy() for n, s in zip(names, state, strict=True)}
    exact, after = oracle.step(variant, h, 3, table[idx], g.reshape(-1, 24), old, np.longdouble)
    run(p, g, state, c, idx, 24, 0, 90)
    ulp = {"F32": 2.0**-24, "F64": 2.0**-53}[master]
    moved = abs(exact - table[idx]).max()
    error = abs(p.reshape(200, 24)[idx] - exact)
    assert (error <= 2 * ulp * (abs(exact) + 4 * moved)).all()
    for name, slot in zip(names, state, strict=True):
        np.testing.assert_allclose(
            slot.reshape(200, 24)[idx], after[name].astype(float), rtol=8 * ulp, atol=8 * ulp
        )


def test_bits_do_not_depend_on_split_form_or_threads():
    count, width = 40_000, 40
    run, p, state, c = start("adam", "F32", count, width)
    idx, g = some(count, 20_000, width, "F32")
    want, kept = copies(p, state)
    run(want, g, kept, c, idx, width, 0, idx.size)

    def check(after, own):
        for ours, theirs in zip((after, *own), (want, *kept), strict=True):
            assert ours.tobytes() == theirs.tobytes()

    for form in (run._held, run._free):
        after, own = copies(p, state)
        for lo, hi in ((0, 1), (1, 1), (1, 777), (777, idx.size)):
            assert form(after, g, *own, idx, c, width, lo, hi) == 1
        check(after, own)
    for threads in (1, 3):
        after, own = copies(p, state)
        parts = rows.chunks(idx.size, width)
        assert len(parts) > 1
        assert (parts[0][0], parts[-1][1]) == (0, idx.size)

        def program(after=after, own=own, parts=parts):
            finite = yield [
                lambda lo=lo, hi=hi: run(after, g, own, c, idx, width, lo, hi) for lo, hi in parts
            ]
            return all(finite)

        pool = Pool(threads)
        try:
            assert pool.run(program())
        finally:
            pool.close()
        check(after, own)


@pytest.mark.parametrize(
    ("wrong", "lo", "hi"),
    [
        ({"idx": [0, 2, 2]}, 0, 3),
        ({"idx": [2, 1, 3]}, 0, 3),
        ({"idx": [-1, 0, 1]}, 0, 3),
        ({"idx": [0, 1, 4]}, 0, 3),
        ({"idx": [0, 1, 2**62]}, 0, 3),
        ({}, 0, 4),
        ({}, -1, 2),
        ({}, 2, 1),
        ({"width": 0}, 0, 3),
        ({"width": -3}, 0, 3),
        ({"g": np.zeros(8, np.float32)}, 0, 3),
        ({"g": np.zeros(9, np.float64)}, 0, 3),
        ({"g": np.zeros(18, np.float32)[::2]}, 0, 3),
        ({"idx": np.arange(3, dtype=np.int32)}, 0, 3),
        ({"idx": np.arange(6)[::2]}, 0, 3),
        ({"c": np.zeros(3, np.float32)}, 0, 3),
        ({"p": np.zeros(24, np.float32)[::2]}, 0, 3),
        ({"state": (np.zeros(12, np.float32), np.zeros(11, np.float32))}, 0, 3),
        ({"state": (np.zeros(12, np.float32),)}, 0, 3),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(wrong, lo, hi):
    run, p, state, c = start("adam", "F32", 4, 3)
    given = {"p": p, "g": np.ones(9, np.float32), "state": state, "c": c, "idx": [0, 1, 3],
             "width": 3, **wrong}  # fmt: skip
    idx = np.asarray(given["idx"])
    arrays = (given["p"], *given["state"])
    before = [array.tobytes() for array in arrays]
    with pytest.raises(ValueError, match="adam"):
        run(given["p"], given["g"], given["state"], given["c"], idx, given["width"], lo, hi)
    assert [array.tobytes() for array in arrays] == before


@pytest.mark.parametrize("variant", ["sgd_momentum", "adam_amsgrad", "lion"])
def test_other_rules_have_no_loop_over_rows(variant):
    with pytest.raises(ValueError, match="no loop over rows"):
        rows.kernel(variant, "F32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_written_is_looked_at_and_nothing_else(bad):
    run, p, state, c = start("sgd", "F32", 4, 3)
    p[0] = bad
    assert run(p, np.ones(3, np.float32), state, c, np.array([1]), 3, 0, 1)
    p[5] = bad
    assert not run(p, np.ones(3, np.float32), state, c, np.array([1]), 3, 0, 1)


def test_parts_are_whole_rows_and_few():
    assert rows.chunks(0, 5) == [(0, 0)]
    assert rows.chunks(100, 64) == [(0, 100)]
    for count, width in ((1_000_000, 1), (3, 1 << 22), (70_000, 100)):
        parts = rows.chunks(count, width)
        assert [lo for lo, _ in parts[1:]] == [hi for _, hi in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, count)
        assert len(parts) <= 2 + rows.cost(count, width) // cpu.ALONE


def test_a_long_call_lets_other_threads_run():
    count, width = 200_000, 32
    run, p, state, c = start("adam", "F32", count, width)
    g, idx = np.ones(p.size, np.float32), np.arange(count)
    done, ticks = threading.Event(), []

    def work():
        for _ in range(20):
            run(p, g, state, c, idx, width, 0, count)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        ticks.append(True)
    thread.join()
    assert len(ticks) > 10
