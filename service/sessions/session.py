"""One session: its parameters, its optimizer state, and the only code that writes them."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gradpost.protocol.dtypes import DTYPES
from kernels import reduce
from kernels.pool import Pool
from service.errors import (
    EpochChanged,
    InFlight,
    Internal,
    Nonfinite,
    ParamsMissing,
    PreconditionFailed,
    ServiceError,
    SessionGone,
    StaleGradient,
    TensorMismatch,
    VersionPending,
    VersionUnknown,
)
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import Group, PushControl, Spec, Terms, with_overrides
from service.schemas import terms as terms_of
from service.sessions import transfer, update
from service.sessions.arena import Arena, Array, Piece, Tensor
from service.sessions.history import History, Record
from service.sessions.lane import Lane, Program, stopping
from service.sessions.ledger import Ledger, Summary, same_push
from service.sessions.schedule import factor
from service.sessions.versions import Version
from service.sessions.waiting import Waiting
from service.settings import Settings
from service.wire.digest import digest
from service.wire.reader import EntryLike

SMALL = 16_384
"""Elements up to which a push runs on the event loop: about 20 us of kernels, where the hop to a
thread and back costs 100."""
FEW = 64
"""Kernel runs up to which it does: each costs about 5 us of Python."""


Base = tuple[int, int | None]
"""The epoch an upload is made for, and the version; None: any of the epoch."""


class Shared(NamedTuple):
    """What all sessions of a server share."""

    settings: Settings
    pool: Pool
    budget: Budget
    metrics: Metrics


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


class Session:
    """A model under training.

    All writes go through the lane; the event loop reads numbers and holds versions. A method that
    raises has changed nothing, except that an unexpected failure inside an update marks the
    session broken, so that nothing is ever built on half an update.
    """

    def __init__(self, name: str, spec: Spec, epoch: int, shared: Shared) -> None:
        self.id = name
        self.spec = spec
        self.terms: tuple[Terms, ...] = terms_of(spec)
        self.created_with = spec
        self.added: dict[str, Group] = {}
        """Groups that came later, as they were stated then."""
        self.incarnation = uuid.uuid4().hex
        self.revision = 1
        self.at = Position(epoch, 0, 0)
        self.created_at = time.time()
        self.arena: Arena | None = None
        self.broken: str | None = None
        self.deleted = False
        self.attached = False
        settings = shared.settings
        self.ledger = Ledger(settings.max_workers, settings.worker_retention_s)
        self.history = History(settings.history_steps)
        self.shared = shared
        self.waiting = Waiting(
            lambda: None if self.arena is None else self.arena.versions,
            self._refusal,
            self._pending,
        )
        self.lane = Lane(shared.pool, self.waiting.wake)
        self._committing: set[tuple[str, int]] = set()

    @property
    def epoch(self) -> int:
        """Counts histories, from 1."""
        return self.at.epoch

    @property
    def version(self) -> int:
        """Counts changes of the parameters in this epoch."""
        return self.at.version

    @property
    def step(self) -> int:
        """Counts updates."""
        return self.at.step

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
        refusal = self._refusal()
        if refusal is not None:
            raise refusal

    def _refusal(self) -> ServiceError | None:
        if self.deleted:
            return gone(self.id)
        if self.broken is not None:
            return Internal(
                f"Session {self.id!r} stopped after an unexpected failure ({self.broken}); see the "
                "server's log, then delete the session and create it anew.",
            )
        return None

    def check_base(self, control: PushControl) -> int:
        """The staleness of a push.

        Raises:
            EpochChanged: Its base version belongs to a history that was cut.
            VersionUnknown: Its base version does not exist yet.
            StaleGradient: It is staler than the session admits.
        """
        where = {"epoch": self.epoch, "version": self.version, "step": self.step}
        if control.incarnation not in (None, self.incarnation):
            raise EpochChanged(
                f"Session {self.id!r} was created anew since this gradient's parameters were "
                "pulled (was the server restarted?). Pull and compute again.",
                incarnation=self.incarnation,
                **where,
            )
        if control.base_version is None:
            return 0
        epoch, base = control.base_version
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

    def precheck(self, control: PushControl) -> bool:
        """The checks that need no body, so that a refusal costs no upload.

        A known key is not refused: its body is read and compared, whatever the session admits by
        now.

        Returns:
            Whether the key is known.

        Raises:
            InFlight: The same key is being committed.
            InvalidRequest: Overrides that do not fit.
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
                return True
        self.check_base(control)
        self._terms_of(control)
        return False

    def may_miss(self, entry: EntryLike) -> bool:
        """Whether a push may leave a tensor out."""
        return self.spec.missing == "skip" or self.terms[getattr(entry, "group", 0)].frozen

    def _check_complete(self, arena: Arena, gradient: Gradient) -> None:
        """Refuses a push that lacks tensors by now: it was read under other rules."""
        if gradient.present is None:
            return
        pairs = zip(arena.layout.entries, gradient.present, strict=True)
        lacking = [entry.name for entry, came in pairs if not came and not self.may_miss(entry)]
        if lacking:
            raise TensorMismatch(
                f"The push lacks {lacking[0]!r}; send every tensor of the session.",
                missing=lacking[:20],
                missing_count=len(lacking),
            )

    def _terms_of(self, control: PushControl) -> Sequence[Terms]:
        return with_overrides(self.terms, control.overrides, self.spec.dtype)

    # Pushes

    async def push(self, gradient: Gradient, *, hold: bool) -> Outcome:
        """Applies a gradient through the lane, once for each key.

        Args:
            gradient: Its buffer is only read; `release` is called when nobody needs it any more,
                which may be after a cancelled caller has gone.
            hold: Pin the version that results, for an answer with parameters.
        """
        outcome: asyncio.Future[Outcome] = self.lane.submit(
            self._push_once(gradient, hold=hold), here=partial(self._is_small, gradient)
        )
        if outcome.done():
            gradient.release()
            return outcome.result()
        outcome.add_done_callback(lambda _: gradient.release())
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
        arena, spec = self.arena, self.spec
        if arena is None or arena.size > SMALL or len(arena.layout.entries) > FEW:
            return False
        if spec.norms or arena.average is not None:
            return False
        try:
            terms = self._terms_of(gradient.control)
        except ServiceError:
            return True  # it is refused at once
        return update.ready(arena, terms, spec.dtype, gradient.dtype)

    def _push_once(self, gradient: Gradient, *, hold: bool) -> Program[Outcome]:
        key = gradient.control.key
        if key is not None:
            self._committing.add(key)
        try:
            return (yield from self._push(gradient, hold=hold))
        finally:
            if key is not None:
                self._committing.discard(key)

    def _push(self, gradient: Gradient, *, hold: bool) -> Program[Outcome]:
        control = gradient.control
        arena = self.ready
        known = self.ledger.find(*control.key) if control.key else None
        if known is not None and control.key is not None:
            (mark,) = yield [partial(self._digest, gradient)]
            summary = same_push(known, mark, *control.key)
            self.shared.metrics.replay()
            return Outcome(summary, True, arena.versions.hold() if hold else None)
        staleness = self.check_base(control)
        terms = self._terms_of(control)
        gradient = self._fitted(arena, gradient)
        self._check_complete(arena, gradient)
        parts = update.examining(arena, terms, gradient.flat, gradient.dtype)
        marking = (gradient.flat.size, partial(self._digest, gradient))
        found = yield from update.together([marking, *(sized for _, sized in parts)])
        mark = found[0]
        sums = update.summed(
            len(terms), [(index, one) for (index, _), one in zip(parts, found[1:], strict=True)]
        )
        scale = control.grad_scale or 1.0
        moves = update.moves(
            terms, sums, scale, factor(self.spec.schedule, self.step), self._shrink(staleness)
        )
        norm = sums.norm / scale if math.isfinite(sums.norm) else None
        if norm is None and not self._only_large(arena, terms, gradient):
            self._refuse_nonfinite(arena, terms, gradient)
            summary = Summary(
                *self.at.numbers, False, control.key is not None, staleness, moves[0].lr,
                None, False, "nonfinite", True, None, None,
            )  # fmt: skip
            self.shared.metrics.skipped()
            self._admit(control, mark, summary)
            return Outcome(summary, False, arena.versions.hold() if hold else None)
        work = update.prepare(arena, moves, self.spec.dtype, gradient.dtype, gradient.present)
        try:
            before, after = arena.versions.begin()
            done = yield from update.perform(
                arena,
                work,
                before,
                after,
                gradient.flat,
                decay=None if self.spec.ema is None else self.spec.ema.decay,
                norms=self.spec.norms,
            )
            now = Position(self.epoch, self.version + 1, self.step + 1)
            summary = Summary(
                *now.numbers, True, control.key is not None, staleness, moves[0].lr, norm,
                update.clipped(moves, sums, scale), None, done.finite,
                done.update_norm, done.param_norm,
            )  # fmt: skip
            held = arena.versions.publish(*now, after, hold=hold)
            self.at = now
            self._admit(control, mark, summary)
        except BaseException as error:  # all of it happens, or the session is broken
            self.broken = f"{type(error).__name__} during step {self.step + 1}"
            raise
        if not done.finite:
            self.shared.metrics.nonfinite_params()
        return Outcome(summary, False, held)

    def _fitted(self, arena: Arena, gradient: Gradient) -> Gradient:
        """The gradient in the layout of now: tensors that a new group brought did not come."""
        missing = arena.size - gradient.flat.size
        if gradient.present is not None and len(gradient.present) == len(arena.layout.entries):
            return gradient
        if gradient.present is None and not missing:
            return gradient
        return transfer.extended(arena, self.spec, gradient)

    def _digest(self, gradient: Gradient) -> bytes:
        """What tells this push from another; b"" if nobody will ask."""
        control = gradient.control
        if control.key is None:
            return b""
        flat, present = gradient.flat, gradient.present
        if present is not None:  # what a group added behind a push must not make another push of it
            last = max(at for at, came in enumerate(present) if came) + 1
            entries = self.ready.layout.entries
            flat, present = (
                flat[: entries[last - 1].offset + entries[last - 1].size],
                present[:last],
            )
        return digest(flat, gradient.dtype, self.spec.dtype, control.canonical, present)

    def _live(self, arena: Arena, terms: Sequence[Terms]) -> list[tuple[int, int]]:
        """The stretches of the flat vector that are not frozen."""
        pairs = zip(arena.groups, terms, strict=True)
        return [(group.span.lo, group.span.hi) for group, one in pairs if not one.frozen]

    def _only_large(self, arena: Arena, terms: Sequence[Terms], gradient: Gradient) -> bool:
        """Whether squares overflowed though every element is finite: float64 above 1e154."""
        return gradient.dtype == "F64" and all(
            reduce.all_finite(gradient.flat[lo:hi], "F64") for lo, hi in self._live(arena, terms)
        )

    def _refuse_nonfinite(self, arena: Arena, terms: Sequence[Terms], gradient: Gradient) -> None:
        if self.spec.on_nonfinite == "skip":
            return
        for lo, hi in self._live(arena, terms):
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

    def _shrink(self, staleness: int) -> float:
        """What the learning rate is divided by (docs/decisions/0005)."""
        bound = self.spec.update.max_staleness
        return 1.0 + staleness if bound is not None and staleness > bound else 1.0

    def _admit(self, control: PushControl, mark: bytes, summary: Summary) -> None:
        """Ledger, history and metrics of an admitted push."""
        if control.key is not None:
            self.ledger.record(*control.key, mark, summary)
        step_s = time.perf_counter() - self.lane.started_at
        if summary.applied:
            self.shared.metrics.observe_step(self.lane.queued_s, step_s)
        self.history.append(
            Record(
                number=self.history.count + 1,
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
                clipped=summary.clipped,
                update_norm=summary.update_norm,
                param_norm=summary.param_norm,
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
        self.ready  # noqa: B018 - refuses a session without parameters
        cap_s = self.shared.settings.wait_cap_s
        return await self.waiting.hold(at_least or (0, 0), wait_s, cap_s)

    def release(self, version: Version) -> None:
        """Gives a held version back, on the event loop."""
        self.waiting.release(version)

    def _pending(self, target: tuple[int, int]) -> VersionPending:
        return VersionPending(
            f"Version {target[0]}-{target[1]} is not there in time; the newest is "
            f"{self.epoch}-{self.version}. Ask again, with Prefer: wait=SECONDS to wait longer.",
            epoch=self.epoch,
            version=self.version,
        )

    def dismiss(self) -> None:
        """Ends the waits of pulls: the server stops, and nothing they wait for will come."""
        self.waiting.fail(stopping())

    # Everything else that writes

    async def load(
        self, tensors: Sequence[Tensor], *, first_only: bool, base: Base | None = None
    ) -> None:
        """Takes parameters: the first upload fixes the layout, a later one may be partial.

        Raises:
            PreconditionFailed: `first_only` and the session has parameters, or as `check_version`.
            TensorMismatch: Names or shapes that the layout does not have.
            Nonfinite: A value is not finite in the session's dtype.
            InsufficientMemory: The budget has no room for the session.
        """
        await self.lane.run(transfer.load(self, tensors, first_only=first_only, base=base))

    async def load_state(
        self,
        tensors: Sequence[Tensor],
        step: int,
        counted: Mapping[str, int],
        scalars: Mapping[str, Mapping[str, float]],
        base: Base | None = None,
    ) -> None:
        """Replaces the whole optimizer state; the parameters stay. Starts a new epoch.

        Raises:
            PreconditionFailed: As `check_version`.
            TensorMismatch: Not exactly the session's `<slot>/<tensor>`, in its dtype and shapes,
                or counts or scalars that do not name every tensor.
        """
        await self.lane.run(transfer.load_state(self, tensors, step, counted, scalars, base))

    async def export_state(self) -> tuple[dict[str, object], list[Piece]]:
        """A copy of the optimizer state: metadata, and every (slot, tensor)."""
        return await self.lane.run(transfer.export_state(self))

    async def copy_average(self) -> Version:
        """A copy of the average of the parameters, as a version of its own.

        Raises:
            AverageMissing: The session keeps none.
        """
        return await self.lane.run(transfer.copy_average(self))

    async def add_group(self, group: Mapping[str, Any], tensors: Sequence[Tensor]) -> bool:
        """Adds a parameter group with tensors of its own; False if it is there already, alike.

        Raises:
            SpecDiffers: There is a group of this name, of other fields or tensors.
            TensorMismatch: A tensor that the session has already.
        """
        return await self.lane.run_then(
            transfer.add_group(self, group, tensors), partial(transfer.adopt, self)
        )

    def check_first(self) -> None:
        """Refuses an upload that only the first of several workers may make."""
        if self.arena is not None:
            raise PreconditionFailed(
                f"Session {self.id!r} has parameters already; pull them.",
                epoch=self.epoch,
                version=self.version,
            )

    def check_version(self, base: Base | None) -> None:
        """Refuses an upload that was made for another version or, without one, another epoch."""
        if base is not None and base not in ((self.epoch, self.version), (self.epoch, None)):
            raise PreconditionFailed(
                f"Session {self.id!r} is at version {self.epoch}-{self.version}; look what has "
                "changed and repeat the upload if it still makes sense.",
                epoch=self.epoch,
                version=self.version,
            )

    def respecify(self, spec: Spec) -> None:
        """Takes another specification; only for programs of the lane."""
        if spec != self.spec:
            self.terms = terms_of(spec)
            self.spec = spec
            self.revision += 1

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
            spec = change(self.spec)
            if self.arena is not None:
                update.compile_all(self.arena, terms_of(spec), spec.dtype, norms=spec.norms)
            self.respecify(spec)
            return self.step + 1
            yield []

        return await self.lane.run(program())

    async def delete(self) -> None:
        """Ends the session: what was admitted runs to its end, everything later is refused."""
        if self.deleted:
            raise gone(self.id)
        self.deleted = True
        await self.lane.run(self._free())

    async def abandon(self) -> bool:
        """Ends a session whose creation failed, unless parameters have come after all."""

        def program() -> Program[bool]:
            if self.arena is not None or self.deleted:
                return False
            self.deleted = True
            return True
            yield []

        return await self.lane.run(program())

    def _free(self) -> Program[None]:
        if self.arena is not None:
            self.shared.budget.release(transfer.freed(self.arena, self.spec.dtype))
            self.arena = None  # nothing else may keep the arrays alive
        return
        yield []

    def bytes(self) -> dict[str, int]:
        """What the session may take of memory, as reserved."""
        if self.arena is None:
            return {"reserved": 0}
        size = DTYPES[self.spec.dtype]
        one = self.arena.size * size
        return {
            "reserved": self.arena.reserved,
            "params": one,
            "state": sum(array.size for array in self.arena.state) * size,
            "gradient": one,
        }


def gone(name: str) -> SessionGone:
    """The refusal of everything about a deleted session."""
    return SessionGone(
        f"Session {name!r} was deleted; PUT /v1/sessions/{name} creates it anew, in the next "
        "epoch.",
        session=name,
    )
