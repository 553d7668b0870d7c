"""Rows alone under lazy rules: what came moves as if nothing else were there; the rest stays."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from gradpost.protocol.dtypes import NUMPY
from kernels import rows as by_row
from kernels.pool import Pool
from service.errors import KeyReused, Nonfinite, SparseUnsupported, TensorMismatch
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import apply_patch, parse_control, parse_spec
from service.sessions import session as module
from service.sessions import sparse
from service.sessions.arena import counts
from service.sessions.pushes import Gradient, marked
from service.sessions.registry import Sessions
from service.sessions.session import Shared
from service.settings import Settings
from service.wire.fit import presence
from service.wire.rows import Rows
from tests import oracle

SHAPES = {"a": (3, 2), "emb": (9, 3), "c": (5,), "flat": (8,), "deep": (4, 2, 2)}
TABLES = ("emb", "flat", "deep")
IDX = {"emb": [1, 4, 5], "flat": [0, 7], "deep": [2]}
RULES = ("sgd", "adagrad", "adam")


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(params=[-1, module.SMALL], ids=["pool", "loop"])
def sessions(pool, request, monkeypatch):
    monkeypatch.setattr(module, "SMALL", request.param)
    return Sessions(Shared(Settings(max_sessions=9), pool, Budget(1 << 26), Metrics()))


def dyadic(shape, seed):
    """Numbers whose squares add up without rounding, in any order."""
    return np.random.default_rng(seed).integers(-64, 65, shape) / 16


def start(seed=0, shapes=SHAPES, kind=np.float32):
    return {n: dyadic(s, seed + 100 * k).astype(kind) for k, (n, s) in enumerate(shapes.items())}


def part(values, idx=IDX):
    """The rows of some tensors, the other tensors whole."""
    return {n: v[idx[n]] if n in idx else v for n, v in values.items()}


names_of = itertools.count()


async def made(sessions, params, rule="adam", *, lazy=True, dtype="F32", **fields):
    optimizer = {"rule": rule, "lr": 0.1, "lazy": lazy} if isinstance(rule, str) else rule
    spec = parse_spec({"optimizer": optimizer, "dtype": dtype, **fields})[0]
    session = await sessions.create(f"s{next(names_of)}", spec)
    tensors = [(n, dtype, v.shape, v.ravel().astype(NUMPY[dtype])) for n, v in params.items()]
    await session.load(tensors, first_only=True)
    return session


def gradient(session, grads, idx, *, poison=math.nan, **control):
    """Rows where idx has the tensor; there and where nothing came the flat vector is poisoned."""
    layout, kind = session.arena.layout, NUMPY[session.spec.dtype]
    flat, found = np.zeros(layout.size, kind), []
    for at, entry in enumerate(layout.entries):
        if entry.name in idx:
            flat[entry.offset : entry.offset + entry.size] = poison
            width = math.prod(entry.shape[1:])
            values = np.ascontiguousarray(grads[entry.name], kind).ravel()
            found.append(Rows(at, width, np.array(idx[entry.name], np.int64), values))
        elif entry.name in grads:
            flat[entry.offset : entry.offset + entry.size] = grads[entry.name].ravel()
        elif idx:
            flat[entry.offset : entry.offset + entry.size] = poison
    present = presence(layout, grads)
    read = parse_control(control, text=False)
    return Gradient(flat, session.spec.dtype, read, lambda: None, present, tuple(found))


async def push(session, grads, idx=(), **control):
    sent = gradient(session, grads, idx, **control)
    return (await session.push(sent, hold=False)).summary


def params(session):
    flat = session.arena.versions.head.flat
    return {
        e.name: flat[e.offset : e.offset + e.size].reshape(e.shape).copy()
        for e in session.arena.layout.entries
    }


def state(session):
    return {f"{p.slot}/{p.entry.name}": p.flat.reshape(p.shape).copy()
            for p in session.arena.pieces()}  # fmt: skip


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def rows_of(found, idx=IDX):
    """Of state or parameters, the rows of the tables and the rest whole."""
    return {n: v[idx[k]] if (k := n.rpartition("/")[2]) in idx else v for n, v in found.items()}


def rest_of(found, idx=IDX):
    """The rows that did not come."""
    return {n: np.delete(v, idx[k], 0) for n, v in found.items()
            if (k := n.rpartition("/")[2]) in idx}  # fmt: skip


GROUPS = [
    {"params": ["emb", "c"], "name": "g", "lr": 0.03},
    {"params": ["deep"], "name": "still", "frozen": True},
]
OPTIONS = {
    "plain": {},
    "groups": {"groups": GROUPS},
    "global": {"clip": {"global_norm": 3.0}},
    "value": {"clip": {"value": 0.75}},
    "group": {"groups": GROUPS, "clip": {"group_norm": 2.0}},
    "own": {"groups": [{**GROUPS[0], "clip": {"value": 0.5}}], "clip": {"global_norm": 9.0}},
    "norms": {"norms": True},
    "ema": {"ema": {"decay": 0.75}},
    "schedule": {"schedule": {"kind": "linear", "total_steps": 5}, "missing": "skip"},
}
CONTROLS = (
    {}, {"grad_scale": 8.0}, {"overrides": {"default": {"lr": 0.5}}}, {"loss": 1.0},
    {"overrides": {"default": {"maximize": True}}, "grad_scale": 0.5},
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_as_tensors_of_those_rows_alone(sessions, rule, options, dtype):
    """The whole of a push: norm, clip, scale, overrides, schedule, counts, average."""
    fields = OPTIONS[options]

    async def scenario():
        first = start()
        whole = await made(sessions, first, rule, dtype=dtype, **fields)
        small = await made(sessions, part(first), rule, dtype=dtype, **fields)
        before = rest_of(params(whole)), rest_of(state(whole))
        for seed, control in enumerate(CONTROLS, 1):
            grads = part(start(seed))
            if fields.get("missing") and seed % 2:
                del grads["a"], grads["flat"]
            idx = {n: IDX[n] for n in grads if n in IDX}
            ours = await push(whole, grads, idx, **control)
            theirs = await push(small, grads, **control)
            if options == "norms":
                assert ours.update_norm == pytest.approx(theirs.update_norm, rel=1e-6)
                squares = sum((v.astype(float) ** 2).sum() for v in params(whole).values())
                assert ours.param_norm == pytest.approx(math.sqrt(squares), rel=1e-6)
                ours = ours._replace(update_norm=None, param_norm=None)
                theirs = theirs._replace(update_norm=None, param_norm=None)
            assert ours == theirs
        same(rows_of(params(whole)), params(small))
        same(rows_of(state(whole)), state(small))
        assert counts(whole.arena) == counts(small.arena)
        after = rest_of(params(whole)), rest_of(state(whole))
        average = {n for n in before[1] if n.startswith("ema/")}
        for name in average:  # of what does not move it is that itself, to rounding
            np.testing.assert_allclose(after[1].pop(name), before[1].pop(name), rtol=1e-6)
        same(after[0], before[0])
        same(after[1], before[1])

    asyncio.run(scenario())


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_change_follow_the_oracle(sessions, rule):
    """Other rows in each push; every row has the count of its tensor (as SparseAdam's step)."""

    async def scenario():
        session = await made(sessions, start(), rule, dtype="F64")
        hyper = session.terms[0].hyper
        p = params(session)["emb"]
        kept = oracle.start(rule, hyper, p)
        rng = np.random.default_rng(5)
        for count in range(40):
            idx = np.sort(rng.choice(9, rng.integers(0, 9), replace=False))
            grads = {n: rng.standard_normal(s) for n, s in SHAPES.items()}
            grads["emb"] = rng.standard_normal((idx.size, 3))
            old = {name: slot[idx] for name, slot in kept.items()}
            p[idx], new = oracle.step(rule, hyper, count, p[idx], grads["emb"], old)
            for name, slot in kept.items():
                slot[idx] = new[name]
            await push(session, grads, {"emb": idx})
        np.testing.assert_allclose(params(session)["emb"], p, rtol=1e-12, atol=1e-12)
        for name, slot in kept.items():
            np.testing.assert_allclose(state(session)[f"{name}/emb"], slot, rtol=1e-12, atol=1e-14)

    asyncio.run(scenario())


@pytest.mark.parametrize("clip", [None, {"global_norm": 1.0}, {"value": 0.5}])
@pytest.mark.parametrize("rule", RULES)
def test_all_rows_are_a_dense_push(sessions, rule, clip):
    async def scenario():
        first = {"emb": start()["emb"]}
        one = await made(sessions, first, rule, clip=clip, norms=True)
        two = await made(sessions, first, rule, clip=clip, norms=True)
        for seed in range(1, 4):
            grads = {"emb": np.random.default_rng(seed).standard_normal((9, 3)).astype(np.float32)}
            ours = await push(one, grads, {"emb": range(9)})
            assert ours == await push(two, grads)
        same(params(one), params(two))
        same(state(one), state(two))

    asyncio.run(scenario())


def test_nothing_is_read_or_written_beside_the_rows(sessions):
    """NaN in the gradient, the parameters and the state of all other rows, of its own bits."""

    async def scenario():
        session = await made(sessions, start(), "adam", clip={"value": 9.0})
        arena = session.arena
        odd = np.array(0x7FC12345, np.uint32).view(np.float32)
        for entry in arena.layout.entries:
            if entry.name in IDX:
                table = np.ones(entry.shape, bool)
                table[IDX[entry.name]] = False
                at = entry.offset + np.flatnonzero(table)
                for array in (arena.versions.head.flat, *arena.state):
                    array[at] = odd
        flat, before = arena.versions.head.flat, (rest_of(params(session)), rest_of(state(session)))
        grads = part(start(1))
        for sequence in range(3):
            control = {"worker": "w", "sequence": sequence, "base_version": "1-1"}
            summary = await push(session, grads, IDX, poison=odd, **control)
            assert summary.applied
            assert summary.params_finite
            squares = sum((g.astype(float) ** 2).sum() for g in grads.values())
            assert summary.grad_norm == math.sqrt(squares)
        assert arena.versions.head.flat is flat
        same(rest_of(params(session)), before[0])
        same(rest_of(state(session)), before[1])
        assert np.isfinite(
            np.concatenate([v.ravel() for v in part(params(session)).values()])
        ).all()

    asyncio.run(scenario())


@pytest.mark.parametrize("skip", [False, True])
def test_a_row_that_is_not_finite_is_named(sessions, skip):
    async def scenario():
        session = await made(sessions, start(), on_nonfinite="skip" if skip else "refuse")
        before = params(session), state(session)
        grads = part(start(1))
        grads["emb"][1, 2] = -np.inf
        if skip:
            summary = await push(session, grads, IDX)
            assert (summary.applied, summary.skipped) == (False, "nonfinite")
        else:
            with pytest.raises(Nonfinite, match="'emb' is not finite at flat index 14") as caught:
                await push(session, grads, IDX)
            assert caught.value.context == {"tensor": "emb", "index": 4 * 3 + 2}
            grads["emb"][1, 2] = 0
            grads["c"][3] = np.nan
            with pytest.raises(Nonfinite, match="'c' is not finite at flat index 3"):
                await push(session, grads, IDX)
        same(params(session), before[0])
        same(state(session), before[1])
        assert set(counts(session.arena).values()) == {0}

    asyncio.run(scenario())


def test_large_numbers_of_float64_are_no_infinities(sessions):
    async def scenario():
        session = await made(sessions, start(), "sgd", dtype="F64", clip={"value": 1.0})
        grads = {n: np.full(v.shape, 1e200) for n, v in part(start()).items()}
        before = params(session)
        summary = await push(session, grads, IDX)
        assert (summary.applied, summary.grad_norm, summary.clipped) == (True, None, True)
        np.testing.assert_allclose(part(params(session))["emb"], part(before)["emb"] - 0.1)

    asyncio.run(scenario())


def test_no_rows_count_as_a_push_of_their_tensor(sessions):
    async def scenario():
        session = await made(sessions, start(), "adam", missing="skip")
        before = params(session), state(session)
        none = {"emb": np.empty((0, 3))}
        summary = await push(session, none, {"emb": []})
        assert (summary.applied, summary.step, summary.grad_norm) == (True, 1, 0.0)
        same(params(session), before[0])
        same(state(session), before[1])
        assert {n: c for n, c in counts(session.arena).items() if c} == {"emb": 1}
        strict = await made(sessions, start(), "adam")
        with pytest.raises(TensorMismatch, match="lacks 'a'"):
            await push(strict, none, {"emb": []})

    asyncio.run(scenario())


def test_rows_of_empty_tensors_and_of_frozen_ones_move_nothing(sessions):
    async def scenario():
        first = {"emb": start()["emb"], "none": np.empty((4, 0), np.float32), "x": np.ones((2, 2))}
        session = await made(sessions, first, "adam", groups=[{"params": ["x"], "frozen": True}])
        grads = {"emb": np.ones((1, 3)), "none": np.empty((2, 0)), "x": np.full((1, 2), np.nan)}
        control = {"worker": "w", "sequence": 1, "base_version": "1-1"}
        idx = {"emb": [2], "none": [0, 3], "x": [1]}
        summary = await push(session, grads, idx, **control)
        assert summary.grad_norm == math.sqrt(3)
        assert counts(session.arena) == {"emb": 1, "none": 1, "x": 0}
        np.testing.assert_array_equal(params(session)["x"], np.ones((2, 2)))
        assert (await session.push(gradient(session, grads, idx, **control), hold=False)).replayed

    asyncio.run(scenario())


def test_a_held_version_stays_and_its_rows_are_copied(sessions):
    async def scenario():
        one = await made(sessions, start(), "adam", norms=True)
        two = await made(sessions, start(), "adam", norms=True)
        held = []
        for seed in range(1, 7):
            if seed not in (2, 5):
                version = await one.hold(None, 0.0)
                held.append((version, version.flat.copy()))
            idx = {n: np.roll(range(SHAPES[n][0]), seed)[:2] for n in TABLES}
            idx = {n: np.sort(i) for n, i in idx.items()}
            grads = part(start(seed), idx)
            assert await push(one, grads, idx) == await push(two, grads, idx)
            same(params(one), params(two))
            if len(held) == 2:
                version, was = held.pop(0)
                np.testing.assert_array_equal(version.flat, was)
                one.release(version)
        same(state(one), state(two))

    asyncio.run(scenario())


def scattered(grads, idx, kind=np.float32):
    dense = {n: np.zeros(SHAPES[n], kind) for n in grads}
    for name, values in grads.items():
        dense[name][idx.get(name, ...)] = values
    return dense


@pytest.mark.parametrize("how", ["patch", "override"])
def test_rows_for_a_rule_that_ceased_to_be_lazy_are_a_dense_gradient(sessions, how):
    async def scenario():
        one = await made(sessions, start(), "adam", groups=[{"params": ["flat"], "lazy": True}])
        two = await made(
            sessions, start(), "adam", lazy=False, groups=[{"params": ["flat"], "lazy": True}]
        )
        control = {"worker": "w", "sequence": 1, "base_version": "1-1"}
        if how == "override":
            control["overrides"] = {"default": {"lazy": False}}
        grads = part(start(1))
        sent = gradient(one, grads, IDX, **control)
        if how == "patch":
            await one.patch(lambda spec: apply_patch(spec, {"optimizer": {"lazy": False}}), None)
        kept = {"flat": IDX["flat"]}
        dense = {**scattered({n: g for n, g in grads.items() if n != "flat"}, IDX),
                 "flat": grads["flat"]}  # fmt: skip
        ours = (await one.push(sent, hold=False)).summary
        assert ours == await push(two, dense, kept, **control)
        same(params(one), params(two))
        same(state(one), state(two))
        again = await one.push(gradient(one, grads, IDX, **control), hold=False)
        assert (again.replayed, again.summary) == (True, ours)

    asyncio.run(scenario())


def test_what_did_not_come_beside_rows_that_are_scattered_is_zero(sessions):
    async def scenario():
        empty = {"emb": start()["emb"], "none": np.empty((4, 0), np.float32), "a": start()["a"]}
        control = {"worker": "w", "sequence": 1, "base_version": "1-1"}
        for lazy in (True, False):
            session = await made(sessions, empty, "adam", lazy=lazy, missing="skip")
            for sequence, came in enumerate((["none"], ["emb"], ["emb", "none"])):
                control["sequence"] = sequence
                grads = {n: np.ones((1, empty[n].shape[1])) for n in came}
                idx = {n: [2] for n in came}
                summary = await push(session, grads, idx, **control)
                assert summary.grad_norm == (math.sqrt(3) if "emb" in came else 0)
                again = await session.push(gradient(session, grads, idx, **control), hold=False)
                assert again.replayed
            assert counts(session.arena) == {"emb": 2, "none": 2, "a": 0}
            np.testing.assert_array_equal(params(session)["a"], empty["a"])

    asyncio.run(scenario())


def test_the_digest_is_of_what_came(sessions):
    async def scenario():
        session = await made(sessions, start(), "adam", missing="skip")
        control = {"worker": "w", "sequence": 1, "base_version": "1-1"}
        grads = part(start(1))

        def mark(grads=grads, idx=IDX, **more):
            return marked(session, gradient(session, grads, idx, **{**control, **more}))

        def changed(name, at):
            values = grads[name].copy()
            values.flat[at] += 1
            return {**grads, name: values}

        without = {n: g for n, g in grads.items() if n != "a"}
        seen = {
            mark(), mark(loss=1.0), mark(changed("emb", 0)), mark(changed("deep", 3)),
            mark(changed("a", 0)), mark(changed("c", 4)), mark(idx={**IDX, "emb": [1, 4, 6]}),
            mark(without), mark({**without, "flat": np.empty(0)}, {**IDX, "flat": []}),
            mark(scattered(grads, IDX), {}),
        }  # fmt: skip
        assert len(seen) == 10
        assert mark(poison=7.0) == mark(poison=-1.0) == mark()

    asyncio.run(scenario())


def test_a_repeat_is_one_whatever_became_of_lazy(sessions):
    async def scenario():
        session = await made(sessions, start(), "adam")
        control = {"worker": "w", "sequence": 1, "base_version": "1-1"}
        grads = part(start(1))
        first = await push(session, grads, IDX, **control)

        async def again(grads=grads, idx=IDX):
            return await session.push(gradient(session, grads, idx, **control), hold=False)

        for lazy in (True, False, True):
            change = {"optimizer": {"lazy": lazy}}
            await session.patch(lambda spec, change=change: apply_patch(spec, change), None)
            outcome = await again()
            assert (outcome.replayed, outcome.summary) == (True, first)
        with pytest.raises(KeyReused):
            await again({**grads, "flat": grads["flat"] + 1})
        with pytest.raises(KeyReused):
            await again(idx={**IDX, "flat": [1, 7]})
        assert session.step == 1

    asyncio.run(scenario())


def test_a_group_that_comes_meanwhile_is_missing_from_the_push(sessions):
    async def scenario():
        session = await made(sessions, start(), "adam", missing="skip")
        sent = gradient(session, part(start(1)), IDX)
        await session.add_group({"lr": 0.1}, [("new", "F32", (2,), np.ones(2, np.float32))])
        twin = await made(sessions, start(), "adam")
        await push(twin, part(start(1)), IDX)
        assert (await session.push(sent, hold=False)).summary.applied
        found = params(session)
        np.testing.assert_array_equal(found.pop("new"), [1, 1])
        same(found, params(twin))

    asyncio.run(scenario())


def test_who_takes_rows(sessions):
    async def scenario():
        groups = [
            {"params": ["emb"], "rule": "adamw", "name": "w"},
            {"params": ["c"], "lazy": False, "name": "off"},
        ]
        session = await made(sessions, start(), "adam", groups=groups)
        index = session.arena.layout.index
        assert sparse.check_rows(session, index["flat"])
        assert not sparse.check_rows(session, index["c"])
        with pytest.raises(SparseUnsupported, match="rule adamw of its group 'w'") as caught:
            sparse.check_rows(session, index["emb"])
        assert caught.value.context == {"tensor": "emb", "rule": "adamw"}
        assert (caught.value.status, caught.value.slug) == (422, "sparse-unsupported")
        override = parse_control({"overrides": {"off": {"lazy": True}}}, text=False)
        assert sparse.check_rows(session, index["c"], session.terms_of(override))
        with pytest.raises(SparseUnsupported, match="split the tensor"):
            sparse.check_rows(session, index["flat"]._replace(shape=(1 << 32,)))
        session.spec = session.spec.model_copy(
            update={"update": session.spec.update.model_copy(update={"mode": "sync"})}
        )
        with pytest.raises(SparseUnsupported, match="mode sync"):
            sparse.check_rows(session, index["flat"])
        assert not sparse.check_rows(session, index["c"])

    asyncio.run(scenario())


def test_few_rows_of_a_large_tensor_are_a_small_push(pool):
    sessions = Sessions(Shared(Settings(), pool, Budget(1 << 26), Metrics()))

    async def scenario():
        session = await made(sessions, {"emb": np.zeros((50_000, 8), np.float32)}, "adam")
        few = gradient(session, {"emb": np.ones((20, 8))}, {"emb": range(20)})
        assert session._is_small(few)
        many = gradient(session, {"emb": np.ones((5_000, 8))}, {"emb": range(5_000)})
        assert not session._is_small(many)
        assert not session._is_small(few._replace(rows=()))
        key = parse_control({"worker": "w", "sequence": 1, "base_version": 1}, text=False)
        assert session._is_small(few._replace(control=key))
        await session.push(few._replace(control=key), hold=False)
        assert not session._is_small(few._replace(control=key))
        held = await session.hold(None, 0.0)
        assert not session._is_small(few)
        session.release(held)
        assert session._is_small(few)
        await session.patch(lambda spec: apply_patch(spec, {"optimizer": {"lazy": False}}), None)
        assert not session._is_small(few)

    asyncio.run(scenario())


@pytest.mark.parametrize("norms", [False, True])
def test_bits_do_not_depend_on_threads(norms):
    rng = np.random.default_rng(3)
    shapes = {"emb": (60_000, 20), "w": (700, 1000)}
    first = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    idx = np.sort(rng.choice(60_000, 40_000, replace=False))
    grads = {"emb": rng.standard_normal((40_000, 20)), "w": first["w"]}
    assert len(by_row.chunks(40_000, 20)) > 1
    seen = []
    for threads in (1, 2, 4):
        pool = Pool(threads)
        sessions = Sessions(Shared(Settings(), pool, Budget(1 << 28), Metrics()))

        async def scenario(sessions=sessions):
            session = await made(sessions, first, "adam", norms=norms, clip={"global_norm": 1.0})
            held = await session.hold(None, 0.0)
            summary = await push(session, grads, {"emb": idx})
            session.release(held)
            return (
                summary,
                params(session)["emb"].tobytes(),
                state(session)["exp_avg/emb"].tobytes(),
            )

        seen.append(asyncio.run(scenario()))
        pool.close()
    assert seen[0] == seen[1] == seen[2]
    assert (seen[0][0].update_norm is not None) is norms
