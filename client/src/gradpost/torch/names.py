"""Parameters and groups: what they are called, and which of them the server keeps."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DEFAULT = "default"
"""The server's name for the group of all tensors that no other group names."""

FLOATS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

_ODD = re.compile(r"[^A-Za-z0-9._-]+")


class Entry(NamedTuple):
    """A parameter."""

    param: torch.Tensor
    name: str
    group: int
    """Its place in `param_groups`."""


def listed(params: Any) -> Any:
    """What `torch.optim.Optimizer` takes: a module is its named parameters."""
    return list(params.named_parameters()) if isinstance(params, torch.nn.Module) else params


def group_name(group: Mapping[str, Any], index: int, taken: Sequence[str]) -> str:
    """The server's name of a group: its own `name`, as far as the server can write it.

    Args:
        group: One of `param_groups`.
        index: Its place there.
        taken: The names of those before it.
    """
    if index == 0:
        return DEFAULT
    name = _ODD.sub("-", str(group.get("name", ""))).strip("-._")[:100] or f"group-{index}"
    while name in taken or name == DEFAULT:
        name = f"{name}-{index}"
    return name


def name_params(
    group: Mapping[str, Any], called: str, start: int, known: Mapping[torch.Tensor, str]
) -> dict[torch.Tensor, str]:
    """The names of a group's parameters that are not known yet, each once.

    By their own names, or param.N by their place among all. Submodules may use one name twice:
    then the group's name comes before it. A parameter that is given twice keeps its first name.

    Args:
        group: One of `param_groups`.
        called: The group's name.
        start: Parameters in the groups before it.
        known: Names of the others.

    Raises:
        ValueError: As `check`.
    """
    own = group.get("param_names")
    taken = set(known.values())
    found: dict[torch.Tensor, str] = {}
    for at, param in enumerate(group["params"]):
        if param in known or param in found:
            continue
        name = f"param.{start + at}" if own is None else str(own[at])
        while name in taken:
            name = f"{called}.{name}"
        check(param, name)
        found[param] = name
        taken.add(name)
    return found


def check(param: torch.Tensor, name: str) -> None:
    """Refuses what no session can hold.

    Raises:
        ValueError: On the meta device, sparse, complex, or of another dtype.
    """
    if param.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device and has no values; give the model some, by "
            "to_empty(device=...) and an initialisation, before the optimizer."
        )
    if param.layout != torch.strided:
        raise ValueError(f"{name!r} is {param.layout}; the server keeps dense parameters.")
    if param.requires_grad and param.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} is {param.dtype}; the server keeps "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}."
        )
