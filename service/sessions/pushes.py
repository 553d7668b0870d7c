"""Pushes: from a gradient that was received whole to a summary, once for each key.

A push is *decided* (checks, norm, clipping, coefficients: all that may refuse it) and then
*applied*. A session that logs makes the decision durable in between: those that wait are decided
one after another, each on what the one before it will have done, and share one sync.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kernels import reduce
from kernels.pool import Waits
from service.errors import Nonfinite, ServiceError, TensorMismatch
from service.schemas import PushControl, Terms
from service.sessions import transfer, update
from service.sessions.arena import Arena, Array
from service.sessions.history import Record
from service.sessions.lane import Program
from service.sessions.ledger import Summary, same_push
from service.sessions.records import Push
from service.sessions.schedule import factor
from service.sessions.versions import Version
from service.storage.ring import Slot
from service.wire.digest import digest

if TYPE_CHECKING:
    from service.sessions.durable import Durable
    from service.sessions.session import Session


class Gradient(NamedTuple):
    """A gradient in layout order, in its wire dtype; zeros where tensors did not come."""

    flat: Array
    dtype: str
    control: PushControl
    release: Callable[[], None]
    present: tuple[bool, ...] | None = None
    """For each entry of the layout, whether it came; None: all."""


class Outcome(NamedTuple):
    """What a push did, and the version it may read if parameters were asked for."""

    summary: Summary
    replayed: bool
    held: Version | None


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


# One push


def one(session: "Session", gradient: Gradient, *, hold: bool) -> Program[Outcome]:
    """Decides a push and applies it."""
    key = gradient.control.key
    if key is not None:
        session.committing.add(key)
    try:
        found = yield from decide(session, gradient)
        if isinstance(found, Summary):
            return Outcome(found, True, session.ready.versions.hold() if hold else None)
        timing = Timing(session.lane.started_at, session.lane.queued_s)
        return (yield from apply(session, found, timing, hold=hold))
    finally:
        if key is not None:
            session.committing.discard(key)


def decide(
    session: "Session", gradient: Gradient, ahead: Ahead | None = None, slot: Slot | None = None
) -> Program[Decided | Summary]:
    """All of a push but its effect; raises what refuses it.

    Args:
        session: In whose lane this runs; only read.
        gradient: Only read.
        ahead: What the pushes decided before it will leave; None: what is.
        slot: Receives the gradient meanwhile.

    Returns:
        The summary of the first admission, if this is a repeat.
    """
    control, arena = gradient.control, session.ready
    known = session.ledger.find(*control.key) if control.key else None
    if known is not None and control.key is not None:
        (mark,) = yield [partial(marked, session, gradient)]
        summary = same_push(known, mark, *control.key)
        session.shared.metrics.replay()
        return summary
    at = session.at if ahead is None else ahead.at
    runs = None if ahead is None else ahead.runs
    staleness = session.check_base(control, at)
    terms = session.terms_of(control)
    gradient = fitted(session, arena, gradient)
    _check_complete(session, arena, gradient)
    examined = update.examining(arena, terms, gradient.flat, gradient.dtype)
    beside: list[update.Sized] = [(gradient.flat.size, partial(marked, session, gradient))]
    if slot is not None:
        whole = gradient.flat.view(np.uint8).data
        beside.append((gradient.flat.size, session.guarded(partial(slot.write, whole))))
    found = yield from update.together([*beside, *(sized for _, sized in examined)])
    sums = update.summed(
        len(terms),
        [(index, one) for (index, _), one in zip(examined, found[len(beside) :], strict=True)],
    )
    scale = control.grad_scale or 1.0
    shrink = _shrink(session, staleness)
    moves = update.moves(terms, sums, scale, factor(session.spec.schedule, at.step), shrink)
    norm = sums.norm / scale if math.isfinite(sums.norm) else None
    skipped = None
    if norm is None and not _only_large(arena, terms, gradient):
        _refuse_nonfinite(session, arena, terms, gradient)
        skipped = "nonfinite"
    parts: tuple[update.Part, ...] = ()
    if skipped is None:
        parts = tuple(update.parts(arena, moves, gradient.present, runs))
    clips = skipped is None and update.clipped(moves, sums, scale)
    push = Push(
        control.worker, control.sequence, found[0], gradient.dtype, staleness, moves[0].lr, norm,
        clips, control.loss, control.overrides, time.time(), skipped, parts,
    )  # fmt: skip
    if skipped is not None:
        still = Ahead(at, runs or tuple(group.runs for group in arena.groups))
        return Decided(push, gradient.flat, None, still)
    work = update.prepare(arena, terms, parts, session.spec.dtype, gradient.dtype, runs)
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
            None, False, push.skipped, True, None, None,
        )  # fmt: skip
        if timing is not None:
            session.shared.metrics.skipped()
        admit(session, push, summary, timing)
        return Outcome(summary, False, arena.versions.hold() if hold else None)
    ema = session.spec.ema
    try:
        before, after = arena.versions.begin()
        done = yield from update.perform(
            arena,
            work,
            before,
            after,
            decided.flat,
            decay=None if ema is None else ema.decay,
            norms=session.spec.norms,
        )
        now = session.at.following
        summary = Summary(
            *now.numbers, True, push.worker is not None, push.staleness, push.lr, push.norm,
            push.clipped, None, done.finite, done.update_norm, done.param_norm,
        )  # fmt: skip
        held = arena.versions.publish(*now, after, hold=hold)
        session.at = now
        admit(session, push, summary, timing)
    except BaseException as error:  # all of it happens, or the session is broken
        session.broken = f"{type(error).__name__} during step {session.step + 1}"
        raise
    if not done.finite:
        session.shared.metrics.nonfinite_params()
    return Outcome(summary, False, held)


def admit(session: "Session", push: Push, summary: Summary, timing: Timing | None) -> None:
    """Ledger, history and metrics of an admitted push."""
    if push.worker is not None and push.sequence is not None:
        session.ledger.record(push.worker, push.sequence, push.digest, summary)
    queued_s = step_s = 0.0
    if timing is not None:
        queued_s, step_s = timing.queued_s, time.perf_counter() - timing.started_at
        if summary.applied:
            session.shared.metrics.observe_step(queued_s, step_s)
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
    return digest(flat, gradient.dtype, session.spec.dtype, control.canonical, present)


def fitted(session: "Session", arena: Arena, gradient: Gradient) -> Gradient:
    """The gradient in the layout of now: tensors that a new group brought did not come."""
    missing = arena.size - gradient.flat.size
    if gradient.present is not None and len(gradient.present) == len(arena.layout.entries):
        return gradient
    if gradient.present is None and not missing:
        return gradient
    return transfer.extended(arena, session.spec, gradient)


def _check_complete(session: "Session", arena: Arena, gradient: Gradient) -> None:
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


def _live(arena: Arena, terms: Sequence[Terms]) -> list[tuple[int, int]]:
    """The stretches of the flat vector that are not frozen."""
    pairs = zip(arena.groups, terms, strict=True)
    return [(group.span.lo, group.span.hi) for group, one in pairs if not one.frozen]


def _only_large(arena: Arena, terms: Sequence[Terms], gradient: Gradient) -> bool:
    """Whether squares overflowed though every element is finite: float64 above 1e154."""
    return gradient.dtype == "F64" and all(
        reduce.all_finite(gradient.flat[lo:hi], "F64") for lo, hi in _live(arena, terms)
    )


def _refuse_nonfinite(
    session: "Session", arena: Arena, terms: Sequence[Terms], gradient: Gradient
) -> None:
    if session.spec.on_nonfinite == "skip":
        return
    for lo, hi in _live(arena, terms):
        at = reduce.first_nonfinite(gradient.flat[lo:hi], gradient.dtype)
        if at < 0:
            continue
        name, index = arena.layout.name_at(lo + at)
        raise Nonfinite(
            f"The gradient of {name!r} is not finite at flat index {index}; nothing was "
            "applied. Lower the loss scale or the learning rate, or create the session with "
            "on_nonfinite: skip.",
            tensor=name,
            index=index,
        )


# Several pushes, one sync


class _Queued(NamedTuple):
    gradient: Gradient
    hold: bool
    outcome: asyncio.Future[Outcome]
    since: float


class _Member(NamedTuple):
    """A push of a group commit."""

    queued: _Queued
    decided: Decided
    slot: Slot
    timing: Timing


class Queue:
    """The pushes of a session that logs, until a program of the lane takes all that wait.

    Used on the event loop; `take` and `put_back` by that program, which runs one at a time.
    """

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._waiting: deque[_Queued] = deque()
        self._active = False

    def put(self, gradient: Gradient, *, hold: bool) -> "asyncio.Future[Outcome]":
        """Queues a push; its outcome comes once it is durable and applied."""
        loop = asyncio.get_running_loop()
        queued = _Queued(gradient, hold, loop.create_future(), time.perf_counter())
        self._waiting.append(queued)
        self.start()
        return queued.outcome

    def start(self) -> None:
        """Sends a program to the lane, if there is work and none is on its way."""
        if self._active or not self._waiting:
            return
        self._active = True
        loop = asyncio.get_running_loop()
        result = self._session.lane.submit(many(self._session, self, loop), then=self._ended)
        result.add_done_callback(self._check)

    def _ended(self, is_full: bool) -> None:
        """After a program: on with what came meanwhile, once there is room for it."""
        self._active = False
        durable = self._session.durable
        assert durable is not None
        if is_full:
            durable.make_room()
        else:
            if durable.is_half_full():
                durable.make_room()
            self.start()

    def _check(self, result: "asyncio.Future[bool]") -> None:
        """Refuses what waits if the lane takes nothing any more."""
        error = result.exception()
        if error is not None:
            self._active = False
            self.refuse(error)

    def refuse(self, error: BaseException) -> None:
        """Ends everything that waits."""
        while self._waiting:
            settle(self._waiting.popleft().outcome, None, error)

    def take(self) -> _Queued | None:
        """The push that has waited longest."""
        return self._waiting.popleft() if self._waiting else None

    def put_back(self, queued: Sequence[_Queued]) -> None:
        """Pushes whose turn comes later, in their old order and before all others."""
        self._waiting.extendleft(reversed(queued))


def settle(outcome: "asyncio.Future[Outcome]", value: Outcome | None, error: object) -> None:
    """Tells the one who waits, on the event loop."""
    if outcome.done():
        return
    if isinstance(error, BaseException):
        outcome.set_exception(error)
        outcome.exception()  # whoever asked may have gone; the failure has been counted
    else:
        assert value is not None
        outcome.set_result(value)


def many(session: "Session", queue: Queue, loop: asyncio.AbstractEventLoop) -> Program[bool]:
    """Takes all pushes that wait through one sync.

    Returns:
        Whether some had to go back because the log is full.
    """
    durable = session.durable
    assert durable is not None
    members: list[_Member] = []
    taken: list[_Queued] = []
    try:
        is_full = yield from _decide_all(session, durable, queue, loop, members, taken)
        if members:
            yield Waits([session.guarded(partial(durable.commit, [m.slot for m in members]))])
        for member in members:
            outcome = yield from apply(
                session, member.decided, member.timing, hold=member.queued.hold
            )
            loop.call_soon_threadsafe(session.settled, member.queued.outcome, outcome)
    except BaseException as error:
        if members and session.broken is None:
            session.broken = f"{type(error).__name__} between the log and step {session.step + 1}"
        for queued in taken:
            loop.call_soon_threadsafe(settle, queued.outcome, None, error)
        raise
    finally:
        for queued in taken:
            if queued.gradient.control.key is not None:
                session.committing.discard(queued.gradient.control.key)
    return is_full


def _decide_all(
    session: "Session", durable: "Durable", queue: Queue, loop: asyncio.AbstractEventLoop,
    members: list[_Member], taken: list[_Queued],
) -> Program[bool]:  # fmt: skip
    """Decides one push after another, each with a place in the log; refusals go out at once."""
    later: list[_Queued] = []
    ahead: Ahead | None = None
    is_full = False
    while (queued := queue.take()) is not None:
        taken.append(queued)  # whatever happens now, it gets an answer
        key = queued.gradient.control.key
        if key is not None and key in session.committing:  # a repeat of one in this very group
            later.append(taken.pop())
            continue
        try:
            session.check_alive()  # the ring of a deleted session has no places, for ever
        except ServiceError as error:
            loop.call_soon_threadsafe(settle, queued.outcome, None, error)
            continue
        slot = durable.reserve()
        if slot is None:
            later.append(taken.pop())
            is_full = True
            break
        if key is not None:
            session.committing.add(key)
        started_at = time.perf_counter()
        try:
            found = yield from decide(session, queued.gradient, ahead, slot)
            held = None
            if isinstance(found, Decided):
                durable.seal(slot, found.push)
            elif queued.hold:
                held = session.ready.versions.hold()
        except Exception as error:
            slot.release()
            loop.call_soon_threadsafe(settle, queued.outcome, None, error)
            continue
        if isinstance(found, Summary):
            slot.release()
            loop.call_soon_threadsafe(session.settled, queued.outcome, Outcome(found, True, held))
            continue
        ahead = found.ahead
        timing = Timing(started_at, started_at - queued.since)
        members.append(_Member(queued, found, slot, timing))
    queue.put_back(later)
    return is_full
