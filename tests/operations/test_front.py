import asyncio
import json

import pytest
from starlette.requests import ClientDisconnect

from service import logs
from service.front import Front
from service.metrics import Metrics
from service.settings import Settings

from .calls import SECRET, Site

STEP = "/v1/sessions/run-7/steps"


def test_a_request_is_one_line_with_all_it_should_have():
    site = Site()
    answer = site.call("POST", STEP, body=b"12345", query=b"worker=secret-ish")
    (line,) = site.lines()
    assert line["request_id"] == answer.header("x-request-id")
    assert line["route"] == "/v1/sessions/{id}/steps"
    assert (line["method"], line["status"], line["session"]) == ("POST", 200, "run-7")
    assert (line["received_bytes"], line["sent_bytes"], line["level"]) == (5, 3, "info")
    assert line["ms"] >= 0
    assert line["time"].endswith("Z")
    assert "secret-ish" not in site.stream.getvalue()


def test_a_refusal_is_named_and_has_no_traceback():
    site = Site()
    assert site.call("POST", STEP, body=b"old").slug == "stale-gradient"
    (line,) = site.lines()
    assert (line["status"], line["refusal"]) == (409, "stale-gradient")
    assert "Traceback" not in site.stream.getvalue()


@pytest.mark.parametrize("given", ["abc-1_2.3", "A" * 128])
def test_a_good_request_id_is_kept(given):
    assert (
        Site().call("POST", STEP, headers={"X-Request-Id": given}).header("x-request-id") == given
    )


@pytest.mark.parametrize("given", ["", "a b", "A" * 129, "x\u00e9", 'a"b', "a;b"])
def test_any_other_request_id_is_replaced(given):
    got = Site().call("POST", STEP, headers={"X-Request-Id": given}).header("x-request-id")
    assert got != given
    assert len(got) == 16


def test_an_unexpected_failure_is_a_500_problem_and_one_loud_traceback():
    site = Site()
    answer = site.call("GET", "/broken")
    assert (answer.status, answer.slug) == (500, "internal")
    assert answer.json()["retryable"] is True
    assert answer.json()["request_id"] == answer.header("x-request-id")
    assert "wires crossed" not in answer.body.decode()
    loud, line = site.lines()
    assert loud["level"] == "error"
    assert loud["request_id"] == line["request_id"]
    assert site.stream.getvalue().count("Traceback") == 1
    assert (line["status"], line["refusal"]) == (500, "internal")


def test_a_failure_in_mid_answer_sends_nothing_more():
    site = Site()
    assert site.call("GET", "/half").body == b"ha"
    assert [line["level"] for line in site.lines()] == ["error", "info"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", STEP, 405)]
)
def test_what_the_router_refuses_is_a_problem_too(method, path, status):
    answer = Site().call(method, path)
    assert answer.status == status
    assert answer.header("content-type") == "application/problem+json"
    assert answer.header("x-request-id")


def test_no_secret_reaches_the_log():
    site = Site(api_key=SECRET, log_level="debug")
    for token in (SECRET, "wrong-" + SECRET):
        site.call("POST", STEP, headers={"Authorization": f"Bearer {token}"})
    assert len(site.lines()) == 2
    assert SECRET not in site.stream.getvalue()
    assert SECRET not in repr(site.settings)


def test_probes_are_quiet_unless_debugging():
    site = Site()
    site.call("GET", "/health/live")
    site.call("GET", "/metrics")
    assert site.lines() == []
    loud = Site(log_level="debug")
    loud.call("GET", "/health/live")
    assert loud.lines()[0]["level"] == "debug"


def test_metrics_count_by_template_and_bound_their_labels():
    site = Site()
    site.call("POST", STEP, body=b"12345")
    site.call("POST", "/v1/sessions/other/steps", body=b"old")
    for path in ("/a", "/b"):
        site.call("BREW" + path[1:].upper(), path)
    text = site.call("GET", "/metrics").body.decode()
    route = 'method="POST",route="/v1/sessions/{id}/steps"'
    assert f'gradpost_requests_total{{{route},status="200"}} 1.0' in text
    assert f"gradpost_received_bytes_total{{{route}}} 8.0" in text
    assert 'gradpost_refusals_total{problem="stale-gradient"} 1.0' in text
    assert 'gradpost_requests_total{method="OTHER",route="(unmatched)",status="404"} 2.0' in text
    assert "run-7" not in text


def _bare(app, logger=None):
    front = Front(app, Settings(), Metrics(), logger=logger)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": None}

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    return front(scope, receive, send)


class Recorder:
    def __init__(self):
        self.seen = []

    def info(self, event, **fields):
        self.seen.append(fields)


def test_a_client_that_left_is_no_failure():
    async def app(scope, receive, send):
        raise ClientDisconnect

    recorder = Recorder()
    asyncio.run(_bare(app, recorder))
    assert recorder.seen[0]["status"] == 499


def test_cancellation_passes_through_and_is_counted():
    async def app(scope, receive, send):
        raise asyncio.CancelledError

    recorder = Recorder()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(_bare(app, recorder))
    assert recorder.seen[0]["status"] == 499


def test_a_log_that_can_not_be_written_fails_no_request(tmp_path):
    stream = open(tmp_path / "log", "w")
    stream.close()
    done = []

    async def app(scope, receive, send):
        done.append(1)

    asyncio.run(_bare(app, logs.make(Settings(), stream)))
    assert done == [1]


def test_other_scopes_pass_untouched():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Front(app, Settings(), Metrics())({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_console_lines_are_for_people():
    site = Site(log_format="console")
    site.call("POST", STEP)
    with pytest.raises(json.JSONDecodeError):
        site.lines()
    assert "request" in site.stream.getvalue()
