"""Parameter groups: what each states, and what holds for it in the end."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gradpost.protocol.dtypes import NUMPY
from service.errors import Structural
from service.hyper import BY_NAME, AnyRule, Optimizer, has_buffer, nearest
from service.schemas.around import Clip, GroupClip
from service.schemas.refusals import from_pydantic, invalid

DEFAULT = "default"
"""Name of the group of all tensors that no other group names."""
_ADAPTER: TypeAdapter[AnyRule] = TypeAdapter(Optimizer)
_Pattern = Annotated[str, Field(min_length=1, max_length=1024)]


class Group(BaseModel):
    """Some tensors with their own hyperparameters.

    Beside the fields below it may state a rule of its own and any hyperparameter; those it does
    not state are the session's optimizer's, also after a PATCH (a rule of its own: that rule's
    defaults).
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="For overrides and PATCH; group-1, group-2, … where absent.",
    )
    params: Annotated[
        tuple[_Pattern, ...], Field(min_length=1, max_length=100_000, strict=False)
    ] = Field(description="Names of tensors, or patterns with * ? [ ].")
    frozen: bool = Field(
        False, description="Its tensors stay as they are; their gradients may be left out."
    )
    clip: GroupClip | None = Field(None, description="Instead of the session's.")

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters it states, its rule among them."""
        return dict(self.model_extra or {})


class Terms(NamedTuple):
    """What holds for one group: every effective value."""

    name: str
    optimizer: AnyRule
    hyper: Mapping[str, Any]
    clip: Clip | GroupClip | None
    frozen: bool
    stated_lr: bool = False
    """Whether lr is that of this update, whatever the schedule says."""

    def echo(self, group: Group | None) -> dict[str, Any]:
        """As the server describes it."""
        clip = None if group is None or group.clip is None else group.clip
        return {
            "name": self.name,
            "params": ["*"] if group is None else list(group.params),
            "frozen": self.frozen,
            "clip": None if clip is None else clip.model_dump(exclude_none=True),
            **self.optimizer.model_dump(mode="json"),
        }


def parse_group(obj: Mapping[str, Any]) -> Group:
    """One group as it is stated; its hyperparameters are checked with the session's.

    Raises:
        InvalidRequest: Its own fields do not fit.
    """
    try:
        return Group.model_validate(obj)
    except ValidationError as error:
        raise from_pydantic(error, ("group",)) from None


def name_of(group: Group, index: int) -> str:
    """Its name, or the one it gets by its place."""
    return group.name or f"group-{index + 1}"


def terms_of(
    optimizer: AnyRule, clip: Clip | None, groups: Sequence[Group], dtype: str
) -> tuple[Terms, ...]:
    """What holds for the default group and for each other, in their order.

    Raises:
        InvalidRequest: Hyperparameters that do not fit, or two groups of one name.
        NotSupportedYet: Hyperparameters of later versions.
    """
    check_range(optimizer, dtype, ("optimizer",))
    found = [Terms(DEFAULT, optimizer, optimizer.model_dump(), clip, False)]
    for index, group in enumerate(groups):
        name = name_of(group, index)
        if any(name == other.name for other in found):
            raise invalid(
                f"groups.{index}.name", f"There is another group named {name!r}; rename this one."
            )
        ours = _merged(optimizer, group.hyper, ("groups", str(index)), dtype)
        found.append(Terms(name, ours, ours.model_dump(), group.clip or clip, group.frozen))
    return tuple(found)


def _merged(
    optimizer: AnyRule, stated: Mapping[str, Any], path: tuple[str, ...], dtype: str
) -> AnyRule:
    """The session's optimizer with a group's own values."""
    rule = stated.get("rule", optimizer.rule)
    base = optimizer.model_dump(exclude_unset=True) if rule == optimizer.rule else {}
    return checked({**base, **stated, "rule": rule}, path, dtype)


def checked(values: Mapping[str, Any], path: tuple[str, ...], dtype: str) -> AnyRule:
    """Validated hyperparameters.

    Raises:
        InvalidRequest: They do not fit; `path` says where they stand.
        NotSupportedYet: A field of later versions.
    """
    check_rule(values.get("rule"), ".".join((*path, "rule")))
    try:
        optimizer = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise from_pydantic(error, path) from None
    except OverflowError:
        raise invalid(".".join(path), "A number does not fit a float64.") from None
    check_range(optimizer, dtype, path)
    return optimizer


def check_range(optimizer: AnyRule, dtype: str, path: tuple[str, ...]) -> None:
    """Refuses numbers that are infinite in the dtype that the kernels compute in."""
    largest = float(np.finfo(NUMPY[dtype]).max)
    for name, value in optimizer:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and abs(number) > largest for number in numbers):
            raise invalid(
                ".".join((*path, name)),
                f"At most {largest:.9g} in size, the largest number of {dtype}.",
            )


def check_rule(rule: object, field: str) -> None:
    """Refuses a rule that there is not, by name."""
    if not isinstance(rule, str) or rule in BY_NAME:
        return
    raise invalid(field, f"There is no rule {rule[:80]!r}; {nearest(rule[:80], [*BY_NAME])}")


def with_overrides(terms: Sequence[Terms], overrides: str | None, dtype: str) -> Sequence[Terms]:
    """The terms of one update: by group name, some hyperparameters replaced.

    Args:
        terms: Of the session.
        overrides: JSON text, {group name: {field: value}}; None: no change.
        dtype: Of the session.

    Raises:
        InvalidRequest: A group or a field that does not exist, or a value out of range.
        Structural: A field that needs other arrays.
    """
    if overrides is None:
        return terms
    changes: dict[str, Any] = json.loads(overrides)
    known = [one.name for one in terms]
    for name in changes:
        if name not in known:
            raise invalid(f"overrides.{name[:80]}", f"No such group; {nearest(name[:80], known)}")
    return [
        one if one.name not in changes else _replaced(one, json.dumps(changes[one.name]), dtype)
        for one in terms
    ]


@lru_cache(maxsize=1024)
def _override(
    optimizer: AnyRule, name: str, text: str, dtype: str
) -> tuple[AnyRule, Mapping[str, Any]]:
    changes = json.loads(text)
    path = ("overrides", name)
    if not isinstance(changes, dict) or "rule" in changes or "preset" in changes:
        raise invalid(".".join(path), "An object of hyperparameters; the rule itself is fixed.")
    changed = checked({**optimizer.model_dump(), **changes}, path, dtype)
    field = structural(optimizer, changed)
    if field is not None:
        raise needs_arrays(f"overrides.{name}.{field}")
    return changed, changed.model_dump()


def _replaced(terms: Terms, text: str, dtype: str) -> Terms:
    optimizer, hyper = _override(terms.optimizer, terms.name, text, dtype)
    return terms._replace(optimizer=optimizer, hyper=hyper, stated_lr="lr" in json.loads(text))


def structural(old: AnyRule, new: AnyRule) -> str | None:
    """The first field in which two sets of hyperparameters need different arrays."""
    if old.rule != new.rule:
        return "rule"
    if old.preset != new.preset:
        return "preset"  # it fills in what a creation leaves out, and is fixed then
    for name in sorted(old.structural):
        if getattr(old, name) != getattr(new, name):
            return name
    return "momentum" if has_buffer(old) != has_buffer(new) else None


def needs_arrays(field: str) -> Structural:
    """The refusal of a change that needs other arrays."""
    return Structural(
        f"{field} decides which arrays a session has and is fixed at its creation; create another "
        "session and upload the parameters there.",
        field=field,
    )
