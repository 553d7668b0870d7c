"""The server's optimizer state as torch's `state_dict` has it, and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradpost.answers import State
from gradpost.torch.names import Entry
from gradpost.torch.tensors import MASTERS, to_tensor

SCALARS: Mapping[str, tuple[str, ...]] = {"nadam": ("mu_product",), "asgd": ("eta", "mu")}
"""Numbers that a rule keeps beside a tensor's arrays; torch has a tensor for each."""

FROM_THE_START = frozenset({"adagrad"})
"""torch makes the state of these in the constructor, and that of others at the first step."""

STEPLESS = frozenset({"sgd"})
"""torch keeps no step of these: a momentum buffer is there, or the first step is yet to come."""

INITIAL: Mapping[str, Mapping[str, str]] = {
    "adagrad": {"sum": "initial_accumulator_value"},
    "yogi": {"exp_avg_sq": "initial_accumulator_value"},
}
"""Arrays that start at a hyperparameter and not at 0."""


def _slots(tensors: Iterable[str]) -> dict[str, list[str]]:
    """The arrays of each tensor, out of `<slot>/<tensor>`."""
    found: dict[str, list[str]] = {}
    for key in tensors:
        slot, _, name = key.partition("/")
        found.setdefault(name, []).append(slot)
    return found


def _scalar(value: float) -> torch.Tensor:
    """As torch keeps it: float32, or float64 where that is the default dtype."""
    wide = torch.get_default_dtype() == torch.float64
    return torch.tensor(float(value), dtype=torch.float64 if wide else torch.float32)


def to_torch(
    state: State, entries: Iterable[Entry], rules: Sequence[str], *, steps: bool
) -> dict[torch.Tensor, dict[str, Any]]:
    """The `state` of torch: by parameter, with torch's names and kinds, on the CPU.

    Args:
        state: The server's.
        entries: The parameters.
        rules: Of each group.
        steps: Keep the step also where torch has none.
    """
    slots = _slots(state.tensors)
    found: dict[torch.Tensor, dict[str, Any]] = {}
    for param, name, group in entries:
        rule, count = rules[group], state.counts[name]
        if not count and rule not in FROM_THE_START:
            continue
        own: dict[str, Any] = {}
        if steps or rule not in STEPLESS:
            own["step"] = _scalar(count)
        own |= {one: _scalar(value) for one, value in state.scalars.get(name, {}).items()}
        for slot in slots.get(name, ()):
            own[slot] = to_tensor(state.tensors[f"{slot}/{name}"].copy())
        if own:
            found[param] = own
    return found


def by_param(
    groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]
) -> dict[torch.Tensor, Mapping[str, Any]]:
    """A saved state by parameter: as torch does, by place, whatever the names."""
    ids = [one for group in saved["param_groups"] for one in group["params"]]
    params = [param for group in groups for param in group["params"]]
    found = saved["state"]
    return {param: found[one] for param, one in zip(params, ids, strict=True) if one in found}


def from_torch(
    now: State,
    saved: Mapping[torch.Tensor, Mapping[str, Any]],
    entries: Sequence[Entry],
    rules: Sequence[str],
    hyper: Mapping[int, Mapping[str, Any]],
    master: str,
) -> State:
    """The server's state out of torch's.

    Args:
        now: The server's at present: which arrays it has, and an average of the parameters, which
            torch does not know.
        saved: torch's, by parameter; one that is not there was never updated.
        entries: The parameters.
        rules: Of each group.
        hyper: What the server holds for each group.
        master: The session's dtype.

    Raises:
        ValueError: An array is missing, or one is there that the session has no place for.
    """
    slots = _slots(now.tensors)
    tensors, counts, scalars = dict(now.tensors), dict(now.counts), dict(now.scalars)
    step = 0
    for param, name, group in entries:
        rule, own = rules[group], saved.get(param, {})
        _check_room(name, rule, own, slots.get(name, []), tuple(param.shape))
        count, said = _count(name, rule, own)
        counts[name], step = count, max(step, said)
        scalars.pop(name, None)
        if count and rule in SCALARS:
            scalars[name] = {one: float(_needed(own, one, name)) for one in SCALARS[rule]}
        for slot in slots.get(name, ()):
            key = f"{slot}/{name}"
            if own.get(slot) is not None:
                tensors[key] = _array(own[slot], master)
            elif slot != "ema":
                if count:
                    _needed(own, slot, name)
                start = INITIAL.get(rule, {}).get(slot)
                value = 0.0 if start is None else hyper[group][start]
                tensors[key] = np.full_like(now.tensors[key], value)
    if all(rules[entry.group] in STEPLESS for entry in entries) and not step:
        step = now.step
    return State(tensors, counts, step, now.rule, scalars)


def same(one: State, other: State) -> bool:
    """Whether two states are equal, whenever they were read."""
    return (
        (one.counts, one.step, one.rule) == (other.counts, other.step, other.rule)
        and one.scalars == other.scalars
        and one.tensors.keys() == other.tensors.keys()
        and all(np.array_equal(array, other.tensors[key]) for key, array in one.tensors.items())
    )


def _count(name: str, rule: str, own: Mapping[str, Any]) -> tuple[int, int]:
    """Updates of a tensor, and the step that its state says."""
    said = int(own["step"]) if "step" in own else 0
    if rule not in STEPLESS:
        if own and "step" not in own:
            _needed(own, "step", name)
        return said, said
    return said or int(own.get("momentum_buffer") is not None), said


def _needed(own: Mapping[str, Any], key: str, name: str) -> Any:
    value = own.get(key)
    if value is None:
        raise ValueError(
            f"The loaded state of {name!r} has no {key}, and this optimizer needs it: was it "
            "saved by another rule, or with other options (amsgrad, centered, momentum)?"
        )
    return value


def _check_room(
    name: str, rule: str, own: Mapping[str, Any], slots: Sequence[str], shape: tuple[int, ...]
) -> None:
    """Refuses arrays that the session has no place for: they would be lost."""
    others = {"step", "ema", *SCALARS.get(rule, ()), *slots}
    for key, value in own.items():
        if key not in others and isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
            raise ValueError(
                f"The loaded state of {name!r} has {key}, and this optimizer was made without: "
                "make it by the rule and options that the state was saved with."
            )


def _array(value: torch.Tensor, master: str) -> NDArray[Any]:
    array: NDArray[Any] = value.detach().to("cpu", MASTERS[master]).numpy()
    return array
