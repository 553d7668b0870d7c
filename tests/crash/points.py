"""Named places at which a server may be killed: around its disk calls, and around its answers.

`phase:call.where.moment`, e.g. `run:fdatasync.RING_COMMIT.before`. The phase is `start` until the
server is ready, `stop` once it was asked to end, else `run`. Every passing is counted, and at the
N-th of one place the process kills itself: no `finally`, no buffer, no goodbye.

A record of a round has a place of its own, which says what the record is, and so has its sync. So
between two contributions lies `fdatasync.RING_COMMIT-contribution.after`, which is passed before
the contribution is taken; between the last one and the end of its round
`pwrite.ring-applied.before`; between that end and the update `fdatasync.RING_COMMIT-applied.after`;
between the update and the answers `answer.round.before`.
"""

import contextlib
import json
import os
import signal
import threading
from collections import Counter

from service.errors import ServiceError
from service.sessions.durable import IN_META
from service.sessions.records import unpack_close
from service.storage.files import Calls, Sync
from service.storage.header import PAGE, Header, Kind, parse

START, RUN, STOP = "start", "run", "stop"


class Points:
    """Counts passings, and kills at one of them.

    Args:
        kill: `POINT:N`; None: never.
        counts: Path of a file for the numbers of passings, written at the end; None: no file.
    """

    def __init__(self, kill=None, counts=None):
        self._name, _, number = (kill or "").rpartition(":")
        self._number = int(number or 0)
        self._counts = counts
        self._lock = threading.RLock()
        self.passed = Counter()
        self.phase = lambda: START

    def at(self, point, last=None):
        """Passes a place; `last` is done only if it is the one to be killed at."""
        name = f"{self.phase()}:{point}"
        with self._lock:
            self.passed[name] += 1
            if name != self._name or self.passed[name] != self._number:
                return
            if last is not None:
                last()
            self.die(name)

    def die(self, name):
        """Kills the process; the file says where, and what was passed before."""
        with self._lock:  # nobody passes a point meanwhile
            self.save(name)
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # the signal comes at once, but not to this very instruction

    def save(self, killed=None):
        """Writes the numbers, if there is a file for them."""
        if self._counts is None:
            return
        draft = f"{self._counts}.tmp"
        with self._lock, open(draft, "w") as file:
            json.dump({"killed": killed, "passed": self.passed}, file)
        os.replace(draft, self._counts)


class KillingCalls(Calls):
    """The real calls, with a place before and after each that changes something.

    Args:
        points: Where places are passed.
        root: The data folder.
        forget: After so many pages of records the disk keeps no further one, and no witness of it,
            and says nothing: by this a test sees that a loss is found. 0: an honest disk.
    """

    def __init__(self, points, root, forget=0):
        self._points = points
        self._root = root
        self._kinds = {}
        self._parts = {}
        self._forget = forget
        self._pages = 0

    @property
    def _forgets(self):
        return self._forget and self._pages > self._forget

    def _kind(self, path):
        return kind_of(self._root, path)

    @contextlib.contextmanager
    def _around(self, call, where):
        self._points.at(f"{call}.{where}.before")
        yield
        self._points.at(f"{call}.{where}.after")

    def open(self, path, flags):
        if not flags & os.O_CREAT:
            fd = super().open(path, flags)
        else:
            with self._around("open", self._kind(path)):
                fd = super().open(path, flags)
        self._kinds[fd] = self._kind(path)
        return fd

    def close(self, fd):
        self._kinds.pop(fd, None)
        self._parts.pop(fd, None)
        super().close(fd)

    def pwrite(self, fd, data, offset):
        where = self._kinds[fd]
        if where == "ring":
            where = "ring-page" if len(data) == PAGE else "ring-payload"
        if where == "ring-page" and offset:
            self._pages += 1
            if self._forgets:
                return len(data)
            part = self._parts[fd] = part_of(data)
            where = f"ring-{part}" if part else where
        with self._around("pwrite", where):
            half = max(len(data) // 2 - 1, 1)  # of a sector too
            self._points.at(
                f"pwrite.{where}.torn", lambda: os.pwrite(fd, memoryview(data)[:half], offset)
            )
            return super().pwrite(fd, data, offset)

    def allocate(self, fd, size):
        with self._around("allocate", self._kinds[fd]):
            super().allocate(fd, size)

    def truncate(self, fd, size):
        with self._around("truncate", self._kinds[fd]):
            super().truncate(fd, size)

    def fdatasync(self, fd, site):
        part = self._parts.get(fd) if site is Sync.RING_COMMIT else None
        with self._around("fdatasync", f"{site.name}-{part}" if part else site.name):
            super().fdatasync(fd, site)

    def fsync(self, fd, site):
        with self._around("fsync", site.name):
            super().fsync(fd, site)

    def fsync_folder(self, path, site):
        with self._around("fsync_folder", site.name):
            super().fsync_folder(path, site)

    def rename(self, source, target):
        with self._around("rename", self._kind(source)):
            super().rename(source, target)

    def unlink(self, path):
        with self._around("unlink", self._kind(path)):
            super().unlink(path)

    def mkdir(self, path):
        with self._around("mkdir", self._kind(path)):
            super().mkdir(path)

    def rmdir(self, path):
        with self._around("rmdir", self._kind(path)):
            super().rmdir(path)

    def connect(self, path):
        with self._around("connect", self._kind(path)):
            return super().connect(path)

    def commit(self, connection, site):
        if self._forgets and site is Sync.INDEX_WITNESS:
            connection.execute("ROLLBACK")
            return
        with self._around("commit", site.name):
            super().commit(connection, site)

    def checkpoint(self, connection, site):
        with self._around("checkpoint", site.name):
            super().checkpoint(connection, site)


def kind_of(root, path):
    """What a file or folder under a data folder is, without the number or id in its name."""
    if not path.is_relative_to(root) or path == root:
        return "data"
    top, *rest = path.relative_to(root).parts
    stem = path.name.partition("-")[0].partition(".")[0]
    if not rest:
        return stem
    if top == "sessions" and len(rest) == 1:
        return "creating" if path.name.endswith(".creating") else "session"
    if top == "sessions":
        return stem
    return f"{top}-{'draft' if not stem else len(rest)}"


def part_of(page):
    """What the record of a page is in a round: `contribution`, or how it ended; None: nothing."""
    header = parse(page)
    if not isinstance(header, Header):
        return None
    if header.kind is Kind.CONTRIBUTION:
        return "contribution"
    if header.kind is Kind.ROUND_CLOSE and header.meta[:1] == IN_META:
        return unpack_close(header.meta[1:]).status
    return None


PARTS = ("contribution", "applied", "skipped", "abandoned")
ROUND_POINTS = (
    *(f"{RUN}:pwrite.ring-{part}.{at}" for part in PARTS for at in ("before", "torn", "after")),
    *(f"{RUN}:fdatasync.RING_COMMIT-{part}.{at}" for part in PARTS for at in ("before", "after")),
    *(
        f"{RUN}:answer.{call}.{at}"
        for call in ("contribution", "round", "rounds", "bounded", "leave")
        for at in ("before", "half", "after")
    ),
)
"""Where rounds are made, and told of, while all is well."""
CALLS = {
    ("POST", "steps"): "steps",
    ("GET", "rounds"): "rounds",
    ("DELETE", "workers"): "leave",
    ("PUT", "params"): "params",
    ("PATCH", ""): "patch",
    ("PUT", ""): "create",
    ("DELETE", ""): "delete",
}


class Answering:
    """The application, with places around each answer that says that something was done.

    `half` lies between the head of an answer and its body. A push is `steps`; in a session with
    rounds `contribution` if its round is open, and `round` if it is over; or `bounded`.

    Args:
        app: The application.
        points: Where places are passed.
    """

    def __init__(self, app, points):
        self._app = app
        self._points = points

    async def __call__(self, scope, receive, send):
        call = None
        if scope["type"] == "http":
            name, _, rest = scope["path"].removeprefix("/v1/sessions/").partition("/")
            rest = rest.partition("/")[0] if rest.startswith(("rounds/", "workers/")) else rest
            call = CALLS.get((scope["method"], rest))
            mode = self._mode(name) if call == "steps" else ""
        if call is None:
            return await self._app(scope, receive, send)

        done = False

        async def tell(message):
            nonlocal done, call
            if message["type"] == "http.response.start":
                done = message["status"] < 300
                if mode == "sync":
                    call = "contribution" if message["status"] == 202 else "round"
                elif mode == "bounded":
                    call = mode
                self._pass(call, "before", done)
                await send(message)
                self._pass(call, "half", done)
            else:
                await send(message)
                self._pass(call, "after", done and not message.get("more_body"))

        await self._app(scope, receive, tell)

    def _mode(self, name):
        try:
            return self._app.state.sessions.get(name).spec.update.mode
        except ServiceError:
            return ""

    def _pass(self, call, moment, counts):
        if counts:
            self._points.at(f"answer.{call}.{moment}")
