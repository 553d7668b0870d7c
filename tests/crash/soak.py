"""Sixteen worker processes, killed at random, and a server, killed at random: `make soak`.

    python -m tests.crash.soak --seconds 60 --workers 16 --seed 1

A worker that was killed comes back under another id, and the server on the same folder. Each
worker writes its part of the history into a file of its own, each attempt before it is sent, so
that a kill takes nothing from it. At the end somebody else sends again what nobody knows the fate
of. The parts make one history (all times are of one clock), which is checked as that of a campaign
is: promises.py, agreement.py, and bit by bit reference.py. A table says what was done and found,
and the exit status is 1 if there was any violation.
"""

import argparse
import contextlib
import io
import pickle
import random
import shutil
import socket
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from service.storage import check as fsck
from tests.crash import agreement, promises
from tests.crash.campaign import reference_server
from tests.crash.contributor import Contributor
from tests.crash.door import rest
from tests.crash.fleet import Fleet
from tests.crash.history import NEVER, History, Kill, Life, Push, views
from tests.crash.inspection import inspect
from tests.crash.models import ARRIVAL, BOUNDED, MODELS, WORKER
from tests.crash.violation import BITS, DOUBLED, LOST, Violation
from tests.crash.wire import Connection
from tests.crash.workload import Call
from tests.storage.counter import Scratch

PATIENCE_S = 120
LIFE_S = (1.0, 4.0)
"""How long a server lives."""
PAUSE_S = (0.2, 1.0)
"""Between two kills of workers."""
WAIT_CAP_S = 2


def larger(model, **update):
    """A model for more workers, who leave leases behind when they are killed."""
    update = {**model.update, **update}
    return model._replace(spec={**model.spec, "log_slots": 64, "update": update})


SESSIONS = (
    larger(ARRIVAL, workers=5, min_contributions=3, round_timeout_s=0.3),
    larger(WORKER, workers=4, quorum=3, round_timeout_s=0.3),
    larger(BOUNDED),
    MODELS[0]._replace(name="async"),
)


class Gate:
    """What a worker process knows of the server: its port, and when to end. As `Door`."""

    shutting = False

    def __init__(self, port, ends):
        self.port = port
        self._ends = ends

    @property
    def closing(self):
        return time.monotonic() >= self._ends

    def wait(self, after):
        time.sleep(0.02)
        return after + 1, self.port

    def leave(self):
        pass


class Diary(History):
    """A history that is in a file at once.

    Args:
        path: Of the file.
    """

    def __init__(self, path):
        super().__init__()
        self._file = path.open("ab", buffering=0)  # one write for each event: all of it, or nothing

    def begin(self, attempt):
        self._file.write(pickle.dumps((attempt, False)))

    def add(self, event):
        self._file.write(pickle.dumps((event, True)))


def read(path, ended):
    """The events of a diary whose writer ended then."""
    events, begun = [], defaultdict(list)
    with path.open("rb") as file, contextlib.suppress(EOFError):
        while True:
            event, done = pickle.load(file)
            if not done:
                begun[event.session, event.key].append(event)
                continue
            events.append(event)
            if type(event) is Push and event.whole:
                begun[event.session, event.key].pop()
    left = [event for attempts in begun.values() for event in attempts]
    return events + [event._replace(returned=ended) for event in left]


def work(index, seed, model, port, ends, folder):
    """A worker process."""
    sys.stderr = (folder / "workers.log").open("a")
    worker = Contributor(index, seed, (model,), Gate(port, ends), Diary(folder / f"w{index}"))
    worker.run()
    if worker.error is not None:
        raise worker.error


class Report(NamedTuple):
    """How a soak ended.

    Attributes:
        violations: All of them.
        kills: Of servers, and of workers.
        views: Of the sessions.
        repeats: By session, how many answers were those of repeats.
        seconds: How long it took, without the replay.
    """

    violations: list
    kills: tuple
    views: list
    repeats: Counter
    seconds: float

    def __str__(self):
        columns = (LOST, DOUBLED, BITS)
        rows = [("session", "mode", "acknowledged", "repeats", "updates", "rounds", *columns)]
        rows += [("---", "---", *["--:"] * 7)]
        modes = {model.name: model.mode for model in SESSIONS}
        for view in self.views:
            rounds = Counter(one.status for one in agreement.over(view)) if view.in_rounds else {}
            ended = [f"{rounds[status]} {status}" for status in sorted(rounds)]
            applied = {fate.place for fate in view.applied if fate.summary["applied"]}
            found = Counter(v.column for v in self.violations if v.session == view.session)
            rows.append(
                (
                    view.session, modes[view.session],
                    sum(fate.acked < NEVER for fate in view.fates.values()),
                    self.repeats[view.session], len(applied), ", ".join(ended) or "-",
                    *(found[column] for column in columns),
                )
            )  # fmt: skip
        found = Counter(one.column for one in self.violations)
        total = sum(row[2] for row in rows[2:])
        updates = sum(row[4] for row in rows[2:])
        numbers = (total, self.repeats.total(), updates, "")
        rows.append(("all", "", *numbers, *(found[column] for column in columns)))
        servers, workers = self.kills
        return "\n".join(
            [
                *(f"| {' | '.join(map(str, row))} |" for row in rows),
                f"{servers} kills of the server, {workers} of workers, {self.seconds:.0f} s",
            ]
        )


class Soak:
    """Runs workers against a server, kills both, and asks what came of it.

    Args:
        fleet: Where servers come from.
        folder: For the data and the diaries.
        workers: How many there are at once.
        seed: Of kills and workload.
        options: For every victim.
    """

    def __init__(self, fleet, folder, workers, seed, **options):
        self._fleet, self._folder, self._workers = fleet, folder, workers
        self._seed, self._rng = seed, random.Random(f"soak {seed}")
        self._options = {**options, "port": free_port(), "wait_cap": WAIT_CAP_S}
        self._server = None
        self._processes = {}
        self._ends = {}
        self.history = History()
        self.violations = []

    def run(self, seconds, reference=None):
        """All of it.

        Args:
            seconds: For so long new work is begun.
            reference: Replays the history; None: bits are not compared.
        """
        began = time.monotonic()
        self._start()
        self._create()
        try:
            self._kill_at_random(began + seconds)
            self._await_workers()
        finally:
            for _, process in self._processes.values():
                process.kill()
        self._merge()
        self._settle()
        # Whoever is asked for is known by all of its ids.
        inspect(self._options["port"], SESSIONS, self._everyone(), self.history)
        self._stop()
        return self._report(time.monotonic() - began, reference)

    # Servers

    def _start(self):
        server = self._fleet.start(self._folder / "data", **self._options)
        if not server.wait_ready():
            raise AssertionError(f"a server ended with {server.exitcode}: {self._fleet.said()}")
        self._server = server
        for one in server.health.get("damaged", ()):
            self._wrong(f"{one['what']} ({one['where']})", one["session"], "damaged")

    def _restart(self):
        self._server.kill()
        self.history.add(Kill(time.monotonic(), "random"))
        self._check()
        self._start()
        inspect(self._options["port"], SESSIONS, (), self.history, standings=False)

    def _stop(self):
        self._server.stop()
        if not self._server.wait_gone(60):
            self._server.kill()
            self._wrong("a server does not stop")
        self._check()

    def _check(self):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            status = fsck.run(self._folder / "data")
        if status:
            self._wrong(told.getvalue())

    def _create(self):
        with Connection(self._options["port"]) as connection:
            for model in SESSIONS:
                path, began = f"/v1/sessions/{model.name}", time.monotonic()
                told = connection.ask("PUT", path, {**model.spec, "durability": "log"})
                assert told.status == 201, told
                body = model.upload(1)
                done = connection.ask(
                    "PUT", f"{path}/params", body.data, content_type=body.content_type
                )
                assert done.status == 200, done
                life = Life(model.name, told.json["incarnation"], began, time.monotonic(), True)
                self.history.add(life._replace(epoch=1, mark=1))

    # Workers

    def _hire(self, model):
        index = len(self._ends) + len(self._processes)
        arguments = index, self._seed, model, self._options["port"], self._until, self._folder
        process = self._fleet.context.Process(target=work, args=arguments, daemon=True)
        process.start()
        self._processes[index] = model, process

    def _kill_at_random(self, until):
        self._until = until
        for number in range(self._workers):
            self._hire(SESSIONS[number % len(SESSIONS)])
        server_ends = time.monotonic() + self._rng.uniform(*LIFE_S)
        while time.monotonic() < until:
            self._kill_worker()
            time.sleep(self._rng.uniform(*PAUSE_S))
            if time.monotonic() > server_ends:
                self._restart()
                server_ends = time.monotonic() + self._rng.uniform(*LIFE_S)

    def _kill_worker(self):
        index = self._rng.choice(sorted(self._processes))
        model, process = self._processes.pop(index)
        if process.exitcode is not None:
            self._gone(index, process)
        process.kill()
        process.join(10)
        self._ends[index] = time.monotonic(), True
        self._hire(model)

    def _await_workers(self):
        for index, (_, process) in self._processes.items():
            process.join(PATIENCE_S)
            if process.exitcode is None:
                self._wrong(f"w{index} does not come to its end", check="workers")
                process.kill()
                process.join(10)
            self._gone(index, process)
            self._ends[index] = time.monotonic(), False

    def _gone(self, index, process):
        if process.exitcode:
            log = (self._folder / "workers.log").read_text()[-2000:]
            self._wrong(f"w{index} ended with {process.exitcode}: {log}", check="workers")

    # The history

    def _merge(self):
        for index, (ended, _) in self._ends.items():
            path = self._folder / f"w{index}"
            if path.exists():
                self.history.events += read(path, ended)

    def _settle(self):
        """Sends again what nobody knows the fate of, in the name of those who were killed."""
        models = {model.name: model for model in SESSIONS}
        diary = History()
        with Connection(self._options["port"]) as connection:
            for view in views(self.history):
                for fate in view.fates.values():
                    if fate.open or (fate.joined and not fate.answers):
                        model = models[view.session]
                        first = fate.attempts[0]
                        call = Call(model, view.incarnation, *fate.key, first.base)
                        self._repeat(connection, call, diary)
        self.history.events += diary.events

    def _repeat(self, connection, call, diary):
        headers = {**call.headers, "prefer": f"wait={WAIT_CAP_S}"}
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            invoked = time.monotonic()
            answer = connection.ask("POST", call.path, call.body.data, **headers)
            push = call.attempt(invoked, time.monotonic())
            push = push._replace(status=answer.status, slug=answer.slug, summary=answer.json)
            diary.add(push)
            if answer.status != 202 and not promises.passing(push):
                return
            rest()
        self._wrong(f"{call.worker, call.sequence} can't be settled", call.model.name, "workers")

    def _everyone(self):
        """All workers, as `inspect` takes them."""
        names = {model.name: set() for model in SESSIONS}
        for push in self.history.of(Push):
            names[push.session].add(push.worker)
        return [_Team((model,), sorted(names[model.name])) for model in SESSIONS]

    def _wrong(self, text, session="", check="check"):
        self.violations.append(Violation(LOST, check, session, time.monotonic(), text))

    def _report(self, seconds, reference):
        models = {model.name: model for model in SESSIONS}
        found = promises.check(self.history, {name: model.lr for name, model in models.items()})
        if reference is not None:
            found += reference.check(self.history, models)
        repeats = Counter()
        for push in self.history.of(Push):
            repeats[push.session] += bool(push.summary and push.summary.get("replayed"))
        kills = len(self.history.of(Kill)), sum(killed for _, killed in self._ends.values())
        found = self.violations + found
        return Report(found, kills, views(self.history), repeats, seconds)


class _Team(NamedTuple):
    models: tuple
    names: list


def free_port():
    """A port that is free, and no client's own: one that connects to itself finds a server."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def main(arguments=None):
    options = parser().parse_args(arguments)
    with Scratch() as folder, Fleet(folder) as fleet, reference_server(fleet) as reference:
        soak = Soak(fleet, folder, options.workers, options.seed, fault=options.fault)
        report = soak.run(options.seconds, reference)
        if report.violations and options.keep:
            shutil.copytree(folder, options.keep)
            (options.keep / "history.txt").write_text("\n".join(map(str, soak.history.events)))
    for violation in report.violations[:20]:
        print(violation, file=sys.stderr)
    print(report)
    return 1 if report.violations else 0


def parser():
    made = argparse.ArgumentParser(prog="python -m tests.crash.soak")
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--workers", type=int, default=16)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--keep", type=Path, help="where the folder goes when something is wrong")
    made.add_argument("--fault", help="a server that breaks a promise: see faults.py")
    return made


if __name__ == "__main__":
    sys.exit(main())
