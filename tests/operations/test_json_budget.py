"""A JSON body is promised before it is gathered, as arrays are."""

import asyncio
import json

import pytest

from service.app import create_app
from service.settings import Settings

BODY = b'{"optimizer": {"rule": "sgd"}, "x": "' + b"a" * 100_000 + b'"}'


@pytest.fixture
def app():
    app = create_app(Settings(memory_bytes=1 << 20, log_level="error"))
    yield app
    app.state.pool.close()


def put(app, pieces, length, method="PUT", path="/v1/sessions/m"):
    """Status, document, and the budget in use when each piece was asked for."""
    sent, used = [], []

    async def receive():
        used.append(app.state.budget.used)
        if not pieces:
            return {"type": "http.disconnect"}
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost", "content-type": "application/json", "content-length": length}
    scope = {
        **{"type": "http", "method": method, "path": path, "raw_path": path.encode()},
        **{"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"},
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)},
        "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"] if sent else None, json.loads(body or b"{}"), used


def test_a_long_one_is_reserved_while_it_comes(app):
    status, _, used = put(app, [BODY[:10], BODY[10:]], len(BODY))
    assert status == 422  # "x" is no field
    assert used == [len(BODY), len(BODY)]
    assert app.state.budget.used == 0


@pytest.mark.parametrize("pieces", [[b"{"], [b"{" * len(BODY)], [BODY, b"more"]])
def test_it_is_given_back_however_it_ends(app, pieces):
    assert put(app, pieces, len(BODY))[0] in (400, 499)
    assert app.state.budget.used == 0


def test_a_client_that_leaves_gives_it_back(app):
    assert put(app, [], len(BODY))[0] is None  # nobody is left to answer
    assert app.state.budget.used == 0


def test_a_short_one_is_not_reserved(app):
    body = b'{"optimizer": {"rule": "sgd"}, "x": 1}'
    assert put(app, [body], len(body))[2] == [0]


def test_one_that_does_not_fit_is_shed(app):
    app.state.budget.reserve((1 << 20) - len(BODY) + 1)
    status, problem, used = put(app, [BODY], len(BODY))
    assert (status, problem["type"], problem["retryable"]) == (429, "/problems/overloaded", True)
    assert used == []  # refused before anything was read
    assert app.state.budget.used == (1 << 20) - len(BODY) + 1
    assert put(app, [b'{"optimizer": {}}'], 17)[0] == 422  # short ones still pass
