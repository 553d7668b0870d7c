"""Rounds over crashes: an open one comes back with its contributions, a closed one stays closed."""

import numpy as np
import pytest

from tests.api.conftest import PARAMS, check_problem

SYNC = {"mode": "sync", "workers": 3, "round_timeout_s": 600}
KINDS = {
    "arrival": {},
    "worker": {"order": "worker"},
    "median": {"reduce": "median"},
    "trimmed": {"reduce": "trimmed_mean", "trim": 0.34},
    "sum, clipped": {"reduce": "sum", "max_norm": 1.0, "on_max_norm": "clip"},
}
OPTIONS = {
    "plain": {},
    "skip": {"missing": "skip", "on_nonfinite": "skip"},
    "around": {"clip": {"global_norm": 0.5}, "ema": {"decay": 0.5}, "norms": True,
               "schedule": {"kind": "cosine", "warmup_steps": 2, "total_steps": 9}},
    "double": {"dtype": "F64", "push": "delta"},
}  # fmt: skip


def make(server, name="m", durability="log", options=(), **update):
    fields = {"durability": durability, "update": {**SYNC, **update}, **dict(options)}
    return server.make(name, optimizer={"rule": "adam", "lr": 0.1}, **fields)


def contribute(server, worker, sequence, base, name="m", **control):
    rng = np.random.default_rng([sequence, *worker.encode()])
    grads = {key: rng.standard_normal(np.shape(value)).tolist() for key, value in PARAMS.items()}
    missing = control.pop("missing", None)
    if missing is not None:
        del grads[missing]
    if control.get("weight") == 0:
        return server.call(
            "POST", f"/v1/sessions/{name}/steps",
            {"worker": worker, "sequence": sequence, "base_version": base, **control},
        )  # fmt: skip
    return server.push(name, grads, worker=worker, sequence=sequence, base_version=base, **control)


def rounds_of(server, name="m"):
    """All of the open round, and what became of the others."""
    session = server.app.state.sessions.get(name)
    found = session.rounds.open
    open_ = None
    if found is not None:
        total = None if session.arena.total is None else session.arena.total.tobytes()
        held = [(one.worker, one.flat.tobytes(), one.factor) for one in found.held]
        rules = found.rules.model_dump()
        open_ = found.number, found.base, rules, found.contributions, found.present, total, held
    ledger = {
        (worker, number): done
        for worker, one in session.ledger._workers.items()
        for number, done in one.admitted.items()
    }
    return session.rounds.count, open_, ledger, session.at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_an_open_round_comes_back_and_ends_as_if_nothing_had_been(start, kind, options):
    server = start()
    make(server, options=OPTIONS[options], **KINDS[kind])
    robust = kind in ("median", "trimmed")
    lacks = {"missing": "b"} if options == "skip" else {}
    for sequence in (1, 2, 3):
        for worker in "abc":
            weight = {"weight": 1 if robust else 1 + sequence}
            reply = contribute(server, worker, sequence, sequence, **weight, **lacks)
            assert reply.status in (200, 202), reply
    contribute(server, "b", 4, 4, grad_scale=4.0)
    contribute(server, "a", 4, 4, weight=0)
    again = server.crashed()
    assert rounds_of(again) == rounds_of(server)
    assert again.state_of() == server.state_of()
    for one in (server, again):
        assert contribute(one, "b", 4, 4, grad_scale=4.0).json["replayed"]
        reply = contribute(one, "c", 4, 4)
        assert reply.status == 200
        assert (reply.json["round"], reply.json["contributions"]) == (4, 2)
    assert again.state_of() == server.state_of()
    assert contribute(again, "a", 4, 4, weight=0).json["applied"]
    again.close()


@pytest.mark.parametrize("durability", ["snapshot", "log"])
def test_the_numbers_of_an_abandoned_round_stay_used(start, durability):
    server = start()
    make(server, durability=durability)
    contribute(server, "a", 1, 1)
    assert server.call("PUT", "/v1/sessions/m/params", {"params": {"s": 1.0}}).status == 200
    problem = check_problem(contribute(server, "a", 1, 1), 409, "round-abandoned")
    assert (problem["round"], problem["reason"], problem["epoch"]) == (1, "params", 2)
    again = server.crashed()
    problem = check_problem(contribute(again, "a", 1, 1), 409, "round-abandoned")
    assert (problem["round"], problem["reason"]) == (1, "params")
    assert again.call("GET", "/v1/sessions/m/rounds/1").json["status"] == "abandoned"
    again.close()


def test_a_round_that_ran_out_of_time_stays_abandoned(start):
    server = start()
    make(server, round_timeout_s=0.05, min_contributions=2)
    reply = server.call(
        "POST", "/v1/sessions/m/steps",
        {"grads": PARAMS, "worker": "a", "sequence": 1, "base_version": 1}, prefer="wait=2",
    )  # fmt: skip
    check_problem(reply, 409, "round-abandoned")
    again = server.crashed()
    assert rounds_of(again) == rounds_of(server)
    assert contribute(again, "a", 2, 1).status == 202  # of the next round, of the same version
    again.close()


def test_snapshots_leave_the_open_round_in_the_log(start):
    server = start()
    make(server)
    for sequence in (1, 2, 3, 4, 5):
        for worker in "abc":
            contribute(server, worker, sequence, sequence)
    contribute(server, "a", 6, 6)
    session = server.app.state.sessions.get("m")
    server.on_loop(session.durable.snapshot())
    assert session.durable.journal.row.number == session.rounds.open.first - 1
    assert not session.durable.is_due
    again = server.crashed()
    assert rounds_of(again) == rounds_of(server)
    again.close()


def test_an_open_round_outlives_a_stop_in_order(start):
    server = start()
    make(server)
    contribute(server, "a", 1, 1)
    before = rounds_of(server)
    server = server.restarted()
    assert rounds_of(server) == before
    contribute(server, "b", 1, 1)
    assert contribute(server, "c", 1, 1).json["applied"]
    server.close()


def test_without_a_log_a_stop_abandons_the_open_round_and_a_crash_loses_it(start):
    server = start()
    make(server, durability="snapshot")
    for worker in "abc":
        contribute(server, worker, 1, 1)
    contribute(server, "a", 2, 2)
    session = server.app.state.sessions.get("m")
    server.on_loop(session.durable.snapshot())
    lost = server.crashed()
    check_problem(contribute(lost, "a", 2, 2), 409, "epoch-changed")
    assert contribute(lost, "a", 1, 1).json["applied"]  # what it still knows
    reply = lost.call("GET", "/v1/sessions/m/rounds/2")  # of which it was told
    check_problem(reply, 404, "round-unknown")
    fresh = contribute(lost, "a", 3, "2-1")
    assert (fresh.status, fresh.json["round"]) == (202, 1_000_002)
    lost.close()
    server = server.restarted()
    assert check_problem(contribute(server, "a", 2, 2), 409, "round-abandoned")["reason"] == "stop"
    assert contribute(server, "a", 3, 2).status == 202
    server.close()


def test_a_log_without_a_place_refuses_and_goes_on(start):
    server = start()
    make(server, "m", options={"log_slots": 8})
    for sequence in range(1, 30):
        for worker in "abc":
            weight = {"weight": 0} if worker == "c" else {}
            reply = contribute(server, worker, sequence, sequence, **weight)
            assert reply.status in (200, 202), reply
    assert server.app.state.sessions.get("m").step == 29
    again = server.crashed()
    assert rounds_of(again) == rounds_of(server)
    again.close()


def test_a_patch_acts_from_the_next_round_on_also_after_a_crash(start):
    server = start()
    make(server)
    contribute(server, "a", 1, 1)
    patch = {"update": {"workers": 2}, "optimizer": {"lr": 0.5}}
    reply = server.call("PATCH", "/v1/sessions/m", patch)
    assert (reply.status, reply.json["acts_from_step"]) == (200, 2)
    again = server.crashed()
    for one in (server, again):
        assert contribute(one, "b", 1, 1).status == 202
        assert contribute(one, "c", 1, 1).json["lr"] == 0.5
        assert contribute(one, "a", 2, 2).status == 202
        assert contribute(one, "b", 2, 2).status == 200
    assert again.state_of() == server.state_of()
    again.close()


def test_a_member_that_is_deleted_with_its_session_leaves_nothing(start):
    server = start()
    make(server, order="worker")
    contribute(server, "a", 1, 1)
    assert server.call("DELETE", "/v1/sessions/m").status == 204
    assert server.app.state.budget.used == 0
    make(server, name="n", durability="none", order="worker")
    contribute(server, "a", 1, 1, name="n")
    assert server.call("DELETE", "/v1/sessions/n").status == 204
    assert server.app.state.budget.used == 0


def test_an_open_round_that_came_back_ends_by_itself(start):
    server = start()
    make(server, round_timeout_s=0.5)
    contribute(server, "a", 1, 1)
    again = server.crashed()
    reply = again.call("GET", "/v1/sessions/m/rounds/1", prefer="wait=2")
    assert reply.json["status"] == "applied"
    again.close()
