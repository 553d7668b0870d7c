"""Any sequence of calls leaves a session where a plain NumPy model of it is."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gradpost.protocol import SAFETENSORS
from gradpost.protocol.tensors import build_header
from service.settings import Settings
from tests.api.conftest import Api, check_problem

SHAPES = {"w": (2, 3), "s": (), "b": (2,)}
SIZE = 9
BOUND = 3
SPECS = {
    "sgd": {"rule": "sgd", "lr": 0.25, "momentum": 0.5, "nesterov": True},
    "adam": {"rule": "adam", "lr": 0.125, "betas": [0.5, 0.75]},
    "adagrad": {"rule": "adagrad", "lr": 0.5, "weight_decay": 0.125},
}

vectors = st.lists(
    st.integers(-64, 64).map(lambda n: n / 8), min_size=SIZE, max_size=SIZE
).map(np.array)  # fmt: skip
encodings = st.sampled_from(["json", "safetensors"])
workers = st.sampled_from(["w0", "w1"])
picks = st.integers(0, 1 << 16)


def named(flat):
    """The tensors of a flat vector."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def nested(flat):
    return {name: tensor.tolist() for name, tensor in named(flat).items()}


def container(flat):
    """The same as safetensors, in another order of tensors."""
    tensors = dict(reversed(named(flat).items()))
    header = build_header([(n, "F64", t.shape) for n, t in tensors.items()], None)
    return header + b"".join(t.tobytes() for t in tensors.values())


class Push:
    """One push as it was sent, and the summary that came."""

    def __init__(self, worker, sequence, base, flat):
        self.control = {"worker": worker, "sequence": sequence, "base_version": base}
        self.flat = flat
        self.summary = None


class Model:
    """What a session should hold, in float64."""

    def __init__(self, kind, epoch, flat):
        self.kind, self.epoch, self.params = kind, epoch, flat.copy()
        self.lr = SPECS[kind]["lr"]
        self.step, self.version = 0, 1
        self.first, self.second = np.zeros(SIZE), np.zeros(SIZE)
        self.pushes = []
        self.next_sequence = {"w0": 1, "w1": 1}

    def apply(self, g):
        if self.kind == "sgd":
            self.first = g if self.step == 0 else 0.5 * self.first + g
            self.params = self.params - self.lr * (g + 0.5 * self.first)
        elif self.kind == "adagrad":
            g = g + 0.125 * self.params
            self.second = self.second + g * g
            self.params = self.params - self.lr * g / (np.sqrt(self.second) + 1e-10)
        else:
            t = self.step + 1
            self.first = 0.5 * self.first + 0.5 * g
            self.second = 0.75 * self.second + 0.25 * g * g
            m, v = self.first / (1 - 0.5**t), self.second / (1 - 0.75**t)
            self.params = self.params - self.lr * m / (np.sqrt(v) + 1e-8)
        self.step += 1
        self.version += 1


class Sessions(RuleBasedStateMachine):
    """Two ids, any calls."""

    api: Api
    runs = itertools.count()

    def __init__(self):
        super().__init__()
        run = next(self.runs)
        self.names = [f"{run}-a", f"{run}-b"]
        self.models = {}
        self.epochs = dict.fromkeys(self.names, 0)

    def teardown(self):
        for name in self.models:
            self.api.call("DELETE", f"/v1/sessions/{name}")

    def pick(self, number):
        names = sorted(self.models)
        name = names[number % len(names)]
        return name, self.models[name]

    def send(self, name, push, encoding, **headers):
        path = f"/v1/sessions/{name}/steps"
        control = {k: v for k, v in push.control.items() if v is not None}
        if encoding == "json":
            return self.api.call("POST", path, {"grads": nested(push.flat), **control}, **headers)
        query = "&".join(f"{key}={value}" for key, value in control.items())
        body = container(push.flat)
        return self.api.call("POST", f"{path}?{query}", body, content_type=SAFETENSORS, **headers)

    @rule(number=picks, kind=st.sampled_from(sorted(SPECS)), flat=vectors)
    def create(self, number, kind, flat):
        name = self.names[number % 2]
        spec = {
            "optimizer": SPECS[kind],
            "dtype": "F64",
            "update": {"max_staleness": BOUND},
            "params": nested(flat),
        }
        reply = self.api.call("PUT", f"/v1/sessions/{name}", spec)
        if name not in self.models:
            assert reply.status == 201
            self.epochs[name] += 1
            self.models[name] = Model(kind, self.epochs[name], flat)
        elif self.models[name].kind == kind:
            assert (reply.status, reply.json["attached"]) == (200, True)
        else:
            check_problem(reply, 409, "spec-differs")

    @precondition(lambda self: self.models)
    @rule(
        number=picks, flat=vectors, encoding=encodings, worker=workers | st.none(),
        lag=st.integers(0, BOUND + 2), gap=st.integers(0, 3),
    )  # fmt: skip
    def push(self, number, flat, encoding, worker, lag, gap):
        name, model = self.pick(number)
        base = max(1, model.version - lag)
        if worker is None:
            push = Push(None, None, f"{model.epoch}-{base}", flat)
        else:
            push = Push(worker, model.next_sequence[worker] + gap, f"{model.epoch}-{base}", flat)
        reply = self.send(name, push, encoding)
        if model.version - base > BOUND:
            assert check_problem(reply, 409, "stale-gradient")["version"] == model.version
            return
        staleness = model.version - base
        model.apply(flat)
        assert reply.status == 200, reply
        summary = reply.json
        assert summary.pop("grad_norm") == pytest.approx(np.linalg.norm(flat), rel=1e-14)
        assert summary == {
            "step": model.step, "epoch": model.epoch, "version": model.version,
            "applied": True, "replayed": False, "identified": worker is not None,
            "staleness": staleness, "lr": model.lr, "clipped": False, "skipped": None,
            "params_finite": True, "update_norm": None, "param_norm": None, "round": None,
            "contributions": None, "ahead": None, "wire": None,
        }  # fmt: skip
        if worker is not None:
            push.summary = reply.json
            model.next_sequence[worker] = push.control["sequence"] + 1
            model.pushes.append(push)

    @precondition(lambda self: any(model.pushes for model in self.models.values()))
    @rule(number=picks, which=picks, encoding=encodings, with_params=st.booleans())
    def replay(self, number, which, encoding, with_params):
        name, model = self.pick(number)
        if not model.pushes:
            return
        push = model.pushes[which % len(model.pushes)]
        headers = {"prefer": "return=representation"} if with_params else {}
        reply = self.send(name, push, encoding, **headers)
        assert reply.status == 200, reply
        answer = reply.json
        if with_params:
            assert flat_of(answer.pop("params")) == pytest.approx(model.params, rel=1e-12)
        assert answer == {**push.summary, "replayed": True}

    @precondition(lambda self: any(model.pushes for model in self.models.values()))
    @rule(number=picks, which=picks, encoding=encodings, change=st.booleans())
    def reuse_a_key(self, number, which, encoding, change):
        name, model = self.pick(number)
        if not model.pushes:
            return
        push = model.pushes[which % len(model.pushes)]
        other = Push(*push.control.values(), push.flat)
        if change:
            other.flat = push.flat + np.eye(1, SIZE, which % SIZE)[0]
        else:
            other.control = {**push.control, "loss": 1.5}
        check_problem(self.send(name, other, encoding), 422, "key-reused")

    @precondition(lambda self: self.models)
    @rule(number=picks, flat=vectors, encoding=encodings, how=st.integers(0, 6))
    def push_badly(self, number, flat, encoding, how):
        name, model = self.pick(number)
        version = f"{model.epoch}-{model.version}"
        push = Push("w0", model.next_sequence["w0"], version, flat)
        slug = "invalid-request"
        if how == 0:
            push.control["sequence"] = None
        elif how == 1:
            push.control["sequence"] = 1 << 64
        elif how == 2:
            push.control["base_version"] = None
        elif how == 3:
            push.control["base_version"], slug = (
                f"{model.epoch}-{model.version + 1}",
                "version-unknown",
            )
        elif how == 4:
            push.control["base_version"], slug = f"{model.epoch + 1}-1", "version-unknown"
        elif how == 5:
            encoding, slug = "safetensors", "nonfinite"
            push.flat = np.where(np.arange(SIZE) == number % SIZE, np.inf, flat)
        else:
            check_problem(
                self.api.push(name, {"w": nested(flat)["w"]}, **push.control),
                422,
                "tensor-mismatch",
            )
            return
        check_problem(self.send(name, push, encoding), slug=slug)

    @precondition(lambda self: any(model.epoch > 1 for model in self.models.values()))
    @rule(number=picks, flat=vectors, encoding=encodings)
    def push_from_an_epoch_before(self, number, flat, encoding):
        name, model = self.pick(number)
        if model.epoch > 1:
            push = Push("w0", model.next_sequence["w0"], f"{model.epoch - 1}-1", flat)
            check_problem(self.send(name, push, encoding), 409, "epoch-changed")

    @precondition(lambda self: self.models)
    @rule(number=picks, encoding=encodings, name=st.sampled_from([*SHAPES, None]))
    def pull(self, number, encoding, name):
        session, model = self.pick(number)
        query = f"?names={name}" if name else ""
        accept = SAFETENSORS if encoding == "safetensors" else "application/json"
        path = f"/v1/sessions/{session}/params{query}"
        reply = self.api.call("GET", path, accept=accept)
        assert reply.status == 200
        wanted = named(model.params)
        wanted = {name: wanted[name]} if name else wanted
        if encoding == "json":
            found = {k: np.array(v) for k, v in reply.json["params"].items()}
        else:
            found = tensors_of(reply.body)
        assert found.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_allclose(found[key], wanted[key], rtol=1e-12)
        again = self.api.call("GET", path, accept=accept, if_none_match=reply.headers["etag"])
        assert (again.status, again.body) == (304, b"")

    @precondition(lambda self: self.models)
    @rule(number=picks, lr=st.sampled_from([0.5, 0.25, 0.0625, 0]))
    def patch(self, number, lr):
        name, model = self.pick(number)
        reply = self.api.call("PATCH", f"/v1/sessions/{name}", {"optimizer": {"lr": lr}})
        assert (reply.status, reply.json["acts_from_step"]) == (200, model.step + 1)
        model.lr = lr

    @precondition(lambda self: self.models)
    @rule(number=picks, flat=vectors, only=st.sampled_from([*SHAPES, None]), encoding=encodings)
    def upload(self, number, flat, only, encoding):
        name, model = self.pick(number)
        params = nested(flat)
        before = named(model.params)
        if only is not None:
            params = {only: params[only]}
            flat = np.concatenate(
                [np.ravel(params[k] if k == only else before[k]) for k in SHAPES]
            )  # fmt: skip
        path = f"/v1/sessions/{name}/params"
        first = self.api.call("PUT", path, {"params": params}, if_none_match="*")
        check_problem(first, 412, "precondition-failed")
        assert self.api.call("PUT", path, {"params": params}).status == 200
        model.params = np.array(flat, float)
        model.epoch += 1
        model.version = 1
        self.epochs[name] = model.epoch

    @precondition(lambda self: self.models)
    @rule(number=picks)
    def delete(self, number):
        name, model = self.pick(number)
        path = f"/v1/sessions/{name}"
        assert self.api.call("DELETE", path).status == 204
        del self.models[name]
        push = Push("w0", 1, f"{model.epoch}-1", model.params)
        check_problem(self.send(name, push, "json"), 410, "session-gone")
        for method, deeper in (("GET", ""), ("GET", "/params"), ("DELETE", ""), ("GET", "/state")):
            check_problem(self.api.call(method, path + deeper), 410, "session-gone")

    @invariant()
    def the_server_holds_what_the_models_hold(self):
        for name, model in self.models.items():
            info = self.api.call("GET", f"/v1/sessions/{name}").json
            numbers = (info["step"], info["epoch"], info["version"], info["optimizer"]["lr"])
            assert numbers == (model.step, model.epoch, model.version, model.lr)
            params = self.api.call("GET", f"/v1/sessions/{name}/params").json["params"]
            assert flat_of(params) == pytest.approx(model.params, rel=1e-12)
        assert len(self.api.app.state.sessions) == len(self.models)
        assert self.api.app.state.uploads.active == 0
        if not self.models:
            assert self.api.app.state.budget.used == 0


def flat_of(params):
    assert list(params) == list(SHAPES)
    return np.concatenate([np.ravel(value) for value in params.values()])


def tensors_of(body):
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    header.pop("__metadata__", None)
    data = body[8 + size :]
    return {
        name: np.frombuffer(data[slice(*info["data_offsets"])]).reshape(info["shape"])
        for name, info in header.items()
    }


def test_any_sequence_of_calls():
    Sessions.api = Api(Settings(memory_bytes=1 << 28, wait_cap_s=2, log_level="error"))
    try:
        run_state_machine_as_test(
            Sessions,
            settings=settings(
                max_examples=30, stateful_step_count=40, deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck), database=None,
            ),
        )  # fmt: skip
    finally:
        Sessions.api.transport.close()
