"""Rules and hyperparameters: torch's names, defaults and checks, and what the server holds."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

TORCH: Mapping[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}
"""The server's rules that torch has."""

HOW = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""How torch runs an optimizer, not what it computes. They stand in the groups, as torch's
`state_dict` has them, and are never sent."""

IMPLIED: Mapping[str, Mapping[str, Any]] = {"adamw": {"decoupled_weight_decay": True}}
"""What torch writes into the groups of a rule and the server knows by the rule's name."""

NO_HYPER = frozenset({"rule", "preset", "name", "params", "frozen", "clip"})
"""Members of a described group that are no hyperparameters."""

ONLY_AT_FIRST = frozenset({"initial_accumulator_value"})
"""What counts when a tensor's state is made; torch does not look at a later change either."""

_SIMPLE = frozenset({float, int, bool, tuple})


def defaults(rule: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer, as torch's own constructor makes and checks them.

    What that constructor does not know is taken as an option of the server's, which refuses it,
    with the nearest right name, if there is none.

    Args:
        rule: The server's name.
        stated: Hyperparameters by torch's names.

    Raises:
        ValueError: A value that torch refuses, or a flag of how torch would run.
    """
    for name in sorted(HOW & stated.keys()):
        if stated[name]:
            raise ValueError(
                f"{name} says how torch runs an optimizer in this process; the server runs this "
                "one: leave it out."
            )
    kind = TORCH.get(rule)
    if kind is None:
        return {name: value for name, value in stated.items() if name not in HOW}
    known = inspect.signature(kind).parameters
    made = kind([torch.zeros(1, 1)], **{n: v for n, v in stated.items() if n in known})
    return {**made.defaults, **{n: v for n, v in stated.items() if n not in known}}


def check_shape(rule: str, name: str, shape: tuple[int, ...]) -> None:
    """Refuses what a rule can't take, before the server does.

    Raises:
        ValueError: A parameter of muon that is no matrix.
    """
    if rule == "muon" and len(shape) != 2:
        raise ValueError(
            f"Muon only supports 2D parameters, and {name!r} has shape {list(shape)}: put it into "
            "a group with another rule."
        )


def group_defaults(group: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a group that has a rule of its own."""
    rule = str(group["rule"])
    kind = TORCH.get(rule)
    left_out = {*NO_HYPER, "param_names"}
    known = group.keys() - left_out if kind is None else inspect.signature(kind).parameters
    return defaults(
        rule, {name: value for name, value in group.items() if name in known and name != "params"}
    )


def plain(value: Any) -> Any:
    """A hyperparameter as JSON has it; a tensor of one element is a number."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def stated(rule: str, group: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The rule and every hyperparameter of a group, as a session is created with them.

    Args:
        rule: Of the group.
        group: One of `param_groups`.
        names: Of its hyperparameters.
    """
    found: dict[str, Any] = {"rule": rule}
    if rule in TORCH:
        found["preset"] = "torch"
    left_out = {*HOW, *IMPLIED.get(rule, ()), *NO_HYPER}
    found |= {name: plain(group[name]) for name in names if name not in left_out and name in group}
    return found


def differences(ours: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What a group has to state beside the session's optimizer: all of it under another rule."""
    if ours["rule"] != base["rule"]:
        return dict(ours)
    return {name: value for name, value in ours.items() if base.get(name) != value}


def comparable(held: Mapping[str, Any]) -> dict[str, Any]:
    """What the server holds for a group, as far as a push may replace it; lists as tuples."""
    left_out = NO_HYPER | ONLY_AT_FIRST
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in held.items()
        if name not in left_out
    }


def overrides(group: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters in which a group differs from what the server holds for it.

    Args:
        group: One of `param_groups`.
        held: As `comparable`.
    """
    found = {}
    for name, value in held.items():
        ours = group.get(name, value)
        if type(ours) in _SIMPLE and ours == value:  # the usual case, in each step
            continue
        ours = plain(ours)
        if ours != plain(value):
            found[name] = ours
    return found


def complete(group: dict[str, Any], held: Mapping[str, Any]) -> None:
    """Gives a group the server's values where it has none: of a rule that torch has not."""
    for name, value in held.items():
        if name not in NO_HYPER:
            group.setdefault(name, tuple(value) if isinstance(value, list) else value)
