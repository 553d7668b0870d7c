"""Checkpoints: torch's structure, exchangeable with torch's optimizers both ways."""

import copy
import io

import pytest
import torch

from tests.torch import twins

KINDS = {rule: kind for kind, rule in twins.RULES.items()}
CASES = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("adagrad", {}),
    ("adagrad", {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"momentum": 0.5}),
    ("rmsprop", {"centered": True, "momentum": 0.5}),
    ("adadelta", {}),
    ("adam", {}),
    ("adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ("adamw", {}),
    ("adamw", {"amsgrad": True}),
    ("adamax", {}),
    ("nadam", {}),
    ("nadam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("radam", {}),
    ("asgd", {}),
    ("asgd", {"t0": 3, "lambd": 0.01, "lr": 0.1}),
    ("rprop", {}),
]
IDS = [f"{rule}-{'-'.join(options) or 'default'}" for rule, options in CASES]
every = pytest.mark.parametrize(("rule", "options"), CASES, ids=IDS)

NEVER = 3
"""The place of a parameter without gradients before the checkpoint."""


def train(*pairs, seeds, absent=()):
    """Steps of each (optimizer, its parameters) on the same gradients."""
    for seed in seeds:
        late = {1} if seed < 2 else set()
        twins.feed(*(params for _, params in pairs), seed=seed, absent={*absent, *late})
        for optimizer, _ in pairs:
            optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every
def test_torchs_checkpoint_goes_on_remotely(remote, rule, options):
    theirs, ours = twins.twice()
    local = KINDS[rule](theirs, **options)
    train((local, theirs), seeds=range(7), absent=[NEVER])
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    optimizer = remote(ours, rule, **options)
    optimizer.load_state_dict(through_a_file(local.state_dict()))
    train((local, theirs), (optimizer, ours), seeds=range(7, 20))
    twins.assert_close(ours, theirs)


@every
def test_a_remote_checkpoint_goes_on_in_torch(remote, rule, options):
    theirs, ours = twins.twice()
    optimizer = remote(ours, rule, **options)
    train((optimizer, ours), seeds=range(7), absent=[NEVER])
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)
    local = KINDS[rule](theirs, **options)
    local.load_state_dict(through_a_file(optimizer.state_dict()))
    train((local, theirs), (optimizer, ours), seeds=range(7, 20))
    twins.assert_close(ours, theirs)


@every
def test_the_structure_is_torchs(remote, rule, options):
    theirs, ours = twins.twice()
    local, optimizer = KINDS[rule](theirs, **options), remote(ours, rule, **options)
    train((local, theirs), (optimizer, ours), seeds=range(4), absent=[NEVER])
    want, found = local.state_dict(), optimizer.state_dict()
    assert found.keys() == want.keys()
    assert found["param_groups"] == want["param_groups"]
    kept = {
        at: own for at, own in want["state"].items() if any(v is not None for v in own.values())
    }
    assert found["state"].keys() == kept.keys()
    for at, own in kept.items():
        assert found["state"][at].keys() == own.keys()
        for key, value in own.items():
            mine = found["state"][at][key]
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
            torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-6)
    assert not optimizer.state  # it lives on the server


@every
def test_a_remote_checkpoint_goes_on_remotely_to_the_bit(remote, rule, options):
    ours, again = twins.twice()
    optimizer = remote(ours, rule, **options)
    train((optimizer, ours), seeds=range(5), absent=[NEVER])
    saved = through_a_file(optimizer.state_dict())
    other = remote(again, rule, **options)
    train((other, again), seeds=range(90, 93))
    with torch.no_grad():
        for mine, theirs in zip(again, ours, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(saved)
    train((optimizer, ours), (other, again), seeds=range(5, 9))
    close = {"nadam": 1e-6, "asgd": 1e-6}.get(rule, 0.0)  # torch's float32 mu_product and eta
    twins.assert_close(again, ours, close)


def test_a_model_that_was_loaded_is_sent_with_the_state(remote):
    ours, again = twins.twice()
    optimizer = remote(ours)
    train((optimizer, ours), seeds=range(3))
    other = remote(again)
    for mine, theirs in zip(again, ours, strict=True):
        mine.data = theirs.data.clone()  # which torch does not count as a change
    other.load_state_dict(optimizer.state_dict())
    train((optimizer, ours), (other, again), seeds=range(3, 6))
    twins.assert_same(again, ours)


def test_half_models_keep_float32_moments(remote):
    ours, again = twins.twice(dtype=torch.bfloat16)
    optimizer = remote(ours)
    train((optimizer, ours), seeds=range(3))
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == torch.float32
    other = remote(again)
    other.load_state_dict(saved)
    assert not other.state
    theirs, mine = optimizer.session.state(), other.session.state()
    assert all((mine.tensors[key] == theirs.tensors[key]).all() for key in theirs.tensors)
    local = torch.optim.Adam(again)
    local.load_state_dict(saved)
    assert local.state[again[0]]["exp_avg"].dtype == torch.bfloat16


def test_groups_travel_with_the_state(remote):
    theirs, ours = twins.twice((4,), (3,))

    def groups(pair):
        return [{"params": [pair[0]]}, {"params": [pair[1]], "lr": 0.5, "betas": (0.5, 0.6)}]

    local = torch.optim.Adam(groups(theirs), lr=0.01)
    local.param_groups[0]["lr"] = 0.25
    train((local, theirs), seeds=range(3))
    optimizer = remote(groups(ours), lr=0.01)
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    optimizer.load_state_dict(local.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    train((local, theirs), (optimizer, ours), seeds=range(3, 9))
    twins.assert_close(ours, theirs)


def test_a_fresh_checkpoint_makes_the_state_fresh(remote):
    theirs, ours = twins.twice()
    optimizer = remote(ours)
    train((optimizer, ours), seeds=range(3))
    local = torch.optim.Adam(theirs)
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)
    optimizer.load_state_dict(local.state_dict())
    assert set(optimizer.session.state().counts.values()) == {0}
    train((local, theirs), (optimizer, ours), seeds=range(3, 6))
    twins.assert_close(ours, theirs)


def test_a_state_dict_of_adamw_in_adam_decouples_the_decay(remote):
    theirs, ours = twins.twice()
    optimizer = remote(ours, "adam", lr=0.1)
    local = torch.optim.Adam(theirs, lr=0.1)
    saved = torch.optim.AdamW(twins.params(), lr=0.1, weight_decay=0.3).state_dict()
    for one in (optimizer, local):
        one.load_state_dict(copy.deepcopy(saved))
    train((local, theirs), (optimizer, ours), seeds=range(3))
    twins.assert_close(ours, theirs)
    adamw = remote(twins.params(), "adamw")
    adamw.load_state_dict(torch.optim.Adam(twins.params()).state_dict())
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True


def test_a_momentum_buffer_of_none_is_none_yet(remote):
    theirs, ours = twins.twice((3,), (2,))
    local = torch.optim.SGD(theirs, momentum=0.9)
    saved = local.state_dict()
    saved["state"] = {0: {"momentum_buffer": None}, 1: {"momentum_buffer": torch.ones(2)}}
    optimizer = remote(ours, "sgd", momentum=0.9)
    optimizer.load_state_dict(saved)
    local.load_state_dict(copy.deepcopy(saved))
    train((local, theirs), (optimizer, ours), seeds=range(2, 5))
    twins.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("saver", "rule", "options", "match"),
    [
        (lambda p: torch.optim.Adam(p, amsgrad=True), "adam", {}, "has max_exp_avg_sq"),
        (torch.optim.Adam, "adam", {"amsgrad": True}, "has no max_exp_avg_sq"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "sgd", {}, "has momentum_buffer"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "adam", {}, "has momentum_buffer"),
        (torch.optim.RMSprop, "rmsprop", {"centered": True}, "has no grad_avg"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(remote, saver, rule, options, match):
    theirs, ours = twins.twice((3, 2), (2,))
    local = saver(theirs)
    train((local, theirs), seeds=range(2, 4))
    optimizer = remote(ours, rule, **options)
    train((optimizer, ours), seeds=range(2, 4))
    before, groups = optimizer.session.info(), optimizer.param_groups
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(local.state_dict())
    after = optimizer.session.info()
    assert (after["epoch"], after["version"]) == (before["epoch"], before["version"])
    assert optimizer.param_groups is groups
    optimizer.step()


def test_other_groups_are_refused_as_torch_does(remote):
    optimizer = remote(twins.params((2,), (3,)))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(torch.optim.Adam(twins.params((2,))).state_dict())


def test_the_hooks_of_checkpoints_run(remote):
    optimizer = remote(twins.params((2,)))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, saved: {name: value for name, value in saved.items() if name != "more"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"]


def test_an_average_travels_and_stays(remote):
    ours, again = twins.twice((3,), (2, 2))
    optimizer = remote(ours, ema={"decay": 0.5})
    train((optimizer, ours), seeds=range(2, 6))
    average = optimizer.session.pull(of="ema")
    saved = optimizer.state_dict()
    other = remote(again, ema={"decay": 0.5})
    other.load_state_dict(saved)
    found = other.session.pull(of="ema")
    assert all((found[name] == average[name]).all() for name in average)
    for own in saved["state"].values():
        del own["ema"]  # as a checkpoint of torch has none
    other.load_state_dict(saved)
    found = other.session.pull(of="ema")
    assert all((found[name] == average[name]).all() for name in average)
    torch.optim.Adam(twins.params((3,), (2, 2))).load_state_dict(optimizer.state_dict())


def test_the_step_of_a_schedule_survives_with_a_rule_that_keeps_none(remote):
    schedule = {"kind": "linear", "total_steps": 10}
    ours, again = twins.twice((3,))
    optimizer = remote(ours, "sgd", lr=1.0, schedule=schedule)
    train((optimizer, ours), seeds=range(2, 6))
    other = remote(again, "sgd", lr=1.0, schedule=schedule)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.session.schedule(1) == optimizer.session.schedule(1)
    twins.feed(again)
    other.step()
    assert other.summary.lr == pytest.approx(0.6)


def test_a_checkpoint_on_the_server_is_one_line_each_way(remote):
    theirs, ours = twins.twice()
    first, second = remote(ours, lr=0.1), remote(theirs, lr=0.1)
    train((first, ours), (second, theirs), seeds=range(3))
    reference = through_a_file(first.state_dict(remote=True, name="three"))
    assert reference["state"] == {}
    kept = [param.detach().clone() for param in ours]
    first.param_groups[0]["lr"] = 0.7
    train((first, ours), seeds=range(3, 6))
    first.load_state_dict(reference)
    assert first.param_groups[0]["lr"] == 0.1
    for param, before in zip(ours, kept, strict=True):
        assert torch.equal(param, before)
    train((first, ours), (second, theirs), seeds=range(3, 6))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    assert [one.name for one in first.session.checkpoints.list()] == ["three"]
    with pytest.raises(ValueError, match="download"):
        second.load_state_dict(reference)


def test_durability_reaches_the_server(remote):
    (params, _) = twins.twice()
    optimizer = remote(params, durability="snapshot")
    assert optimizer.session.info()["durability"] == "snapshot"
