"""Pushes: from a gradient that was received whole to a summary, once for each key.

A push is *decided* (checks, norm, clipping, coefficients: all that may refuse it) and then
*applied*. A session that logs makes the decision durable in between: queue.py.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kernels import reduce
from service.errors import Nonfinite, ServiceError, TensorMismatch
from service.schemas import PushControl, Terms
from service.sessions import sparse, transfer, update
from service.sessions.arena import Arena, Array
from service.sessions.history import Record
from service.sessions.lane import Program
from service.sessions.ledger import Admitted, Fate, Summary, same_push
from service.sessions.records import Push
from service.sessions.schedule import factor
from service.sessions.versions import Version
from service.storage.ring import Slot
from service.wire.digest import digest, digest_rows
from service.wire.rows import Rows

if TYPE_CHECKING:
    from service.sessions.session import Session


class Gradient(NamedTuple):
    """A gradient in layout order, in its wire dtype; zeros where tensors did not come.

    Where there are rows, the dtype is the session's, and the flat vector is garbage at their
    tensors and at those that did not come: nobody reads it there. It may be written, for it is the
    push's own.
    """

    flat: Array
    dtype: str
    control: PushControl
    release: Callable[[], None]
    present: tuple[bool, ...] | None = None
    """For each entry of the layout, whether it came; None: all."""
    rows: tuple[Rows, ...] = ()
    """Tensors of which only some rows came, to be taken lazily; `flat` is undefined there."""
    wire: str | None = None
    """The form of it that loses something: "f16", "bf16", "int8", "topk", "int8+topk"."""


class Outcome(NamedTuple):
    """What a push did, and the version it may read if parameters were asked for."""

    summary: Fate
    replayed: bool
    held: Version | None
    kept: bool = False
    """Whether a round keeps the gradient, and gives it back itself."""


class Position(NamedTuple):
    """Where a session stands; assigned whole, so that no reader sees half of a change."""

    epoch: int
    version: int
    step: int

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Step, epoch and version, as a summary has them."""
        return self.step, self.epoch, self.version

    @property
    def following(self) -> "Position":
        """Behind one more update."""
        return Position(self.epoch, self.version + 1, self.step + 1)


class Timing(NamedTuple):
    """When a push was begun, by the performance counter, and how long it had waited."""

    started_at: float
    queued_s: float


class Ahead(NamedTuple):
    """What a session will be once the pushes that are decided have been applied."""

    at: Position
    runs: tuple[update.Runs, ...]


class Decided(NamedTuple):
    """A push that will be admitted, with all that may fail behind it.

    Attributes:
        push: What a record keeps of it.
        flat: The gradient.
        work: The update; None if it is skipped.
        ahead: Where it leaves the session.
    """

    push: Push
    flat: Array
    work: update.Work | None
    ahead: Ahead


def one(session: "Session", gradient: Gradient, *, hold: bool) -> Program[Outcome]:
    """Decides a push and applies it."""
    key = gradient.control.key
    if key is not None:
        session.committing.add(key)
    try:
        found = yield from decide(session, gradient)
        if not isinstance(found, Decided):
            return Outcome(found, True, session.ready.versions.hold() if hold else None)
        timing = Timing(session.lane.started_at, session.lane.queued_s)
        return (yield from apply(session, found, timing, hold=hold))
    finally:
        if key is not None:
            session.committing.discard(key)


def decide(
    session: "Session", gradient: Gradient, ahead: Ahead | None = None, slot: Slot | None = None
) -> Program[Decided | Fate]:
    """All of a push but its effect; raises what refuses it.

    Args:
        session: In whose lane this runs; only read.
        gradient: Only read, but for rows of rules that have ceased to be lazy.
        ahead: What the pushes decided before it will leave; None: what is.
        slot: Receives the gradient meanwhile.

    Returns:
        The summary of the first admission, if this is a repeat.
    """
    control, arena = gradient.control, session.ready
    known = session.ledger.find(*control.key) if control.key else None
    if known is not None:
        return (yield from repeated(session, known, gradient))
    at = session.at if ahead is None else ahead.at
    runs = None if ahead is None else ahead.runs
    staleness = session.check_base(control, at)
    terms = session.terms_of(control)
    gradient = sparse.settled(arena, terms, fitted(session, arena, gradient))
    check_complete(session, arena, gradient)
    came = _counting(arena, terms, gradient)
    examined = update.examining(arena, terms, gradient.flat, gradient.dtype, came)
    size = sparse.touched(arena.layout.entries, gradient)
    beside: list[update.Sized] = [(size, partial(marked, session, gradient))]
    if slot is not None:
        kept = sparse.payload(arena, terms, gradient)
        beside.append((size, session.guarded(partial(_write, slot, kept))))
    found = yield from update.together([*beside, *(sized for _, sized in examined)])
    sums = update.summed(
        len(terms),
        [(index, one) for (index, _), one in zip(examined, found[len(beside) :], strict=True)],
    )
    scale = control.grad_scale or 1.0
    shrink = _shrink(session, staleness)
    moves = update.moves(
        terms, sums, scale, factor(session.spec.schedule, at.step), shrink,
        turned=session.spec.push == "delta",
    )  # fmt: skip
    norm = sums.norm / scale if math.isfinite(sums.norm) else None
    skipped = None
    if norm is None and not only_large(arena, terms, gradient):
        refuse_nonfinite(session, arena, terms, gradient)
        skipped = "nonfinite"
    parts: tuple[update.Part, ...] = ()
    if skipped is None:
        parts = tuple(update.parts(arena, moves, gradient.present, runs))
    clips = skipped is None and update.clipped(moves, sums, scale)
    rows = sparse.live(arena, terms, gradient.rows)
    push = Push(
        control.worker, control.sequence, found[0], gradient.dtype, staleness, moves[0].lr, norm,
        clips, control.loss, control.overrides, time.time(), skipped, parts, gradient.wire,
        tuple((one.entry, one.idx.size) for one in rows) if gradient.rows else None,
    )  # fmt: skip
    if skipped is not None:
        still = Ahead(at, runs or tuple(group.runs for group in arena.groups))
        return Decided(push, gradient.flat, None, still)
    work = update.prepare(arena, terms, parts, session.spec.dtype, gradient.dtype, runs, rows=rows)
    return Decided(push, gradient.flat, work, Ahead(at.following, work.runs))


def apply(
    session: "Session", decided: Decided, timing: Timing | None, *, hold: bool
) -> Program[Outcome]:
    """The effect of a push: parameters, state, ledger, history. All of it, or a broken session.

    Args:
        session: In whose lane this runs.
        decided: The push.
        timing: None if it is applied again after a restart.
        hold: Pin the version that results.
    """
    # Not `ready`: what is durable is applied, whether or not a deletion waits behind it.
    arena, push, work = session.arena, decided.push, decided.work
    assert arena is not None
    if work is None:
        summary = Summary(
            *session.at.numbers, False, push.worker is not None, push.staleness, push.lr,
            None, False, push.skipped, True, None, None, wire=push.wire,
        )  # fmt: skip
        if timing is not None:
            session.shared.metrics.skipped()
        admit(session, push, summary, timing)
        return Outcome(summary, False, arena.versions.hold() if hold else None)
    try:
        done, held = yield from perform(session, arena, work, push.parts, decided.flat, hold=hold)
        summary = Summary(
            *session.at.numbers, True, push.worker is not None, push.staleness, push.lr, push.norm,
            push.clipped, None, done.finite, done.update_norm, done.param_norm, wire=push.wire,
        )  # fmt: skip
        admit(session, push, summary, timing)
    except BaseException as error:  # all of it happens, or the session is broken
        session.broken = f"{type(error).__name__} during step {session.step + 1}"
        raise
    if not done.finite:
        session.shared.metrics.nonfinite_params()
    return Outcome(summary, False, held)


def perform(
    session: "Session",
    arena: Arena,
    work: update.Work,
    parts: Sequence[update.Part],
    flat: Array,
    *,
    hold: bool,
) -> Program[tuple[update.Done, Version | None]]:
    """Runs an update and publishes what it makes; the session is at the next version then."""
    ema = session.spec.ema
    before, after = arena.versions.begin()
    done = yield from update.perform(
        arena,
        work,
        before,
        after,
        flat,
        decay=None if ema is None else ema.decay,
        norms=session.spec.norms,
    )
    now = session.at.following
    spans = [(part.first, part.last) for part in parts]
    session.changes.note(now.epoch, now.version, spans)
    held = arena.versions.publish(*now, after, hold=hold)
    session.at = now
    return done, held


def admit(session: "Session", push: Push, summary: Summary, timing: Timing | None) -> None:
    """Ledger, history and metrics of an admitted push."""
    if push.worker is not None and push.sequence is not None:
        session.ledger.record(push.worker, push.sequence, push.digest, summary)
        session.members.pushed(push.worker, push.staleness, applied=summary.applied)
    queued_s = step_s = 0.0
    if timing is not None:
        queued_s, step_s = timing.queued_s, time.perf_counter() - timing.started_at
        if summary.applied:
            session.shared.metrics.observe_step(queued_s, step_s)
            session.shared.metrics.observe_staleness(push.staleness)
    session.history.append(
        Record(
            number=session.history.count + 1,
            step=summary.step,
            epoch=summary.epoch,
            version=summary.version,
            worker=push.worker,
            sequence=push.sequence,
            applied=summary.applied,
            skipped=summary.skipped,
            loss=push.loss,
            lr=summary.lr,
            grad_norm=summary.grad_norm,
            clipped=summary.clipped,
            update_norm=summary.update_norm,
            param_norm=summary.param_norm,
            staleness=summary.staleness,
            queued_s=queued_s,
            step_s=step_s,
            at=push.at,
        )
    )


# What decides


def repeated(session: "Session", known: Admitted, gradient: Gradient) -> Program[Fate]:
    """What the first admission of a key did, if this is the same push.

    Raises:
        KeyReused: It is another one.
    """
    control = gradient.control
    assert control.key is not None
    (mark,) = yield [partial(_marked_again, session, gradient, known.digest)]
    fate = same_push(known, mark, *control.key)
    session.shared.metrics.replay()
    return fate


def marked(session: "Session", gradient: Gradient) -> bytes:
    """What tells this push from another; b"" if nobody will ask."""
    control = gradient.control
    if control.key is None:
        return b""
    flat, present = gradient.flat, gradient.present
    if present is not None:  # what a group added behind a push must not make another push of it
        last = max(at for at, came in enumerate(present) if came) + 1
        assert session.arena is not None
        entries = session.arena.layout.entries
        flat = flat[: entries[last - 1].offset + entries[last - 1].size]
        present = present[:last]
    rows = [one for one in gradient.rows if one.width]  # an empty tensor has none
    if rows:
        assert session.arena is not None
        entries = session.arena.layout.entries[: None if present is None else len(present)]
        dense = sparse.dense(entries, flat, present, rows)
        return digest_rows(dense, rows, control.canonical, present)
    return digest(flat, gradient.dtype, session.spec.dtype, control.canonical, present)


def _marked_again(session: "Session", gradient: Gradient, first: bytes) -> bytes:
    """As `marked`, of a push whose key was admitted with the digest `first`.

    A group may have become lazy in between, or have ceased to be: rows are compared as they came,
    as they would be taken now, and as the dense gradient that they are to a rule that is not lazy.
    """
    found = marked(session, gradient)
    if found == first or not gradient.rows:
        return found
    arena, terms = session.ready, session.terms
    with contextlib.suppress(ServiceError):  # overrides that the session no longer admits
        terms = tuple(session.terms_of(gradient.control))
    for again in (partial(sparse.settled, arena, terms), partial(sparse.scattered, arena)):
        if found == first:
            break
        gradient = again(gradient)
        found = marked(session, gradient)
    return found


def fitted(session: "Session", arena: Arena, gradient: Gradient) -> Gradient:
    """The gradient in the layout of now: tensors that a new group brought did not come."""
    missing = arena.size - gradient.flat.size
    if gradient.present is not None and len(gradient.present) == len(arena.layout.entries):
        return gradient
    if gradient.present is None and not missing:
        return gradient
    return transfer.extended(arena, session.spec, gradient)


def check_complete(session: "Session", arena: Arena, gradient: Gradient) -> None:
    """Refuses a push that lacks tensors by now: it was read under other rules."""
    if gradient.present is None:
        return
    pairs = zip(arena.layout.entries, gradient.present, strict=True)
    lacking = [entry.name for entry, came in pairs if not came and not session.may_miss(entry)]
    if lacking:
        raise TensorMismatch(
            f"The push lacks {lacking[0]!r}; send every tensor of the session.",
            missing=lacking[:20],
            missing_count=len(lacking),
        )


def _shrink(session: "Session", staleness: int) -> float:
    """What the learning rate is divided by (docs/decisions/0005)."""
    bound = session.spec.update.max_staleness
    return 1.0 + staleness if bound is not None and staleness > bound else 1.0


def _write(slot: Slot, arrays: Iterable[Array]) -> None:
    """Puts arrays into a slot, one behind the other."""
    for array in arrays:
        slot.write(array.view(np.uint8).data)


def _counting(arena: Arena, terms: Sequence[Terms], gradient: Gradient) -> Sequence[sparse.Stretch]:
    """What counts of a gradient: the stretches that are not frozen."""
    return sparse.stretches(arena, terms, gradient.flat, gradient.present, gradient.rows)


def only_large(arena: Arena, terms: Sequence[Terms], gradient: Gradient) -> bool:
    """Whether squares overflowed though every element is finite: float64 above 1e154."""
    return _finite_though(gradient.dtype, _counting(arena, terms, gradient))


def only_large_in(arena: Arena, terms: Sequence[Terms], flat: Array, dtype: str) -> bool:
    """As `only_large`, of a bare vector."""
    return _finite_though(dtype, sparse.stretches(arena, terms, flat))


def _finite_though(dtype: str, stretches: Sequence[sparse.Stretch]) -> bool:
    """As `only_large`, of some stretches."""
    return dtype == "F64" and all(reduce.all_finite(one.values, "F64") for one in stretches)


def refuse_nonfinite(
    session: "Session", arena: Arena, terms: Sequence[Terms], gradient: Gradient
) -> None:
    """Refuses a gradient that is not finite, unless the session skips such.

    Raises:
        Nonfinite: It says where.
    """
    if session.spec.on_nonfinite == "skip":
        return
    for one in _counting(arena, terms, gradient):
        at = reduce.first_nonfinite(one.values, gradient.dtype)
        if at < 0:
            continue
        name, index = one.name_at(arena.layout, at)
        raise Nonfinite(
            f"The gradient of {name!r} is not finite at flat index {index}; nothing was "
            "applied. Lower the loss scale or the learning rate, or create the session with "
            "on_nonfinite: skip.",
            tensor=name,
            index=index,
        )
