"""A tiny application over the storage, and what it has promised to its users.

Its state is a number to which the bytes of each push are added, times a factor that a patch sets;
so a lost, doubled or reordered record shows. `Promise` remembers what was attempted and what was
acknowledged, and says after each crash whether what came back keeps it.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import tempfile
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from service.storage.failures import Damage, Damaged, NoSpace
from service.storage.files import Files
from service.storage.header import Key, Kind, Shape
from service.storage.store import Store

ROOT = Path(__file__).resolve().parents[2]
SCALE = int(os.environ.get("CRASH_SCALE", "1"))
"""How many times as much `make crash` tries."""
SHAPE = Shape(slots=4, capacity=5000, records=3)
WIDER = Shape(slots=3, capacity=9000, records=3)
RESERVED = 2048
BALLAST = 4096
GONE = [bytes([1] * 16), bytes([2] * 16)]
"""Incarnations of sessions without durability: only their checkpoints are on the disk."""
MEMORY, ROOMY = Path("/dev/shm"), 4 << 30
SCRATCH = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOMY else None
"""Where the folders of simulated crashes are: nothing in them need survive a real one. A container
may have 64 MB there; then they are where temporary files are."""


class Whole(NamedTuple):
    """A recovery of which every session was taken up."""

    sessions: dict
    damaged: dict
    tombstones: dict
    orphans: list
    notes: list


def taken_up(store):
    begun = store.recover()
    sessions, damaged = {}, dict(begun.damaged)
    for pending in begun.pending:
        name = pending.row.id
        try:
            sessions[name] = store.take_up(pending)
        except Damaged as error:
            damaged[name] = Damage(name, error.what, error.where)
    return Whole(sessions, damaged, begun.tombstones, begun.orphans, begun.notes)


def same(journal):
    """Epoch and kernels of the next snapshot: those of the present one."""
    return {"epoch": journal.row.epoch, "kernel_rev": journal.row.kernel_rev}


class Loss(AssertionError):
    """A promise was broken."""


class Change(NamedTuple):
    kind: Kind
    key: Key | None = None
    meta: bytes = b""
    payload: bytes = b""


@dataclass
class State:
    """What the application holds in memory."""

    number: int = 0
    total: int = 0
    factor: int = 1
    seen: dict = field(default_factory=dict)

    def apply(self, change):
        self.number += 1
        if change.kind is Kind.PATCH:
            self.factor = int(change.meta)
        elif change.kind is Kind.PARAMS:
            self.total = int(change.meta)
        else:
            if change.key in self.seen:
                raise Loss(f"{change.key} was applied twice")
            self.seen[change.key] = self.number
            added = self.factor * sum(change.payload) + zlib.crc32(change.meta)
            self.total = (self.total * 31 + added) % (1 << 61)

    def chunks(self):
        """The snapshot, in pieces."""
        seen = [[*key, number] for key, number in self.seen.items()]
        data = json.dumps([self.number, self.total, self.factor, seen]).encode()
        return [data[:7], data[7:]]

    @classmethod
    def load(cls, data):
        number, total, factor, seen = json.loads(data)
        return cls(number, total, factor, {Key(*key): at for *key, at in seen})


@dataclass
class Told:
    """What one session's users know."""

    epoch: int
    alive: bool = False
    """Its creation was acknowledged."""
    ending: bool = False
    """Its deletion was attempted."""
    attempts: list = field(default_factory=list)
    acknowledged: int = 0

    def state(self, number):
        found = State()
        for change in self.attempts[:number]:
            found.apply(change)
        return found


@dataclass
class Promise:
    sessions: dict = field(default_factory=dict)
    buried: dict = field(default_factory=dict)
    unsettled: dict = field(default_factory=dict)
    """Pushes whose fate nobody knows, by session."""
    checkpoints: dict = field(default_factory=dict)
    """What may be there by incarnation and name; None: nothing."""
    backups: dict = field(default_factory=dict)
    """By name the promise that a backup is to keep, and whether it was acknowledged."""
    later: int = 0
    """Epochs by which those of a backup are above the ones that were copied."""

    def check(self, recovery):
        """Compares, and then takes what came back for promised: it is what readers see now."""
        notes = [note for note in recovery.notes if not note.startswith(HARMLESS)]
        if recovery.damaged or recovery.orphans or notes:
            raise Loss(f"{recovery.damaged} {recovery.orphans} {notes}")
        for name, told in list(self.sessions.items()):
            found = recovery.sessions.get(name)
            if found is None:
                self._check_gone(name, told, recovery)
                continue
            self._check_session(name, told, found)
        for name, epoch in self.buried.items():
            if name not in self.sessions and recovery.tombstones.get(name) != epoch:
                raise Loss(f"the tombstone of {name} is lost")
        if unknown := set(recovery.sessions) - set(self.sessions):
            raise Loss(f"{unknown} came back")
        self.later = 0

    def _check_gone(self, name, told, recovery):
        if told.alive and not told.ending:
            raise Loss(f"session {name} is lost")
        if recovery.tombstones.get(name) == told.epoch and told.ending:
            self.buried[name] = told.epoch
        elif told.alive:
            raise Loss(f"session {name} was deleted without a tombstone")
        del self.sessions[name]
        self.unsettled.pop(name, None)

    def _check_session(self, name, told, found):
        state = resume(found)
        if state.number < told.acknowledged:
            raise Loss(f"{name}: {told.acknowledged} were promised, {state.number} came back")
        if state.number > len(told.attempts) or state != told.state(state.number):
            raise Loss(f"{name}: what came back at {state.number} never was")
        if found.row.epoch != told.epoch + self.later or found.journal.last != state.number:
            raise Loss(f"{name}: epoch or number differ")
        told.epoch = found.row.epoch
        given_up = told.attempts[state.number :]
        self.unsettled.setdefault(name, []).extend(one for one in given_up if one.key)
        told.attempts = told.attempts[: state.number]
        told.acknowledged, told.alive, told.ending = state.number, True, False

    def check_checkpoints(self, checkpoints):
        """As `check`."""
        for (whose, name), allowed in self.checkpoints.items():
            found = checkpoints.find(whose, name)
            content = None
            if found is not None:
                try:
                    checkpoints.verify(found)
                except Damaged as damage:
                    raise Loss(f"checkpoint {name}: {damage.what}") from None
                content = checkpoints.open(found).read_bytes()
            if content not in allowed:
                raise Loss(f"checkpoint {name} is not what was promised")
            self.checkpoints[whose, name] = {content}

    def check_backups(self, root):
        """Restores each backup elsewhere. One that nobody was told of may be absent, or whole."""
        for name, (told, made) in self.backups.items():
            if (root / name).exists():
                restored(root / name, told.copy())
            elif made:
                raise Loss("a backup is lost")

    def copy(self):
        return copy.deepcopy(self)


HARMLESS = ("checkpoints/", "there is no room for the ballast")


def restored(path, promise, then=lambda server: None, *, later=1):
    """Starts the application on a copy of a backup, which is so many epochs later."""
    with Scratch() as root:
        shutil.copytree(path, root / "data")
        promise.later = later
        server = Server(None, root / "data", promise, seeded("restored"))
        then(server)
        server.close()


def resume(found):
    """The state of a recovered session."""
    state = State.load(found.snapshot.read_bytes())
    for record in found.records:
        header = record.header
        state.apply(Change(header.kind, header.key, header.meta, record.payload()))
    return state


class Server:
    """The application: one data folder, some sessions, random users."""

    def __init__(self, calls, path, promise, rng):
        self.promise, self.rng = promise, rng
        self.path = path
        self.store = Store(path, Files(calls), ballast=BALLAST)
        recovery = taken_up(self.store)
        promise.check(recovery)
        promise.check_checkpoints(self.store.checkpoints)
        self.notes = [note for found in recovery.sessions.values() for note in found.notes]
        self.journals = {name: found.journal for name, found in recovery.sessions.items()}
        self.states = {name: resume(found) for name, found in recovery.sessions.items()}
        self.copies = {}

    @contextlib.contextmanager
    def undone(self, undo):
        """A full disk means that nothing has happened."""
        try:
            yield
        except NoSpace:
            undo()
            raise

    # What users do

    def create(self, name, shape=SHAPE):
        if name in self.journals:
            raise KeyError(name)
        told = self.promise.sessions[name] = Told(self.promise.buried.get(name, 0) + 1)
        with self.undone(lambda: self.promise.sessions.pop(name)):
            self.journals[name] = self.store.create(
                name, uuid=uuid.UUID(int=self.rng.getrandbits(128)), epoch=told.epoch, spec="{}",
                kernel_rev="1", chunks=State().chunks(), reserved=RESERVED, shape=shape,
            )  # fmt: skip
        told.alive = True
        self.states[name] = State()

    def push(self, name, count=1):
        """Commits some pushes together; repeats those of which nobody knows."""
        pushes = []
        while len(pushes) < count:
            pushes.append(self._repeat(name) or self._fresh(name))
        self.commit(name, pushes)

    def _fresh(self, name):
        key = Key(f"w{self.rng.randrange(3)}", self.rng.getrandbits(40))
        kind = self.rng.choice([Kind.PUSH, Kind.PUSH, Kind.PUSH, Kind.SKIP])
        size = self.rng.choice([1, 700, 5000]) if kind is Kind.PUSH else 0
        meta = self.rng.randbytes(self.rng.choice([0, 3, 600]))
        return Change(kind, key, meta, self.rng.randbytes(size))

    def _repeat(self, name):
        unsettled = self.promise.unsettled.get(name)
        while unsettled:
            change = unsettled.pop(self.rng.randrange(len(unsettled)))
            if change.key not in self.states[name].seen:
                return change
        return None

    def patch(self, name):
        self.commit(name, [Change(Kind.PATCH, meta=b"%d" % self.rng.randrange(100))])

    def commit(self, name, changes):
        journal, told = self.journals[name], self.promise.sessions[name]
        slots = []
        try:
            for change in changes:
                slots.append(self.reserve(name, change))
                slots[-1].seal(
                    change.kind, key=change.key, meta=change.meta, payload=change.payload
                )
        except NoSpace:
            for slot in slots:
                slot.release()
            raise
        told.attempts += changes
        headers = journal.commit(slots)
        assert [header.number for header in headers] == list(
            range(told.acknowledged + 1, len(told.attempts) + 1)
        )
        for change in changes:
            self.states[name].apply(change)
        told.acknowledged = len(told.attempts)

    def reserve(self, name, change):
        journal = self.journals[name]
        while (slot := journal.reserve(payload=bool(change.payload))) is None:
            self.snapshot(name)
        return slot

    def snapshot(self, name):
        """Of now, or of a copy that was made some records ago."""
        journal, state = self.journals[name], self.states[name]
        copied = self.copies.pop(name, state)
        if journal.last > journal.row.number:
            chosen = copied if copied.number > journal.row.number else state
            journal.snapshot(chosen.number, chosen.chunks(), **same(journal))

    def copy(self, name):
        self.copies[name] = copy.deepcopy(self.states[name])

    def replace(self, name, shape=None):
        change = Change(Kind.PARAMS, meta=b"%d" % self.rng.randrange(1000))
        told, after = self.promise.sessions[name], copy.deepcopy(self.states[name])
        after.apply(change)
        told.attempts.append(change)
        with self.undone(told.attempts.pop):
            number = self.journals[name].replace(
                after.chunks(), **same(self.journals[name]), shape=shape
            )
        assert number == len(told.attempts)
        self.states[name] = after
        told.acknowledged = len(told.attempts)

    def delete(self, name):
        told = self.promise.sessions[name]
        told.ending = True
        with self.undone(lambda: setattr(told, "ending", False)):
            self.journals[name].delete(told.epoch)
        del self.journals[name], self.states[name], self.promise.sessions[name]
        self.copies.pop(name, None)
        self.promise.unsettled.pop(name, None)
        self.promise.buried[name] = told.epoch

    def checkpoint(self):
        """Makes, replaces or removes a checkpoint, or all of a session's."""
        uuid, name = self.rng.choice(GONE), self.rng.choice(["best", "last.1"])
        kept, dice = self.promise.checkpoints, self.rng.random()
        if dice < 0.7:
            return self.write_checkpoint(uuid, name, self.rng.choice([1, 900, 5000]))
        names = [name] if dice < 0.85 else ["best", "last.1"]
        for one in names:
            kept[uuid, one] = kept.get((uuid, one), {None}) | {None}
        if dice < 0.85:
            self.store.checkpoints.delete(uuid, name)
        else:
            self.store.checkpoints.drop(uuid)
        for one in names:
            kept[uuid, one] = {None}

    def write_checkpoint(self, uuid, name, size):
        kept = self.promise.checkpoints
        before = kept.get((uuid, name), {None})
        content = self.rng.randbytes(size)
        kept[uuid, name] = before | {content}
        with self.undone(lambda: kept.update({(uuid, name): before})):
            self.store.checkpoints.write(
                uuid, name, [content[:100], content[100:]], self.rng.choice([None, size])
            )
        kept[uuid, name] = {content}

    def back_up(self):
        """Once in a life: what must be kept grows."""
        if self.promise.backups:
            return
        name = f"backup-{self.rng.getrandbits(32)}"
        told = self.promise.copy()
        self.promise.backups[name] = told, False
        found = self.store.backup(self.path.with_name(name))
        assert not found.damaged
        self.promise.backups[name] = told, True

    def act(self):
        """Something at random."""
        if self.rng.random() < 0.15:
            return self.checkpoint() if self.rng.random() < 0.7 else self.back_up()
        names = sorted(self.journals)
        if not names or (len(names) < 2 and self.rng.random() < 0.3):
            name = next(one for one in ("a", "b", "c") if one not in names)
            return self.create(name)
        name, dice = self.rng.choice(names), self.rng.random()
        if dice < 0.45:
            return self.push(name, self.rng.choice([1, 1, 2, 3]))
        if dice < 0.52:
            return self.patch(name)
        if dice < 0.62:
            return self.copy(name)
        if dice < 0.75:
            return self.snapshot(name)
        if dice < 0.88:
            return self.replace(name, self.rng.choice([None, None, SHAPE, WIDER]))
        if dice < 0.93:
            return self.delete(name)
        return self.store.flush()

    def close(self):
        for journal in self.journals.values():
            journal.close()
        self.store.close()


class Scratch:
    """A folder for the block, in memory if there is such a place."""

    def __enter__(self):
        self.path = Path(tempfile.mkdtemp(dir=SCRATCH)).resolve()
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path)


def seeded(*parts):
    return random.Random(repr(parts))
