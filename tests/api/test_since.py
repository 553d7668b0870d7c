"""Pulls that ask only for what has changed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load

from gradpost.protocol import SAFETENSORS
from tests.api.conftest import GRADS, check_problem
from tests.wire.test_compact import packed


@pytest.fixture
def model(api):
    api.make(missing="skip")
    return api


def pull(api, query="", name="m", **headers):
    return api.call("GET", f"/v1/sessions/{name}/params{query}", **headers)


def changed(reply):
    """The names an answer holds, and the version it says that it is since."""
    assert reply.status == 200, reply
    return sorted(reply.json["params"]), reply.headers.get("gradpost-since")


def test_only_what_changed_comes(model):
    model.push(grads={"w": GRADS["w"]})
    model.push(grads={"b": GRADS["b"]})
    whole = pull(model).json["params"]
    assert changed(pull(model, "?since=1-1")) == (["b", "w"], "1-1")
    assert changed(pull(model, "?since=2")) == (["b"], "1-2")
    assert changed(pull(model, "?since=1-3")) == ([], "1-3")
    part = pull(model, "?since=1-2").json
    assert part["params"] == {"b": whole["b"]}
    assert (part["epoch"], part["version"], part["step"]) == (1, 3, 2)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "model"])
def test_as_safetensors_and_in_any_dtype(model, dtype):
    model.push(grads={"w": GRADS["w"]})
    for query, names in (("?since=1-1&", {"w"}), ("?since=1-2&", set())):
        reply = pull(model, f"{query}dtype={dtype}", accept=SAFETENSORS)
        assert reply.headers["gradpost-since"] == query[7:-1]
        if dtype == "BF16":
            end = 8 + int.from_bytes(reply.body[:8], "little")
            found = json.loads(reply.body[8:end]).keys() - {"__metadata__"}
        else:
            found = load(reply.body)
            whole = load(pull(model, f"?dtype={dtype}", accept=SAFETENSORS).body)
            assert all(np.array_equal(found[name], whole[name]) for name in found)
        assert set(found) == names


def test_names_are_chosen_from_what_changed(model):
    model.push(grads={"w": GRADS["w"], "s": GRADS["s"]})
    assert changed(pull(model, "?since=1-1&names=s&names=b")) == (["s"], "1-1")
    assert changed(pull(model, "?since=1-2&names=s")) == ([], "1-2")


def test_a_version_that_is_not_there_yet(model):
    before = model.everything()
    for since in ("1-2", "2-1", "9"):
        problem = check_problem(pull(model, f"?since={since}"), 409, "version-unknown")
        assert (problem["epoch"], problem["version"]) == (1, 1)
    assert model.everything() == before
    assert pull(model).status == 200


def test_history_that_was_cut_or_forgotten(model):
    everything = ["b", "s", "w"]
    assert changed(pull(model, "?since=1-0")) == (everything, None)
    for _ in range(64):
        model.push(grads={"s": 1.0})
    assert changed(pull(model, "?since=1-1")) == (["s"], "1-1")
    model.push(grads={"s": 1.0})
    assert changed(pull(model, "?since=1-1")) == (everything, None)
    assert changed(pull(model, "?since=1-2")) == (["s"], "1-2")
    model.call("PUT", "/v1/sessions/m/params", {"params": {"s": 1.0}})
    assert pull(model).json["epoch"] == 2
    for since in ("1-66", "1-99"):  # of an older epoch, whatever its number
        assert changed(pull(model, f"?since={since}")) == (everything, None)


def test_skipped_pushes_are_no_versions(api):
    api.make(missing="skip", on_nonfinite="skip")
    api.push(grads={"s": 1.0})
    body = packed({"w": ("F32", np.full((2, 3), np.inf))})
    reply = api.call("POST", "/v1/sessions/m/steps", body, content_type=SAFETENSORS)
    assert reply.json["skipped"] == "nonfinite"
    api.push(grads={"b": [1.0, 2.0]})
    assert changed(pull(api, "?since=1-1")) == (["b", "s"], "1-1")
    assert changed(pull(api, "?since=1-2")) == (["b"], "1-2")


def test_frozen_tensors_do_not_change(api):
    api.make(groups=[{"name": "still", "params": ["w"], "frozen": True}])
    api.push()
    assert changed(pull(api, "?since=1-1")) == (["b", "s"], "1-1")


def test_a_group_that_was_added(model):
    model.push(grads={"b": GRADS["b"]})
    group = {"group": {"name": "head"}, "params": {"head": [1.0, 2.0]}}
    assert model.call("POST", "/v1/sessions/m/groups", group).status == 201
    model.push(grads={"s": 1.0})
    assert changed(pull(model, "?since=1-1")) == (["b", "head", "s"], "1-1")
    assert changed(pull(model, "?since=1-2")) == (["head", "s"], "1-2")
    assert changed(pull(model, "?since=1-3")) == (["s"], "1-3")


def test_tags_differ_by_what_an_answer_holds(model):
    model.push(grads={"w": GRADS["w"]})
    model.push(grads={"b": GRADS["b"]})
    queries = ["", "?since=1-1", "?since=1-2", "?since=1-3", "?since=1-2&names=b"]
    tags = [pull(model, query).headers["etag"] for query in queries]
    assert len(set(tags)) == len(queries)
    assert pull(model, "?since=1-0").headers["etag"] == tags[0]  # it is the whole
    for query, tag in zip(queries, tags, strict=True):
        assert pull(model, query, if_none_match=tag).status == 304
    assert pull(model, "?since=1-2", if_none_match=tags[0]).status == 200


def test_waiting_for_a_version(model):
    model.push(grads={"w": GRADS["w"]})
    found = pull(model, "?since=1-1&min_version=1-2", prefer="wait=1")
    assert changed(found) == (["w"], "1-1")
    reply = pull(model, "?since=1-1&min_version=1-3", prefer="wait=0.05")
    check_problem(reply, 409, "version-pending")


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("?since=new", {}, 422),
        ("?since=0-1", {}, 422),
        ("?since=1&since=2", {}, 400),
        ("?since=1&of=ema", {}, 422),
        ("?since=1", {"accept": "application/octet-stream"}, 406),
        ("?since=1", {"accept": "application/octet-stream;dtype=F32"}, 406),
    ],
)
def test_what_can_not_be_asked(model, query, headers, status):
    check_problem(pull(model, query, **headers), status)
