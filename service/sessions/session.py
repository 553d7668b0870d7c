"""One session: its parameters, its optimizer state, and the only code that writes them."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import NUMPY
from kernels import convert, cpu, reduce
from kernels.pool import Pool
from kernels.registry import RULES
from service.errors import (
    EpochChanged,
    InFlight,
    Internal,
    Nonfinite,
    ParamsMissing,
    PreconditionFailed,
    SessionGone,
    StaleGradient,
    TensorMismatch,
    VersionPending,
    VersionUnknown,
)
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import PushControl, Spec
from service.sessions.arena import (
    Arena,
    Array,
    Run,
    Tensor,
    check_known,
    check_state,
    counts,
    runs_of,
)
from service.sessions.gradients import Gradients
from service.sessions.history import History, Record
from service.sessions.lane import Lane, Program, stopping
from service.sessions.layout import Entry, Layout
from service.sessions.ledger import Ledger, Summary, same_push
from service.sessions.versions import Version, Versions
from service.settings import Settings
from service.wire.digest import digest

SMALL = 16_384
"""Elements up to which a push runs on the event loop: about 20 us of kernels, where the hop to a
thread and back costs 100."""


class Shared(NamedTuple):
    """What all sessions of a server share."""

    settings: Settings
    pool: Pool
    budget: Budget
    metrics: Metrics


class Gradient(NamedTuple):
    """A whole gradient in layout order, in its wire dtype."""

    flat: Array
    dtype: str
    control: PushControl
    release: Callable[[], None]


class Outcome(NamedTuple):
    """What a push did, and the version it may read if parameters were asked for."""

    summary: Summary
    replayed: bool
    held: Version | None


class Session:
    """A model under training, by one rule.

    All writes go through the lane; the event loop reads numbers and holds versions. A method that
    raises has changed nothing, except that an unexpected failure inside an update marks the
    session broken, so that nothing is ever built on half an update.
    """

    def __init__(self, name: str, spec: Spec, epoch: int, shared: Shared) -> None:
        self.id = name
        self.spec = spec
        self.hyper: Mapping[str, Any] = spec.optimizer.model_dump()
        self.created_with = spec
        self.revision = 1
        self.epoch = epoch
        self.version = 0
        self.step = 0
        self.created_at = time.time()
        self.arena: Arena | None = None
        self.broken: str | None = None
        self.deleted = False
        settings = shared.settings
        self.ledger = Ledger(settings.max_workers, settings.worker_retention_s)
        self.history = History(settings.history_steps)
        self.lane = Lane(shared.pool, self._wake)
        self.shared = shared
        self._dtype = np.dtype(NUMPY[spec.dtype])
        self._committing: set[tuple[str, int]] = set()
        self._waiters: list[tuple[tuple[int, int], asyncio.Future[Version]]] = []

    # What anyone may ask, on the event loop

    @property
    def ready(self) -> Arena:
        """The arrays.

        Raises:
            SessionGone: Deleted.
            ParamsMissing: Parameters have not been uploaded.
            Internal: An earlier failure left the session unusable.
        """
        self.check_alive()
        if self.arena is None:
            raise ParamsMissing(
                f"Session {self.id!r} has no parameters yet; PUT /v1/sessions/{self.id}/params.",
                session=self.id,
            )
        return self.arena

    def check_alive(self) -> None:
        """Refuses everything once the session was deleted or broke."""
        if self.deleted:
            raise gone(self.id)
        if self.broken is not None:
            raise Internal(
                f"Session {self.id!r} stopped after an unexpected failure ({self.broken}); see the "
                "server's log, then delete the session and create it anew.",
            )

    def check_base(self, control: PushControl) -> int:
        """The staleness of a push.

        Raises:
            EpochChanged: Its base version belongs to a history that was cut.
            VersionUnknown: Its base version does not exist yet.
            StaleGradient: It is staler than the session admits.
        """
        if control.base_version is None:
            return 0
        epoch, base = control.base_version
        where = {"epoch": self.epoch, "version": self.version, "step": self.step}
        if epoch < self.epoch:
            raise EpochChanged(
                f"The gradient was computed in epoch {epoch} and the session is in epoch "
                f"{self.epoch}: its parameters or state were replaced. Pull and compute again.",
                base_version=f"{epoch}-{base}",
                **where,
            )
        if (epoch, base) > (self.epoch, self.version):
            raise VersionUnknown(
                f"base_version {epoch}-{base} does not exist; the newest is "
                f"{self.epoch}-{self.version}. Was the server restarted? Pull and compute again.",
                base_version=f"{epoch}-{base}",
                **where,
            )
        staleness = self.version - base
        update = self.spec.update
        bound = update.max_staleness
        if bound is not None and staleness > bound and update.on_stale == "refuse":
            raise StaleGradient(
                f"The gradient was computed {staleness} versions ago and at most {bound} are "
                "admitted; pull and compute it again.",
                base_version=base,
                max_staleness=bound,
                staleness=staleness,
                **where,
            )
        return staleness

    def precheck(self, control: PushControl) -> None:
        """The checks that need no body, so that a refusal costs no upload.

        A known key is not refused: its body is read and compared.

        Raises:
            InFlight: The same key is being committed.
            ServiceError: As `check_base` and `Ledger.find`.
        """
        self.check_alive()
        key = control.key
        if key is not None:
            if key in self._committing:
                raise InFlight(
                    f"Sequence {key[1]} of worker {key[0]!r} is being committed; send the same "
                    "push again to learn what it did.",
                    retry_after_s=1,
                )
            if self.ledger.find(*key) is not None:
                return
        self.check_base(control)

    # Pushes

    async def push(self, gradient: Gradient, *, hold: bool) -> Outcome:
        """Applies a gradient through the lane, once for each key.

        Args:
            gradient: Its buffer is only read; `release` is called when nobody needs it any more,
                which may be after a cancelled caller has gone.
            hold: Pin the version that results, for an answer with parameters.
        """
        outcome = self.lane.submit(
            self._push_once(gradient, hold=hold), here=self._is_small(gradient)
        )
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            outcome.add_done_callback(self._unpin)  # nobody is left who would give it back
            raise

    def _unpin(self, outcome: "asyncio.Future[Outcome]") -> None:
        if outcome.exception() is None and (held := outcome.result().held) is not None:
            self.release(held)

    def _is_small(self, gradient: Gradient) -> bool:
        """Whether a push costs less than its hop to a thread, and its kernels are at hand."""
        if self.arena is None or self.arena.size > SMALL:
            return False
        variant = RULES[self.spec.optimizer.rule].variant(self.hyper)
        return cpu.ready(variant, self.spec.dtype, gradient.dtype) and reduce.ready(gradient.dtype)

    def _push_once(self, gradient: Gradient, *, hold: bool) -> Program[Outcome]:
        key = gradient.control.key
        if key is not None:
            self._committing.add(key)
        try:
            return (yield from self._push(gradient, hold=hold))
        finally:
            gradient.release()
            if key is not None:
                self._committing.discard(key)

    def _push(self, gradient: Gradient, *, hold: bool) -> Program[Outcome]:
        control = gradient.control
        self.check_alive()
        arena = self.ready
        known = self.ledger.find(*control.key) if control.key else None
        if known is None:
            self.check_base(control)
        sums: list[Any] = yield [
            partial(self._examine, gradient, parts=part, mark=index == 0, norm=known is None)
            for index, part in enumerate(_spread(arena.size))
        ]
        mark = sums[0][0]
        if known is not None and control.key is not None:
            summary = same_push(known, mark, *control.key)
            self.shared.metrics.replay()
            return Outcome(summary, True, arena.versions.hold() if hold else None)
        norm = math.sqrt(reduce.total(np.concatenate([part for _, part in sums])))
        if not math.isfinite(norm) and not self._only_large(gradient):
            self._refuse_nonfinite(arena, gradient)
            summary = self._summary(control, lr=self._lr(control)[1], norm=None, finite=True)
            summary = summary._replace(applied=False, skipped="nonfinite")
            self.shared.metrics.skipped()
            self._admit(control, mark, summary)
            return Outcome(summary, False, arena.versions.hold() if hold else None)
        return (yield from self._apply(arena, gradient, norm, mark, hold=hold))

    def _apply(
        self, arena: Arena, gradient: Gradient, norm: float, mark: bytes, *, hold: bool
    ) -> Program[Outcome]:
        control = gradient.control
        stale, lr = self._lr(control)
        hyper, rule = self.hyper, RULES[self.spec.optimizer.rule]
        # Everything that may fail (a compiler, an allocation) comes before the first write.
        loop = cpu.kernel(rule.variant(hyper), self.spec.dtype, gradient.dtype)
        with np.errstate(over="ignore"):  # a product of hyperparameters may overflow, as in torch
            coefficients = [
                np.array(rule.coefficients(hyper, run.updates, lr), self._dtype)
                for run in arena.runs
            ]
        before, after = arena.versions.begin()
        try:
            finite = yield [
                partial(loop, before, after, gradient.flat, arena.state, h, lo, hi)
                for run, h in zip(arena.runs, coefficients, strict=True)
                for lo, hi in cpu.chunks(run.lo, run.hi)
            ]
        except BaseException as error:
            self.broken = f"{type(error).__name__} during step {self.step + 1}"
            raise
        arena.runs = tuple(run._replace(updates=run.updates + 1) for run in arena.runs)
        self.step += 1
        self.version += 1
        summary = self._summary(control, lr=lr, norm=norm, finite=all(finite))._replace(
            staleness=stale
        )
        if not summary.params_finite:
            self.shared.metrics.nonfinite_params()
        held = arena.versions.publish(self.epoch, self.version, self.step, after, hold=hold)
        self._admit(control, mark, summary)
        return Outcome(summary, False, held)

    def _examine(
        self, gradient: Gradient, *, parts: tuple[int, int], mark: bool, norm: bool
    ) -> tuple[bytes, Array]:
        """Sums of squares, and from one part only the digest, which is of the whole vector."""
        control = gradient.control
        found = b""
        if mark and control.key is not None:
            found = digest(gradient.flat, gradient.dtype, self.spec.dtype, control.canonical)
        if not norm:
            return found, np.empty(0)
        return found, reduce.sumsq(gradient.flat, gradient.dtype, *parts)

    def _only_large(self, gradient: Gradient) -> bool:
        """Whether squares overflowed though every element is finite: float64 above 1e154."""
        return gradient.dtype == "F64" and reduce.all_finite(gradient.flat, "F64")

    def _refuse_nonfinite(self, arena: Arena, gradient: Gradient) -> None:
        if self.spec.on_nonfinite == "skip":
            return
        at = reduce.first_nonfinite(gradient.flat, gradient.dtype)
        name, index = arena.layout.name_at(at)
        raise Nonfinite(
            f"The gradient of {name!r} is not finite at flat index {index}; nothing was applied. "
            "Lower the loss scale or the learning rate, or create the session with "
            "on_nonfinite: skip.",
            tensor=name,
            index=index,
        )

    def _lr(self, control: PushControl) -> tuple[int, float]:
        """Staleness, and the learning rate after it."""
        staleness = self.check_base(control)
        lr = float(self.spec.optimizer.lr)
        update = self.spec.update
        if update.max_staleness is not None and staleness > update.max_staleness:
            lr /= 1 + staleness
        return staleness, lr

    def _summary(
        self, control: PushControl, *, lr: float, norm: float | None, finite: bool
    ) -> Summary:
        base = control.base_version
        return Summary(
            step=self.step,
            epoch=self.epoch,
            version=self.version,
            applied=True,
            identified=control.key is not None,
            staleness=0 if base is None else self.version - base[1],
            lr=lr,
            grad_norm=norm if norm is None or math.isfinite(norm) else None,
            skipped=None,
            params_finite=finite,
        )

    def _admit(self, control: PushControl, mark: bytes, summary: Summary) -> None:
        """Ledger, history and metrics of an admitted push."""
        if control.key is not None:
            self.ledger.record(*control.key, mark, summary)
        step_s = time.perf_counter() - self.lane.started_at
        if summary.applied:
            self.shared.metrics.observe_step(self.lane.queued_s, step_s)
        self.history.append(
            Record(
                step=summary.step,
                epoch=summary.epoch,
                version=summary.version,
                worker=control.worker,
                sequence=control.sequence,
                applied=summary.applied,
                skipped=summary.skipped,
                loss=control.loss,
                lr=summary.lr,
                grad_norm=summary.grad_norm,
                staleness=summary.staleness,
                queued_s=self.lane.queued_s,
                step_s=step_s,
                at=time.time(),
            )
        )

    # Pulls

    async def hold(self, at_least: tuple[int, int] | None, wait_s: float) -> Version:
        """Pins the newest version, waiting for one that is new enough; give it back by `release`.

        Raises:
            VersionPending: `at_least` was not reached in `wait_s` seconds.
        """
        arena = self.ready
        target = at_least or (0, 0)
        reached = (self.epoch, self.version) >= target
        if reached and (version := arena.versions.hold()) is not None:
            return version
        if not reached and wait_s <= 0:
            raise self._pending(target)
        future: asyncio.Future[Version] = asyncio.get_running_loop().create_future()
        waiter = (target, future)
        self._waiters.append(waiter)
        patience = wait_s if not reached else self.shared.settings.wait_cap_s
        try:
            async with asyncio.timeout(max(patience, 0.001)):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif future.exception() is None:  # served in the moment in which the wait ended
                self.release(future.result())
            if isinstance(error, TimeoutError):
                raise self._pending(target) from None
            raise

    def release(self, version: Version) -> None:
        """Gives a held version back, on the event loop."""
        assert self.arena is not None
        self.arena.versions.release(version)
        if self._waiters:
            self._wake()

    def _pending(self, target: tuple[int, int]) -> VersionPending:
        return VersionPending(
            f"Version {target[0]}-{target[1]} is not there in time; the newest is "
            f"{self.epoch}-{self.version}. Ask again, with Prefer: wait=SECONDS to wait longer.",
            epoch=self.epoch,
            version=self.version,
        )

    def _wake(self) -> None:
        """Serves the pulls that waited; runs on the event loop between two programs."""
        if not self._waiters:
            return
        waiting, self._waiters = self._waiters, []
        for target, future in waiting:
            if future.done():
                continue
            if self.deleted:
                future.set_exception(gone(self.id))
                continue
            held = None
            if self.arena is not None and (self.epoch, self.version) >= target:
                held = self.arena.versions.hold()
            if held is None:
                self._waiters.append((target, future))
            else:
                future.set_result(held)

    def dismiss(self) -> None:
        """Ends the waits of pulls: the server stops, and nothing they wait for will come."""
        waiting, self._waiters = self._waiters, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(stopping())

    # Everything else that writes

    async def load(self, tensors: Sequence[Tensor], *, first_only: bool) -> None:
        """Takes parameters: the first upload fixes the layout, a later one may be partial.

        Raises:
            PreconditionFailed: `first_only` and the session has parameters.
            TensorMismatch: Names or shapes that the layout does not have.
            Nonfinite: A value is not finite in the session's dtype.
            InsufficientMemory: The budget has no room for the session.
        """
        await self.lane.run(self._load(tensors, first_only=first_only))

    def check_first(self) -> None:
        """Refuses an upload that only the first of several workers may make."""
        if self.arena is not None:
            raise PreconditionFailed(
                f"Session {self.id!r} has parameters already; pull them.",
                epoch=self.epoch,
                version=self.version,
            )

    def _load(self, tensors: Sequence[Tensor], *, first_only: bool) -> Program[None]:
        self.check_alive()
        if not tensors:
            raise TensorMismatch("The upload holds no tensors; send those of the model.")
        if first_only:
            self.check_first()
        if self.arena is None:
            arena = self._arena(Layout.of([(n, d, s) for n, d, s, _ in tensors]))
            fresh = True
        else:
            arena, fresh = self.arena, False
            check_known(arena.layout, tensors)
        target = arena.versions.fresh()
        try:
            if not fresh:
                target[:] = arena.versions.head.flat
            yield from self._place(arena.layout, tensors, target)
            if fresh:
                self._fill_state(arena)
                self._compile()
        except BaseException:
            arena.versions.drop(target)
            if fresh:
                self.shared.budget.release(arena.reserved)
            raise
        self.arena = arena
        if not fresh:
            self.epoch += 1
            self.version = 0
        self.version += 1
        arena.versions.publish(self.epoch, self.version, self.step, target)

    def _place(self, layout: Layout, tensors: Sequence[Tensor], target: Array) -> Program[None]:
        """Converts tensors to the master dtype at their places; every value must be finite."""
        for name, dtype, _, flat in tensors:
            entry = layout.index[name]
            into = target[entry.offset : entry.offset + entry.size]
            yield [
                partial(convert.convert, flat, dtype, into, self.spec.dtype, lo, hi)
                for lo, hi in cpu.chunks(0, entry.size)
            ]
            at = reduce.first_nonfinite(into, self.spec.dtype)
            if at >= 0:
                raise Nonfinite(
                    f"Parameter {name!r} is not finite in {self.spec.dtype} at flat index {at}; "
                    "upload finite values (or use dtype F64 for larger ones).",
                    tensor=name,
                    index=at,
                )

    def _arena(self, layout: Layout) -> Arena:
        """Reserves what a session of this layout needs, then makes it."""
        hyper = self.hyper
        slots = RULES[self.spec.optimizer.rule].slots(hyper)
        flat_bytes = layout.size * self._dtype.itemsize
        # Two versions (the head and a spare), the state, one gradient in flight.
        reserved = flat_bytes * (2 + len(slots) + 1)
        self.shared.budget.reserve(reserved)
        try:
            settings = self.shared.settings
            state = tuple(np.empty(layout.size, self._dtype) for _ in slots)
            versions = Versions(layout.size, self._dtype, settings.max_versions, self.shared.budget)
            gradients = Gradients(flat_bytes, self.shared.budget)
        except BaseException:
            self.shared.budget.release(reserved)
            raise
        runs = (Run(0, layout.size, 0),)
        return Arena(layout, versions, slots, state, gradients, runs, reserved)

    def _compile(self) -> None:
        """Loads the kernel now, so that the first push is not the one that waits for it."""
        rule = RULES[self.spec.optimizer.rule]
        cpu.kernel(rule.variant(self.hyper), self.spec.dtype, self.spec.dtype)
        reduce.warm([self.spec.dtype])

    def _fill_state(self, arena: Arena) -> None:
        for slot, array in zip(arena.slots, arena.state, strict=True):
            array.fill(slot.initial)

    async def patch(self, change: Callable[[Spec], Spec], revision: int | None) -> int:
        """Replaces the specification between two steps; returns the first step it acts on.

        Args:
            change: Makes the new specification of the current one, or refuses.
            revision: The revision that the caller has seen; None accepts any.
        """

        def program() -> Program[int]:
            self.check_alive()
            if revision is not None and revision != self.revision:
                raise PreconditionFailed(
                    f"The specification is at revision {self.revision}, not {revision}; read it "
                    "again and repeat the change if it still makes sense.",
                    revision=self.revision,
                )
            changed = change(self.spec)
            if changed != self.spec:
                self.spec = changed
                self.hyper = changed.optimizer.model_dump()
                self.revision += 1
            return self.step + 1
            yield []

        return await self.lane.run(program())

    async def delete(self) -> None:
        """Ends the session: what was admitted runs to its end, everything later is refused."""
        self.check_deletable()
        self.deleted = True

        def program() -> Program[None]:
            if self.arena is not None:
                arena = self.arena
                # The two version buffers are the versions' own to give back: readers hold some.
                kept = 2 * arena.size * self._dtype.itemsize
                arena.versions.close()
                arena.state = ()
                self.shared.budget.release(arena.reserved - kept)
            return
            yield []

        await self.lane.run(program())

    def check_deletable(self) -> None:
        """Refuses a second delete."""
        if self.deleted:
            raise gone(self.id)

    async def export_state(self) -> tuple[dict[str, str], list[tuple[str, Entry, Array]]]:
        """A copy of the optimizer state: metadata, and (slot, entry, values) for every array."""
        arena = self.ready

        def program() -> Program[tuple[dict[str, Any], tuple[Array, ...]]]:
            self.check_alive()
            facts = {
                "step": self.step,
                "epoch": self.epoch,
                "version": self.version,
                "rule": self.spec.optimizer.rule,
                "counts": counts(arena),
            }
            copies = yield [array.copy for array in arena.state]
            return facts, tuple(copies)

        facts, copies = await self.lane.run(program())
        pieces = [
            (slot.name, entry, copy)
            for slot, copy in zip(arena.slots, copies, strict=True)
            for entry in arena.layout.entries
        ]
        return facts, pieces

    async def load_state(
        self, tensors: Sequence[Tensor], step: int, counted: Mapping[str, int]
    ) -> None:
        """Replaces the whole optimizer state; the parameters stay. Starts a new epoch.

        Raises:
            TensorMismatch: Not exactly the session's `<slot>/<tensor>`, in its dtype and shapes,
                or counts that do not name every tensor.
        """

        def program() -> Program[None]:
            arena = self.ready
            check_state(arena, self.spec.dtype, tensors, counted)
            target = arena.versions.fresh()  # may refuse, so it comes before the first write
            for name, _, _, flat in tensors:
                slot, _, tensor = name.partition("/")
                entry = arena.layout.index[tensor]
                index = [s.name for s in arena.slots].index(slot)
                arena.state[index][entry.offset : entry.offset + entry.size] = flat
            arena.runs = runs_of(arena.layout, counted)
            self.step = step
            yield [partial(np.copyto, target, arena.versions.head.flat)]
            self.epoch += 1
            self.version = 1
            arena.versions.publish(self.epoch, self.version, self.step, target)

        await self.lane.run(program())

    def bytes(self) -> dict[str, int]:
        """What the session may take of memory, as reserved."""
        if self.arena is None:
            return {"reserved": 0}
        one = self.arena.size * self._dtype.itemsize
        return {
            "reserved": self.arena.reserved,
            "params": one,
            "state": one * len(self.arena.slots),
            "gradient": one,
        }


def gone(name: str) -> SessionGone:
    """The refusal of everything about a deleted session."""
    return SessionGone(
        f"Session {name!r} was deleted; PUT /v1/sessions/{name} creates it anew, in the next "
        "epoch.",
        session=name,
    )


def _spread(size: int) -> list[tuple[int, int]]:
    """Parts for reductions: whole blocks of the layout, as the kernels cut them."""
    return cpu.chunks(0, size)
