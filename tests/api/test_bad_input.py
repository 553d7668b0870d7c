"""Whatever is wrong with a request: a 4xx problem, nothing changed, and the next one works."""

import json
import struct

import numpy as np
import pytest

from gradpost.protocol import OCTET, SAFETENSORS
from tests.api.conftest import GRADS, PARAMS, check_problem

DATA = np.arange(9, dtype=np.float32).tobytes()


def container(header, data=DATA, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


W, B, S = entry([2, 3], 0, 24), entry([2], 24, 32), entry([], 32, 36)
GOOD = {"w": W, "b": B, "s": S}

CONTAINERS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "truncated data": container(GOOD, DATA[:-1]),
    "overlong data": container(GOOD, DATA + b"\0"),
    "truncated header": container(GOOD)[:40],
    "header of 2**60": container(GOOD, length=1 << 60),
    "header of 2**64 - 1": container(GOOD, length=(1 << 64) - 1),
    "header of 0": container(b""),
    "not JSON": container(b"{nothing"),
    "JSON array": container(b"[]"),
    "not UTF-8": container(b'{"\xff": 1}'),
    "nested 10,000 deep": container(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "duplicate names": container(
        b'{"w":%b,"w":%b,"b":%b,"s":%b}'
        % tuple(json.dumps(x).encode() for x in (W, W, B, S))
    ),
    "overlapping": container({**GOOD, "b": entry([2], 20, 28)}),
    "a hole": container({"w": W, "b": entry([2], 28, 36), "s": entry([], 36, 40)}, DATA + DATA),
    "misnamed": container({"v": W, "b": B, "s": S}),
    "missing": container({"w": W, "b": B}, DATA[:32]),
    "unexpected": container({**GOOD, "x": entry([0], 36, 36)}),
    "misshapen": container({**GOOD, "w": entry([3, 2], 0, 24)}),
    "scalar as vector": container({**GOOD, "s": entry([1], 32, 36)}),
    "product overflows": container({**GOOD, "w": entry([1 << 32, 1 << 32], 0, 24)}),
    "product overflows to the right size": container({**GOOD, "w": entry([1 << 63, 2, 6], 0, 24)}),
    "negative shape": container({**GOOD, "w": entry([-2, -3], 0, 24)}),
    "fractional shape": container({**GOOD, "w": entry([2.0, 3], 0, 24)}),
    "offsets backwards": container({**GOOD, "w": entry([2, 3], 24, 0)}),
    "400 digits": container(GOOD).replace(b"24", b"9" * 400, 1),
    "unknown dtype": container({**GOOD, "w": entry([2, 3], 0, 24, "I32")}),
    "complex": container({**GOOD, "w": entry([3], 0, 24, "C64")}),
    "mixed dtypes": container({**GOOD, "w": entry([2, 6], 0, 24, "F16")}),
    "wider than the master": container(
        {"w": entry([2, 3], 0, 48, "F64"), "b": entry([2], 48, 64, "F64"),
         "s": entry([], 64, 72, "F64")}, DATA + DATA),
    "no tensors": container({}, b""),
    "metadata not text": container({**GOOD, "__metadata__": {"a": 1}}),
}  # fmt: skip


def body_of(value, *path):
    """A good gradient with one value replaced."""
    grads = json.loads(json.dumps(GRADS))
    at = grads
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return grads


JSONS = {
    "empty": b"",
    "not JSON": b"{grads",
    "a list": b"[1]",
    "null": b"null",
    "no grads": b"{}",
    "grads a list": b'{"grads": [1]}',
    "grads empty": b'{"grads": {}}',
    "nested 10,000 deep": b'{"grads": {"w": ' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
    "duplicate keys": b'{"grads": {"w": 1, "w": 2}}',
    "NaN": json.dumps({"grads": GRADS}).replace("0.125", "NaN").encode(),
    "Infinity": json.dumps({"grads": GRADS}).replace("0.125", "-Infinity").encode(),
    "1e999": json.dumps({"grads": GRADS}).replace("0.125", "1e999").encode(),
    "1e39 in F32": json.dumps({"grads": GRADS}).replace("0.125", "1e39").encode(),
    "400 digits": json.dumps({"grads": GRADS}).replace("0.125", "9" * 400).encode(),
    "5,000 digits": json.dumps({"grads": GRADS}).replace("0.125", "9" * 5000).encode(),
    "a string": json.dumps({"grads": body_of("1", "s")}).encode(),
    "a boolean": json.dumps({"grads": body_of(True, "s")}).encode(),
    "null tensor": json.dumps({"grads": body_of(None, "s")}).encode(),
    "ragged": json.dumps({"grads": body_of([1.0], "w", 0)}).encode(),
    "misshapen": json.dumps({"grads": body_of([1.0], "s")}).encode(),
    "not UTF-8": b'{"grads": {"\xff": 1}}',
    "unknown field": json.dumps({"grads": GRADS, "sequnce": 1}).encode(),
    "later field": json.dumps({"grads": GRADS, "weight": 1}).encode(),
}

CONTROLS = {
    "worker alone": "worker=w",
    "sequence alone": "sequence=1",
    "no base": "worker=w&sequence=1",
    "sequence -1": "worker=w&sequence=-1&base_version=1",
    "sequence 2**64": f"worker=w&sequence={1 << 64}&base_version=1",
    "sequence 1.5": "worker=w&sequence=1.5&base_version=1",
    "sequence in other digits": "worker=w&sequence=%D9%A1&base_version=1",
    "sequence of 400 digits": f"worker=w&sequence={'9' * 400}&base_version=1",
    "base from the future": "worker=w&sequence=1&base_version=9",
    "epoch from the future": "worker=w&sequence=1&base_version=2-1",
    "epoch 0": "worker=w&sequence=1&base_version=0-1",
    "base of words": "worker=w&sequence=1&base_version=new",
    "worker with a slash": "worker=a/b&sequence=1&base_version=1",
    "worker of 10,000": f"worker={'w' * 10_000}&sequence=1&base_version=1",
    "worker with NUL": "worker=%00&sequence=1&base_version=1",
    "twice": "worker=w&worker=v&sequence=1&base_version=1",
    "misspelt": "workr=w",
    "loss nan": "loss=nan",
    "loss 1e999": "loss=1e999",
    "later": "weight=2",
    "dtype": "dtype=I8",
}


@pytest.fixture
def model(api):
    api.make()
    assert api.push(worker="w0", sequence=7, base_version=1).status == 200
    return api


def refused(api, call, *args, **kwargs):
    before = api.everything()
    problem = check_problem(call(*args, **kwargs))
    assert api.everything() == before
    good = api.push(worker="w0", sequence=8, base_version=2)
    assert good.status == 200
    assert good.json["applied"]
    return problem


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(model, name):
    call = ("POST", "/v1/sessions/m/steps", CONTAINERS[name])
    refused(model, model.call, *call, content_type=SAFETENSORS, content_length=str(len(call[2])))


# Parameters may be partial, of mixed dtypes, and wider than the session's (they are rounded).
@pytest.mark.parametrize("name", sorted(CONTAINERS.keys() - {"missing", "wider than the master"}))
def test_the_same_containers_as_parameters(model, name):
    call = ("PUT", "/v1/sessions/m/params", CONTAINERS[name])
    refused(model, model.call, *call, content_type=SAFETENSORS, content_length=str(len(call[2])))


@pytest.mark.parametrize("name", JSONS)
def test_json(model, name):
    refused(model, model.call, "POST", "/v1/sessions/m/steps", JSONS[name],
            content_type="application/json", content_length=str(len(JSONS[name])))  # fmt: skip


@pytest.mark.parametrize("name", CONTROLS)
def test_control_values(model, name):
    path = f"/v1/sessions/m/steps?{CONTROLS[name]}"
    refused(model, model.call, "POST", path, container(GOOD), content_type=SAFETENSORS)


@pytest.mark.parametrize(
    ("value", "slug"),
    [(np.nan, "nonfinite"), (np.inf, "nonfinite"), (-np.inf, "nonfinite")],
)
def test_values_that_are_not_finite(model, value, slug):
    values = np.ones(9, np.float32)
    values[7] = value
    problem = refused(model, model.call, "POST", "/v1/sessions/m/steps",
                      container(GOOD, values.tobytes()), content_type=SAFETENSORS)  # fmt: skip
    assert problem["type"].endswith(slug)
    assert (problem["tensor"], problem["index"]) == ("b", 1)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/x-pickle"}, 415),
        ({"content_type": OCTET}, 415),
        ({"content_type": OCTET + "; dtype=I32"}, 415),
        ({"content_type": OCTET + "; dtype=F32"}, 422),
        ({"content_type": SAFETENSORS, "content_encoding": "gzip"}, 415),
        ({"content_type": SAFETENSORS, "content_encoding": "zstd"}, 415),
        ({"content_type": SAFETENSORS, "content_length": "-1"}, 400),
        ({"content_type": SAFETENSORS, "content_length": "9" * 30}, 400),
        ({"content_type": SAFETENSORS, "content_length": str(1 << 40)}, 413),
        ({"content_type": SAFETENSORS, "accept": "image/png"}, 406),
    ],
)
def test_headers(model, headers, status):
    problem = refused(model, model.call, "POST", "/v1/sessions/m/steps",
                      container(GOOD), **headers)  # fmt: skip
    assert problem["status"] == status


def test_no_length(model):
    headers = {"content_type": SAFETENSORS, "transfer_encoding": "chunked"}
    problem = refused(model, model.call, "POST", "/v1/sessions/m/steps", **headers)
    assert problem["status"] == 411


@pytest.mark.parametrize(
    "name", ["..", "a..b", "%2e%2e", "a%2fb", "%00", "a%00", "x" * 10_000, "-a", ".a", "%20", "é"]
)
def test_ids(model, name):
    reply = model.call("PUT", f"/v1/sessions/{name}", {"optimizer": {"rule": "adam"}})
    check_problem(reply)
    assert len(model.app.state.sessions) == 1


SPECS = [
    {},
    {"optimizer": None},
    {"optimizer": "adam"},
    {"optimizer": {}},
    {"optimizer": {"rule": "adm"}},
    {"optimizer": {"rule": "muom"}},
    {"optimizer": {"rule": "muon"}, "params": {"bias": [1.0, 2.0]}},
    {"optimizer": {"rule": "muon", "ns_steps": 100}},
    {"optimizer": {"rule": "adafactor", "d": 0.0}},
    {"optimizer": {"rule": "adam", "fused": True}},
    {"optimizer": {"rule": "adam", "lrr": 1}},
    {"optimizer": {"rule": "adam", "lr": -1}},
    {"optimizer": {"rule": "adam", "lr": "0.1"}},
    {"optimizer": {"rule": "adam", "lr": True}},
    {"optimizer": {"rule": "adam", "lr": 10**400}},
    {"optimizer": {"rule": "adam", "betas": [0.9, 1.0]}},
    {"optimizer": {"rule": "adam", "betas": [1.0, 0.0]}},
    {"optimizer": {"rule": "adam", "betas": [0.9]}},
    {"optimizer": {"rule": "adam", "eps": -1e-8}},
    {"optimizer": {"rule": "adam", "weight_decay": -1}},
    {"optimizer": {"rule": "sgd", "momentum": -0.5}},
    {"optimizer": {"rule": "sgd", "nesterov": True}},
    {"optimizer": {"rule": "sgd", "nesterov": True, "momentum": 0.9, "dampening": 0.1}},
    {"optimizer": {"rule": "adadelta", "rho": 1.1}},
    {"optimizer": {"rule": "adagrad", "lr_decay": -0.5}},
    {"optimizer": {"rule": "adagrad", "initial_accumulator_value": -0.5}},
    {"optimizer": {"rule": "rmsprop", "momentum": -1.0}},
    {"optimizer": {"rule": "adam", "schedule": {}}},
    {"optimizer": {"rule": "adam"}, "groups": {}},
    {"optimizer": {"rule": "adam"}, "clip": {}},
    {"optimizer": {"rule": "adam"}, "update": {"mode": "sync"}},
    {"optimizer": {"rule": "adam"}, "update": {"workers": 2}},
    {"optimizer": {"rule": "adam"}, "update": {"max_staleness": -1}},
    {"optimizer": {"rule": "adam"}, "update": {"on_stale": "scale"}},
    {"optimizer": {"rule": "adam"}, "missing": "zero"},
    {"optimizer": {"rule": "adam"}, "durability": "log"},
    {"optimizer": {"rule": "adam"}, "device": "cuda:0"},
    {"optimizer": {"rule": "adam"}, "dtype": "BF16"},
    {"optimizer": {"rule": "adam"}, "params": {"w": ["x"]}},
    {"optimizer": {"rule": "adam"}, "params": {"": 1}},
    {"optimizer": {"rule": "adam"}, "params": [1]},
    [],
    None,
]


@pytest.mark.parametrize("spec", SPECS, ids=[json.dumps(spec)[:60] for spec in SPECS])
def test_specifications(model, spec):
    body = json.dumps(spec).encode()
    check_problem(model.call("PUT", "/v1/sessions/new", body, content_type="application/json"))
    check_problem(model.call("POST", "/v1/sessions", body, content_type="application/json"))
    assert len(model.app.state.sessions) == 1


def test_an_lr_of_1e999(model):
    body = b'{"optimizer": {"rule": "adam", "lr": 1e999}}'
    check_problem(model.call("PUT", "/v1/sessions/new", body, content_type="application/json"), 422)
    refused(model, model.call, "PATCH", "/v1/sessions/m", body, content_type="application/json")


@pytest.mark.parametrize(
    ("change", "slug"),
    [
        ({"optimizer": {"rule": "sgd"}}, "structural"),
        ({"optimizer": {"amsgrad": True}}, "structural"),
        ({"dtype": "F64"}, "structural"),
        ({"device": "cuda:0"}, "device-unavailable"),
        ({"durability": "log"}, "structural"),
        ({"optimizer": {"lr": -1}}, "invalid-request"),
        ({"optimizer": {"momentum": 0.5}}, "invalid-request"),
        ({"params": {}}, "invalid-request"),
        ({}, "invalid-request"),
        ([], "invalid-request"),
    ],
)
def test_patches(model, change, slug):
    problem = refused(model, model.call, "PATCH", "/v1/sessions/m", change)
    assert problem["type"].endswith(slug)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/sessions/nobody", 404),
        ("GET", "/v1/sessions/nobody/params", 404),
        ("PUT", "/v1/sessions/m/steps", 405),
        ("GET", "/v1/sessions/m/params?dtype=I8", 422),
        ("GET", "/v1/sessions/m/params?names=x", 422),
        ("GET", "/v1/sessions/m/params?nmaes=w", 422),
        ("GET", "/v1/sessions/m/params?min_version=x", 422),
        ("GET", "/v1/sessions/m/params?min_version=99", 409),
        ("GET", "/v1/sessions?limit=0", 422),
        ("GET", "/v1/sessions/m/history?limit=x", 422),
    ],
)
def test_paths(model, method, path, status):
    assert refused(model, model.call, method, path)["status"] == status


def test_a_session_without_parameters(api):
    api.make("empty", params=None)
    check_problem(api.push("empty"), 409, "params-missing")
    check_problem(api.call("GET", "/v1/sessions/empty/params"), 409, "params-missing")
    check_problem(api.call("GET", "/v1/sessions/empty/state"), 409, "params-missing")


def test_a_model_beyond_the_budget(api):
    api.make("empty", params=None)
    size = 1 << 24
    header = {"w": entry([size], 0, 4 * size)}
    body = container(header, bytes(4 * size))
    reply = api.call("PUT", "/v1/sessions/empty/params", body, content_type=SAFETENSORS)
    check_problem(reply, 507, "insufficient-memory")
    assert api.app.state.budget.used == 0


def test_state_that_does_not_fit(model):
    good = model.call("GET", "/v1/sessions/m/state").json
    for broken in (
        {**good, "counts": {"w": 1}},
        {**good, "counts": {**good["counts"], "w": -1}},
        {**good, "step": -1},
        {**good, "rule": "sgd"},
        {**good, "state": {}},
        {**good, "state": {**good["state"], "exp_avg/w": [1.0]}},
        {k: v for k, v in good.items() if k != "step"},
    ):
        before = model.everything()
        check_problem(model.call("PUT", "/v1/sessions/m/state", broken), 422)
        assert model.everything() == before
    assert PARAMS
