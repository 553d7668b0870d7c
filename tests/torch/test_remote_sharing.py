"""Several trainers on one session, and a model that moves on under a gradient."""

import threading
import warnings

import pytest
import torch

from gradpost import Session
from gradpost.errors import EpochChanged, SpecDiffers, StaleGradient
from gradpost.torch import RemoteOptimizer
from tests.torch import twins


def push(optimizer, params, seed=0):
    twins.feed(params, seed=seed)
    optimizer.step()


def test_the_first_initialises_and_the_others_start_from_it(remote):
    first, second = twins.params(seed=1), twins.params(seed=2)
    one = remote(first, id="shared")
    push(one, first)
    two = remote(second, id="shared")
    twins.assert_same(second, first)
    push(two, second, seed=1)
    assert two.summary.step == 2
    with pytest.raises(SpecDiffers):
        remote(twins.params(), id="shared", lr=0.5)
    with pytest.raises(SpecDiffers, match=r"it has no 'param.0' of shape \[9\]"):
        remote(twins.params((9,)), id="shared")


def test_threads_train_one_model(remote):
    models = [twins.params((8,), (4, 4), seed=seed) for seed in range(3)]
    for model in models:
        remote(model, "sgd", id="threads", lr=0.05)
    optimizers = [remote(model, "sgd", id="threads", lr=0.05) for model in models]

    def train(model, optimizer):
        for _ in range(40):
            optimizer.zero_grad()
            sum((param - 1).square().sum() for param in model).backward()
            optimizer.step()

    threads = [
        threading.Thread(target=train, args=pair) for pair in zip(models, optimizers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert optimizers[0].session.info()["step"] == 120
    assert sum(optimizer.dropped for optimizer in optimizers) == 0
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.pull()
        for param in model:
            torch.testing.assert_close(param.detach(), torch.ones_like(param), atol=1e-3, rtol=0)
    twins.assert_same(models[0], models[1])


def test_a_stale_gradient_is_dropped_counted_and_warned_of_once(remote):
    first, second = twins.twice()
    fresh = {"id": "stale", "update": {"max_staleness": 0}}
    one, two = remote(first, **fresh), remote(second, **fresh)
    push(one, first)
    with pytest.warns(RuntimeWarning, match="dropped a gradient, for the model had moved on"):
        push(two, second)
    assert (two.dropped, two.summary) == (1, None)
    twins.assert_same(second, first)  # pulled
    push(two, second, seed=1)
    assert (two.dropped, two.summary.step) == (1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        push(one, first, seed=2)  # the first one is behind now
    push(one, first, seed=3)
    twins.feed(second)
    two.step(blocking=False)
    two.synchronize()  # dropped too, without a word
    assert (one.dropped, two.dropped) == (1, 2)
    twins.assert_same(second, first)


def test_a_refusal_may_be_raised(remote):
    first, second = twins.twice()
    fresh = {"id": "raised", "update": {"max_staleness": 0}}
    one, two = remote(first, **fresh), remote(second, on_refused="raise", **fresh)
    push(one, first)
    before = [param.detach().clone() for param in second]
    with pytest.raises(StaleGradient) as refused:
        push(two, second)
    assert refused.value.version == 2
    twins.assert_same(second, before)
    assert two.dropped == 0
    two.pull()
    push(two, second)
    with pytest.raises(ValueError, match="drop or raise"):
        remote(first, on_refused="ignore")


def test_a_checkpoint_that_one_loads_cuts_the_history_of_all(remote):
    first, second = twins.twice()
    one, two = remote(first, id="cut"), remote(second, id="cut")
    saved = one.state_dict()
    push(one, first)
    two.pull()
    one.load_state_dict(saved)
    with pytest.warns(RuntimeWarning, match="computed in epoch 1"):
        push(two, second)
    assert two.dropped == 1
    push(two, second)
    assert two.summary.epoch == 2


@pytest.mark.filterwarnings("ignore:The server dropped a gradient")
def test_a_session_that_was_made_anew(remote, server):
    first, second = twins.twice()
    one = remote(first, "sgd", id="anew", lr=1.0)
    push(one, first)
    Session(server, "anew").delete()
    two = remote(second, "sgd", id="anew", lr=1.0)
    push(one, first)  # of another incarnation: neither its epoch nor its version need differ
    assert one.dropped == 1
    twins.assert_same(first, second)
    push(one, first)
    assert (one.dropped, one.summary.step) == (1, 1)
    raising = remote(second, "sgd", id="anew", lr=1.0, on_refused="raise")
    Session(server, "anew").delete()
    remote(first, "sgd", id="anew", lr=1.0)
    with pytest.raises(EpochChanged):
        push(raising, second)
    assert two.summary is None


def test_two_workers_add_the_same_group(remote):
    first, second = twins.params((3,), (2,)), twins.params((3,), (2,), seed=1)
    one, two = (remote(model[:1], id="added") for model in (first, second))
    one.add_param_group({"params": first[1:], "lr": 0.1})
    push(one, first)
    two.add_param_group({"params": second[1:], "lr": 0.1})  # its values are those of the first
    twins.assert_same(second, first)
    push(two, second)
    assert (two.dropped, two.summary.step) == (0, 2)


def test_two_workers_unfreeze_the_same_layer(remote):
    first, second = twins.params((3,), (2,)), twins.params((3,), (2,), seed=1)
    for model in (first, second):
        model[1].requires_grad_(False)
    one, two = remote(first, id="thawed"), remote(second, id="thawed")
    for model in (first, second):
        model[1].requires_grad_()
    push(one, first)
    push(two, second)
    assert two.summary.staleness == 2  # the new group, and the push of the other
    twins.feed(first)
    one.pull()
    twins.assert_same(first, second)


def test_a_look_at_the_session_is_no_base_of_gradients(remote):
    first, second = twins.twice((3,), (2,))
    for model in (first, second):
        model[1].requires_grad_(False)
    one, two = remote(first, id="looked"), remote(second, id="looked")
    twins.feed(second, absent=[1])
    two.step()
    one.session.pull()  # which the model does not hold
    first[1].requires_grad_()
    push(one, first)
    assert one.summary.staleness == 2  # the push of the other, and the new group
    twins.feed(first, absent=[1])
    one.session.pull()
    one.step()
    assert one.summary.staleness == 0


def test_a_worker_that_attaches_late_ignores_the_groups_of_others(remote):
    first, second = twins.twice((3,), (2,))
    one = remote(first[:1], id="late")
    one.add_param_group({"params": first[1:]})
    two = remote(second[:1], id="late")
    push(two, second[:1])
    assert two.summary.step == 1


def test_the_server_may_have_been_patched_before_one_attaches(remote):
    (first,), (second,) = twins.twice((3,))
    one = remote([first], "sgd", id="patched", lr=1.0)
    one.session.patch(optimizer={"lr": 0.5})
    two = remote([second], "sgd", id="patched", lr=1.0)
    push(two, [second])
    assert two.summary.lr == 1.0  # as its param_groups say


def test_what_fails_in_the_constructor_leaves_no_connection(remote, server, monkeypatch):
    remote(twins.params((3,)), id="constructed")
    closed = []
    close = Session.close
    monkeypatch.setattr(Session, "close", lambda self: (closed.append(self.id), close(self)))
    with pytest.raises(SpecDiffers, match="not those of params"):
        RemoteOptimizer(twins.params((4,)), server, "constructed", rule="adam")
    assert closed == ["constructed"]


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_loading_what_the_server_has_cuts_nothing(remote, rule):
    first, second = twins.twice()
    one, two = (remote(params, rule, id=f"uncut-{rule}") for params in (first, second))
    epoch = one.session.version[0]
    for seed in range(2):
        two.load_state_dict(two.state_dict())  # as accelerate does with every optimizer
        push(one, first, seed)
        two.pull()
    assert (one.dropped, one.summary.step, one.summary.epoch) == (0, 2, epoch)
    saved = two.state_dict()
    saved["param_groups"][0]["lr"] = 0.5  # the groups are taken all the same
    two.load_state_dict(saved)
    push(two, second)
    assert (two.summary.lr, two.summary.epoch) == (0.5, epoch)
    saved["state"][0]["step"] += 1
    two.load_state_dict(saved)
    push(two, second)
    assert two.summary.epoch == epoch + 1
