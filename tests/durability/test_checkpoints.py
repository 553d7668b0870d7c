"""Checkpoints: made beside the steps, read by anyone, taken back to the bit."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load

from gradpost.protocol import SAFETENSORS
from kernels.registry import RULES
from tests.api.conftest import PARAMS, check_problem
from tests.durability.conftest import Server
from tests.durability.test_recovery import CASES, MATRIX, OPTIONS, make, push_some
from tests.storage.counter import Scratch

TYPED = {"content_type": SAFETENSORS}


@pytest.fixture(scope="module")
def server():
    with Scratch() as path:
        server = Server(path / "data")
        yield server
        server.close()


def empty(server, name, rule, **options):
    """A session as `make` makes it, without parameters."""
    source = make(server, rule, f"{name}-like", "none", **options)
    stated = json.loads(json.dumps(source.created_with.model_dump(exclude_unset=True, mode="json")))
    assert server.call("PUT", f"/v1/sessions/{name}", stated).status == 201


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(server, rule, options):
    name, fields = f"{rule}-{options}", OPTIONS[options]
    make(server, rule, name, "none", **fields)
    push_some(server, 4, rule=rule, name=name, **fields)
    made = server.call("POST", f"/v1/sessions/{name}/checkpoints", {"name": "four"})
    assert made.status == 201, made
    kept = server.state_of(name)
    push_some(server, 3, 5, rule, name, **fields)
    whole = server.state_of(name)
    file = server.call("GET", f"/v1/sessions/{name}/checkpoints/four")
    assert file.headers["content-type"] == SAFETENSORS
    reply = server.call("POST", f"/v1/sessions/{name}/restore", {"checkpoint": "four"})
    assert reply.status == 200, reply
    assert (reply.json["epoch"], reply.json["version"], reply.json["step"]) == (2, 1, 4)
    empty(server, f"{name}-new", rule, **fields)
    reply = server.call("POST", f"/v1/sessions/{name}-new/restore", file.body, **TYPED)
    assert reply.status == 200, reply
    for one, worker in ((name, "x"), (f"{name}-new", "y")):
        found = server.state_of(one)
        for what in ("params", "state", "average", "runs"):
            assert found[what] == kept[what], what
        push_again(server, one, worker, rule, fields)
        found = server.state_of(one)
        for what in ("params", "state", "average", "runs"):
            assert found[what] == whole[what], what


def push_again(server, name, worker, rule, fields):
    """The pushes 5 to 7 of `push_some`, by a worker that has made none."""
    call, push = server.call, server.push

    def renamed(session, grads, **control):
        return push(session, grads, **{**control, "worker": worker})

    server.push = renamed
    try:
        push_some(server, 3, 5, rule, name, **fields)
    finally:
        server.push = push
    assert server.call == call


def test_any_safetensors_library_opens_one(server):
    make(server, name="file", durability="none")
    push_some(server, 2, name="file")
    made = server.call("POST", "/v1/sessions/file/checkpoints").json
    assert re.fullmatch("step-2-version-1-3-[0-9a-f]{8}", made["name"])
    reply = server.call("GET", f"/v1/sessions/file/checkpoints/{made['name']}")
    assert reply.headers["etag"] == f'"{made["digest"]}"'
    assert len(reply.body) == made["bytes"]
    found = load(reply.body)
    state = load(server.call("GET", "/v1/sessions/file/state", accept=SAFETENSORS).body)
    params = load(server.call("GET", "/v1/sessions/file/params", accept=SAFETENSORS).body)
    assert found.keys() == {f"params/{name}" for name in params} | state.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(found[f"params/{name}"], array)
    for name, array in state.items():
        np.testing.assert_array_equal(found[name], array)
    part = server.call("GET", f"/v1/sessions/file/checkpoints/{made['name']}", range="bytes=8-15")
    assert (part.status, part.body) == (206, reply.body[8:16])
    path = f"/v1/sessions/file/checkpoints/{made['name']}"
    assert server.call("GET", path, range="bytes=-4").body == reply.body[-4:]
    for wrong in ("bytes=99999999-", "bytes=5-4", "bytes=-0", "bytes=0-1,4-5", "abc", "items=0-1"):
        check_problem(server.call("GET", path, range=wrong), 400, "bad-request")
    reply = server.call("POST", "/v1/sessions/file/checkpoints?name=x")
    check_problem(reply, 422, "invalid-request")


def test_they_are_listed_made_once_and_deleted(server):
    make(server, name="list", durability="none")
    path = "/v1/sessions/list/checkpoints"
    assert server.call("GET", path).json == {"checkpoints": []}
    first = server.call("POST", path)
    again = server.call("POST", path)
    assert (first.status, again.status) == (201, 200)
    assert first.json == again.json
    assert first.headers["location"] == f"{path}/{first.json['name']}"
    assert server.call("POST", path, {"name": "best"}).status == 201
    check_problem(server.call("POST", path, {"name": "best"}), 409, "checkpoint-exists")
    names = [one["name"] for one in server.call("GET", path).json["checkpoints"]]
    assert names == [first.json["name"], "best"]
    assert server.call("DELETE", f"{path}/best").status == 204
    for method in ("GET", "DELETE"):
        check_problem(server.call(method, f"{path}/best"), 404, "checkpoint-unknown")
    for name in ("../x", "", ".", "a" * 129, 5):
        check_problem(server.call("POST", path, {"name": name}), 422, "invalid-request")
    check_problem(server.call("GET", f"{path}/%2e%2e"), 422)
    reply = server.call("POST", "/v1/sessions/list/restore", {"checkpoint": "best"})
    check_problem(reply, 404, "checkpoint-unknown")


def test_a_session_that_begins_anew_makes_its_own(start):
    server = start("anew")
    digests = []
    for params in (PARAMS, {**PARAMS, "s": 9.0}):
        server.make("m", params)
        push_some(server, 2)
        made = server.call("POST", "/v1/sessions/m/checkpoints")
        assert made.status == 201
        digests.append(made.json["digest"])
        server = server.restarted()
    assert len(set(digests)) == 2
    server.close()


def test_one_of_two_makers_of_a_name_is_told_that_it_is_taken(server):
    make(server, name="both", durability="none")
    path = "/v1/sessions/both/checkpoints"
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(server.call, "POST", path, {"name": "best"}) for _ in range(4)]
        replies = [one.result() for one in found]
    assert sorted(reply.status for reply in replies) == [201, 409, 409, 409]
    (made,) = (reply.json for reply in replies if reply.status == 201)
    assert server.call("GET", path).json == {"checkpoints": [made]}


def test_a_restore_is_whole_or_not_at_all(server):
    make(server, name="sure", durability="log")
    make(server, name="other", rule="sgd", durability="none")
    push_some(server, 2, name="sure")
    for name in ("sure", "other"):
        assert server.call("POST", f"/v1/sessions/{name}/checkpoints", {"name": "c"}).status == 201
    file = server.call("GET", "/v1/sessions/sure/checkpoints/c").body
    other = server.call("GET", "/v1/sessions/other/checkpoints/c").body
    params = server.call("GET", "/v1/sessions/sure/params", accept=SAFETENSORS).body
    before = server.state_of("sure")
    path = "/v1/sessions/sure/restore"
    for body, slug in (
        (other, "tensor-mismatch"), (params, "invalid-request"), (file[:-4], "invalid-tensors"),
        (b"", "length-required"),
    ):  # fmt: skip
        reply = server.call("POST", path, body, **TYPED)
        assert 400 <= reply.status < 500, slug
    for fields in ({"scope": "full"}, {"checkpoint": "c", "scope": "half"}, {"checkpoint": 1}):
        check_problem(server.call("POST", path, fields), 422, "invalid-request")
    reply = server.call("POST", path, {"checkpoint": "c"}, if_match='"1-9"')
    check_problem(reply, 412, "precondition-failed")
    assert server.state_of("sure") == before
    reply = server.call("POST", f"{path}?scope=params", other, **TYPED)
    assert reply.status == 200, reply
    found = server.state_of("sure")
    assert found["state"] == before["state"]
    assert found["params"] == server.state_of("other")["params"]
    assert found["at"] == (2, 1, 2)
    again = server.crashed()
    assert again.state_of("sure") == found
    again.close()


def test_a_restore_forgets_no_key_and_cuts_the_history(server):
    make(server, name="keys")
    push_some(server, 2, name="keys")
    server.call("POST", "/v1/sessions/keys/checkpoints", {"name": "c"})
    push_some(server, 2, 3, name="keys")
    assert server.call("POST", "/v1/sessions/keys/restore", {"checkpoint": "c"}).status == 200
    found = server.call("GET", "/v1/sessions/keys/workers/v").json
    assert found["ranges"] == [[1, 4]]
    reply = server.push("keys", worker="v", sequence=9, base_version="1-4")
    check_problem(reply, 409, "epoch-changed")


def test_checkpoints_outlive_their_session_s_server_and_end_with_the_session(start):
    server = start("own")
    make(server, durability="none")
    push_some(server, 2)
    kept = server.state_of()
    assert server.call("POST", "/v1/sessions/m/checkpoints", {"name": "c"}).status == 201
    server = server.restarted()
    empty(server, "m", "adam")
    assert server.call("POST", "/v1/sessions/m/restore", {"checkpoint": "c"}).status == 200
    assert server.state_of()["state"] == kept["state"]
    assert server.call("DELETE", "/v1/sessions/m").status == 204
    make(server, durability="none")
    assert server.call("GET", "/v1/sessions/m/checkpoints").json == {"checkpoints": []}
    server.close()


def test_a_damaged_checkpoint_is_never_restored(start):
    server = start("bad")
    make(server)
    assert server.call("POST", "/v1/sessions/m/checkpoints", {"name": "c"}).status == 201
    (file,) = (server.folder / "checkpoints").glob("*/c.*")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    before = server.state_of()
    reply = server.call("POST", "/v1/sessions/m/restore", {"checkpoint": "c"})
    assert (reply.status, reply.json["type"]) == (503, "/problems/session-damaged")
    assert server.call("GET", "/v1/sessions/m/checkpoints/c").status == 503
    assert server.state_of() == before


def test_without_a_folder_there_are_none(api_without_folder):
    api_without_folder.make()
    for method in ("GET", "POST"):
        reply = api_without_folder.call(method, "/v1/sessions/m/checkpoints")
        check_problem(reply, 409, "data-dir-missing")


assert set(RULES) >= {rule for rule, _ in CASES}
assert MATRIX["w"] == PARAMS["w"]
