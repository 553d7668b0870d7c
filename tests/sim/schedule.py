"""Seeded schedules: what workers, networks and operators do to a session, in virtual time.

Events name what they mean by the state they meet ("the worker's next number", "the last version
it saw"), so that a schedule from which events were taken still makes sense: it can be shrunk.
"""

import random
from typing import Any, NamedTuple

import numpy as np

from tests.sim.contract import Spec, Update

TENSORS = {"w": (3, 3), "b": (3,)}
SIZES = [int(np.prod(shape)) for shape in TENSORS.values()]
SIZE = sum(SIZES)
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
GAPS = (1, 5, -1, -2, 1022, 1023, 2000, -1024, -1025)
LEASES_S = (1.5, 3.5, 7.5, 30.5, 120.5)
TICK_S = 1 / 1024
"""What every event takes. Longer times are multiples of 1/8: nothing is ever due at one moment
with an event."""


class Push(NamedTuple):
    """A worker computes a gradient and sends it.

    Attributes:
        kind: plain, pass, nan, huge (many times the usual norm) or overflow (its sum does).
        fresh: It pulls before, else the gradient is for what it saw last.
        held: A partition keeps the message back until it heals.
        patient: It sends nothing while the round that it contributed to is open.
        gap: Numbers that it leaves out; below 0: it takes up an earlier one that may be free.
    """

    worker: str
    seed: int
    kind: str = "plain"
    fresh: bool = True
    held: bool = False
    patient: bool = False
    gap: int = 0
    weight: float = 1.0
    dtype: str = "F32"
    scale: float | None = None
    lr: float | None = None
    anonymous: bool = False
    lacks: str | None = None
    """A tensor that does not come."""


class Again(NamedTuple):
    """A message that was sent arrives once more: the same bytes, or other ones of its key.

    Attributes:
        which: Counts back from the latest message.
        how: same, wider (another dtype), values or loss.
    """

    which: int
    how: str = "same"


class Heal(NamedTuple):
    """What the partition of a worker held back arrives."""

    worker: str
    backwards: bool = False


class Burst(NamedTuple):
    """Pushes that arrive in one moment; `twice`: and all of them once more."""

    pushes: tuple[Push, ...]
    twice: bool = False


class Join(NamedTuple):
    worker: str
    lease_s: float


class Leave(NamedTuple):
    worker: str


class Upload(NamedTuple):
    seed: int
    tensor: str | None = None


class Restate(NamedTuple):
    """Uploads the optimizer's state."""

    seed: int


class Grow(NamedTuple):
    """Adds a group of one tensor."""

    seed: int


class Patch(NamedTuple):
    """Changes the specification."""

    changes: tuple[tuple[str, Any], ...]


class Advance(NamedTuple):
    seconds: float


Event = Push | Again | Heal | Burst | Join | Leave | Upload | Restate | Grow | Patch | Advance


class Schedule(NamedTuple):
    """All of a run. Its repr is Python: a failing one can be pasted into a test."""

    seed: int
    spec: Spec
    events: tuple[Event, ...]


def gradient(push, size=SIZE):
    """The values of a push, exact in its dtype; None for a pass."""
    if push.kind == "pass":
        return None
    rng = np.random.default_rng([push.seed, 7])
    values = rng.standard_normal(size)
    if push.kind == "huge":
        values *= 1e4
    if push.kind == "overflow":
        values = np.full(size, 3e38)
    values[rng.random(size) < 0.1] *= 0.0  # of both signs
    if push.kind == "nan":
        values[rng.integers(size)] = rng.choice([np.nan, np.inf, -np.inf])
    lo = 0
    for name, shape in TENSORS.items():
        hi = lo + int(np.prod(shape))
        if push.lacks == name:
            values[lo:hi] = 0.0
        lo = hi
    return narrowed(values, push.dtype)


def narrowed(values, dtype):
    """Float64 values that the dtype holds exactly."""
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            return bits.view(np.float32).astype(np.float64)
        return values.astype(_NUMPY[dtype]).astype(np.float64)


def parameters(seed):
    """Of the whole model, in float32."""
    return np.random.default_rng([seed, 3]).standard_normal(SIZE).astype(np.float32)


def schedule(seed, *, mode=None, order=None, durability="none"):
    """The schedule of a seed.

    Args:
        seed: The same gives the same.
        mode: Of the session; None: any.
        order: Of its contributions; None: any.
        durability: Of the session; the pushes of one that logs mostly come in bursts.
    """
    return _Generator(seed, mode, order, durability).made()


class _Generator:
    def __init__(self, seed, mode, order, durability):
        self.seed = seed
        self.rng = random.Random(seed)
        self.mode = mode or self.pick(("sync", "sync", "sync", "bounded", "async"))
        self.order, self.durability = order, durability
        many = self.pick((1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 11))
        self.workers = [f"w{n}" for n in self.rng.sample(range(many), many)]
        self.spec = self.a_spec()
        self.rare = self.pick(("w", "b", None))
        """A tensor that seldom comes."""
        self.dead: dict[str, int] = {}
        """Until which event a worker says nothing."""
        self.cut: dict[str, int] = {}
        self.calm = self.chance(0.3)
        """Nothing but plain rounds, so that long histories come about as well."""
        wire = ("F32", "F16", "BF16", self.spec.dtype)
        self.dtypes = (self.spec.dtype,) if self.chance(0.5) else wire
        self.fresh = float(self.pick((0.6, 0.9, 0.98)))
        self.turns: list[str] = []
        """Who is next, so that rounds fill up."""
        self.lr: float | None = None
        """What most override now."""

    def pick(self, choices):
        return self.rng.choice(choices)

    def chance(self, p):
        return self.rng.random() < p

    def a_spec(self):
        update = {"async": self.an_async, "sync": self.a_sync, "bounded": self.a_bounded}
        return Spec(
            Update(mode=self.mode, lease_s=self.pick(LEASES_S), **update[self.mode]()),
            rule=self.pick(("sgd", "sgd", "adam")),
            lr=self.pick((0.125, 0.1, 0.003)),
            clip=self.pick((None, None, 1.5)),
            dtype=self.pick(("F32", "F32", "F64")),
            on_nonfinite=self.pick(("refuse", "skip")),
            push=self.pick(("gradient", "gradient", "delta")),
            missing=self.pick(("refuse", "refuse", "skip")),
            durability=self.durability,
        )  # fmt: skip

    def an_async(self):
        bound = self.pick((None, 0, 1, 3))
        on_stale = "refuse" if bound is None else self.pick(("refuse", "scale"))
        return {"max_staleness": bound, "on_stale": on_stale}

    def a_bounded(self):
        return {"slack": self.pick((0, 1, 3))}

    def a_sync(self):
        many = len(self.workers)
        workers = max(1, many + self.pick((-1, 0, 0, 0, 1)))
        quorum = self.pick((None, None, None, self.rng.randint(-(-workers // 2), workers)))
        needed = workers if quorum is None else quorum
        reduce = self.pick(("mean", "mean", "mean", "sum", "trimmed_mean", "median"))
        bound = self.pick((None, None, 4.0, 3.3))
        return {
            "workers": workers, "quorum": quorum,
            "min_contributions": self.pick((1, 1, self.rng.randint(1, needed))),
            "on_lost": self.pick(("shrink", "shrink", "wait")),
            "round_timeout_s": float(self.pick((1, 4, 16, 64))),
            "reduce": reduce,
            "trim": self.pick((0.0, 0.2, 0.25, 0.4)) if reduce == "trimmed_mean" else None,
            "order": self.order or self.pick(("arrival", "worker")),
            "max_norm": bound,
            "on_max_norm": "refuse" if bound is None else self.pick(("refuse", "clip")),
        }  # fmt: skip

    def made(self):
        many = self.rng.randint(20, 40)
        events = [event for index in range(many) for event in self.some(index)]
        return Schedule(self.seed, self.spec, tuple(events))

    def some(self, index):
        """One thing that happens, and the partitions that end now."""
        for worker, until in sorted(self.cut.items()):
            if until <= index:
                del self.cut[worker]
                yield Heal(worker, self.chance(0.5))
        yield self.one(index)

    def one(self, index):
        kinds = {
            self.push: 0.66, self.burst: 0.06, self.advance: 0.1, self.again: 0.1,
            self.upload: 0.01, self.restate: 0.01, self.grow: 0.01, self.patch: 0.03,
            self.misfortune: 0.05,
        }  # fmt: skip
        if self.chance(0.03):
            self.lr = self.pick((None, None, 0.25, 0.0625))
        if self.calm:
            kinds = {self.push: 0.8, self.burst: 0.1, self.again: 0.05, self.advance: 0.05}
        if self.durability == "log":
            kinds |= {self.burst: 0.7}
        (chosen,) = self.rng.choices(list(kinds), list(kinds.values()))
        return chosen(index)

    def awake(self, index):
        """A worker that is not dead, if any is not."""
        found = [name for name in self.workers if self.dead.get(name, 0) <= index] or self.workers
        if self.chance(0.2):
            return self.pick(found)
        self.turns = [name for name in self.turns if name in found]
        self.turns = self.turns or self.rng.sample(found, len(found))
        return self.turns.pop()

    def push(self, index, worker=None):
        worker = worker or self.awake(index)
        sync = self.mode == "sync"
        robust = self.spec.update.reduce in ("trimmed_mean", "median")
        odd = "plain" if self.calm else self.pick(("pass", "pass", "nan", "huge", "overflow"))
        kind = odd if self.chance(0.2) else "plain"
        kind = "plain" if kind == "pass" and not sync else kind
        dtype = self.pick(self.dtypes)
        if kind == "overflow":
            dtype = "F32"
        weighted = sync and not robust and self.chance(0.5)
        weight = self.pick((0.5, 2.0, 3.0, 0.1, 7.25, 1e20)) if weighted else 1.0
        return Push(
            worker,
            self.rng.getrandbits(31),
            kind,
            fresh=self.calm or self.chance(self.fresh),
            held=worker in self.cut,
            patient=self.chance(0.75),
            gap=0 if self.chance(0.9) else self.pick(GAPS),
            weight=0.0 if kind == "pass" else weight,
            dtype=dtype,
            scale=self.pick((2.0, 1024.0, 3.0)) if kind != "pass" and self.chance(0.15) else None,
            lr=0.5 if self.chance(0.01) else self.lr,
            anonymous=self.mode == "async" and self.chance(0.1),
            lacks=self.lacking(kind),
        )

    def lacking(self, kind):
        """Now and then a tensor that does not come; mostly the same one, so that it misses all."""
        if self.spec.missing == "refuse" or kind in ("pass", "nan"):
            return None
        return self.pick((None, None, "w", "b", self.rare, self.rare))

    def burst(self, index):
        order = self.rng.sample(self.workers, len(self.workers))
        alive = [name for name in order if self.dead.get(name, 0) <= index and name not in self.cut]
        many = 8 if self.durability == "log" else 4
        pushes = tuple(self.push(index, worker) for worker in alive[:many])
        return Burst(pushes, twice=self.chance(0.2))

    def advance(self, index):
        return Advance(float(self.pick((0.125, 0.125, 0.5, 1, 2, 5, 20))))

    def again(self, index):
        how = self.pick(("same", "same", "wider", "values", "loss"))
        return Again(self.rng.randrange(8), how)

    def upload(self, index):
        return Upload(self.rng.getrandbits(31), self.pick((None, "b", "w")))

    def restate(self, index):
        return Restate(self.rng.getrandbits(31))

    def grow(self, index):
        return Grow(self.rng.getrandbits(31))

    def patch(self, index):
        if self.chance(0.3):
            return Patch((("lr", self.pick((0.25, 0.01))),))
        if self.chance(0.2):
            return Patch((("lease_s", self.pick(LEASES_S)),))
        if self.mode == "bounded":
            return Patch((("slack", self.pick((0, 1, 3))),))
        if self.mode == "async":
            bound = None if self.spec.update.on_stale == "scale" else self.pick((0, 1, 3, None))
            return Patch((("max_staleness", bound if bound is not None else 2),))
        if self.chance(0.3):
            bound = self.pick((3.0, 3.3, 4.0))
            return Patch(
                (("max_norm", bound), ("on_max_norm", self.pick(("refuse", "clip"))),
                 ("on_lost", self.pick(("shrink", "wait"))))
            )  # fmt: skip
        workers = self.rng.randint(1, len(self.workers) + 1)
        quorum = self.pick((None, self.rng.randint(1, workers)))
        timeout_s = float(self.pick((1, 4, 16, 64)))
        return Patch(
            (("workers", workers), ("quorum", quorum), ("min_contributions", 1),
             ("round_timeout_s", timeout_s), ("on_lost", self.pick(("shrink", "wait"))))
        )  # fmt: skip

    def misfortune(self, index):
        """A worker dies, is cut off, joins, or leaves for good and comes under another name."""
        worker = self.awake(index)
        what = self.pick(("die", "cut", "join", "leave"))
        if what == "join":
            return Join(worker, self.pick((1.5, 3.5, 60.5)))
        if what == "leave":
            if self.chance(0.8):  # else it does not know that it left
                self.workers[self.workers.index(worker)] = f"{worker}x"
            return Leave(worker)
        until = index + self.rng.randint(2, 13)
        if what == "die":
            self.dead[worker] = until
            return Advance(float(self.pick((0.125, 1, 5))))
        self.cut[worker] = until
        return self.push(index, worker)
