"""Uploads whose answers are lost, and other workers in between: taken once, nothing overwritten."""

import http.client
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest

from gradpost import DeadlineExceeded, EpochChanged, RetryPolicy, Session, TransportError, errors
from gradpost.protocol import SAFETENSORS
from gradpost.tensors import encode
from gradpost.transport import read_all
from tests.client.lossy import Lossy
from tests.client.scripted import Clock, Scripted, answer, problem

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
NEW = {"w": np.float32([10, 20, 30]), "b": np.float32(40)}
GRADS = {"w": np.float32([1, 1, 1]), "b": np.float32(1)}


def after(params, steps):
    return {name: value - np.float32(0.5 * steps) for name, value in params.items()}


def same(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.fixture
def lossy(application):
    return Lossy(application)


@pytest.fixture
def trainer(lossy):
    clock = Clock()
    policy = RetryPolicy(deadline_s=10.0, sleep=clock.sleep, clock=clock)
    with Session.create(lossy, params=PARAMS, rule="sgd", lr=0.5, policy=policy) as session:
        session.pull()
        yield session
        lossy.heal()
        session.delete()


@pytest.fixture
def other(application, trainer):
    """A second worker, which never loses anything."""
    with Session.attach(application, trainer.id) as session:
        session.pull()
        yield session


def stepping(other):
    """What a worker does all the time."""

    def steps():
        other.pull()
        other.push(GRADS)

    return steps


def upload(trainer, what):
    """Parameters, or the state as it is."""
    if what == "params":
        trainer.set_params(NEW)
    else:
        trainer.set_state(trainer.state())


UPLOADS = pytest.mark.parametrize("what", ["params", "state"])


@UPLOADS
@pytest.mark.parametrize("count", [1, 3])
def test_a_lost_answer_does_not_overwrite_what_came_after(lossy, trainer, other, what, count):
    lossy.lose("PUT", count)
    lossy.after = stepping(other)
    upload(trainer, what)
    assert trainer.version == (2, 1)
    info = trainer.info()
    assert (info["epoch"], info["version"], info["step"]) == (2, 1 + count, count)
    same(trainer.pull(), after(NEW if what == "params" else PARAMS, count))
    assert trainer.push(GRADS).staleness == 0


@UPLOADS
def test_it_counts_as_computed_on_what_was_uploaded(lossy, trainer, other, what):
    lossy.lose("PUT")
    lossy.after = stepping(other)
    upload(trainer, what)
    assert trainer.push(GRADS).staleness == 1


@UPLOADS
def test_a_lost_request_is_sent_again_whatever_came_between(lossy, trainer, other, what):
    lossy.lose("PUT", 2, deliver=False)
    lossy.after = stepping(other)
    upload(trainer, what)
    assert trainer.version == (2, 1)
    info = trainer.info()
    assert (info["epoch"], info["version"]) == (2, 1)
    same(trainer.pull(), NEW if what == "params" else after(PARAMS, 2))
    with pytest.raises(EpochChanged):
        other.push(GRADS)


@UPLOADS
def test_a_worker_that_steps_all_the_time_does_not_keep_it_out(lossy, trainer, other, what):
    steps = stepping(other)
    lossy.before = lambda method: method == "PUT" and steps()
    upload(trainer, what)
    assert sum(path.endswith(f"/{what}") for path in lossy.paths("PUT")[2:]) == 1
    assert trainer.version == (2, 1)
    assert trainer.retries == 0


@UPLOADS
def test_another_upload_that_comes_first_is_replaced(lossy, trainer, other, what):
    once = [lambda: other.set_params({"b": np.float32(7)})]
    lossy.before = lambda method: method == "PUT" and once and once.pop()()
    upload(trainer, what)
    assert trainer.version == (3, 1)
    assert trainer.retries == 1
    same(trainer.pull(), NEW if what == "params" else {**PARAMS, "b": np.float32(7)})


def test_uploads_that_keep_coming_first_end_at_the_deadline(lossy, trainer, other):
    lossy.before = lambda method: method == "PUT" and other.set_params(PARAMS)
    with pytest.raises(DeadlineExceeded) as caught:
        trainer.set_params(NEW)
    assert isinstance(caught.value.last, errors.PreconditionFailed)
    same(other.pull(), PARAMS)


@UPLOADS
@pytest.mark.parametrize("delivered", [True, False])
def test_after_more_uploads_than_one_nobody_can_tell(lossy, trainer, other, what, delivered):
    def meanwhile():
        other.set_params(PARAMS)
        other.set_params(PARAMS)

    lossy.lose("PUT", deliver=delivered)
    lossy.after = meanwhile
    with pytest.raises(errors.PreconditionFailed) as caught:
        upload(trainer, what)
    assert not caught.value.retryable
    assert "can't be told" in caught.value.__notes__[0]
    assert trainer.version == (1, 1)
    same(trainer.pull(), PARAMS)  # theirs, whole


def test_the_first_upload_is_taken_once_too(application, lossy):
    with Session.create(lossy, rule="sgd", lr=0.5) as trainer:
        with Session.attach(application, trainer.id) as other:
            lossy.lose("PUT")
            lossy.after = stepping(other)
            trainer.set_params(PARAMS)
            assert trainer.version == (1, 1)
            info = trainer.info()
            assert (info["epoch"], info["version"], info["step"]) == (1, 2, 1)
            same(trainer.pull(), after(PARAMS, 1))
        trainer.delete()


def test_only_the_first_of_several_is_not_told_its_own_from_another(lossy):
    with Session.create(lossy, rule="sgd", lr=0.5) as trainer:
        lossy.lose("PUT")
        with pytest.raises(errors.PreconditionFailed):
            trainer.set_params(PARAMS, first_only=True)
        same(trainer.pull(), PARAMS)
        trainer.delete()
    assert {headers.get("If-Match") for _, _, headers in lossy.sent} == {None}


def test_the_check_itself_may_be_lost(lossy, trainer, other):
    def then():
        lossy.after = lambda: None
        other.pull()
        other.push(GRADS)
        lossy.lose("GET", 2)

    lossy.lose("PUT")
    lossy.after = then
    trainer.set_params(NEW)
    assert len(lossy.paths("PUT")) == 4  # the creation, its parameters, the lost one, the refused
    assert trainer.version == (2, 1)
    same(trainer.pull(), after(NEW, 1))


@UPLOADS
def test_a_deadline_says_that_it_is_not_known(lossy, trainer, what):
    lossy.lose("PUT", math.inf)
    with pytest.raises(DeadlineExceeded) as caught:
        upload(trainer, what)
    assert caught.value.kept is None
    assert trainer.pending is None
    assert trainer.info()["epoch"] == 2  # taken, once
    assert trainer.version == (1, 1)


def where(epoch, version):
    return lambda: answer(200, {"epoch": epoch, "version": version})


def test_what_was_refused_before_is_not_taken_for_ours():
    """Attempts that were answered, if by 429, can't have been taken: another upload was."""
    clock = Clock()
    transport = Scripted(
        where(1, 5),
        problem(429, "overloaded"),
        problem(412, "precondition-failed"),
        where(2, 1),
        where(3, 1),
    )
    policy = RetryPolicy(sleep=clock.sleep, clock=clock)
    with Session(transport, "m", policy=policy) as trainer:
        trainer.set_params(NEW)
        assert trainer.version == (3, 1)
        sent = [(one.method, one.headers.get("If-Match")) for one in transport.sent]
        assert sent == [
            ("GET", None),
            ("PUT", '"epoch-1"'),
            ("PUT", '"epoch-1"'),
            ("GET", None),
            ("PUT", '"epoch-2"'),
        ]


# What the server makes of the conditions.


def put(server, id, what, body, headers):
    sent = server.request("PUT", f"/v1/sessions/{id}/{what}", headers, body, 60)
    return sent.status, json.loads(read_all(sent))


def body_of(trainer, what):
    if what == "params":
        return encode(NEW, "F32")
    state = trainer.state()
    facts = {"counts": json.dumps(state.counts), "step": str(state.step), "rule": state.rule}
    return encode(state.tensors, "F32", facts)


TAKEN = ['"1-3"', ' "1-3" ', '"1-3-json.master"', '"epoch-1"', "*", None]
REFUSED = ['"1-2"', '"1-4"', '"2-3"', '"epoch-2"', '"0-3"', '"3"', "1-3", 'W/"1-3"', '"spec-1"', ""]


@UPLOADS
@pytest.mark.parametrize("tag", TAKEN + REFUSED)
def test_conditions(application, trainer, other, what, tag):
    stepping(other)()
    stepping(other)()
    headers = {"Content-Type": SAFETENSORS} | ({} if tag is None else {"If-Match": tag})
    status, found = put(application, trainer.id, what, body_of(trainer, what), headers)
    if tag in TAKEN:
        assert status == 200
        assert (found["epoch"], found["version"]) == (2, 1)
        return
    assert status == 412
    assert found["type"].endswith("/precondition-failed")
    assert (found["epoch"], found["version"]) == (1, 3)
    assert trainer.info()["epoch"] == 1
    same(trainer.pull(), after(PARAMS, 2))


@pytest.mark.parametrize(
    ("tag", "status"), [("*", 412), ('"1-1"', 412), ('"2-0"', 412), ('"1-0"', 200), (None, 200)]
)
def test_conditions_on_a_session_without_parameters(application, tag, status):
    with Session.create(application, rule="sgd", lr=0.5) as trainer:
        headers = {"Content-Type": SAFETENSORS} | ({} if tag is None else {"If-Match": tag})
        assert put(application, trainer.id, "params", encode(NEW, "F32"), headers)[0] == status
        assert put(application, trainer.id, "state", encode({}, "F32"), headers)[0] != 200
        trainer.delete()


@UPLOADS
@pytest.mark.parametrize(("tag", "status"), [('"1-1"', 412), ('"epoch-1"', 200)])
def test_a_step_while_the_body_comes(url, what, tag, status):
    """The condition is looked at again when the upload's turn has come."""
    with Session.create(url, params=PARAMS, rule="sgd", lr=0.5) as trainer:
        body = b"".join(body_of(trainer, what))
        link = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        link.putrequest("PUT", f"/v1/sessions/{trainer.id}/{what}")
        for name, value in {
            "Content-Type": SAFETENSORS,
            "Content-Length": str(len(body)),
            "If-Match": tag,
        }.items():
            link.putheader(name, value)
        link.endheaders(body[:20])
        trainer.pull()
        assert trainer.push(GRADS).version == 2
        link.send(body[20:])
        with link.getresponse() as got:
            found = json.loads(got.read())
        link.close()
        assert got.status == status
        if status == 412:
            assert (found["epoch"], found["version"]) == (1, 2)
            same(trainer.pull(), after(PARAMS, 1))
        else:
            assert (found["epoch"], found["version"]) == (2, 1)


@UPLOADS
def test_of_two_at_once_one_is_taken(application, trainer, what):
    body = body_of(trainer, what)
    for epoch in range(1, 11):
        start = threading.Barrier(2)
        headers = {"Content-Type": SAFETENSORS, "If-Match": f'"{epoch}-1"'}

        def send(_, start=start, headers=headers):
            start.wait(10)
            return put(application, trainer.id, what, body, headers)[0]

        with ThreadPoolExecutor(2) as threads:
            assert sorted(threads.map(send, range(2))) == [200, 412]
    assert trainer.info()["epoch"] == 11


def test_without_an_epoch_nothing_is_uploaded(lossy, trainer):
    before = len(lossy.paths("PUT"))
    lossy.lose("GET", math.inf, deliver=False)
    with pytest.raises(DeadlineExceeded) as caught:
        trainer.set_params(NEW)
    assert isinstance(caught.value.last, TransportError)
    assert len(lossy.paths("PUT")) == before
