"""The specification of a session: what is trained how. Parsed, compared, patched."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from service.errors import DeviceUnavailable, Structural
from service.hyper import BY_NAME, Optimizer, Strict
from service.schemas.around import Clip, Ema, Schedule
from service.schemas.groups import (
    DEFAULT,
    Group,
    Terms,
    check_rule,
    name_of,
    needs_arrays,
    structural,
    terms_of,
)
from service.schemas.refusals import from_pydantic, invalid
from service.schemas.update import Update, check_update

MOST_SLOTS = 4096


class Spec(Strict):
    """Everything that a session is created with, but its parameters."""

    soon: ClassVar[dict[str, str]] = {
        "overrides": "they belong to a push; state hyperparameters in optimizer and groups",
        "grad_scale": "it belongs to a push",
        "preset": "state it in optimizer",
    }
    beside: ClassVar[tuple[str, ...]] = ("params",)
    elsewhere: ClassVar[dict[str, str]] = {
        **{name: "optimizer" for rule in BY_NAME.values() for name in rule.model_fields},
        **dict.fromkeys(Update.model_fields, "update"),
    }
    optimizer: Optimizer
    groups: Annotated[tuple[Group, ...], Field(max_length=1000, strict=False)] = Field(
        (), description="Tensors with hyperparameters of their own; the rest are group default."
    )
    clip: Clip | None = Field(None, description="Bounds the gradient before the rule.")
    schedule: Schedule | None = Field(
        None, description="lr of each update = lr of the group times a factor of the step."
    )
    ema: Ema | None = Field(None, description="An average of the parameters, pulled as of=ema.")
    norms: bool = Field(
        False, description="Answer update_norm and param_norm too; costs a pass over both."
    )
    device: str = Field("cpu", min_length=1, max_length=64)
    dtype: Literal["F32", "F64"] = Field("F32", description="Of parameters and state.")
    update: Update = Update()
    push: Literal["gradient", "delta"] = Field(
        "gradient",
        description="delta: what is pushed is end - start of local steps; g = -delta.",
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse",
        description="A push without some tensors: refused, or those stay as they are.",
    )
    on_nonfinite: Literal["refuse", "skip"] = Field(
        "refuse", description="A gradient with NaN or infinity: 422, or skipped and consumed."
    )
    durability: Literal["none", "snapshot", "log"] = Field(
        "none",
        description="What a crash leaves: nothing, the last snapshot, every answered change.",
    )
    log_slots: int = Field(
        16, ge=4, le=MOST_SLOTS, description="Pushes that the log holds between two snapshots."
    )


class CreateSession(Spec):
    """The body of a creation: a specification and, for small models, the parameters."""

    params: dict[str, Any] | None = Field(
        None, description="Tensor name → nested lists of numbers, in order of the layout."
    )


_STRUCTURAL = ("device", "dtype", "push")
_ROUNDS = ("mode", "reduce", "order")
_ON_DISK = ("durability", "log_slots")
_NESTED = ("optimizer", "update")


def terms(spec: Spec) -> tuple[Terms, ...]:
    """What holds for each group of a session, the default one first."""
    return terms_of(spec.optimizer, spec.clip, spec.groups, spec.dtype)


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
    _check_known_rule(obj)
    try:
        spec = Spec.model_validate(obj)
    except ValidationError as error:
        raise from_pydantic(error) from None
    except (OverflowError, RecursionError):
        raise invalid("", "A number does not fit a float64; send finite numbers.") from None
    terms(spec)
    check_update(spec.update)
    spec = with_room(spec)
    if spec.device != "cpu":
        raise DeviceUnavailable(
            f"Device {spec.device!r} is not available: this version computes on the CPU only; "
            "say cpu or leave device out.",
            device=spec.device,
            available=["cpu"],
        )
    return spec, spec.model_dump(mode="json", exclude_unset=True)


def with_room(spec: Spec) -> Spec:
    """The specification whose log has room for two rounds: their contributions and their ends.

    Raises:
        InvalidRequest: It states a smaller log, or has more workers than any log has room for.
    """
    needed = 2 * (spec.update.workers or 0) + 2
    if spec.durability != "log" or spec.log_slots >= needed:
        return spec
    if "log_slots" in spec.model_fields_set:
        raise invalid(
            "log_slots",
            f"{spec.update.workers} workers need at least {needed}: two rounds of them.",
        )
    if needed > MOST_SLOTS:
        raise invalid(
            "update.workers",
            f"A session that logs holds at most {MOST_SLOTS} pushes in its log and so takes "
            f"{MOST_SLOTS // 2 - 1} workers; take durability snapshot for more.",
        )
    return spec.model_copy(update={"log_slots": needed})


def _check_known_rule(obj: dict[str, Any]) -> None:
    """Refuses a rule that there is not, with the nearest one, before pydantic lists them all."""
    optimizer = obj.get("optimizer")
    check_rule(optimizer.get("rule") if isinstance(optimizer, dict) else None, "optimizer.rule")


def diff(spec: Spec, stated: dict[str, Any]) -> list[dict[str, Any]]:
    """Stated fields that differ from a specification, as field, ours and yours."""
    return _diff(spec.model_dump(mode="json"), stated, "")


def _diff(ours: dict[str, Any], yours: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    found = []
    for name, value in yours.items():
        mine = ours.get(name)
        if isinstance(mine, dict) and isinstance(value, dict):
            found += _diff(mine, value, f"{prefix}{name}.")
        elif name == "groups" and isinstance(mine, list) and len(mine) == len(value):
            for index, (one, other) in enumerate(zip(mine, value, strict=True)):
                found += _diff(one, other, f"{prefix}groups.{index}.")
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
    # Only what was stated: a group inherits that, and not defaults that another preset gave.
    base = spec.model_dump(mode="json", exclude_unset=True)
    for name, value in patch.items():
        if name in _NESTED and isinstance(value, dict):
            base[name] = {**base.get(name, {}), **value}
        elif name == "groups":
            base[name] = _patched_groups(spec, base.get(name, []), value)
        else:
            base[name] = value
    rule = base["optimizer"].get("rule") if isinstance(base["optimizer"], dict) else None
    if isinstance(rule, str) and rule != spec.optimizer.rule:
        check_rule(rule, "optimizer.rule")
        raise needs_arrays("optimizer.rule")
    _check_mode(spec, base.get("update"))
    changed, _ = parse_spec(base)
    for name in _STRUCTURAL:
        if getattr(changed, name) != getattr(spec, name):
            raise needs_arrays(name)
    for name in _ROUNDS:
        if getattr(changed.update, name) != getattr(spec.update, name):
            raise needs_arrays(f"update.{name}")
    for name in _ON_DISK:
        if getattr(changed, name) != getattr(spec, name):
            raise Structural(
                f"{name} decides which files a session has and is fixed at its creation; create "
                "another session with it and restore a checkpoint of this one there.",
                field=name,
            )
    if (changed.ema is None) != (spec.ema is None):
        raise needs_arrays("ema")
    for old, new in zip(terms(spec), terms(changed), strict=True):
        field = structural(old.optimizer, new.optimizer)
        if field is not None:
            where = "optimizer" if old.name == DEFAULT else f"groups.{old.name}"
            raise needs_arrays(f"{where}.{field}")
    return changed


def _check_mode(spec: Spec, update: object) -> None:
    """Refuses another mode as such, before its fields are found to be missing."""
    mode = update.get("mode") if isinstance(update, dict) else None
    if mode in ("async", "sync", "bounded") and mode != spec.update.mode:
        raise needs_arrays("update.mode")


def _patched_groups(spec: Spec, base: list[dict[str, Any]], patch: object) -> list[dict[str, Any]]:
    """The groups with some fields replaced, found by name; null gives up a group's own value."""
    if not isinstance(patch, list) or not all(isinstance(item, dict) for item in patch):
        raise invalid("groups", 'A list of objects, each with the "name" of a group to change.')
    names = [name_of(group, index) for index, group in enumerate(spec.groups)]
    found = list(base)
    for index, item in enumerate(patch):
        name = item.get("name")
        if name not in names:
            raise invalid(
                f"groups.{index}.name",
                f"Name a group of the session: {', '.join(names) or 'it has none'}.",
            )
        at = names.index(name)
        if "params" in item and item["params"] != found[at]["params"]:
            raise needs_arrays(f"groups.{name}.params")
        merged = {**found[at], **{k: v for k, v in item.items() if k != "name"}}
        found[at] = {k: v for k, v in merged.items() if v is not None or k in ("name", "clip")}
    return found
