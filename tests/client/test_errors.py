"""The tree of errors, and that both sides know the same problems."""

import copy
import pickle

import pytest

import gradpost
from gradpost import DeadlineExceeded, GradpostError, TransportError, errors
from gradpost.protocol import PROBLEM_PREFIX, PROBLEMS
from service.errors import BY_SLUG as SERVED


def document(slug, **more):
    return {"type": PROBLEM_PREFIX + slug, "status": 418, "detail": "Do so.", **more}


def test_both_sides_know_the_same_problems():
    assert SERVED.keys() == PROBLEMS.keys()
    assert {slug: one.retryable for slug, one in SERVED.items()} == dict(PROBLEMS)
    assert errors.BY_SLUG.keys() == PROBLEMS.keys()
    for slug, one in SERVED.items():
        assert errors.BY_SLUG[slug].__name__ == one.__name__


@pytest.mark.parametrize(("slug", "retryable"), list(PROBLEMS.items()))
def test_every_problem_has_its_class(slug, retryable):
    error = errors.refusal(SERVED[slug].status, document(slug))
    assert type(error) is errors.BY_SLUG[slug]
    assert error.slug == slug
    assert error.retryable is retryable
    assert slug in str(error)
    assert "Do so." in str(error)


def test_the_server_has_the_last_word_on_retrying():
    assert errors.refusal(409, document("in-flight", retryable=False)).retryable is False
    assert errors.refusal(409, document("too-old", retryable=True)).retryable is True


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(400, False), (408, True), (409, False), (429, True), (500, True), (502, True), (507, False)],
)
@pytest.mark.parametrize("problem", [{}, {"type": "about:blank"}, {"type": 7}, document("new")])
def test_an_unknown_problem_goes_by_its_status(status, retryable, problem):
    error = errors.refusal(status, problem)
    assert type(error) is gradpost.RefusedError
    assert error.retryable is retryable
    assert str(status) in str(error)


def test_where_the_session_stands():
    error = errors.refusal(409, document("stale-gradient", step=9, epoch=2, version=7))
    assert (error.step, error.epoch, error.version) == (9, 2, 7)
    bare = errors.refusal(409, document("stale-gradient", version="7"))
    assert (bare.step, bare.epoch, bare.version) == (None, None, None)


def classes(root):
    yield root
    for one in root.__subclasses__():
        yield from classes(one)


def made(one):
    if issubclass(one, gradpost.RefusedError):
        return one(409, document(one.slug, version=3), 2.0)
    if one is DeadlineExceeded:
        return one("No answer.", TransportError("no"))
    return one("It is so.")


@pytest.mark.parametrize("one", list(classes(GradpostError)), ids=lambda one: one.__name__)
def test_errors_pickle_and_copy(one):
    error = made(one)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is one
        assert str(twin) == str(error)
        assert twin.retryable == error.retryable
        if isinstance(error, gradpost.RefusedError):
            assert (twin.status, twin.problem, twin.retry_after_s) == (409, error.problem, 2.0)
        if isinstance(error, DeadlineExceeded):
            assert str(twin.last) == "no"


def test_a_kept_push_pickles():
    error = DeadlineExceeded("No answer.", TransportError("no"))
    assert error.retryable
    error.keep(7)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert twin.kept == 7
        assert not twin.retryable
        assert str(twin) == str(error)
        assert str(twin).startswith("No answer. Push 7 may have been applied")


UNTOLD = {"key-missing", "key-required", "key-wrong", "origin-refused"}


@pytest.mark.parametrize("slug", list(PROBLEMS))
def test_which_refusals_settle_a_push(slug):
    status = SERVED[slug].status
    settles = errors.refusal(status, document(slug)).settles
    assert settles is (status < 500 and slug not in UNTOLD)


def test_a_refusal_of_somebody_else_settles_nothing():
    assert errors.refusal(409, document("round-closed")).settles  # of a newer server
    for problem in ({}, {"type": "about:blank"}, {"type": None}):
        assert not errors.refusal(403, problem).settles
