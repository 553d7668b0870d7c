"""Hyperparameters: defaults, ranges with their reasons, and nothing that is silently ignored."""

import json
import math

import pytest

from kernels import rows
from kernels.registry import RULES
from service.errors import DeviceUnavailable, InvalidRequest, NotSupportedYet
from service.hyper import BY_NAME, LAZY, SOON
from service.schemas import apply_patch, parse_spec, terms, with_overrides

DEFAULTS = {
    "sgd": {"lr": 0.001, "momentum": 0.0, "dampening": 0.0, "nesterov": False},
    "momentum": {"lr": 0.001, "beta": 0.9},
    "adagrad": {"lr": 0.01, "lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10},
    "rmsprop": {
        **{"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "eps_inside_sqrt": True},
        **{"momentum": 0.0, "centered": False},
    },
    "adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6},
    "adam": {
        **{"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False},
        **{"decoupled_weight_decay": False, "bias_correction": True},
    },
    "adamw": {
        **{"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False},
        **{"weight_decay": 0.01, "bias_correction": True},
    },
    "adamax": {"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8},
    "nadam": {
        **{"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8},
        **{"momentum_decay": 0.004, "decoupled_weight_decay": False},
    },
    "radam": {
        **{"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "decoupled_weight_decay": False},
    },
    "asgd": {"lr": 0.01, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6},
    "rprop": {"lr": 0.01, "etas": [0.5, 1.2], "step_sizes": [1e-6, 50.0]},
    "lion": {"lr": 1e-4, "betas": [0.9, 0.99]},
    "yogi": {
        **{"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-3},
        **{"initial_accumulator_value": 1e-6, "bias_correction": False},
    },
    "lamb": {
        **{"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-6},
        **{"weight_decay": 0.01, "bias_correction": True},
    },
    "lars": {
        **{"lr": 1.0, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0005},
        **{"trust_coefficient": 0.001, "eps": 0.0},
    },
    "adafactor": {"lr": 0.01, "beta2_decay": -0.8, "eps": [None, 0.001], "d": 1.0},
    "muon": {
        **{"lr": 0.001, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True},
        **{"ns_coefficients": [3.4445, -4.775, 2.0315], "eps": 1e-7, "ns_steps": 5},
        **{"adjust_lr_fn": "original"},
    },
}
SCALAR = [name for name, rule in RULES.items() if not rule.tensorwise]
COMMON = {"weight_decay": 0.0, "maximize": False, "preset": None}
UNTORCHED = ("momentum", "lion", "yogi", "lamb", "lars")


def spec(rule, **hyper):
    return parse_spec({"optimizer": {"rule": rule, **hyper}})[0]


def refused(rule, **hyper):
    with pytest.raises(InvalidRequest) as caught:
        spec(rule, **hyper)
    error = caught.value
    assert error.context["errors"]
    for item in error.context["errors"]:
        assert item["field"].startswith("optimizer")
        assert len(item["message"]) > 15
        assert item["message"].endswith((".", "?"))
    json.dumps(error.problem(), allow_nan=False).encode()
    return error.context["errors"][0]


@pytest.mark.parametrize("rule", BY_NAME)
def test_defaults_are_echoed(rule):
    echoed = spec(rule).model_dump(mode="json")["optimizer"]
    lazy = {"lazy": False} if rule in LAZY else {}
    assert echoed == {"rule": rule, **COMMON, **lazy, **DEFAULTS[rule]}


def test_every_rule_of_the_kernels_has_hyperparameters():
    assert BY_NAME.keys() == RULES.keys() == DEFAULTS.keys()
    for rule in SCALAR:
        hyper = spec(rule).optimizer.model_dump()
        scalars = RULES[rule].start(hyper, hyper["lr"])
        assert len(RULES[rule].coefficients(hyper, 0, hyper["lr"], scalars)) >= 1


LARGE = {
    **dict.fromkeys(("lr", "weight_decay", "eps", "momentum", "lambd", "alpha", "t0"), 1e300),
    **dict.fromkeys(("momentum_decay", "lr_decay", "initial_accumulator_value"), 1e300),
    **{"betas": [1 - 2**-53, 1 - 2**-53], "beta": 1 - 2**-53, "step_sizes": [0, 1e300]},
}
SMALL = {
    **dict.fromkeys(LARGE, 0),
    **{"betas": [5e-324, 5e-324], "beta": 5e-324, "step_sizes": [0, 0]},
}


@pytest.mark.parametrize("rule", SCALAR)
@pytest.mark.parametrize("extreme", [LARGE, SMALL], ids=["large", "small"])
def test_no_coefficient_raises_at_the_edges(rule, extreme):
    fields = {name: value for name, value in extreme.items() if name in BY_NAME[rule].model_fields}
    if rule == "rmsprop":
        fields["alpha"] = extreme["beta"]
    optimizer, _ = parse_spec({"optimizer": {"rule": rule, **fields}, "dtype": "F64"})
    hyper = optimizer.optimizer.model_dump()
    scalars = RULES[rule].start(hyper, hyper["lr"])
    for count in (0, 1, 7, 10**6, 2**53):
        values = RULES[rule].coefficients(hyper, count, hyper["lr"], scalars)
        assert all(isinstance(value, float) for value in values)
        scalars = RULES[rule].advance(hyper, count, hyper["lr"], scalars)
        assert all(isinstance(value, float) for value in scalars)


NUMBERS = [
    (rule, name)
    for rule, defaults in DEFAULTS.items()
    for name, value in {"weight_decay": 0.0, **defaults}.items()
    if isinstance(value, float)
]


@pytest.mark.parametrize(("rule", "name"), NUMBERS)
@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, 10**400, -(10**400), "0.1", True, None, [0.1], {}]
)
def test_a_number_is_a_finite_number(rule, name, value):
    assert refused(rule, **{name: value})["field"] == f"optimizer.{name}"


@pytest.mark.parametrize(
    ("rule", "name"), [x for x in NUMBERS if x[1] not in ("dampening", "beta2_decay")]
)
def test_no_number_is_negative(rule, name):
    assert refused(rule, **{name: -1e-12})["field"] == f"optimizer.{name}"


@pytest.mark.parametrize(("rule", "name"), [x for x in NUMBERS if x[1] != "d"])
def test_zero_and_whole_numbers_are_numbers(rule, name):
    value = getattr(spec(rule, **{name: 0}).optimizer, name)
    assert value == 0
    assert isinstance(value, float)


def test_a_range_of_asgd_s_alpha_has_its_own_reason():
    assert "never takes in" in refused("rmsprop", alpha=-1)["message"]
    assert "the lr falls" in refused("asgd", alpha=-1)["message"]
    assert spec("asgd", alpha=2).optimizer.alpha == 2


@pytest.mark.parametrize(
    ("rule", "name"), [("momentum", "beta"), ("rmsprop", "alpha"), ("muon", "momentum")]
)
@pytest.mark.parametrize("value", [1, 1.0, 1.5])
def test_a_decay_of_one_is_refused_with_the_reason(rule, name, value):
    assert "never takes in a gradient" in refused(rule, **{name: value})["message"]


# torch.testing's optim_db: the bad inputs of the rules that are here, by hand, so that no torch is
# needed. (Bad learning rates and weight decays of every rule are covered above.)
TORCH_REFUSES = [
    ("adadelta", {"lr": 1e-2, "rho": 1.1}),
    ("adagrad", {"lr": 1e-2, "lr_decay": -0.5}),
    ("adagrad", {"initial_accumulator_value": -0.5}),
    ("adam", {"lr": 1e-2, "betas": [1.0, 0.0]}),
    ("adam", {"lr": 1e-2, "betas": [0.0, 1.0]}),
    ("adam", {"lr": 1e-2, "betas": [-0.1, 0.9]}),
    ("adam", {"lr": 1e-2, "weight_decay": -1}),
    ("adam", {"lr": 1e-2, "eps": -1e-8}),
    ("adam", {"lr": [0.001]}),
    ("adamw", {"lr": 1e-2, "betas": [1.0, 0.0]}),
    ("adamw", {"lr": 1e-2, "weight_decay": -1}),
    ("rmsprop", {"lr": 1e-2, "momentum": -1.0}),
    ("rmsprop", {"lr": 1e-2, "alpha": -0.1}),
    ("sgd", {"lr": 1e-2, "momentum": -0.5}),
    ("sgd", {"lr": 1e-2, "nesterov": True}),
    ("sgd", {"lr": 1e-2, "nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("sgd", {"lr": "elephant"}),
    ("sgd", {"lr": -0.5}),
    ("adamax", {"lr": 1e-2, "betas": [0.0, 1.0]}),
    ("nadam", {"lr": 1e-2, "betas": [1.0, 0.0]}),
    ("nadam", {"lr": 1e-2, "momentum_decay": -0.2}),
    ("radam", {"lr": 1e-2, "betas": [1.0, 0.0]}),
    ("radam", {"lr": 1e-2, "weight_decay": -1}),
    ("asgd", {"lr": 1e-2, "weight_decay": -0.5}),
    ("rprop", {"lr": 1e-2, "etas": [1.0, 0.5]}),
    ("adafactor", {"eps": [-1e-30, 1e-3]}),
    ("adafactor", {"eps": [None, -1e-3]}),
    ("adafactor", {"d": 0.0}),
    ("adafactor", {"d": 0.999}),
    ("adafactor", {"beta2_decay": 0.8}),
    ("adafactor", {"lr": 1e-2, "weight_decay": -1}),
    ("muon", {"adjust_lr_fn": "arbitrary"}),
    ("muon", {"lr": 1e-2, "momentum": -0.1}),
    ("muon", {"ns_steps": 100}),
    ("muon", {"ns_coefficients": [3.0, -4.0]}),
    *((rule, {"lr": [0.001, 0.001]}) for rule in ("adamax", "nadam", "radam", "asgd", "rprop")),
    *((rule, {"lr": [0.001, 0.001]}) for rule in ("adafactor", "muon")),
]


@pytest.mark.parametrize(("rule", "hyper"), TORCH_REFUSES)
def test_what_torch_refuses_is_refused(rule, hyper):
    refused(rule, **hyper)


def test_what_torch_allows_at_the_edges():
    assert spec("adam", betas=[0, 0], eps=0, lr=0).optimizer.betas == (0.0, 0.0)
    assert spec("adadelta", rho=1).optimizer.rho == 1.0
    assert spec("sgd", momentum=1.5, dampening=-2).optimizer.dampening == -2.0
    assert spec("sgd", nesterov=True, momentum=0.9).optimizer.nesterov
    edges = spec("adafactor", eps=[0, 0], d=1, beta2_decay=0, lr=0).optimizer
    assert (edges.eps, edges.d, edges.beta2_decay) == ((0.0, 0.0), 1.0, 0.0)
    assert spec("muon", ns_steps=0, eps=0, momentum=0).optimizer.ns_steps == 0


@pytest.mark.parametrize("betas", [[], [0.9], [0.9, 0.9, 0.9], "ab", {"0": 0.9, "1": 0.9}, 0.9])
def test_betas_are_two_numbers(betas):
    assert "two numbers" in refused("adam", betas=betas)["message"]


@pytest.mark.parametrize(
    "eps",
    [[0.1], [0.1, 0.1, 0.1], [None, None], [math.nan, 0], [0, math.inf], ["0", 0], 1e-3, "ab", {}],
)
def test_adafactors_eps_are_two_numbers(eps):
    assert "two numbers from 0" in refused("adafactor", eps=eps)["message"]
    assert spec("adafactor", eps=[None, 0.1]).optimizer.eps == (None, 0.1)


@pytest.mark.parametrize("steps", [-1, 100, 5.0, True, "5", None, [5], 10**400])
def test_ns_steps_are_few_and_whole(steps):
    assert "a whole number from 0 to 99" in refused("muon", ns_steps=steps)["message"]


@pytest.mark.parametrize("numbers", [[], [1, 2], [1, 2, 3, 4], [1, 2, math.inf], [1, 2, "3"], 3])
def test_ns_coefficients_are_three_numbers(numbers):
    assert "three finite numbers" in refused("muon", ns_coefficients=numbers)["message"]


@pytest.mark.parametrize(
    "etas",
    [[0, 1.2], [1, 1.2], [0.5, 1], [0.5], [0.5, 1.2, 2], [0.5, math.inf], [-1, 2], 0.5, "ab", None],
)
def test_etas_lie_about_one(etas):
    assert "0 < etas[0] < 1 < etas[1]" in refused("rprop", etas=etas)["message"]


@pytest.mark.parametrize(
    "sizes", [[2, 1], [-1, 1], [0], [0, 1, 2], [0, math.nan], [True, 2], ["0", 1], 50, {}, None]
)
def test_step_sizes_ascend_from_zero(sizes):
    assert "the least and the most" in refused("rprop", step_sizes=sizes)["message"]


@pytest.mark.parametrize(
    ("rule", "extra", "advice"),
    [
        ("sgd", {"weight_decay": 0.1}, "set weight_decay 0"),
        ("sgd", {"momentum": 0.9}, "set momentum 0"),
        ("adagrad", {"weight_decay": 0.1}, "set weight_decay 0"),
        ("adam", {"weight_decay": 0.1}, "set weight_decay 0"),
        ("adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, "set weight_decay 0"),
        ("adam", {"amsgrad": True}, "set amsgrad false"),
    ],
)
def test_lazy_is_refused_where_other_rows_would_move(rule, extra, advice):
    assert spec(rule, lazy=False, **extra) != spec(rule, lazy=True)
    assert advice in refused(rule, lazy=True, **extra)["message"]


def test_lazy_is_for_the_rules_that_have_loops_over_rows():
    assert set(rows.VARIANTS) == LAZY == {"sgd", "adagrad", "adam"}
    for rule in LAZY:
        hyper = spec(rule, lazy=True).optimizer.model_dump()
        assert RULES[rule].variant(hyper) == rule
    for rule in BY_NAME.keys() - LAZY:
        assert "lazy" in refused(rule, lazy=True)["message"]


def test_lazy_is_inherited_overridden_and_patched():
    made, _ = parse_spec(
        {"optimizer": {"rule": "adam", "lazy": True},
         "groups": [{"params": ["a"], "name": "off", "lazy": False, "weight_decay": 0.1}]}
    )  # fmt: skip
    assert [one.hyper["lazy"] for one in terms(made)] == [True, False]
    assert not terms(apply_patch(made, {"optimizer": {"lazy": False}}))[0].hyper["lazy"]
    (first, _) = with_overrides(terms(made), '{"default": {"lazy": false}}', "F32")
    assert not first.hyper["lazy"]
    with pytest.raises(InvalidRequest, match=r"groups.*set weight_decay 0"):
        apply_patch(made, {"groups": [{"name": "off", "lazy": True}]})
    with pytest.raises(InvalidRequest, match="set weight_decay 0"):
        with_overrides(terms(made), '{"default": {"weight_decay": 0.5}}', "F32")


def test_equal_and_zero_step_sizes_are_allowed():
    assert spec("rprop", step_sizes=[0, 0]).optimizer.step_sizes == (0.0, 0.0)


@pytest.mark.parametrize("rule", BY_NAME)
def test_preset_torch_changes_what_torch_has_otherwise(rule):
    if rule in UNTORCHED:
        error = refused(rule, preset="torch")
        assert error["field"] == "optimizer.preset"
        assert f"torch has no rule {rule}" in error["message"]
        assert spec(rule, preset=None) == spec(rule)
        return
    echoed = spec(rule, preset="torch").optimizer.model_dump()
    changed = {"eps_inside_sqrt": False} if rule == "rmsprop" else {}
    assert echoed == {**spec(rule).optimizer.model_dump(), **changed, "preset": "torch"}


def test_what_is_stated_beside_a_preset_stands():
    optimizer = spec("rmsprop", preset="torch", eps_inside_sqrt=True, lr=1).optimizer
    assert (optimizer.eps_inside_sqrt, optimizer.lr) == (True, 1.0)


@pytest.mark.parametrize("preset", ["keras", "Torch", "", True, 1, [], {}])
def test_other_presets_are_refused(preset):
    for rule in ("adam", "rmsprop", "lion"):
        assert "torch, or null" in refused(rule, preset=preset)["message"]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        *((rule, "decoupled_weight_decay") for rule in ("adam", "nadam", "radam")),
        *((rule, "bias_correction") for rule in ("adam", "adamw", "yogi", "lamb")),
        ("adam", "amsgrad"),
        *((rule, "nesterov") for rule in ("sgd", "lars", "muon")),
        ("rmsprop", "centered"),
        ("adam", "maximize"),
        *((rule, "lazy") for rule in sorted(LAZY)),
    ],
)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_switch_is_true_or_false(rule, name, value):
    assert "true or false" in refused(rule, **{name: value})["message"]


@pytest.mark.parametrize(
    ("rule", "wrong", "right"),
    [
        ("adam", "beta", "betas"),
        ("adam", "learning_rate", None),
        ("adam", "LR", None),
        ("adam", "weigth_decay", "weight_decay"),
        ("adam", "esp", "eps"),
        ("adam", "amsgrd", "amsgrad"),
        ("sgd", "momentun", "momentum"),
        ("sgd", "nestrov", "nesterov"),
        ("rmsprop", "eps_inside_root", "eps_inside_sqrt"),
        ("momentum", "betas", "beta"),
        ("adagrad", "initial_accumulator", "initial_accumulator_value"),
        ("adam", "x" * 10_000, None),
        ("adam", "lr\ud800", "lr"),
    ],
)
def test_a_misspelt_field_is_told_the_nearest_right_name(rule, wrong, right):
    message = refused(rule, **{wrong: 0.5})["message"]
    if right:
        assert message.endswith(f"did you mean {right!r}?")
    else:
        assert "known here: " in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("adm", "adam"), ("Adam", "adam"), ("rms_prop", "rmsprop"), ("sdg", "sgd"), ("zzz", None)],
)
def test_a_misspelt_rule_is_told_the_nearest(wrong, right):
    message = refused(wrong)["message"]
    assert f"did you mean {right!r}?" in message if right else "known here: " in message


@pytest.mark.parametrize("optimizer", [None, {}, [], "adam", 1, {"rule": 1}, {"rule": ["adam"]}])
def test_an_optimizer_names_its_rule(optimizer):
    with pytest.raises(InvalidRequest, match=r"adam"):
        parse_spec({"optimizer": optimizer})


@pytest.mark.parametrize("rule", BY_NAME)
@pytest.mark.parametrize("name", SOON)
def test_later_fields_are_not_supported_yet(rule, name):
    with pytest.raises(NotSupportedYet, match=name) as caught:
        spec(rule, **{name: True})
    assert caught.value.context["field"] == f"optimizer.{name}"


def test_a_number_beyond_the_master_dtype_is_refused():
    assert "F32" in refused("adam", lr=1e39)["message"]
    assert "F32" in refused("rprop", step_sizes=[0, 1e39])["message"]
    wide, _ = parse_spec({"optimizer": {"rule": "adam", "lr": 1e39}, "dtype": "F64"})
    assert wide.optimizer.lr == 1e39


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "mps", "CPU", "cpu:0"])
def test_another_device_is_not_available(device):
    with pytest.raises(DeviceUnavailable, match="CPU only"):
        parse_spec({"optimizer": {"rule": "adam"}, "device": device})
