"""Schemathesis against the OpenAPI document: what it promises is what the server does."""

import json

import pytest
import schemathesis
from hypothesis import settings

from gradpost.protocol import SAFETENSORS
from gradpost.protocol.tensors import build_header
from service.app import create_app
from service.settings import Settings

LIVE = {"id": "live"}
CREATE = {"optimizer": {"rule": "adam"}, "params": {"w": [1.0, 2.0], "b": 3.0}}
PUSH = build_header([("w", "F32", (2,)), ("b", "F32", ())], None) + bytes(12)
APP = create_app(Settings(max_sessions=10_000, insecure=True, wait_cap_s=1, log_level="error"))
APP.state.ready.done("warm-up")


async def http_only(scope, receive, send):
    """Schemathesis would end the application's lifespan, and its pool, after every test."""
    assert scope["type"] == "http"
    await APP(scope, receive, send)


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", http_only)
CHECKS = SCHEMA.config.checks
# A schema can't say that tensors have to fit the session: a 422 to a well-formed request is right.
CHECKS.positive_data_acceptance.enabled = False
# 412 comes before the body is looked at.
CHECKS.negative_data_rejection.expected_statuses = [
    *CHECKS.negative_data_rejection.expected_statuses,
    "412",
]

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@schemathesis.serializer(SAFETENSORS)
def tensors(ctx, value):
    """What was generated for a binary body, as it is."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def call(method, path, body, media_type="application/json"):
    """A request on the live session, over the same transport."""
    operation = SCHEMA[path][method]
    return operation.Case(path_parameters=LIVE, body=body, media_type=media_type).call()


@pytest.fixture(scope="module", autouse=True)
def pool():
    yield
    APP.state.pool.close()


@SCHEMA.parametrize()
@few
def test_every_operation(case):
    case.call_and_validate()


@SCHEMA.include(path_regex="{id}").parametrize()
@few
def test_every_operation_on_a_live_session(case):
    call("DELETE", "/v1/sessions/{id}", None)
    made = call("PUT", "/v1/sessions/{id}", CREATE)
    assert made.status_code == 201, made.content
    case.path_parameters["id"] = LIVE["id"]
    case.call_and_validate()
    if case.method != "DELETE":
        pushed = call("POST", "/v1/sessions/{id}/steps", PUSH, SAFETENSORS)
        assert pushed.status_code == 200, pushed.content
