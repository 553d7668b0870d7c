"""What is there again after a crash: all of it, to the bit, or an epoch that says so."""

import json

import numpy as np
import pytest

from kernels.registry import RULES
from tests.api.conftest import GRADS, PARAMS, check_problem
from tests.durability.conftest import Server
from tests.storage.counter import Scratch

GROUPED = {
    "groups": [{"params": ["b"], "lr": 0.3, "name": "bias"}, {"params": ["s"], "frozen": True}],
    "missing": "skip",
}
OPTIONS = {
    "plain": {},
    "groups": GROUPED,
    "clipped": {"clip": {"value": 0.5}, "norms": True},
    "scheduled": {
        "schedule": {"kind": "cosine", "warmup_steps": 2, "total_steps": 9},
        "clip": {"global_norm": 1.0},
        "ema": {"decay": 0.9},
    },
    "double": {"dtype": "F64", "on_nonfinite": "skip"},
}
STATED = {
    "sgd": {"momentum": 0.9, "dampening": 0.1}, "rmsprop": {"centered": True, "momentum": 0.5},
    "adam": {"amsgrad": True}, "muon": {}, "lars": {"momentum": 0.9},
}  # fmt: skip
MATRIX = {"w": PARAMS["w"]}


def params_of(rule):
    return MATRIX if rule == "muon" else PARAMS


def push_some(server, count, first=1, rule="adam", name="m", **fields):
    """Pushes that differ, some of them without a tensor where that may be."""
    epoch = server.app.state.sessions.get(name).epoch
    for sequence in range(first, first + count):
        rng = np.random.default_rng(sequence)
        grads = {
            key: rng.standard_normal(np.shape(value)).tolist()
            for key, value in params_of(rule).items()
        }
        if fields.get("missing") == "skip" and sequence % 3 == 0:
            grads = {"w": grads["w"]}
        control = {"worker": "v", "sequence": sequence, "base_version": f"{epoch}-1"}
        if sequence % 4 == 0:
            control["overrides"] = {"default": {"lr": 0.01 * sequence}}
        if sequence % 5 == 0:
            control |= {"grad_scale": 8.0, "loss": 0.5}
        reply = server.push(name, grads, **control)
        assert reply.status == 200, reply
        assert reply.json["applied"]


def make(server, rule="adam", name="m", durability="log", **fields):
    optimizer = {"rule": rule, "lr": 0.1, **STATED.get(rule, {})}
    fields = {"optimizer": optimizer, "durability": durability, **fields}
    if durability == "log":
        fields["log_slots"] = 5
    return server.make(name, params_of(rule), **fields)


CASES = [
    (rule, options)
    for rule in RULES
    for options in OPTIONS
    if rule != "muon" or "groups" not in OPTIONS[options]  # whose tensors are no matrices
]


@pytest.fixture(scope="module")
def revived():
    """A server with a session of each case, and one that was made of what a crash left of it."""
    with Scratch() as path:
        server = Server(path / "data")
        for rule, name in CASES:
            options = OPTIONS[name]
            make(server, rule, f"{rule}-{name}", **options)
            make(server, rule, f"{rule}-{name}-whole", "none", **options)
            # behind the newest snapshot there are some
            push_some(server, 4, rule=rule, name=f"{rule}-{name}", **options)
        again = server.crashed()
        yield server, again
        again.close()
        server.close()


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_a_log_brings_every_rule_back_to_the_bit(revived, rule, options):
    server, again = revived
    name = f"{rule}-{options}"
    assert again.state_of(name) == server.state_of(name)
    push_some(again, 4, 5, rule, name, **OPTIONS[options])
    push_some(server, 8, 1, rule, f"{name}-whole", **OPTIONS[options])
    ours, theirs = again.state_of(name), server.state_of(f"{name}-whole")
    for what in ("params", "state", "average", "runs", "at", "ledger"):
        assert ours[what] == theirs[what], what


@pytest.mark.parametrize("durability", ["snapshot", "log"])
def test_a_stop_in_order_loses_nothing_and_leaves_nothing_to_do(start, durability):
    server = start()
    make(server, durability=durability, **GROUPED)
    push_some(server, 7, **GROUPED)
    found = server.state_of()
    server = server.restarted()
    assert server.state_of() == found
    push_some(server, 1, 8, **GROUPED)
    assert server.app.state.sessions.get("m").step == 8
    server.close()


def test_every_kind_of_change_is_in_the_log(start):
    server = start()
    make(server, on_nonfinite="skip", missing="skip")
    push_some(server, 1)
    assert server.call("PATCH", "/v1/sessions/m", {"optimizer": {"lr": 0.5}}).status == 200
    push_some(server, 1, 2)
    nothing = np.full(9, np.nan, np.float32).tobytes()
    query = "?worker=v&sequence=90&base_version=1"
    reply = server.call(
        "POST", f"/v1/sessions/m/steps{query}", nothing,
        content_type="application/octet-stream; dtype=F32",
    )  # fmt: skip
    assert reply.json["skipped"] == "nonfinite"
    reply = server.call("PUT", "/v1/sessions/m/params", {"params": {"s": 5.0}})
    assert reply.status == 200
    push_some(server, 2, 3)
    group = {"group": {"name": "head", "lr": 0.7}, "params": {"h": [1.0, 2.0, 3.0]}}
    assert server.call("POST", "/v1/sessions/m/groups", group).status == 201
    state = server.call("GET", "/v1/sessions/m/state").json
    found = server.state_of()
    with_log = server.crashed()
    try:
        assert with_log.state_of() == found
        reply = with_log.call(
            "PUT", "/v1/sessions/m/state",
            {"state": state["state"], "counts": state["counts"], "step": 77},
        )  # fmt: skip
        assert reply.status == 200, reply
        found = with_log.state_of()
        again = with_log.crashed()
        try:
            assert again.state_of() == found
            assert again.app.state.sessions.get("m").step == 77
            group["group"]["lr"] = 0.8
            check_problem(again.call("POST", "/v1/sessions/m/groups", group), 409, "spec-differs")
        finally:
            again.close()
    finally:
        with_log.close()


def test_a_retry_after_a_crash_gets_its_first_summary(start):
    server = start()
    make(server)
    sent = [
        {"worker": f"v{number % 2}", "sequence": number, "base_version": 1, "loss": 0.25}
        for number in range(12)
    ]
    first = [server.push(**control).json for control in sent]
    server = server.crashed()
    try:
        for control, summary in zip(sent, first, strict=True):
            assert server.push(**control).json == {**summary, "replayed": True}
        check_problem(server.push(**{**sent[3], "loss": 1.0}), 422, "key-reused")
        assert server.app.state.sessions.get("m").step == 12
    finally:
        server.close()


def test_a_snapshot_session_goes_on_in_the_next_epoch_and_tells_its_workers(start):
    server = start()
    session = make(server, durability="snapshot")
    push_some(server, 3)
    assert server.on_loop(session.durable.snapshot())
    kept = server.state_of()
    push_some(server, 2, 4)
    again = server.crashed()
    try:
        found = again.state_of()
        assert found["at"] == (2, 1, 3)
        assert [found[what] for what in ("params", "state", "ledger", "incarnation")] == [
            kept[what] for what in ("params", "state", "ledger", "incarnation")
        ]
        problem = check_problem(
            again.push(worker="v", sequence=4, base_version="1-4"), 409, "epoch-changed"
        )
        assert problem["survived"] == [[1, 3]]
        push_some(again, 1, 4)
        third = again.crashed()
        assert third.state_of()["at"] == (3, 1, 3)
        third.close()
    finally:
        again.close()
    assert session.step == 5


def test_a_session_without_parameters_survives(start):
    server = start()
    assert server.call("PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam"},
                                                 "durability": "log"}).status == 201  # fmt: skip
    assert server.call("PATCH", "/v1/sessions/m", {"optimizer": {"lr": 0.5}}).status == 200
    found = server.state_of()
    again = server.crashed()
    try:
        assert again.state_of() == found
        check_problem(again.push(), 409, "params-missing")
        reply = again.call("PUT", "/v1/sessions/m/params", {"params": PARAMS})
        assert reply.status == 200
        push_some(again, 3)
        found = again.state_of()
        third = again.crashed()
        assert third.state_of() == found
        third.close()
    finally:
        again.close()


def test_a_deleted_session_stays_deleted_and_its_id_begins_a_later_epoch(start):
    server = start()
    make(server)
    push_some(server, 2)
    assert server.call("DELETE", "/v1/sessions/m").status == 204
    again = server.crashed()
    try:
        check_problem(again.call("GET", "/v1/sessions/m"), 410, "session-gone")
        session = make(again)
        assert session.epoch == 2
        check_problem(again.push(worker="v", sequence=1, base_version="1-1"), 409, "epoch-changed")
    finally:
        again.close()


def test_sessions_of_durability_none_are_gone(start):
    server = start()
    make(server, durability="none")
    server = server.restarted()
    check_problem(server.call("GET", "/v1/sessions/m"), 404, "session-unknown")
    server.close()


def test_the_server_decides_for_those_who_state_nothing(start):
    server = start(durability="snapshot")
    server.make("m")
    assert server.call("GET", "/v1/sessions/m").json["durability"] == "snapshot"
    reply = server.call("PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam"}})
    assert (reply.status, reply.json["attached"]) == (200, True)
    reply = server.call(
        "PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam"}, "durability": "log"}
    )
    check_problem(reply, 409, "spec-differs")


def test_other_kernels_replay_nothing(start, monkeypatch):
    server = start()
    make(server)
    make(server, name="clean")
    push_some(server, 2)
    assert server.on_loop(server.app.state.sessions.get("clean").durable.snapshot())
    monkeypatch.setattr("kernels.revision.of", lambda rules: "another")
    again = server.crashed()
    try:
        (damage,) = again.call("GET", "/health/ready").json["damaged"]
        assert damage["session"] == "m"
        assert "another" in damage["what"]
        reply = again.call("GET", "/v1/sessions/m")
        assert (reply.status, reply.json["retryable"]) == (503, False)
        assert reply.json["type"] == "/problems/session-damaged"
        reply = again.call("PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam"}})
        assert (reply.status, reply.json["type"]) == (503, "/problems/session-damaged")
        push_some(again, 1, name="clean")
    finally:
        again.close()
    monkeypatch.undo()
    again = server.crashed()  # nothing was touched: the version that wrote it takes it up
    assert again.state_of() == server.state_of()
    again.close()


def test_json_of_the_summary_survives_as_it_was(start):
    """Norms and learning rates keep their bits through the ledger's own format."""
    server = start()
    make(server, norms=True, clip={"global_norm": 0.3})
    reply = server.push(worker="v", sequence=1, base_version=1)
    server = server.restarted()
    again = server.push(worker="v", sequence=1, base_version=1)
    assert json.loads(again.body) == {**reply.json, "replayed": True}
    server.close()


def test_a_group_of_another_rule_is_in_the_log(start):
    server = start()
    make(server)
    group = {"group": {"name": "head", "rule": "sgd", "lr": 0.7}, "params": {"h": [1.0, 2.0]}}
    assert server.call("POST", "/v1/sessions/m/groups", group).status == 201
    grads = {**GRADS, "h": [1.0, -1.0]}
    assert server.push(grads=grads, worker="v", sequence=1, base_version=1).status == 200
    found = server.state_of()
    again = server.crashed()
    assert again.call("GET", "/health/ready").json.get("damaged") is None
    assert again.state_of() == found
    again.close()


def test_patches_alone_never_fill_the_log(start):
    server = start()
    make(server)
    for number in range(150):
        change = {"optimizer": {"lr": 0.001 * (number + 1)}}
        assert server.call("PATCH", "/v1/sessions/m", change).status == 200
    found = server.state_of()
    again = server.crashed()
    assert again.state_of() == found
    again.close()


def test_a_creation_that_was_cut_short_is_completed_by_its_retry(start):
    server = start()
    body = {"optimizer": {"rule": "adam"}, "durability": "log"}
    assert server.call("PUT", "/v1/sessions/m", body).status == 201  # and the crash came here
    again = server.crashed()
    reply = again.call("PUT", "/v1/sessions/m", {**body, "params": PARAMS})
    assert (reply.status, reply.json["status"]) == (200, "ready")
    reply = again.call("PUT", "/v1/sessions/m", {**body, "params": {"w": [1.0]}})
    assert (reply.status, reply.json["tensors"]) == (200, 3)
    again.close()
