"""The client: retries that settle, errors that map, arrays that come back as they went."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from pydantic import SecretStr

import service.errors
from gradpost import (
    Buffer,
    ClosedError,
    DeadlineExceeded,
    InProcess,
    RefusedError,
    RetryPolicy,
    Session,
    StaleGradient,
    TransportError,
    errors,
)
from gradpost.errors import BY_SLUG, KeyMissing, KeyWrong, SessionUnknown, refusal
from gradpost.protocol import PROBLEMS
from service.app import create_app
from service.settings import Settings

PARAMS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32(2),
    "e": np.ones((0, 2)),
}
GRADS = {"e": np.ones((0, 2)), "w": np.ones((2, 3), np.float32), "b": np.float32(0.5)}
QUICK = RetryPolicy(deadline_s=30, sleep=lambda _: None)


@pytest.fixture(scope="module")
def app():
    with InProcess(create_app(Settings(log_level="error", max_sessions=1000))) as app:
        yield app


class Faulty:
    """A transport that fails as told: before or after the request reaches the server."""

    def __init__(self, inner, faults):
        self.inner = inner
        self.faults = list(faults)
        self.sent = []

    def request(self, method, path, headers, body, timeout_s):
        if method != "POST":
            return self.inner.request(method, path, headers, body, timeout_s)
        self.sent.append((path, b"".join(bytes(part) for part in body)))
        fault = self.faults.pop(0) if self.faults else None
        if fault == "before":
            raise TransportError("no connection")
        answer = self.inner.request(method, path, headers, body, timeout_s)
        if fault == "after":
            answer.release()
            raise TransportError("the answer was lost")
        return fault if fault is not None else answer

    def close(self):
        pass


class Problem:
    def __init__(self, status, slug, **headers):
        self.status = status
        self.headers = headers
        self._body = b'{"type": "/problems/%b", "detail": "said"}' % slug.encode()

    def readinto(self, view):
        count = min(len(view), len(self._body))
        view[:count] = self._body[:count]
        self._body = self._body[count:]
        return count

    def release(self):
        pass


def session_on(transport, **options):
    options = {"rule": "sgd", "lr": 0.5, "params": PARAMS, "policy": QUICK} | options
    return Session.create(transport, **options)


@pytest.mark.parametrize("faults", [["before"], ["after"], ["after", "before", "after"]])
@pytest.mark.parametrize("with_params", [False, True])
def test_a_lost_answer_is_settled_by_the_same_bytes(app, faults, with_params):
    transport = Faulty(app, faults)
    session = session_on(transport)
    summary = session.push_pull(GRADS)[0] if with_params else session.push(GRADS)
    assert summary.step == 1
    assert summary.replayed == ("after" in faults)
    assert len(set(transport.sent)) == 1
    assert len(transport.sent) == len(faults) + 1
    assert session.retries == len(faults)
    assert session.push(GRADS).step == 2


@pytest.mark.parametrize(
    ("status", "slug"),
    [(408, "request-timeout"), (409, "in-flight"), (429, "overloaded"), (500, "internal"),
     (503, "shutting-down"), (502, "")],
)  # fmt: skip
def test_answers_that_settle_nothing_are_retried(app, status, slug):
    transport = Faulty(app, [Problem(status, slug)])
    assert session_on(transport).push(GRADS).step == 1
    assert len(set(transport.sent)) == 1


def test_a_pause_that_the_server_asks_for_is_kept(app):
    slept = []
    policy = RetryPolicy(deadline_s=30, sleep=slept.append)
    transport = Faulty(app, [Problem(429, "overloaded", **{"Retry-After": "7"})])
    session_on(transport, policy=policy).push(GRADS)
    assert 7 <= slept[0] < 8


@pytest.mark.parametrize("slug", [slug for slug, retry in PROBLEMS.items() if not retry])
def test_final_refusals_are_raised_at_once(app, slug):
    transport = Faulty(app, [Problem(409, slug)])
    with pytest.raises(BY_SLUG[slug]) as raised:
        session_on(transport).push(GRADS)
    assert not raised.value.retryable
    assert len(transport.sent) == 1


def test_the_deadline_ends_it(app):
    now = [0.0]
    policy = RetryPolicy(
        deadline_s=10, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    transport = Faulty(app, ["before"] * 1000)
    with pytest.raises(DeadlineExceeded) as raised:
        session_on(transport, policy=policy).push(GRADS)
    assert isinstance(raised.value.last, TransportError)
    assert now[0] < 10


def test_every_problem_has_its_error_on_both_sides():
    assert BY_SLUG.keys() == PROBLEMS.keys() == service.errors.BY_SLUG.keys()
    for slug, retryable in PROBLEMS.items():
        assert service.errors.BY_SLUG[slug].retryable == retryable
        assert refusal(400, {"type": f"/problems/{slug}"}).retryable == retryable


def test_errors_pickle():
    found = [
        refusal(409, {"type": f"/problems/{slug}", "detail": "d", "version": 3}, 1.0)
        for slug in PROBLEMS
    ]
    found += [TransportError("t"), ClosedError("c"), DeadlineExceeded("d", TransportError("t"))]
    for error in found:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        if isinstance(error, RefusedError):
            assert (again.version, again.retry_after_s) == (3, 1.0)
    assert issubclass(errors.ClosedError, errors.GradpostError)


def test_arrays_come_back_as_they_went(app):
    session = session_on(app)
    pulled = session.pull()
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(pulled[name], value)
        assert pulled[name].shape == np.shape(value)
    summary, after = session.push_pull(GRADS, loss=1.5)
    np.testing.assert_array_equal(after["w"], PARAMS["w"] - 0.5)
    assert after["b"] == 1.75
    assert session.version == (1, 2) == (summary.epoch, summary.version)
    assert session.history()[-1]["loss"] == 1.5


def test_buffers_are_used_again(app):
    session, into = session_on(app), Buffer()
    first = session.pull(into=into)
    memory = into.flat
    second = session.push_pull(GRADS, into=into)[1]
    assert into.flat is memory
    assert np.shares_memory(first["w"], second["w"])
    np.testing.assert_array_equal(first["w"], second["w"])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int64])
def test_gradients_of_any_dtype(app, dtype):
    session = session_on(app)
    grads = {name: np.ones(np.shape(value), dtype) for name, value in PARAMS.items()}
    np.testing.assert_array_equal(session.push_pull(grads)[1]["w"], PARAMS["w"] - 0.5)
    mixed = {**grads, "b": np.float32(1)}
    np.testing.assert_array_equal(session.push_pull(mixed)[1]["w"], PARAMS["w"] - 1)
    with pytest.raises(TypeError):
        session.push({**grads, "b": "one"})


def test_pulls_of_names_and_dtypes(app):
    session = session_on(app)
    pulled = session.pull(names=["w"], dtype="BF16")
    assert pulled.keys() == {"w"}
    np.testing.assert_array_equal(
        pulled["w"].view(ml_dtypes.bfloat16).astype(np.float32), PARAMS["w"]
    )
    assert session.pull(dtype="F64")["b"].dtype == np.float64
    with pytest.raises(errors.VersionPending):
        session.pull(min_version=(1, 9), wait_s=0.01)


def test_parameters_that_do_not_fit_the_form_are_refused_by_the_pull_only(app):
    session = session_on(app, params={"w": np.float32([1e30])})
    with pytest.raises(errors.TensorMismatch):
        session.push_pull({"w": np.zeros(1)}, dtype="F16")
    assert session.info()["step"] == 1


def test_the_first_worker_initialises(app):
    one = session_on(app, id="shared-model")
    two = session_on(app, id="shared-model", params={"other": np.ones(3)})
    assert two.pull().keys() == PARAMS.keys()
    assert one.worker != two.worker
    two.push(GRADS)
    assert one.push(GRADS).staleness == 1
    assert Session.attach(app, "shared-model").info()["workers"] == 2


def test_a_stale_gradient_says_where_the_model_is(app):
    session = session_on(app, update={"max_staleness": 0})
    session.push(GRADS)
    with pytest.raises(StaleGradient) as raised:
        session.push(GRADS)
    assert (raised.value.epoch, raised.value.version) == (1, 2)
    session.pull()
    assert session.push(GRADS).step == 2


def test_state_goes_round(app):
    session = session_on(app, rule="adam", lr=0.1)
    session.push(GRADS)
    state = session.state()
    assert state.counts == dict.fromkeys(PARAMS, 1)
    session.set_state(state)
    assert session.version == (2, 1)
    session.push(GRADS)
    assert session.state().step == 2
    session.set_params({"b": np.float32(9)})
    assert session.pull()["b"] == 9
    assert session.patch(optimizer={"lr": 0.2})["optimizer"]["lr"] == 0.2


def test_the_background_keeps_the_order(app):
    session = session_on(app)
    futures = [session.push_pull_async(GRADS) for _ in range(5)]
    assert [future.result()[0].step for future in futures] == [1, 2, 3, 4, 5]
    late = session.push_async(GRADS)
    session.close()
    assert late.result().step == 6
    with pytest.raises(ClosedError):
        session.push_async(GRADS)


def test_the_end(app):
    session = session_on(app, id="ends")
    with session:
        session.delete()
        session.delete()
        with pytest.raises(errors.SessionGone):
            session.pull()
    with pytest.raises(ClosedError):
        session.pull()
    with pytest.raises(SessionUnknown):
        Session.attach(app, "nobody")


def test_keys(monkeypatch):
    monkeypatch.delenv("GRADPOST_API_KEY", raising=False)
    settings = Settings(api_key=SecretStr("open-sesame"), log_level="error")
    with InProcess(create_app(settings)) as app:
        with pytest.raises(KeyMissing):
            Session.attach(app, "m")
        with pytest.raises(KeyWrong):
            Session.attach(app, "m", api_key="guess")
        assert session_on(app, api_key="open-sesame").push(GRADS).step == 1
