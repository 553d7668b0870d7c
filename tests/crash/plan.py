"""Which point is next: the one that was killed at least often, at a passing that it will have.

What points there are is learnt from every run. Some are passed only in the recovery of what
another kill has left; then that kill is ordered first.
"""

import random
from collections import Counter, defaultdict

from tests.crash.points import RUN, START

MOST = 12
"""A later passing would make a long run of it."""
TRIES = 3
SHARE = {START: 1, RUN: 4}
"""Of the passings of a whole run, one in so many may be waited for."""
RANDOM = 0.05


class Plan:
    """Chooses kills.

    Args:
        seed: Of the choices.
        wanted: Whether a point is to be killed at; None: each is.
    """

    def __init__(self, seed, wanted=None):
        self._rng = random.Random(f"plan {seed}")
        self._wanted = wanted or (lambda point: True)
        self._passed = {}
        self._after = defaultdict(list)
        self._failed = Counter()
        self._seen = Counter()
        self._queue = []
        self.kills = Counter()
        self.first = []
        """What is passed only while there is no data folder yet, in order."""

    @property
    def points(self):
        """All that are known and wanted, but for the first ones."""
        return sorted(self._passed)

    @property
    def missing(self):
        """Those at which nothing was killed yet, though there is hope."""
        return [name for name in self.points if not self.kills[name] and self._is_open(name)]

    def _is_open(self, name):
        """Whether it is worth a try: what was seen once only is not tried thrice in vain."""
        return self._failed[name] < min(TRIES, self._seen[name])

    def next(self):
        """`POINT:N`, or `random:SECONDS`."""
        if not self._queue:
            if self._rng.random() < RANDOM:
                return f"random:{0.05 + 0.4 * self._rng.random():.3f}"
            chances = list(filter(self._is_open, self.points))
            least = min(map(self._rank, chances))
            name = self._rng.choice([one for one in chances if self._rank(one) == least])
            if self._after[name]:
                self._queue.append(self._rng.choice(self._after[name]))
            self._queue.append(self._at(name))
        return self._queue.pop(0)

    def _rank(self, name):
        """The least goes first; of what was never killed at, what happens while all is well."""
        return self.kills[name], not self.kills[name] and not name.startswith(RUN)

    def _at(self, name):
        share = SHARE.get(name.partition(":")[0], 2)
        most = 1 if self._failed[name] else min(self._passed[name] // share, MOST)
        return f"{name}:{self._rng.randint(1, max(most, 1))}"

    def done(self, kill, killed, passed, *, before, virgin):
        """Learns from a run.

        Args:
            kill: What was ordered; None: nothing.
            killed: The point at which it came about; None: at none.
            passed: How often each point was passed.
            before: The order that ended the run before this one.
            virgin: There was no data folder yet.
        """
        name = (kill or "").rpartition(":")[0]
        if killed is not None:
            self.kills[killed] += 1
        elif name in self._passed:
            self._failed[name] += 1
        for point, times in passed.items():
            if not self._wanted(point):
                continue
            if point.startswith(START):
                if virgin:
                    if point not in self.first:
                        self.first.append(point)
                    continue
                if before is not None and (point not in self._passed or self._after[point]):
                    self._after[point].append(before)
            self._seen[point] += 1
            # Runs end early: the largest number says what a whole one can have.
            self._passed[point] = max(self._passed.get(point, 0), times)
