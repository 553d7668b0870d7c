"""Parameter groups: of the constructor, added later, frozen and unfrozen."""

import copy

import pytest
import torch

from gradpost.errors import InvalidRequest
from tests.torch import twins


def run(*pairs, seeds, absent=()):
    for seed in seeds:
        twins.feed(*(params for _, params in pairs), seed=seed, absent=absent)
        for optimizer, _ in pairs:
            optimizer.step()


def layout(optimizer):
    return {e["name"]: e["group"] for e in optimizer.session.info()["layout"]}


def three(params, **first):
    return [
        {"params": params[:2], **first},
        {"params": params[2:3], "lr": 0.1, "weight_decay": 0.5},
        {"params": params[3:], "betas": (0.5, 0.9), "maximize": True, "amsgrad": True},
    ]


def test_groups_have_their_own_hyperparameters(remote):
    theirs, ours = twins.twice()
    local, optimizer = torch.optim.Adam(three(theirs, eps=1e-6)), remote(three(ours, eps=1e-6))
    run((local, theirs), (optimizer, ours), seeds=range(10))
    twins.assert_close(ours, theirs)
    said = optimizer.session.info()
    assert said["optimizer"]["eps"] == 1e-6
    one, two = said["groups"]
    assert (one["name"], one["params"], one["lr"]) == ("group-1", ["param.2"], 0.1)
    assert (two["amsgrad"], one["amsgrad"], two["preset"]) == (True, False, "torch")


def test_a_group_may_have_a_rule_of_its_own(remote):
    theirs, ours = twins.twice((4,), (3,))
    locals_ = [
        torch.optim.Adam(theirs[:1], lr=0.01),
        torch.optim.SGD(theirs[1:], lr=0.1, momentum=0.9),
    ]
    groups = [{"params": ours[:1]}, {"params": ours[1:], "rule": "sgd", "lr": 0.1, "momentum": 0.9}]
    optimizer = remote(groups, lr=0.01)
    assert "betas" not in optimizer.param_groups[1]
    assert optimizer.param_groups[1]["dampening"] == 0
    for seed in range(6):
        twins.feed(theirs, ours, seed=seed)
        for one in (*locals_, optimizer):
            one.step()
            one.param_groups[-1]["lr"] = 0.1 if one is locals_[0] else 0.05
        locals_[0].param_groups[0]["lr"] = 0.01
        twins.assert_close(ours, theirs)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [set(own) for own in saved["state"].values()] == [
        {"step", "exp_avg", "exp_avg_sq"},
        {"momentum_buffer"},
    ]
    del saved["param_groups"][1]["rule"]  # as a checkpoint of torch has none
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["rule"] == "sgd"
    with pytest.raises(ValueError, match="Invalid momentum value"):
        remote([{"params": twins.params((2,)), "rule": "sgd", "momentum": -1.0}])


def test_names_of_groups_are_those_that_the_server_can_write(remote):
    params = twins.params(*[(2,)] * 5)
    given = ["", "no decay/bias", "head", "head", "default"]
    groups = [{"params": [p], "name": name} for p, name in zip(params, given, strict=True)]
    optimizer = remote(groups)
    assert list(layout(optimizer).values()) == [
        "default",
        "no-decay-bias",
        "head",
        "head-3",
        "default-4",
    ]
    assert [group["name"] for group in optimizer.param_groups] == given


def test_submodules_may_use_one_name_twice(remote):
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    groups = [{"params": one.named_parameters()}, {"params": two.named_parameters(), "lr": 0.1}]
    assert layout(remote(groups)) == {
        "weight": "default",
        "bias": "default",
        "group-1.weight": "group-1",
        "group-1.bias": "group-1",
    }


def test_names_that_look_like_patterns_are_names(remote):
    params = dict(zip(["w[0]", "w*", "w0", "a?"], twins.params(*[(2,)] * 4), strict=True))
    named = list(params.items())
    optimizer = remote([{"params": named[:1]}, {"params": named[1:2]}, {"params": named[2:]}])
    assert layout(optimizer) == {
        "w[0]": "default",
        "w*": "group-1",
        "w0": "group-2",
        "a?": "group-2",
    }


def test_empty_groups(remote):
    theirs, ours = twins.twice((3,), (2,))

    def groups(pair):
        return [
            {"params": []}, {"params": pair[:1]}, {"params": []}, {"params": pair[1:], "lr": 0.1},
        ]  # fmt: skip

    local, optimizer = torch.optim.Adam(groups(theirs)), remote(groups(ours))
    run((local, theirs), (optimizer, ours), seeds=range(3))
    twins.assert_close(ours, theirs)
    local.load_state_dict(optimizer.state_dict())


def test_adding_a_group_keeps_everything_else(remote):
    theirs, ours = twins.twice((4, 3), (5,), (2,))
    local, optimizer = torch.optim.Adam(theirs[:1]), remote(ours[:1])
    run((local, theirs[:1]), (optimizer, ours[:1]), seeds=range(3))
    local.add_param_group({"params": theirs[1:2], "lr": 0.1})
    optimizer.add_param_group({"params": ours[1:2], "lr": 0.1})
    run((local, theirs[:2]), (optimizer, ours[:2]), seeds=range(3, 6))
    for one, pair in ((local, theirs), (optimizer, ours)):
        one.add_param_group({"params": pair[2], "weight_decay": 0.1, "name": "last one"})
        one.param_groups[1]["lr"] = 0.05
    run((local, theirs), (optimizer, ours), seeds=range(6, 9))
    twins.assert_close(ours, theirs)
    assert layout(optimizer) == {
        "param.0": "default",
        "param.1": "group-1",
        "param.2": "last-one",
    }
    state = optimizer.session.state()
    assert state.counts == {"param.0": 9, "param.1": 6, "param.2": 3}
    assert optimizer.dropped == 0
    assert optimizer.session.info()["epoch"] == 1
    local.load_state_dict(optimizer.state_dict())


def test_a_group_that_is_refused_is_not_there(remote):
    theirs, ours = twins.twice((4,), (3,))
    optimizer = remote(ours[:1])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": ours[:1]})
    with pytest.raises(InvalidRequest, match=r"groups\.0\.lr"):
        optimizer.add_param_group({"params": ours[1:], "lr": -1.0})
    with pytest.raises(ValueError, match="on the meta device"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.empty(2, device="meta"))]})
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group(ours[1:])
    assert len(optimizer.param_groups) == 1
    assert layout(optimizer) == {"param.0": "default"}
    optimizer.add_param_group({"params": ours[1:], "lr": 0.1})
    local = torch.optim.Adam([{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.1}])
    run((local, theirs), (optimizer, ours), seeds=range(3))
    twins.assert_close(ours, theirs)


def test_frozen_parameters_stay_at_home_but_keep_their_place(remote):
    theirs, ours = twins.twice((4,), (3,), (2,))
    for pair in (theirs, ours):
        pair[1].requires_grad_(False)
    local, optimizer = torch.optim.Adam(theirs), remote(ours)
    assert list(layout(optimizer)) == ["param.0", "param.2"]
    run((local, theirs), (optimizer, ours), seeds=range(3), absent=[1])
    twins.assert_close(ours, theirs)
    want, found = local.state_dict(), optimizer.state_dict()
    assert found["param_groups"] == want["param_groups"]
    assert list(found["state"]) == list(want["state"]) == [0, 2]


def test_freezing_and_unfreezing_later(remote):
    theirs, ours = twins.twice((4,), (3,), (2,), (5,))

    def groups(pair):
        pair[1].requires_grad_(False)
        pair[2].requires_grad_(False)
        return [
            {"params": pair[:2]},
            {"params": pair[2:3], "lr": 0.1, "betas": (0.5, 0.6)},
            {"params": pair[3:], "lr": 0.01},
        ]

    local, optimizer = torch.optim.Adam(groups(theirs)), remote(groups(ours))
    pairs = (local, theirs), (optimizer, ours)
    run(*pairs, seeds=range(3), absent=[1, 2])
    for pair in (theirs, ours):  # two layers begin, another rests
        pair[1].requires_grad_()
        pair[2].requires_grad_()
        pair[3].requires_grad_(False)
    for one, _ in pairs:
        one.param_groups[0]["lr"] = 0.2
    run(*pairs, seeds=range(3, 6), absent=[3])
    for pair in (theirs, ours):
        pair[3].requires_grad_()
    for one, _ in pairs:
        one.param_groups[1]["lr"] = 0.3
    run(*pairs, seeds=range(6, 9))
    twins.assert_close(ours, theirs)
    assert optimizer.dropped == 0
    assert layout(optimizer) == {
        "param.0": "default",
        "param.1": "default-late-1",
        "param.2": "group-1",
        "param.3": "group-2",
    }
    local.load_state_dict(optimizer.state_dict())
    run(*pairs, seeds=range(9, 12))
    twins.assert_close(ours, theirs)


def test_unfreezing_costs_no_staleness(remote):
    params = twins.params((4,), (3,))
    params[1].requires_grad_(False)
    optimizer = remote(params, update={"max_staleness": 0}, on_refused="raise")
    run((optimizer, params), seeds=range(2), absent=[1])
    params[1].requires_grad_()
    run((optimizer, params), seeds=range(2, 4))
    assert [row["staleness"] for row in optimizer.session.history()] == [0] * 4
