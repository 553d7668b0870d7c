"""Schemathesis against the OpenAPI document: what it promises is what the server does."""

import json

import pytest
import schemathesis
from gradpost.protocol import SAFETENSORS
from gradpost.protocol.tensors import build_header
from hypothesis import settings
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings

LIVE = "live"
APP = create_app(Settings(max_sessions=50, insecure=True, wait_cap_s=1, log_level="error"))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CREATE = {"optimizer": {"rule": "adam"}, "params": {"w": [1.0, 2.0], "b": 3.0}}
PUSH = build_header([("w", "F32", (2,)), ("b", "F32", ())], None) + bytes(12)

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@schemathesis.serializer(SAFETENSORS)
def tensors(ctx, value):
    """What is generated for a binary body, as it is."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@pytest.fixture(scope="module")
def client():
    """The lifespan, so that kernels are warm and the pool is closed at the end."""
    with TestClient(APP, client=("127.0.0.1", 1)) as client:
        yield client


@SCHEMA.parametrize()
@few
def test_every_operation(client, case):
    case.call_and_validate()


@SCHEMA.include(path_regex="{id}").parametrize()
@few
def test_every_operation_on_a_live_session(client, case):
    made = client.put(f"/v1/sessions/{LIVE}", json=CREATE)
    assert made.status_code in (200, 201) or made.json()["type"] == "/problems/spec-differs"
    case.path_parameters["id"] = LIVE
    case.call_and_validate()
    if case.method != "DELETE":
        pushed = client.post(
            f"/v1/sessions/{LIVE}/steps", content=PUSH, headers={"Content-Type": SAFETENSORS}
        )
        assert pushed.status_code == 200
