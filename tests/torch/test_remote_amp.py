"""torch.amp.GradScaler: the server divides by the scale, and infinite gradients are never sent."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from tests.torch import twins

INFINITE = {3: float("inf"), 4: float("nan"), 9: float("-inf")}


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)


def scaled(one, params, seed):
    """Gradients by way of a scaled loss, some of them infinite."""
    weights = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in params]
    if seed in INFINITE:
        weights[1][1] = INFINITE[seed]
    loss = sum((weight * p.float()).sum() for weight, p in zip(weights, params, strict=True))
    one.scale(loss).backward()


def record(optimizer):
    session = optimizer.session
    recorder = session._calls._transport = twins.Recorder(session._calls._transport)
    return recorder


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled and clipped"])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_as_torchs_own(remote, rule, unscale):
    theirs, ours = twins.twice((4, 3), (5,))
    kind = {made: k for k, made in twins.RULES.items()}[rule]
    local, optimizer = kind(theirs, lr=0.1), remote(ours, rule, lr=0.1)
    recorder = record(optimizer)
    pairs = [(scaler(), local, theirs), (scaler(), optimizer, ours)]
    for seed in range(16):
        for one, stepping, params in pairs:
            stepping.zero_grad()
            scaled(one, params, seed)
            if unscale:
                one.unscale_(stepping)
                clip_grad_norm_(params, 0.5)
            one.step(stepping)
            one.update()
        twins.assert_close(ours, theirs)
        assert pairs[0][0].get_scale() == pairs[1][0].get_scale()
    assert len(recorder.pushes()) == 16 - len(INFINITE)
    assert optimizer.summary.step == 16 - len(INFINITE)
    assert all(("grad_scale=" in path) is not unscale for _, path, _ in recorder.pushes())
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("clip", [False, True], ids=["scaled", "clipped"])
def test_the_scaler_may_unscale(remote, clip):
    theirs, ours = twins.twice((4, 3), (5,))
    local, optimizer = torch.optim.Adam(theirs, lr=0.1), remote(ours, lr=0.1, unscale="scaler")
    recorder = record(optimizer)
    pairs = [(scaler(), local, theirs), (scaler(), optimizer, ours)]
    for seed in range(16):
        for one, stepping, params in pairs:
            stepping.zero_grad()
            scaled(one, params, seed)
            if clip:
                one.unscale_(stepping)
                clip_grad_norm_(params, 0.5)
            one.step(stepping)
            one.update()
        twins.assert_close(ours, theirs)
        assert pairs[0][0].get_scale() == pairs[1][0].get_scale()
    assert len(recorder.pushes()) == 16 - len(INFINITE)
    assert not any("grad_scale=" in path for _, path, _ in recorder.pushes())
    with pytest.raises(ValueError, match="server or scaler"):
        remote(ours, unscale="nobody")


def test_the_gradients_stay_as_backward_left_them(remote):
    params = twins.params((3, 3), (2,))
    optimizer, one = remote(params), scaler()
    scaled(one, params, 0)
    kept = [param.grad.clone() for param in params]
    one.step(optimizer)
    assert all(torch.equal(param.grad, was) for param, was in zip(params, kept, strict=True))


def test_half_gradients_are_divided_in_float32(remote):
    params = twins.params((6, 4), (3,), dtype=torch.float16)
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    local, optimizer, one = torch.optim.Adam(masters), remote(params), scaler()
    for seed in range(8):
        optimizer.zero_grad()
        scaled(one, params, seed)
        scale = one.get_scale()
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad.float() / scale
        if seed not in INFINITE:
            local.step()
        one.step(optimizer)
        one.update()
    found = optimizer.session.pull()
    twins.assert_close([torch.from_numpy(found[f"param.{at}"]) for at in range(2)], masters)
    scaled(one, params, 0)
    with pytest.raises(ValueError, match="Attempting to unscale FP16"):
        one.unscale_(optimizer)  # torch's own word on it


def test_a_disabled_scaler_is_none(remote):
    (param,) = twins.params((3,))
    optimizer = remote([param])
    one = torch.amp.GradScaler("cpu", enabled=False)
    one.scale(param.sum()).backward()
    one.step(optimizer)
    one.update()
    assert optimizer.summary.step == 1


def test_without_blocking(remote):
    theirs, ours = twins.twice((4, 3), (5,))
    local, optimizer = torch.optim.Adam(theirs), remote(ours)
    pairs = [(scaler(), local, theirs, {}), (scaler(), optimizer, ours, {"blocking": False})]
    for seed in range(8):
        for one, stepping, params, how in pairs:
            stepping.zero_grad()
            scaled(one, params, seed)
            one.step(stepping, **how)
            one.update()
        optimizer.synchronize()
        twins.assert_close(ours, theirs)
