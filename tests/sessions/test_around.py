"""What stands around the rule: groups, absent tensors, scaling, clipping, schedules, averages."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from kernels.pool import Pool
from service.errors import (
    AverageMissing,
    InvalidRequest,
    Nonfinite,
    SessionGone,
    SpecDiffers,
    TensorMismatch,
)
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import PushControl, parse_control, parse_spec
from service.sessions import session as module
from service.sessions.arena import counts
from service.sessions.pushes import Gradient
from service.sessions.registry import Sessions
from service.sessions.schedule import factor
from service.sessions.session import Shared
from service.settings import Settings

SHAPES = {"a": (3, 2), "b": (), "c": (5,), "e": (0,)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
NOBODY = PushControl(None, None, None, None)


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(params=[-1, module.SMALL], ids=["pool", "loop"])
def sessions(pool, request, monkeypatch):
    monkeypatch.setattr(module, "SMALL", request.param)
    settings = Settings(max_sessions=9, wait_cap_s=1.0)
    return Sessions(Shared(settings, pool, Budget(1 << 20), Metrics()))


def tensors(values):
    return [
        (name, "F32", SHAPES[name], np.asarray(flat, np.float32)) for name, flat in values.items()
    ]


def start(seed=0, names=tuple(SHAPES)):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(SIZES[name]).astype(np.float32) for name in names}


names_of = itertools.count()


async def made(sessions, params, rule="adam", **fields):
    optimizer = rule if isinstance(rule, dict) else {"rule": rule, "lr": 0.1}
    session = await sessions.create(
        f"s{next(names_of)}", parse_spec({"optimizer": optimizer, **fields})[0]
    )
    await session.load(tensors(params), first_only=True)
    return session


def gradient(session, grads, **control):
    """Zeros where nothing came, as the readers leave it."""
    layout = session.arena.layout
    flat = np.zeros(layout.size, np.float32)
    for name, values in grads.items():
        entry = layout.index[name]
        flat[entry.offset : entry.offset + entry.size] = values
    present = tuple(entry.name in grads for entry in layout.entries)
    found = parse_control(control, text=False)
    return Gradient(flat, "F32", found, lambda: None, None if all(present) else present)


async def push(session, grads, **control):
    outcome = await session.push(gradient(session, grads, **control), hold=False)
    return outcome.summary


def params(session):
    flat = session.arena.versions.head.flat
    return {e.name: flat[e.offset : e.offset + e.size].copy() for e in session.arena.layout.entries}


def state(session):
    return {f"{p.slot}/{p.entry.name}": p.flat.copy() for p in session.arena.pieces()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


RULES = ("sgd", "adam", "nadam", "asgd", "rprop", "adagrad", "lion", "lamb", "lars", "adafactor")


@pytest.mark.parametrize("rule", RULES)
def test_groups_are_as_sessions_of_their_own(sessions, rule):
    async def scenario():
        first = start()
        both = await made(
            sessions, first, {"rule": rule, "lr": 0.1},
            groups=[{"params": ["[bc]"], "lr": 0.3, "maximize": True}],
        )  # fmt: skip
        one = await made(sessions, {n: first[n] for n in "ae"}, {"rule": rule, "lr": 0.1})
        two = await made(
            sessions, {n: first[n] for n in "bc"}, {"rule": rule, "lr": 0.3, "maximize": True}
        )
        assert [e.name for e in both.arena.layout.entries] == ["a", "e", "b", "c"]
        for seed in range(1, 5):
            grads = start(seed)
            await push(both, grads)
            await push(one, {n: grads[n] for n in "ae"})
            await push(two, {n: grads[n] for n in "bc"})
        same(params(both), params(one) | params(two))
        same(state(both), state(one) | state(two))

    asyncio.run(scenario())


@pytest.mark.parametrize("rule", RULES)
def test_an_absent_tensor_is_as_if_nothing_had_happened_to_it(sessions, rule):
    async def scenario():
        first = start()
        whole = await made(sessions, first, rule, missing="skip")
        alone = {n: await made(sessions, {n: first[n]}, rule) for n in SHAPES}
        for seed, came in enumerate(["abce", "a", "ac", "b", "bce", "c", "abce"], 1):
            grads = {n: g for n, g in start(seed).items() if n in came}
            summary = await push(whole, grads)
            assert summary.step == seed
            total = math.sqrt(
                sum(float(np.square(g, dtype=np.float64).sum()) for g in grads.values())
            )
            assert summary.grad_norm == pytest.approx(total, rel=1e-12)
            for name in came:
                await push(alone[name], {name: grads[name]})
        theirs = {}
        kept = {}
        for session in alone.values():
            theirs |= params(session)
            kept |= state(session)
        same(params(whole), theirs)
        same(state(whole), kept)
        found = counts(whole.arena)
        assert found == {"a": 4, "b": 4, "c": 5, "e": 3}

    asyncio.run(scenario())


def test_runs_are_joined_again_when_tensors_are_level(sessions):
    async def scenario():
        session = await made(sessions, start(), missing="skip")
        await push(session, {"a": start(1)["a"]})
        assert len(session.arena.runs) == 2
        await push(session, {n: start(2)[n] for n in "bce"})
        assert len(session.arena.runs) == 1

    asyncio.run(scenario())


def test_an_absent_tensor_is_copied_while_a_reader_holds_the_version(sessions):
    async def scenario():
        session = await made(
            sessions, start(), missing="skip", groups=[{"params": ["c"], "frozen": True}]
        )
        held = await session.hold(None, 0)
        before = held.flat.copy()
        await push(session, {"a": np.ones(6)})
        np.testing.assert_array_equal(held.flat, before)
        session.release(held)
        now, first = params(session), start()
        assert (now["a"] != first["a"]).all()
        for name in "bce":
            np.testing.assert_array_equal(now[name], first[name])

    asyncio.run(scenario())


def test_a_frozen_group_stays_and_counts_for_nothing(sessions):
    async def scenario():
        session = await made(
            sessions, start(), "sgd", groups=[{"name": "f", "params": ["c"], "frozen": True}]
        )
        assert session.may_miss(session.arena.layout.index["c"])
        assert not session.may_miss(session.arena.layout.index["a"])
        grads = start(1)
        grads["c"][0] = np.nan
        summary = await push(session, grads)
        rest = np.concatenate([grads[n] for n in "abe"]).astype(np.float64)
        assert summary.grad_norm == pytest.approx(np.linalg.norm(rest), rel=1e-12)
        np.testing.assert_array_equal(params(session)["c"], start()["c"])
        await session.patch(lambda spec: module_patch(spec, {"frozen": False}), None)
        with pytest.raises(Nonfinite):
            await push(session, grads)
        await push(session, start(2))
        assert (params(session)["c"] != start()["c"]).all()

    def module_patch(spec, change):
        from service.schemas import apply_patch

        return apply_patch(spec, {"groups": [{"name": "f", **change}]})

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("clip", "groups"),
    [
        ({"global_norm": 0.5}, []),
        ({"global_norm": 1e9}, []),
        ({"group_norm": 0.5}, [{"params": ["c"]}]),
        ({"value": 0.25}, []),
        ({"value": 1e9}, []),
        ({"global_norm": 0.5}, [{"params": ["c"], "clip": {"value": 0.1}}]),
        (None, [{"params": ["c"], "clip": {"group_norm": 0.1}}]),
    ],
)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_clipping(sessions, clip, groups, scale):
    async def scenario():
        session = await made(
            sessions, start(), {"rule": "sgd", "lr": 1.0}, clip=clip, groups=groups
        )
        grads = start(1)
        control = {} if scale is None else {"grad_scale": scale}
        summary = await push(session, {n: g * (scale or 1) for n, g in grads.items()}, **control)
        g64 = {n: g.astype(np.float64) for n, g in grads.items()}
        norm = math.sqrt(sum(float((g * g).sum()) for g in g64.values()))
        assert summary.grad_norm == pytest.approx(norm, rel=1e-6)
        wanted, clipped = {}, False
        for name, g in g64.items():
            rule = (groups[0].get("clip") if groups and name == "c" else None) or clip or {}
            own = math.sqrt(float((g64["c"] ** 2).sum()))
            rest = math.sqrt(sum(float((g * g).sum()) for n, g in g64.items() if n != "c"))
            shrunk = g
            if "value" in rule:
                shrunk = np.clip(g, -rule["value"], rule["value"])
            elif "global_norm" in rule:
                shrunk = g * min(1.0, rule["global_norm"] / (norm + 1e-6))
            elif "group_norm" in rule:
                shrunk = g * min(1.0, rule["group_norm"] / ((own if name == "c" else rest) + 1e-6))
            clipped = clipped or not np.allclose(shrunk, g, rtol=1e-9)
            wanted[name] = start()[name].astype(np.float64) - shrunk
        assert summary.clipped == clipped
        for name, value in params(session).items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-6, atol=1e-6)

    asyncio.run(scenario())


def test_a_scale_of_a_power_of_two_changes_no_bit(sessions):
    async def scenario():
        plain = await made(sessions, start())
        scaled = await made(sessions, start())
        for seed in range(1, 4):
            grads = start(seed)
            one = await push(plain, grads)
            two = await push(
                scaled, {n: g * np.float32(1024) for n, g in grads.items()}, grad_scale=1024.0
            )
            assert one == two
        same(params(plain), params(scaled))

    asyncio.run(scenario())


SCHEDULES = [
    ({"kind": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
    ({"kind": "linear", "total_steps": 4}, [1, 0.75, 0.5, 0.25, 0, 0]),
    (
        {"kind": "linear", "total_steps": 4, "warmup_steps": 2, "final_factor": 0.5},
        [0.5, 1, 1, 0.75, 0.5, 0.5],
    ),
    ({"kind": "cosine", "total_steps": 2, "final_factor": 0.2}, [1, 0.6, 0.2, 0.2]),
    ({"kind": "inverse_sqrt"}, [1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5]),
    (
        {"kind": "inverse_sqrt", "warmup_steps": 2, "final_factor": 0.6},
        [0.5, 1, math.sqrt(2 / 3), math.sqrt(0.5), math.sqrt(0.4), 0.6],
    ),
]


@pytest.mark.parametrize(("schedule", "factors"), SCHEDULES)
def test_schedules(sessions, schedule, factors):
    async def scenario():
        session = await made(
            sessions, start(), {"rule": "sgd", "lr": 0.5}, schedule=schedule,
            groups=[{"name": "c", "params": ["c"], "lr": 0.25}],
        )  # fmt: skip
        spec = session.spec.schedule
        for step, wanted in enumerate(factors):
            assert factor(spec, step) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
            before = params(session)
            grads = start(step + 1)
            summary = await push(session, grads)
            assert summary.lr == pytest.approx(0.5 * wanted)
            for name, lr in (("a", 0.5), ("c", 0.25)):
                change = params(session)[name] - before[name]
                np.testing.assert_allclose(change, -lr * wanted * grads[name], rtol=1e-5, atol=1e-6)

    asyncio.run(scenario())


def test_an_overridden_lr_is_that_of_the_update_whatever_the_schedule(sessions):
    async def scenario():
        session = await made(
            sessions, start(), {"rule": "sgd", "lr": 0.5},
            schedule={"kind": "linear", "total_steps": 4},
        )  # fmt: skip
        summary = await push(session, start(1), overrides={"default": {"lr": 0.125}})
        assert summary.lr == 0.125
        assert (await push(session, start(2))).lr == 0.375
        with pytest.raises(InvalidRequest):
            await push(session, start(1), overrides={"nobody": {"lr": 0.125}})

    asyncio.run(scenario())


def test_an_average_follows_the_parameters(sessions):
    async def scenario():
        session = await made(sessions, start(), ema={"decay": 0.75})
        wanted = {n: v.astype(np.float64) for n, v in start().items()}
        for seed in range(1, 6):
            await push(session, start(seed))
            for name, value in params(session).items():
                wanted[name] += 0.25 * (value - wanted[name])
        average = await session.copy_average()
        assert (average.epoch, average.number, average.step) == (1, 6, 5)
        for entry in session.arena.layout.entries:
            ours = average.flat[entry.offset : entry.offset + entry.size]
            np.testing.assert_allclose(ours, wanted[entry.name], rtol=1e-5, atol=1e-6)
        plain = await made(sessions, start())
        with pytest.raises(AverageMissing):
            await plain.copy_average()

    asyncio.run(scenario())


@pytest.mark.parametrize("hold", [False, True])
def test_norms_of_the_change_and_of_the_result(sessions, hold):
    async def scenario():
        session = await made(sessions, start(), norms=True, missing="skip")
        for seed, came in enumerate(["abce", "ac"], 1):
            held = await session.hold(None, 0) if hold else None
            before = session.arena.versions.head.flat.astype(np.float64)
            summary = await push(session, {n: start(seed)[n] for n in came})
            after = session.arena.versions.head.flat.astype(np.float64)
            assert summary.update_norm == pytest.approx(np.linalg.norm(after - before), rel=1e-6)
            assert summary.param_norm == pytest.approx(np.linalg.norm(after), rel=1e-9)
            if held is not None:
                session.release(held)

    asyncio.run(scenario())


def test_a_group_is_added_and_the_others_go_on(sessions):
    async def scenario():
        first = start()
        session = await made(
            sessions, {n: first[n] for n in "ab"}, missing="skip", ema={"decay": 0.5}
        )
        twin = await made(sessions, first, missing="skip", ema={"decay": 0.5}, groups=[
            {"name": "late", "params": ["c", "e"], "lr": 0.3}])  # fmt: skip
        await push(session, {n: start(1)[n] for n in "ab"})
        await push(twin, {n: start(1)[n] for n in "ab"})
        used = sessions.shared.budget.used
        keyed = {"worker": "w", "sequence": 1, "base_version": "1-2"}
        await push(session, {"a": start(2)["a"]}, **keyed)
        await push(twin, {"a": start(2)["a"]}, **keyed)
        late = gradient(session, {"b": start(3)["b"]})
        assert await session.add_group(
            {"name": "late", "lr": 0.3}, tensors({n: first[n] for n in "ce"})
        )
        assert (session.epoch, session.version, session.step) == (1, 4, 2)
        # a retry of an answer that was lost changes nothing
        again = tensors({n: first[n] for n in "ce"})
        assert not await session.add_group({"name": "late", "lr": 0.3}, again)
        with pytest.raises(SpecDiffers):
            await session.add_group({"name": "late", "lr": 0.4}, again)
        with pytest.raises(TensorMismatch):
            await session.add_group({"name": "other"}, again)
        # the same bytes as before the group came are a replay
        outcome = await session.push(gradient(session, {"a": start(2)["a"]}, **keyed), hold=False)
        assert outcome.replayed
        # a push that was read before it came fits
        await session.push(late, hold=False)
        await push(twin, {"b": start(3)["b"]})
        await push(session, start(4))
        await push(twin, start(4))
        same(params(session), params(twin))
        ours, theirs = state(session), state(twin)
        for name in ("ema/c", "ema/e"):  # the average of a late tensor begins with it
            del ours[name], theirs[name]
        same(ours, theirs)
        extra = SIZES["c"] * 4 * (2 + 2 + 1 + 1)
        assert sessions.shared.budget.used == used + extra
        for one in (session, twin):
            await one.delete()
        assert sessions.shared.budget.used == 0

    asyncio.run(scenario())


def test_a_push_that_misses_a_new_group_is_refused_where_all_must_come(sessions):
    async def scenario():
        first = start()
        session = await made(sessions, {"a": first["a"]})
        late = gradient(session, {"a": first["a"]})
        await session.add_group({}, tensors({"c": first["c"]}))
        with pytest.raises(TensorMismatch, match="'c'"):
            await session.push(late, hold=False)
        assert session.step == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "rule", ["nadam", "asgd", "rprop", "yogi", "adamax", "radam", "lamb", "lars", "adafactor"]
)
def test_state_with_scalars_goes_round_and_training_goes_on_to_the_bit(sessions, rule):
    async def scenario():
        fields = {"missing": "skip", "ema": {"decay": 0.9}}
        one = await made(sessions, start(), rule, **fields)
        for seed, came in enumerate(["abce", "ab", "a"], 1):
            await push(one, {n: start(seed)[n] for n in came})
        facts, pieces = await one.export_state()
        two = await made(sessions, params(one), rule, **fields)
        rows = [(f"{p.slot}/{p.entry.name}", "F32", p.shape, p.flat) for p in pieces]
        scalars = facts.get("scalars", {})
        await two.load_state(rows, facts["step"], facts["counts"], scalars)
        for seed in range(4, 7):
            assert (await push(one, start(seed))).lr == (await push(two, start(seed))).lr
        same(params(one), params(two))
        same(state(one), state(two))
        if scalars:
            with pytest.raises(TensorMismatch, match="scalars"):
                await two.load_state(rows, facts["step"], facts["counts"], {})

    asyncio.run(scenario())


@pytest.mark.parametrize(("slot", "value"), [("exp_avg", np.nan), ("exp_avg_sq", -1.0)])
def test_a_state_that_would_poison_the_parameters_is_refused(sessions, slot, value):
    async def scenario():
        session = await made(sessions, start())
        facts, pieces = await session.export_state()
        before = state(session)
        rows = []
        for p in pieces:
            flat = p.flat.copy()
            if p.slot == slot and p.entry.name == "c":
                flat[2] = value
            rows.append((f"{p.slot}/{p.entry.name}", "F32", p.shape, flat))
        with pytest.raises(Nonfinite, match=f"{slot}/c"):
            await session.load_state(rows, 0, facts["counts"], {})
        same(state(session), before)

    asyncio.run(scenario())


def test_a_deleted_session_pays_for_a_gradient_that_is_still_sent(sessions):
    async def scenario():
        session = await made(sessions, start())
        gradients = session.arena.gradients
        buffer = gradients.acquire()
        await session.delete()
        assert sessions.shared.budget.used == gradients.nbytes
        assert session.arena is None
        gradients.release(buffer)
        assert sessions.shared.budget.used == 0
        second = gradients.acquire()  # one whose head arrived before, and its data after the end
        assert sessions.shared.budget.used == gradients.nbytes
        gradients.release(second)
        with pytest.raises(SessionGone):
            await session.hold(None, 0)

    asyncio.run(scenario())


def test_a_failed_creation_leaves_nothing_unless_parameters_came(sessions):
    async def scenario():
        spec = parse_spec({"optimizer": {"rule": "sgd"}})[0]
        failed = await sessions.create("x", spec)
        with pytest.raises(TensorMismatch):
            await failed.load([], first_only=True)
        await sessions.forget(failed)
        assert (await sessions.create("x", spec)).epoch == 1
        saved = sessions.get("x")
        await saved.load(tensors(start()), first_only=True)
        await sessions.forget(saved)
        assert sessions.get("x") is saved
        third = await sessions.create("y", spec)
        await sessions.attach("y", {})
        await sessions.forget(third)
        with pytest.raises(SessionGone):
            await third.load(tensors(start()), first_only=True)
        with pytest.raises(SessionGone):
            sessions.get("y")

    asyncio.run(scenario())


def test_names_that_no_header_can_carry_are_refused_at_the_upload(sessions):
    async def scenario():
        many = [(f"{'n' * 100}{k}", "F32", (0,), np.empty(0, np.float32)) for k in range(9000)]
        session = await sessions.create("x", parse_spec({"optimizer": {"rule": "adam"}})[0])
        with pytest.raises(TensorMismatch, match="9000 tensors"):
            await session.load(many, first_only=True)
        assert sessions.shared.budget.used == 0
        await session.load(many[:1000], first_only=True)

    asyncio.run(scenario())


def test_patterns_times_names_are_bounded(sessions):
    async def scenario():
        groups = [{"params": ["*" + "a" * k + "b" for k in range(450, 510)]}]
        many = [(f"{'a' * 900}{k}", "F32", (0,), np.empty(0, np.float32)) for k in range(301)]
        spec = parse_spec({"optimizer": {"rule": "sgd"}, "groups": groups})[0]
        with pytest.raises(TensorMismatch, match="too many to match"):
            await (await sessions.create("x", spec)).load(many, first_only=True)

    asyncio.run(scenario())


def test_thousands_of_small_pushes_wait_their_turn(sessions):
    async def scenario():
        session = await made(sessions, start(), "sgd")
        slow = session.patch(lambda spec: spec, None)
        pushes = [push(session, start(k % 5)) for k in range(2000)]
        done = await asyncio.gather(slow, *pushes)
        assert sorted(summary.step for summary in done[1:]) == list(range(1, 2001))

    asyncio.run(scenario())
