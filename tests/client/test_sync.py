"""Rounds as a trainer sees them: pushes that wait, passes, refusals, and what is left pending."""

import threading

import numpy as np
import pytest

from gradpost import (
    ClosedError,
    Contribution,
    DeadlineExceeded,
    EpochChanged,
    MovedOn,
    RetryPolicy,
    RoundAbandoned,
    RoundClosed,
    Session,
    Summary,
    TransportError,
    errors,
)
from gradpost.compress import ErrorFeedback, topk
from tests.client.fake import Fake
from tests.client.scripted import SUMMARY, Clock, Scripted, answer, problem

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
GRADS = {"w": np.float32([1, 1, 1]), "b": np.float32(1)}
TWICE = {"w": np.float32([2, 2, 2]), "b": np.float32(2)}


def policy(**more):
    return RetryPolicy(deadline_s=20.0, attempt_s=5.0, base_s=0.001, cap_s=0.002, **more)


def make(fake, worker="w", *, workers=2, lr=1.0, pull=True, **more):
    update = {"mode": "sync", "workers": workers, "round_timeout_s": 60}
    session = Session.create(
        fake, "m", params=PARAMS, rule="sgd", lr=lr, update=update, worker=worker,
        policy=policy(), seed=3, **more,
    )  # fmt: skip
    if pull:
        session.pull()
    return session


def together(*calls):
    """Runs calls at once, and gives what they return or raise."""
    found = [None] * len(calls)

    def run(at):
        try:
            found[at] = calls[at]()
        except Exception as error:
            found[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    return found


def same(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def pushes(fake):
    return [sent for sent in fake.sent if sent[0] == "POST"]


def test_a_push_waits_for_its_round():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        first, second = together(lambda: one.push(GRADS), lambda: two.push(TWICE, weight=3))
        for found in (first, second):
            assert isinstance(found, Summary)
            assert (found.step, found.round, found.contributions) == (1, 1, 2)
        same(one.pull(), {"b": np.float32(4 - 7 / 4)})
        assert (one.mode, one.pending) == ("sync", None)


def test_push_pull_has_the_parameters_after_the_round():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        for (summary, params), session in zip(
            together(lambda: one.push_pull(GRADS), lambda: two.push_pull(GRADS)), (one, two),
            strict=True,
        ):  # fmt: skip
            assert summary.round == 1
            same(params, {"w": PARAMS["w"] - 1})
            assert session.version == summary.at


def test_the_future_is_of_the_summary_and_the_parameters():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        pairs = [one.step_async(GRADS), two.step_async(GRADS)]
        for future in pairs:
            summary, params = future.result(60)
            assert summary.contributions == 2
            same(params, {"w": PARAMS["w"] - 1})
        assert [f.result(60).round for f in (one.push_async(GRADS), two.push_async(GRADS))] == [
            2,
            2,
        ]


def test_a_pass_fills_a_place_and_has_no_body():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        first, second = together(lambda: one.push(GRADS), two.skip_round)
        assert (first.contributions, second.contributions) == (1, 1)
        same(one.pull(), {"w": PARAMS["w"] - 1})
        (sent,) = [sent for sent in pushes(fake) if "weight=0" in sent[1]]
        assert sent[3] == b""
        assert "Content-Type" not in sent[2]
        one.pull()
        two.pull()
        first, second = together(one.skip_round, lambda: two.push(GRADS, weight=0))
        assert (first.skipped, first.applied, second.step) == ("passes", False, 1)


def test_a_push_that_does_not_wait():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        sent = one.push(GRADS, wait=False)
        assert isinstance(sent, Contribution)
        assert (sent.round, sent.contributions, sent.missing, sent.summary) == (1, 1, 1, None)
        assert (sent.worker, sent.sequence) == (one.worker, 1)
        assert one.pending is None
        with pytest.raises(errors.AlreadyContributed) as caught:
            one.push(GRADS, wait=False)
        assert (caught.value.round, caught.value.sequence) == (1, 1)
        with pytest.raises(DeadlineExceeded, match="Round 1 is still open; 1 workers") as late:
            one.wait(sent, deadline_s=0.05)
        assert late.value.retryable
        last = two.push(GRADS, wait=False)  # it closes the round, so it is answered by what it did
        assert (last.round, last.missing, last.summary.contributions) == (1, 0, 2)
        assert two.wait(last) is last.summary
        assert one.wait(sent).step == 1
    with pytest.raises(ClosedError):
        one.wait(sent)


def test_what_is_late_is_refused_by_name():
    fake = Fake()
    with make(fake, "a", workers=1) as one, make(fake, "b", workers=1) as two:
        one.push(GRADS)
        with pytest.raises(RoundClosed) as caught:
            two.push(GRADS)
        error = caught.value
        assert isinstance(error, MovedOn)
        assert (error.round, error.epoch, error.version, error.step) == (2, 1, 2, 1)
        assert two.pending is None
        fake.restore()
        with pytest.raises(EpochChanged):
            two.push(GRADS)


def test_a_round_that_is_abandoned_while_a_push_waits():
    fake = Fake()
    with make(fake, "a") as one:
        sent = one.push(GRADS, wait=False)
        fake.abandon()
        with pytest.raises(RoundAbandoned) as caught:
            one.wait(sent)
        error = caught.value
        assert (error.round, error.reason, error.sequence) == (1, "timeout", 1)
        assert (error.worker, error.epoch, error.version) == (one.worker, 1, 1)
        assert not error.retryable
        found = together(lambda: one.push(GRADS), lambda: after(fake, 2))
        assert isinstance(found[0], RoundAbandoned)
        assert (found[0].round, found[0].reason) == (2, "patch")
        assert one.pending is None


def after(fake, number):
    """Abandons a round as soon as it is open."""
    while number not in fake.rounds:
        threading.Event().wait(0.001)
    fake.abandon("patch")


def test_a_deadline_keeps_the_push_and_settling_waits_for_the_round():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        memory = {name: np.array(value) for name, value in GRADS.items()}
        with pytest.raises(DeadlineExceeded) as caught:
            one.push(memory, deadline_s=0.05)
        assert caught.value.kept == one.pending == 1
        for value in memory.values():
            value[...] = 1e9
        with pytest.raises(DeadlineExceeded):
            one.settle(0.05)
        assert one.pending == 1
        settled, _ = together(one.settle, lambda: two.push(GRADS))
        assert (settled.step, settled.contributions) == (1, 2)
        assert one.pending is None
        same(one.pull(), {"w": PARAMS["w"] - 1})
        assert len({(sent[1], sent[3]) for sent in pushes(fake) if one.worker in sent[1]}) == 1


def test_settling_a_pass_has_no_body_either():
    fake = Fake()
    with make(fake, "a") as one, make(fake, "b") as two:
        with pytest.raises(DeadlineExceeded):
            one.skip_round(deadline_s=0.05)
        two.skip_round()
        assert one.settle().skipped == "passes"


def test_the_next_push_learns_what_became_of_the_one_before():
    fake = Fake()
    with make(fake, "a") as one:
        with pytest.raises(DeadlineExceeded):
            one.push(GRADS, deadline_s=0.05)
        fake.abandon()
        with pytest.raises(RoundAbandoned) as caught:
            one.push(TWICE)
        assert any("not sent" in note for note in caught.value.__notes__)
        assert one.pending is None


def test_an_answer_that_is_lost_is_asked_for_again():
    fake = Fake()
    with make(fake, "a", workers=1) as one:
        one._retrier.policy = RetryPolicy(deadline_s=0.02, base_s=0.001, cap_s=0.002)
        with fake.lose("POST", "/steps", TransportError("lost")), pytest.raises(DeadlineExceeded):
            one.push(GRADS)
        assert one.settle().replayed
        assert fake.step == 1


def scripted(*script, mode="sync", clock=None, **times):
    clock = clock or Clock()
    session = Session(
        Scripted(*script), "m", policy=RetryPolicy(sleep=clock.sleep, clock=clock, **times), seed=5
    )
    session.version = (1, 6)
    session._standing.mode = mode
    return session


def sent_of(session):
    return session._calls._transport.sent


def received(number=7):
    return lambda: answer(
        202,
        {"applied": False, "round": number, "contributions": 1, "passes": 0, "missing": 1},
        Content_Type="application/json",
    )


def seen(session, status="applied", *, number=7, sequence=1, base="1-6", **more):
    summary = {**SUMMARY, "round": number, "contributions": 2} if status != "abandoned" else None
    members = [
        {"worker": "somebody", "sequence": 1},
        {"worker": session.worker, "sequence": sequence},
    ]
    return answer(
        200,
        {"round": number, "status": status, "base_version": base, "members": members,
         "missing": 1, "summary": None if status == "open" else summary,
         "epoch": 1, "version": 7, "step": 4, **more},
    )  # fmt: skip


def test_it_asks_the_round_and_leaves_time_for_answers():
    with scripted(None, deadline_s=120.0, attempt_s=60.0) as session:
        transport = session._calls._transport
        transport.script = [received(), lambda: seen(session, "open"), lambda: seen(session)]
        assert session.push(GRADS).round == 7
        post, first, second = transport.sent
        assert post.headers["Prefer"] == "wait=59.000"
        assert [one.method for one in (first, second)] == ["GET", "GET"]
        assert first.path == second.path == "/v1/sessions/m/rounds/7"
        assert (first.headers["Prefer"], first.body) == ("wait=59.000", b"")


def test_the_wait_fits_the_deadline():
    with scripted(None, deadline_s=2.0) as session:
        transport = session._calls._transport
        transport.script = [received(), lambda: seen(session, "open")]
        with pytest.raises(DeadlineExceeded) as caught:
            session.push(GRADS)
        assert caught.value.kept == 1
        waits = [float(one.headers["Prefer"].removeprefix("wait=")) for one in transport.sent]
        assert waits[0] == 1.5
        assert all(wait <= timeout for wait, timeout in zip(waits, transport.timeouts, strict=True))
        assert len(waits) < 30  # it pauses, where a server does not wait


@pytest.mark.parametrize(
    ("status", "left"), [("applied", [1.0] * 7 + [0.0]), ("abandoned", [0.0] * 8)]
)
def test_what_compression_lost_counts_once_the_round_is_closed(status, left):
    clock = Clock()
    times = RetryPolicy(sleep=clock.sleep, clock=clock)
    with Session(Scripted(None), "m", policy=times, compress=ErrorFeedback(topk(1))) as session:
        session.version = (1, 6)
        session.compress.load({"w": np.zeros(8, np.float32)})
        transport = session._calls._transport
        transport.script = [received(), lambda: seen(session, status, reason="timeout")]
        try:
            session.push({"w": np.float32([1, 1, 1, 1, 1, 1, 1, 2])})
        except RoundAbandoned:
            assert status == "abandoned"
        assert session.compress.state()["w"].tolist() == left


@pytest.mark.parametrize(
    "unclear",
    [
        lambda session: problem(404, "round-unknown"),
        lambda session: seen(session, sequence=9),
        lambda session: seen(session, base="2-6"),
        lambda session: seen(session, base=None),
        lambda session: seen(session, summary=None),
    ],
    ids=["forgotten", "not ours", "of another epoch", "of none", "without a summary"],
)
def test_where_the_round_can_not_tell_the_push_is_repeated(unclear):
    with scripted(None) as session:
        transport = session._calls._transport
        done = answer(200, {**SUMMARY, "replayed": True})
        transport.script = [received(), lambda: unclear(session), done]
        assert session.push(GRADS).replayed
        post, _, again = transport.sent
        assert (post.path, post.body) == (again.path, again.body)


def test_the_members_of_a_round_may_be_forgotten():
    with scripted(None) as session:
        transport = session._calls._transport
        transport.script = [received(), lambda: seen(session, members=None)]
        assert session.push(GRADS).round == 7
        assert len(transport.sent) == 2


def test_where_the_server_never_tells_there_is_a_deadline():
    with scripted(received(), deadline_s=1.0) as session:
        transport = session._calls._transport
        turns = iter(range(10_000))
        transport.script = [
            lambda: received()() if next(turns) % 2 == 0 else problem(404, "round-unknown")
        ]
        with pytest.raises(DeadlineExceeded) as caught:
            session.push(GRADS)
        assert caught.value.kept == session.pending == 1


def test_a_contribution_whose_round_is_forgotten():
    with scripted(received(), lambda: problem(404, "round-unknown")) as session:
        sent = session.push(GRADS, wait=False)
        assert sent_of(session)[0].headers["Prefer"] == "wait=0.000"
        with pytest.raises(errors.RoundUnknown):
            session.wait(sent)


@pytest.mark.parametrize(
    ("slug", "status", "pending"), [("key-wrong", 401, 1), ("session-unknown", 404, None)]
)
def test_a_refusal_while_it_waits(slug, status, pending):
    with scripted(received(), lambda: problem(status, slug)) as session:
        with pytest.raises(errors.RefusedError) as caught:
            session.push(GRADS)
        assert caught.value.slug == slug
        assert session.pending == pending


def test_an_interrupt_while_it_waits_leaves_it_pending():
    with scripted(received(), KeyboardInterrupt()) as session:
        transport = session._calls._transport

        def interrupted():
            raise KeyboardInterrupt

        transport.script = [received(), interrupted]
        with pytest.raises(KeyboardInterrupt):
            session.push(GRADS)
        assert session.pending == 1


def test_a_proxy_while_it_waits_is_tried_again():
    with scripted(None) as session:
        transport = session._calls._transport
        transport.script = [received(), TransportError("gone"), lambda: answer(502),
                            lambda: seen(session)]  # fmt: skip
        assert session.push(GRADS).contributions == 2
        assert [one.method for one in transport.sent] == ["POST", "GET", "GET", "GET"]


def test_bounded_pushes_wait_too_and_say_if_they_are_ahead():
    ahead = {**SUMMARY, "ahead": True}
    with scripted(lambda: answer(200, ahead), mode="bounded") as session:
        assert session.push(GRADS).ahead is True
        assert session.push(GRADS, wait=False).summary.ahead is True
        waits = [one.headers["Prefer"] for one in sent_of(session)]
        assert waits == ["wait=59.000", "wait=0.000"]


def test_an_older_server_says_less():
    with scripted(lambda: answer(200, SUMMARY), mode="async") as session:
        found = session.push(GRADS)
        assert (found.round, found.contributions, found.ahead, found.wire) == (None,) * 4
        assert found.at == (1, 1)
        assert "Prefer" not in sent_of(session)[0].headers
        assert "weight" not in sent_of(session)[0].path


def test_a_parameter_upload_between_round_and_pull():
    fake = Fake()
    with make(fake, "a", workers=1) as one:
        fake.lost = lambda method, path: fake.restore() if method == "POST" else None
        summary, _ = one.push_pull(GRADS)
        assert (summary.at, one.version) == ((1, 2), (2, 1))


def test_the_documents_of_rounds_and_workers():
    fake = Fake()
    with make(fake, "a", workers=1) as one:
        one.push(GRADS)
        assert one.round(1)["status"] == "applied"
        assert [found["worker"] for found in one.workers()] == [one.worker]
        with pytest.raises(errors.RoundUnknown):
            one.round(2)


# train_step


def test_it_computes_again_where_the_model_moved_on():
    fake = Fake()
    with make(fake, "a", workers=1, pull=False) as one, make(fake, "b", workers=1) as two:
        seen_params = []

        def compute(params):
            seen_params.append(float(params["b"]))
            if len(seen_params) < 3:
                two.pull()
                two.push(GRADS)
            return 0.5, GRADS

        summary = one.train_step(compute, weight=2.0)
        assert seen_params == [4.0, 3.0, 2.0]
        assert summary.step == 3
        assert "weight=2.0" in pushes(fake)[-1][1]
        assert "loss=0.5" in pushes(fake)[-1][1]
        assert one.train_step(lambda params: params).step == 4


@pytest.mark.parametrize(
    ("options", "times"), [({"attempts": 3}, 3), ({"on_refused": "raise"}, 1), ({"attempts": 1}, 1)]
)
def test_it_gives_up(options, times):
    fake = Fake()
    with make(fake, "a", workers=1) as one, make(fake, "b", workers=1) as two:
        computed = []

        def compute(params):
            computed.append(params)
            two.pull()
            two.push(GRADS)
            return GRADS

        with pytest.raises(RoundClosed):
            one.train_step(compute, **options)
        assert len(computed) == times


@pytest.mark.parametrize("options", [{"attempts": 0}, {"on_refused": "drop"}])
def test_its_options_are_checked(options):
    with make(Fake()) as one, pytest.raises(ValueError, match=next(iter(options))):
        one.train_step(lambda params: GRADS, **options)


def test_other_refusals_are_raised_at_once():
    with scripted(None) as session:
        transport = session._calls._transport
        transport.script = [
            lambda: problem(422, "nonfinite"),
        ]
        session.pull = lambda **_: PARAMS
        with pytest.raises(errors.Nonfinite):
            session.train_step(lambda params: GRADS)
        assert len(transport.sent) == 1
