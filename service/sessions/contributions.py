"""Pushes of a session in sync mode: into the open round, and its end.

A contribution is *decided* (checks, norm) and then *taken*: added to the sum of its round, or held
until the end. A round that is due is *closed*: its contributions are reduced to one gradient, which
is applied as one update. A session that logs makes each contribution durable before it is taken,
and the end of each round before it is applied.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import NUMPY
from kernels import accumulate, cpu, robust
from service.errors import NormExceeded, RoundAbandoned, ServiceError
from service.schemas import Terms, Update, with_overrides
from service.schemas.refusals import invalid
from service.schemas.update import ROBUST
from service.sessions import pushes, sparse, update
from service.sessions.arena import Arena, Array
from service.sessions.history import Record
from service.sessions.lane import Program
from service.sessions.ledger import Contributed, Fate, Summary
from service.sessions.pushes import Gradient, Outcome
from service.sessions.records import Close, Contribution, Push
from service.sessions.rounds import Held, Open, filled, give_up
from service.sessions.schedule import factor
from service.storage.ring import Slot

if TYPE_CHECKING:
    from service.sessions.session import Session


class Decided(NamedTuple):
    """A contribution that will be admitted.

    Attributes:
        one: What a record keeps of it.
        gradient: Its vector and who owns it; of a pass there is none.
    """

    one: Contribution
    gradient: Gradient | None


def contribute(session: "Session", gradient: Gradient) -> Program[Outcome]:
    """Decides a contribution, takes it, and closes the round if it was the last one."""
    key = gradient.control.key
    assert key is not None
    session.committing.add(key)
    try:
        found = yield from decide(session, gradient, {})
        if not isinstance(found, Decided):
            return Outcome(found, True, None)
        yield from take(session, found)
    finally:
        session.committing.discard(key)
    try:
        yield from settle(session)
    except BaseException as error:  # what was taken stays taken
        session.broken = session.broken or f"{type(error).__name__} at the end of a round"
        raise
    fate = fate_of(session, Contributed(found.one.round), *key)
    return Outcome(fate, False, None, kept=is_kept(session, found))


def decide(
    session: "Session", gradient: Gradient, ahead: Mapping[str, Contribution],
    slot: Slot | None = None,
) -> Program[Decided | Fate]:  # fmt: skip
    """All of a contribution but its effect; raises what refuses it.

    Args:
        session: In whose lane this runs; only read.
        gradient: Only read; its vector is empty if it is a pass.
        ahead: Contributions that were decided before it and are not taken yet, by worker.
        slot: Receives the gradient meanwhile.

    Returns:
        What became of the first admission, if this is a repeat.
    """
    control, arena, begun = gradient.control, session.ready, session.rounds.open
    rules = session.spec.update if begun is None else begun.rules
    assert control.key is not None
    known = session.ledger.find(*control.key)
    if known is not None:
        return (yield from pushes.repeated(session, known, gradient))
    session.check_base(control)
    session.check_contribution(control, ahead)
    terms = session.terms_of(control)
    passes = control.is_pass
    beside: list[update.Sized] = [(1, partial(pushes.marked, session, gradient))]
    examined: list[tuple[int, update.Sized]] = []
    if not passes:
        gradient = pushes.fitted(session, arena, gradient)
        if gradient.rows:  # a PATCH has made the group lazy since they were read
            gradient = sparse.scattered(arena, gradient)
        pushes.check_complete(session, arena, gradient)
        bare = [one._replace(clip=None) for one in terms]
        examined = update.examining(arena, bare, gradient.flat, gradient.dtype)
        beside = [(gradient.flat.size, partial(pushes.marked, session, gradient))]
        if slot is not None:
            whole = gradient.flat.view(np.uint8).data
            beside.append((gradient.flat.size, session.guarded(partial(slot.write, whole))))
    found = yield from update.together([*beside, *(sized for _, sized in examined)])
    sums = update.summed(
        len(terms),
        [(index, one) for (index, _), one in zip(examined, found[len(beside) :], strict=True)],
    )
    scale = control.grad_scale or 1.0
    weight = 1.0 if control.weight is None else control.weight
    norm, skipped, shrunk = None, None, 1.0
    if not passes:
        norm = sums.norm / scale
        if not math.isfinite(norm) and not pushes.only_large(arena, terms, gradient):
            pushes.refuse_nonfinite(session, arena, terms, gradient)
            norm, skipped, weight = None, "nonfinite", 0.0
        else:
            shrunk = _within(rules, norm * (weight if rules.reduce == "sum" else 1.0))
            norm = norm if math.isfinite(norm) else None
    sign = -1.0 if session.spec.push == "delta" else 1.0
    now = time.time()
    one = Contribution(
        session.rounds.number, *control.key, found[0], "" if passes else gradient.dtype, weight,
        sign * (weight * ((1.0 / scale) * shrunk)), norm, shrunk < 1.0, skipped, control.loss,
        control.overrides, now, max(0.0, now - _opened_at(session, ahead, now)), gradient.present,
        None if session.rounds.open or ahead else rules.model_dump(exclude_unset=True),
        gradient.wire,
    )  # fmt: skip
    return Decided(one, None if weight == 0 else gradient)


def _within(rules: Update, norm: float) -> float:
    """What a contribution is multiplied by, so that its norm is within the session's bound.

    Args:
        rules: Of the round.
        norm: Of the contribution; in a sum, of what it adds.

    Raises:
        NormExceeded: It is not, and such contributions are refused.
    """
    bound = rules.max_norm
    if bound is None or norm <= bound:
        return 1.0
    if rules.on_max_norm == "clip":
        return bound / norm
    raise NormExceeded(
        f"The contribution's norm is {norm:.6g} (in a sum, with its weight) and one may have "
        f"{bound:.6g} (update.max_norm). Nothing was counted: clip it, or send a pass (weight 0).",
        norm=norm if math.isfinite(norm) else None,
        max_norm=bound,
    )


def _opened_at(session: "Session", ahead: Mapping[str, Contribution], now: float) -> float:
    if session.rounds.open is not None:
        return session.rounds.open.opened_at
    return next((one.at for one in ahead.values()), now)


def check_weight(rules: Update, weight: float | None) -> None:
    """Refuses a weight that the session's reduction does not know.

    Raises:
        InvalidRequest: A weight between passes and whole contributions, where order statistics
            are taken.
    """
    if rules.reduce in ROBUST and weight not in (None, 0.0, 1.0):
        raise invalid(
            "weight", f"{rules.reduce} takes every contribution alike: 1, or 0 for a pass."
        )


def completes(session: "Session", ahead: Collection[str]) -> bool:
    """Whether the open round will wait for nobody once those of these workers are in it."""
    found = session.rounds.open
    rules = session.spec.update if found is None else found.rules
    contributed: Collection[str] = () if found is None else found.contributions
    # Nobody of `ahead` may have joined yet, so that more seem to be missing than are.
    return filled(rules, session.members, contributed, ahead) is not None


def take(
    session: "Session", decided: Decided, *, number: int | None = None, slot: Slot | None = None
) -> Program[None]:
    """Adds a contribution to its round. All of it happens, or the session is broken.

    Args:
        session: In whose lane this runs.
        decided: The contribution; durable, where the session logs.
        number: Of its record.
        slot: The place in the log for the end of the round, if this one begins it.
    """
    arena, one, gradient = session.arena, decided.one, decided.gradient
    assert arena is not None
    try:
        found = session.rounds.open
        begins = found is None
        if found is None:
            rules = Update() if one.rules is None else Update.model_validate(one.rules)
            found = session.rounds.begin((session.epoch, session.version), rules, one)
            found.first, found.slot = number, slot
        if gradient is not None and session.spec.update.holds:
            held = Held(one.worker, gradient.flat, gradient.dtype, one.scaled, gradient.release)
            found.held.append(held)
        elif gradient is not None:
            # The first that has a gradient sets the sum.
            yield _adding(arena, gradient.flat, gradient.dtype, one.scaled, fresh=not found.counted)
        if gradient is not None:
            found.present = _union(found, one)
        found.add(one)
        session.ledger.record(one.worker, one.sequence, one.digest, Contributed(found.number))
        session.members.pushed(one.worker, 0, passes=not one.counts)
        session.members.late_by(one.worker, one.lateness_s)
        if not begins:
            session.shared.metrics.observe_lateness(one.lateness_s)
    except BaseException as error:
        session.broken = f"{type(error).__name__} in round {session.rounds.number}"
        raise


def _adding(
    arena: Arena, flat: Array, dtype: str, scaled: float, *, fresh: bool
) -> list[update.Thunk]:
    total = arena.total
    assert total is not None

    def add(lo: int, hi: int) -> None:
        if fresh:
            total[lo:hi] = 0.0
        accumulate.add(total, flat, dtype, scaled, lo, hi)

    return [partial(add, lo, hi) for lo, hi in cpu.chunks(0, arena.size)]


def _union(found: Open, one: Contribution) -> tuple[bool, ...] | None:
    """Which tensors any gradient of the round has."""
    if one.present is None or (found.counted and found.present is None):
        return None
    if not found.counted or found.present is None:
        return one.present
    return tuple(a or b for a, b in zip(found.present, one.present, strict=True))


# The end of a round


def settle(session: "Session") -> Program[None]:
    """Closes the open round if it is due."""
    session.members.lapse()
    reason = session.rounds.due()
    if reason is not None and session.arena is not None and session.broken is None:
        yield from close(session, reason)


def close(session: "Session", reason: str) -> Program[None]:
    """Ends the open round: with an update, without one, or abandoned."""
    found = session.rounds.open
    assert found is not None
    if reason == "timeout" and found.counted < found.rules.min_contributions:
        yield from abandon(session, "timeout")
        return
    try:
        _terms(session, found)
    except ServiceError:  # a PATCH since does not go with the overrides that the round has
        yield from abandon(session, "patch")
        return
    if not found.counted:
        end = Close(found.number, "skipped", "passes", time.time(), None)
        yield from _log(session, end)
        skip(session, end.reason, end.at)
        return
    push = yield from _decided(session, found)
    if push.skipped is not None:
        end = Close(found.number, "skipped", push.skipped, push.at, None)
        yield from _log(session, end)
        skip(session, push.skipped, push.at)
        return
    end = Close(found.number, "applied", reason, push.at, push)
    yield from _log(session, end)
    yield from apply(session, end)


def abandon(session: "Session", reason: str) -> Program[None]:
    """Ends the open round without an update; its numbers stay consumed."""
    found = session.rounds.open
    if found is None:
        return
    yield from _log(session, Close(found.number, "abandoned", reason, time.time(), None))
    give_up(session, reason)


def skip(session: "Session", reason: str, at: float) -> None:
    """Ends the open round without an update: nothing came, or nothing that could be applied."""
    found = session.rounds.open
    assert found is not None
    first = _terms(session, found)[0]
    lr = float(first.hyper["lr"])
    if not first.stated_lr:
        lr *= factor(session.spec.schedule, session.step)
    summary = Summary(
        *session.at.numbers, False, True, 0, lr, None, False, reason, True, None, None,
        found.number, found.counted,
    )  # fmt: skip
    _tell(session, found, summary, at, 0.0)
    session.rounds.close("skipped", reason, session.at.numbers, at, summary)
    session.shared.metrics.round_ended("skipped", at - found.opened_at)


def _log(session: "Session", end: Close) -> Program[None]:
    """Makes the end of the open round durable, in the place that was kept for it."""
    found, durable = session.rounds.open, session.durable
    if durable is None or not durable.logs:
        return
    assert found is not None
    assert found.slot is not None
    yield from durable.end_round(found.slot, end)
    found.slot = None


def _decided(session: "Session", found: Open) -> Program[Push]:
    """The update of a round: its gradient is reduced, measured, and its numbers are reckoned."""
    arena = session.arena  # not `ready`: a deletion may wait behind this
    assert arena is not None
    assert arena.reduced is not None
    yield from reduce(session, found)
    dtype = session.spec.dtype
    terms = _terms(session, found)
    examined = update.examining(arena, terms, arena.reduced, dtype)
    results = yield from update.together([sized for _, sized in examined])
    sums = update.summed(
        len(terms), [(index, one) for (index, _), one in zip(examined, results, strict=True)]
    )
    moves = update.moves(terms, sums, 1.0, factor(session.spec.schedule, session.step), 1.0)
    norm = sums.norm if math.isfinite(sums.norm) else None
    skipped = None
    parts: tuple[update.Part, ...] = ()
    if norm is None and not pushes.only_large_in(arena, terms, arena.reduced, dtype):
        skipped = "nonfinite"  # a sum of finite ones: no single one is to be refused
    else:
        parts = tuple(update.parts(arena, moves, found.present))
    clips = skipped is None and update.clipped(moves, sums, 1.0)
    return Push(
        None, None, b"", dtype, 0, moves[0].lr, norm, clips, None, None, time.time(), skipped,
        parts,
    )  # fmt: skip


def _terms(session: "Session", found: Open) -> Sequence[Terms]:
    return with_overrides(session.terms, found.overrides, session.spec.dtype)


def reduce(session: "Session", found: Open) -> Program[None]:
    """Makes one gradient of a round's contributions, in the session's dtype."""
    arena, rules, dtype = session.arena, found.rules, session.spec.dtype
    assert arena is not None
    assert arena.reduced is not None
    divisor = found.weight if rules.reduce == "mean" else 1.0
    if not rules.holds:
        assert arena.total is not None
        yield [
            partial(accumulate.finish, arena.total, divisor, arena.reduced, dtype, lo, hi)
            for lo, hi in cpu.chunks(0, arena.size)
        ]
        return
    if rules.reduce in ROBUST:
        held = [robust.Held(one.flat, one.dtype, one.factor) for one in found.held]
        work = partial(_robust, rules, held, arena.reduced, dtype)
    else:
        work = partial(_in_order, list(_by_worker(found)), divisor, arena.reduced, dtype)
    yield [partial(work, lo, hi) for lo, hi in cpu.chunks(0, arena.size)]


def _by_worker(found: Open) -> Iterator[Held]:
    yield from sorted(found.held, key=lambda one: one.worker)


def _robust(
    rules: Update, held: Sequence[robust.Held], out: Array, dtype: str, lo: int, hi: int
) -> None:
    if rules.reduce == "median":
        robust.median(held, out, dtype, lo, hi)
    else:
        robust.trimmed_mean(held, rules.trim or 0.0, out, dtype, lo, hi)


def _in_order(
    held: Sequence[Held], divisor: float, out: Array, dtype: str, lo: int, hi: int
) -> None:
    """Adds the contributions in order, a block at a time, so that the sum stays in the cache."""
    total = np.empty(min(BLOCK, hi - lo), np.float64)
    for start in range(lo, hi, BLOCK):
        end = min(start + BLOCK, hi)
        part = total[: end - start]
        part[:] = 0.0
        for one in held:
            accumulate.add(part, one.flat[start:end], one.dtype, one.factor, 0, end - start)
        accumulate.finish(part, divisor, out[start:end], dtype, 0, end - start)


BLOCK = 1 << 16
"""Elements that are summed at a time."""


def apply(session: "Session", end: Close) -> Program[None]:
    """The update of a round, which is reduced and durable. All of it, or a broken session."""
    arena, found, push = session.arena, session.rounds.open, end.push
    assert arena is not None
    assert arena.reduced is not None
    assert found is not None
    assert push is not None
    started_at = time.perf_counter()
    try:
        work = update.prepare(
            arena, _terms(session, found), push.parts, session.spec.dtype, session.spec.dtype
        )
        done, _ = yield from pushes.perform(
            session, arena, work, push.parts, arena.reduced, hold=False
        )
        summary = Summary(
            *session.at.numbers, True, True, 0, push.lr, push.norm, push.clipped, None,
            done.finite, done.update_norm, done.param_norm, found.number, found.counted,
        )  # fmt: skip
        _tell(session, found, summary, push.at, time.perf_counter() - started_at)
        session.rounds.close("applied", end.reason, session.at.numbers, end.at, summary)
    except BaseException as error:
        session.broken = f"{type(error).__name__} during step {session.step + 1}"
        raise
    session.shared.metrics.round_ended("applied", end.at - found.opened_at)
    session.shared.metrics.observe_step(0.0, time.perf_counter() - started_at)
    if not done.finite:
        session.shared.metrics.nonfinite_params()


def _tell(session: "Session", found: Open, summary: Summary, at: float, step_s: float) -> None:
    """Ledger and history of everyone who contributed."""
    for one in found.contributions.values():
        mine = summary._replace(wire=one.wire)
        session.ledger.settle(one.worker, one.sequence, mine)
        session.history.append(
            Record(
                number=session.history.count + 1,
                step=summary.step,
                epoch=summary.epoch,
                version=summary.version,
                worker=one.worker,
                sequence=one.sequence,
                applied=summary.applied and one.counts,
                skipped=one.skipped or summary.skipped or (None if one.counts else "pass"),
                loss=one.loss,
                lr=summary.lr,
                grad_norm=one.norm,
                clipped=one.clipped or summary.clipped,
                update_norm=summary.update_norm,
                param_norm=summary.param_norm,
                staleness=0,
                queued_s=0.0,
                step_s=step_s,
                at=one.at,
                round=found.number,
                weight=one.weight,
                lateness_s=one.lateness_s,
            )
        )


# What became of a contribution


def fate_of(session: "Session", fate: Contributed, worker: str, sequence: int) -> Fate:
    """What became of a contribution by now; its worker may have left meanwhile.

    Args:
        session: Of it.
        fate: What it was when it was last looked at.
        worker: Whose.
        sequence: Of it.
    """
    found = session.ledger.fate(worker, sequence)
    if found is not None:
        return found
    closed = session.rounds.get(fate.round)
    if closed is None:
        return fate
    return closed.summary or fate._replace(reason=closed.reason)


def is_kept(session: "Session", decided: Decided) -> bool:
    """Whether the round keeps the gradient, and gives it back at its end."""
    return decided.gradient is not None and session.spec.update.holds


def abandoned(session: "Session", fate: Contributed, worker: str, sequence: int) -> RoundAbandoned:
    """The refusal of whoever asks for a contribution whose round was abandoned."""
    return RoundAbandoned(
        f"Round {fate.round} was abandoned ({fate.reason}) and with it sequence {sequence} of "
        f"worker {worker!r}, which stays used. Pull, compute again, and push under a new number.",
        round=fate.round,
        reason=fate.reason,
        worker=worker,
        sequence=sequence,
        epoch=session.epoch,
        version=session.version,
        step=session.step,
    )


def told(session: "Session", fate: Contributed, *, replayed: bool) -> dict[str, Any]:
    """The answer to a contribution whose round is open."""
    found = session.rounds.open
    counted = 0 if found is None else found.counted
    return {
        "applied": False,
        "replayed": replayed,
        "identified": True,
        "round": fate.round,
        "contributions": counted,
        "passes": 0 if found is None else len(found.contributions) - counted,
        "missing": session.rounds.missing(session.spec.update),
        "step": session.step,
        "epoch": session.epoch,
        "version": session.version,
    }


def buffer_of(arena: Arena, flat: Array, dtype: str) -> tuple[Array, Any]:
    """A copy of a gradient in a buffer of the session's, for a round that is replayed."""
    buffer = arena.gradients.acquire()
    copy = buffer[: flat.nbytes].view(NUMPY[dtype])
    copy[:] = flat
    return copy, partial(arena.gradients.release, buffer)
