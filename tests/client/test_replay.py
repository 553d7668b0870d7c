"""An answer that is lost after the server acted: the retry is a replay."""

import numpy as np
import pytest

from gradpost import RetryPolicy, Session, TransportError
from gradpost.tensors import encode

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
GRADS = {"w": np.float32([1, 1, 1]), "b": np.float32(1)}


class Lossy:
    """Delivers requests; loses the answers to the next `losses` of a method."""

    def __init__(self, transport):
        self._transport = transport
        self.losses = 0
        self.method = ""

    def lose(self, method, count=1):
        self.method, self.losses = method, count

    def request(self, method, *arguments):
        answer = self._transport.request(method, *arguments)
        if method == self.method and self.losses:
            self.losses -= 1
            answer.release()
            raise TransportError("The answer was lost.")
        return answer

    def close(self):
        pass


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
