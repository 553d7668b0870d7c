"""What a client may conclude from each answer, over HTTP."""

import json

import ml_dtypes
import numpy as np
import pytest

from gradpost.protocol import OCTET, SAFETENSORS
from gradpost.protocol.tensors import build_header
from tests.api.conftest import GRADS, PARAMS, check_problem, flat

KEY = {"worker": "w", "sequence": 1, "base_version": 1}
QUERY = "worker=w&sequence=1&base_version=1"
STEPS = "/v1/sessions/m/steps"


def container(dtype=np.float32, wire="F32", order=("s", "w", "b")):
    arrays = {name: np.asarray(GRADS[name], dtype) for name in order}
    rows = [(name, wire, array.shape) for name, array in arrays.items()]
    return build_header(rows, None) + b"".join(array.tobytes() for array in arrays.values())


ENCODINGS = {
    "JSON": lambda api: api.push(**KEY),
    "safetensors": lambda api: api.call(
        "POST", f"{STEPS}?{QUERY}", container(), content_type=SAFETENSORS
    ),
    "BF16": lambda api: api.call(
        "POST", f"{STEPS}?{QUERY}", container(ml_dtypes.bfloat16, "BF16"), content_type=SAFETENSORS
    ),
    "F16": lambda api: api.call(
        "POST", f"{STEPS}?{QUERY}", container(np.float16, "F16"), content_type=SAFETENSORS
    ),
    "raw": lambda api: api.call(
        "POST", f"{STEPS}?{QUERY}", flat(GRADS).tobytes(), content_type=f"{OCTET}; dtype=F32"
    ),
}


@pytest.mark.parametrize("first", ENCODINGS)
def test_the_same_push_in_any_encoding_is_a_replay(api, first):
    session = api.make()
    original = ENCODINGS[first](api)
    assert original.status == 200
    for again in ENCODINGS.values():
        reply = again(api)
        assert reply.json == {**original.json, "replayed": True}
    assert session.step == 1


def test_anything_else_under_the_key_is_refused(api):
    api.make()
    assert api.push(**KEY).status == 200
    before = api.everything()
    check_problem(api.push(grads={**GRADS, "s": 1.0}, **KEY), 422, "key-reused")
    check_problem(api.push(**{**KEY, "loss": 1.0}), 422, "key-reused")
    assert api.everything() == before


def test_a_refused_push_consumes_nothing(api):
    api.make()
    check_problem(api.push(grads={"w": GRADS["w"]}, **KEY), 422, "tensor-mismatch")
    reply = api.push(**KEY)
    assert (reply.status, reply.json["replayed"]) == (200, False)


def test_numbers_below_the_window_are_too_old(api):
    api.make()
    assert api.push(**{**KEY, "sequence": 5000}).status == 200
    check_problem(api.push(**{**KEY, "sequence": 5000 - 1024}), 409, "too-old")
    assert api.push(**{**KEY, "sequence": 5000 - 1023}).status == 200


def test_the_replay_comes_before_the_epoch(api):
    api.make()
    assert api.push(**KEY).status == 200
    assert api.call("PUT", "/v1/sessions/m/params", {"params": {"s": 1.0}}).status == 200
    assert api.push(**KEY).json["replayed"]
    problem = check_problem(api.push(**{**KEY, "sequence": 2}), 409, "epoch-changed")
    assert (problem["epoch"], problem["version"]) == (2, 1)


def test_staleness_is_refused_or_scaled(api):
    api.make(update={"max_staleness": 1})
    api.make("scaled", optimizer={"rule": "sgd", "lr": 0.3},
             update={"max_staleness": 1, "on_stale": "scale"})  # fmt: skip
    for name in ("m", "scaled"):
        for sequence in (1, 2):
            assert api.push(name, **{**KEY, "sequence": sequence}).status == 200
    problem = check_problem(api.push(**{**KEY, "sequence": 3}), 409, "stale-gradient")
    assert (problem["base_version"], problem["version"], problem["max_staleness"]) == (1, 3, 1)
    reply = api.push("scaled", **{**KEY, "sequence": 3}).json
    assert (reply["staleness"], reply["lr"]) == (2, 0.3 / 3)


def test_an_applied_push_is_never_answered_with_a_refusal(api):
    api.make(params={"w": [1e30]}, optimizer={"rule": "sgd", "lr": 0.0})
    reply = api.call(
        "POST", f"{STEPS}?dtype=F16", build_header([("w", "F32", (1,))], None) + bytes(4),
        content_type=SAFETENSORS, accept=SAFETENSORS,
    )  # fmt: skip
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["applied"]
    before = api.everything()
    reply = api.call(
        "POST", f"{STEPS}?names=x", build_header([("w", "F32", (1,))], None) + bytes(4),
        content_type=SAFETENSORS, accept=SAFETENSORS,
    )  # fmt: skip
    check_problem(reply, 422, "tensor-mismatch")
    assert api.everything() == before


def test_creation_attaches_and_creation_anew_is_another_epoch(api):
    api.make()
    again = api.call("PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam"}})
    assert (again.status, again.json["attached"], again.json["status"]) == (200, True, "ready")
    differs = api.call("PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam", "lr": 1}})
    problem = check_problem(differs, 409, "spec-differs")
    assert problem["differences"] == [{"field": "optimizer.lr", "ours": 0.001, "yours": 1.0}]
    changed = api.call("PATCH", "/v1/sessions/m", {"optimizer": {"lr": 1}})
    assert changed.status == 200
    again = api.call("PUT", "/v1/sessions/m", {"optimizer": {"rule": "adam", "lr": 0.001}})
    assert again.status == 200  # a PATCH does not change what it was created with
    assert api.call("DELETE", "/v1/sessions/m").status == 204
    check_problem(api.push(**KEY), 410, "session-gone")
    assert api.make().epoch == 2
    check_problem(api.push(**KEY), 409, "epoch-changed")
    assert api.push(**{**KEY, "base_version": "2-1"}).status == 200


@pytest.mark.parametrize("accept", ["*/*", SAFETENSORS, f"{OCTET}; dtype=BF16"])
def test_a_pull_that_knows_the_version_is_304(api, accept):
    api.make()
    path = "/v1/sessions/m/params"
    first = api.call("GET", path, accept=accept)
    tag = first.headers["etag"]
    assert api.call("GET", path, accept=accept, if_none_match=tag).status == 304
    assert api.call("GET", f"{path}?names=w", accept=accept, if_none_match=tag).status == 200
    assert api.push().status == 200
    after = api.call("GET", path, accept=accept, if_none_match=tag)
    assert (after.status, after.headers["etag"] != tag) == (200, True)


def test_parameters_come_back_as_they_went(api):
    api.make(rule="sgd")
    assert api.call("GET", "/v1/sessions/m/params").json["params"] == PARAMS
    raw = api.call("GET", "/v1/sessions/m/params", accept=f"{OCTET}; dtype=F32")
    np.testing.assert_array_equal(np.frombuffer(raw.body, np.float32), flat(PARAMS))
    reply = api.call("POST", STEPS, {"grads": GRADS}, prefer="return=representation")
    assert not reply.json["identified"]
    expected = flat(PARAMS) - np.float32(0.001) * flat(GRADS)
    got = flat(json.loads(reply.body)["params"])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_worker_can_ask_where_it_stands(api):
    api.make()
    for sequence in (1, 2, 5):
        assert api.push(worker="w", sequence=sequence, base_version=1).status == 200
    found = api.call("GET", "/v1/sessions/m/workers/w").json
    assert (found["next_sequence"], found["highest"]) == (6, 5)
    assert found["ranges"] == [[1, 2], [5, 5]]
    assert (found["last"]["step"], found["last"]["replayed"]) == (3, True)
    assert found["step"] == 3
    check_problem(api.call("GET", "/v1/sessions/m/workers/v"), 404, "worker-unknown")
    check_problem(api.call("GET", "/v1/sessions/m/workers/a b"), 422, "invalid-request")


def test_an_epoch_that_changed_says_which_pushes_are_still_known(api):
    api.make()
    assert api.push(worker="w", sequence=1, base_version=1).status == 200
    api.call("PUT", "/v1/sessions/m/params", {"params": {"s": 1.0}})
    reply = api.push(worker="w", sequence=2, base_version="1-2")
    assert check_problem(reply, 409, "epoch-changed")["survived"] == [[1, 1]]
