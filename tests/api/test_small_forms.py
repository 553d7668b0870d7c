"""Pushes of rows, int8 and largest values over HTTP: what they do, and what is refused."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from gradpost.protocol import SAFETENSORS
from service.routes import reading
from service.schemas import PushControl
from service.wire import compact
from tests.api.conftest import GRADS, check_problem
from tests.wire.bodies import Destination
from tests.wire.test_compact import BAD, packed

DENSE = {"w": [[4.5, 6.5, 8.5], [0, 0, 0]], "b": [0, -0.5], "s": 3.0}
PLAIN = {"b": ("F32", [0, -0.5]), "s": ("F32", 3.0)}
FORMS = {
    "dense": {"w": ("F32", DENSE["w"])} | PLAIN,
    "dense F64": {"w": ("F64", DENSE["w"]), "b": ("F64", [0, -0.5]), "s": ("F64", 3.0)},
    "rows": {"w#idx": ("I64", [0, 0]), "w#rows": ("F32", [[4, 6, 8], [0.5, 0.5, 0.5]])} | PLAIN,
    "rows in BF16": {
        "w#idx": ("I64", [0, 0]), "w#rows": ("BF16", [[4, 6, 8], [0.5, 0.5, 0.5]]),
        "b": ("BF16", [0, -0.5]), "s": ("BF16", 3.0),
    },
    "topk": {
        "w#topk": ("I64", [2, 0, 1]), "w#values": ("F32", [8.5, 4.5, 6.5]),
        "b#topk": ("I64", [1]), "b#values": ("F32", [-0.5]), "s": ("F32", 3.0),
    },
    "int8": {
        "w#q8": ("I8", [9, 13, 17, 0, 0, 0]), "w#scale": ("F32", [0.5]),
        "b#q8": ("I8", [0, -1]), "b#scale": ("F32", [0.5]),
        "s#q8": ("I8", [6]), "s#scale": ("F32", [0.5]),
    },
    "JSON": DENSE,
    "JSON rows": {
        "w": {"idx": [0, 0], "rows": [[4, 6, 8], [0.5, 0.5, 0.5]]}, "b": [0, -0.5], "s": 3.0
    },
}  # fmt: skip


def send(api, tensors, query="", name="m", metadata=None):
    path = f"/v1/sessions/{name}/steps{query}"
    return api.call("POST", path, packed(tensors, metadata), content_type=SAFETENSORS)


def push(api, form, name="m", sequence=1):
    if form.startswith("JSON"):
        return api.push(name, FORMS[form], worker="w0", sequence=sequence, base_version=1)
    query = f"?worker=w0&sequence={sequence}&base_version=1"
    return send(api, FORMS[form], query, name)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense F64"])
@pytest.mark.parametrize("first", ["dense", "rows", "JSON rows"])
def test_the_same_push_in_another_form_is_a_replay(api, first, form):
    api.make()
    done = push(api, first)
    assert (done.status, done.json["applied"], done.json["replayed"]) == (200, True, False)
    before = api.everything()
    again = push(api, form)
    assert again.status == 200, again
    assert again.json == done.json | {"replayed": True}
    assert api.everything() == before


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"dense"}))
@pytest.mark.parametrize("fields", [{"rule": "sgd"}, {"rule": "adam", "clip": {"global_norm": 1}}])
def test_every_form_does_what_the_dense_push_does(api, form, fields):
    dtype = "F64" if form == "dense F64" else "F32"
    for name in ("m", "twin"):
        api.make(name, dtype=dtype, **fields)
    for sequence in (1, 2):
        assert push(api, "dense", "m", sequence).status == 200
        assert push(api, form, "twin", sequence).status == 200
    assert api.everything("m")[:4] == api.everything("twin")[:4]


def test_another_value_in_another_form_is_no_replay(api):
    api.make()
    assert push(api, "dense").status == 200
    other = FORMS["rows"] | {"w#idx": ("I64", [0, 1])}
    before = api.everything()
    reply = send(api, other, "?worker=w0&sequence=1&base_version=1")
    check_problem(reply, 422, "key-reused")
    assert api.everything() == before


def test_tensors_that_do_not_come(api):
    api.make(missing="skip")
    before = np.array(api.app.state.sessions.get("m").arena.versions.head.flat)
    reply = send(api, {"b#topk": ("I64", [1]), "b#values": ("F32", [1])})
    assert reply.status == 200
    changed = api.app.state.sessions.get("m").arena.versions.head.flat != before
    assert np.flatnonzero(changed).tolist() == [7]


@pytest.fixture
def model(api):
    api.make()
    assert api.push(worker="w0", sequence=7, base_version=1).status == 200
    return api


def refused(api, reply, before, status=422):
    problem = check_problem(reply, status)
    assert api.everything() == before
    assert push(api, "int8", sequence=8).json["applied"]
    return problem


@pytest.mark.parametrize("name", BAD)
def test_bad_forms_change_nothing(model, name):
    before = model.everything()
    refused(model, send(model, PLAIN | BAD[name][0]), before)


@pytest.mark.parametrize("block", ["0", "15", "65537", "many"])
def test_bad_blocks_change_nothing(model, block):
    before = model.everything()
    refused(model, send(model, FORMS["int8"], metadata={"q8_block": block}), before)


@pytest.mark.parametrize(
    "tensors",
    [
        {"w#idx": ("I64", [0]), "w#rows": ("F32", [[np.nan, 0, 0]])},
        {"w#topk": ("I64", [0]), "w#values": ("F32", [-np.inf])},
        {"w#idx": ("I64", [0, 0]), "w#rows": ("F32", [[3e38, 0, 0]] * 2)},
        {"w#q8": ("I8", [127] * 6), "w#scale": ("F32", [3e38])},
    ],
)
def test_what_is_not_finite_is_named(model, tensors):
    before = model.everything()
    problem = refused(model, send(model, PLAIN | tensors), before)
    assert problem["type"].endswith("nonfinite")
    assert (problem["tensor"], problem["index"]) == ("w", 0)


@pytest.mark.parametrize(
    "value", [{"idx": [2], "rows": [[1, 2, 3]]}, {"idx": [0], "rows": [[1, 2]]}, {"idx": [0]}, {}]
)
def test_bad_rows_in_json(model, value):
    before = model.everything()
    refused(model, model.push(grads=GRADS | {"w": value}), before)


def test_rows_that_take_more_than_the_dense_gradient(model):
    before = model.everything()
    idx = np.zeros(60_000, np.int64)
    body = packed(PLAIN | {"w#idx": ("I64", idx), "w#rows": ("F32", np.zeros((60_000, 3)))})
    reply = model.call("POST", "/v1/sessions/m/steps", body, content_type=SAFETENSORS)
    refused(model, reply, before, 413)


def test_a_body_that_breaks_off(model):
    before = model.everything()
    body = packed(FORMS["rows"])
    for length in (-1, 1):
        sent = body[:length] if length < 0 else body + b"\0"
        reply = model.call("POST", "/v1/sessions/m/steps", sent, content_type=SAFETENSORS)
        check_problem(reply, 422)
    assert model.everything() == before


def test_a_body_that_the_budget_has_no_room_for(model):
    before = model.everything()
    budget = model.app.state.budget
    total, budget.total = budget.total, budget.used + 8
    try:
        reply = send(model, FORMS["rows"])
    finally:
        budget.total = total
    assert int(reply.headers["retry-after"]) >= 1
    refused(model, reply, before, 429)


def test_a_caller_that_goes_while_the_pool_decodes(api, monkeypatch):
    size = 1 << 20
    api.make("big", params=None)
    head = packed({"w": ("F32", np.zeros(size))})
    reply = api.call("PUT", "/v1/sessions/big/params", head, content_type=SAFETENSORS)
    assert reply.status == 200
    session = api.app.state.sessions.get("big")
    arena, budget = session.arena, api.app.state.budget
    idle = budget.used
    body = packed({"w#topk": ("I64", [5]), "w#values": ("F32", [1])})
    kept = reading._Kept(budget)
    reader = compact.push_reader(arena.layout, "F32", len(body), Destination(), kept.keep)
    reader.feed(body)
    reader.finish()
    began, go_on = threading.Event(), threading.Event()
    write = compact.write

    def slowly(*arguments):
        began.set()
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(compact, "write", slowly)

    async def main():
        request = SimpleNamespace(app=api.app)
        task = asyncio.ensure_future(
            reading._decoded(
                request, arena, PushControl(None, None, None, None), reader.plan, reader.data, kept
            )
        )
        while not began.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held = budget.used, arena.gradients.idle
        go_on.set()
        while not arena.gradients.idle:
            await asyncio.sleep(0.01)
        return held

    loop = api.transport._loop
    held = asyncio.run_coroutine_threadsafe(main(), loop).result(60)
    assert held == (idle + reader.plan.nbytes, False)
    assert budget.used == idle
