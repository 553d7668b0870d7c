"""An answer that is lost after the server acted: the retry is a replay."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from gradpost import RetryPolicy, Session, errors
from gradpost.tensors import encode
from gradpost.transport import read_all
from tests.client.lossy import Lossy

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
GRADS = {"w": np.float32([1, 1, 1]), "b": np.float32(1)}


@pytest.fixture
def lossy(application):
    return Lossy(application)


@pytest.fixture
def trainer(lossy):
    policy = RetryPolicy(sleep=lambda seconds: None)
    with Session.create(lossy, params=PARAMS, rule="sgd", lr=0.5, policy=policy) as session:
        yield session
        session.delete()


@pytest.mark.parametrize("count", [1, 3])
def test_a_push_is_applied_once(lossy, trainer, count):
    lossy.lose("POST", count)
    summary = trainer.push(GRADS)
    assert trainer.retries == count
    assert summary.replayed
    assert summary.applied
    assert summary.step == 1
    assert trainer.info()["step"] == 1
    np.testing.assert_array_equal(trainer.pull()["w"], np.float32([0.5, 1.5, 2.5]))
    following = trainer.push(GRADS)
    assert (following.step, following.replayed) == (2, False)


def test_a_push_pull_is_applied_once_and_has_its_parameters(lossy, trainer):
    lossy.lose("POST")
    summary, params = trainer.push_pull(GRADS)
    assert summary.replayed
    assert summary.step == 1
    np.testing.assert_array_equal(params["w"], np.float32([0.5, 1.5, 2.5]))
    np.testing.assert_array_equal(params["b"], np.float32(3.5))
    assert trainer.version == (summary.epoch, summary.version)


def test_a_create_is_repeated(lossy, trainer):
    lossy.lose("PUT", 2)  # of the creation
    with Session.create(lossy, params=PARAMS, rule="sgd", lr=0.5) as other:
        np.testing.assert_array_equal(other.pull()["w"], PARAMS["w"])
        assert other.push(GRADS).step == 1
        other.delete()


def test_parameters_given_first_are_given(lossy, trainer):
    with Session.create(lossy, rule="sgd", lr=0.5) as other:
        lossy.lose("PUT")
        other._initialise(PARAMS)  # the retry finds them there: its own, and that is no failure
        np.testing.assert_array_equal(other.pull()["w"], PARAMS["w"])
        assert other.push(GRADS).staleness == 0
        other.delete()


def test_a_delete_is_no_failure(lossy):
    with Session.create(lossy, params=PARAMS, rule="sgd") as session:
        lossy.lose("DELETE")
        session.delete()


def test_bodies_do_not_copy_what_is_contiguous():
    flat = np.arange(100, dtype=np.float32)
    header, part = encode({"w": flat}, "F32")
    assert np.shares_memory(np.frombuffer(part, np.uint8), flat)
    assert len(header) % 8 == 0


# What a key promises, whoever sends it.


@pytest.fixture
def twin(application, trainer):
    """Another object that sends under the trainer's worker id, so that their keys are the same."""
    with Session.attach(application, trainer.id) as session:
        session.worker = trainer.worker
        session.version = (1, 1)
        yield session


def test_a_key_that_is_sent_again_has_the_original_result(application, trainer, twin):
    trainer.version = (1, 1)
    first = trainer.push(GRADS, loss=0.5)
    with Session.attach(application, trainer.id) as other:
        other.pull()
        assert other.push(GRADS).step == 2  # the model moves on: the replay's answer does not
    again = twin.push(GRADS, loss=0.5)
    assert again.replayed
    assert not first.replayed
    assert (again.step, again.version, again.grad_norm) == (1, first.version, first.grad_norm)
    assert trainer.info()["step"] == 2


@pytest.mark.parametrize(
    ("grads", "loss", "base"),
    [
        ({**GRADS, "b": np.float32(2)}, None, None),
        (GRADS, 0.5, None),
        (GRADS, None, (1, 2)),
    ],
    ids=["gradient", "loss", "base version"],
)
def test_a_key_with_another_payload_is_refused_and_changes_nothing(
    trainer, twin, grads, loss, base
):
    trainer.pull()
    trainer.push(GRADS)
    before = trainer.pull()
    with pytest.raises(errors.KeyReused):
        twin.push(grads, loss=loss, base_version=base)
    assert twin.pending is None
    assert trainer.info()["step"] == 1
    for name, value in trainer.pull().items():
        np.testing.assert_array_equal(value, before[name])


def test_one_key_sent_twice_at_once_is_one_step(trainer, twin):
    trainer.version = (1, 1)
    with ThreadPoolExecutor(2) as threads:
        for step in range(1, 21):
            start = threading.Barrier(2)

            def push(session, start=start):
                start.wait(10)
                return session.push(GRADS)

            found = list(threads.map(push, [trainer, twin]))
            assert [one.step for one in found] == [step, step]
            assert sorted(one.replayed for one in found) == [False, True]
    assert trainer.info()["step"] == 20


def test_this_client_sends_no_push_without_a_key(lossy, trainer):
    """So nothing it retries can be applied twice; without a key each request is a step."""
    trainer.pull()
    lossy.lose("POST", 1)
    trainer.push(GRADS)
    trainer.push_pull(GRADS)
    trainer.push_async(GRADS).result(60)
    asked = [parse_qs(urlsplit(path).query) for path in lossy.paths("POST")]
    assert [one["sequence"] for one in asked] == [["1"], ["1"], ["2"], ["3"]]
    assert all(one["worker"] == [trainer.worker] and one["base_version"] for one in asked)


def test_a_push_without_a_key_is_a_step_each_time(application, trainer):
    body = json.dumps({"grads": {name: value.tolist() for name, value in GRADS.items()}}).encode()
    path = f"/v1/sessions/{trainer.id}/steps"
    for step in (1, 2):
        answer = application.request("POST", path, {"Content-Type": "application/json"}, [body], 60)
        found = json.loads(read_all(answer))
        assert (found["step"], found["identified"], found["replayed"]) == (step, False, False)
