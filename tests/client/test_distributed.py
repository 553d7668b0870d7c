"""Trainers that share a session, against the server: over TCP, and in this process."""

import uuid

import numpy as np
import pytest

from gradpost import (
    DeadlineExceeded,
    LocalSteps,
    RetryPolicy,
    RoundAbandoned,
    RoundClosed,
    Session,
    StaleGradient,
    errors,
)
from tests.client.test_sync import together

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
GRADS = {"w": np.float32([1, 1, 1]), "b": np.float32(1)}
THRICE = {"w": np.float32([3, 3, 3]), "b": np.float32(3)}
SYNC = {"mode": "sync", "workers": 2, "round_timeout_s": 30}


def team(server, update, *names, lr=1.0, **more):
    """Trainers on one new session, in the order of their names."""
    id = f"t-{uuid.uuid4().hex}"
    policy = RetryPolicy(deadline_s=60.0)
    made = []
    for name in names:
        session = Session.create(
            server, id, params=PARAMS, rule="sgd", lr=lr, update=update, worker=name,
            policy=policy, seed=1, **more,
        )  # fmt: skip
        session.pull()
        made.append(session)
    return made


@pytest.fixture(autouse=True)
def made(server, monkeypatch):
    """Closes and deletes the sessions of a test."""
    opened, real = [], Session._open.__func__

    def noted(cls, *arguments):
        opened.append(real(cls, *arguments))
        return opened[-1]

    monkeypatch.setattr(Session, "_open", classmethod(noted))
    yield
    for one in opened:
        one.close()
    for id in {one.id for one in opened}:
        with Session.attach(server, id, join=False) as last:
            last.delete()


def live(session):
    return {one["worker"] for one in session.workers() if one["live"]}


def test_rounds(server):
    one, two = team(server, SYNC, "a", "b")
    assert (one.mode, one.takes) == ("sync", "gradient")
    assert live(one) == {one.worker, two.worker}
    for summary, params in together(
        lambda: one.push_pull(GRADS), lambda: two.push_pull(THRICE, weight=3)
    ):
        assert (summary.round, summary.contributions, summary.step) == (1, 2, 1)
        np.testing.assert_array_equal(params["w"], PARAMS["w"] - 2.5)
    first, second = together(lambda: one.push(GRADS), two.skip_round)
    assert (first.round, first.contributions, second.contributions) == (2, 1, 1)
    one.pull()
    two.pull()
    assert together(one.skip_round, two.skip_round)[0].skipped == "passes"
    assert one.round(2)["status"] == "applied"
    with pytest.raises(errors.RoundUnknown):
        one.round(99)
    two.close()
    assert live(one) == {one.worker}
    assert one.push(GRADS).contributions == 1  # nobody else is missing


def test_a_push_that_does_not_wait(server):
    one, two = team(server, SYNC, "a", "b")
    sent = one.push(GRADS, wait=False)
    assert (sent.round, sent.contributions, sent.missing) == (1, 1, 1)
    with pytest.raises(errors.AlreadyContributed) as caught:
        one.push(GRADS, wait=False)
    assert caught.value.round == 1
    with pytest.raises(DeadlineExceeded):
        one.wait(sent, deadline_s=0.2)
    with pytest.raises(errors.OverridesDiffer):
        two.push(GRADS, overrides={"default": {"lr": 0.5}})
    assert two.push(GRADS, wait=False).summary.contributions == 2
    assert one.wait(sent).round == 1


def test_a_deadline_and_settling(server):
    one, two = team(server, SYNC, "a", "b")
    with pytest.raises(DeadlineExceeded) as caught:
        one.push(GRADS, deadline_s=0.2)
    assert caught.value.kept == one.pending == 1
    settled, _ = together(one.settle, lambda: two.push(GRADS))
    assert (settled.step, settled.contributions, one.pending) == (1, 2, None)


def test_a_quorum_and_what_comes_late(server):
    one, two = team(server, {**SYNC, "quorum": 1}, "a", "b")
    assert one.push(GRADS).contributions == 1
    with pytest.raises(RoundClosed) as caught:
        two.push(GRADS)
    assert (caught.value.round, caught.value.epoch, caught.value.version) == (2, 1, 2)
    assert two.train_step(lambda params: (0.5, GRADS)).step == 2


def test_a_round_that_is_abandoned(server):
    update = {**SYNC, "round_timeout_s": 0.1, "min_contributions": 2}
    one, _ = team(server, update, "a", "b")
    with pytest.raises(RoundAbandoned) as caught:
        one.push(GRADS)
    assert (caught.value.round, caught.value.reason, one.pending) == (1, "timeout", None)
    sent = one.push(GRADS, wait=False)
    with pytest.raises(RoundAbandoned) as caught:
        one.wait(sent)
    assert (caught.value.round, caught.value.worker, caught.value.sequence) == (2, one.worker, 2)


def test_a_norm_that_is_too_large(server):
    one, _ = team(server, {**SYNC, "max_norm": 1.0}, "a", "b")
    with pytest.raises(errors.NormExceeded) as caught:
        one.push(GRADS)
    assert (caught.value.norm, caught.value.max_norm) == (2.0, 1.0)


def test_bounded_staleness(server):
    one, two = team(server, {"mode": "bounded", "slack": 1}, "a", "b")
    assert one.push(GRADS).ahead is False
    assert one.push(GRADS, wait=False).summary.ahead is True
    ahead, _ = together(lambda: one.push(GRADS, deadline_s=30.0), lambda: three(two))
    assert ahead.ahead is False


def three(session):
    for _ in range(3):
        session.pull()
        session.push(GRADS, wait=False)


def test_asynchronous_sessions_join_only_if_asked(server):
    one, two = team(server, {"max_staleness": 0}, "a", "b")
    two.join()
    assert live(one) == {two.worker}
    one.push(GRADS)
    with pytest.raises(StaleGradient):
        two.push(GRADS)
    two.pull()
    assert two.push(GRADS).step == 2
    two.close()
    assert two.worker not in live(one)
    gone = Session.attach(server, two.id)
    gone.worker = two.worker
    with pytest.raises(errors.WorkerRetired):
        gone.push(GRADS, base_version=(1, 3))


def test_a_lease_that_lapsed_is_taken_again(server):
    one, two = team(server, {**SYNC, "lease_s": 1}, "a", "b")
    two._membership.stop()
    sent = one.push(GRADS, wait=False)
    assert one.wait(sent).contributions == 1  # one second later
    assert live(one) == {one.worker}
    two.join()
    assert live(one) == {one.worker, two.worker}


@pytest.mark.parametrize("update", [None, SYNC])
def test_local_steps(server, update):
    id = f"t-{uuid.uuid4().hex}"
    models = [{"w": np.float32([0, 0])} for _ in range(2)]
    weights = [1.0, 3.0] if update else [None, None]
    loops = [
        LocalSteps(server, model, id, every=2, weight=weight, rule="sgd", lr=1.0, update=update)
        for model, weight in zip(models, weights, strict=True)
    ]

    def train(at):
        for _ in range(4):
            models[at]["w"] += np.float32(1 + 4 * at)
            loops[at].step()

    if update:
        together(lambda: train(0), lambda: train(1))
        for model in models:
            np.testing.assert_array_equal(model["w"], [16, 16])  # 4 times (1 + 3 * 5) / 4
    else:
        train(0)
        train(1)
        np.testing.assert_array_equal(models[1]["w"], [24, 24])
        loops[0].pull()
        np.testing.assert_array_equal(models[0]["w"], [24, 24])
    assert loops[0].session.info()["push"] == "delta"


def test_diloco_is_nesterov_on_what_local_steps_changed(server):
    model = {"w": np.float32([0.0])}
    start, moment, ours = 0.0, 0.0, 0.0
    with LocalSteps(
        server, model, every=3, rule="sgd", lr=0.7, momentum=0.9, nesterov=True
    ) as local:
        for _ in range(5):
            for _ in range(3):
                model["w"] += np.float32(0.25)
                ours += 0.25
                local.step()
            g = start - ours
            moment = 0.9 * moment + g
            start = ours = start - 0.7 * (g + 0.9 * moment)
            np.testing.assert_allclose(model["w"], [start], rtol=1e-6)
