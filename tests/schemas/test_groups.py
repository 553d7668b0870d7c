"""Groups, clipping, schedules and averages as they are stated, and what holds in the end."""

import pytest

from service.errors import InvalidRequest, NotSupportedYet, Structural
from service.schemas import apply_patch, diff, parse_spec, terms, with_overrides

GROUPS = [
    {"name": "bias", "params": ["*.bias"], "weight_decay": 0.0},
    {"params": ["emb"], "rule": "sgd", "momentum": 0.9, "frozen": True, "clip": {"value": 1}},
]
SPEC = {"optimizer": {"rule": "adamw", "lr": 0.1}, "groups": GROUPS, "clip": {"global_norm": 1}}


def made(**fields):
    return parse_spec({**SPEC, **fields})[0]


def test_groups_inherit_what_they_do_not_state():
    default, bias, emb = terms(made())
    assert [one.name for one in (default, bias, emb)] == ["default", "bias", "group-2"]
    assert (default.hyper["lr"], default.hyper["weight_decay"]) == (0.1, 0.01)
    assert (bias.hyper["lr"], bias.hyper["weight_decay"]) == (0.1, 0.0)
    assert emb.hyper["rule"] == "sgd"
    assert emb.hyper["lr"] == 0.001  # a rule of its own has its own defaults
    assert (default.frozen, bias.frozen, emb.frozen) == (False, False, True)
    assert bias.clip.global_norm == 1.0
    assert emb.clip.value == 1.0


def test_a_patch_reaches_groups_that_inherit_and_groups_by_name():
    spec = apply_patch(made(), {"optimizer": {"lr": 0.5}})
    assert [one.hyper["lr"] for one in terms(spec)] == [0.5, 0.5, 0.001]
    spec = apply_patch(spec, {"groups": [{"name": "bias", "lr": 0.7, "weight_decay": 0.3}]})
    assert [one.hyper["lr"] for one in terms(spec)] == [0.5, 0.7, 0.001]
    spec = apply_patch(spec, {"optimizer": {"lr": 0.9}})
    assert [one.hyper["lr"] for one in terms(spec)] == [0.9, 0.7, 0.001]
    spec = apply_patch(spec, {"groups": [{"name": "bias", "lr": None}]})
    assert terms(spec)[1].hyper["lr"] == 0.9
    spec = apply_patch(spec, {"groups": [{"name": "group-2", "frozen": False, "clip": None}]})
    assert not terms(spec)[2].frozen
    assert terms(spec)[2].clip.global_norm == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"groups": [{"name": "bias", "amsgrad": True}]},
        {"groups": [{"name": "bias", "rule": "adam"}]},
        {"groups": [{"name": "bias", "params": ["w"]}]},
        {"groups": [{"name": "group-2", "momentum": 0}]},
    ],
)
def test_what_needs_other_arrays_in_a_group_is_structural(change):
    with pytest.raises(Structural):
        apply_patch(made(), change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": {}}, "groups: Send a list"),
        ({"groups": [1]}, "groups.0"),
        ({"groups": [{"lr": 1}]}, "groups.0.params"),
        ({"groups": [{"params": []}]}, "groups.0.params"),
        ({"groups": [{"params": ["a"], "lrr": 1}]}, "did you mean 'lr'"),
        ({"groups": [{"params": ["a"], "lr": -1}]}, "groups.0.lr"),
        ({"groups": [{"params": ["a"], "lr": 1e39}]}, "largest number of F32"),
        ({"groups": [{"params": ["a"], "rule": "adm"}]}, "did you mean 'adam'"),
        ({"groups": [{"params": ["a"], "rule": "x" * 10_000}]}, "There is no rule"),
        ({"groups": [{"params": ["a"], "name": "default"}]}, "another group named"),
        ({"groups": [{"params": ["a"], "name": "x/y"}]}, "groups.0.name"),
        ({"groups": [{"params": ["a"], "name": "n"}, {"params": ["b"], "name": "n"}]}, "another"),
        ({"groups": [{"params": ["a"], "clip": {"global_norm": 1}}]}, "groups.0.clip"),
        ({"groups": [{"params": ["a"], "clip": {}}]}, "exactly one"),
        ({"clip": {}}, "exactly one"),
        ({"clip": {"value": 1, "global_norm": 1}}, "exactly one"),
        ({"clip": {"value": 0}}, "clip.value"),
        ({"clip": {"norm": 1}}, "There is no field norm"),
        ({"schedule": {}}, "Name the kind"),
        ({"schedule": {"kind": "cos"}}, "Name the kind"),
        ({"schedule": {"kind": "cosine"}}, "schedule.total_steps"),
        ({"schedule": {"kind": "linear", "total_steps": 5, "warmup_steps": 5}}, "larger"),
        ({"schedule": {"kind": "constant", "total_steps": 5}}, "schedule"),
        ({"schedule": {"kind": "cosine", "total_steps": 5, "final_factor": 2}}, "final_factor"),
        ({"ema": {"decay": 1}}, "ema.decay"),
        ({"ema": 1}, "ema"),
        ({"norms": 1}, "norms"),
    ],
)
def test_bad_ones_say_where_and_what(fields, message):
    with pytest.raises(InvalidRequest) as caught:
        made(**fields)
    assert message in caught.value.detail
    assert len(caught.value.detail) < 2000


def test_a_field_of_a_later_version_in_a_group():
    with pytest.raises(NotSupportedYet, match="fused"):
        made(groups=[{"params": ["a"], "fused": True}])


def test_a_rule_of_a_group_may_take_whole_tensors():
    default, late = terms(made(groups=[{"params": ["w"], "rule": "muon", "lr": 0.3}]))
    assert (default.hyper["rule"], late.hyper["rule"], late.hyper["lr"]) == ("adamw", "muon", 0.3)
    assert late.hyper["ns_coefficients"] == (3.4445, -4.775, 2.0315)
    changed = with_overrides([default, late], '{"group-1": {"ns_steps": 3, "eps": 0}}', "F32")
    assert changed[1].hyper["ns_steps"] == 3


def test_attaching_compares_groups_field_by_field():
    spec = made()
    same = parse_spec({"optimizer": {"rule": "adamw"}, "groups": GROUPS})[1]
    assert diff(spec, same) == []
    other = parse_spec({"optimizer": {"rule": "adamw"}, "groups": [
        {"name": "bias", "params": ["*.bias"], "weight_decay": 0.5}, GROUPS[1]]})[1]  # fmt: skip
    assert [item["field"] for item in diff(spec, other)] == ["groups.0.weight_decay"]
    fewer = parse_spec({"optimizer": {"rule": "adamw"}, "groups": GROUPS[:1]})[1]
    assert [item["field"] for item in diff(spec, fewer)] == ["groups"]


def test_overrides_replace_values_of_one_update():
    base = terms(made())
    changed = with_overrides(base, '{"bias": {"lr": 0.3}, "default": {"eps": 0.5}}', "F32")
    assert changed[1].hyper["lr"] == 0.3
    assert changed[1].stated_lr
    assert changed[0].hyper["eps"] == 0.5
    assert not changed[0].stated_lr
    assert changed[2] is base[2]
    assert terms(made()) == base


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ('{"biass": {"lr": 1}}', InvalidRequest),
        ('{"bias": {"lrr": 1}}', InvalidRequest),
        ('{"bias": {"lr": -1}}', InvalidRequest),
        ('{"bias": {"lr": 1e39}}', InvalidRequest),
        ('{"bias": {"rule": "sgd"}}', InvalidRequest),
        ('{"bias": {"amsgrad": true}}', Structural),
        ('{"group-2": {"momentum": 0}}', Structural),
    ],
)
def test_bad_overrides(overrides, error):
    with pytest.raises(error, match="overrides"):
        with_overrides(terms(made()), overrides, "F32")


def test_a_misplaced_field_is_told_its_place():
    with pytest.raises(InvalidRequest, match="belongs into optimizer"):
        made(lr=0.1)
    with pytest.raises(InvalidRequest, match="belongs into update"):
        apply_patch(made(), {"max_staleness": 3})
