"""An independent model of a session under each update mode: NumPy and plain Python, no service.

Written from DESIGN §4 and §5 and the contract of the update modes, never from the code that is
tested. Time is what the caller says it is.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.sim import arithmetic
from tests.sim.contract import At, Reply, Update

WINDOW = 1024


class Refused(Exception):
    def __init__(self, slug, **context):
        self.slug, self.context = slug, context


class Contribution(NamedTuple):
    worker: str
    sequence: int
    weight: float
    values: Any
    factor: float
    """What its values are multiplied by before the weight."""
    present: Any
    """Of each tensor, whether it came; None: all."""


@dataclass
class Round:
    number: int
    base: At
    deadline: float
    update: Update
    lr: float | None
    """The override that all of it share."""
    members: list[Contribution] = field(default_factory=list)
    status: str = "open"
    reasons: frozenset[str] = frozenset()
    """Why it was closed: any of these is true."""
    summary: dict[str, Any] | None = None

    @property
    def counted(self):
        return [one for one in self.members if one.weight > 0]

    @property
    def fate(self):
        """What everyone who contributed is told."""
        if self.status == "open":
            return Reply(round=self.number)
        if self.status == "abandoned":
            (reason,) = self.reasons
            return Reply(round=self.number, reason=reason)
        return Reply(summary=self.summary)


@dataclass
class Member:
    lease_s: float
    due: float = math.inf
    live: bool = False
    clock: int = 0
    pushes: int = 0
    passes: int = 0
    late: int = 0
    staleness: list[int] = field(default_factory=list)
    later: int = 0
    """How often others were before it in a round."""


class Step(NamedTuple):
    """An update: of a round, or of one gradient.

    Attributes:
        others: The learning rate of the groups that came later.
        present: Of each tensor, whether it takes part; None: all do.
    """

    gradient: Any
    round: int | None
    lr: float
    others: float
    scale: float
    present: Any


class Load(NamedTuple):
    """An upload of parameters: their values from `lo` on."""

    lo: int
    values: Any


class State(NamedTuple):
    """An upload of the optimizer's state: a seed of its arrays, the step, counts by tensor."""

    seed: int
    step: int
    counts: tuple[int, ...]


class Grow(NamedTuple):
    """One more group, of one tensor."""

    values: Any


class Model:
    """A session that holds `params`, at version 1-1.

    Args:
        spec: What it is created with.
        params: Flat, of the master dtype.
        sizes: Elements of each tensor; None: there is one.
    """

    def __init__(self, spec, params, sizes=None):
        self.spec = spec
        self.params = params.copy()
        self.sizes = [params.size] if sizes is None else list(sizes)
        self.counts = [0] * len(self.sizes)
        self.groups = [params.size]
        """Elements of each."""
        self.at = At(1, 1, 0)
        self.members: dict[str, Member] = {}
        self.retired: set[str] = set()
        self.ledger: dict[str, dict[int, tuple[Any, Any]]] = {}
        self.rounds: list[Round] = []
        self.log: list[Step | Load | State | Grow] = []

    # What can be asked

    @property
    def update(self):
        return self.spec.update

    @property
    def open(self):
        """The open round, if there is one."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].status == "open" else None

    @property
    def live(self):
        return sorted(name for name, one in self.members.items() if one.live)

    @property
    def missing(self):
        """Whom the open round waits for."""
        came = {one.worker for one in self.open.members}
        never = self.open.update.workers - len(self.members)
        return len(set(self.live) - came) + max(0, never)

    def document(self, worker, now):
        """What a worker that has not left may ask about itself."""
        one, numbers = self.members[worker], self.ledger.get(worker, {})
        last = numbers[max(numbers)][1] if numbers else None
        sync, many = self.update.mode == "sync", len(one.staleness)
        mean = sum(one.staleness) / many if many else None
        return {
            **self.at._asdict(), "worker": worker, "live": one.live, "lease_s": one.lease_s,
            "lease_left_s": one.due - now if one.live else 0.0,
            "highest": max(numbers, default=-1), "next_sequence": max(numbers, default=-1) + 1,
            "clock": one.clock if self.update.mode == "bounded" else None,
            "round": len(self.rounds) + (self.open is None) if sync else None,
            "contributed": bool(self.open) and any(worker == c.worker for c in self.open.members),
            "contributions": one.pushes, "passes": one.passes, "late": one.late,
            "staleness": {"last": one.staleness[-1] if many else None, "mean": mean,
                          "max": max(one.staleness, default=None)},
            "last": last and self._told(last.fate if isinstance(last, Round) else last),
        }  # fmt: skip

    def _told(self, fate):
        """What a repeat would be told, as JSON has it."""
        if fate.summary is not None:
            return {**fate.summary, "replayed": True}
        if fate.reason is not None:
            return {"applied": False, "round": fate.round, "abandoned": fate.reason}
        many, counted = len(self.open.members), len(self.open.counted)
        return {
            **self.at._asdict(), "applied": False, "replayed": True, "round": fate.round,
            "contributions": counted, "passes": many - counted, "missing": self.missing,
        }  # fmt: skip

    def ahead(self, worker):
        """Whether a worker of a bounded session has to wait."""
        clocks = [one.clock for one in self.members.values() if one.live]
        return self.members[worker].clock > min(clocks) + self.update.slack

    def due(self):
        """When the next lease or round runs out; None: nothing will."""
        times = [one.due for one in self.members.values() if one.live]
        times += [self.open.deadline] if self.open else []
        return min(times, default=None)

    # Workers

    def touch(self, worker, now, lease_s=None):
        """Joins, re-joins or renews.

        Raises:
            Refused: It left.
        """
        if worker in self.retired:
            raise Refused("worker-retired")
        one = self.members.setdefault(worker, Member(self.update.lease_s))
        if lease_s is not None:
            one.lease_s = lease_s
        if not one.live:
            clocks = [other.clock for other in self.members.values() if other.live]
            one.live, one.clock = True, min(clocks, default=0)
        one.due = now + one.lease_s

    def heard(self, worker, now):
        """A call names a worker; nobody joins by it."""
        if worker in self.members and worker not in self.retired:
            self.touch(worker, now)

    def leave(self, worker):
        self.retired.add(worker)
        self.members[worker].live = False
        self._close_if_complete()

    def tick(self, now):
        """Closes what is due."""
        for one in self.members.values():
            one.live = one.live and one.due > now
        self._close_if_complete()
        if self.open and self.open.deadline <= now:
            if len(self.open.counted) >= self.open.update.min_contributions:
                self._close("timeout")
            else:
                self._abandon("timeout")

    # Pushes

    def push(self, message, now):
        """The answer to a push that arrives now."""
        try:
            return self._push(message, now)
        except Refused as refused:
            return Reply(slug=refused.slug, context=refused.context)

    def _push(self, message, now):
        worker = message.worker
        if worker is not None:
            if worker in self.members:  # an unknown one joins when it is admitted
                self.touch(worker, now)
            known = self._find(message)
            if known is not None:
                return (known.fate if isinstance(known, Round) else known)._replace(replayed=True)
        try:
            staleness = self._staleness(message)
        except Refused as refused:
            if refused.slug in ("round-closed", "stale-gradient") and worker in self.members:
                self.members[worker].late += 1
            raise
        if self.update.mode == "sync":
            return self._contribute(message, now)
        return self._apply_at_once(message, staleness, now)

    def _find(self, message):
        """The fate of an admitted push; None if its number is free."""
        numbers = self.ledger.get(message.worker, {})
        if message.sequence <= max(numbers, default=-1) - WINDOW:
            raise Refused("too-old")
        if message.sequence not in numbers:
            return None
        mark, fate = numbers[message.sequence]
        if mark != message.mark:
            raise Refused("key-reused")
        return fate

    def fate(self, message):
        """What became by now of a push that was admitted."""
        _, found = self.ledger[message.worker][message.sequence]
        return found.fate if isinstance(found, Round) else found

    def _record(self, message, fate):
        if message.worker is not None:
            numbers = self.ledger.setdefault(message.worker, {})
            assert message.sequence not in numbers, "a number is consumed once"
            numbers[message.sequence] = message.mark, fate

    def _staleness(self, message):
        if message.base is None:
            return 0
        where = self.at._asdict()
        if message.base[0] < self.at.epoch:
            raise Refused("epoch-changed", **where)
        if message.base > self.at[:2]:
            raise Refused("version-unknown", **where)
        staleness = self.at.version - message.base[1]
        if self.update.mode == "sync" and staleness:
            opened = {"round": self.open.number} if self.open else {}
            raise Refused("round-closed", **opened, **where)
        bound = self.update.max_staleness
        if self.update.mode != "async" or bound is None or staleness <= bound:
            return staleness
        if self.update.on_stale == "refuse":
            raise Refused("stale-gradient", staleness=staleness, max_staleness=bound, **where)
        return staleness

    def _fitted(self, message):
        """The message in the layout of now: tensors of groups that came since are not in it.

        Raises:
            Refused: The session wants every tensor.
        """
        lacks = self.params.size - message.values.size
        if not lacks:
            return message
        if self.spec.missing == "refuse":
            raise Refused("tensor-mismatch")
        ends = np.cumsum(self.sizes).tolist()
        came = message.present or (True,) * (ends.index(message.values.size) + 1)
        values = np.concatenate([message.values, np.zeros(lacks)])
        came += (False,) * (len(self.sizes) - len(came))
        return message._replace(values=values, present=came)

    def _parts(self, values):
        """A vector group by group."""
        return np.split(values, np.cumsum(self.groups)[:-1])

    def _norm(self, message):
        """Of the gradient after ÷ grad_scale; None if it is not finite and to be skipped."""
        if np.isfinite(message.values).all():
            return arithmetic.norm(*self._parts(message.values)) / (message.scale or 1.0)
        if self.spec.on_nonfinite == "refuse":
            raise Refused("nonfinite")
        return None

    def _apply_at_once(self, message, staleness, now):
        fitted = self._fitted(message)
        bound, lr, others = self.update.max_staleness, self._lr(message.lr), self.spec.lr
        if self.update.mode == "async" and bound is not None and staleness > bound:
            lr, others = lr / (1.0 + staleness), others / (1.0 + staleness)
        known = {"staleness": staleness, "identified": message.worker is not None}
        if self._norm(fitted) is None:
            summary = self._skipped("nonfinite", lr, **known)
        else:
            sign = -1.0 if self.spec.push == "delta" else 1.0
            gradient, scale = sign * fitted.values, message.scale or 1.0
            step = Step(gradient, None, lr, others, scale, fitted.present)
            summary = self._step(step, **known)
        if message.worker is not None:
            self.touch(message.worker, now)
            one = self.members[message.worker]
            one.clock += summary["applied"]
            one.pushes += 1
            one.staleness.append(staleness)
        self._record(message, Reply(summary=summary))
        return Reply(summary=summary)

    def _lr(self, override):
        return self.spec.lr if override is None else override

    # Rounds

    def _contribute(self, message, now):
        self._check_round(message)
        fitted = message if message.values is None else self._fitted(message)
        norm = None if message.values is None else self._norm(fitted)
        factor, weight = 1.0 / (message.scale or 1.0), 0.0 if norm is None else message.weight
        rules = self.open.update if self.open else self.update
        bound = rules.max_norm
        added = norm if norm is None or rules.reduce != "sum" else norm * weight
        if added is not None and bound is not None and added > bound:
            if rules.on_max_norm == "refuse":
                raise Refused("norm-exceeded", norm=added, max_norm=bound)
            factor *= bound / added
        self.touch(message.worker, now)
        if self.open is None:
            deadline = now + self.update.round_timeout_s
            number = len(self.rounds) + 1
            self.rounds.append(Round(number, self.at, deadline, self.update, message.lr))
        joined = self.open
        sign = -1.0 if self.spec.push == "delta" else 1.0
        values = message.values if norm is None else sign * fitted.values
        one = self.members[message.worker]
        one.later += bool(joined.members)
        one.pushes += 1
        one.passes += weight == 0
        one.staleness.append(0)
        joined.members.append(
            Contribution(message.worker, message.sequence, weight, values, factor, fitted.present)
        )
        self._record(message, joined)
        self._close_if_complete()
        return joined.fate

    def _check_round(self, message):
        joined = self.open
        if joined is None:
            return
        for one in joined.members:
            if one.worker == message.worker:
                raise Refused(
                    "already-contributed", worker=one.worker, round=joined.number,
                    sequence=one.sequence, **self.at._asdict(),
                )  # fmt: skip
        if message.lr != joined.lr:
            raise Refused("overrides-differ", round=joined.number, **self.at._asdict())

    def _close_if_complete(self):
        if self.open is None:
            return
        reasons = set()
        rules = self.open.update
        if len(self.open.members) >= rules.needed:
            reasons.add("quorum" if rules.needed < rules.workers else "complete")
        if rules.on_lost == "shrink" and self.missing == 0:
            reasons.add("complete")
        if reasons:
            self._close(*reasons)

    def _close(self, *reasons):
        closed, parts = self.open, self.open.counted
        lr, many = self._lr(closed.lr), {"round": closed.number, "contributions": len(parts)}
        if not parts:
            summary = self._skipped("passes", lr, **many)
        else:
            gradient = self.reduced(closed)
            if np.isfinite(gradient).all():
                present = self.united(parts)
                step = Step(gradient, closed.number, lr, self.spec.lr, 1.0, present)
                summary = self._step(step, **many)
            else:
                summary = self._skipped("nonfinite", lr, **many)
        if summary["applied"]:
            closed.status, closed.reasons = "applied", frozenset(reasons)
        else:
            closed.status, closed.reasons = "skipped", frozenset([summary["skipped"]])
        closed.summary = summary

    def united(self, parts):
        """Of each tensor, whether any of the contributions has it; None: all do."""
        marks = [one.present or (True,) * len(self.sizes) for one in parts]
        found = tuple(map(any, zip(*marks, strict=True)))
        return None if all(found) else found

    def _abandon(self, reason):
        if self.open:
            self.open.reasons = frozenset([reason])
            self.open.status = "abandoned"

    def reduced(self, closed, order=None):
        """The gradient of a round, its contributions taken in the recorded order, if one is given.

        Args:
            closed: A round with a contribution that counts.
            order: Its keys, as they arrived.
        """
        parts = closed.counted
        if order is not None:
            by_key = {(one.worker, one.sequence): one for one in parts}
            parts = [by_key[key] for key in order if key in by_key]
        if closed.update.order == "worker":
            parts = sorted(parts, key=lambda one: one.worker)
        if closed.update.reduce in ("trimmed_mean", "median"):
            columns = np.transpose([one.factor * one.values for one in parts]).tolist()
            if closed.update.reduce == "median":
                return arithmetic.middle(columns, self.spec.dtype)
            cut = math.floor(closed.update.trim * len(parts))
            return arithmetic.trimmed(columns, cut, self.spec.dtype)
        divisor = 1.0
        if closed.update.reduce == "mean":
            divisor = 0.0
            for one in parts:
                divisor += one.weight
        pulls = [(one.weight * one.factor, one.values) for one in parts]
        return arithmetic.weighted(pulls, divisor, self.spec.dtype)

    # Updates

    def _step(self, step, **known):
        norm = self._norm_of(step)
        factor = self.factor(step)
        if self.spec.rule == "sgd":
            lrs = [step.lr] + [step.others] * (len(self.groups) - 1)
            parts = zip(self._parts(self.params), self._parts(step.gradient), lrs, strict=True)
            self.params = np.concatenate(
                [arithmetic.sgd(p, g, lr, factor, self.spec.dtype) for p, g, lr in parts]
            )
            known["params_finite"] = bool(np.isfinite(self.params).all())
        came = step.present or (True,) * len(self.sizes)
        self.counts = [count + now for count, now in zip(self.counts, came, strict=True)]
        self.log.append(step)
        self.at = At(self.at.epoch, self.at.version + 1, self.at.step + 1)
        return self._summary(True, None, step.lr, norm, factor < 1.0 / step.scale, known)

    def factor(self, step):
        """What a gradient is multiplied by: its scale, and the session's clip by its norm."""
        factor = 1.0 / step.scale
        if self.spec.clip is not None:
            factor *= min(1.0, self.spec.clip / (self._norm_of(step) + 1e-6))
        return factor

    def _norm_of(self, step):
        return arithmetic.norm(*self._parts(step.gradient.astype(np.float64))) / step.scale

    def _skipped(self, why, lr, **known):
        return self._summary(False, why, lr, None, False, known)

    def _summary(self, applied, skipped, lr, norm, clipped, known):
        return {
            **self.at._asdict(), "applied": applied, "skipped": skipped, "lr": lr,
            "grad_norm": norm, "clipped": clipped, "round": None, "contributions": None,
            "identified": True, "staleness": 0, **known,
        }  # fmt: skip

    # Everything else

    def upload(self, lo, values):
        """Replaces some parameters: history is cut, the round with it."""
        self._abandon("params")
        self.params[lo : lo + values.size] = values
        self.log.append(Load(lo, values))
        self.at = At(self.at.epoch + 1, 1, self.at.step)

    def restate(self, state):
        """Replaces the optimizer's state: history is cut as well."""
        self._abandon("state")
        self.log.append(state)
        self.counts = list(state.counts)
        self.at = At(self.at.epoch + 1, 1, state.step)

    def grow(self, values):
        """Adds a group of one tensor."""
        self._abandon("groups")
        self.params = np.concatenate([self.params, values])
        self.sizes.append(values.size)
        self.groups.append(values.size)
        self.counts.append(0)
        self.log.append(Grow(values))
        self.at = At(self.at.epoch, self.at.version + 1, self.at.step)

    def patch(self, lr=None, **changes):
        """Changes the specification; what the generator knows to be allowed."""
        spec = self.spec._replace(update=self.update._replace(**changes))
        self.spec = spec if lr is None else spec._replace(lr=lr)
