"""The application in process, called as raw as a hostile client would."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from gradpost import InProcess
from gradpost.protocol import JSON, PROBLEMS
from gradpost.transport import read_all
from service.app import create_app
from service.settings import Settings

PARAMS = {"w": [[0.5, -1.0, 2.0], [0.25, 0.0, -3.0]], "b": [1.0, 2.0], "s": 4.0}
GRADS = {"w": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "b": [-1.0, 0.5], "s": 0.125}


class Reply(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Api:
    """One application and its transport."""

    def __init__(self, settings, files=None):
        self.app = create_app(settings, files)
        self.transport = InProcess(self.app)

    def call(self, method, path, body=None, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            named.setdefault("content-type", JSON)
        answer = self.transport.request(method, path, named, [body] if body else [], 60)
        return Reply(answer.status, dict(answer.headers), read_all(answer))

    def make(self, name="m", params=PARAMS, rule="adam", **fields):
        optimizer = fields.pop("optimizer", {"rule": rule})
        reply = self.call("PUT", f"/v1/sessions/{name}", {"optimizer": optimizer, **fields})
        assert reply.status == 201, reply
        if params is not None:
            reply = self.call("PUT", f"/v1/sessions/{name}/params", {"params": params})
            assert reply.status == 200, reply
        return self.app.state.sessions.get(name)

    def push(self, name="m", grads=GRADS, **control):
        return self.call("POST", f"/v1/sessions/{name}/steps", {"grads": grads, **control})

    def everything(self, name="m"):
        """All that a refused request must leave as it was."""
        session = self.app.state.sessions.get(name)
        arena = session.arena
        return (
            arena.versions.head.flat.tobytes(),
            [array.tobytes() for array in arena.state],
            (session.epoch, session.version, session.step, session.revision),
            (session.ledger.size(), session.ledger.workers, arena.runs),
            (self.app.state.budget.used, self.app.state.uploads.active),
            len(self.app.state.sessions),
        )


def check_problem(reply, status=None, slug=None):
    """An RFC 9457 document of a known type that says what to do."""
    assert 400 <= reply.status < 500 or reply.status == 507, reply
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json
    found = problem["type"].removeprefix("/problems/")
    assert found in PROBLEMS, problem
    assert problem["retryable"] == PROBLEMS[found]
    assert problem["status"] == reply.status
    assert len(problem["detail"]) > 15
    if status is not None:
        assert reply.status == status, problem
    if slug is not None:
        assert found == slug, problem
    return problem


@pytest.fixture(scope="package")
def server():
    api = Api(Settings(max_sessions=50, memory_bytes=1 << 28, wait_cap_s=2, log_level="error"))
    yield api
    api.transport.close()


@pytest.fixture
def api(server):
    yield server
    for session in list(server.app.state.sessions._alive):
        server.call("DELETE", f"/v1/sessions/{session}")
    server.app.state.sessions._ended.clear()  # each test begins in epoch 1
    assert server.app.state.budget.used == 0


@pytest.fixture
def problem():
    return check_problem


def flat(params):
    """A nested JSON model as one vector, in layout order."""
    return np.concatenate([np.asarray(value, np.float32).reshape(-1) for value in params.values()])
