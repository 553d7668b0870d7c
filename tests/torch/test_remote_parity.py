"""A remote optimizer against torch's: each configuration of torch's own table, each refusal."""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from gradpost.errors import InvalidRequest
from gradpost.torch import RemoteOptimizer
from tests.torch import twins


def configurations():
    def later(name):
        assert name in twins.LATER  # a new optimizer of torch's has to be looked at
        missing.append(
            pytest.param(
                *(None,) * 3,
                id=name,
                marks=pytest.mark.skip(reason=f"the server has no rule for torch's {name}"),
            )
        )

    missing = []
    for kind, rule, options, name in twins.table(later):
        yield pytest.param(kind, rule, options, id=name.replace(" ", "_"))
    yield from missing


@pytest.mark.parametrize(("kind", "rule", "options"), list(configurations()))
def test_every_configuration_of_torchs_table(remote, kind, rule, options):
    theirs, ours = twins.twice(*twins.OTHER_SHAPES.get(kind, ()))
    local = kind(theirs, **copy.deepcopy(options))
    optimizer = remote(ours, rule, **copy.deepcopy(options))
    for seed in range(20):
        twins.feed(theirs, ours, seed=seed)
        local.step()
        optimizer.step()
        twins.assert_close(ours, theirs, twins.FAR.get(kind, twins.CLOSE))
    assert optimizer.summary.step == 20


def bad_inputs():
    for info in optim_db:
        if info.optim_cls not in twins.RULES:
            continue
        for made in info.optim_error_inputs_func("cpu", torch.float32):
            asked = made.optimizer_error_input
            yield pytest.param(
                info.optim_cls, made, id=f"{info.optim_cls.__name__}-{asked.desc}".replace(" ", "_")
            )


@pytest.mark.parametrize(("kind", "bad"), list(bad_inputs()))
def test_what_torch_refuses_is_refused_alike(server, kind, bad):
    at_once = bad.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    asked = bad.optimizer_error_input
    params = twins.params((2, 3)) if asked.params is None else asked.params
    with pytest.raises(bad.error_type if at_once else ValueError) as refused:
        RemoteOptimizer(params, server, rule=twins.RULES[kind], **asked.kwargs)
    if (
        at_once and "foreach" not in asked.kwargs
    ):  # which is refused as such, whatever comes with it
        assert refused.match(bad.error_regex)


@pytest.mark.parametrize("flag", ["capturable", "foreach", "fused", "differentiable"])
def test_how_torch_runs_is_no_business_of_the_server(server, remote, flag):
    with pytest.raises(ValueError, match=f"{flag} says how torch runs"):
        RemoteOptimizer(twins.params(), server, rule="adam", **{flag: True})
    assert remote(twins.params(), "adam", **{flag: False}).param_groups[0][flag] is False


def test_options_that_only_the_server_knows(remote, server):
    optimizer = remote(twins.params(), "adam", bias_correction=False)
    assert optimizer.session.info()["optimizer"]["bias_correction"] is False
    with pytest.raises(InvalidRequest, match="There is no field epss; did you mean 'eps'"):
        RemoteOptimizer(twins.params(), server, rule="adam", epss=1e-8)
    with pytest.raises(InvalidRequest, match="no rule 'adan'"):
        RemoteOptimizer(twins.params(), server, rule="adan")


@pytest.mark.parametrize("rule", ["momentum", "lion", "yogi"])
def test_rules_that_torch_has_not_show_the_servers_defaults(remote, rule):
    (param,) = twins.params((4, 3))
    optimizer = remote([param], rule, lr=0.125)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.125
    assert group.keys() - {"params"} == optimizer.session.info()["optimizer"].keys() - {
        "rule",
        "preset",
    }
    before = param.detach().clone()
    twins.feed([param])
    optimizer.step()
    assert not torch.equal(param, before)


@pytest.mark.parametrize("rule", ["sgd", "adam", "nadam", "asgd"])
def test_float64_models_are_float64_on_the_server(remote, rule):
    theirs, ours = twins.twice(dtype=torch.float64)
    local = {v: k for k, v in twins.RULES.items()}[rule](theirs)
    optimizer = remote(ours, rule)
    assert optimizer.session.info()["dtype"] == "F64"
    for seed in range(20):
        twins.feed(theirs, ours, seed=seed)
        local.step()
        optimizer.step()
    # torch keeps eta and mu_product in float32
    twins.assert_close(ours, theirs, 1e-6 if rule in ("nadam", "asgd") else 1e-12)
