"""Servers in this process over a data folder, and what a crash leaves of one.

A copy of the folder, taken while no call is under way, is what kill -9 would leave; the crash
tests kill real processes.
"""

import asyncio
import itertools
import shutil
from pathlib import Path

import pytest

from service.settings import Settings
from service.storage.files import Files
from tests.api.conftest import Api
from tests.storage.counter import Scratch

COPIES = itertools.count()


class Server(Api):
    """An application over a folder."""

    def __init__(self, folder, files=None, **changes):
        settings = {
            "max_sessions": 999, "memory_bytes": 1 << 28, "wait_cap_s": 2, "log_level": "error",
            "threads": 2, "snapshot_interval_s": 3600, "warm_rules": (), **changes,
        }  # fmt: skip
        self.folder, self.changes = Path(folder), changes
        super().__init__(Settings(data_dir=self.folder, **settings), files)
        self.wait_ready()

    def wait_ready(self):
        while self.call("GET", "/health/ready").status != 200:
            pass

    def crashed(self):
        """A new server over what this one would leave if it were killed now."""
        self.on_loop(self._quiet())
        copy = self.folder.with_name(f"{self.folder.name}-{next(COPIES)}")
        shutil.copytree(self.folder, copy)
        return Server(copy, **self.changes)

    async def _quiet(self):
        """Waits for snapshots in the background: files that vanish can't be copied.

        A lane begins one when the answer that filled half of the log has gone out already.
        """
        await self.app.state.sessions.drain()
        for _, durable in self.app.state.sessions.durable():
            if durable._task is not None:
                await asyncio.wait([durable._task])

    def on_loop(self, work):
        """Runs a coroutine where the application runs."""
        return asyncio.run_coroutine_threadsafe(work, self.transport._loop).result(60)

    def close(self):
        self.transport.close()

    def restarted(self):
        """A new server over the folder, after a stop in order."""
        self.close()
        return Server(self.folder, **self.changes)

    def state_of(self, name="m"):
        """All that a recovery must bring back, to the bit."""
        session = self.app.state.sessions.get(name)
        contents = session.ledger.contents()
        arena = session.arena
        return {
            "params": None if arena is None else arena.versions.head.flat.tobytes(),
            "state": None if arena is None else [array.tobytes() for array in arena.state],
            "average": None if arena is None or arena.average is None else arena.average.tobytes(),
            "runs": None if arena is None else arena.runs,
            "layout": None if arena is None else arena.layout.entries,
            "at": session.at,
            "spec": session.spec,
            "created": session.created_with,
            "added": session.added,
            "revision": session.revision,
            "incarnation": session.incarnation,
            "ledger": [(one.name, one.highest, one.admitted) for one in contents.workers],
        }


@pytest.fixture
def scratch():
    with Scratch() as path:
        yield path


@pytest.fixture
def start(scratch):
    """Makes servers, and stops those that are left at the end."""
    begun = []

    def make(name="data", files=None, **changes):
        begun.append(Server(scratch / name, files and Files(files), **changes))
        return begun[-1]

    yield make
    for server in begun:
        server.close()


@pytest.fixture
def api_without_folder():
    api = Api(Settings(log_level="error"))
    yield api
    api.transport.close()
