"""The specification of a session: what is trained how. Parsed, compared, patched."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationError

from gradpost.protocol.dtypes import NUMPY
from service.errors import (
    DeviceUnavailable,
    InvalidRequest,
    NotSupportedYet,
    ServiceError,
    Structural,
)
from service.hyper import (
    BY_NAME,
    REASONS,
    SOON_RULES,
    AnyRule,
    Optimizer,
    Strict,
    has_buffer,
    nearest,
)

_LATER = "other update modes come later; this version has async"


class Update(Strict):
    """When a pushed gradient is applied."""

    soon: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("workers", "quorum", "min_contributions", "on_lost"), _LATER),
        **dict.fromkeys(("round_timeout_s", "slack", "reduce", "order", "trim"), _LATER),
        **dict.fromkeys(("max_norm", "weight", "lease_s"), _LATER),
    }
    mode: Literal["async"] = Field("async", description="Applied on arrival.")
    max_staleness: int | None = Field(
        None, ge=0, lt=1 << 63, description="Versions a gradient may be behind; null: any number."
    )
    on_stale: Literal["refuse", "scale"] = Field(
        "refuse",
        description="A staler gradient: refused, or its lr divided by 1 + staleness.",
    )


class Spec(Strict):
    """Everything that a session is created with, but its parameters."""

    soon: ClassVar[dict[str, str]] = {
        "groups": "parameter groups; one set of hyperparameters rules the whole session",
        "schedule": "schedules; PATCH lr between steps instead",
        "clip": "gradient clipping; clip in the trainer",
        "overrides": "overrides per push; PATCH the session instead",
        "grad_scale": "loss scaling; divide the gradient in the trainer",
        "push": "pseudo-gradients (push: delta); send start - end as a gradient",
        "ema": "averages of parameters",
        "log_slots": "durability log",
        "preset": "named presets of defaults",
    }
    beside: ClassVar[tuple[str, ...]] = ("params",)
    optimizer: Optimizer
    device: str = Field("cpu", min_length=1, max_length=64)
    dtype: Literal["F32", "F64"] = Field("F32", description="Of parameters and state.")
    update: Update = Update()
    missing: Literal["refuse"] = Field("refuse", description="A push holds every tensor.")
    on_nonfinite: Literal["refuse", "skip"] = Field(
        "refuse", description="A gradient with NaN or infinity: 422, or skipped and consumed."
    )
    durability: Literal["none"] = Field("none", description="A crash loses the session.")


class CreateSession(Spec):
    """The body of a creation: a specification and, for small models, the parameters."""

    params: dict[str, Any] | None = Field(
        None, description="Tensor name → nested lists of numbers, in order of the layout."
    )


_VALUES_SOON: dict[tuple[str, ...], dict[Any, str]] = {
    ("missing",): {"skip": "pushes without some tensors"},
    ("durability",): {"snapshot": "snapshots on disk", "log": "the log on disk"},
    ("update", "mode"): {"sync": _LATER, "bounded": _LATER},
}
_STRUCTURAL = ("device", "dtype", "missing", "durability")


def parse_spec(obj: object) -> tuple[Spec, dict[str, Any]]:
    """Validates a specification.

    Returns:
        The whole of it, and only what the request stated (nested, normalised).

    Raises:
        InvalidRequest: Unknown fields, wrong types, values out of range.
        NotSupportedYet: Fields or values that later versions know.
        DeviceUnavailable: Another device than the CPU.
    """
    if not isinstance(obj, dict):
        raise invalid("", 'Send an object, such as {"optimizer": {"rule": "adam"}}.')
    _refuse_soon(obj)
    try:
        spec = Spec.model_validate(obj)
    except ValidationError as error:
        raise from_pydantic(error) from None
    except (OverflowError, RecursionError):
        raise invalid("", "A number does not fit a float64; send finite numbers.") from None
    _check_range(spec)
    if spec.update.on_stale == "scale" and spec.update.max_staleness is None:
        raise invalid("update.on_stale", "scale needs max_staleness: from where on to scale.")
    if spec.device != "cpu":
        raise DeviceUnavailable(
            f"Device {spec.device!r} is not available: this version computes on the CPU only; "
            "say cpu or leave device out.",
            device=spec.device,
            available=["cpu"],
        )
    return spec, spec.model_dump(mode="json", exclude_unset=True)


def _check_range(spec: Spec) -> None:
    """Refuses numbers that are infinite in the dtype that the kernels compute in."""
    largest = float(np.finfo(NUMPY[spec.dtype]).max)
    for name, value in spec.optimizer:
        if isinstance(value, float) and abs(value) > largest:
            raise invalid(
                f"optimizer.{name}",
                f"At most {largest:.9g} in size, the largest number of {spec.dtype}.",
            )


def _refuse_soon(obj: dict[str, Any]) -> None:
    """Refuses values of later versions by name, before pydantic calls them merely wrong."""
    for path, values in _VALUES_SOON.items():
        found: Any = obj
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str) and found in values:
            raise NotSupportedYet(
                f"{'.'.join(path)}: {found} is not supported yet ({values[found]}).",
                field=".".join(path),
            )
    optimizer = obj.get("optimizer")
    rule = optimizer.get("rule") if isinstance(optimizer, dict) else None
    if not isinstance(rule, str) or rule in BY_NAME:
        return
    if rule in SOON_RULES:
        raise NotSupportedYet(
            f"Rule {rule} is not supported yet; this version has {', '.join(BY_NAME)}.",
            field="optimizer.rule",
        )
    raise invalid("optimizer.rule", f"There is no rule {rule[:80]!r}; {nearest(rule, [*BY_NAME])}")


def diff(spec: Spec, stated: dict[str, Any]) -> list[dict[str, Any]]:
    """Stated fields that differ from a specification, as field, ours and yours."""
    return _diff(spec.model_dump(mode="json"), stated, "")


def _diff(ours: dict[str, Any], yours: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    found = []
    for name, value in yours.items():
        mine = ours.get(name)
        if isinstance(mine, dict) and isinstance(value, dict):
            found += _diff(mine, value, f"{prefix}{name}.")
        elif mine != value:
            found.append({"field": prefix + name, "ours": mine, "yours": value})
    return found


def apply_patch(spec: Spec, patch: object) -> Spec:
    """The specification with the patch's fields replaced.

    Raises:
        Structural: A field that needs other arrays.
        InvalidRequest: As `parse_spec`.
    """
    if not isinstance(patch, dict) or not patch:
        raise invalid("", 'Send an object with the fields to change, as {"optimizer": {"lr": 1}}.')
    if "params" in patch:
        raise invalid("params", "A PATCH changes no parameters; PUT them to the session's params.")
    base = spec.model_dump(mode="json")
    for name, value in patch.items():
        if name in ("optimizer", "update") and isinstance(value, dict):
            base[name] = {**base[name], **value}
        else:
            base[name] = value
    rule = base["optimizer"].get("rule") if isinstance(base["optimizer"], dict) else None
    if isinstance(rule, str) and rule in BY_NAME and rule != spec.optimizer.rule:
        raise _structural("optimizer.rule")
    changed, _ = parse_spec(base)
    for name in _STRUCTURAL:
        if getattr(changed, name) != getattr(spec, name):
            raise _structural(name)
    _check_arrays(spec.optimizer, changed.optimizer)
    return changed


def _check_arrays(old: AnyRule, new: AnyRule) -> None:
    for name in sorted(old.structural):
        if getattr(old, name) != getattr(new, name):
            raise _structural(f"optimizer.{name}")
    if has_buffer(old) != has_buffer(new):
        raise _structural("optimizer.momentum")


def _structural(field: str) -> Structural:
    return Structural(
        f"{field} decides which arrays a session has and is fixed at its creation; create another "
        "session and upload the parameters there.",
        field=field,
    )


def invalid(field: str, message: str) -> InvalidRequest:
    """One wrong field as a refusal."""
    where = f"{field}: " if field else ""
    return InvalidRequest(where + message, errors=[{"field": field, "message": message}])


def from_pydantic(error: ValidationError) -> ServiceError:
    """Pydantic's findings as one of our refusals, with no input echoed that JSON can't carry."""
    errors = []
    for item in error.errors(include_url=False, include_context=True, include_input=False):
        path = [str(part) for part in item["loc"]]
        # The discriminated union puts the rule's name into the path; nobody wrote it there.
        if len(path) > 1 and path[0] == "optimizer" and path[1] in BY_NAME:
            del path[1]
        context = item.get("ctx", {})
        if item["type"] in ("not_supported_yet", "unknown_field"):
            path.append(str(context.get("field", "")))
        elif item["type"].startswith("union_tag"):
            path.append("rule")
        elif item["type"] == "nesterov":
            path.append("nesterov")
        field = ".".join(path)
        if item["type"] == "not_supported_yet":
            return NotSupportedYet(f"{field}: {item['msg']}", field=field)
        errors.append({"field": field[:200], "message": _sentence(item["type"], path, item["msg"])})
    first = errors[0]
    return InvalidRequest(f"{first['field']}: {first['message']}", errors=errors[:20])


def _sentence(kind: str, path: list[str], message: str) -> str:
    """What was wrong, and what to send instead."""
    name = next((part for part in reversed(path) if not part.isdigit()), "")
    if kind.startswith("union_tag"):
        return f"Name the rule: one of {', '.join(BY_NAME)}."
    if kind in ("missing", "model_type", "model_attributes_type") and name == "optimizer":
        return 'Send an object that names the rule, such as {"rule": "adam"}.'
    if kind == "model_type":
        return "Send an object, or leave it out."
    if name in REASONS and kind not in ("unknown_field", "nesterov"):
        return f"{message}: {REASONS[name]}."
    return message if message.endswith((".", "?")) else message + "."
