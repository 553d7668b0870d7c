"""What a client may conclude, under contention: concurrent keys, waiting pulls, slow readers."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gradpost.protocol import SAFETENSORS
from gradpost.protocol.tensors import build_header
from service.settings import Settings
from tests.api.conftest import PARAMS, Api, check_problem, flat

KEY = {"worker": "w", "sequence": 1, "base_version": 1}
M = "/v1/sessions/m"


def on_loop(api, function):
    """Runs it where sessions are used: on the application's event loop."""

    async def call():
        return function()

    return asyncio.run_coroutine_threadsafe(call(), api.transport._loop).result(10)


def test_one_key_uploaded_by_many_at_once_is_applied_once(api):
    session = api.make()
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: api.push(**KEY), range(24)))
    for reply in replies:
        if reply.status != 200:
            check_problem(reply, 409, "in-flight")
    answers = [reply.json for reply in replies if reply.status == 200]
    assert sum(not answer["replayed"] for answer in answers) == 1
    assert len({json.dumps({**a, "replayed": None}) for a in answers}) == 1
    assert (session.step, session.ledger.size()) == (1, 1)


def test_the_window_is_the_last_1024_numbers(api):
    session = api.make(optimizer={"rule": "sgd", "lr": 0.0})
    first = api.push(**KEY).json
    for sequence in range(2, 1025):
        assert api.push(**{**KEY, "sequence": sequence}).status == 200
    assert api.push(**KEY).json == {**first, "replayed": True}
    assert api.push(**{**KEY, "sequence": 1025}).status == 200
    before = api.everything()
    check_problem(api.push(**KEY), 409, "too-old")
    assert api.everything() == before
    assert session.ledger.size() == 1024


def test_a_pull_waits_for_its_version(api):
    api.make()
    path = f"{M}/params?min_version=1-2"
    check_problem(api.call("GET", path), 409, "version-pending")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(api.call, "GET", path, prefer="wait=2")
        session = api.app.state.sessions.get("m")
        while not len(session.waiting) and not waiting.done():
            threading.Event().wait(0.001)
        assert api.push().status == 200
        assert waiting.result().json["version"] == 2


def test_only_the_first_worker_uploads(api):
    api.make(params=None)
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(
            lambda _: api.call("PUT", f"{M}/params", {"params": PARAMS}, if_none_match="*"),
            range(8),
        ))  # fmt: skip
    assert sorted(reply.status for reply in replies) == [200] + [412] * 7
    check_problem(next(r for r in replies if r.status == 412), 412, "precondition-failed")
    assert api.app.state.sessions.get("m").epoch == 1


def test_a_partial_upload_keeps_the_moments_and_starts_an_epoch(api):
    session = api.make()
    assert api.push().status == 200
    moments = [array.tobytes() for array in session.arena.state]
    assert api.call("PUT", f"{M}/params", {"params": {"s": 9.0}}).status == 200
    assert [array.tobytes() for array in session.arena.state] == moments
    assert (session.epoch, session.version, session.step) == (2, 1, 1)
    params = api.call("GET", f"{M}/params").json["params"]
    assert params["s"] == 9.0


@pytest.mark.parametrize("accept", ["application/json", SAFETENSORS])
def test_state_goes_round_over_http_to_the_bit(api, accept):
    for name in ("m", "straight"):
        api.make(name)
        for _ in range(3):
            assert api.push(name).status == 200
    got = api.call("GET", f"{M}/state", accept=accept)
    params = api.call("GET", f"{M}/params", accept=accept)
    api.make("copy")
    for what, reply in (("params", params), ("state", got)):
        body = reply.body
        if what == "params" and accept != SAFETENSORS:
            body = json.dumps({"params": reply.json["params"]}).encode()
        taken = api.call("PUT", f"/v1/sessions/copy/{what}", body, content_type=accept)
        assert taken.status == 200, taken
    for name in ("copy", "straight"):
        assert api.push(name).status == 200
    copy, straight = api.everything("copy"), api.everything("straight")
    assert copy[:2] == straight[:2]
    assert copy[2][2] == straight[2][2] == 4


def test_a_held_version_is_untorn_while_steps_go_on(api):
    session = api.make()
    held = on_loop(api, session.arena.versions.hold)
    kept = held.flat.tobytes()
    assert kept == flat(PARAMS).tobytes()
    for _ in range(20):
        assert api.push().status == 200
        assert held.flat.tobytes() == kept
    assert (held.number, session.version) == (1, 21)
    on_loop(api, lambda: session.release(held))


def test_pulls_share_or_wait_when_versions_run_out_and_steps_never_do(api):
    session = api.make()
    held = []
    for _ in range(api.app.state.settings.max_versions + 2):
        version = on_loop(api, session.arena.versions.hold)
        if version is not None:
            held.append(version)
        assert api.push().status == 200
    assert 1 <= len(held) < api.app.state.settings.max_versions
    check_problem(api.call("GET", f"{M}/params"), 409, "version-pending")
    for version in held:
        on_loop(api, lambda version=version: session.release(version))
    assert api.call("GET", f"{M}/params").json["version"] == session.version


def test_a_version_of_tomorrow_is_unknown(api):
    api.make()
    problem = check_problem(api.push(**{**KEY, "base_version": "1-2"}), 409, "version-unknown")
    assert (problem["epoch"], problem["version"]) == (1, 1)
    check_problem(api.push(**{**KEY, "base_version": "2-1"}), 409, "version-unknown")


@pytest.fixture
def narrow():
    api = Api(Settings(max_versions=2, memory_bytes=1 << 28, wait_cap_s=1, log_level="error"))
    yield api
    api.transport.close()


@pytest.mark.parametrize("what", ["params", "state"])
def test_an_upload_that_finds_no_buffer_changes_nothing(narrow, what):
    session = narrow.make()
    state = narrow.call("GET", f"{M}/state").json
    body = {"params": {"s": 1.0}} if what == "params" else state
    held = on_loop(narrow, session.arena.versions.hold)
    assert narrow.push().status == 200
    before = narrow.everything()
    check_problem(narrow.call("PUT", f"{M}/{what}", body), 429, "overloaded")
    assert narrow.everything() == before
    on_loop(narrow, lambda: session.release(held))
    assert narrow.call("PUT", f"{M}/{what}", body).status == 200
    assert (session.epoch, session.version) == (2, 1)


@pytest.mark.parametrize("what", ["params", "state"])
def test_an_upload_beside_a_reader_of_the_head_leaves_what_it_reads(narrow, what):
    session = narrow.make()
    state = narrow.call("GET", f"{M}/state").json
    body = {"params": {"s": 1.0}} if what == "params" else state
    held = on_loop(narrow, session.arena.versions.hold)
    assert narrow.call("PUT", f"{M}/{what}", body).status == 200
    assert held.flat.tobytes() == flat(PARAMS).tobytes()
    on_loop(narrow, lambda: session.release(held))
    assert narrow.push().status == 200
    assert narrow.call("DELETE", M).status == 204
    assert narrow.app.state.budget.used == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_first_upload_that_is_not_finite_takes_no_memory(api, value):
    api.make(params=None)
    values = np.array([1, value], np.float32)
    body = build_header([("w", "F32", (2,))], None) + values.tobytes()
    for _ in range(2):
        reply = api.call("PUT", f"{M}/params", body, content_type=SAFETENSORS)
        check_problem(reply, 422, "nonfinite")
        assert api.app.state.budget.used == 0
    assert api.call("PUT", f"{M}/params", {"params": PARAMS}).status == 200
    assert api.push().status == 200
