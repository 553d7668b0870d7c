"""Update modes over HTTP: rounds, waits, leases, and what is refused without a trace."""

import json
import threading
import time

import numpy as np
import pytest

from gradpost.protocol import OCTET, SAFETENSORS
from tests.api.conftest import GRADS, PARAMS, check_problem, flat

SYNC = {"mode": "sync", "workers": 2, "round_timeout_s": 60}
STEPS = "/v1/sessions/m/steps"
SGD = {"rule": "sgd", "lr": 1.0}


def make(api, name="m", optimizer=SGD, options=(), **update):
    return api.make(name, optimizer=optimizer, update={**SYNC, **update}, **dict(options))


def contribute(api, worker, base=1, sequence=None, grads=GRADS, name="m", wait=None, **control):
    """A push; its sequence is that of its base version unless it is stated."""
    body = {"worker": worker, "sequence": sequence or base, "base_version": base, **control}
    if grads is not None:
        body["grads"] = grads
    headers = {} if wait is None else {"prefer": f"wait={wait}"}
    return api.call("POST", f"/v1/sessions/{name}/steps", body, **headers)


def scaled(factor):
    return {name: (np.asarray(value) * factor).tolist() for name, value in GRADS.items()}


def params(api, name="m"):
    return flat(api.call("GET", f"/v1/sessions/{name}/params").json["params"])


def moved(api, name="m"):
    """The gradient that a first step of sgd with lr 1 has applied."""
    return flat(PARAMS) - params(api, name)


def beside(call):
    """Runs a call in a thread; `join` gives its reply."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def join():
        thread.join(30)
        return found[0]

    return join


# Rounds


def test_a_round_is_one_step_on_the_weighted_mean(api):
    make(api)
    first = contribute(api, "a")
    assert first.status == 202
    assert first.headers["location"] == "/v1/sessions/m/rounds/1"
    assert first.json == {
        "applied": False, "replayed": False, "identified": True, "round": 1, "contributions": 1,
        "passes": 0, "missing": 1, "step": 0, "epoch": 1, "version": 1,
    }  # fmt: skip
    second = contribute(api, "b", grads=scaled(5), weight=3)
    assert second.status == 200
    assert (second.json["round"], second.json["contributions"]) == (1, 2)
    assert (second.json["step"], second.json["version"], second.json["applied"]) == (1, 2, True)
    assert np.allclose(moved(api), 4 * flat(GRADS))  # (1 + 3 * 5) / 4
    again = contribute(api, "a")
    assert again.json == {**second.json, "replayed": True}


@pytest.mark.parametrize(
    ("update", "factor"),
    [
        ({"reduce": "sum"}, 1 + 2 + 4 + 400),
        ({"reduce": "mean"}, (1 + 2 + 4 + 400) / 4),
        ({"reduce": "median"}, 3),
        ({"reduce": "trimmed_mean", "trim": 0.25}, 3),
        ({"order": "worker"}, (1 + 2 + 4 + 400) / 4),
    ],
)
def test_reductions(api, update, factor):
    make(api, workers=4, **update)
    for worker, scale in zip("abcd", (2, 400, 1, 4), strict=True):
        reply = contribute(api, worker, grads=scaled(scale))
    assert reply.status == 200
    assert np.allclose(moved(api), factor * flat(GRADS), rtol=1e-6)


def test_a_bad_worker_is_bounded(api):
    norm = float(np.linalg.norm(flat(GRADS)))
    make(api, max_norm=2 * norm)
    before = api.everything()
    problem = check_problem(contribute(api, "a", grads=scaled(3)), 422, "norm-exceeded")
    assert problem["norm"] == pytest.approx(3 * norm)
    assert api.everything() == before
    assert contribute(api, "a", grads=scaled(12), grad_scale=8).status == 202
    make(api, "n", max_norm=norm, on_max_norm="clip")
    contribute(api, "a", grads=scaled(100), name="n")
    contribute(api, "b", grads=scaled(0.5), name="n")
    assert np.allclose(moved(api, "n"), 0.75 * flat(GRADS))


def test_a_quorum_leaves_the_slow_behind(api):
    make(api, workers=3, quorum=2)
    contribute(api, "a")
    assert contribute(api, "b").status == 200
    problem = check_problem(contribute(api, "c"), 409, "round-closed")
    assert (problem["round"], problem["version"], problem["base_version"]) == (2, 2, "1-1")
    assert contribute(api, "c", base=2).status == 202
    rows = {row["worker"]: row for row in api.call("GET", "/v1/sessions/m/workers").json["workers"]}
    assert (rows["c"]["late"], rows["c"]["contributions"]) == (0, 1)  # it was not known before
    contribute(api, "a", base=2)
    check_problem(contribute(api, "c", base=2, sequence=9), 409, "round-closed")
    assert api.call("GET", "/v1/sessions/m/workers/c").json["late"] == 1


def test_one_contribution_of_each_worker(api):
    make(api)
    contribute(api, "a")
    before = api.everything()
    problem = check_problem(contribute(api, "a", sequence=2), 409, "already-contributed")
    assert (problem["round"], problem["sequence"]) == (1, 1)
    check_problem(contribute(api, "a", grads=scaled(2)), 422, "key-reused")  # two under one id
    assert api.everything() == before


def test_overrides_of_a_round_are_equal(api):
    make(api)
    contribute(api, "a", overrides={"default": {"lr": 0.5}})
    problem = check_problem(contribute(api, "b"), 409, "overrides-differ")
    assert problem["round"] == 1
    check_problem(contribute(api, "b", overrides={"default": {"lr": 0.25}}), 409)
    assert contribute(api, "b", overrides={"default": {"lr": 0.5}}).json["lr"] == 0.5
    assert np.allclose(moved(api), 0.5 * flat(GRADS))


@pytest.mark.parametrize("encoding", ["json", "query"])
def test_a_pass_fills_a_place(api, encoding):
    make(api, workers=3)
    contribute(api, "a")
    if encoding == "json":
        reply = contribute(api, "b", grads=None, weight=0)
    else:
        query = "worker=b&sequence=1&base_version=1&weight=0"
        reply = api.call("POST", f"{STEPS}?{query}", None, content_length="0")
    assert reply.status == 202
    assert (reply.json["contributions"], reply.json["passes"]) == (1, 1)
    reply = contribute(api, "c", grads=scaled(3))
    assert (reply.json["applied"], reply.json["contributions"]) == (True, 2)
    assert np.allclose(moved(api), 2 * flat(GRADS))
    assert contribute(api, "b", grads=None, weight=0).json["applied"]  # its round's fate


def test_a_round_of_passes_changes_nothing(api):
    make(api)
    before = params(api)
    contribute(api, "a", grads=None, weight=0)
    reply = contribute(api, "b", grads=None, weight=0)
    assert (reply.status, reply.json["applied"], reply.json["skipped"]) == (200, False, "passes")
    assert (reply.json["step"], reply.json["version"], reply.json["round"]) == (0, 1, 1)
    assert params(api).tobytes() == before.tobytes()
    assert contribute(api, "a", sequence=2).json["round"] == 2  # of the same version


def test_a_gradient_that_is_not_finite(api):
    make(api)
    bad = {**GRADS, "s": 1e38}
    before = api.everything()
    check_problem(contribute(api, "a", grads={**GRADS, "s": 1e39}), 422)
    assert api.everything() == before
    contribute(api, "a", grads=bad)
    reply = contribute(api, "b", grads=bad, weight=1)
    assert reply.json["applied"]  # the mean of large ones is finite
    make(api, "n", reduce="sum", workers=4)
    for worker in "abcd":
        reply = contribute(api, worker, grads=bad, name="n")
    assert (reply.json["applied"], reply.json["skipped"]) == (False, "nonfinite")
    make(api, "o", options={"on_nonfinite": "skip"})
    body = np.full(9, np.nan, np.float32).tobytes()
    query = "worker=a&sequence=1&base_version=1"
    reply = api.call("POST", f"/v1/sessions/o/steps?{query}", body,
                     content_type=f"{OCTET}; dtype=F32")  # fmt: skip
    assert (reply.status, reply.json["passes"]) == (202, 1)
    assert contribute(api, "b", name="o").json["contributions"] == 1
    assert np.allclose(moved(api, "o"), flat(GRADS))


def test_deltas_point_the_other_way(api):
    """g = -delta: the model moves towards where the trainer's local steps ended."""
    end = flat(PARAMS) + flat(GRADS)
    make(api, options={"push": "delta"})
    contribute(api, "a", grads=GRADS)
    contribute(api, "b", grads=GRADS)
    assert np.allclose(params(api), end)
    api.make("n", optimizer=SGD, push="delta")
    assert api.push("n").status == 200
    assert np.allclose(params(api, "n"), end)


@pytest.mark.parametrize("clip", [{"value": 0.5}, {"global_norm": 1.0}])
def test_deltas_are_clipped_like_gradients(api, clip):
    for name, push, factor in (("m", "delta", -1), ("n", "gradient", 1)):
        api.make(name, optimizer=SGD, push=push, clip=clip)
        assert api.push(name, scaled(factor)).json["clipped"]
    assert params(api).tobytes() == params(api, "n").tobytes()


# Waiting


def test_an_answer_waits_for_the_end_of_its_round(api):
    session = make(api)
    join = beside(lambda: contribute(api, "a", wait=2))
    while not session.rounds.waiting:
        time.sleep(0.002)
    assert api.app.state.uploads.active == 0  # its body has been taken in
    assert contribute(api, "b").status == 200
    reply = join()
    assert (reply.status, reply.json["applied"], reply.json["replayed"]) == (200, True, False)


def test_a_wait_ends(api):
    make(api)
    begun = time.monotonic()
    assert contribute(api, "a", wait=0.1).status == 202
    assert 0.1 <= time.monotonic() - begun < 1.5
    assert contribute(api, "a", wait=1000).status == 202  # cut to the server's cap


def test_who_waits_may_get_the_parameters_after_the_round(api):
    make(api)
    query = "worker=a&sequence=1&base_version=1"
    body = flat(GRADS).tobytes()
    headers = {"content_type": f"{OCTET}; dtype=F32", "accept": SAFETENSORS, "prefer": "wait=2"}
    join = beside(lambda: api.call("POST", f"{STEPS}?{query}", body, **headers))
    time.sleep(0.05)
    contribute(api, "b", grads=scaled(3))
    reply = join()
    assert reply.headers["gradpost-version"] == "2"
    assert json.loads(reply.headers["gradpost-summary"])["round"] == 1
    assert np.allclose(np.frombuffer(reply.body[-36:], np.float32), params(api))


def test_a_round_can_be_waited_for(api):
    make(api)
    contribute(api, "a")
    join = beside(lambda: api.call("GET", "/v1/sessions/m/rounds/1", prefer="wait=2"))
    time.sleep(0.05)
    done = contribute(api, "b", weight=2).json
    found = join().json
    assert (found["status"], found["reason"], found["missing"]) == ("applied", "complete", 0)
    assert [(one["worker"], one["weight"]) for one in found["members"]] == [("a", 1.0), ("b", 2.0)]
    assert found["summary"] == done
    assert api.call("GET", "/v1/sessions/m/rounds/2").json["status"] == "open"
    check_problem(api.call("GET", "/v1/sessions/m/rounds/3"), 404, "round-unknown")
    api.make("n")
    check_problem(api.call("GET", "/v1/sessions/n/rounds/1"), 404, "round-unknown")


def test_a_timeout_ends_a_round_with_what_is_there(api):
    make(api, workers=3, round_timeout_s=0.1, min_contributions=2)
    contribute(api, "a")
    reply = contribute(api, "b", wait=2)
    assert (reply.status, reply.json["contributions"]) == (200, 2)
    assert api.call("GET", "/v1/sessions/m/rounds/1").json["reason"] == "timeout"
    problem = check_problem(contribute(api, "a", base=2, wait=2), 409, "round-abandoned")
    assert (problem["round"], problem["reason"], problem["version"]) == (2, "timeout", 2)
    check_problem(contribute(api, "a", base=2), 409, "round-abandoned")  # and so says a repeat
    found = api.call("GET", "/v1/sessions/m/workers/a").json
    assert found["last"] == {"applied": False, "round": 2, "abandoned": "timeout"}
    assert contribute(api, "a", base=2, sequence=3).json["round"] == 3


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("params", {"params": {"s": 1.0}}),
        ("groups", {"group": {"name": "g"}, "params": {"more": [0.0]}}),
    ],
)
def test_a_change_of_the_parameters_abandons_the_round(api, what, body):
    make(api)
    join = beside(lambda: contribute(api, "a", wait=2))
    while api.call("GET", "/v1/sessions/m/rounds/1").json["contributions"] == 0:
        time.sleep(0.002)
    method = "POST" if what == "groups" else "PUT"
    assert api.call(method, f"/v1/sessions/m/{what}", body).status in (200, 201)
    problem = check_problem(join(), 409, "round-abandoned")
    assert problem["reason"] == what
    assert api.call("GET", "/v1/sessions/m/rounds/1").json["status"] == "abandoned"


def test_a_deletion_ends_every_wait(api):
    make(api)
    join = beside(lambda: contribute(api, "a", wait=2))
    while api.call("GET", "/v1/sessions/m/rounds/1").json["contributions"] == 0:
        time.sleep(0.002)
    assert api.call("DELETE", "/v1/sessions/m").status == 204
    check_problem(join(), 410, "session-gone")


# Leases


def test_who_has_joined_is_waited_for_until_it_leaves(api):
    make(api, workers=3)
    for worker in "abc":
        assert api.call("PUT", f"/v1/sessions/m/workers/{worker}").status == 201
    assert api.call("PUT", "/v1/sessions/m/workers/a").status == 200
    contribute(api, "a")
    join = beside(lambda: contribute(api, "b", wait=2))
    while api.call("GET", "/v1/sessions/m/rounds/1").json["contributions"] < 2:
        time.sleep(0.002)
    assert api.call("DELETE", "/v1/sessions/m/workers/c").status == 204
    reply = join()
    assert (reply.status, reply.json["contributions"]) == (200, 2)
    check_problem(api.call("GET", "/v1/sessions/m/workers/c"), 409, "worker-retired")
    check_problem(api.call("DELETE", "/v1/sessions/m/workers/x"), 404, "worker-unknown")


def test_a_lease_that_runs_out_frees_the_others(api):
    make(api, workers=2)
    joined = api.call("PUT", "/v1/sessions/m/workers/dead", {"lease_s": 1})
    assert (joined.status, joined.json["lease_s"]) == (201, 1)
    contribute(api, "b")
    contribute(api, "dead")
    begun = time.monotonic()
    reply = contribute(api, "b", base=2, wait=2)
    assert (reply.status, reply.json["contributions"]) == (200, 1)
    assert 0.5 < time.monotonic() - begun < 1.9
    rows = api.call("GET", "/v1/sessions/m/workers").json
    assert (rows["live"], [row["live"] for row in rows["workers"]]) == (1, [True, False])
    found = api.call("GET", "/v1/sessions/m/workers/dead").json  # any call that names it renews
    assert (found["live"], found["next_sequence"], found["version"]) == (True, 2, 3)
    assert (found["round"], found["contributed"]) == (3, False)


def test_a_lost_worker_is_waited_for_where_that_is_asked_for(api):
    make(api, workers=3, on_lost="wait", round_timeout_s=0.3)
    for worker in "ab":
        assert contribute(api, worker).status == 202
    reply = contribute(api, "a", wait=2)
    assert (reply.json["contributions"], reply.json["applied"]) == (2, True)
    assert api.call("GET", "/v1/sessions/m/rounds/1").json["reason"] == "timeout"


def test_a_worker_that_left_is_retired(api):
    make(api)
    contribute(api, "a")
    assert api.call("DELETE", "/v1/sessions/m/workers/a").status == 204
    check_problem(contribute(api, "a", sequence=2), 409, "worker-retired")
    check_problem(api.call("PUT", "/v1/sessions/m/workers/a"), 409, "worker-retired")
    check_problem(api.call("DELETE", "/v1/sessions/m/workers/a"), 409, "worker-retired")
    assert contribute(api, "b").json["contributions"] == 2  # what it gave has stayed


@pytest.mark.parametrize("lease", [0, -1, 0.5, 86_401, 31_536_000, "1", True, None, [], 1e300])
def test_bad_leases(api, lease):
    make(api)
    before = api.everything()
    problem = check_problem(api.call("PUT", "/v1/sessions/m/workers/a", {"lease_s": lease}), 422)
    assert problem["errors"][0]["field"] == "lease_s"
    assert api.everything() == before
    assert api.call("GET", "/v1/sessions/m/workers").json["workers"] == []


# The bound


def bounded(api, slack=1, **fields):
    update = {"mode": "bounded", "slack": slack, **fields}
    return api.make(optimizer=SGD, update=update)


def test_whoever_is_too_far_ahead_waits_for_the_slowest(api):
    bounded(api)
    for worker in "ab":
        api.call("PUT", f"/v1/sessions/m/workers/{worker}")
    assert contribute(api, "a", sequence=1).json["ahead"] is False
    join = beside(lambda: contribute(api, "a", sequence=2))
    while api.app.state.sessions.get("m").version < 3:
        time.sleep(0.002)
    time.sleep(0.05)
    assert len(api.app.state.sessions.get("m").turns) == 1
    done = contribute(api, "b", sequence=1)  # by which a may go on
    reply = join()
    assert (reply.json["ahead"], reply.json["applied"], done.json["ahead"]) == (False, True, False)
    clocks = api.call("GET", "/v1/sessions/m/workers").json["workers"]
    assert [row["clock"] for row in clocks] == [2, 1]


def test_the_wait_of_a_bound_ends(api):
    bounded(api, slack=0)
    for worker in "ab":
        api.call("PUT", f"/v1/sessions/m/workers/{worker}")
    assert contribute(api, "a", sequence=1, wait=0).json["ahead"] is True
    assert contribute(api, "a", sequence=2, wait=0.05).json["ahead"] is True
    assert contribute(api, "b", sequence=1).json["ahead"] is False


def test_a_lost_worker_holds_nobody_up(api):
    bounded(api, slack=0)
    api.call("PUT", "/v1/sessions/m/workers/dead", {"lease_s": 1})
    begun = time.monotonic()
    reply = contribute(api, "a", sequence=1)
    assert (reply.json["ahead"], reply.json["applied"]) == (False, True)
    assert time.monotonic() - begun < 1.9


def test_who_comes_late_begins_at_the_slowest_clock(api):
    bounded(api, slack=5)
    for sequence in range(1, 4):
        contribute(api, "a", sequence=sequence)
    api.call("PUT", "/v1/sessions/m/workers/late")
    assert api.call("GET", "/v1/sessions/m/workers/late").json["clock"] == 3


# Bad input

BAD = {
    "no worker": {"grads": GRADS},
    "no gradient": {"worker": "x", "sequence": 1, "base_version": 1},
    "a pass with a gradient": {"grads": GRADS, "worker": "x", "sequence": 1, "base_version": 1,
                               "weight": 0},
    "a weight without one": {"worker": "x", "sequence": 1, "base_version": 1, "weight": 2},
    **{
        f"weight {weight!r}": {"grads": GRADS, "worker": "x", "sequence": 1, "base_version": 1,
                               "weight": weight}
        for weight in (-1, 1e300, "1", True, 1e-40)
    },
}  # fmt: skip


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_contributions(api, body):
    make(api)
    contribute(api, "a")
    before = api.everything()
    check_problem(api.call("POST", STEPS, body), 422, "invalid-request")
    assert api.everything() == before
    assert api.call("GET", "/v1/sessions/m/rounds/1").json["contributions"] == 1


@pytest.mark.parametrize(
    "query", ["weight=-1", "weight=nan", "weight=1e300", "weight=0", "weight="]
)
def test_bad_weights_of_a_binary_push(api, query):
    make(api)
    before = api.everything()
    reply = api.call(
        "POST", f"{STEPS}?worker=x&sequence=1&base_version=1&{query}", flat(GRADS).tobytes(),
        content_type=f"{OCTET}; dtype=F32",
    )  # fmt: skip
    check_problem(reply, 422, "invalid-request")
    assert api.everything() == before


def test_a_base_version_from_the_future(api):
    make(api)
    check_problem(contribute(api, "a", base=7), 409, "version-unknown")


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_weights_belong_to_rounds(api, mode):
    update = {"mode": "bounded", "slack": 1} if mode == "bounded" else {}
    api.make(update=update)
    before = api.everything()
    check_problem(contribute(api, "a", weight=1), 422, "invalid-request")
    check_problem(contribute(api, "a", grads=None, weight=0), 422, "invalid-request")
    if mode == "bounded":
        check_problem(api.push(), 422, "invalid-request")
    assert api.everything() == before


def test_order_statistics_take_every_contribution_alike(api):
    make(api, reduce="median")
    check_problem(contribute(api, "a", weight=2), 422, "invalid-request")
    assert contribute(api, "a", weight=1).status == 202
    assert contribute(api, "b", grads=None, weight=0).status == 200


# What it costs


def test_a_waiting_push_holds_no_gradient_and_no_version(api):
    session = make(api)
    used = api.app.state.budget.used
    joins = [beside(lambda worker=worker: contribute(api, worker, wait=2)) for worker in "a"]
    while session.rounds.open is None:
        time.sleep(0.002)
    time.sleep(0.05)
    assert api.app.state.budget.used == used
    assert session.arena.versions.head.holders == 0
    contribute(api, "b")
    assert [join().status for join in joins] == [200]


def test_memory_of_a_round_is_reserved_with_the_session(api):
    sizes = {}
    for name, update in (
        ("async", None), ("arrival", {}), ("worker", {"order": "worker"}),
        ("median", {"reduce": "median", "workers": 5}),
    ):  # fmt: skip
        before = api.app.state.budget.used
        api.make(name, update={} if update is None else {**SYNC, **update})
        sizes[name] = api.app.state.budget.used - before
    one = 9 * 4
    assert sizes["arrival"] - sizes["async"] == one + 9 * 8
    assert sizes["worker"] - sizes["async"] == one + 2 * one
    assert sizes["median"] - sizes["async"] == one + 5 * one


def test_pushes_at_once_are_one_round(api):
    session = make(api, workers=8, order="worker")

    names = [f"w{k}" for k in range(8)]
    joins = [beside(lambda name=name: contribute(api, name, wait=2)) for name in names]
    replies = [join() for join in joins]
    assert {reply.status for reply in replies} == {200}
    assert {reply.json["version"] for reply in replies} == {2}
    assert session.step == 1


def test_rounds_of_more_workers_than_the_server_knows(api):
    many = api.app.state.settings.max_workers + 1
    spec = {"optimizer": SGD, "update": {**SYNC, "workers": many}}
    problem = check_problem(api.call("PUT", "/v1/sessions/m", spec), 422, "invalid-request")
    assert "GRADPOST_MAX_WORKERS" in problem["detail"]
    make(api)
    check_problem(api.call("PATCH", "/v1/sessions/m", {"update": {"workers": many}}), 422)


def test_a_weight_is_no_way_around_the_bound_of_a_sum(api):
    norm = float(np.linalg.norm(flat(GRADS)))
    make(api, reduce="sum", max_norm=2 * norm)
    check_problem(contribute(api, "a", weight=3), 422, "norm-exceeded")
    assert contribute(api, "a", weight=1.5).status == 202
    make(api, "n", reduce="sum", max_norm=2 * norm, on_max_norm="clip")
    contribute(api, "a", weight=1e30, name="n")
    contribute(api, "b", grads=scaled(0), name="n")
    assert np.allclose(moved(api, "n"), 2 * flat(GRADS))


def test_who_was_in_old_rounds_is_forgotten(api):
    session = make(api, workers=1)
    for step in range(1, 70):
        assert contribute(api, "a", base=step).status == 200
    assert api.call("GET", "/v1/sessions/m/rounds/3").json["members"] is None
    assert len(api.call("GET", "/v1/sessions/m/rounds/68").json["members"]) == 1
    assert session.rounds.count == 69
