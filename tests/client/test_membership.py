"""A worker's place: joined, renewed by a thread, left; and what may go wrong with each."""

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from gradpost import DeadlineExceeded, InProcess, RetryPolicy, Session, TransportError, errors
from gradpost.calls import Calls
from gradpost.membership import Membership
from gradpost.retry import Retrier
from tests.client.fake import Fake
from tests.client.scripted import Clock, Scripted, answer, problem

PARAMS = {"w": np.float32([1, 2])}
SYNC = {"mode": "sync", "workers": 2, "round_timeout_s": 60}
ROOT = Path(__file__).parents[2]
FORKING = "ignore:This process:DeprecationWarning"  # of a process with threads, from 3.12 on
PROMPT = RetryPolicy(deadline_s=5.0, base_s=0.001, cap_s=0.002)


def joined(lease_s=60.0):
    return answer(200, {"worker": "w", "lease_s": lease_s})


class Counting(Scripted):
    """Lets a test wait for the n-th request."""

    def __init__(self, *script):
        super().__init__(*script)
        self._changed = threading.Condition()

    def request(self, *arguments):
        try:
            return super().request(*arguments)
        finally:
            with self._changed:
                self._changed.notify_all()

    def reach(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.sent) >= count, 30)


def member(transport, policy=PROMPT):
    return Membership("m", "w", Calls(transport, None), Retrier(policy, 1))


def methods(transport):
    return [one.method for one in transport.sent]


def renewing():
    return {one for one in threading.enumerate() if one.name == "gradpost-lease"}


@pytest.mark.parametrize(
    ("update", "join", "joins"),
    [
        (None, None, False),
        ({"max_staleness": 3}, None, False),
        (None, True, True),
        (SYNC, None, True),
        ({"mode": "bounded", "slack": 2}, None, True),
        (SYNC, False, False),
    ],
)
@pytest.mark.parametrize("attach", [False, True])
def test_who_joins(update, join, joins, attach):
    fake = Fake()
    session = Session.create(fake, "m", params=PARAMS, rule="sgd", update=update, join=join)
    if attach:
        session.close()
        fake.sent.clear()
        session = Session.attach(fake, "m", join=join, worker="late")
        assert session.worker.startswith("late-")
    assert (session.worker in fake.live) is joins
    session.pull()
    assert (f"worker={session.worker}" in fake.paths("GET", "/params")[-1]) is joins
    session.close()
    assert session.worker not in fake.live
    left = [f"/v1/sessions/m/workers/{session.worker}"] if joins else []
    assert fake.paths("DELETE") == left


def test_a_session_that_fails_to_join_is_closed():
    fake, before = Fake(), renewing()
    with fake.lose("PUT", "/workers/", TransportError("no")), pytest.raises(DeadlineExceeded):
        Session.create(
            fake, "m", params=PARAMS, rule="sgd", update=SYNC,
            policy=RetryPolicy(deadline_s=0.01, base_s=0.001),
        )  # fmt: skip
    assert renewing() <= before


def test_it_renews_until_it_is_closed():
    transport = Counting(lambda: joined(0.006))
    place = member(transport)
    place.join()
    transport.reach(4)
    assert {one.path for one in transport.sent} == {"/v1/sessions/m/workers/w"}
    assert {one.body for one in transport.sent} == {b""}
    thread, before = place._thread, renewing()
    assert thread.daemon
    place.join()  # once more is a renewal, not another thread
    assert place._thread is thread
    assert renewing() <= before
    place.leave()
    assert not thread.is_alive()
    count = len(transport.sent)
    assert methods(transport)[-1] == "DELETE"
    assert methods(transport).count("DELETE") == 1
    place.leave()
    assert len(transport.sent) == count


def test_the_lease_says_how_often():
    clock = Clock()
    place = member(Scripted(joined(90.0)), RetryPolicy(sleep=clock.sleep, clock=clock))
    place.join()
    assert place.pause_s == 30.0
    place.stop()


def test_failures_are_logged_once_until_it_works_again(caplog):
    transport = Counting(joined())
    place = member(transport)
    place.join()
    place.stop()
    with caplog.at_level(logging.WARNING, "gradpost"):
        transport.script = [TransportError("no"), ValueError("odd"), lambda: answer(502)]
        assert [place.renew() for _ in range(3)] == [True] * 3
        assert len(caplog.records) == 1
        assert "lease of w" in caplog.text
        transport.script = [joined, TransportError("no")]
        assert [place.renew() for _ in range(2)] == [True] * 2
        assert len(caplog.records) == 2


@pytest.mark.parametrize(("status", "slug"), [(409, "worker-retired"), (410, "session-gone")])
def test_a_place_that_is_gone_for_good_is_renewed_no_more(status, slug, caplog):
    transport = Counting(lambda: joined(0.003), lambda: problem(status, slug))
    place = member(transport)
    place.join()
    place._thread.join(30)
    assert not place._thread.is_alive()
    assert slug in caplog.text
    place.leave()
    assert methods(transport) == ["PUT", "PUT"]


def test_a_retired_worker_is_told_what_to_do():
    with pytest.raises(errors.WorkerRetired) as caught:
        member(Scripted(lambda: problem(409, "worker-retired"))).join()
    assert "another Session" in caught.value.__notes__[0]
    fake = Fake()
    session = Session.create(fake, "m", params=PARAMS, rule="sgd", update=SYNC)
    session.close()
    again = Session(fake, "m")
    again.worker = session.worker
    with pytest.raises(errors.WorkerRetired):
        again.push(PARAMS, base_version=(1, 1))


def test_a_join_is_retried():
    transport = Scripted(TransportError("no"), lambda: answer(503), joined())
    place = member(transport)
    place.join()
    assert methods(transport) == ["PUT"] * 3
    place.stop()


@pytest.mark.parametrize("failure", [TransportError("no"), ValueError])
def test_leaving_is_tried_for_a_short_time_only(failure):
    clock = Clock()
    transport = Scripted(joined())
    place = member(transport, RetryPolicy(deadline_s=600.0, sleep=clock.sleep, clock=clock))
    place.join()
    failed = failure if isinstance(failure, Exception) else (lambda: problem(404, "not-found"))
    transport.script = [failed]
    before = clock.now
    place.leave()
    assert clock.now - before <= 2.0
    assert max(transport.timeouts[1:]) <= 2.0
    assert not place.joined


def test_closing_leaves_after_what_runs_in_the_background():
    fake = Fake()
    session = Session.create(fake, "m", params=PARAMS, rule="sgd", update={**SYNC, "workers": 1})
    session.pull()
    future = session.push_async(PARAMS)
    session.close()
    assert future.result(0).step == 1
    order = [method for method, path, _, _ in fake.sent if "steps" in path or method == "DELETE"]
    assert order == ["POST", "DELETE"]


def test_a_worker_that_leaves_is_waited_for_no_more():
    fake = Fake()
    one = Session.create(fake, "m", params=PARAMS, rule="sgd", update=SYNC)
    two = Session.create(fake, "m", params=PARAMS, rule="sgd", update=SYNC)
    one.pull()
    sent = one.push(PARAMS, wait=False)
    two.close()
    assert one.wait(sent).contributions == 1
    one.close()


def test_a_session_that_nobody_holds_is_renewed_no_more():
    fake = Fake(lease_s=0.01)
    session = Session.create(fake, "m", params=PARAMS, rule="sgd", update=SYNC)
    thread = session._membership._thread
    known = weakref.ref(session)
    del session
    gc.collect()
    assert known() is None
    thread.join(30)
    assert not thread.is_alive()
    assert not fake.paths("DELETE")  # a destructor is no place for calls


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_no_place():
    code = """
import os, threading
import numpy as np
from gradpost import Session
from tests.client.fake import Fake
fake = Fake(lease_s=0.01)
session = Session.create(fake, "m", params={"w": np.float32([1])}, rule="sgd",
                         update={"mode": "sync", "workers": 1, "round_timeout_s": 60})
session._membership._lock.acquire()  # as the thread may hold it in that moment
child = os.fork()
if child == 0:
    alone = threading.active_count() == 1
    session.close()
    own = Session.attach(fake, "m")
    session_left = any("DELETE" == method for method, *_ in fake.sent)
    own.close()
    os._exit(0 if alone and not session_left else 1)
session._membership._lock.release()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert session.worker in fake.live
session.close()
assert session.worker not in fake.live
print("done")
"""
    assert run(code) == "done"


def test_the_end_of_the_interpreter_waits_for_nobody():
    code = """
import numpy as np
from gradpost import Session
from tests.client.fake import Fake
fake = Fake(lease_s=3600.0)
session = Session.create(fake, "m", params={"w": np.float32([1])}, rule="sgd",
                         update={"mode": "sync", "workers": 1, "round_timeout_s": 60})
print("done")
"""
    assert run(code) == "done"


def run(code):
    """In a process of its own, warnings as errors."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'client' / 'src'}"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-W", FORKING, "-c", code],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not found.stderr
    assert found.returncode == 0
    return found.stdout.strip()


def test_a_request_without_a_body_says_so_in_process():
    seen = {}

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return
        seen[scope["method"]] = dict(scope["headers"]).get(b"content-length")
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with InProcess(app) as transport:
        for method in ("POST", "PUT", "GET", "DELETE"):
            transport.request(method, "/", {}, [], 5.0).release()
    assert seen == {"POST": b"0", "PUT": b"0", "GET": None, "DELETE": None}


def test_a_request_without_a_body_says_so_over_http(url):
    with Session.create(url, params=PARAMS, rule="sgd") as session:
        session.pull()
        with pytest.raises(errors.RefusedError) as caught:
            session.skip_round()
        assert not isinstance(caught.value, errors.LengthRequired)
        session.delete()
