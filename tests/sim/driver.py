"""What drives a real session, in process and without HTTP: all that knows its names is here."""

import asyncio
import json
from functools import partial

import numpy as np

from gradpost.protocol.dtypes import NUMPY, to_bf16
from service import logs
from service.errors import ServiceError
from service.limits import Budget
from service.metrics import Metrics
from service.routes.workers import whole
from service.schemas import PushControl, parse_spec
from service.schemas.spec import apply_patch
from service.sessions.arena import counts
from service.sessions.disk import Disk
from service.sessions.ledger import Summary
from service.sessions.pushes import Gradient
from service.sessions.registry import Sessions
from service.sessions.session import Shared
from service.settings import Settings
from tests.sim.contract import At, Reply
from tests.sim.schedule import SIZE, TENSORS

_OF_MODE = {
    "async": ("max_staleness", "on_stale"),
    "sync": (
        *("workers", "quorum", "min_contributions", "on_lost", "round_timeout_s"),
        *("reduce", "trim", "order", "max_norm", "on_max_norm"),
    ),
    "bounded": ("slack",),
}


def stated(spec):
    """A specification as a request states it."""
    update = spec.update
    fields = {name: getattr(update, name) for name in _OF_MODE[update.mode]}
    fields = {name: value for name, value in fields.items() if value is not None}
    fields["mode"] = update.mode
    fields["lease_s"] = update.lease_s
    found = {
        "optimizer": {"rule": spec.rule, "lr": spec.lr}, "dtype": spec.dtype,
        "on_nonfinite": spec.on_nonfinite, "update": fields,
    }  # fmt: skip
    if spec.clip is not None:
        found["clip"] = {"global_norm": spec.clip}
    for name in ("push", "missing", "durability"):
        found[name] = getattr(spec, name)
    if spec.durability == "log":
        found["log_slots"] = 64  # as many workers as there are may be live
    return found


class Here:
    """A pool without threads: a program runs when the event loop comes to it.

    So the pushes of one moment all wait before the first is taken, and no schedule depends on the
    machine.
    """

    def submit(self, program, done):
        asyncio.get_running_loop().call_soon(self._drive, program, done)

    def _drive(self, program, done):
        try:
            thunks = next(program)
            while True:
                try:
                    results = [thunk() for thunk in thunks]
                except BaseException as error:
                    thunks = program.throw(error)
                else:
                    thunks = program.send(results)
        except StopIteration as end:
            done(end.value, None)
        except BaseException as error:
            done(None, error)

    def close(self):
        pass


class Service:
    """Real sessions of one process; close it at the end.

    Args:
        pool: Runs their programs; None: none has a thread.
        folder: Where sessions that log have their files.
    """

    def __init__(self, pool=None, folder=None):
        self.pool = pool or Here()
        self.now = 0.0
        settings = Settings(max_sessions=8, wait_cap_s=1.0, log_level="error", data_dir=folder)
        budget, metrics = Budget(1 << 24), Metrics()
        self.disk = None if folder is None else Disk(folder, logs.make(settings))
        if self.disk is not None:
            self.disk.store.recover()
        shared = Shared(settings, self.pool, budget, metrics, self.disk, lambda: self.now)
        self.sessions = Sessions(shared)

    def close(self):
        self.pool.close()
        if self.disk is not None:
            self.disk.close()

    async def create(self, spec, params):
        """A session that holds `params`."""
        session = await self.sessions.create(None, parse_spec(stated(spec))[0])
        session.alarm.set = lambda at: None  # it would ring in real time
        driven = Driven(self, session, spec.dtype)
        await driven.upload(0, params)
        return driven


class Driven:
    """One session, in the words of the model."""

    def __init__(self, service, session, dtype):
        self.service, self.session, self.dtype = service, session, dtype

    @property
    def groups(self):
        """Whether the pushes of one moment are decided together, and answered behind the last."""
        return self.session.durable is not None

    async def delete(self):
        await self.service.sessions.delete(self.session.id)

    @property
    def at(self):
        return At(self.session.epoch, self.session.version, self.session.step)

    @property
    def params(self):
        return self.session.arena.versions.head.flat.copy()

    def numbers(self, worker):
        """The sequence numbers of a worker that are consumed and kept."""
        standing = self.session.ledger.standing(worker)
        return set() if standing is None else set(standing.admitted)

    async def push(self, message, *, checked=True):
        """A push.

        Args:
            message: What is pushed.
            checked: By its head, before its body is read; else that was before something that
                has happened since.
        """
        gradient, known = _gradient(message), False
        try:
            if checked:
                known = self.session.precheck(gradient.control)
            gradient = self._read(gradient, known=known)
            outcome = await self.session.push(gradient, hold=False)
        except ServiceError as error:
            return Reply(slug=error.slug, context=error.context)
        done = outcome.summary
        if isinstance(done, Summary):
            summary = {"round": None, "contributions": None, **done._asdict()}
            return Reply(replayed=outcome.replayed, summary=summary)
        return Reply(replayed=outcome.replayed, round=done.round, reason=done.reason)

    def _read(self, gradient, *, known):
        """As a body is read that came before the last groups: what lacks is 0, if it may lack."""
        arena, present = self.session.arena, gradient.present
        lacks = arena.size - gradient.flat.size
        if not lacks or gradient.control.is_pass:
            return gradient
        if not known and self.session.spec.missing == "refuse":
            return gradient
        ends = [entry.offset + entry.size for entry in arena.layout.entries]
        present = present or (True,) * (ends.index(gradient.flat.size) + 1)
        present += (False,) * (len(ends) - len(present))
        flat = np.concatenate([gradient.flat, np.zeros(lacks, gradient.flat.dtype)])
        return gradient._replace(flat=flat, present=present)

    async def push_all(self, messages):
        """Pushes that arrive in one moment, in this order."""
        for message in messages:
            if message.worker is not None:
                self.session.members.renew(message.worker)
        return await asyncio.gather(*(self.push(message, checked=False) for message in messages))

    async def upload(self, lo, values):
        await self.session.load(list(_tensors(lo, values, self.dtype)), first_only=False)

    async def restate(self, state):
        _, pieces = await self.session.export_state()
        tensors = [
            (f"{piece.slot}/{piece.entry.name}", self.dtype, piece.shape,
             np.random.default_rng([state.seed, index]).random(piece.size, np.float32)
             .astype(NUMPY[self.dtype]))
            for index, piece in enumerate(pieces)
        ]  # fmt: skip
        names = [entry.name for entry in self.session.arena.layout.entries]
        counts = dict(zip(names, state.counts, strict=True))
        await self.session.load_state(tensors, state.step, counts, {})

    async def grow(self, values):
        name = f"more{len(self.session.spec.groups)}"
        await self.session.add_group({"name": name}, [(name, self.dtype, values.shape, values)])

    async def patch(self, lr=None, **changes):
        patch = {"update": changes} if changes else {}
        if lr is not None:
            patch["optimizer"] = {"lr": lr}
        await self.session.patch(partial(apply_patch, patch=patch), None)

    async def tick(self, now):
        self.service.now = now
        await self.session.tick()

    async def join(self, worker, lease_s):
        try:
            await self.session.join(worker, lease_s)
        except ServiceError as error:
            return Reply(slug=error.slug, context=error.context)
        return Reply()

    async def leave(self, worker):
        await self.session.leave(worker)

    @property
    def live(self):
        """The workers whose lease has not run out."""
        return sorted(one.name for one in self.session.members.live())

    def ahead(self, worker):
        """Whether a worker is further than it may be."""
        return self.session.members.is_ahead(worker, self.session.spec.update.slack)

    @property
    def counts(self):
        """Updates of each tensor."""
        return list(counts(self.session.arena).values())

    @property
    def open(self):
        """Number, base, keys, how many are missing, and the seconds that are left."""
        rounds = self.session.rounds
        if rounds.open is None:
            return None
        keys = [(one.worker, one.sequence) for one in rounds.open.contributions.values()]
        missing = rounds.missing(self.session.spec.update)
        return rounds.open.number, rounds.open.base, keys, missing, rounds.deadline_in_s()

    @property
    def documents(self):
        """Whom the list of all workers has."""
        return sorted(one.name for one in self.session.members.all())

    def document(self, worker):
        """What a worker is told about itself; it is not heard of by this."""
        return whole(self.session, worker)

    def round(self, number):
        """Status, reason and (worker, sequence, weight) of its members in order of arrival."""
        found = self.session.rounds.get(number)
        members = [(one.worker, one.sequence, one.weight) for one in found.members]
        return found.status, found.reason, members


def _gradient(message):
    control = PushControl(
        message.worker,
        message.sequence,
        message.base,
        message.loss,
        message.scale,
        None if message.lr is None else json.dumps({"default": {"lr": message.lr}}),
    )
    if message.weight != 1.0:
        control = control._replace(weight=message.weight)
    if message.values is None:
        return Gradient(np.empty(0, np.float32), "F32", control, lambda: None)
    flat = _flat(message.values, message.dtype)
    return Gradient(flat, message.dtype, control, lambda: None, message.present)


def _flat(values, dtype):
    with np.errstate(invalid="ignore"):
        if dtype == "BF16":
            return to_bf16(values.astype(np.float32))
        return values.astype(NUMPY[dtype])


def _tensors(lo, values, dtype):
    """The tensors that stretch of the flat vector is."""
    begin = 0
    for name, shape in TENSORS.items():
        end = begin + int(np.prod(shape))
        if lo <= begin and end <= lo + values.size:
            yield name, dtype, shape, values[begin - lo : end - lo].astype(NUMPY[dtype])
        begin = end
    assert begin == SIZE
