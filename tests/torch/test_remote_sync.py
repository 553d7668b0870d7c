"""`RemoteOptimizer` in rounds: steps that wait for each other, passes, and what is dropped."""

import numpy as np
import pytest
import torch

from gradpost import RetryPolicy, RoundAbandoned, RoundClosed, Session
from gradpost.torch import RemoteOptimizer
from tests.client.fake import Fake
from tests.client.test_sync import after, together
from tests.torch import twins

UPDATE = {"mode": "sync", "workers": 2, "round_timeout_s": 60}
ALONE = {**UPDATE, "workers": 1}
PROMPT = RetryPolicy(deadline_s=20.0, attempt_s=5.0, base_s=0.001, cap_s=0.002)


def make(fake, *, update=UPDATE, seed=0, **more):
    model = twins.params((3, 2), (4,), seed=seed)
    optimizer = RemoteOptimizer(
        model, fake, "m", rule="sgd", lr=0.5, update=update, policy=PROMPT, **more
    )
    return model, optimizer


def fill(model, value):
    for param in model:
        param.grad = torch.full_like(param, value)


def test_steps_wait_for_each_other_and_take_the_mean():
    fake = Fake()
    (ours, one), (theirs, two) = make(fake, worker="a"), make(fake, worker="b", seed=9)
    start = [param.detach().clone() for param in ours]
    with one, two:
        assert fake.live == {one.session.worker, two.session.worker}
        for step in (1, 2):
            fill(ours, 1.0)
            fill(theirs, 3.0)
            together(one.step, two.step)
            assert (one.summary.round, one.summary.contributions) == (step, 2)
            twins.assert_same(ours, theirs)
        twins.assert_close(ours, [param - 2 * 0.5 * 2 for param in start])
        together(lambda: one.step(weight=3.0), two.step)
        twins.assert_close(ours, [param - 2 - 0.5 * 1.5 for param in start], 2e-6)
    assert not fake.live


def test_steps_that_do_not_block():
    fake = Fake()
    (ours, one), (theirs, two) = make(fake), make(fake)
    with one, two:
        fill(ours, 1.0)
        fill(theirs, 1.0)
        pending = [one.step(blocking=False), two.step(blocking=False)]
        assert [found.result(60).contributions for found in pending] == [2, 2]
        one.synchronize()
        two.synchronize()
        twins.assert_same(ours, theirs)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_step_without_gradients_passes(blocking, scaled):
    fake = Fake()
    (ours, one), (theirs, two) = make(fake), make(fake)
    with one, two:
        fill(theirs, 1.0)
        if scaled:  # GradScaler has found infinities
            fill(ours, float("inf"))
            one.grad_scale, one.found_inf = torch.tensor(1024.0), torch.tensor(1.0)

        def step():
            found = one.step(blocking=blocking)
            one.synchronize()
            return found

        together(step, two.step)
        assert (one.summary.contributions, two.summary.contributions) == (1, 1)
        twins.assert_same(ours, theirs)
        (passed,) = [sent for sent in fake.sent if "weight=0" in sent[1]]
        assert passed[3] == b""
        assert "grad_scale" not in passed[1]


def test_outside_of_rounds_a_step_without_gradients_is_nothing():
    fake = Fake()
    _, one = make(fake, update=None)
    with one:
        one.step()
        assert not fake.paths("POST")


def moved_on(fake, model):
    with Session.attach(fake, "m", join=False) as other:
        other.pull()
        other.push({f"param.{at}": np.ones(p.shape, np.float32) for at, p in enumerate(model)})


def test_what_comes_late_is_dropped():
    fake = Fake()
    model, one = make(fake, update=ALONE)
    with one:
        fill(model, 1.0)
        moved_on(fake, model)
        with pytest.warns(RuntimeWarning, match="dropped a gradient") as seen:
            one.step()
        assert seen[0].filename == __file__
        assert (one.dropped, one.summary) == (1, None)
        np.testing.assert_array_equal(model[1].detach(), fake.params["param.1"])
        one.step()
        assert (one.dropped, one.summary.step) == (1, 2)


def test_what_comes_late_may_raise():
    fake = Fake()
    model, one = make(fake, update=ALONE, on_refused="raise")
    with one:
        fill(model, 1.0)
        moved_on(fake, model)
        with pytest.raises(RoundClosed) as caught:
            one.step()
        assert caught.value.version == 2
        one.pull()
        one.step()
        assert one.summary.step == 2


@pytest.mark.parametrize("on_refused", ["drop", "raise"])
def test_a_round_that_is_abandoned(on_refused):
    fake = Fake()
    model, one = make(fake, on_refused=on_refused)
    with one:
        start = [param.detach().clone() for param in model]
        fill(model, 1.0)
        if on_refused == "raise":
            found, _ = together(one.step, lambda: after(fake, 1))
            assert isinstance(found, RoundAbandoned)
        else:
            with pytest.warns(RuntimeWarning, match="dropped a gradient"):
                together(one.step, lambda: after(fake, 1))
            assert one.dropped == 1
        twins.assert_same(model, start)
