"""Rounds and local steps of torch models, against the server."""

from functools import partial

import torch

from gradpost import RetryPolicy
from gradpost.torch import LocalSteps
from tests.client.test_sync import together
from tests.torch import twins

SYNC = {"mode": "sync", "workers": 2, "round_timeout_s": 30}
PATIENT = RetryPolicy(deadline_s=60.0)


def pair(remote, **options):
    models = [twins.params(), twins.params(seed=9)]
    made = [
        remote(model, id="rounds", lr=0.05, update=SYNC, policy=PATIENT, worker=name, **options)
        for model, name in zip(models, "ab", strict=True)
    ]
    return models, made


def test_two_processes_are_one_with_the_mean_of_their_gradients(remote):
    theirs = twins.params()
    local = torch.optim.Adam(theirs, lr=0.05)
    models, optimizers = pair(remote)
    for seed in range(5):
        for at, model in enumerate(models):
            twins.feed(model, seed=10 * seed + at)
        for param, one, two in zip(theirs, *models, strict=True):
            param.grad = (one.grad + 3 * two.grad) / 4
        together(optimizers[0].step, lambda: optimizers[1].step(weight=3.0))
        local.step()
        assert optimizers[0].summary.contributions == 2
        twins.assert_same(*models)
    twins.assert_close(models[0], theirs, 1e-5)
    for optimizer in optimizers:
        optimizer.close()


def test_schedulers_that_step_together_and_a_pass(remote):
    models, optimizers = pair(remote)
    plans = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in optimizers]
    for seed in range(3):
        twins.feed(models[0], seed=seed)
        if seed != 1:
            twins.feed(models[1], seed=seed)
        together(*(one.step for one in optimizers))
        for one, plan in zip(optimizers, plans, strict=True):
            one.zero_grad()
            plan.step()
        assert [one.summary.contributions for one in optimizers] == [1 if seed == 1 else 2] * 2
        twins.assert_same(*models)
    assert optimizers[0].summary.lr == 0.0125
    for optimizer in optimizers:
        optimizer.close()


def test_diloco_beside_its_definition(server):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def train(model, inner, steps):
        for seed in steps:
            inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
            inner.zero_grad()
            model(inputs).square().mean().backward()
            inner.step()

    options = {"rule": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True, "update": SYNC}
    ours = [network() for _ in range(2)]
    loops = [
        LocalSteps(
            model, torch.optim.SGD(model.parameters(), lr=0.1), server, "diloco", every=3,
            policy=PATIENT, worker=name, **options,
        )
        for model, name in zip(ours, "ab", strict=True)
    ]  # fmt: skip
    shared = network()
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for turn in range(3):
        ends = []
        for at in range(2):
            model = network()
            model.load_state_dict(shared.state_dict())
            steps = range(100 * at + 3 * turn, 100 * at + 3 * turn + 3)
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps)
            ends.append(list(model.parameters()))
        for param, one, two in zip(shared.parameters(), *ends, strict=True):
            param.grad = param.detach() - (one.detach() + two.detach()) / 2
        outer.step()
        together(
            *(
                partial(train, model, loop, range(100 * at + 3 * turn, 100 * at + 3 * turn + 3))
                for at, (model, loop) in enumerate(zip(ours, loops, strict=True))
            )
        )
        for model in ours:
            twins.assert_close(model.parameters(), list(shared.parameters()), 1e-5)
    loops[0].session.delete()
    for loop in loops:
        loop.close()
