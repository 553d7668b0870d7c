"""The model behind the interface of a service, whole or with a planted fault: to test the tests."""

from tests.sim.contract import Reply
from tests.sim.model import Model, Refused
from tests.sim.schedule import SIZES


class Replicas:
    """Makes sessions that are models.

    Args:
        kind: Of the model; a subclass is one with a fault.
    """

    def __init__(self, kind=Model):
        self.kind = kind
        self.now = 0.0

    def close(self):
        pass

    async def create(self, spec, params):
        return Replica(self.kind(spec, params, SIZES), self)


class Replica:
    """One of them, in the words of `driver.Driven`."""

    groups = False

    def __init__(self, model, service):
        self.model, self.service = model, service

    async def delete(self):
        pass

    @property
    def at(self):
        return self.model.at

    @property
    def counts(self):
        return self.model.counts

    @property
    def open(self):
        one = self.model.open
        if one is None:
            return None
        keys = [(c.worker, c.sequence) for c in one.members]
        return one.number, one.base[:2], keys, self.model.missing, one.deadline - self.service.now

    @property
    def documents(self):
        return sorted(self.model.members.keys() - self.model.retired)

    def document(self, worker):
        one = self.model.members[worker]
        lateness = (
            {"last": 0.0, "mean": 0.0, "max": 0.0}
            if one.pushes
            else dict.fromkeys(("last", "mean", "max"))
        )
        found = self.model.document(worker, self.service.now)
        return {**found, "lateness_s": lateness}

    @property
    def params(self):
        return self.model.params.copy()

    def numbers(self, worker):
        numbers = self.model.ledger.get(worker, {})
        return {number for number in numbers if number > max(numbers) - 1024}

    async def push(self, message):
        return self.model.push(message, self.service.now)

    async def push_all(self, messages):
        for message in messages:
            self.model.heard(message.worker, self.service.now)
        return [await self.push(message) for message in messages]

    async def upload(self, lo, values):
        self.model.upload(lo, values)

    async def restate(self, state):
        self.model.restate(state)

    async def grow(self, values):
        self.model.grow(values)

    async def patch(self, **changes):
        self.model.patch(**changes)

    async def tick(self, now):
        self.service.now = now
        self.model.tick(now)

    async def join(self, worker, lease_s):
        try:
            self.model.touch(worker, self.service.now, lease_s)
        except Refused as refused:
            return Reply(slug=refused.slug)
        return Reply()

    async def leave(self, worker):
        self.model.leave(worker)

    @property
    def live(self):
        return self.model.live

    def ahead(self, worker):
        return self.model.ahead(worker)

    def round(self, number):
        found = self.model.rounds[number - 1]
        members = [(one.worker, one.sequence, one.weight) for one in found.members]
        return found.status, min(found.reasons, default=None), members
