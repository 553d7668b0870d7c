"""State of other shapes than the parameters over HTTP: JSON and safetensors, there and back."""

import json

import pytest

from gradpost.protocol import SAFETENSORS
from gradpost.protocol.tensors import parse_header
from tests.api.conftest import GRADS, PARAMS

SHAPES = {
    **{"row_var/w": (2, 1), "col_var/w": (1, 3), "variance/b": (2,), "variance/s": ()},
    **{"momentum_buffer/w": (2, 3), "exp_avg/b": (2,), "exp_avg/s": ()},
}
OTHERS = [{"params": ["b", "s"], "rule": "lion"}]


@pytest.mark.parametrize(
    ("rule", "groups", "names"),
    [
        ("adafactor", [], ["row_var/w", "col_var/w", "variance/b", "variance/s"]),
        ("muon", OTHERS, ["momentum_buffer/w", "exp_avg/b", "exp_avg/s"]),
    ],
)
@pytest.mark.parametrize("media", ["application/json", SAFETENSORS])
def test_it_goes_round_to_the_bit(api, rule, groups, names, media):
    sessions = [api.make(name, rule=rule, groups=groups) for name in ("one", "two")]
    for _ in range(2):
        assert api.push("one").status == 200
    held = api.call("GET", "/v1/sessions/one/state", accept=media)
    assert held.status == 200
    if media == SAFETENSORS:
        header = parse_header(held.body[8 : 8 + int.from_bytes(held.body[:8], "little")], None)
        assert {t.name: t.shape for t in header.tensors} == {n: SHAPES[n] for n in names}
    else:
        assert sorted(held.json["state"]) == sorted(names)
    put = api.call("PUT", "/v1/sessions/two/state", held.body, content_type=media)
    assert put.status == 200, put
    again = api.call("GET", "/v1/sessions/two/state", accept="application/json").json
    assert again["state"] == api.call("GET", "/v1/sessions/one/state").json["state"]
    params = api.call("GET", "/v1/sessions/one/params").json["params"]
    assert api.call("PUT", "/v1/sessions/two/params", {"params": params}).status == 200
    for name in ("one", "two"):
        assert api.push(name).status == 200
    one, two = (session.arena.versions.head.flat.tobytes() for session in sessions)
    assert one == two


def test_what_muon_cannot_take_is_refused_at_the_upload(api, problem):
    api.make("m", params=None, rule="muon")
    reply = api.call("PUT", "/v1/sessions/m/params", {"params": PARAMS})
    found = problem(reply, 422, "tensor-mismatch")
    assert "put it into a group with another rule" in found["detail"]
    assert found["names"] == ["b", "s"]
    reply = api.call("PUT", "/v1/sessions/m/params", {"params": {"w": PARAMS["w"]}})
    assert reply.status == 200
    body = {"group": {"lr": 0.1}, "params": {"b": PARAMS["b"]}}
    reply = api.call("POST", "/v1/sessions/m/groups", body)
    problem(reply, 422, "tensor-mismatch")
    assert api.push("m", {"w": GRADS["w"]}).status == 200
    described = json.loads(api.call("GET", "/v1/sessions/m").body)
    assert described["optimizer"]["adjust_lr_fn"] == "original"
    assert described["bytes"]["state"] == 24
