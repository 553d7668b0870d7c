"""`LocalSteps` of NumPy arrays: what is pushed, what comes back, and what a refusal leaves."""

import warnings

import ml_dtypes
import numpy as np
import pytest

from gradpost import (
    DeadlineExceeded,
    LocalSteps,
    RetryPolicy,
    RoundAbandoned,
    RoundClosed,
    Session,
    TransportError,
    errors,
)
from tests.client.fake import Fake
from tests.client.test_sync import after, together

SYNC = {"mode": "sync", "workers": 1, "round_timeout_s": 60}
PROMPT = RetryPolicy(deadline_s=20.0, attempt_s=5.0, base_s=0.001, cap_s=0.002)
HASTY = RetryPolicy(deadline_s=0.02, base_s=0.001, cap_s=0.002)


def arrays(seed=0):
    made = np.random.default_rng(seed)
    return {"w": made.normal(size=(3, 2)).astype(np.float32), "s": np.array(1.5, np.float32)}


def copied(params):
    return {name: np.array(value) for name, value in params.items()}


def make(fake, params=None, *, every=2, update=None, lr=1.0, policy=PROMPT, **more):
    return LocalSteps(
        fake, arrays() if params is None else params, "m", every=every, rule="sgd", lr=lr,
        update=update, policy=policy, **more,
    )  # fmt: skip


def move(local, by=1.0):
    """A local step: every parameter grows."""
    for array in local.params.values():
        array += np.float32(by)
    return local.step()


def same(ours, theirs):
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def pushed(fake):
    return [fake._tensors(data) for method, _, _, data in fake.sent if method == "POST" and data]


@pytest.mark.parametrize("update", [None, SYNC])
def test_the_outer_parameters_move_towards_the_end(update):
    fake, params = Fake(), arrays()
    start = copied(params)
    with make(fake, params, update=update, lr=0.5) as local:
        assert fake.spec["push"] == "delta"
        assert move(local) is None
        assert (local.steps, local.summary) == (1, None)
        summary = move(local)
        assert summary.applied
        assert local.summary is summary
        assert local.steps == 0
        (delta,) = pushed(fake)
        same(delta, {name: (value + 1 + 1) - value for name, value in start.items()})
        same(params, {name: start[name] - np.float32(0.5) * -delta[name] for name in start})
        same(params, fake.params)
        move(local)
        move(local)
        assert local.summary.step == 2
        np.testing.assert_allclose(params["w"], start["w"] + 2, rtol=1e-6)


def test_what_is_written_stays_in_its_memory_and_the_delta_costs_no_more():
    fake, params = Fake(), arrays()
    held = params["w"]
    with make(fake, params) as local:
        buffer = local._buffer.flat
        move(local)
        move(local)
        assert params["w"] is held
        assert local._buffer.flat is buffer
        assert all(np.shares_memory(value, buffer) for value in local._start.values())


def test_the_first_ones_parameters_are_taken():
    fake = Fake()
    first, second = arrays(), arrays(seed=9)
    with make(fake, first), make(fake, second):
        same(second, first)


def test_the_mean_of_a_round_is_weighted():
    fake, params = Fake(), [arrays(), arrays()]
    start = copied(params[0])
    update = {**SYNC, "workers": 2}
    with (
        make(fake, params[0], every=1, update=update, weight=3.0) as one,
        make(fake, params[1], every=1, update=update) as two,
    ):
        found = together(lambda: move(one, 1.0), lambda: move(two, 5.0))
        assert [summary.contributions for summary in found] == [2, 2]
        for own in params:
            np.testing.assert_allclose(own["w"], start["w"] + 2, rtol=1e-6)
        one.weight = 1.0
        together(lambda: move(one, 1.0), lambda: move(two, 5.0))
        np.testing.assert_allclose(params[0]["w"], start["w"] + 5, rtol=1e-6)


def test_weights_are_of_rounds_only():
    with pytest.raises(ValueError, match="weight is of sync mode"):
        make(Fake(), weight=2.0)


def test_without_local_steps_a_round_is_passed():
    fake = Fake()
    update = {**SYNC, "workers": 2}
    with make(fake, every=1, update=update) as one, make(fake, every=1, update=update) as two:
        first, second = together(one.sync, lambda: move(two))
        assert (first.contributions, second.contributions) == (1, 1)
        same(one.params, two.params)
    fake = Fake()
    with make(fake) as local:  # without rounds there is nobody to tell
        assert local.sync() is None
        assert not fake.paths("POST")


def test_synchronising_before_its_time():
    with make(Fake(), every=100) as local:
        start = copied(local.params)
        move(local)
        assert local.sync().step == 1
        assert local.steps == 0
        np.testing.assert_allclose(local.params["w"], start["w"] + 1, rtol=1e-6)


# Refusals


def stale(fake, local):
    """Another trainer moves the model on."""
    with Session.attach(fake, "m", join=False) as other:
        other.pull()
        other.push({name: np.ones_like(value) for name, value in local.params.items()})


@pytest.mark.parametrize("update", [{"max_staleness": 0}, SYNC])
def test_a_delta_that_is_refused_is_dropped(update):
    fake = Fake()
    with make(fake, every=1, update=update) as local:
        stale(fake, local)
        with pytest.warns(RuntimeWarning, match="dropped what 1 local steps changed") as seen:
            assert move(local) is None
        assert seen[0].filename == __file__
        assert local.dropped == 1
        same(local.params, fake.params)
        stale(fake, local)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            move(local)  # warned once
        assert local.dropped == 2
        assert move(local).step == 3
        same(local.params, fake.params)


def test_a_new_epoch_drops_it_too():
    fake = Fake()
    with make(fake, every=1) as local:
        fake.restore()
        with pytest.warns(RuntimeWarning, match="dropped"):
            move(local)
        assert local.session.version == (2, 1)


def test_an_abandoned_round_drops_it_too():
    fake = Fake()
    with make(fake, every=1, update={**SYNC, "workers": 2}) as local:
        start = copied(local.params)
        with pytest.warns(RuntimeWarning, match="dropped"):
            together(lambda: move(local), lambda: after(fake, 1))
        assert local.dropped == 1
        same(local.params, start)


def test_refusals_may_be_raised():
    fake = Fake()
    with make(fake, every=1, update=SYNC, on_refused="raise") as local:
        stale(fake, local)
        with pytest.raises(RoundClosed):
            move(local)
        assert local.dropped == 0
        assert move(local) is None  # begins anew
        same(local.params, fake.params)
        assert move(local).step == 2


def test_another_refusal_is_raised_and_the_next_step_begins_anew():
    fake = Fake()
    with make(fake, every=1) as local:
        local.session.push = lambda *_, **__: (_ for _ in ()).throw(
            errors.refusal(422, {"type": "/problems/nonfinite", "detail": "NaN."})
        )
        with pytest.raises(errors.Nonfinite):
            move(local)
        del local.session.push
        assert move(local) is None
        same(local.params, fake.params)
        assert move(local).step == 1


# Failures


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_after_a_deadline_the_next_step_settles(method):
    fake = Fake()
    with make(fake, every=1, policy=HASTY) as local:
        start = copied(local.params)
        with fake.lose(method, "", TransportError("lost")), pytest.raises(DeadlineExceeded):
            move(local, 2.0)
        assert local.session.pending == (1 if method == "POST" else None)
        move(local, 100.0)  # what is computed before that is known counts for nothing
        assert local.session.pending is None
        np.testing.assert_allclose(local.params["w"], start["w"] + 2, rtol=1e-6)
        assert fake.step == 1
        assert move(local).step == 2
        np.testing.assert_allclose(local.params["w"], start["w"] + 3, rtol=1e-6)


def test_a_round_that_outlasts_the_deadline():
    fake = Fake()
    update = {**SYNC, "workers": 2}
    with make(fake, every=1, update=update, deadline_s=0.05) as local:
        for settled in (False, True):
            with pytest.raises(DeadlineExceeded):
                local.sync() if settled else move(local)
        fake.abandon()
        with pytest.warns(RuntimeWarning, match="dropped"):
            assert local.sync() is None
        assert (local.dropped, local.session.pending) == (1, None)
        with pytest.raises(DeadlineExceeded):
            move(local)
        fake.abandon()
        local._on_refused = "raise"
        with pytest.raises(RoundAbandoned):
            local.sync()


def test_an_upload_between_push_and_pull():
    fake = Fake()
    with make(fake, every=1) as local:
        fake.lost = lambda method, path: fake.restore() if method == "POST" else None
        assert move(local).step == 1
        assert local.session.version == (2, 1)


# What it takes


def test_a_session_may_be_given():
    fake = Fake()
    params = arrays()
    with Session.create(fake, "m", params=params, rule="sgd", push="delta") as session:
        with LocalSteps(session, params, every=1) as local:
            assert move(local).step == 1
        assert session.pull()  # it is the caller's to close
        with pytest.raises(TypeError, match="id, lr"):
            LocalSteps(session, params, "m", every=1, lr=1.0)


def test_a_session_that_never_asked():
    fake = Fake()
    make(fake).close()
    assert LocalSteps(Session(fake, "m"), arrays(), every=1).session.takes == "delta"


def test_a_session_of_gradients_is_refused():
    fake = Fake()
    with Session.create(fake, "m", params=arrays(), rule="sgd") as session:
        with pytest.raises(ValueError, match='push="delta"'):
            LocalSteps(session, arrays(), every=1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, ValueError),
        ({"every": 1.5}, ValueError),
        ({"every": True}, ValueError),
        ({"on_refused": "recompute"}, ValueError),
        ({"params": {"w": [1.0]}}, TypeError),
        ({"params": {"w": np.broadcast_to(np.float32(1), (3,))}}, TypeError),
    ],
)
def test_what_it_refuses_before_it_calls_anybody(options, error):
    fake = Fake()
    with pytest.raises(error):
        make(fake, **{"every": 2, **options})
    assert not fake.sent


@pytest.mark.parametrize(
    "other", [{"w": np.zeros((2, 3), np.float32)}, {"v": np.zeros(1, np.float32)}]
)
def test_another_model_is_refused(other):
    fake = Fake()
    make(fake).close()
    session = Session.attach(fake, "m")
    with pytest.raises(ValueError, match="another model"):
        LocalSteps(session, other, every=1)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_arrays_of_other_dtypes(dtype):
    fake = Fake()
    params = {"w": np.array([1.0, 2.0], np.float32).astype(dtype)}
    with make(fake, params, every=1) as local:
        fake.params["w"] = np.float32([1.001, 2.003])  # which halves can not hold
        local.pull()
        assert params["w"].dtype == dtype
        move(local, 0.0)
        (delta,) = pushed(fake)
        np.testing.assert_array_equal(delta["w"], [0.0, 0.0])  # rounding is no change
        move(local, 0.5)
        np.testing.assert_allclose(pushed(fake)[1]["w"], [0.5, 0.5], rtol=1e-2)


def test_it_goes_on_after_a_restart():
    fake, params = Fake(), arrays()
    start = copied(params)
    with make(fake, params, every=3) as local:
        move(local)
        move(local)
        saved, model = local.state_dict(), copied(params)
    assert saved["steps"] == 2
    with make(fake, arrays(), every=3) as local:
        for name, value in model.items():
            local.params[name][...] = value
        local.load_state_dict(saved)
        assert move(local).step == 1
        np.testing.assert_allclose(local.params["w"], start["w"] + 3, rtol=1e-6)
        with pytest.raises(ValueError, match="another model"):
            local.load_state_dict({**saved, "start": {}})
    with make(fake, arrays(), every=3) as local:
        fake.restore()
        local.load_state_dict(saved)
        with pytest.warns(RuntimeWarning, match="dropped"):
            move(local)


def test_a_state_is_whole_after_a_failure():
    fake = Fake()
    with make(fake, every=1, policy=HASTY) as local:
        with fake.lose("POST", "", TransportError("lost")), pytest.raises(DeadlineExceeded):
            move(local)
        saved = local.state_dict()
        same(saved["start"], fake.params)
        assert saved["steps"] == 0
