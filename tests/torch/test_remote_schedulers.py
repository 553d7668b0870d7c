"""Edits of `param_groups`, by hand or by torch's schedulers, hold from the next step on."""

import inspect

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from gradpost.errors import Structural
from tests.torch import twins

CHAINED = {
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.1, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.9),
}
MADE = {
    **CHAINED,
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[3, 8], gamma=0.1),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.2, total_iters=9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [make(o) for make in CHAINED.values()], milestones=[5]
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=15, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=10),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [make(o) for make in CHAINED.values()], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.001, max_lr=0.1, step_size_up=4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.2, total_steps=21),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=5),
}
RULES = [
    ("sgd", torch.optim.SGD, {"momentum": 0.9, "lr": 0.1}),
    ("adam", torch.optim.Adam, {"lr": 0.1}),
    ("adam", torch.optim.Adam, {"lr": torch.tensor(0.1), "weight_decay": 0.01}),
]


def test_none_of_torchs_schedulers_is_forgotten():
    there = {
        name
        for name, kind in vars(schedulers).items()
        if inspect.isclass(kind)
        and issubclass(kind, schedulers.LRScheduler)
        and not name.startswith("_")
    }
    assert there | {"SWALR"} == {*MADE, "LRScheduler"}


@pytest.mark.parametrize(("rule", "kind", "options"), RULES, ids=["sgd", "adam", "tensor lr"])
@pytest.mark.parametrize("name", MADE)
def test_every_scheduler(remote, name, rule, kind, options):
    theirs, ours = twins.twice((5, 3), (4,))

    def groups(pair):
        return [{"params": [pair[0]]}, {"params": [pair[1]], "lr": 0.05}]

    def fresh():
        return {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}

    pairs = [(kind(groups(theirs), **fresh()), theirs)]
    pairs += [(remote(groups(ours), rule, **fresh()), ours)]
    plans = [MADE[name](optimizer) for optimizer, _ in pairs]
    rates = set()
    for seed in range(20):
        twins.feed(theirs, ours, seed=seed)
        rates.add(float(pairs[0][0].param_groups[0]["lr"]))
        for (optimizer, _), plan in zip(pairs, plans, strict=True):
            optimizer.step()
            plan.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        twins.assert_close(ours, theirs)
    assert len(rates) > 1
    assert pairs[1][0].summary.step == 20


def test_edits_by_hand_reach_the_server_before_the_next_step(remote):
    theirs, ours = twins.twice((5,), (4,))

    def groups(pair):
        return [{"params": [pair[0]]}, {"params": [pair[1]], "weight_decay": 0.5}]

    local, optimizer = torch.optim.Adam(groups(theirs)), remote(groups(ours))
    edits = [{"lr": 0.5}, {"betas": (0.5, 0.7)}, {"weight_decay": 0.25}, {"eps": 0.1}]
    edits += [{"maximize": True}, {"decoupled_weight_decay": True}, {"lr": 0.001}]
    for seed, edit in enumerate(edits):
        for one in (local, optimizer):
            one.param_groups[seed % 2].update(edit)
        twins.feed(theirs, ours, seed=seed)
        local.step()
        optimizer.step()
        twins.assert_close(ours, theirs)


def test_a_schedule_of_the_server_holds_until_the_rate_is_edited_here(remote):
    schedule = {"kind": "linear", "total_steps": 10}
    (param,) = twins.params((3,))
    optimizer = remote([param], "sgd", lr=1.0, schedule=schedule)
    rates = []
    for seed in range(4):
        if seed == 2:
            optimizer.param_groups[0]["lr"] = 0.25
        twins.feed([param], seed=seed)
        optimizer.step()
        rates.append(optimizer.summary.lr)
    assert rates == pytest.approx([1.0, 0.9, 0.25, 0.25])


def test_what_needs_other_arrays_is_refused_by_name(remote):
    (param,) = twins.params((3,))
    optimizer = remote([param], "sgd")
    optimizer.param_groups[0]["momentum"] = 0.9
    twins.feed([param])
    before = param.detach().clone()
    with pytest.raises(Structural, match=r"overrides\.default\.momentum"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_patch_of_the_session_holds_for_what_was_not_edited_here(remote):
    (param,) = twins.params((3,))
    optimizer = remote([param], "sgd", lr=1.0)
    optimizer.session.patch(optimizer={"lr": 0.5})
    twins.feed([param])
    optimizer.step()
    assert optimizer.summary.lr == 0.5
