"""Rules that need whole tensors, in sessions: state of other shapes, groups, clipping, memory."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from kernels.pool import Pool
from service.errors import InsufficientMemory, Nonfinite, TensorMismatch
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import parse_control, parse_spec
from service.sessions.pushes import Gradient
from service.sessions.registry import Sessions
from service.sessions.session import Shared
from service.settings import Settings

SHAPES = {"w": (6, 4), "tall": (9, 2), "bias": (5,), "scale": (), "conv": (2, 3, 4), "none": (0, 4)}
MATRICES = ("w", "tall", "none")
RULES = ("lamb", "lars", "adafactor")
OTHERS = {"name": "rest", "params": ["bias", "scale", "conv"], "rule": "adamw"}
names_of = itertools.count()


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture
def sessions(pool):
    return Sessions(Shared(Settings(max_sessions=9), pool, Budget(1 << 20), Metrics()))


def start(seed=0, names=tuple(SHAPES)):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in names}


def tensors(values, dtype="F32"):
    return [(name, dtype, SHAPES[name], np.ravel(value)) for name, value in values.items()]


async def made(sessions, params, rule, **fields):
    optimizer = rule if isinstance(rule, dict) else {"rule": rule}
    spec = parse_spec({"optimizer": optimizer, **fields})[0]
    session = await sessions.create(f"s{next(names_of)}", spec)
    await session.load(tensors(params), first_only=True)
    return session


async def push(session, grads, **control):
    layout = session.arena.layout
    flat = np.zeros(layout.size, np.float32)
    for name, values in grads.items():
        entry = layout.index[name]
        flat[entry.offset : entry.offset + entry.size] = np.ravel(values)
    present = tuple(entry.name in grads for entry in layout.entries)
    before = flat.copy()
    outcome = await session.push(
        Gradient(flat, "F32", parse_control(control, text=False), lambda: None,
                 None if all(present) else present), hold=False,
    )  # fmt: skip
    assert flat.tobytes() == before.tobytes()  # whoever sent it may send it again
    return outcome.summary


def params(session):
    flat = session.arena.versions.head.flat
    return {e.name: flat[e.offset : e.offset + e.size].copy() for e in session.arena.layout.entries}


def state(session):
    return {f"{p.slot}/{p.entry.name}": p.flat.copy() for p in session.arena.pieces()}


def rows(pieces):
    return [(f"{p.slot}/{p.entry.name}", "F32", p.shape, p.flat) for p in pieces]


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_muon_for_matrices_and_adamw_for_the_rest(sessions):
    async def scenario():
        first = start()
        both = await made(sessions, first, "muon", groups=[OTHERS])
        one = await made(sessions, {n: first[n] for n in MATRICES}, "muon")
        two = await made(
            sessions, {n: first[n] for n in SHAPES if n not in MATRICES}, {"rule": "adamw"}
        )
        for seed in range(1, 4):
            grads = start(seed)
            await push(both, grads)
            await push(one, {n: grads[n] for n in MATRICES})
            await push(two, {n: grads[n] for n in SHAPES if n not in MATRICES})
        same(params(both), params(one) | params(two))
        same(state(both), state(one) | state(two))
        assert {name.split("/")[0] for name in state(one)} == {"momentum_buffer"}

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["bias", "scale", "conv"])
def test_muon_refuses_at_the_upload_what_is_no_matrix(sessions, name):
    async def scenario():
        with pytest.raises(TensorMismatch, match="a group with another rule") as caught:
            await made(sessions, start(names=("w", name)), "muon")
        assert caught.value.context["names"] == [name]
        assert f"{name!r} has shape {list(SHAPES[name])}" in caught.value.detail
        assert sessions.shared.budget.used == 0
        session = await made(sessions, start(names=("w",)), "muon")
        used = sessions.shared.budget.used
        with pytest.raises(TensorMismatch, match="a group with another rule"):
            await session.add_group({"lr": 0.1}, tensors(start(names=(name,))))
        assert sessions.shared.budget.used == used
        assert await session.add_group({"rule": "adamw"}, tensors(start(names=(name,))))

    asyncio.run(scenario())


def test_adafactor_keeps_rows_and_columns(sessions):
    async def scenario():
        session = await made(sessions, start(), "adafactor")
        shapes = {f"{p.slot}/{p.entry.name}": p.shape for p in session.arena.pieces()}
        assert shapes == {
            "row_var/w": (6, 1), "row_var/tall": (9, 1), "row_var/conv": (2, 3, 1),
            "row_var/none": (0, 1), "col_var/w": (1, 4), "col_var/tall": (1, 2),
            "col_var/conv": (2, 1, 4), "col_var/none": (1, 4),
            "variance/bias": (5,), "variance/scale": (),
        }  # fmt: skip
        elements = sum(map(math.prod, shapes.values()))
        assert session.bytes()["state"] == 4 * elements
        flat = sum(math.prod(shape) for shape in SHAPES.values())
        assert sessions.shared.budget.used == 4 * (3 * flat + elements)
        await session.delete()
        assert sessions.shared.budget.used == 0

    asyncio.run(scenario())


def test_memory_is_asked_for_by_the_state_of_the_rule(pool):
    flat = sum(math.prod(shape) for shape in SHAPES.values())

    async def scenario(rule, elements):
        exact = Sessions(Shared(Settings(), pool, Budget(4 * (3 * flat + elements)), Metrics()))
        await made(exact, start(), rule)
        short = Sessions(Shared(Settings(), pool, Budget(4 * (3 * flat + elements) - 1), Metrics()))
        with pytest.raises(InsufficientMemory):
            await made(short, start(), rule)

    asyncio.run(scenario("lamb", 2 * flat))
    asyncio.run(scenario("lars", flat))
    asyncio.run(scenario("adafactor", 6 + 9 + 6 + 4 + 2 + 8 + 4 + 5 + 1))


@pytest.mark.parametrize("rule", [*RULES, "muon"])
def test_state_goes_round_and_training_goes_on_to_the_bit(sessions, rule):
    async def scenario():
        names = MATRICES if rule == "muon" else tuple(SHAPES)
        fields = {"missing": "skip", "ema": {"decay": 0.9}}
        one = await made(sessions, start(names=names), rule, **fields)
        for seed, came in enumerate([names, names[:2], names[1:2]], 1):
            await push(one, start(seed, came))
        facts, pieces = await one.export_state()
        two = await made(sessions, params(one), rule, **fields)
        await two.load_state(rows(pieces), facts["step"], facts["counts"], {})
        assert (await two.export_state())[0]["counts"] == facts["counts"]
        for seed in range(4, 7):
            await push(one, start(seed, names))
            await push(two, start(seed, names))
        same(params(one), params(two))
        same(state(one), state(two))

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["row_var/w", "col_var/conv", "variance/bias"])
def test_a_state_that_does_not_fit_is_refused(sessions, name):
    async def scenario():
        session = await made(sessions, start(), "adafactor")
        await push(session, start(1))
        facts, pieces = await session.export_state()
        before = state(session)
        kept = {row[0]: row for row in rows(pieces)}
        _, dtype, shape, flat = kept[name]
        for bad, error in (
            ((name, dtype, shape, flat - 1e9), Nonfinite),
            ((name, dtype, shape, flat * np.float32(np.nan)), Nonfinite),
            ((name, dtype, SHAPES[name.split("/")[1]] + (1,), flat), TensorMismatch),
            (("row_var/bias", dtype, (5,), np.zeros(5, np.float32)), TensorMismatch),
        ):
            with pytest.raises(error, match=bad[0]):
                await session.load_state(
                    list({**kept, bad[0]: bad}.values()), 1, facts["counts"], {}
                )
        same(state(session), before)

    asyncio.run(scenario())


@pytest.mark.parametrize("rule", RULES)
def test_a_group_is_added_and_the_others_go_on(sessions, rule):
    async def scenario():
        first = start()
        few = {n: first[n] for n in ("w", "bias")}
        session = await made(sessions, few, rule, missing="skip")
        late = [n for n in SHAPES if n not in few]
        twin = await made(
            sessions, first, rule, missing="skip", groups=[{"name": "late", "params": late}]
        )
        for one in (session, twin):
            await push(one, {n: start(1)[n] for n in few})
        assert await session.add_group({"name": "late"}, tensors({n: first[n] for n in late}))
        for seed in (2, 3):
            for one in (session, twin):
                await push(one, start(seed))
        same(params(session), params(twin))
        same(state(session), state(twin))
        for one in (session, twin):
            await one.delete()
        assert sessions.shared.budget.used == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("rule", RULES)
def test_clipping_and_scaling_are_as_if_the_gradient_had_come_so(sessions, rule):
    async def scenario():
        by_value = await made(sessions, start(), rule, clip={"value": 0.25})
        plain = await made(sessions, start(), rule)
        scaled = await made(sessions, start(), rule)
        for seed in (1, 2):
            grads = start(seed)
            clipped = {n: np.clip(g, -0.25, 0.25) for n, g in grads.items()}
            eight = {n: np.float32(8) * g for n, g in grads.items()}
            assert (await push(by_value, eight, grad_scale=8.0)).clipped
            await push(plain, clipped)
            await push(scaled, {n: np.float32(64) * g for n, g in clipped.items()}, grad_scale=64.0)
        same(params(by_value), params(plain))
        same(params(scaled), params(plain))
        same(state(by_value), state(plain))

    asyncio.run(scenario())


def test_clipping_by_norm_shortens_the_gradient(sessions):
    async def scenario():
        zeros = {name: 0 * value for name, value in start().items()}
        session = await made(sessions, zeros, "lars", clip={"global_norm": 0.5})
        assert (await push(session, start(1))).clipped
        moved = np.concatenate([*params(session).values()]).astype(np.float64)
        assert np.linalg.norm(moved) == pytest.approx(0.5, rel=1e-5)  # of zeros the ratio is 1

    asyncio.run(scenario())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("hold", [False, True])
def test_norms_average_and_versions(sessions, rule, hold):
    async def scenario():
        session = await made(
            sessions, start(), rule, norms=True, missing="skip", ema={"decay": 0.5},
            groups=[{"name": "still", "params": ["conv"], "frozen": True}],
        )  # fmt: skip
        for seed, came in enumerate([("w", "bias", "scale", "none", "tall"), ("w", "scale")], 1):
            held = await session.hold(None, 0) if hold else None
            before = session.arena.versions.head.flat.copy()
            average = session.arena.average.copy()
            summary = await push(session, start(seed, came))
            after = session.arena.versions.head.flat
            if held is not None:
                assert held.flat.tobytes() == before.tobytes()
                session.release(held)
            changed = after.astype(np.float64) - before
            assert summary.update_norm == pytest.approx(np.linalg.norm(changed), rel=1e-6)
            size = np.linalg.norm(after.astype(np.float64))
            assert summary.param_norm == pytest.approx(size, rel=1e-9)
            np.testing.assert_allclose(session.arena.average, (average + after) / 2, rtol=1e-5)
        now, first = params(session), start()
        np.testing.assert_array_equal(now["conv"], np.ravel(first["conv"]))
        counts = (await session.export_state())[0]["counts"]
        assert counts == {"w": 2, "tall": 1, "bias": 1, "scale": 2, "none": 1, "conv": 0}

    asyncio.run(scenario())


@pytest.mark.parametrize("rule", [*RULES, "muon"])
def test_schedules_and_overrides_set_the_rate(sessions, rule):
    async def scenario():
        names = MATRICES if rule == "muon" else tuple(SHAPES)
        half = {"kind": "linear", "total_steps": 2}
        fields = {"rule": rule, "lr": 0.5}
        session = await made(sessions, start(names=names), fields, schedule=half)
        twin = await made(sessions, start(names=names), fields)
        for seed, lr in enumerate([0.5, 0.25, 0.0], 1):
            summary = await push(session, start(seed, names))
            assert summary.lr == lr
            await push(twin, start(seed, names), overrides={"default": {"lr": lr}})
            same(params(session), params(twin))

    asyncio.run(scenario())


def test_a_float64_session_takes_narrow_gradients(sessions):
    async def scenario():
        spec = parse_spec({"optimizer": {"rule": "lamb"}, "dtype": "F64"})[0]
        session = await sessions.create("wide", spec)
        await session.load(tensors(start()), first_only=True)
        await push(session, start(1))
        assert session.arena.versions.head.flat.dtype == np.float64
        assert session.step == 1

    asyncio.run(scenario())
