"""Which failures are tried again, with what, when, and for how long."""

import numpy as np
import pytest

from gradpost import DeadlineExceeded, RefusedError, RetryPolicy, Session, TransportError, errors
from gradpost.inprocess import MemoryAnswer
from gradpost.protocol import PROBLEMS
from service.errors import BY_SLUG as SERVED
from tests.client.scripted import Clock, Scripted, answer, done, problem

GRADS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.float32(2)}


class Broken:
    """An answer that breaks off while it is read."""

    def __init__(self, status=200):
        self.status = status
        self.headers = {"Content-Type": "application/json"}
        self.released = 0

    def readinto(self, view):
        raise TransportError("The answer broke off.")

    def release(self):
        self.released += 1


def session(transport, clock=None, **policy):
    clock = clock or Clock()
    found = Session(
        transport, "m", policy=RetryPolicy(sleep=clock.sleep, clock=clock, **policy), seed=5
    )
    found.version = (1, 0)  # as if parameters had been pulled
    return found


AGAIN = {
    "timeout": lambda: TransportError("timed out"),
    "broken answer": Broken,
    "broken refusal": lambda: Broken(409),
    "no summary": lambda: answer(200, {"hello": "world"}),
    "another summary": lambda: answer(200, {"step": None}),
    "not JSON": lambda: MemoryAnswer(200, {}, b"<html>"),
    "408": lambda: problem(408, "request-timeout"),
    "409 in flight": lambda: problem(409, "in-flight", Retry_After="1"),
    "429": lambda: problem(429, "overloaded", Retry_After="2"),
    "429 of a proxy": lambda: answer(429),
    "500": lambda: problem(500, "internal"),
    "502 of a proxy": lambda: answer(502),
    "503": lambda: problem(503, "shutting-down"),
    "504 of a proxy": lambda: answer(504),
}


@pytest.mark.parametrize("failure", list(AGAIN.values()), ids=list(AGAIN))
def test_the_same_bytes_go_again(failure):
    transport = Scripted(failure, failure, done)
    with session(transport) as trainer:
        assert trainer.push(GRADS, loss=0.5).applied
        assert trainer.retries == 2
        first, *others = transport.sent
        assert first.body
        assert "sequence=1&" in first.path
        assert "loss=0.5" in first.path
        assert others == [first, first]
        trainer.push(GRADS)
    assert "sequence=2&" in transport.sent[-1].path


def test_the_mixture_ends_in_one_answer():
    transport = Scripted(*AGAIN.values(), done)
    with session(transport) as trainer:
        assert trainer.push(GRADS).step == 1
    assert len(transport.sent) == len(AGAIN) + 1
    assert len(set(map(str, transport.sent))) == 1


FINAL = [slug for slug, retryable in PROBLEMS.items() if not retryable]


@pytest.mark.parametrize("slug", FINAL)
def test_a_final_refusal_is_raised_at_once_in_its_class(slug):
    transport = Scripted(problem(SERVED[slug].status, slug))
    with session(transport) as trainer, pytest.raises(errors.BY_SLUG[slug]) as caught:
        trainer.push(GRADS)
    assert len(transport.sent) == 1
    assert caught.value.status == SERVED[slug].status
    assert caught.value.detail == f"It is {slug}."
    assert not caught.value.retryable


@pytest.mark.parametrize("status", [302, 400, 404, 409, 418, 422, 507])
def test_a_refusal_without_a_document_is_raised_at_once(status):
    transport = Scripted(answer(status))
    with session(transport) as trainer, pytest.raises(RefusedError, match=str(status)):
        trainer.push(GRADS)
    assert len(transport.sent) == 1


def test_an_awaited_version_is_not_awaited_again():
    transport = Scripted(problem(409, "version-pending"))
    with session(transport) as trainer, pytest.raises(errors.VersionPending) as caught:
        trainer.pull(min_version=(1, 9), wait_s=0)
    assert caught.value.retryable
    assert transport.sent[0].headers["Prefer"] == "wait=0"
    assert len(transport.sent) == 1


def test_retry_after_is_waited_for():
    clock = Clock()
    transport = Scripted(problem(429, "overloaded", Retry_After="7"), done)
    with session(transport, clock) as trainer:
        trainer.push(GRADS)
    assert len(clock.slept) == 1
    assert 7.0 <= clock.slept[0] <= 7.05


@pytest.mark.parametrize("text", ["-1", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT", "²", "soon", ""])
def test_a_retry_after_that_is_no_number_is_as_none(text):
    clock = Clock()
    transport = Scripted(problem(503, "shutting-down", Retry_After=text), done)
    with session(transport, clock) as trainer:
        trainer.push(GRADS)
    assert clock.slept[0] <= 0.05


def test_waits_double_up_to_the_cap_and_are_jittered():
    clock = Clock()
    transport = Scripted(*[TransportError("no")] * 10, done)
    with session(transport, clock, base_s=0.1, cap_s=3.0) as trainer:
        trainer.push(GRADS)
    full = [min(3.0, 0.1 * 2**i) for i in range(10)]
    assert all(f / 2 <= s <= f for s, f in zip(clock.slept, full, strict=True))
    assert len({s / f for s, f in zip(clock.slept, full, strict=True)}) == 10


def test_the_deadline_ends_it_and_tells_the_last_failure():
    clock = Clock()
    transport = Scripted(lambda: problem(503, "shutting-down"))
    with (
        session(transport, clock, deadline_s=10.0, attempt_s=4.0) as trainer,
        pytest.raises(DeadlineExceeded, match=r"10\.0 s") as caught,
    ):
        trainer.push(GRADS)
    assert isinstance(caught.value.last, errors.ShuttingDown)
    assert sum(clock.slept) < 10.0
    assert len(transport.sent) == len(clock.slept) + 1 > 3
    assert max(transport.timeouts) == 4.0
    assert all(0 < timeout for timeout in transport.timeouts)
    assert transport.timeouts[-1] < 4.0


def test_no_wait_beyond_the_deadline_is_begun():
    clock = Clock()
    transport = Scripted(problem(429, "overloaded", Retry_After="9" * 400))
    with session(transport, clock) as trainer, pytest.raises(DeadlineExceeded):
        trainer.push(GRADS)
    assert clock.slept == []


def test_each_retry_is_told():
    told = []
    transport = Scripted(TransportError("no"), problem(500, "internal"), done)
    with session(transport, on_retry=told.append) as trainer:
        trainer.push(GRADS)
    assert [attempt.tries for attempt in told] == [1, 2]
    assert [type(attempt.error) for attempt in told] == [TransportError, errors.Internal]
    assert all(attempt.delay_s > 0 for attempt in told)


def test_every_answer_is_released():
    broken = [Broken() for _ in range(3)]
    with session(Scripted(*broken, done)) as trainer:
        trainer.push(GRADS)
    assert [one.released for one in broken] == [1, 1, 1]


def test_one_seed_one_jitter():
    def waits():
        clock = Clock()
        with session(Scripted(*[TransportError("no")] * 5, done), clock) as trainer:
            trainer.push(GRADS)
        return clock.slept

    assert waits() == waits()


STRANGE = {
    "push": lambda trainer: trainer.push(GRADS),
    "push_pull": lambda trainer: trainer.push_pull(GRADS),
    "pull": lambda trainer: trainer.pull(),
    "state": lambda trainer: trainer.state(),
    "history": lambda trainer: trainer.history(),
    "info": lambda trainer: trainer.info(),
    "set_params": lambda trainer: trainer.set_params(GRADS),
}


@pytest.mark.parametrize("call", list(STRANGE.values()), ids=list(STRANGE))
def test_an_answer_of_somebody_else_is_no_success(call):
    strange = Scripted(lambda: answer(200, {"hello": "world"}, Content_Type="application/json"))
    with session(strange, deadline_s=2.0) as trainer, pytest.raises(DeadlineExceeded) as caught:
        call(trainer)
    assert isinstance(caught.value.__cause__, TransportError)
