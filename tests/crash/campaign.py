"""One data folder, one workload, many kills: restarted, looked at, and killed again.

The workers go on over all of it, so the history is one, and what was acknowledged long ago is
asked for again and again.
"""

import contextlib
import io
import random
import time
from typing import NamedTuple

from service.storage import check as fsck
from tests.crash import promises
from tests.crash.contributor import Contributor, Leader
from tests.crash.door import Door
from tests.crash.history import History, Kill, views
from tests.crash.inspection import inspect
from tests.crash.models import IN_ROUNDS, MODELS
from tests.crash.owner import Owner
from tests.crash.points import START, STOP
from tests.crash.reference import Reference
from tests.crash.violation import LOST, Violation
from tests.crash.wire import Lost
from tests.crash.workload import Worker

WORKERS = 8
TEAMS = (3, 3, 2, 2)
LONGEST_S = 3.0
"""A run that does not come to its point by then is killed wherever it is."""
RANDOM = "random"


def everyone(models, *others):
    """Workers who train all sessions; some own one."""
    return [
        Owner(models[index], "log", index, *others) if index < len(models)
        else Worker(index, *others)
        for index in range(WORKERS)
    ]  # fmt: skip


def teams(models, *others):
    """For each session some workers who train it alone; the first of them owns it."""
    found = []
    for model, size in zip(models, TEAMS, strict=True):
        for number in range(size):
            args = len(found), others[0], (model,), *others[2:]
            found.append(Contributor(*args) if number else Leader(model, "log", *args))
    return found


class Cast(NamedTuple):
    """What is trained, and by whom.

    Attributes:
        models: The sessions.
        size: How many workers there are.
        hire: Makes them, of the models and whatever a worker takes behind its index.
    """

    models: tuple
    size: int
    hire: object


ASYNC = Cast(MODELS, WORKERS, everyone)
ROUNDS = Cast(IN_ROUNDS, sum(TEAMS), teams)


class Report(NamedTuple):
    """How a campaign ended.

    Attributes:
        kills: In order.
        violations: All of them.
        events: The history.
        pushes: How many were acknowledged.
        seconds: How long it took, without the replay.
    """

    kills: list
    violations: list
    events: list
    pushes: int
    seconds: float


class Campaign:
    """Kills servers over one data folder.

    Args:
        fleet: Where servers come from.
        folder: The data folder.
        plan: Learns which points were passed.
        seed: Of the workload.
        cast: Sessions and workers.
        options: For every victim.
    """

    def __init__(self, fleet, folder, plan, seed, cast=ASYNC, **options):
        self.history = History()
        self._fleet = fleet
        self._folder = folder
        self._plan = plan
        self._rng = random.Random(f"campaign {seed}")
        self._models = cast.models
        self._options = options
        self._before = None
        self._made = False
        self._seconds = 0.0
        self._began = time.monotonic()
        self.violations = []
        """What was seen at once; the history tells the rest at the end."""
        self._door = Door(cast.size)
        self._workers = cast.hire(cast.models, seed, cast.models, self._door, self.history)
        for worker in self._workers:
            worker.start()

    def begin(self):
        """Kills the first server, again and again, at each point that only the first passes."""
        for point in self._plan.first:
            self.kill(f"{point}:1")

    def kill(self, kill):
        """One server and its end.

        Args:
            kill: `POINT:N`, or `random:SECONDS`.
        """
        server = self._fleet.start(self._folder, kill, **self._options)
        if self._is_ready(server):
            with contextlib.suppress(Lost):  # it may come to its point while it is looked at
                self._look(server)
                self._serve(server, kill.partition(":")[0])
        self._ended(server, kill)

    def _serve(self, server, phase):
        """Lets the workers at a server until it is gone."""
        if phase == START:  # it did not come to its point
            server.kill()
            return
        self._door.open(server.port)
        if phase == STOP:
            server.wait_gone(0.02 + 0.2 * self._rng.random())
            server.stop()
        if not server.wait_gone(LONGEST_S):
            server.kill()
        self._door.shut()

    def stop(self, after_s):
        """One server that is stopped in order, some time after it was ready."""
        server = self._started()
        self._door.open(server.port)
        server.wait_gone(after_s)
        self._end(server)
        self._door.shut()
        self._ended(server, None)

    def _end(self, server):
        server.stop()
        if not server.wait_gone(60):
            server.kill()
            self._wrong("a server does not stop")

    def _started(self):
        server = self._fleet.start(self._folder, **self._options)
        if not self._is_ready(server):
            raise AssertionError(f"a server ended with {server.exitcode}: {self._fleet.said()}")
        self._look(server)
        return server

    def _is_ready(self, server):
        ready = server.wait_ready()
        self._virgin = not self._made
        self._made = self._made or ready
        return ready

    def _look(self, server):
        for one in server.health.get("damaged", ()):
            self._wrong(f"{one['what']} ({one['where']})", one["session"], "damaged")
        damaged = {one["session"] for one in server.health.get("damaged", ())}
        models = [model for model in self._models if model.name not in damaged]
        inspect(server.port, models, self._workers, self.history)

    def _wrong(self, text, session="", check="check"):
        self.violations.append(Violation(LOST, check, session, time.monotonic(), text))

    def _ended(self, server, kill):
        if not server.wait_gone(60):
            server.kill()
            self._wrong("a server hung")
        killed, passed = server.told()
        if not server.killed and (server.exitcode or killed):
            self._wrong(f"a server ended with {server.exitcode}: {self._fleet.said()}")
        self.history.add(Kill(time.monotonic(), killed or (RANDOM if server.killed else STOP)))
        self._plan.done(kill, killed, passed, before=self._before, virgin=self._virgin)
        self._before = kill if killed not in (None, RANDOM) else None
        if self._made:
            self._check()

    def _check(self):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            status = fsck.run(self._folder)
        if status:
            self._wrong(told.getvalue())

    @property
    def kills(self):
        """How many servers were killed."""
        return len(self._killed)

    @property
    def _killed(self):
        return [kill for kill in self.history.of(Kill) if kill.point != STOP]

    @property
    def errors(self):
        """What went wrong in workers, beyond what the history tells."""
        return [worker.error for worker in self._workers if worker.error is not None]

    def finish(self, reference):
        """Lets everything be settled, stops, and says what was found.

        Args:
            reference: Replays the history.
        """
        server = self._started()
        self._door.open(server.port, last=True)
        for worker in self._workers:
            worker.join(60)
            if worker.is_alive():
                raise TimeoutError(f"{worker.name} does not settle what it began")
        self._look(server)
        self._end(server)
        self._check()
        self._seconds = time.monotonic() - self._began
        return self.report(reference)

    def report(self, reference=None):
        """What was found.

        Args:
            reference: Replays the history; None: bits are not compared.
        """
        for error in self.errors:
            self._wrong(repr(error), check="workers")
        models = {model.name: model for model in self._models}
        found = promises.check(self.history, {name: m.lr for name, m in models.items()})
        if reference is not None:
            found += reference.check(self.history, models)
        pushes = sum(len(view.applied) for view in views(self.history))
        found = self.violations + found
        return Report(self._killed, found, self.history.events, pushes, self._seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._door.abandon()
        for worker in self._workers:
            worker.join(60)


@contextlib.contextmanager
def reference_server(fleet):
    """A server that is not killed, and replays."""
    server = fleet.start()
    assert server.wait_ready()
    yield Reference(server.port)
    server.kill()


def survey(fleet, folder, plan):
    """Learns what is passed where there is no data folder yet."""
    server = fleet.start(folder)
    assert server.wait_ready()
    server.stop()
    assert server.wait_gone(60)
    plan.done(None, *server.told(), before=None, virgin=True)
