"""The hot route goes past FastAPI's matching; the log, the metrics and the document know it."""

import json

import pytest

from gradpost import InProcess, Session
from service.app import create_app
from service.settings import Settings


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_its_template_is_counted_and_logged(capfd, method):
    with InProcess(create_app(Settings())) as app:
        session = Session.create(app, "m", params={"w": [1.0]}, rule="sgd")
        session.push({"w": [1.0]})
        assert app.request(method, "/v1/sessions/m/steps", {}, [], 10).status in (405, 411, 415)
        metrics = app.request("GET", "/metrics", {}, [], 10)
        view = memoryview(bytearray(1 << 20))
        text = bytes(view[: metrics.readinto(view)]).decode()
    wanted = 'method="POST",route="/v1/sessions/{id}/steps",status="200"'
    assert f"gradpost_requests_total{{{wanted}}} 1.0" in text
    assert "(unmatched)" not in text
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (pushed,) = (line for line in lines if line.get("method") == "POST" and line["status"] == 200)
    assert (pushed["route"], pushed["session"]) == ("/v1/sessions/{id}/steps", "m")
