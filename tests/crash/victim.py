"""A server process that kills itself at a named point.

    python -m tests.crash.victim --data-dir D --port 0 --kill run:fdatasync.RING_COMMIT.before:3

`--kill random:SECONDS` kills at no particular point, so long after the server was ready. With
`--counts` a file says how often each point was passed, also if the process was killed.
"""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from service.__main__ import Server, configuration
from service.app import create_app
from service.settings import Settings
from service.storage.files import Files
from tests.crash.faults import FAULTS
from tests.crash.points import RUN, START, STOP, Answering, KillingCalls, Points


def main(arguments=None, announce=None):
    options = parser().parse_args(arguments)
    if options.fault is not None:
        FAULTS[options.fault]()
    random = options.kill and options.kill.startswith("random:")
    points = Points(None if random else options.kill, options.counts)
    settings = Settings(
        data_dir=options.data_dir, port=options.port, warm_rules=(), log_level="warning",
        snapshot_interval_s=options.snapshot_interval, wait_cap_s=options.wait_cap,
    )  # fmt: skip
    calls = None
    if options.data_dir is not None:
        calls = KillingCalls(points, options.data_dir, options.forget)
    app = create_app(settings, Files(calls))
    watch(app, points)
    if random:
        after = float(options.kill.partition(":")[2])
        threading.Thread(target=kill_later, args=(points, after), daemon=True).start()
    server = Announcing(configuration(Answering(app, points), settings), app)
    server.announce = announce
    # uvicorn raises the signal again once it has drained, and then the default would end us.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.setswitchinterval(0.0005)  # as `serve` does
    server.run()
    points.save()


def parser():
    made = argparse.ArgumentParser(prog="python -m tests.crash.victim")
    made.add_argument("--data-dir", type=Path)
    made.add_argument("--port", type=int, default=0)
    made.add_argument("--kill", metavar="POINT:N", help="or random:SECONDS")
    made.add_argument("--counts", type=Path, help="file for the numbers of passings")
    made.add_argument("--forget", type=int, default=0, help="lose all records after so many")
    made.add_argument("--fault", choices=FAULTS, help="break a promise: see faults.py")
    made.add_argument("--snapshot-interval", type=float, default=60.0)
    made.add_argument("--wait-cap", type=float, default=60.0)
    return made


def watch(app, points):
    """Lets the points know what the server is about."""
    ready = app.state.ready
    phase = START

    def of():
        nonlocal phase
        if phase == START and ready.ready:
            phase = RUN
        return STOP if ready.stopping else phase

    points.phase = of


def kill_later(points, after):
    while points.phase() == START:
        time.sleep(0.002)
    time.sleep(after)
    points.die("random")


class Announcing(Server):
    """Tells the parent where it listens, not only whoever reads the output."""

    announce = None

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started and self.announce is not None:
            self.announce(self.address())


def child(arguments, log, pipe):
    """A victim in a forked process: ends with its parent, and writes into a file."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)

    def outlived():
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=outlived, daemon=True).start()
    main(arguments, pipe.send)


if __name__ == "__main__":
    main()
