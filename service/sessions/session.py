"""One session: its parameters, its optimizer state, and the only code that writes them."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from gradpost.protocol.dtypes import DTYPES
from kernels import accumulate, reduce
from kernels.pool import Pool
from service.errors import (
    DiskFull,
    EpochChanged,
    InFlight,
    Internal,
    ParamsMissing,
    PreconditionFailed,
    RoundClosed,
    ServiceError,
    SessionGone,
    StaleGradient,
    VersionPending,
    VersionUnknown,
)
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import Group, PushControl, Spec, Terms, with_overrides
from service.schemas import terms as terms_of
from service.schemas.refusals import invalid
from service.sessions import contributions, image, pushes, sparse, state, transfer, update
from service.sessions.alarm import Alarm
from service.sessions.arena import Arena, Piece, Tensor
from service.sessions.changes import Changes
from service.sessions.disk import Disk
from service.sessions.durable import Durable
from service.sessions.history import History
from service.sessions.lane import Lane, Program, stopping
from service.sessions.ledger import Contributed, Fate, Ledger
from service.sessions.members import Members
from service.sessions.pushes import Gradient, Outcome, Position
from service.sessions.queue import Queue
from service.sessions.records import Contribution
from service.sessions.rounds import Rounds, give_up
from service.sessions.turns import Turns
from service.sessions.versions import Version
from service.sessions.waiting import Waiting
from service.settings import Settings
from service.storage.header import Kind
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
    disk: Disk | None = None
    """The data folder, if there is one."""
    clock: Callable[[], float] = time.monotonic
    """Of leases and rounds, in seconds."""


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
        self.changes = Changes()
        self.shared = shared
        self.waiting = Waiting(
            lambda: None if self.arena is None else self.arena.versions,
            self._refusal,
            self._pending,
        )
        self.lane = Lane(shared.pool, self._went_on)
        self.members = Members(lambda: self.spec.update.lease_s, self._most_members, shared.clock)
        self.rounds = Rounds(self.members, shared.clock)
        self.turns = Turns(self.members, self._arm)
        self.alarm = Alarm(shared.clock, self._due)
        self.committing: set[tuple[str, int]] = set()
        """Keys of the pushes that the lane is at."""
        self.queue = Queue(self)
        self.durable: Durable | None = None
        """What of it is on the disk; None if nothing is."""
        self.making: set[str] = set()
        """Names of checkpoints that are being made."""
        self.made: asyncio.Future[None] | None = None
        """While it is being made on the disk."""

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

    def _most_members(self) -> int:
        """How many workers may be live: a log has room for the contributions of so many."""
        most, spec = self.shared.settings.max_workers, self.spec
        if spec.update.mode != "sync" or spec.durability != "log":
            return most
        return min(most, spec.log_slots // 2 - 1)

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
        if self.made is not None:
            return InFlight(
                f"Session {self.id!r} is being created; send the same request again.",
                retry_after_s=1,
            )
        if self.broken is not None:
            return Internal(
                f"Session {self.id!r} stopped after an unexpected failure ({self.broken}); see the "
                "server's log, then delete the session and create it anew.",
            )
        return None

    def check_base(self, control: PushControl, at: Position | None = None) -> int:
        """The staleness of a push.

        Args:
            control: Its base version and the incarnation it was computed in.
            at: Where the session will stand; None: where it stands.

        Raises:
            EpochChanged: Its base version belongs to a history that was cut.
            VersionUnknown: Its base version does not exist yet.
            StaleGradient: It is staler than the session admits.
        """
        at = self.at if at is None else at
        where = {"epoch": at.epoch, "version": at.version, "step": at.step}
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
        if epoch < at.epoch:
            raise EpochChanged(
                f"The gradient was computed in epoch {epoch} and the session is in epoch "
                f"{at.epoch}: its parameters or state were replaced, or it came back from an "
                "earlier snapshot. Pull, compute again, and state the base version as "
                f'"{at.epoch}-{at.version}".',
                base_version=f"{epoch}-{base}",
                **where,
                **self._survived(control.worker),
            )
        if (epoch, base) > (at.epoch, at.version):
            raise VersionUnknown(
                f"base_version {epoch}-{base} does not exist; the newest is "
                f"{at.epoch}-{at.version}. Was the server restarted? Pull and compute again.",
                base_version=f"{epoch}-{base}",
                **where,
            )
        staleness = at.version - base
        update = self.spec.update
        bound = update.max_staleness
        if update.mode == "sync" and staleness:
            self._late(control.worker)
            raise RoundClosed(
                f"The round of version {epoch}-{base} is closed; the session is at "
                f"{at.epoch}-{at.version}. Nothing was counted: pull and compute again.",
                base_version=f"{epoch}-{base}",
                round=self.rounds.number,
                **where,
            )
        if bound is not None and staleness > bound and update.on_stale == "refuse":
            self._late(control.worker)
            raise StaleGradient(
                f"The gradient was computed {staleness} versions ago and at most {bound} are "
                "admitted; pull and compute it again.",
                base_version=base,
                max_staleness=bound,
                staleness=staleness,
                **where,
            )
        return staleness

    def _late(self, worker: str | None) -> None:
        if worker is not None:
            self.members.late(worker)

    def check_contribution(self, control: PushControl, ahead: Mapping[str, Contribution]) -> None:
        """The checks of a push that joins a round, beside those of every push.

        Args:
            control: What it says of itself.
            ahead: Contributions that are decided and not in the round yet, by worker.

        Raises:
            TooManyWorkers: Its worker has not joined, and there is no room for one more.
            AlreadyContributed: Its worker has contributed to the round.
            OverridesDiffer: The round's other contributions have other overrides.
            InvalidRequest: A weight that the session's reduction does not know.
        """
        assert control.worker is not None
        contributions.check_weight(self.spec.update, control.weight)
        self.members.check_room(control.worker)
        self.rounds.check_free(control.worker, control.overrides, ahead, self.at._asdict())

    def _survived(self, worker: str | None) -> dict[str, Any]:
        """Which pushes of a worker the session still knows, for one whose history was cut."""
        standing = None if worker is None else self.ledger.standing(worker)
        if worker is None:
            return {}
        return {"survived": ranges(() if standing is None else standing.admitted)[-20:]}

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
        mode = self.spec.update.mode
        if control.worker is not None:
            self.members.renew(control.worker)
        elif mode != "async":
            raise invalid(
                "worker", f"In mode {mode} every push has worker, sequence and base_version."
            )
        if control.weight is not None and mode != "sync":
            raise invalid("weight", f"A weight belongs to mode sync; this session is in {mode}.")
        if key is not None:
            if key in self.committing:
                raise InFlight(
                    f"Sequence {key[1]} of worker {key[0]!r} is being committed; send the same "
                    "push again to learn what it did.",
                    retry_after_s=1,
                )
            if self.ledger.find(*key) is not None:
                return True
        self.check_base(control)
        if mode == "sync":
            self.check_contribution(control, {})
        elif control.worker is not None:
            self.members.check_room(control.worker)
        self.terms_of(control)
        return False

    def may_miss(self, entry: EntryLike) -> bool:
        """Whether a push may leave a tensor out."""
        return self.spec.missing == "skip" or self.terms[getattr(entry, "group", 0)].frozen

    def terms_of(self, control: PushControl) -> Sequence[Terms]:
        """What holds for each group in one update."""
        return with_overrides(self.terms, control.overrides, self.spec.dtype)

    # Pushes

    async def push(self, gradient: Gradient, *, hold: bool) -> Outcome:
        """Applies a gradient through the lane, once for each key.

        Args:
            gradient: Its buffer is only read; `release` is called when nobody needs it any more,
                which may be after a cancelled caller has gone.
            hold: Pin the version that results, for an answer with parameters.
        """
        outcome: asyncio.Future[Outcome]
        if self.durable is not None and self.durable.logs:
            outcome = self.queue.put(gradient, hold=hold)
        elif self.spec.update.mode == "sync":
            program = contributions.contribute(self, gradient)
            outcome = self.lane.submit(program, here=partial(self._is_small, gradient))
        else:
            program = pushes.one(self, gradient, hold=hold)
            outcome = self.lane.submit(program, here=partial(self._is_small, gradient))
        if outcome.done():
            gradient.release()
            return outcome.result()
        outcome.add_done_callback(partial(_let_go, gradient))
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            outcome.add_done_callback(self._unpin)  # nobody is left who would give it back
            raise

    def guarded(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Work that writes the disk, with failures that are ours."""
        return work if self.durable is None else self.durable.guarded(work)

    def _unpin(self, outcome: "asyncio.Future[Outcome]") -> None:
        if outcome.exception() is None and (held := outcome.result().held) is not None:
            self.release(held)

    def _is_small(self, gradient: Gradient) -> bool:
        """Whether a push costs less than its hop to a thread, and its kernels are at hand."""
        arena, spec = self.arena, self.spec
        if arena is None or len(arena.layout.entries) > FEW:
            return False
        if arena.size > SMALL and not gradient.rows:
            return False
        if spec.norms or arena.average is not None or spec.update.holds:
            return False
        try:
            terms = self.terms_of(gradient.control)
            if gradient.rows and arena.size > SMALL and self._is_known(gradient.control):
                return False  # to compare it may take a pass over the whole
        except ServiceError:
            return True  # it is refused at once
        if gradient.rows and sparse.work(arena, terms, gradient) > SMALL:
            return False
        if arena.total is not None:  # it is added now, and may end its round
            ready = accumulate.ready(gradient.dtype, spec.dtype) and reduce.ready(gradient.dtype)
            return ready and update.ready(arena, terms, spec.dtype, spec.dtype)
        return update.ready(arena, terms, spec.dtype, gradient.dtype, gradient.rows)

    def _is_known(self, control: PushControl) -> bool:
        return control.key is not None and self.ledger.find(*control.key) is not None

    def settled(self, outcome: "asyncio.Future[Outcome]", value: Outcome) -> None:
        """Answers a push of a group; whoever waits for its version is served in the same moment."""
        if outcome.cancelled():
            return
        outcome.set_result(value)
        self._went_on()

    # Rounds and turns

    async def fate(self, fate: Fate, key: tuple[str, int], wait_s: float) -> Fate:
        """Waits for the end of the round of a contribution.

        Args:
            fate: What became of it so far.
            key: Its worker and sequence.
            wait_s: For so long.

        Returns:
            What became of it by now: a summary, or that its round is still open.

        Raises:
            RoundAbandoned: Its round was abandoned; the number stays used.
        """
        if isinstance(fate, Contributed) and fate.reason is None:
            await self.rounds.wait(fate.round, wait_s)
            self.check_alive()
            fate = contributions.fate_of(self, fate, *key)
        if isinstance(fate, Contributed) and fate.reason is not None:
            raise contributions.abandoned(self, fate, *key)
        return fate

    async def turn(self, worker: str | None, wait_s: float) -> bool | None:
        """Waits until a worker is no longer too far ahead of the slowest one.

        Returns:
            Whether it still is; None in the modes in which nobody waits.
        """
        slack = self.spec.update.slack
        if slack is None or worker is None:
            return None
        return await self.turns.wait(worker, slack, wait_s)

    async def join(self, worker: str, lease_s: float | None) -> bool:
        """Joins a worker or renews its lease.

        Returns:
            Whether it joined now.

        Raises:
            TooManyWorkers: As many are live as may be.
            WorkerRetired: It has left, or was silent for too long.
        """
        self.check_alive()
        self.ledger.check_retired(worker)
        self.members.check_room(worker)
        joined = self.members.touch(worker, lease_s)
        self._arm()
        return joined

    async def leave(self, worker: str) -> bool:
        """Takes a worker out: nobody waits for it any more, and its id is not used again.

        Returns:
            Whether it was known.
        """
        self.check_alive()

        def program() -> Program[bool]:  # in the lane: no push of it may be half admitted
            known = self.members.leave(worker) or self.ledger.standing(worker) is not None
            if known:
                self.ledger.retire(worker)
                yield from contributions.settle(self)
            return known

        return await self.lane.run(program())

    async def tick(self) -> None:
        """Closes what is due: leases that ran out, and the round that waits for nobody else."""
        if self.deleted:
            return
        await self.lane.run(contributions.settle(self))

    def resume(self) -> None:
        """After a recovery: ends the open round if it came back complete, else sets the alarm."""
        self.members.level()
        if self.rounds.open is not None:
            self._due()

    def _due(self) -> None:
        """The alarm rings."""
        if not self.deleted:
            self.lane.submit(contributions.settle(self))

    def _went_on(self) -> None:
        """After each program of the lane, on the event loop."""
        self.waiting.wake()
        if self.spec.update.mode == "async":
            return
        refusal = self._refusal()
        if refusal is not None:
            self.alarm.cancel()
            self.rounds.fail(refusal)
            self.turns.fail(refusal)
            return
        self.rounds.wake()
        self.turns.wake()
        self._arm()

    def _arm(self) -> None:
        """Sets the alarm to the next moment at which something has to end by itself."""
        found = self.rounds.open
        if found is None and not len(self.turns):
            self.alarm.set(None)
            return
        ends = [] if found is None else [found.ends]
        lapse = self.members.next_lapse()
        self.alarm.set(min([*ends, *([] if lapse is None else [lapse])], default=None))

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
        self.rounds.stop(stopping())
        self.turns.stop(stopping())

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
        await self.lane.run(state.load_state(self, tensors, step, counted, scalars, base))

    async def export_state(self) -> tuple[dict[str, object], list[Piece]]:
        """A copy of the optimizer state: metadata, and every (slot, tensor)."""
        return await self.lane.run(state.export_state(self))

    async def copy_average(self) -> Version:
        """A copy of the average of the parameters, as a version of its own.

        Raises:
            AverageMissing: The session keeps none.
        """
        return await self.lane.run(state.copy_average(self))

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
            check_workers(spec, self.shared.settings)
            if self.arena is not None:
                update.compile_all(self.arena, terms_of(spec), spec.dtype, norms=spec.norms)
            if spec != self.spec:
                yield from self._log_patch(spec)
            # An open round keeps the rules that it began with.
            later = self.rounds.open is not None and spec.update != self.spec.update
            self.respecify(spec)
            return self.step + 1 + later

        return await self.lane.run(program())

    def _log_patch(self, spec: Spec) -> Program[None]:
        """Makes another specification durable before it holds."""
        durable = self.durable
        if durable is None or not durable.logs:
            return
        revision = self.revision + 1
        facts = {"spec": image.stated(spec), "revision": revision}
        if not (yield from durable.record(Kind.PATCH, facts)):
            now = image.Standing.of(self)
            standing = replace(now, spec=spec, revision=revision, cut="patch")
            yield from durable.replace(standing, grown=False)
            give_up(self, "patch")

    async def delete(self) -> None:
        """Ends the session: what was admitted runs to its end, everything later is refused.

        Raises:
            DiskFull: The end can't be made durable; the session goes on.
        """
        if self.deleted:
            raise gone(self.id)
        self.deleted = True
        if self.durable is not None:
            await self.lane.run(_nothing())
            try:
                await self.durable.delete(self.epoch)
            except DiskFull:
                self.deleted = False
                self._arm()  # the lane took it for deleted
                raise
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
        if self.rounds.open is not None:
            self.rounds.open.release()
        if self.arena is not None:
            self.shared.budget.release(transfer.freed(self.arena, self.spec.dtype))
            self.arena = None  # nothing else may keep the arrays alive
        return
        yield []

    def bytes(self) -> dict[str, int]:
        """What the session may take of memory and disk, as reserved."""
        disk = 0 if self.durable is None else self.durable.disk_bytes
        if self.arena is None:
            return {"reserved": 0, "disk": disk}
        size = DTYPES[self.spec.dtype]
        one = self.arena.size * size
        return {
            "reserved": self.arena.reserved,
            "disk": disk,
            "params": one,
            "state": sum(array.size for array in self.arena.state) * size,
            "gradient": one,
        }


def check_workers(spec: Spec, settings: Settings) -> None:
    """Refuses rounds of more workers than a session may know: none would ever be complete.

    Raises:
        InvalidRequest: So it is.
    """
    if (spec.update.workers or 0) > settings.max_workers:
        raise invalid(
            "update.workers",
            f"This server knows at most {settings.max_workers} workers of a session "
            "(GRADPOST_MAX_WORKERS).",
        )


def _let_go(gradient: Gradient, outcome: "asyncio.Future[Outcome]") -> None:
    """Gives a gradient back, unless a round keeps it."""
    if outcome.cancelled() or outcome.exception() is not None or not outcome.result().kept:
        gradient.release()


def _nothing() -> Program[None]:
    return
    yield []


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Whole numbers as stretches [first, last], in order."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] + 1 == number:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def gone(name: str) -> SessionGone:
    """The refusal of everything about a deleted session."""
    return SessionGone(
        f"Session {name!r} was deleted; PUT /v1/sessions/{name} creates it anew, in the next "
        "epoch.",
        session=name,
    )
