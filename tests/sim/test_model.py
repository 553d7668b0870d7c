"""The model and the schedules themselves: sums, invariants, and faults that must be found."""

import asyncio
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

import tests.sim.schedule as events
from tests.sim import arithmetic
from tests.sim.contract import Message, Spec, Update
from tests.sim.model import Load, Model, Refused, State, Step
from tests.sim.play import Mismatch, failure, run, shrunk
from tests.sim.replica import Replicas
from tests.sim.schedule import schedule

# Arithmetic


def exactly(value, to):
    """A fraction rounded once to the nearest float64 or float32, ties to even."""
    near = float(value)  # correctly rounded by Python
    if to is np.float64:
        return near
    down = np.float32(near)
    around = [np.nextafter(down, np.float32(way)) for way in (-np.inf, np.inf)] + [down]
    return float(
        min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))
    )


@pytest.mark.parametrize(
    ("fma", "to"), [(arithmetic.fma, np.float64), (arithmetic.fmaf, np.float32)]
)
def test_fma_rounds_once(fma, to):
    rng = np.random.default_rng(1)
    for _ in range(2000):
        a, b = (float(to(x)) for x in rng.standard_normal(2))
        c = float(to(-a * b * (1 + rng.integers(-3, 4) * 2.0**-30))) if rng.random() < 0.5 else a
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact:
            assert fma(a, b, c) == exactly(exact, to)


def test_means_are_rounded_once():
    values = np.array([1.0, 2.0**-30, -0.0, 3e38])
    found = arithmetic.weighted([(0.1, values), (0.2, values)], 0.1 + 0.2, "F32")
    assert arithmetic.same_bits(found, np.array([1.0, 2.0**-30, 0.0, 3e38], np.float32))
    assert np.isinf(arithmetic.weighted([(1.0, values), (1.0, values)], 1.0, "F32")[3])


def test_robust_means_are_numpys():
    rng = np.random.default_rng(2)
    for many in range(1, 9):
        columns = rng.standard_normal((5, many)).tolist()
        np.testing.assert_allclose(
            arithmetic.middle(columns, "F64"), np.median(columns, axis=1), rtol=1e-15
        )
        for cut in range((many + 1) // 2):
            kept = np.sort(columns, axis=1)[:, cut : many - cut]
            np.testing.assert_allclose(
                arithmetic.trimmed(columns, cut, "F64"), kept.mean(axis=1), rtol=1e-14
            )


def test_norms_are_numpys():
    values = np.random.default_rng(3).standard_normal(300)
    assert arithmetic.norm(values) == pytest.approx(np.linalg.norm(values), rel=1e-15)
    assert arithmetic.norm(values[:12]) == pytest.approx(np.linalg.norm(values[:12]), rel=1e-15)


# The model by hand


def message(worker, sequence, value, version=1, **more):
    return Message(worker, sequence, (1, version), np.full(1, value), **more)


def made(**update):
    return Model(Spec(Update(mode="sync", **update), lr=1.0), np.zeros(1, np.float32))


def test_a_round_is_the_weighted_mean_and_everyone_is_told():
    model = made(workers=3)
    assert model.push(message("a", 1, 3.0, weight=2.0), 0).round == 1
    assert model.push(message("b", 1, 9.0), 0).round == 1
    assert model.missing == 1
    done = model.push(message("c", 4, None)._replace(values=None, weight=0.0), 0)
    assert done.summary["contributions"] == 2
    assert model.params == [-5.0]
    assert model.push(message("a", 1, 3.0, weight=2.0), 9) == done._replace(replayed=True)
    assert model.push(message("a", 1, 3.0), 9).slug == "key-reused"
    assert model.push(message("a", 2, 3.0), 9).slug == "round-closed"
    assert model.push(message("c", 5, 3.0, 2), 9).round == 2
    assert model.push(message("c", 6, 3.0, 2), 9).slug == "already-contributed"


def test_a_dead_worker_is_not_waited_for_and_a_sampled_one_is():
    for on_lost, still in (("shrink", None), ("wait", 2)):
        model = made(workers=2, on_lost=on_lost, lease_s=5.0, round_timeout_s=20.0)
        model.push(message("a", 1, 1.0), 0)
        model.push(message("b", 1, 1.0), 0)
        model.push(message("a", 2, 1.0, 2), 4)
        assert model.open
        model.tick(5.5)
        assert (model.open and model.open.number) == still
        model.tick(24.5)
        assert model.open is None
        assert model.at.step == 2


def test_a_round_that_too_few_came_to_is_abandoned():
    model = made(workers=3, min_contributions=2, round_timeout_s=1.0)
    model.push(message("a", 1, 1.0), 0)
    model.push(message("b", 1, 1.0)._replace(values=None, weight=0.0), 0)
    model.tick(1.5)
    assert model.push(message("a", 1, 1.0), 2).reason == "timeout"
    assert model.at == (1, 1, 0)
    assert model.push(message("a", 2, 1.0), 2).round == 2


def test_clocks_begin_at_the_slowest():
    model = Model(Spec(Update(mode="bounded", slack=1)), np.zeros(1, np.float32))
    for sequence in (1, 2, 3):
        model.push(message("a", sequence, 1.0), 0)
    assert not model.ahead("a")
    model.touch("b", 0)
    model.push(message("b", 1, 1.0), 0)
    assert model.members["b"].clock == 4
    model.push(message("a", 4, 1.0), 0)
    model.push(message("a", 5, 1.0), 0)
    assert not model.ahead("a")
    model.push(message("a", 6, 1.0), 0)
    assert model.ahead("a")
    model.leave("b")
    assert not model.ahead("a")


# Invariants, whatever happens


class Checked(Model):
    """A model that looks at itself after each change."""

    def push(self, message, now):
        before = self.fingerprint()
        answer = super().push(message, now)
        if answer.slug is not None or answer.replayed:
            assert self.fingerprint() == before, "a refusal and a repeat change nothing"
        self.check()
        return answer

    def tick(self, now):
        super().tick(now)
        self.check()
        assert not self.open or self.open.deadline > now

    def leave(self, worker):
        super().leave(worker)
        self.check()

    def upload(self, lo, values):
        super().upload(lo, values)
        self.check()

    def fingerprint(self):
        taken = [len(one.members) for one in self.rounds]
        return self.at, self.params.tobytes(), {w: set(n) for w, n in self.ledger.items()}, taken

    def check(self):
        steps = [entry for entry in self.log if isinstance(entry, Step)]
        cuts = [n for n, entry in enumerate(self.log, 1) if isinstance(entry, Load | State)]
        assert self.at.version == 1 + len(self.log) - max(cuts, default=0)
        assert self.at.epoch == 1 + len(cuts)
        rounds = Counter(step.round for step in steps if step.round is not None)
        assert rounds == Counter(one.number for one in self.rounds if one.status == "applied")
        keys = Counter((c.worker, c.sequence) for one in self.rounds for c in one.members)
        assert not keys or keys.most_common(1)[0][1] == 1, "a key counts once"
        for one in self.rounds:
            workers = [c.worker for c in one.members]
            assert len(workers) == len(set(workers)), "a worker contributes once"
            assert one.status == "open" or one.reasons
        assert all(one.status != "open" for one in self.rounds[:-1])
        if self.open:
            rules = self.open.update
            assert 0 < len(self.open.members) < rules.needed
            assert rules.on_lost == "wait" or self.missing > 0, "a round would hang"
            assert self.open.base == self.at


def test_the_invariants_hold_in_all_schedules():
    for seed in range(200):
        asyncio.run(run(schedule(seed), Replicas(Checked)))


def test_schedules_reach_what_they_are_for():
    slugs, fates, whys, sizes = Counter(), Counter(), Counter(), Counter()
    for seed in range(300):
        played = asyncio.run(run(schedule(seed), Replicas()))
        slugs.update((played.model.update.mode, answer.slug) for _, answer in played.answers)
        fates.update(one.status for one in played.model.rounds)
        whys.update(why for one in played.model.rounds for why in one.reasons)
        sizes.update(len(one.counted) for one in played.model.rounds)
    sync = {"round-closed", "already-contributed", "overrides-differ", "norm-exceeded", "nonfinite",
            "epoch-changed", "key-reused", "too-old", "worker-retired", None}  # fmt: skip
    assert {slug for mode, slug in slugs if mode == "sync"} >= sync
    assert ("async", "stale-gradient") in slugs
    assert fates.keys() == {"applied", "skipped", "abandoned"}
    assert whys.keys() >= {"complete", "quorum", "timeout", "params", "state", "groups", "passes"}
    assert min(sizes[many] for many in range(7)) >= 15, sizes


# Planted faults


class AppliesRepeats(Model):
    def _find(self, message):
        found = super()._find(message)
        fresh = getattr(found, "summary", None) and found.summary["applied"]
        if fresh and self.update.mode != "sync":
            del self.ledger[message.worker][message.sequence]
            return None
        return found


class ForgetsTheQuorum(Model):
    def _close_if_complete(self):
        if self.open and self.update.on_lost == "shrink" and self.missing == 0:
            self._close("complete")


class HangsOnTheDead(Model):
    @property
    def missing(self):
        came = {one.worker for one in self.open.members}
        return len(self.members.keys() - came) + max(0, self.update.workers - len(self.members))


class TakesContributionsAlong(Model):
    """Of the dead."""

    def tick(self, now):
        if self.open:
            gone = {name for name, one in self.members.items() if one.live and one.due <= now}
            self.open.members[:] = [c for c in self.open.members if c.worker not in gone]
        super().tick(now)


class ForgetsAbandonedKeys(Model):
    def _abandon(self, reason):
        for one in self.open.members if self.open else ():
            del self.ledger[one.worker][one.sequence]
        super()._abandon(reason)


class AddsLate(Model):
    """A late gradient joins the round that is open."""

    def _staleness(self, message):
        if self.update.mode == "sync" and message.base[0] == self.at.epoch:
            return 0
        return super()._staleness(message)


class KeepsTheRoundOverAnUpload(Model):
    def _abandon(self, reason):
        if reason != "params":
            super()._abandon(reason)


class KeepsTheRoundOverAGroup(Model):
    def _abandon(self, reason):
        if reason != "groups":
            super()._abandon(reason)


class PatchesTheOpenRound(Model):
    def patch(self, lr=None, **changes):
        super().patch(lr, **changes)
        if self.open:
            self.open.update = self.update


class CountsWhatDidNotCome(Model):
    def united(self, parts):
        return None


class LetsTheRefusedJoin(Model):
    def push(self, message, now):
        if message.worker is not None and message.worker not in self.retired:
            self.touch(message.worker, now)
        return super().push(message, now)


class CountsTheLateTwice(Model):
    def _staleness(self, message):
        try:
            return super()._staleness(message)
        except Refused as refused:
            if refused.slug == "round-closed" and message.worker in self.members:
                self.members[message.worker].late += 1
            raise


class RoundsTwice(Model):
    def reduced(self, closed, order=None):
        found = super().reduced(closed, order)
        many = len(closed.counted)
        if self.update.reduce == "mean" and all(one.weight == 1 for one in closed.counted):
            return (found * many / many).astype(found.dtype)
        return found


class AddsInOrderOfArrival(Model):
    def reduced(self, closed, order=None):
        arrival = closed.update._replace(order="arrival")
        was, closed.update = closed.update, arrival
        try:
            return super().reduced(closed, order)
        finally:
            closed.update = was


class CountsPasses(Model):
    """In the divisor of a mean."""

    def reduced(self, closed, order=None):
        found = super().reduced(closed, order)
        if closed.update.reduce != "mean":
            return found
        total = sum(one.weight for one in closed.counted)
        passes = len(closed.members) - len(closed.counted)
        return (found * (total / (total + passes))).astype(found.dtype)


class StartsClocksAtZero(Model):
    def touch(self, worker, now, lease_s=None):
        joins = worker not in self.members
        super().touch(worker, now, lease_s)
        if joins:
            self.members[worker].clock = 0


class ClipsTheWeightAsWell(Model):
    """Divides by what is left of it."""

    def reduced(self, closed, order=None):
        whole, closed.members = closed.members, [
            one._replace(weight=one.weight * one.factor, factor=1.0) for one in closed.members
        ]  # fmt: skip
        try:
            return super().reduced(closed, order)
        finally:
            closed.members = whole


FAULTS = [
    StartsClocksAtZero, ClipsTheWeightAsWell, AppliesRepeats, ForgetsTheQuorum, HangsOnTheDead,
    TakesContributionsAlong, KeepsTheRoundOverAGroup, PatchesTheOpenRound, CountsWhatDidNotCome,
    LetsTheRefusedJoin, CountsTheLateTwice,
    ForgetsAbandonedKeys, AddsLate, KeepsTheRoundOverAnUpload, RoundsTwice, AddsInOrderOfArrival,
    CountsPasses,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_a_planted_fault_is_found_and_shrunk(fault):
    def fails(candidate):
        return isinstance(failure(candidate, lambda: Replicas(fault)), Mismatch)

    found = next(one for one in map(schedule, range(300)) if fails(one))
    small = shrunk(found, fails)
    assert fails(small)
    assert len(small.events) <= 8, small


def test_a_schedule_can_be_pasted():
    first = schedule(5)
    assert eval(repr(first), vars(events)) == first
    assert schedule(5) == first
    assert schedule(6) != first
