"""Pushes that no answer settled: kept, sent again, applied once."""

import math
import threading

import numpy as np
import pytest

from gradpost import (
    CertificateError,
    ClosedError,
    DeadlineExceeded,
    EpochChanged,
    NotPulled,
    RetryPolicy,
    Session,
    StaleGradient,
    TransportError,
    errors,
)
from gradpost.inprocess import MemoryAnswer
from tests.client.lossy import Lossy
from tests.client.scripted import SUMMARY, Clock, Scripted, answer, done, problem

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
GRADS = {"w": np.float32([1, 1, 1]), "b": np.float32(1)}
OTHERS = {"w": np.float32([4, 4, 4]), "b": np.float32(4)}
BOTH = {"w": np.float32([-1.5, -0.5, 0.5]), "b": np.float32(1.5)}


@pytest.fixture
def lossy(application):
    return Lossy(application)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def trainer(lossy, clock):
    policy = RetryPolicy(deadline_s=10.0, sleep=clock.sleep, clock=clock)
    with Session.create(lossy, params=PARAMS, rule="sgd", lr=0.5, policy=policy) as session:
        session.pull()
        yield session
        lossy.heal()
        session.delete()


@pytest.fixture(params=[True, False], ids=["the answers are lost", "the requests are lost"])
def delivered(request):
    return request.param


def scripted(*script, clock=None, **policy):
    clock = clock or Clock()
    policy = RetryPolicy(sleep=clock.sleep, clock=clock, **policy)
    session = Session(Scripted(*script), "m", policy=policy, seed=5)
    session.version = (1, 1)
    return session


def left_pending(lossy, trainer, *, deliver=True, call="push", **options):
    """Pushes GRADS from memory that is used for something else afterwards."""
    memory = {name: np.array(value) for name, value in GRADS.items()}
    lossy.lose("POST", math.inf, deliver=deliver)
    with pytest.raises(DeadlineExceeded) as caught:
        getattr(trainer, call)(memory, **options)
    lossy.heal()
    for value in memory.values():
        value[...] = 1e9
    return caught.value


def same(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize("call", ["push", "push_pull"])
def test_it_says_so(lossy, trainer, call):
    assert trainer.pending is None
    error = left_pending(lossy, trainer, call=call)
    assert error.kept == trainer.pending == 1
    assert not error.retryable
    assert isinstance(error.last, TransportError)
    assert "settle()" in str(error)
    assert "Push 1" in str(error)


def test_the_next_push_settles_it(lossy, trainer, delivered):
    left_pending(lossy, trainer, deliver=delivered, loss=0.5)
    summary = trainer.push(OTHERS)
    assert (summary.step, summary.replayed) == (2, False)
    assert trainer.pending is None
    assert trainer.info()["step"] == 2
    assert [one["loss"] for one in trainer.history()] == [0.5, None]
    same(trainer.pull(), BOTH)


@pytest.mark.parametrize("dtype", [None, "F64"])
def test_the_next_push_pull_settles_it(lossy, trainer, delivered, dtype):
    left_pending(lossy, trainer, deliver=delivered, call="push_pull", dtype=dtype)
    summary, params = trainer.push_pull(OTHERS, dtype=dtype)
    assert (summary.step, summary.replayed, trainer.pending) == (2, False, None)
    assert trainer.info()["step"] == 2
    same(params, BOTH)


@pytest.mark.parametrize("call", ["push_async", "push_pull_async"])
def test_the_next_in_the_background_settles_it(lossy, trainer, delivered, call):
    lossy.lose("POST", math.inf, deliver=delivered)
    first = getattr(trainer, call)(GRADS)
    assert isinstance(first.exception(60), DeadlineExceeded)
    assert trainer.pending == 1
    lossy.heal()
    found = getattr(trainer, call)(OTHERS).result(60)
    assert (found if call == "push_async" else found[0]).step == 2
    assert trainer.pending is None
    assert trainer.info()["step"] == 2
    same(trainer.pull(), BOTH)


@pytest.mark.parametrize("call", ["push", "push_pull"])
def test_settle_tells_what_it_did(lossy, trainer, delivered, call):
    before = trainer.version
    left_pending(lossy, trainer, deliver=delivered, call=call)
    summary = trainer.settle()
    assert (summary.step, summary.applied, summary.replayed) == (1, True, delivered)
    assert trainer.pending is None
    assert trainer.version == before  # nobody has pulled what came after it
    assert trainer.settle() is None
    assert trainer.push(OTHERS).step == 2
    same(trainer.pull(), BOTH)


def test_settling_has_a_deadline_and_may_be_tried_again(lossy, trainer, clock, delivered):
    left_pending(lossy, trainer, deliver=delivered)
    lossy.lose("POST", math.inf, deliver=delivered)
    clock.slept.clear()
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match=r"in 3\.0 s") as caught:
            trainer.settle(deadline_s=3.0)
        assert caught.value.retryable
        assert caught.value.kept is None
        assert trainer.pending == 1
    assert sum(clock.slept) <= 6.0
    lossy.heal()
    assert trainer.settle().step == 1


def test_a_push_that_can_not_settle_is_not_sent(lossy, trainer):
    left_pending(lossy, trainer)
    lossy.lose("POST", math.inf)
    with pytest.raises(DeadlineExceeded) as caught:
        trainer.push(OTHERS)
    assert caught.value.retryable  # this very call is the one to make again
    assert caught.value.kept is None
    assert "not sent" in caught.value.__notes__[0]
    assert trainer.pending == 1
    lossy.heal()
    assert trainer.push(OTHERS).step == 2
    same(trainer.pull(), BOTH)


def test_both_share_one_deadline():
    clock = Clock()

    def late():
        clock.now += 10.0
        return done()

    with scripted(TransportError("no"), clock=clock, deadline_s=9.0) as trainer:
        with pytest.raises(DeadlineExceeded):
            trainer.push(GRADS)
        sent = len(trainer._calls._transport.sent)
        trainer._calls._transport.script = [late, done]
        with pytest.raises(DeadlineExceeded, match="took all the time") as caught:
            trainer.push(OTHERS)
        assert caught.value.retryable
        assert trainer.pending is None
        assert len(trainer._calls._transport.sent) == sent + 1
        assert trainer.push(OTHERS).applied


def test_a_refusal_says_that_it_was_not_applied(application, lossy, trainer):
    left_pending(lossy, trainer, deliver=False)
    with Session.attach(application, trainer.id) as other:
        other.set_params(PARAMS)
        with pytest.raises(EpochChanged) as caught:
            trainer.push(OTHERS)
        assert any("push 1" in note for note in caught.value.__notes__)
        assert any("not sent" in note for note in caught.value.__notes__)
        assert trainer.pending is None
        assert other.info()["step"] == 0
        trainer.pull()
        assert trainer.push(OTHERS).step == 1


def test_what_was_applied_before_the_epoch_changed_is_a_replay(application, lossy, trainer):
    left_pending(lossy, trainer)
    with Session.attach(application, trainer.id) as other:
        other.set_params(PARAMS)
        assert trainer.settle().replayed
        same(other.pull(), PARAMS)


STRANGERS = {
    "key-wrong": lambda: problem(401, "key-wrong"),
    "origin-refused": lambda: problem(403, "origin-refused"),
    "a proxy": lambda: answer(403),
    "insufficient-memory": lambda: problem(507, "insufficient-memory"),
}


@pytest.mark.parametrize("refused", list(STRANGERS.values()), ids=list(STRANGERS))
def test_a_refusal_that_says_nothing_of_earlier_attempts_leaves_it_pending(refused):
    with scripted(TransportError("lost"), refused, refused, done) as trainer:
        with pytest.raises(errors.RefusedError) as caught:
            trainer.push(GRADS)
        assert "settle()" in caught.value.__notes__[0]
        assert trainer.pending == 1
        with pytest.raises(errors.RefusedError):
            trainer.settle()
        assert trainer.pending == 1
        assert trainer.settle().applied
        assert trainer.pending is None
        sent = trainer._calls._transport.sent
        assert len({(one.path, one.body) for one in sent}) == 1


@pytest.mark.parametrize(
    "first",
    [
        lambda: problem(500, "internal"),
        lambda: problem(409, "in-flight"),
        lambda: answer(502),
        lambda: answer(200, {"hello": "world"}),
    ],
)
def test_what_an_attempt_may_have_done_is_asked_for(first):
    with scripted(first, problem(401, "key-wrong"), done) as trainer:
        with pytest.raises(errors.KeyWrong):
            trainer.push(GRADS)
        assert trainer.pending == 1
        assert trainer.settle().applied


@pytest.mark.parametrize(
    "script",
    [
        [lambda: problem(401, "key-wrong")],
        [lambda: problem(429, "overloaded"), lambda: problem(401, "key-wrong")],
        [lambda: TransportError("lost"), lambda: problem(409, "stale-gradient")],
        [lambda: problem(409, "in-flight"), lambda: problem(409, "epoch-changed")],
        [lambda: CertificateError("distrusted")],
    ],
)
def test_what_is_known_not_to_have_been_applied_is_not_kept(script):
    with scripted(*script) as trainer:
        with pytest.raises(errors.GradpostError) as caught:
            trainer.push(GRADS)
        assert not isinstance(caught.value, DeadlineExceeded)
        assert trainer.pending is None


def test_a_distrusted_certificate_after_a_loss_leaves_it_pending():
    with scripted(TransportError("lost"), CertificateError("distrusted")) as trainer:
        with pytest.raises(CertificateError):
            trainer.push(GRADS)
        assert trainer.pending == 1


def test_a_push_that_was_never_begun_is_not_kept():
    with scripted(done) as trainer:
        trainer.version = None
        with pytest.raises(NotPulled):
            trainer.push(GRADS)
        with pytest.raises(TypeError):
            trainer.push({"w": "text"})
        assert trainer.pending is None


def test_an_interrupt_leaves_it_pending(lossy, trainer, delivered):
    lossy.lose("POST", deliver=delivered, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.push(GRADS)
    assert trainer.pending == 1
    assert trainer.settle().replayed is delivered
    assert trainer.info()["step"] == 1


def test_an_interrupt_while_it_waits_leaves_it_pending():
    def interrupted(seconds):
        raise KeyboardInterrupt

    policy = RetryPolicy(sleep=interrupted)
    with Session(Scripted(TransportError("no"), done), "m", policy=policy) as trainer:
        trainer.version = (1, 1)
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.push(GRADS)
        assert "settle()" in caught.value.__notes__[0]
        assert trainer.pending == 1
        assert trainer.push(GRADS).applied
        first, second, third = trainer._calls._transport.sent
        assert first == second
        assert "sequence=2&" in third.path


def test_an_interrupt_of_settling_leaves_it_pending(lossy, trainer):
    left_pending(lossy, trainer)
    lossy.lose("POST", error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.settle()
    assert trainer.pending == 1
    assert trainer.settle().replayed


class Recorder:
    """Notes the parts themselves; loses everything."""

    def __init__(self):
        self.parts = []

    def request(self, method, path, headers, body, timeout_s):
        self.parts.append([np.frombuffer(part, np.uint8) for part in body])
        raise TransportError("lost")

    def close(self):
        pass


def test_nothing_is_copied_before_the_deadline():
    memory = {"w": np.arange(100, dtype=np.float32)}
    clock = Clock()
    recorder = Recorder()
    policy = RetryPolicy(deadline_s=1.0, sleep=clock.sleep, clock=clock)
    with Session(recorder, "m", policy=policy) as trainer:
        trainer.version = (1, 1)
        with pytest.raises(DeadlineExceeded):
            trainer.push(memory)
        assert len(recorder.parts) > 1
        assert all(np.shares_memory(parts[-1], memory["w"]) for parts in recorder.parts)
        recorder.parts.clear()
        with pytest.raises(DeadlineExceeded):
            trainer.settle()
        assert not any(np.shares_memory(parts[-1], memory["w"]) for parts in recorder.parts)


def test_several_threads_leave_several(lossy, trainer, delivered, monkeypatch):
    lossy.lose("POST", math.inf, deliver=delivered)
    failed, begun, together = [], set(), threading.Barrier(3)

    def request(*arguments):
        if threading.get_ident() not in begun:
            begun.add(threading.get_ident())
            together.wait(60)
        return Lossy.request(lossy, *arguments)

    def push():
        with pytest.raises(DeadlineExceeded) as caught:
            trainer.push(GRADS)
        failed.append(caught.value.kept)

    monkeypatch.setattr(lossy, "request", request)
    threads = [threading.Thread(target=push) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    monkeypatch.undo()
    lossy.heal()
    assert sorted(failed) == [1, 2, 3]
    assert trainer.pending in failed
    assert trainer.settle().applied
    assert trainer.push(OTHERS).step == 4
    assert trainer.pending is None
    assert trainer.info()["step"] == 4


def test_several_threads_settle_one_once(lossy, trainer):
    left_pending(lossy, trainer, deliver=False)
    found = []
    threads = [threading.Thread(target=lambda: found.append(trainer.settle())) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert [one.step for one in found if one is not None] == [1]
    assert len(found) == 4
    assert trainer.info()["step"] == 1


def test_waiting_for_another_thread_has_a_deadline():
    inside, go_on = threading.Event(), threading.Event()

    def slow():
        inside.set()
        go_on.wait(60)
        return done()

    with scripted(TransportError("no"), deadline_s=5.0) as trainer:
        with pytest.raises(DeadlineExceeded):
            trainer.push(GRADS)
        trainer._calls._transport.script = [slow, done]
        thread = threading.Thread(target=trainer.settle)
        thread.start()
        assert inside.wait(60)
        with pytest.raises(DeadlineExceeded, match="Another thread") as caught:
            trainer.settle(deadline_s=0.05)
        assert caught.value.retryable
        assert trainer.pending == 1
        go_on.set()
        thread.join(60)
        assert trainer.pending is None


def test_closing_sends_nothing(lossy, trainer):
    left_pending(lossy, trainer)
    sent = len(lossy.sent)
    trainer.close()
    assert len(lossy.sent) == sent
    assert trainer.pending == 1
    for call in (trainer.settle, lambda: trainer.push(GRADS)):
        with pytest.raises(ClosedError):
            call()
    trainer._closed = False  # for the fixture, which deletes the session


def without_params(*script):
    """A session whose push_pull is answered by a summary alone, and its pull by the script."""
    first = MemoryAnswer(200, {"Content-Type": "application/json"}, done()._left.tobytes())
    return scripted(first, *script)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (lambda: problem(406, "not-acceptable"), errors.NotAcceptable),
        (lambda: TransportError("no"), DeadlineExceeded),
    ],
)
def test_a_push_whose_parameters_do_not_come_was_applied(failure, raised):
    with without_params(failure) as trainer:
        with pytest.raises(raised) as caught:
            trainer.push_pull(GRADS)
        assert caught.value.summary.step == SUMMARY["step"]
        assert not caught.value.retryable  # the gradient would be applied again
        assert trainer.pending is None
        assert "step 1" in caught.value.__notes__[0]


def test_a_stale_push_is_refused_and_not_kept(application, lossy, trainer):
    trainer.patch(update={"max_staleness": 0})
    left_pending(lossy, trainer, deliver=False)
    with Session.attach(application, trainer.id) as other:
        other.pull()
        other.push(GRADS)
        with pytest.raises(StaleGradient):
            trainer.settle()
        assert trainer.pending is None
        assert other.info()["step"] == 1
