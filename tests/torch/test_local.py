"""`LocalSteps` around torch optimizers: DiLoCo and FedAvg beside their definitions."""

import io

import numpy as np
import pytest
import torch

from gradpost import RetryPolicy, Session
from gradpost.torch import LocalSteps
from tests.client.fake import Fake
from tests.client.test_sync import together
from tests.torch import twins

PROMPT = RetryPolicy(deadline_s=20.0, attempt_s=5.0, base_s=0.001, cap_s=0.002)
SYNC = {"mode": "sync", "workers": 2, "round_timeout_s": 60}


def network(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers)


def batch(seed=0):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))


def make(fake, model, *, every=2, inner=torch.optim.AdamW, lr=1.0, **more):
    optimizer = inner(model.parameters(), lr=0.01)
    options = {"rule": "sgd", "lr": lr, "policy": PROMPT, **more}
    return LocalSteps(model, optimizer, fake, "m", every=every, **options)


def momentum(params, lr):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def train(local, seeds):
    for seed in seeds:
        local.zero_grad()
        local.model(batch(seed)).square().mean().backward()
        local.step()


def values(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def test_with_outer_sgd_of_lr_1_it_is_the_inner_optimizer():
    fake, ours, theirs = Fake(), network(), network()
    local = momentum(theirs.parameters(), lr=0.01)
    with make(fake, ours, inner=momentum) as remote:
        train(remote, range(5))
        for seed in range(5):
            local.zero_grad()
            theirs(batch(seed)).square().mean().backward()
            local.step()
        assert (remote.steps, remote.summary.step, fake.step) == (1, 2, 2)
    twins.assert_close(ours.parameters(), theirs.parameters(), 1e-5)


def test_federated_averaging_is_the_weighted_mean_of_the_ends():
    fake, first, second = Fake(), network(0), network(1)
    kinds = {"every": 3, "inner": torch.optim.SGD, "update": SYNC}
    with (
        make(fake, first, weight=1.0, **kinds) as one,
        make(fake, second, weight=3.0, **kinds) as two,
    ):
        start = values(first)
        assert all(torch.equal(start[name], value) for name, value in values(second).items())
        ends = []
        for model, seeds in ((network(0), range(3)), (network(0), range(3, 6))):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for seed in seeds:
                optimizer.zero_grad()
                model(batch(seed)).square().mean().backward()
                optimizer.step()
            ends.append(list(model.parameters()))
        together(lambda: train(one, range(3)), lambda: train(two, range(3, 6)))
        mean = [(a + 3 * b) / 4 for a, b in zip(*ends, strict=True)]
        twins.assert_close(first.parameters(), mean, 1e-5)
        twins.assert_same(first.parameters(), second.parameters())


def test_only_parameters_that_require_gradients_move():
    fake, model, other = Fake(), network(), network(1)
    model[2].requires_grad_(False)
    frozen = model[2].weight.detach().clone()
    with make(fake, model, every=1) as local:
        assert set(fake.params) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        local.model(batch()).square().mean().backward()
        mean = model[1].running_mean.clone()
        local.step()
        assert torch.equal(model[1].running_mean, mean)
        assert torch.equal(model[2].weight, frozen)
    with pytest.raises(ValueError, match="No parameter"):
        make(Fake(), other.requires_grad_(False))
    assert model[0].weight.requires_grad


def test_closures_schedulers_and_scalers():
    fake, model = Fake(), network()
    with make(fake, model, every=2) as local:
        plan = torch.optim.lr_scheduler.ExponentialLR(local.inner, 0.5)

        def closure():
            local.zero_grad()
            loss = model(batch()).square().mean()
            loss.backward()
            return loss

        assert local.step(closure).item() > 0
        plan.step()
        assert local.inner.param_groups[0]["lr"] == 0.005
        local.inner.step()  # as GradScaler.step(local.inner) does
        assert local.count().step == 1
        assert local.steps == 0


def test_the_model_may_be_of_half_precision():
    fake, model = Fake(), torch.nn.Linear(4, 2, dtype=torch.bfloat16)
    with make(fake, model, every=1, inner=torch.optim.SGD) as local:
        fake.params["bias"] = np.float32([1.001, 2.003])  # which bfloat16 does not hold
        local.pull()
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        local.step()
        np.testing.assert_array_equal(fake.params["bias"], np.float32([1.001, 2.003]))
        model.bias.grad.fill_(50.0)
        local.step()
        np.testing.assert_allclose(fake.params["bias"], [0.501, 1.503], rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strided_parameters_and_the_delta_in_place(dtype):
    fake = Fake()
    model = torch.nn.Conv2d(3, 4, 2, dtype=dtype).to(memory_format=torch.channels_last)
    with make(fake, model, every=1, inner=torch.optim.SGD) as local:
        assert fake.spec["dtype"] == ("F64" if dtype == torch.float64 else "F32")
        start = values(model)
        for param in model.parameters():
            param.grad = torch.full_like(param, 100.0)
        local.step()
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model.weight, start["weight"] - 1, rtol=1e-5, atol=1e-5)
        if dtype == torch.float32:
            assert np.shares_memory(local._start["weight"], local._buffer.flat)


def test_a_delta_that_is_refused_is_dropped_and_the_inner_state_stays():
    fake, model = Fake(), network()
    with make(fake, model, update={"max_staleness": 0}) as local:
        with Session.attach(fake, "m") as other:
            other.pull()
            other.push({name: np.ones(v.shape, np.float32) for name, v in values(model).items()})
        model(batch()).square().mean().backward()
        local.step()
        with pytest.warns(RuntimeWarning, match="dropped what 2 local steps changed") as seen:
            local.step()
        assert seen[0].filename == __file__
        assert local.dropped == 1
        for name, value in values(model).items():
            np.testing.assert_array_equal(value, fake.params[name])
        assert local.inner.state[model[0].weight]["step"] == 2
        train(local, range(2))
        assert local.summary.step == 2


def test_it_goes_on_after_a_restart():
    fake, ours, theirs = Fake(), network(), network()
    file = io.BytesIO()
    with make(fake, ours, every=3) as local:
        train(local, range(5))
        torch.save({"model": ours.state_dict(), "local": local.state_dict()}, file)
    file.seek(0)
    again = network(seed=7)
    with make(fake, again, every=3) as local:
        saved = torch.load(file)
        again.load_state_dict(saved["model"])
        local.load_state_dict(saved["local"])
        assert local.steps == 2
        train(local, range(5, 7))
        assert (local.steps, fake.step) == (1, 2)
    with make(Fake(), theirs, every=3) as twin:
        train(twin, range(7))
    twins.assert_same(again.parameters(), theirs.parameters())


def test_a_session_may_be_given():
    fake, model = Fake(), network()
    params = {name: value.numpy() for name, value in values(model).items()}
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session.create(fake, "m", params=params, rule="sgd", lr=1.0, push="delta") as session:
        with LocalSteps(model, inner, session, every=1) as local:
            train(local, [0])
            assert local.summary.step == 1
        session.pull()
    with Session.create(Fake(), "m", params=params, rule="sgd") as session:
        with pytest.raises(ValueError, match='push="delta"'):
            LocalSteps(model, inner, session, every=1)
    small = torch.nn.Linear(4, 2)
    session = Session.attach(fake, "m")
    with pytest.raises(ValueError, match="another model"):
        LocalSteps(small, torch.optim.SGD(small.parameters()), session, every=1)
