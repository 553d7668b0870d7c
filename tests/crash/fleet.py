"""Server processes, one after another, each a fork of one that has everything loaded.

A server of its own process needs 2 to 3 seconds for its imports; a fork is there in a tenth of
one. It is a process all the same: it shares no page that either side changes, and is killed alone.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from itertools import count
from pathlib import Path

from tests.crash import victim
from tests.crash.door import rest
from tests.crash.wire import Connection, Lost

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240
"""The first one may have kernels to compile."""


class Fleet:
    """Starts servers; to be used as a context, at whose end none is left.

    Args:
        folder: For logs and counts.
    """

    def __init__(self, folder):
        self._folder = folder
        self._log = folder / "victims.log"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.crash.preload"])
        self._running = []
        self._numbers = count()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self._running:
            server.kill()

    def start(self, data_dir=None, kill=None, **options):
        """A server process on its way.

        Args:
            data_dir: Its data folder; None: it has none.
            kill: Where it kills itself.
            options: Further ones of the victim.
        """
        counts = self._folder / f"counts-{next(self._numbers)}.json"
        arguments = ["--counts", str(counts)]
        given = {"data-dir": data_dir, "kill": kill, **options}
        for name, value in given.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=victim.child, args=(arguments, str(self._log), theirs), daemon=True
        )
        with clean_environment():
            process.start()
        theirs.close()
        self._running = [one for one in self._running if one.exitcode is None]
        self._running.append(Running(process, ours, counts))
        return self._running[-1]

    def said(self):
        """The end of what all servers have written."""
        return self._log.read_text()[-4000:]


@contextlib.contextmanager
def clean_environment():
    """What the first fork inherits: our modules, and none of the caller's settings."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("GRADPOST_"):
            del os.environ[name]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before.get("PYTHONPATH"))))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Running:
    """One server process.

    Attributes:
        port: Where it listens, once `wait_ready` has returned True.
        health: What it said of itself then.
        exitcode: As the operating system has it; None as long as nobody has seen its end.
    """

    def __init__(self, process, pipe, counts):
        self._process = process
        self._pipe = pipe
        self._counts = counts
        self.port = None
        self.health = None
        self.exitcode = None

    def wait_ready(self):
        """True once it is ready; False if it is gone before."""
        try:
            if not self._pipe.poll(PATIENCE_S):
                raise TimeoutError("a server says nothing")
            self.port = int(self._pipe.recv().rpartition(":")[2])
        except (EOFError, ConnectionResetError):
            return not self.wait_gone(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                with Connection(self.port) as connection:
                    answer = connection.ask("GET", "/health/ready")
            except Lost:
                if self.wait_gone(0.1):
                    return False
                continue
            self.health = answer.json
            if answer.status == 200:
                return True
            rest()
        raise TimeoutError(f"a server does not become ready: {self.health}")

    def wait_gone(self, timeout_s):
        """Whether it is gone within a time."""
        if self.exitcode is None:
            self._process.join(timeout_s)
            self.exitcode = self._process.exitcode
            if self.exitcode is not None:
                self._process.close()
                self._pipe.close()
        return self.exitcode is not None

    def stop(self):
        """Asks it to end in order."""
        if self.exitcode is None:
            self._process.terminate()

    def kill(self):
        """Ends it at once."""
        if self.exitcode is None:
            self._process.kill()
            self.wait_gone(PATIENCE_S)

    @property
    def killed(self):
        """Whether it was ended by SIGKILL."""
        return self.exitcode == -signal.SIGKILL

    def told(self):
        """Where it killed itself (None: it did not), and how often it passed each point."""
        try:
            found = json.loads(self._counts.read_text())
        except FileNotFoundError:  # killed from outside
            return None, {}
        return found["killed"], found["passed"]
