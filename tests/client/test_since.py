"""Pulls of what has changed, into memory that has the rest."""

import uuid

import numpy as np
import pytest

from gradpost import Buffer, Session
from gradpost import answers as gradpost_answers
from gradpost.errors import TransportError
from tests.client.scripted import Scripted

START = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
ONE = {"b": np.ones(2, np.float32)}


class Watched:
    """Notes what is asked, and how long the answers are."""

    def __init__(self, transport):
        self._transport = transport
        self.asked = []
        self.lengths = []
        self.cut = False

    def request(self, method, path, headers, body, timeout_s):
        found = self._transport.request(method, path, headers, body, timeout_s)
        if method == "GET" and "/params" in path:
            self.asked.append(path.partition("?")[2])
            self.lengths.append(int(found.headers["Content-Length"]))
            if self.cut:
                self.cut = False
                found._left = found._left[:-4]
        return found

    def close(self):
        pass


@pytest.fixture
def watched(application):
    return Watched(application)


@pytest.fixture
def session(watched):
    with Session.create(
        watched, uuid.uuid4().hex, rule="sgd", lr=1.0, params=START, missing="skip"
    ) as found:
        yield found


def same(found, session):
    whole = session.pull()
    assert found.keys() == whole.keys()
    return all(np.array_equal(found[name], whole[name]) for name in whole)


def test_only_what_changed_is_sent_and_all_is_returned(session, watched):
    buffer = Buffer()
    first = session.pull(since=True, into=buffer)
    assert watched.asked[-1] == ""
    session.push(ONE)
    second = session.pull(since=True, into=buffer)
    assert watched.asked[-1] == "since=1-1"
    assert watched.lengths[-1] < watched.lengths[-2]
    assert second["b"].tolist() == [0, 0]
    assert second["w"] is first["w"]
    assert buffer.version == session.version == (1, 2)
    assert same(second, session)
    third = session.pull(since=True, into=buffer)  # nothing has changed
    assert watched.asked[-1] == "since=1-2"
    assert same(third, session)


def test_after_a_push_pull_into_the_same_memory(session, watched):
    buffer = Buffer()
    session.push_pull(ONE, into=buffer)
    session.push(ONE)
    found = session.pull(since=True, into=buffer)
    assert watched.asked[-1] == "since=1-2"
    assert same(found, session)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64", "model"])
def test_in_another_dtype(session, watched, dtype):
    buffer = Buffer()
    session.pull(into=buffer)
    session.push(ONE)
    session.pull(since=True, into=buffer, dtype=dtype)  # the buffer holds another form
    assert "since" not in watched.asked[-1]
    session.push(ONE)
    found = session.pull(since=True, into=buffer, dtype=dtype)
    assert "since=1-2" in watched.asked[-1]
    whole = session.pull(dtype=dtype)
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_of_some_names(session, watched):
    buffer = Buffer()
    session.pull(into=buffer, names=["w"])
    session.push(ONE)
    assert session.pull(since=True, into=buffer, names="w").keys() == {"w"}
    assert "since=1-1" in watched.asked[-1]
    assert same(session.pull(since=True, into=buffer), session)


def test_history_that_was_cut_is_pulled_whole(session, watched):
    buffer = Buffer()
    session.pull(into=buffer)
    session.set_params({"w": np.zeros((2, 3), np.float32)})
    found = session.pull(since=True, into=buffer)
    assert same(found, session)
    assert buffer.version == session.version == (2, 1)


def test_a_session_that_was_created_anew_is_pulled_whole(session, watched, application):
    buffer = Buffer()
    session.pull(into=buffer)
    session.delete()
    other = {name: array + 5 for name, array in START.items()}
    with Session.create(
        application, session.id, rule="sgd", lr=1.0, params=other, missing="skip"
    ) as anew:
        anew.push(ONE)
        buffer.version = (anew.version[0], 1)  # as if the epoch had begun at 1 again
        found = session.pull(since=True, into=buffer)
    assert "since" in watched.asked[-2]
    assert "since" not in watched.asked[-1]
    assert found["w"].tolist() == other["w"].tolist()


def test_a_group_that_was_added_is_pulled_whole(session, watched):
    buffer = Buffer()
    session.pull(into=buffer)
    session.add_group("head", {"h": np.ones(3, np.float32)})
    found = session.pull(since=True, into=buffer)
    assert same(found, session)
    assert "h" in found


def test_an_answer_that_breaks_off_leaves_nothing_half_merged(session, watched):
    buffer = Buffer()
    session.pull(into=buffer)
    session.push(ONE)
    watched.cut = True
    found = session.pull(since=True, into=buffer)  # retried
    assert [query for query in watched.asked if "since" in query] == ["since=1-1"] * 2
    assert same(found, session)
    session.push(ONE)
    watched.cut = True
    found = session.pull(into=buffer)  # the memory holds a mixture for a moment
    assert same(found, session)


def test_a_mixture_is_never_added_to(session, watched):
    buffer = Buffer()
    session.pull(into=buffer)
    broken = Session(Scripted(TransportError("gone")), session.id)
    watched.cut = True
    calls = broken._calls
    calls._transport = watched
    with pytest.raises(TransportError):
        calls.send(
            "GET",
            f"/v1/sessions/{session.id}/params",
            lambda answer: gradpost_answers.tensors_of(answer, buffer),
            5,
            headers={"Accept": "application/vnd.safetensors"},
        )
    assert buffer.version is None
    assert same(session.pull(since=True, into=buffer), session)
    assert "since" not in watched.asked[-2]


def test_what_it_takes(session):
    with pytest.raises(TypeError, match="into"):
        session.pull(since=True)
    with pytest.raises(TypeError, match="ema"):
        session.pull(since=True, into=Buffer(), of="ema")
