"""Plays a schedule to a service and to the model, compares every answer, and shrinks failures."""

import asyncio
import math
from typing import Any

import numpy as np

from tests.sim import arithmetic
from tests.sim import model as past
from tests.sim.contract import Message, Update
from tests.sim.model import Model, Step
from tests.sim.schedule import (
    SIZES,
    TENSORS,
    TICK_S,
    Advance,
    Again,
    Burst,
    Grow,
    Heal,
    Join,
    Leave,
    Patch,
    Push,
    Restate,
    Schedule,
    Upload,
    gradient,
    narrowed,
    parameters,
)

LATE_S = 2.0**-20
"""How long after its time a lease or a round is looked at."""
WIDER = {"BF16": "F32", "F16": "F32"}


class Mismatch(AssertionError):
    """The service is not where the model is."""


class Trainer:
    """What a worker knows."""

    def __init__(self, at):
        self.seen = at[:2]
        self.next_sequence = 1
        self.held: list[Message] = []


class Player:
    """One schedule, one service, one model.

    Args:
        schedule: What happens.
        session: Driven, holding `parameters` of the schedule's seed.
        begin: When it begins: nothing happened before.
    """

    def __init__(self, schedule, session, begin):
        start = parameters(schedule.seed).astype(arithmetic.MASTERS[schedule.spec.dtype])
        self.model = Model(schedule.spec, start, SIZES)
        self.schedule, self.session, self.start = schedule, session, start
        self.trainers: dict[str, Trainer] = {}
        self.sent: list[Message] = []
        self.now = self.grid = begin
        self.answers: list[Any] = []
        self.looked = 0

    async def play(self):
        """All of it.

        Raises:
            Mismatch: The service answered or stands otherwise than the model.
        """
        for index, event in enumerate(self.schedule.events):
            try:
                await self.advance(self.grid + (index + 1) * TICK_S)
                await self.do(event)
                self.compare()
            except AssertionError as error:
                raise Mismatch(f"at event {index}, {event}: {error}") from error
        await self.settle()

    # Time

    async def advance(self, to):
        """Lets time pass; everything that is due on the way happens at its time."""
        while (due := self.model.due()) is not None and due < to:
            await self.tick(due + LATE_S)
        await self.tick(to)

    async def tick(self, now):
        self.now = now
        await self.session.tick(now)
        self.model.tick(now)

    # Events

    async def do(self, event):
        match event:
            case Push():
                await self.deliver(*self.compose(event))
            case Burst():
                messages = [m for one in event.pushes for m in self.compose(one)]
                await self.deliver(*messages * (1 + event.twice))
            case Again():
                await self.deliver(*self.repeat(event))
            case Heal():
                held = self.trainer(event.worker).held
                messages = held[::-1] if event.backwards else held[:]
                held.clear()
                for message in messages:
                    await self.deliver(message)
            case Advance():
                self.grid += event.seconds
                await self.advance(self.now + event.seconds)
            case _:
                await self.administer(event)

    async def administer(self, event):
        match event:
            case Join():
                await self.join(event)
            case Leave():
                if event.worker in self.model.members and event.worker not in self.model.retired:
                    await self.session.leave(event.worker)
                    self.model.leave(event.worker)
            case Upload():
                lo, values = self.uploaded(event)
                await self.session.upload(lo, values)
                self.model.upload(lo, values)
            case Restate():
                state = self.restated(event)
                await self.session.restate(state)
                self.model.restate(state)
            case Grow() if len(self.model.groups) < 4:
                values = np.random.default_rng(event.seed).standard_normal(3)
                values = values.astype(self.start.dtype)
                await self.session.grow(values)
                self.model.grow(values)
            case Patch():
                await self.session.patch(**dict(event.changes))
                self.model.patch(**dict(event.changes))

    async def join(self, event):
        theirs = await self.session.join(event.worker, event.lease_s)
        retired = event.worker in self.model.retired
        if not retired:
            self.model.touch(event.worker, self.now, event.lease_s)
        wanted = "worker-retired" if retired else None
        assert theirs.slug == wanted, f"joined: {theirs.slug}, not {wanted}"

    def trainer(self, worker):
        return self.trainers.setdefault(worker, Trainer(self.model.at))

    def compose(self, push):
        """The message of a push; none if a partition or patience holds it back."""
        trainer, waits = self.trainer(push.worker), self.model.open
        if push.patient and waits and any(one.worker == push.worker for one in waits.members):
            return []
        if push.fresh:
            trainer.seen = self.model.at[:2]
        sequence = max(0, trainer.next_sequence + push.gap)
        trainer.next_sequence = max(trainer.next_sequence, sequence + 1)
        present = None
        if push.lacks is not None and push.kind != "pass":
            more = len(self.model.sizes) - len(TENSORS)
            present = (*(name != push.lacks for name in TENSORS), *(True,) * more)
        message = Message(
            None if push.anonymous else push.worker, None if push.anonymous else sequence,
            trainer.seen, gradient(push, self.model.params.size), push.dtype, push.weight,
            push.scale, None, push.lr, present,
        )  # fmt: skip
        if push.held:
            trainer.held.append(message)
            return []
        return [message]

    def repeat(self, event):
        if not self.sent:
            return []
        message = self.sent[-1 - event.which % len(self.sent)]
        if event.how == "wider":
            return [message._replace(dtype=WIDER.get(message.dtype, self.schedule.spec.dtype))]
        if event.how == "loss":
            return [message._replace(loss=1.5)]
        if event.how == "values" and message.values is not None:
            values = message.values.copy()
            values[0 if message.present is None or message.present[0] else SIZES[0]] += 1.0
            return [message._replace(values=narrowed(values, message.dtype))]
        return [message]

    def uploaded(self, event):
        values = parameters(event.seed).astype(self.start.dtype)
        lo = 0
        for name, shape in TENSORS.items():
            hi = lo + int(np.prod(shape))
            if event.tensor == name:
                return lo, values[lo:hi]
            lo = hi
        return 0, values

    def restated(self, event):
        rng = np.random.default_rng(event.seed)
        counts = rng.integers(0, 9, len(self.model.sizes)).tolist()
        return past.State(event.seed, int(rng.integers(0, 99)), tuple(counts))

    async def deliver(self, *messages):
        """Messages arrive in one moment, in this order."""
        if len(messages) == 1:
            theirs = [await self.session.push(messages[0])]
        else:
            await self.introduce(messages)
            theirs = await self.session.push_all(messages)
            for message in messages:
                self.model.heard(message.worker, self.now)
        every = [self.model.push(message, self.now) for message in messages]
        for message, ours, answer in zip(messages, every, theirs, strict=True):
            self.sent.append(message)
            self.answers.append((message, ours))
            if self.session.groups and ours.round is not None and answer.round is None:
                ours = self.model.fate(message)._replace(replayed=ours.replayed)
            agree(ours, answer, f"{message.worker}/{message.sequence}")
            if answer.summary is not None and message.worker is not None:
                trainer, done = self.trainer(message.worker), answer.summary
                trainer.seen = max(trainer.seen, (done["epoch"], done["version"]))

    async def introduce(self, messages):
        """Lets new workers join before a group of pushes is decided, by whom it counts as joined.

        Else nobody can tell whether a round waits for one that comes in the same group.
        """
        for worker in dict.fromkeys(message.worker for message in messages):
            if self.session.groups and worker is not None and worker not in self.model.members:
                await self.join(Join(worker, None))

    # Comparisons

    def compare(self):
        """What can be asked after each event."""
        equal("at", tuple(self.model.at), tuple(self.session.at))
        if self.model.spec.rule == "sgd":
            equal("params", self.model.params, self.session.params, arithmetic.same_bits)
        equal("counts", self.model.counts, self.session.counts)
        equal("live workers", self.model.live, self.session.live)
        for worker in self.model.live if self.model.update.mode == "bounded" else ():
            equal(f"{worker} is ahead", self.model.ahead(worker), self.session.ahead(worker))
        ours, open_round = self.model.open, None
        if ours is not None:
            keys = [(one.worker, one.sequence) for one in ours.members]
            left_s = ours.deadline - self.now
            open_round = ours.number, ours.base[:2], sorted(keys), self.model.missing, left_s
        theirs = self.session.open
        if theirs is not None:
            theirs = (*theirs[:2], sorted(theirs[2]), *theirs[3:])
        equal("open round", open_round, theirs)
        if self.model.members:
            self.looked += 1
            workers = list(self.model.members)
            self.look_up(workers[self.looked % len(workers)])

    def look_up(self, worker):
        """Compares what a worker may ask about itself."""
        if worker in self.model.retired:
            return
        ours, theirs = self.model.document(worker, self.now), self.session.document(worker)
        for name, value in ours.items():
            found = theirs[name]
            if name == "last" and value is not None:
                found = {member: found.get(member) for member in value}
            equal(f"{name} of the document of {worker}", value, found)
        lateness, many = theirs["lateness_s"], ours["contributions"]
        if self.model.update.mode == "sync":
            assert all((lateness[name] is None) == (not many) for name in lateness), lateness

    async def settle(self):
        """The end: every round is closed, every answer is what it was, nothing is left open."""
        await self.end()
        for message, _ in list(self.answers):  # what was refused may be admitted by now
            if message.worker is not None:
                ours, theirs = self.model.push(message, self.now), await self.session.push(message)
                agree(ours, theirs, f"at the end, {message.worker}/{message.sequence}")
        await self.end()
        known = sorted(self.model.members.keys() - self.model.retired)
        equal("workers", known, self.session.documents)
        for worker in known:
            self.look_up(worker)
        for worker, numbers in self.model.ledger.items():
            if worker not in self.model.retired:
                floor = max(numbers) - 1024
                kept = {number for number in numbers if number > floor}
                equal(f"ledger of {worker}", kept, self.session.numbers(worker))
        for ours in self.model.rounds:
            status, reason, members = self.session.round(ours.number)
            equal(f"status of round {ours.number}", ours.status, status)
            assert reason in ours.reasons, f"round {ours.number}: {reason}, not {ours.reasons}"
            keys = [(one.worker, one.sequence, one.weight) for one in ours.members]
            equal(f"members of round {ours.number}", sorted(keys), sorted(members))

    async def end(self):
        """Waits until all rounds and leases have run out."""
        await self.advance(self.now + 1000.0)
        assert self.model.open is None
        self.compare()

    def recorded(self):
        """The updates and uploads as the service's own record of its rounds has them."""
        for entry in self.model.log:
            if isinstance(entry, Step) and entry.round is not None:
                _, _, members = self.session.round(entry.round)
                order = [(worker, sequence) for worker, sequence, _ in members]
                closed = self.model.rounds[entry.round - 1]
                yield entry._replace(gradient=self.model.reduced(closed, order))
            else:
                yield entry


def agree(ours, theirs, what):
    """Refuses another answer than the model's.

    Raises:
        AssertionError: It differs in a member that the model states.
    """
    for name in ("slug", "replayed", "round", "reason"):
        equal(f"{name} of {what}", getattr(ours, name), getattr(theirs, name), both=(ours, theirs))
    assert (ours.summary is None) == (theirs.summary is None), (what, ours, theirs)
    for member in ("summary", "context"):
        wanted, found = getattr(ours, member) or {}, getattr(theirs, member) or {}
        for name, value in wanted.items():
            equal(f"{member}.{name} of {what}", value, found.get(name), both=(ours, theirs))


def equal(what, ours, theirs, same=lambda a, b: a == b, both=""):
    assert same(ours, theirs), f"{what}: {theirs}, and the model has {ours} {both}"


def replayed(entries, spec, start):
    """The parameters after a recorded history, for sgd."""
    model = Model(spec, start, SIZES)
    for entry in entries:
        match entry:
            case past.Load():
                model.upload(entry.lo, entry.values)
            case past.State():
                model.restate(entry)
            case past.Grow():
                model.grow(entry.values)
            case _:
                model._step(entry)
    return model.params


async def retrained(entries, spec, start, service):
    """The same by a plain session with a single trainer, which no test but itself can doubt."""
    twin = await service.create(spec._replace(missing="skip", durability="none"), start)
    for entry in entries:
        match entry:
            case past.Load():
                await twin.upload(entry.lo, entry.values)
            case past.State():
                await twin.restate(entry)
            case past.Grow():
                await twin.grow(entry.values)
            case _:
                await twin.patch(lr=entry.others)
                values = entry.gradient.astype(np.float64)
                answer = await twin.push(
                    Message(
                        None, None, None, values, spec.dtype, scale=entry.scale, lr=entry.lr,
                        present=entry.present,
                    )
                )  # fmt: skip
                assert answer.slug is None, answer
    return twin


async def run(schedule, service):
    """Plays one schedule to a new session and checks the whole of it.

    Raises:
        Mismatch: With the event at which it happened.
    """
    begin = math.ceil(service.now) + 1.0
    start = parameters(schedule.seed).astype(arithmetic.MASTERS[schedule.spec.dtype])
    session = await service.create(schedule.spec, start)
    player = Player(schedule, session, begin)
    try:
        await player.play()
        history = list(player.recorded())
        plain = schedule.spec._replace(update=Update(), push="gradient")
        if schedule.spec.rule == "sgd":
            found = replayed(history, plain, start)
        else:
            twin = await retrained(history, plain, start, service)
            found = twin.params
            await twin.delete()
        if not arithmetic.same_bits(found, session.params):
            raise Mismatch(f"the replay of the recorded order: {session.params}, not {found}")
    except Mismatch:
        raise
    except AssertionError as error:
        raise Mismatch(f"at the end: {error}") from error
    finally:
        await session.delete()
    return player


def failure(schedule, make):
    """What goes wrong when a schedule is played to a service of its own; None if nothing does."""
    service = make()
    try:
        asyncio.run(run(schedule, service))
    except Exception as error:
        return error
    finally:
        service.close()
    return None


def shrunk(schedule, fails, most=300):
    """A schedule with as few events as can be found, that still fails.

    Args:
        schedule: One that fails.
        fails: Whether one does.
        most: Attempts.
    """
    size = max(1, len(schedule.events) // 2)
    while size and most > 0:
        begin = 0
        while begin < len(schedule.events) and most > 0:
            most -= 1
            events = schedule.events[:begin] + schedule.events[begin + size :]
            smaller = Schedule(schedule.seed, schedule.spec, events)
            if fails(smaller):
                schedule = smaller
            else:
                begin += size
        size //= 2
    return schedule
