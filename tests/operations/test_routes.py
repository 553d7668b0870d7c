import tomllib
from pathlib import Path

from gradpost import InProcess
from service.app import create_app
from service.hyper import BY_NAME
from service.limits import LIMITS
from service.metrics import Metrics
from service.routes.health import Readiness
from service.routes.server import VERSION
from service.settings import Settings

from .calls import Site

ROOT = Path(__file__).parents[2]


def test_ready_follows_warm_up_and_stop():
    site = Site()
    state = site.app.state.ready = Readiness(["kernels of adam"])
    answer = site.call("GET", "/health/ready")
    assert (answer.status, answer.header("retry-after")) == (503, "1")
    assert answer.json() == {"status": "not ready", "pending": ["kernels of adam"]}
    state.done("kernels of adam")
    assert site.call("GET", "/health/ready").json() == {"status": "ready", "pending": []}
    state.stop()
    assert site.call("GET", "/health/ready").json()["pending"] == ["stopping"]
    assert site.call("GET", "/health/live").status == 200


def test_server_tells_every_limit():
    body = Site(max_sessions=5).call("GET", "/v1/server").json()
    assert list(body["limits"]) == list(LIMITS)
    assert body["limits"]["max_sessions"] == 5
    assert body["devices"] == [{"name": "cpu", "threads": 3}]
    assert body["rules"] == sorted(BY_NAME)
    assert body["dtypes"]["gradient"] == ["F64", "F32", "F16", "BF16"]


def test_a_slash_too_many_is_no_redirect():
    with InProcess(create_app(Settings(log_level="error"))) as app:
        answer = app.request("GET", "/health/live/", {"Host": "evil.com"}, [], 10)
        assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")
        assert "location" not in answer.headers


def test_the_version_is_the_project_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_every_metric_of_a_session_is_rendered():
    metrics = Metrics()
    metrics.watch(lambda: 2, lambda: 300, lambda: 1000)
    metrics.observe_step(0.001, 0.002)
    metrics.replay()
    metrics.skipped()
    metrics.nonfinite_params()
    text = metrics.render().decode()
    for line in (
        *("gradpost_steps_total 1.0", "gradpost_replays_total 1.0", "gradpost_sessions 2.0"),
        *("gradpost_skipped_steps_total 1.0", "gradpost_nonfinite_params_steps_total 1.0"),
        *("gradpost_memory_reserved_bytes 300.0", "gradpost_memory_budget_bytes 1000.0"),
        *("gradpost_step_seconds_sum 0.002", "gradpost_queue_seconds_sum 0.001"),
    ):
        assert line in text


def test_every_metric_is_documented():
    text = (ROOT / "docs/operations.md").read_text()
    for family in Metrics().registry.collect():
        assert f"`{family.name}" in text, family.name
