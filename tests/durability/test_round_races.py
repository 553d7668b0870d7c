"""What comes in the middle of a round: leaving, deleting, PATCHes, other kernels."""

import time

import numpy as np
import pytest

from service.errors import DiskFull
from service.sessions import contributions, image
from tests.api.conftest import GRADS, PARAMS, flat
from tests.api.test_rounds import SGD, SYNC, beside, contribute, make, moved, scaled
from tests.durability.conftest import Server

NESTED = {"rule": "sgd", "lr": 1.0, "momentum": 0.9}


def slowed(session):
    """Makes each commit of a session take so long that something may come in between."""
    commit = session.durable.journal.commit

    def slow(slots):
        time.sleep(0.3)
        return commit(slots)

    session.durable.journal.commit = slow


@pytest.mark.parametrize("durability", ["none", "log"])
def test_a_patch_that_does_not_go_with_a_rounds_overrides(start, durability):
    server = start()
    session = make(server, optimizer=NESTED, round_timeout_s=0.5,
                   options={"durability": durability})  # fmt: skip
    assert contribute(server, "a", overrides={"default": {"nesterov": True}}).status == 202
    patch = {"optimizer": {"dampening": 0.5}}
    assert server.call("PATCH", "/v1/sessions/m", patch).status == 200
    found = server.call("GET", "/v1/sessions/m/rounds/1", prefer="wait=2").json
    assert (found["status"], found["reason"]) == ("abandoned", "patch")
    assert session.broken is None
    assert contribute(server, "a", sequence=2).status == 202


@pytest.mark.parametrize("durability", ["none", "log"])
def test_a_patch_that_does_not_go_with_the_overrides_of_passes(start, durability):
    server = start()
    session = make(server, optimizer=NESTED, options={"durability": durability})
    overrides = {"default": {"nesterov": True}}
    assert contribute(server, "a", grads=None, weight=0, overrides=overrides).status == 202
    patch = {"optimizer": {"dampening": 0.5}}
    assert server.call("PATCH", "/v1/sessions/m", patch).status == 200
    server.call("PUT", "/v1/sessions/m/workers/b")
    assert server.call("DELETE", "/v1/sessions/m/workers/b").status == 204  # now nobody is missing
    found = server.call("GET", "/v1/sessions/m/rounds/1").json
    assert (found["status"], found["reason"], session.broken) == ("abandoned", "patch", None)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_worker_that_leaves_while_its_push_becomes_durable(start, mode):
    server = start()
    if mode == "sync":
        session = make(server, options={"durability": "log"})
    else:
        session = server.make("m", optimizer=SGD, durability="log")
    for worker in "ab":
        contribute(server, worker)
    version = session.version
    slowed(session)
    join = beside(lambda: contribute(server, "a", base=version))
    time.sleep(0.1)
    assert server.call("DELETE", "/v1/sessions/m/workers/a").status == 204
    assert join().status in (200, 202)  # it was there before
    assert session.broken is None
    assert [one.name for one in session.members.live()] == ["b"]
    assert contribute(server, "b", base=version).status == 200


def test_a_waiting_push_whose_worker_leaves_is_told_its_fate(start):
    server = start()
    session = make(server, workers=3)
    for worker in "bc":
        server.call("PUT", f"/v1/sessions/m/workers/{worker}")
    join = beside(lambda: contribute(server, "a", wait=2))
    while not session.rounds.waiting:
        time.sleep(0.002)
    assert server.call("DELETE", "/v1/sessions/m/workers/a").status == 204
    for worker in "bc":
        reply = contribute(server, worker)
    assert (reply.status, reply.json["contributions"]) == (200, 3)
    assert (join().status, join().json["applied"]) == (200, True)


def test_the_end_of_a_round_has_its_place_whatever_is_patched(start):
    server = start()
    many = {f"t{at:03}": [1.0] for at in range(200)}
    session = server.make("m", many, durability="log", update=SYNC)
    assert contribute(server, "a", grads=None, weight=0).status == 202
    assert server.call("PATCH", "/v1/sessions/m", {"missing": "skip"}).status == 200
    half = {name: value for at, (name, value) in enumerate(many.items()) if at % 2}
    reply = contribute(server, "b", grads=half)
    assert (reply.status, reply.json["applied"]) == (200, True)
    again = server.crashed()
    assert again.state_of() == server.state_of()
    assert session.broken is None
    again.close()


@pytest.mark.parametrize("durability", ["none", "snapshot", "log"])
def test_a_pass_to_a_session_without_parameters(start, durability):
    server = start()
    server.make("m", None, optimizer=SGD, update=SYNC, durability=durability)
    reply = contribute(server, "a", base=0, sequence=1, grads=None, weight=0)
    assert reply.json["type"] == "/problems/params-missing"


def test_a_norm_that_overflows_has_no_number_in_the_history(start):
    server = start()
    make(server, options={"dtype": "F64"})
    huge = {name: (np.ones(np.shape(value)) * 1e200).tolist() for name, value in PARAMS.items()}
    for worker in "ab":
        reply = contribute(server, worker, grads=huge)
    assert reply.json["applied"]
    steps = server.call("GET", "/v1/sessions/m/history").json["steps"]
    assert [step["grad_norm"] for step in steps] == [None, None]


def test_a_deletion_between_a_contribution_and_the_end_of_its_round(start, monkeypatch):
    server = start()
    session = make(server, workers=1, order="worker")
    take = contributions.take

    def taken(one, decided, **more):
        yield from take(one, decided, **more)
        one.deleted = True  # what DELETE does first, on the event loop

    monkeypatch.setattr(contributions, "take", taken)
    contribute(server, "a")
    monkeypatch.undo()
    session.deleted = False
    assert server.call("DELETE", "/v1/sessions/m").status == 204
    assert server.app.state.budget.used == 0


def test_a_failure_at_the_end_of_a_round_keeps_what_it_holds(start, monkeypatch):
    """The gradient is the round's: nobody may write into its buffer any more."""
    server = start()
    session = make(server, workers=2, order="worker", quorum=2)
    contribute(server, "a", grads=scaled(1))
    monkeypatch.setattr(contributions, "reduce", lambda *_: 1 / 0)
    assert contribute(server, "b", grads=scaled(3)).status == 500
    assert session.broken is not None
    assert contribute(server, "c").status == 500  # and nothing is built on it
    monkeypatch.undo()
    assert np.allclose(session.rounds.open.held[0].flat, flat(GRADS))


def test_an_open_round_outlives_an_upgrade_and_a_patch(start, monkeypatch):
    server = start()
    make(server, options={"durability": "log"})
    assert contribute(server, "a").status == 202
    assert server.call("PATCH", "/v1/sessions/m", {"optimizer": {"lr": 0.5}}).status == 200
    server.close()
    real = image.kernel_rev
    monkeypatch.setattr(image, "kernel_rev", lambda spec: real(spec)[::-1])
    again = Server(server.folder)
    assert contribute(again, "b").json["lr"] == 0.5
    assert np.allclose(moved(again), 0.5 * flat(GRADS))
    again.close()


def test_clocks_begin_alike_after_a_crash(start):
    server = start()
    server.make("m", optimizer=SGD, durability="log", update={"mode": "bounded", "slack": 2})
    for sequence in range(1, 7):
        contribute(server, "fast", sequence=sequence, wait=0)
    contribute(server, "slow", sequence=1, wait=0)
    again = server.crashed()
    clocks = {one.name: one.clock for one in again.app.state.sessions.get("m").members.all()}
    assert clocks == {"fast": 0, "slow": 0}
    again.close()


def test_a_deletion_that_finds_no_room_leaves_the_alarm_set(start):
    server = start()
    session = make(server, options={"durability": "log"}, round_timeout_s=0.6)
    contribute(server, "a")
    delete = session.durable.delete

    async def full(epoch):
        raise DiskFull("no room")

    session.durable.delete = full
    assert server.call("DELETE", "/v1/sessions/m").status == 507
    session.durable.delete = delete
    found = server.call("GET", "/v1/sessions/m/rounds/1", prefer="wait=2").json
    assert (found["status"], found["reason"]) == ("applied", "timeout")
