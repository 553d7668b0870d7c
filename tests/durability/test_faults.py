"""Disks that are full, fail, or hold something else than was written."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kernels.pool import Waits
from service.app import create_app
from service.errors import SessionGone
from service.schemas import parse_control
from service.sessions import disk, image
from service.sessions.pushes import Gradient
from service.settings import Settings
from service.storage.failures import Refused
from service.storage.files import Calls, Sync
from tests.api.conftest import PARAMS, check_problem
from tests.durability import failing
from tests.durability.test_recovery import make, push_some

ROOT = Path(__file__).resolve().parents[2]


class Full(Calls):
    """A disk that has no room while `full` is set."""

    full = False

    def _check(self):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def allocate(self, fd, size):
        self._check()
        super().allocate(fd, size)

    def rename(self, source, target):
        if "snap-" in target.name:
            self._check()
        super().rename(source, target)


class Counting(Calls):
    """Counts the syncs of the log, and holds the first one up."""

    def __init__(self):
        self.commits = 0
        self.held = threading.Event()
        self.hold = False

    def fdatasync(self, fd, site):
        if site is Sync.RING_COMMIT:
            self.commits += 1
            if self.hold:
                self.held.wait(60)
        super().fdatasync(fd, site)


def test_a_full_disk_refuses_a_creation_and_an_upload_and_nothing_has_happened(start):
    calls = Full()
    server = start(files=calls)
    make(server, name="old")
    used = server.app.state.budget.used
    calls.full = True
    body = {"optimizer": {"rule": "adam"}, "durability": "log", "params": PARAMS}
    for method, path in (("PUT", "/v1/sessions/new"), ("POST", "/v1/sessions")):
        problem = check_problem(server.call(method, path, body), 507, "disk-full")
        assert "Make room" in problem["detail"]
    check_problem(server.call("GET", "/v1/sessions/new"), 404, "session-unknown")
    before = server.state_of("old")
    check_problem(
        server.call("PUT", "/v1/sessions/old/params", {"params": {"s": 1.0}}), 507, "disk-full"
    )
    assert server.state_of("old") == before
    assert server.app.state.budget.used == used
    calls.full = False
    assert server.call("PUT", "/v1/sessions/new", body).status == 201
    again = server.crashed()
    assert again.state_of("old") == before
    assert again.state_of("new") == server.state_of("new")
    again.close()


def test_a_session_goes_on_without_room_for_snapshots_until_its_log_is_full(start):
    calls = Full()
    server = start(files=calls)
    make(server)
    calls.full = True
    statuses = []
    for sequence in range(1, 9):
        reply = server.push(worker="w", sequence=sequence, base_version=1)
        statuses.append(reply.status)
        if reply.status != 200:
            assert check_problem(reply, 429, "log-full")["log_slots"] == 5
            assert "room" in reply.json["detail"]
    assert statuses == [200] * 5 + [429] * 3
    found = server.state_of()
    again = server.crashed()
    assert again.state_of() == found
    again.close()
    calls.full = False
    server.app.state.sessions.get("m").durable.saved_at -= 60  # the pause is over
    reply = server.push(worker="w", sequence=6, base_version=1)
    assert (reply.status, reply.json["step"]) == (200, 6)


@pytest.mark.parametrize("site", ["RING_COMMIT", "SNAPSHOT", "INDEX_NAME", "SNAPSHOT_FOLDER"])
def test_a_failed_sync_ends_the_process_and_nothing_that_was_answered_is_lost(start, scratch, site):
    command = [sys.executable, "-m", "tests.durability.failing", str(scratch / "data"), site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == disk.EXIT, done
    (found,) = done.stdout.split()
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["level"] == "critical"
    assert "Input/output error" in json.loads(line)["error"]
    again = start()
    if site == "RING_COMMIT":  # it was written, and nobody knows; its retry settles it
        assert again.app.state.sessions.get("m").step in (2, 3)
        assert again.push(worker="w", sequence=9, base_version=1).json["step"] == 3
    else:
        assert failing.digest(again) == found


def test_pushes_that_wait_share_a_sync(start):
    calls = Counting()
    server = start(files=calls)
    make(server)
    calls.commits, calls.hold = 0, True
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(server.push, worker="a", sequence=1, base_version=1)
        while not calls.commits:
            pass
        rest = [
            threads.submit(server.push, worker=f"w{n}", sequence=1, base_version=1)
            for n in range(4)
        ]
        queue = server.app.state.sessions.get("m").queue
        while len(queue._waiting) < 4:
            pass
        calls.held.set()
        steps = sorted(one.result().json["step"] for one in [first, *rest])
    assert steps == [1, 2, 3, 4, 5]
    assert calls.commits == 2


def test_a_repeat_in_the_same_group_is_a_replay(start):
    calls = Counting()
    server = start(files=calls)
    make(server)
    calls.commits, calls.hold = 0, True
    key = {"worker": "w", "sequence": 1, "base_version": 1}
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(server.push, worker="a", sequence=1, base_version=1)
        while not calls.commits:
            pass
        twins = [threads.submit(server.push, **key) for _ in range(3)]
        queue = server.app.state.sessions.get("m").queue
        while len(queue._waiting) < 3:
            pass
        calls.held.set()
        answers = [one.result().json for one in twins]
        assert first.result().json["step"] == 1
    assert sorted(answer["replayed"] for answer in answers) == [False, True, True]
    assert {answer["step"] for answer in answers} == {2}
    assert server.app.state.sessions.get("m").step == 2


def spoil(path, at=-20):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_damaged_session_of_many_stops_no_other(start):
    server = start()
    for number in range(64):
        make(
            server, ("sgd", "adam")[number % 2], f"s{number}", ("log", "snapshot")[number % 3 == 0]
        )
    push_some(server, 2, name="s7")
    push_some(server, 2, name="s8")
    found = {f"s{n}": server.state_of(f"s{n}") for n in range(64)}
    hit = server.app.state.sessions.get("s9").durable.journal.row
    folder = server.folder
    server.close()
    spoil(folder / "sessions" / hit.uuid.hex() / hit.snapshot)
    again = start()
    ready = again.call("GET", "/health/ready")
    assert ready.status == 200
    (damage,) = ready.json["damaged"]
    assert damage["session"] == "s9"
    assert "not what was written" in damage["what"]
    for name, state in found.items():
        if name == "s9":
            reply = again.call("GET", f"/v1/sessions/{name}")
            assert (reply.status, reply.json["where"]) == (503, damage["where"])
        else:
            assert again.state_of(name) == state
    assert again.push("s8", worker="n", sequence=1, base_version=f"{found['s8']['at'].epoch}-1")


def test_a_folder_is_held_by_one_server(start, capsys):
    server = start()
    with pytest.raises(Refused, match=f"process {os.getpid()}"):
        create_app(Settings(data_dir=server.folder))
    server.close()
    create_app(Settings(data_dir=server.folder)).state.sessions.shared.disk.close()


def test_folders_that_can_not_be_had(start, scratch):
    server = start()
    server.close()
    (server.folder / "FORMAT").write_bytes(b"gradpost data 9\n")
    with pytest.raises(Refused, match="newer"):
        create_app(Settings(data_dir=server.folder))
    with pytest.raises(Refused, match="no folder"):
        create_app(Settings(data_dir=scratch / "nowhere" / "data"))
    with pytest.raises(ValueError, match="GRADPOST_DATA_DIR"):
        Settings(durability="log")


def test_recovering_sessions_say_so(start):
    server = start()
    make(server)
    sessions = server.app.state.sessions
    sessions._pending = {"later"}
    assert server.call("GET", "/health/ready").json["pending"] == ["recovery of session later"]
    for call in (
        ("GET", "/v1/sessions/later"),
        ("PUT", "/v1/sessions/later", {"optimizer": {"rule": "adam"}}),
    ):
        reply = server.call(*call)
        assert (reply.status, reply.json["type"]) == (503, "/problems/recovering")
        assert reply.json["retryable"]
        assert reply.headers["retry-after"] == "1"
    sessions._pending = set()


def test_what_a_session_reserves_is_in_its_description(start):
    server = start()
    make(server)
    found = json.loads(server.call("GET", "/v1/sessions/m").body)["bytes"]
    journal = server.app.state.sessions.get("m").durable.journal
    assert found["disk"] == 2 * journal.row.reserved + journal.ring.shape.size
    assert found["disk"] > 5 * found["gradient"]


def test_a_push_that_is_durable_is_applied_before_a_deletion(start):
    """A refusal would be a lie: after a crash that comes before the tombstone it is there."""
    calls = Counting()
    server = start(files=calls)
    session = make(server)
    calls.commits, calls.hold = 0, True
    with ThreadPoolExecutor(2) as threads:
        push = threads.submit(server.push, worker="a", sequence=1, base_version=1)
        while not calls.commits:
            pass
        deletion = threads.submit(server.call, "DELETE", "/v1/sessions/m")
        while not session.deleted:
            pass
        calls.held.set()
        assert push.result().status == 200
        assert deletion.result().status == 204


def test_pushes_that_wait_for_room_end_with_their_session(start):
    calls = Full()
    server = start(files=calls)
    session = make(server)
    calls.full = True
    for sequence in range(1, 6):
        assert server.push(worker="w", sequence=sequence, base_version=1).status == 200

    async def hold():
        """The lane is busy while a push and then a deletion come."""
        return session.lane.submit(waits())

    def waits():
        yield Waits([held.wait])

    held = threading.Event()
    server.on_loop(hold())
    with ThreadPoolExecutor(2) as threads:
        push = threads.submit(server.push, worker="w", sequence=6, base_version=1)
        while not session.queue._waiting:
            pass
        session.durable.trouble = None
        calls.full = False
        deletion = threads.submit(server.call, "DELETE", "/v1/sessions/m")
        while not session.deleted:
            pass
        held.set()
        check_problem(push.result(), 410, "session-gone")
        assert deletion.result().status == 204


def test_a_deletion_waits_for_the_creation(start):
    class Slow(Calls):
        def __init__(self):
            self.begun, self.go = threading.Event(), threading.Event()
            self.go.set()

        def commit(self, connection, site):
            if site is Sync.INDEX_CREATE:
                self.begun.set()
                assert self.go.wait(60)
            super().commit(connection, site)

    calls = Slow()
    server = start(files=calls)
    calls.go.clear()
    body = {"optimizer": {"rule": "adam"}, "durability": "log"}
    with ThreadPoolExecutor(3) as threads:
        creation = threads.submit(server.call, "PUT", "/v1/sessions/m", body)
        assert calls.begun.wait(60)
        check_problem(server.push("m"), 409, "in-flight")
        deletion = threads.submit(server.call, "DELETE", "/v1/sessions/m")
        attaching = threads.submit(server.call, "PUT", "/v1/sessions/m", body)
        calls.go.set()
        assert creation.result().status == 201
        assert deletion.result().status == 204
        assert attaching.result().status in (200, 201, 409)
    server.call("DELETE", "/v1/sessions/m")
    assert server.call("PUT", "/v1/sessions/m", body).status == 201
    again = server.crashed()
    assert again.call("GET", "/v1/sessions/m").status == 200
    again.close()


def test_a_push_that_ends_behind_a_deletion_is_told_so(start):
    server = start()
    session = make(server)

    async def late():
        gradient = Gradient(np.ones(9, np.float32), "F32", parse_control({}, text=False), list)
        await session.delete()
        await session.push(gradient, hold=False)

    with pytest.raises(SessionGone):
        server.on_loop(late())


def test_one_session_that_can_not_be_saved_costs_no_other_its_stop(start, monkeypatch):
    server = start()
    for name in ("a", "b"):
        make(server, name=name, durability="snapshot")
        push_some(server, 2, name=name)
    kept = server.state_of("b")
    first = server.app.state.sessions.get("a")
    whole = image.buffers

    def fails(like):
        if any(one is first.arena.versions.head.flat for one in like):
            raise MemoryError("no room")
        return whole(like)

    monkeypatch.setattr(image, "buffers", fails)
    server = server.restarted()
    assert server.state_of("b") == kept
    assert server.state_of("a")["at"] == (2, 1, 0)
    server.close()


def test_a_full_disk_at_the_start_costs_only_who_needs_it(start):
    class Full(Calls):
        full = False

        def commit(self, connection, site):
            if self.full and site is Sync.INDEX_NAME:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().commit(connection, site)

    server = start()
    make(server, name="logs")
    make(server, name="saved", durability="snapshot")
    push_some(server, 2, name="logs")
    copy = server.crashed()
    copy.close()
    calls = Full()
    calls.full = True
    again = start(copy.folder.name, files=calls)
    (damage,) = again.call("GET", "/health/ready").json["damaged"]
    assert damage["session"] == "saved"
    assert again.app.state.sessions.get("logs").step == 2
    used = again.app.state.budget.used
    assert used == again.app.state.sessions.get("logs").arena.reserved
    calls.full = False


def test_an_unexpected_failure_leaves_no_push_waiting(start, monkeypatch):
    """Not the one it hit, not those before it, not a repeat that had to wait for its first."""
    calls = Counting()
    server = start(files=calls)
    session = make(server)
    calls.commits, calls.hold = 0, True
    reserve, counted = session.durable.reserve, []

    def fails():
        counted.append(True)
        if len(counted) == 2:
            raise RuntimeError("no place")
        return reserve()

    key = {"worker": "w", "sequence": 1, "base_version": 1}
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(server.push, worker="a", sequence=1, base_version=1)
        while not calls.commits:
            pass
        rest = [threads.submit(server.push, **key) for _ in range(2)]
        while len(session.queue._waiting) < 2:
            pass
        rest.append(threads.submit(server.push, worker="b", sequence=1, base_version=1))
        while len(session.queue._waiting) < 3:
            pass
        monkeypatch.setattr(session.durable, "reserve", fails)
        calls.held.set()
        assert first.result(60).status == 200
        assert [one.result(60).status for one in rest] == [500] * 3
    assert (session.step, session.broken) == (1, None)  # nothing of them was durable
    monkeypatch.undo()
    assert server.push(**key).json["step"] == 2
    assert session.durable.journal.ring.free()[1] == 3
