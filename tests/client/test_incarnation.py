"""A server that was restarted: another history under the same id and the same numbers."""

import numpy as np
import pytest

from gradpost import EpochChanged, InProcess, Session
from service.app import create_app
from service.settings import Settings

GRADS = {"w": np.ones(3, np.float32)}
START = {"w": np.zeros(3, np.float32)}


class Restarted:
    """A transport to a server that can be replaced by a new one."""

    def __init__(self):
        self.inner = InProcess(create_app(Settings(warm_rules=())))

    def restart(self):
        self.inner.close()
        self.inner = InProcess(create_app(Settings(warm_rules=())))

    def request(self, *arguments):
        return self.inner.request(*arguments)

    def close(self):
        self.inner.close()


@pytest.fixture
def server():
    found = Restarted()
    yield found
    found.close()


def test_a_gradient_of_a_lost_history_is_never_applied_to_another(server):
    old = Session.create(server, "m", params=START, rule="sgd", lr=1.0)
    for _ in range(3):
        old.push_pull(GRADS)
    server.restart()
    other = Session.create(server, "m", params=START, rule="sgd", lr=1.0)
    for _ in range(5):
        other.push_pull(GRADS)
    with pytest.raises(EpochChanged, match="created anew"):
        old.push(GRADS)
    np.testing.assert_array_equal(old.pull()["w"], np.full(3, -5, np.float32))
    assert old.push(GRADS).step == 6
    old.close()
    other.close()


def test_a_session_created_anew_after_a_delete_goes_on_after_a_pull(server):
    one = Session.create(server, "m", params=START, rule="sgd", lr=1.0)
    two = Session.attach(server, "m")
    two.pull()
    one.delete()
    one = Session.create(server, "m", params=START, rule="sgd", lr=1.0)
    with pytest.raises(EpochChanged):
        two.push(GRADS)
    two.pull()
    assert two.push(GRADS).applied
    one.close()
    two.close()
