"""Specifications: parsed, echoed, compared with what an attaching worker states, patched."""

import json

import pytest

from service.errors import (
    DeviceUnavailable,
    InvalidRequest,
    NotSupportedYet,
    ServiceError,
    Structural,
)
from service.schemas import apply_patch, diff, parse_spec

ADAM = {"optimizer": {"rule": "adam"}}


def parse(**fields):
    return parse_spec({**ADAM, **fields})


def message(**fields):
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    json.dumps(caught.value.problem(), allow_nan=False)
    return caught.value.detail


def test_everything_is_normalised_and_echoed():
    spec, stated = parse_spec({"optimizer": {"rule": "adam", "lr": 1, "betas": [0, 0.5]}})
    assert spec.model_dump(mode="json") == {
        "optimizer": {
            **{"rule": "adam", "lr": 1.0, "betas": [0.0, 0.5], "eps": 1e-8},
            **{"weight_decay": 0.0, "amsgrad": False, "maximize": False, "preset": None},
            "lazy": False,
            **{"decoupled_weight_decay": False, "bias_correction": True},
        },
        "groups": [],
        "clip": None,
        "schedule": None,
        "ema": None,
        "norms": False,
        "device": "cpu",
        "dtype": "F32",
        "update": {
            **{"mode": "async", "max_staleness": None, "on_stale": "refuse", "workers": None},
            **{"quorum": None, "min_contributions": 1, "on_lost": "shrink", "lease_s": 120.0},
            **{"round_timeout_s": None, "reduce": "mean", "trim": None, "order": "arrival"},
            **{"max_norm": None, "on_max_norm": "refuse", "slack": None},
        },
        "push": "gradient",
        "missing": "refuse",
        "on_nonfinite": "refuse",
        "durability": "none",
        "log_slots": 16,
    }
    assert stated == {"optimizer": {"rule": "adam", "lr": 1.0, "betas": [0.0, 0.5]}}
    assert json.loads(spec.model_dump_json()) == spec.model_dump(mode="json")
    assert parse_spec(spec.model_dump(mode="json"))[0] == spec


@pytest.mark.parametrize("body", [None, [], "adam", 1, True, [ADAM]])
def test_a_specification_is_an_object(body):
    with pytest.raises(InvalidRequest, match="Send an object"):
        parse_spec(body)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("optimiser", "did you mean 'optimizer'?"),
        ("dtypes", "did you mean 'dtype'?"),
        ("on_nonfinit", "did you mean 'on_nonfinite'?"),
        ("param", "did you mean 'params'?"),
        ("updates", "did you mean 'update'?"),
        ("zzzzzz", "known here: "),
        ("\ud800", "known here: "),
        ("", "known here: "),
    ],
)
def test_a_misspelt_field_is_told_the_nearest_right_name(field, hint):
    assert hint in message(**{field: 1})


def test_a_misspelt_field_of_update_is_told_the_nearest_right_name():
    assert "did you mean 'max_staleness'?" in message(update={"max_stalenes": 1})


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, "1", True, 1 << 63, 10**400, [1]])
def test_max_staleness_is_a_count(value):
    assert "max_staleness" in message(update={"max_staleness": value})


@pytest.mark.parametrize("value", [0, 1, (1 << 63) - 1, None])
def test_max_staleness_at_its_edges(value):
    assert parse(update={"max_staleness": value})[0].update.max_staleness == value


def test_scaling_needs_a_bound_to_begin_at():
    assert "max_staleness" in message(update={"on_stale": "scale"})
    assert parse(update={"on_stale": "scale", "max_staleness": 0})[0].update.on_stale == "scale"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("dtype", v) for v in ("F16", "BF16", "f32", "float32", 32, None, [])],
        *[("on_nonfinite", v) for v in ("ignore", None, 1, True)],
        *[("update", v) for v in (None, "async", [], 1)],
        *[("missing", v) for v in ("ignore", None)],
        *[("durability", v) for v in ("nothing", None)],
        *[("log_slots", v) for v in (3, 4097, "8", None)],
        *[("device", v) for v in ("", "x" * 65, None, 0)],
    ],
)
def test_other_values_are_refused(field, value):
    assert message(**{field: value}).startswith(f"{field}: ")


LATER = [{name: {}} for name in ("overrides", "grad_scale", "preset")]


@pytest.mark.parametrize("fields", LATER, ids=json.dumps)
def test_what_comes_later_is_refused_by_name_and_never_ignored(fields):
    with pytest.raises(NotSupportedYet) as caught:
        parse(**fields)
    assert caught.value.context["field"] == next(iter(fields))
    assert "not supported yet" in caught.value.detail


SYNC = {"mode": "sync", "workers": 4, "round_timeout_s": 5}
BOUNDED = {"mode": "bounded", "slack": 2}


@pytest.mark.parametrize(
    ("field", "update"),
    [
        ("workers", {"mode": "sync", "round_timeout_s": 5}),
        ("round_timeout_s", {"mode": "sync", "workers": 2}),
        ("slack", {"mode": "bounded"}),
        *[("workers", {**SYNC, "workers": v}) for v in (0, -1, 1.5, True, "4", 100_001)],
        *[("quorum", {**SYNC, "quorum": v}) for v in (0, 5, 100_001)],
        *[("min_contributions", {**SYNC, "min_contributions": v}) for v in (0, 5)],
        ("min_contributions", {**SYNC, "quorum": 2, "min_contributions": 3}),
        *[("round_timeout_s", {**SYNC, "round_timeout_s": v}) for v in (0, -1, 604_801, "5")],
        *[("on_lost", {**SYNC, "on_lost": v}) for v in ("", 1, None)],
        *[("reduce", {**SYNC, "reduce": v}) for v in ("max", None)],
        *[("order", {**SYNC, "order": v}) for v in ("random", None)],
        *[("trim", {**SYNC, "reduce": "trimmed_mean", "trim": v}) for v in (0.5, -0.1, 1)],
        ("trim", {**SYNC, "reduce": "trimmed_mean"}),
        ("trim", {**SYNC, "trim": 0.1}),
        *[("max_norm", {**SYNC, "max_norm": v}) for v in (0, -1, "1")],
        ("on_max_norm", {**SYNC, "on_max_norm": "clip"}),
        *[("slack", {**BOUNDED, "slack": v}) for v in (-1, 0.5, "1")],
        *[("lease_s", {"lease_s": v}) for v in (0, 0.5, 86_401, 31_536_000, None)],
    ],
)
def test_bad_updates(field, update):
    assert message(update=update).startswith(f"update.{field}: ")


@pytest.mark.parametrize(
    ("mode", "field", "value"),
    [
        *[
            ("sync", field, value)
            for field, value in (
                *(("workers", 2), ("quorum", 1), ("min_contributions", 2), ("on_lost", "wait")),
                *(("round_timeout_s", 1), ("reduce", "sum"), ("trim", 0.1), ("order", "worker")),
                *(("max_norm", 1.0), ("on_max_norm", "clip")),
            )
        ],
        ("bounded", "slack", 1),
        ("async", "max_staleness", 1),
        ("async", "on_stale", "scale"),
    ],
)
def test_fields_of_another_mode_name_it(mode, field, value):
    for other in ({"mode": "async"}, SYNC, BOUNDED):
        if other["mode"] == mode:
            continue
        found = message(update={**other, field: value})
        assert found.startswith(f"update.{field}: It belongs to mode {mode} and the mode is")


def test_what_is_echoed_may_be_sent_again():
    for update in ({}, SYNC, BOUNDED, {**SYNC, "reduce": "trimmed_mean", "trim": 0.25}):
        spec, _ = parse(update=update)
        assert parse_spec(spec.model_dump(mode="json"))[0] == spec


def test_a_log_has_room_for_two_rounds():
    assert parse(durability="log", update=SYNC)[0].log_slots == 16
    assert parse(durability="log", update={**SYNC, "workers": 20})[0].log_slots == 42
    assert message(durability="log", log_slots=9, update=SYNC).startswith("log_slots: ")
    many = {**SYNC, "workers": 2048}
    assert message(durability="log", update=many).startswith("update.workers: ")
    assert parse(durability="snapshot", update={**SYNC, "workers": 5000})[0].log_slots == 16


def test_many_errors_come_together():
    with pytest.raises(InvalidRequest) as caught:
        parse(dtype="F16", on_nonfinite=3, update={"max_staleness": -1})
    fields = {item["field"] for item in caught.value.context["errors"]}
    assert fields == {"dtype", "on_nonfinite", "update.max_staleness"}


CREATED = {
    "optimizer": {"rule": "adam", "lr": 0.1, "betas": [0.8, 0.9]},
    "update": {"max_staleness": 4},
}


@pytest.mark.parametrize(
    "attaching",
    [
        {"optimizer": {"rule": "adam"}},
        {"optimizer": {"rule": "adam", "eps": 1e-8}},  # a default, stated
        {"optimizer": {"rule": "adam", "lr": 0.1, "betas": [0.8, 0.9]}},
        {"optimizer": {"rule": "adam"}, "update": {}},
        {"optimizer": {"rule": "adam"}, "update": {"mode": "async", "max_staleness": 4}},
        {"optimizer": {"rule": "adam"}, "device": "cpu", "dtype": "F32", "durability": "none"},
    ],
)
def test_equal_and_unstated_fields_attach(attaching):
    spec, _ = parse_spec(CREATED)
    assert diff(spec, parse_spec(attaching)[1]) == []


@pytest.mark.parametrize(
    ("attaching", "found"),
    [
        ({"optimizer": {"rule": "adam", "lr": 0.2}}, [("optimizer.lr", 0.1, 0.2)]),
        (
            {"optimizer": {"rule": "adam", "betas": [0.8, 0.999]}},
            [("optimizer.betas", [0.8, 0.9], [0.8, 0.999])],
        ),
        ({"optimizer": {"rule": "sgd"}}, [("optimizer.rule", "adam", "sgd")]),
        (
            {"optimizer": {"rule": "sgd", "momentum": 0.9}},
            [("optimizer.rule", "adam", "sgd"), ("optimizer.momentum", None, 0.9)],
        ),
        (
            {"optimizer": {"rule": "adam"}, "update": {"max_staleness": None}},
            [("update.max_staleness", 4, None)],
        ),
        ({"optimizer": {"rule": "adam"}, "dtype": "F64"}, [("dtype", "F32", "F64")]),
    ],
)
def test_stated_differences_are_listed(attaching, found):
    spec, _ = parse_spec(CREATED)
    differences = diff(spec, parse_spec(attaching)[1])
    listed = [(item["field"], item["ours"], item["yours"]) for item in differences]
    assert sorted(listed, key=str) == sorted(found, key=str)


@pytest.mark.parametrize(
    ("rule", "change", "expected"),
    [
        ("adam", {"optimizer": {"lr": 0.5}}, {"lr": 0.5}),
        ("adam", {"optimizer": {"rule": "adam", "eps": 0}}, {"eps": 0.0}),
        ("adam", {"optimizer": {"betas": [0.1, 0.2]}}, {"betas": [0.1, 0.2]}),
        ("adam", {"optimizer": {"amsgrad": False}}, {"amsgrad": False}),
        ("adam", {"optimizer": {"maximize": True}}, {"maximize": True}),
        ("adamw", {"optimizer": {"weight_decay": 0}}, {"weight_decay": 0.0}),
        ("rmsprop", {"optimizer": {"eps_inside_sqrt": False}}, {"eps_inside_sqrt": False}),
        ("adagrad", {"optimizer": {"initial_accumulator_value": 0}}, {}),
        ("sgd", {"optimizer": {"dampening": 0.5}}, {"dampening": 0.5}),
    ],
)
def test_a_patch_changes_only_what_it_names(rule, change, expected):
    spec, _ = parse_spec({"optimizer": {"rule": rule}})
    before = spec.model_dump(mode="json")
    after = apply_patch(spec, change).model_dump(mode="json")
    assert after == {**before, "optimizer": {**before["optimizer"], **expected}}
    assert spec.model_dump(mode="json") == before


def test_a_patch_of_policies():
    spec, _ = parse_spec(CREATED)
    after = apply_patch(spec, {"on_nonfinite": "skip", "update": {"on_stale": "scale"}})
    assert (after.on_nonfinite, after.update.on_stale) == ("skip", "scale")
    assert after.update.max_staleness == 4
    assert after.optimizer == spec.optimizer
    with pytest.raises(InvalidRequest, match="max_staleness"):
        apply_patch(after, {"update": {"max_staleness": None}})


@pytest.mark.parametrize(
    ("optimizer", "change", "field"),
    [
        ({"rule": "adam"}, {"optimizer": {"rule": "sgd"}}, "optimizer.rule"),
        ({"rule": "adam"}, {"optimizer": {"rule": "adamw"}}, "optimizer.rule"),
        ({"rule": "adam"}, {"optimizer": {"rule": "sgd", "momentum": 1}}, "optimizer.rule"),
        ({"rule": "adam"}, {"optimizer": {"amsgrad": True}}, "optimizer.amsgrad"),
        ({"rule": "adamw", "amsgrad": True}, {"optimizer": {"amsgrad": False}}, None),
        ({"rule": "rmsprop"}, {"optimizer": {"centered": True}}, "optimizer.centered"),
        ({"rule": "rmsprop"}, {"optimizer": {"momentum": 0.9}}, "optimizer.momentum"),
        ({"rule": "sgd"}, {"optimizer": {"momentum": 0.9}}, "optimizer.momentum"),
        ({"rule": "sgd", "momentum": 0.9}, {"optimizer": {"momentum": 0}}, "optimizer.momentum"),
        ({"rule": "adagrad"}, {"optimizer": {"initial_accumulator_value": 1}}, None),
        ({"rule": "adam"}, {"dtype": "F64"}, "dtype"),
    ],
)
def test_what_needs_other_arrays_is_structural(optimizer, change, field):
    spec, _ = parse_spec({"optimizer": optimizer})
    with pytest.raises(Structural) as caught:
        apply_patch(spec, change)
    if field:
        assert caught.value.context["field"] == field


def test_another_momentum_needs_no_other_array():
    spec, _ = parse_spec({"optimizer": {"rule": "sgd", "momentum": 0.9}})
    assert apply_patch(spec, {"optimizer": {"momentum": 0.5}}).optimizer.momentum == 0.5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({}, InvalidRequest),
        ([], InvalidRequest),
        (None, InvalidRequest),
        ({"optimizer": None}, InvalidRequest),
        ({"update": None}, InvalidRequest),
        ({"params": {"w": 1}}, InvalidRequest),
        ({"optimizer": {"lr": -1}}, InvalidRequest),
        ({"optimizer": {"momentum": 0.9}}, InvalidRequest),
        ({"optimizer": {"lr": float("inf")}}, InvalidRequest),
        ({"lr": 0.1}, InvalidRequest),
        ({"\ud800": 1}, InvalidRequest),
        ({"optimizer": {"rule": "lion"}}, Structural),
        ({"optimizer": {"rule": "muon"}}, Structural),
        ({"optimizer": {"capturable": True}}, NotSupportedYet),
        ({"ema": {"decay": 0.9}}, Structural),
        ({"clip": {}}, InvalidRequest),
        ({"schedule": {"kind": "cosine"}}, InvalidRequest),
        ({"groups": {}}, InvalidRequest),
        ({"groups": [{"name": "none", "lr": 1}]}, InvalidRequest),
        ({"groups": [{"lr": 1}]}, InvalidRequest),
        ({"groups": [1]}, InvalidRequest),
        ({"update": {"mode": "sync"}}, Structural),
        ({"update": {"mode": "bounded", "slack": 1}}, Structural),
        ({"update": {"quorum": 2}}, InvalidRequest),
        ({"push": "delta"}, Structural),
        ({"durability": "log"}, Structural),
        ({"log_slots": 32}, Structural),
        ({"device": "cuda:0"}, DeviceUnavailable),
    ],
)
def test_bad_patches(change, error):
    spec, _ = parse_spec(ADAM)
    with pytest.raises(ServiceError) as caught:
        apply_patch(spec, change)
    assert type(caught.value) is error
    json.dumps(caught.value.problem(), allow_nan=False)


@pytest.mark.parametrize("change", [{"reduce": "sum"}, {"order": "worker"}, {"mode": "async"}])
def test_what_a_round_keeps_is_structural(change):
    spec, _ = parse(update=SYNC)
    with pytest.raises(Structural):
        apply_patch(spec, {"update": change})


def test_the_barrier_may_be_patched():
    spec, _ = parse(update=SYNC)
    changed = apply_patch(spec, {"update": {"workers": 8, "quorum": 6, "round_timeout_s": 60}})
    assert (changed.update.workers, changed.update.closes_at) == (8, 6)
