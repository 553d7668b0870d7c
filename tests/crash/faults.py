"""Servers that break a promise about rounds on purpose: the history must tell.

Each fault changes the server's code in the process of one victim, as a mistake in it would.
"""

from service.sessions import contributions, pushes
from service.sessions.durable import Durable
from service.sessions.rounds import Rounds


def drop():
    """Forgets the last contribution of a round that comes back open, without a word."""
    original = Durable.keep_end

    def keep_end(self):
        found = self._session.rounds.open
        if found is not None and found.contributions:
            worker, one = found.contributions.popitem()
            del self._session.ledger._workers[worker].admitted[one.sequence]
        original(self)

    Durable.keep_end = keep_end


def twice():
    """Applies each fifth round twice."""
    original, count = contributions.apply, iter(range(1 << 30))
    perform = pushes.perform

    def apply(session, end):
        again = next(count) % 5 == 4

        def performed(*given, hold):
            found = yield from perform(*given, hold=hold)
            if again:
                found = yield from perform(*given, hold=hold)
            return found

        pushes.perform = performed
        try:
            yield from original(session, end)
        finally:
            pushes.perform = perform

    contributions.apply = apply


def both():
    """Counts a member of each fifth round as one of the next round too."""
    begin, close, left = Rounds.begin, Rounds.close, []

    def closed(self, *others):
        first = next(iter(self.open.contributions.values()))
        if self.number % 5 == 0:
            left.append(first)
        return close(self, *others)

    def begun(self, base, rules, one):
        found = begin(self, base, rules, one)
        while left:
            other = left.pop()
            found.contributions.setdefault(other.worker, other)
        return found

    Rounds.begin, Rounds.close = begun, closed


def heavier():
    """Adds each seventh contribution to its sum twice."""
    original, count = contributions._adding, iter(range(1 << 30))

    def adding(arena, flat, dtype, scaled, *, fresh):
        if next(count) % 7 == 6:
            scaled *= 2
        return original(arena, flat, dtype, scaled, fresh=fresh)

    contributions._adding = adding


FAULTS = {one.__name__: one for one in (drop, twice, both, heavier)}
