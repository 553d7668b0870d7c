"""Groups, absent tensors, overrides, schedules and averages over HTTP."""

import json
import threading
from urllib.parse import quote

import numpy as np
import pytest

from gradpost.protocol import OCTET, SAFETENSORS
from gradpost.protocol.tensors import build_header, header_length, parse_header
from tests.api.conftest import GRADS, PARAMS, check_problem, flat

SGD = {"rule": "sgd", "lr": 1.0}
STEPS = "/v1/sessions/m/steps"
GROUP = {"name": "g", "params": ["[bs]"], "lr": 0.5}


def container(tensors, metadata=None):
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    rows = [(name, "F32", array.shape) for name, array in arrays.items()]
    return build_header(rows, metadata) + b"".join(a.tobytes() for a in arrays.values())


def values(api, path="/v1/sessions/m/params"):
    reply = api.call("GET", path)
    assert reply.status == 200, reply
    return reply.json["params"]


def some(names):
    return {name: GRADS[name] for name in names}


def stepped(names, lr=1.0):
    """PARAMS after one step of sgd on some tensors."""
    return {
        name: (np.asarray(value) - lr * np.asarray(GRADS[name])).tolist()
        if name in names
        else value
        for name, value in PARAMS.items()
    }


PARTIAL = {
    "JSON": lambda api, key: api.call("POST", STEPS, {"grads": some("wb"), **key}),
    "safetensors": lambda api, key: api.call(
        "POST",
        f"{STEPS}?{'&'.join(f'{k}={v}' for k, v in key.items())}",
        container(some("bw")),
        content_type=SAFETENSORS,
    ),
}


@pytest.mark.parametrize("first", PARTIAL)
def test_a_push_without_some_tensors_in_any_encoding(api, first):
    api.make(optimizer=SGD, missing="skip")
    key = {"worker": "w", "sequence": 1, "base_version": 1}
    original = PARTIAL[first](api, key)
    assert original.status == 200
    assert values(api) == stepped("wb")
    for again in PARTIAL.values():
        assert again(api, key).json == {**original.json, "replayed": True}
    other = api.call("POST", STEPS, {"grads": {**some("wb"), "s": 0.0}, **key})
    check_problem(other, 422, "key-reused")  # a zero is not an absence
    counts = {row["name"]: row["count"] for row in api.call("GET", "/v1/sessions/m").json["layout"]}
    assert counts == {"w": 1, "b": 1, "s": 0}


def test_refused_where_all_must_come_and_taken_after_a_patch(api):
    api.make(optimizer=SGD)
    before = api.everything()
    for push in PARTIAL.values():
        assert check_problem(push(api, {}), 422, "tensor-mismatch")["missing"] == ["s"]
    assert api.everything() == before
    assert api.call("PATCH", "/v1/sessions/m", {"missing": "skip"}).status == 200
    assert PARTIAL["safetensors"](api, {}).status == 200
    for body in (container({}), container({"nobody": [1.0]})):
        reply = api.call("POST", STEPS, body, content_type=SAFETENSORS)
        check_problem(reply, 422, "tensor-mismatch")
    check_problem(api.push(grads={}), 422, "tensor-mismatch")


def test_groups_order_the_layout_and_have_their_own_rates(api):
    api.make(optimizer=SGD, groups=[GROUP])
    described = api.call("GET", "/v1/sessions/m").json
    assert [(row["name"], row["group"]) for row in described["layout"]] == [
        ("w", "default"), ("b", "g"), ("s", "g"),
    ]  # fmt: skip
    assert described["groups"] == [
        {"name": "g", "params": ["[bs]"], "frozen": False, "clip": None, "rule": "sgd", "lr": 0.5,
         **{"weight_decay": 0.0, "maximize": False, "momentum": 0.0, "dampening": 0.0},
         **{"nesterov": False, "lazy": False, "preset": None}}
    ]  # fmt: skip
    whole = flat({name: GRADS[name] for name in "wbs"})
    reply = api.call("POST", STEPS, whole.tobytes(), content_type=f"{OCTET}; dtype=F32")
    assert reply.status == 200
    assert values(api) == {**stepped("bs", 0.5), "w": stepped("w")["w"]}


@pytest.mark.parametrize("encoding", ["JSON", "query"])
def test_overrides_and_scale_in_any_encoding(api, encoding):
    api.make(optimizer=SGD, groups=[GROUP])
    overrides = {"g": {"lr": 0.0}, "default": {"lr": 0.25}}
    if encoding == "JSON":
        reply = api.push(overrides=overrides, grad_scale=2)
    else:
        query = f"overrides={quote(json.dumps(overrides))}&grad_scale=2"
        reply = api.call("POST", f"{STEPS}?{query}", container(GRADS), content_type=SAFETENSORS)
    assert reply.status == 200, reply
    assert reply.json["lr"] == 0.25
    assert reply.json["grad_norm"] == pytest.approx(np.linalg.norm(flat(GRADS)) / 2)
    assert values(api) == {**PARAMS, "w": stepped("w", 0.125)["w"]}


BAD_CONTROLS = {
    "overrides={": ("invalid-json", 400),
    "overrides=1": ("invalid-request", 422),
    "overrides=%7B%22x%22%3A%7B%22lr%22%3A1%7D%7D": ("invalid-request", 422),
    "overrides=%7B%22default%22%3A%7B%22lr%22%3A-1%7D%7D": ("invalid-request", 422),
    "overrides=%7B%22default%22%3A%7B%22lr%22%3ANaN%7D%7D": ("invalid-json", 400),
    "overrides=%7B%22default%22%3A%7B%22momentum%22%3A0.9%7D%7D": ("structural", 409),
    "grad_scale=0": ("invalid-request", 422),
    "grad_scale=nan": ("invalid-request", 422),
    "incarnation=x": ("invalid-request", 422),
    "incarnation=" + "0" * 32: ("epoch-changed", 409),
}


@pytest.mark.parametrize("query", BAD_CONTROLS)
def test_bad_control_values_change_nothing(api, query):
    api.make(optimizer=SGD)
    before = api.everything()
    slug, status = BAD_CONTROLS[query]
    reply = api.call("POST", f"{STEPS}?{query}", container(GRADS), content_type=SAFETENSORS)
    check_problem(reply, status, slug)
    assert api.everything() == before
    assert api.push().status == 200


def test_a_schedule_is_what_was_previewed(api):
    api.make(optimizer=SGD, groups=[GROUP],
             schedule={"kind": "cosine", "warmup_steps": 2, "total_steps": 8})  # fmt: skip
    preview = api.call("GET", "/v1/sessions/m/schedule?steps=10").json
    assert preview["step"] == 0
    assert preview["lr"]["g"] == [rate / 2 for rate in preview["lr"]["default"]]
    seen = [api.push().json["lr"] for _ in range(10)]
    assert seen == preview["lr"]["default"]
    assert seen[0] == 0.5
    assert seen[-1] == 0.0
    for query in ("steps=0", "steps=10001", "steps=x", "step=1", "steps=1&steps=2"):
        check_problem(api.call("GET", f"/v1/sessions/m/schedule?{query}"))


def test_an_average_in_every_form(api):
    api.make(optimizer=SGD, ema={"decay": 0.5})
    api.push()
    path = "/v1/sessions/m/params?of=ema"
    wanted = {
        name: (np.asarray(value) - 0.5 * np.asarray(GRADS[name])).tolist()
        for name, value in PARAMS.items()
    }
    assert values(api, path) == wanted
    raw = api.call("GET", path, accept=f"{OCTET}; dtype=F32")
    np.testing.assert_array_equal(np.frombuffer(raw.body, np.float32), flat(wanted))
    boxed = api.call("GET", f"{path}&names=b", accept=SAFETENSORS)
    size = header_length(boxed.body[:8])
    header = parse_header(boxed.body[8 : 8 + size], len(boxed.body))
    assert [tensor.name for tensor in header.tensors] == ["b"]
    assert boxed.headers["etag"] != api.call(
        "GET", "/v1/sessions/m/params?names=b", accept=SAFETENSORS
    ).headers["etag"]  # fmt: skip
    again = api.call("GET", path, if_none_match=api.call("GET", path).headers["etag"])
    assert again.status == 304
    check_problem(api.call("GET", "/v1/sessions/m/params?of=mean"), 422, "invalid-request")
    api.make("plain")
    reply = api.call("GET", "/v1/sessions/plain/params?of=ema")
    check_problem(reply, 409, "average-missing")


@pytest.mark.parametrize("encoding", ["JSON", "safetensors"])
def test_a_group_is_added(api, encoding):
    api.make(optimizer=SGD, missing="skip")
    group = {"name": "late", "lr": 0.5}
    path = "/v1/sessions/m/groups"

    def add(group, params):
        if encoding == "JSON":
            return api.call("POST", path, {"group": group, "params": params})
        query = quote(json.dumps(group))
        return api.call("POST", f"{path}?group={query}", container(params),
                        content_type=SAFETENSORS)  # fmt: skip

    reply = add(group, {"n": [1.0, 2.0]})
    assert reply.status == 201, reply
    assert (reply.json["epoch"], reply.json["version"]) == (1, 2)
    assert add(group, {"n": [1.0, 2.0]}).status == 200
    before = api.everything()
    check_problem(add({"name": "late", "lr": 0.1}, {"n": [1.0, 2.0]}), 409, "spec-differs")
    check_problem(add({"name": "other"}, {"n": [1.0]}), 422, "tensor-mismatch")
    check_problem(add({"name": "other"}, {}), 422, "tensor-mismatch")
    check_problem(add({"name": "other", "lrr": 1}, {"m": [1.0]}), 422, "invalid-request")
    check_problem(add({"name": "other", "params": ["m"]}, {"m": [1.0]}), 422, "invalid-request")
    check_problem(add([], {"m": [1.0]}), 422, "invalid-request")
    if encoding == "JSON":
        check_problem(add({"name": "other"}, {"m": [1e39]}), 422, "nonfinite")
    assert api.everything() == before
    assert api.push(grads={"n": [1.0, 1.0]}).status == 200
    assert values(api) == {**PARAMS, "n": [0.5, 1.5]}


def test_raw_bodies_name_no_new_tensor(api):
    api.make()
    reply = api.call("POST", "/v1/sessions/m/groups", b"\0" * 4, content_type=f"{OCTET}; dtype=F32")
    check_problem(reply, 415, "unsupported-media-type")


def test_a_created_group_that_fits_no_tensor_leaves_no_session(api):
    for groups in ([{"params": ["x*"]}], [{"params": ["w"]}, {"params": ["*"]}]):
        body = {"optimizer": SGD, "groups": groups, "params": PARAMS}
        check_problem(api.call("PUT", "/v1/sessions/m", body), 422, "tensor-mismatch")
        check_problem(api.call("GET", "/v1/sessions/m"), 404, "session-unknown")


def test_skipped_pushes_are_in_the_history_and_it_is_followed_without_gaps(api):
    api.make(optimizer=SGD, on_nonfinite="skip")
    for number in range(6):
        grads = container({**GRADS, "s": np.inf if number % 3 == 2 else 1.0})
        assert api.call("POST", STEPS, grads, content_type=SAFETENSORS).status == 200
    path = "/v1/sessions/m/history"
    rows = api.call("GET", path).json["steps"]
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert [row["applied"] for row in rows] == [True, True, False] * 2
    followed = []
    while page := api.call("GET", f"{path}?limit=2&after={len(followed)}").json["steps"]:
        followed += page
    assert followed == rows
    assert api.call("GET", f"{path}?limit=2").json["steps"] == rows[-2:]
    assert api.call("GET", f"{path}?after_step=2").json["steps"] == rows[2:]
    assert api.call("GET", f"{path}?after_step=4").json["steps"] == rows[5:]


def _drop(api):
    assert api.call("PATCH", "/v1/sessions/m", {"missing": "refuse"}).status == 200


def _thaw(api):
    change = {"missing": "refuse", "groups": [{"name": "g", "frozen": False}]}
    assert api.call("PATCH", "/v1/sessions/m", change).status == 200


def _grow(api):
    body = {"group": {"name": "late"}, "params": {"n": [1.0]}}
    assert api.call("POST", "/v1/sessions/m/groups", body).status == 201


def _grow_and_refuse(api):
    _grow(api)
    _drop(api)


@pytest.mark.parametrize("change", [_drop, _thaw, _grow, _grow_and_refuse])
@pytest.mark.parametrize("first", [*PARTIAL, "raw"])
def test_a_replay_is_one_whatever_the_session_admits_by_now(api, change, first):
    api.make(optimizer=SGD, missing="skip", groups=[{**GROUP, "params": ["s"], "frozen": True}])
    key = {"worker": "w", "sequence": 1, "base_version": 1}
    query = "&".join(f"{name}={value}" for name, value in key.items())

    def push():
        if first != "raw":
            return PARTIAL[first](api, key)
        whole = flat({name: GRADS[name] for name in "wbs"}).tobytes()
        return api.call("POST", f"{STEPS}?{query}", whole, content_type=f"{OCTET}; dtype=F32")

    original = push()
    assert original.status == 200
    change(api)
    before = api.everything()
    again = push()
    assert again.json == {**original.json, "replayed": True}
    assert api.everything() == before
    other = push_of_another(api, key)
    check_problem(other, 422, "key-reused")
    assert api.everything() == before


def push_of_another(api, key):
    return api.call("POST", STEPS, {"grads": {"w": GRADS["w"], "b": [9.0, 9.0]}, **key})


def test_a_patch_changes_no_formula_of_a_group_with_another_preset(api):
    group = {"name": "g", "params": ["b"], "preset": "torch"}
    api.make(optimizer={"rule": "rmsprop"}, groups=[group], missing="skip")
    read = lambda: api.call("GET", "/v1/sessions/m").json["groups"][0]["eps_inside_sqrt"]  # noqa: E731 - read twice
    assert read() is False
    assert api.call("PATCH", "/v1/sessions/m", {"norms": True}).status == 200
    assert read() is False
    _grow(api)
    assert read() is False


def test_a_group_that_was_patched_since_may_be_added_again(api):
    api.make(optimizer=SGD)
    body = {"group": {"name": "h", "lr": 0.5}, "params": {"n": [1.0]}}
    assert api.call("POST", "/v1/sessions/m/groups", body).status == 201
    patch = {"groups": [{"name": "h", "lr": 0.1}]}
    assert api.call("PATCH", "/v1/sessions/m", patch).status == 200
    assert api.call("POST", "/v1/sessions/m/groups", body).status == 200


def test_readers_see_a_layout_whole_while_groups_come(api):
    """Every form, while 40 groups are added: 200, and as long as it says."""
    api.make(optimizer=SGD, missing="skip", ema={"decay": 0.5})
    stop = threading.Event()
    wrong = []
    path = "/v1/sessions/m"

    def read():
        forms = [
            (f"{path}/params", SAFETENSORS), (f"{path}/params?dtype=F16", SAFETENSORS),
            (f"{path}/params?of=ema", SAFETENSORS), (f"{path}/params", "application/json"),
            (f"{path}/params", f"{OCTET}; dtype=F32"), (f"{path}/state", SAFETENSORS),
            (path, "application/json"),
        ]  # fmt: skip
        while not stop.is_set():
            for where, accept in forms:
                reply = api.call("GET", where, accept=accept)
                if reply.status != 200:
                    wrong.append((where, accept, reply))
                elif accept == SAFETENSORS:
                    size = header_length(reply.body[:8])
                    parse_header(reply.body[8 : 8 + size], len(reply.body))
                elif where == path:
                    named = {"default", *(group["name"] for group in reply.json["groups"])}
                    if not {row["group"] for row in reply.json["layout"]} <= named:
                        wrong.append(reply)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(40):
        body = {"group": {"name": f"g{number}"}, "params": {f"n{number}": [1.0] * (number + 1)}}
        assert api.call("POST", f"{path}/groups", body).status == 201
        assert (
            api.push(
                grads={"w": GRADS["w"]},
            ).status
            == 200
        )
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
