"""Start and stop of the application: the warm-up beside it, and what a stop always does."""

import asyncio
import json
import threading
import time

from starlette.requests import ClientDisconnect

from gradpost import InProcess
from kernels import cpu
from service import warm
from service.app import create_app
from service.settings import Settings

PATIENCE_S = 60


def ready(app):
    """Status and pending items of /health/ready."""
    answer = app.request("GET", "/health/ready", {}, [], PATIENCE_S)
    text = memoryview(bytearray(1000))
    return answer.status, json.loads(bytes(text[: answer.readinto(text)]))["pending"]


def test_a_warm_up_that_fails_is_loud_at_once_and_the_stop_is_whole(monkeypatch, capfd):
    failing = threading.Event()

    def fails(*args, **kwargs):
        assert failing.wait(PATIENCE_S)
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(warm, "warm", fails)
    app = create_app(Settings())
    with InProcess(app) as transport:
        assert ready(transport) == (503, ["warm-up"])
        failing.set()
        deadline = time.monotonic() + PATIENCE_S
        while ready(transport)[1] == ["warm-up"] and time.monotonic() < deadline:
            time.sleep(0.01)
        status, (pending,) = ready(transport)
        assert status == 503
        assert "failed" in pending
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        (loud,) = (line for line in lines if line["level"] == "error")
        assert "no compiler today" in loud["exception"]
    assert app.state.pool._closed


def test_a_stop_ends_the_warm_up_behind_the_loop_that_is_being_compiled(monkeypatch):
    begun, entered = [], threading.Event()
    app = create_app(Settings(warm_rules="adam"))

    def kernel(*names):
        begun.append(names)
        entered.set()
        assert app.state.ready.stop_asked.wait(PATIENCE_S)

    monkeypatch.setattr(cpu, "kernel", kernel)
    with InProcess(app):
        assert entered.wait(PATIENCE_S)
    assert len(begun) == 1
    assert app.state.pool._closed


def test_a_client_that_left_is_counted_and_gets_nothing():
    app = create_app(Settings(log_level="error"))
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/sessions", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"9")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent == []
    wanted = 'gradpost_requests_total{method="POST",route="/v1/sessions",status="499"} 1.0'
    assert wanted in app.state.metrics.render().decode()
    assert ClientDisconnect not in app.exception_handlers
    app.state.pool.close()
