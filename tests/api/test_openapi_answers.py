"""Each refusal that is easy to provoke is documented, under its call and its status."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from gradpost.protocol import OCTET, SAFETENSORS
from service.settings import Settings
from tests.api.conftest import GRADS, Api

ADAM = {"optimizer": {"rule": "adam"}}
PUSH = {"grads": GRADS, "worker": "w", "sequence": 5001, "base_version": "2-1"}
TYPED = {"content_type": "application/json"}


class Case(NamedTuple):
    """A request that is refused, and how."""

    slug: str
    method: str
    template: str
    id: str = "m"
    query: str = ""
    body: Any = None
    headers: Mapping[str, str] = MappingProxyType({})

    def call(self, api):
        """The answer to it."""
        path = self.template.replace("{id}", self.id) + self.query
        path = path.replace("{worker}", "v").replace("{name}", "c").replace("{number}", "7")
        return api.call(self.method, path, self.body, **self.headers)


def bodies(method, template, **more):
    """The refusals that every call with a body shares."""
    shared = (
        ("length-required", None, {**TYPED, "transfer_encoding": "chunked"}),
        ("bad-request", b"{}", {**TYPED, "content_length": "-1"}),
        ("body-too-large", b"{}", {**TYPED, "content_length": str(1 << 50)}),
        ("unsupported-media-type", b"{}", {"content_type": "text/plain"}),
        ("unsupported-encoding", b"{}", {**TYPED, "content_encoding": "gzip"}),
        ("invalid-json", b"{", TYPED),
        ("invalid-request", b"[]", TYPED),
    )
    for slug, body, headers in shared:
        yield Case(slug, method, template, body=body, headers=headers, **more)


def sessions(method, template, body=None, **more):
    """Those of a session that is not there."""
    yield Case("session-unknown", method, template, "nobody", body=body, **more)
    yield Case("session-gone", method, template, "gone", body=body, **more)


def creations(method, template):
    """Those of both calls that create a session."""
    yield from bodies(method, template, id="new")
    for slug, body in (
        ("not-supported-yet", {"optimizer": {"rule": "adam", "fused": True}}),
        ("device-unavailable", {**ADAM, "device": "cuda:0"}),
        ("invalid-tensors", {**ADAM, "params": {"w": ["x"]}}),
        ("nonfinite", {**ADAM, "params": {"w": [1e39]}}),
        ("tensor-mismatch", {**ADAM, "params": {}}),
        ("insufficient-memory", {**ADAM, "params": {"w": [0] * 99_000}}),
    ):
        yield Case(slug, method, template, "new", body=body)


def uploads(what):
    """Those of both calls that take tensors into a session."""
    template = f"/v1/sessions/{{id}}/{what}"
    yield from bodies("PUT", template)
    yield from sessions("PUT", template, {})
    yield Case("insufficient-memory", "PUT", template, body=bytes(1 << 20),
               headers={"content_type": SAFETENSORS})  # fmt: skip


CREATE, SESSION, STEPS = "/v1/sessions", "/v1/sessions/{id}", "/v1/sessions/{id}/steps"
PARAMS, STATE, HISTORY = (f"{SESSION}/{what}" for what in ("params", "state", "history"))
WORKERS = f"{SESSION}/workers"
WORKER, ROUND = f"{WORKERS}/{{worker}}", f"{SESSION}/rounds/{{number}}"
CHECKPOINTS, RESTORE = f"{SESSION}/checkpoints", f"{SESSION}/restore"
CHECKPOINT = f"{CHECKPOINTS}/{{name}}"
COUNTS = {"w": 0, "b": 0, "s": 0}
CASES = [
    Case("invalid-request", "GET", CREATE, query="?limit=0"),
    Case("bad-request", "GET", CREATE, query="?limit=1&limit=2"),
    *creations("POST", CREATE),
    *creations("PUT", SESSION),
    Case("spec-differs", "PUT", SESSION, body={"optimizer": {"rule": "sgd"}}),
    *sessions("GET", SESSION),
    *sessions("DELETE", SESSION),
    *sessions("PATCH", SESSION, {}),
    *bodies("PATCH", SESSION),
    Case("structural", "PATCH", SESSION, body={"dtype": "F64"}),
    Case("not-supported-yet", "PATCH", SESSION, body={"optimizer": {"fused": True}}),
    Case("data-dir-missing", "PUT", SESSION, "new", body={**ADAM, "durability": "log"}),
    Case("data-dir-missing", "POST", CREATE, "new", body={**ADAM, "durability": "log"}),
    Case("device-unavailable", "PATCH", SESSION, body={"device": "cuda:0"}),
    Case("precondition-failed", "PATCH", SESSION, body={"optimizer": {"lr": 1}},
         headers={"if_match": '"spec-9"'}),
    *sessions("GET", PARAMS),
    Case("params-missing", "GET", PARAMS, "empty"),
    Case("bad-request", "GET", PARAMS, query="?dtype=F32&dtype=F32"),
    Case("invalid-request", "GET", PARAMS, query="?dtype=I8"),
    Case("tensor-mismatch", "GET", PARAMS, query="?names=x"),
    Case("not-acceptable", "GET", PARAMS, headers={"accept": "image/png"}),
    Case("version-pending", "GET", PARAMS, query="?min_version=2-99"),
    Case("epoch-changed", "GET", PARAMS, query="?min_version=1-1"),
    *uploads("params"),
    Case("precondition-failed", "PUT", PARAMS, body={}, headers={"if_none_match": "*"}),
    Case("invalid-tensors", "PUT", PARAMS, body={"params": {"w": ["x"]}}),
    Case("tensor-mismatch", "PUT", PARAMS, body={"params": {"x": 1}}),
    Case("nonfinite", "PUT", PARAMS, body={"params": {"s": 1e39}}),
    *sessions("GET", STATE),
    Case("params-missing", "GET", STATE, "empty"),
    Case("not-acceptable", "GET", STATE, headers={"accept": OCTET}),
    *uploads("state"),
    Case("params-missing", "PUT", STATE, "empty", body={}),
    Case("invalid-tensors", "PUT", STATE, body={"state": [], "counts": COUNTS, "step": 0}),
    Case("tensor-mismatch", "PUT", STATE, body={"state": {}, "counts": COUNTS, "step": 0}),
    Case("nonfinite", "PUT", STATE, body={"state": {"x": 1e39}, "counts": COUNTS, "step": 0}),
    *[case for method in ("GET", "PUT", "DELETE") for case in sessions(method, WORKER)],
    *[Case("worker-unknown", method, WORKER) for method in ("GET", "DELETE")],
    Case("too-many-workers", "PUT", WORKER),
    Case("invalid-request", "PUT", WORKER, body={"lease_s": 0}),
    Case("unsupported-media-type", "PUT", WORKER, body=b"x", headers={"content_type": OCTET}),
    *sessions("GET", WORKERS),
    *sessions("GET", ROUND),
    Case("round-unknown", "GET", ROUND),
    *[Case("data-dir-missing", *one) for one in (
        ("GET", CHECKPOINTS), ("POST", CHECKPOINTS), ("GET", CHECKPOINT), ("DELETE", CHECKPOINT),
    )],
    Case("data-dir-missing", "POST", RESTORE, body={"checkpoint": "c"}),
    *[case for method, template in (
        ("GET", CHECKPOINTS), ("POST", CHECKPOINTS), ("GET", CHECKPOINT), ("DELETE", CHECKPOINT),
    ) for case in sessions(method, template)],
    *sessions("POST", RESTORE, {"checkpoint": "c"}),
    *bodies("POST", RESTORE),
    Case("invalid-request", "POST", CHECKPOINTS, body={"name": "/"}),
    Case("precondition-failed", "POST", RESTORE, body={}, headers={"if_match": '"1-9"'}),
    Case("data-dir-missing", "POST", "/v1/server/backup"),
    *sessions("GET", HISTORY),
    Case("invalid-request", "GET", HISTORY, query="?limit=x"),
    Case("bad-request", "GET", HISTORY, query="?limit=1&limit=2"),
    *sessions("POST", STEPS, {}),
    *bodies("POST", STEPS),
    Case("params-missing", "POST", STEPS, "empty", body={"grads": GRADS}),
    Case("not-acceptable", "POST", STEPS, body=PUSH, headers={"accept": "image/png"}),
    Case("not-supported-yet", "POST", STEPS, body={**PUSH, "found_inf": 1}),
    Case("epoch-changed", "POST", STEPS, body={**PUSH, "base_version": "1-1"}),
    Case("version-unknown", "POST", STEPS, body={**PUSH, "base_version": "2-99"}),
    Case("stale-gradient", "POST", STEPS, body={**PUSH, "base_version": "2-0"}),
    Case("too-many-workers", "POST", STEPS, body={**PUSH, "worker": "v"}),
    Case("too-old", "POST", STEPS, body={**PUSH, "sequence": 1}),
    Case("key-reused", "POST", STEPS, body={**PUSH, "sequence": 5000, "loss": 1.0}),
    Case("invalid-tensors", "POST", STEPS, body={"grads": []}),
    Case("tensor-mismatch", "POST", STEPS, body={"grads": {}}),
    Case("nonfinite", "POST", STEPS, body={"grads": {**GRADS, "s": 1e39}}),
]  # fmt: skip

# Where all slots for uploads are taken.
CROWDED = [
    Case("overloaded", "PUT", PARAMS, body={"params": {"s": 1.0}}),
    Case("overloaded", "PUT", STATE, body={"state": {}, "counts": COUNTS, "step": 0}),
    Case("overloaded", "POST", STEPS, body={"grads": GRADS}),
]
# Where no memory is left.
FULL = [
    Case("insufficient-memory", "PUT", PARAMS, "empty", body={"params": {"s": 1.0}}),
]
# Where the pool is closed, as at the end of a stop. The push is too large for the event loop.
MANY = 16_385
STOPPING = [
    Case("shutting-down", "POST", CREATE, body={**ADAM, "params": {"w": 1.0}}),
    Case("shutting-down", "PUT", SESSION, "new", body={**ADAM, "params": {"w": 1.0}}),
    Case("shutting-down", "PATCH", SESSION, body={"optimizer": {"lr": 1}}),
    Case("shutting-down", "GET", PARAMS, query="?dtype=BF16"),
    Case("shutting-down", "PUT", PARAMS, body={"params": {"w": [0] * MANY}}),
    Case("shutting-down", "GET", STATE),
    Case("shutting-down", "PUT", STATE, body={"state": {}, "counts": {}, "step": 0}),
    Case("shutting-down", "POST", STEPS, body={"grads": {"w": [0] * MANY}}),
    Case("shutting-down", "DELETE", SESSION),
]


def names(case):
    return f"{case.method} {case.template} {case.slug}"


@pytest.fixture(scope="module")
def api():
    """Epoch 2 of m, in which worker w has pushed 5000; one session without parameters."""
    settings = Settings(max_sessions=3, max_workers=1, memory_bytes=1 << 20, wait_cap_s=1,
                        max_uploads=1, log_level="error")  # fmt: skip
    found = Api(settings)
    found.make("gone", params=None)
    found.call("DELETE", "/v1/sessions/gone")
    found.make(update={"max_staleness": 0})
    found.make("empty", params=None)
    assert found.call("PUT", "/v1/sessions/m/params", {"params": {"s": 1.0}}).status == 200
    assert found.push(worker="w", sequence=5000, base_version="2-1").status == 200
    yield found
    found.transport.close()


@pytest.fixture(scope="module")
def stopping():
    found = Api(Settings(log_level="error", warm_rules=()))
    found.make(params={"w": [0.0] * MANY})
    found.app.state.pool.close()
    yield found
    found.transport.close()


def check(api, case, reply):
    """The reply is the refusal meant, and the document has it."""
    assert reply.json["type"] == f"/problems/{case.slug}", reply
    answers = api.app.openapi()["paths"][case.template][case.method.lower()]["responses"]
    assert f"`{case.slug}`" in answers.get(str(reply.status), {}).get("description", ""), case


def test_the_tables_cover_enough():
    found = [case[:3] for case in (*CASES, *CROWDED, *FULL, *STOPPING)]
    assert len({(method, template, slug) for slug, method, template in found}) > 100


@pytest.mark.parametrize("case", CASES, ids=names)
def test_refusals(api, case):
    check(api, case, case.call(api))


@pytest.mark.parametrize("case", CROWDED, ids=names)
def test_refusals_when_uploads_are_too_many(api, case):
    with api.app.state.uploads:
        reply = case.call(api)
    check(api, case, reply)


@pytest.mark.parametrize("case", FULL, ids=names)
def test_refusals_when_memory_is_full(api, case):
    budget = api.app.state.budget
    left = budget.total - budget.used
    budget.reserve(left)
    reply = case.call(api)
    budget.release(left)
    check(api, case, reply)


def test_refusals_when_sessions_are_too_many(api):
    api.make("last", params=None)
    for method, template in (("POST", CREATE), ("PUT", SESSION)):
        case = Case("too-many-sessions", method, template, "new", body=ADAM)
        check(api, case, case.call(api))
    api.call("DELETE", "/v1/sessions/last")


@pytest.mark.parametrize("case", STOPPING, ids=names)
def test_refusals_in_a_stop(stopping, case):
    check(stopping, case, case.call(stopping))


def test_refusals_of_every_operation_at_the_door():
    """Nothing is known yet of who calls, so they are the same everywhere."""
    closed, local = Api(Settings(api_key="x", log_level="error")), Api(Settings(log_level="error"))
    for template, operations in local.app.openapi()["paths"].items():
        for method in operations:
            foreign, proxied = {"origin": "http://evil.example"}, {"forwarded": "for=10.0.0.1"}
            wrong = {"authorization": "Bearer y"}
            for slug, api, headers in (
                ("origin-refused", local, foreign),
                ("key-required", local, proxied),
                ("key-missing", closed, {}),
                ("key-wrong", closed, wrong),
            ):
                if slug == "origin-refused" or not template.startswith("/health/"):
                    case = Case(slug, method.upper(), template, headers=headers)
                    check(api, case, case.call(api))
    closed.transport.close()
    local.transport.close()
