"""From what pydantic finds to a refusal that says what to do."""

from collections.abc import Sequence

from pydantic import ValidationError

from service.errors import InvalidRequest, NotSupportedYet, ServiceError
from service.hyper import BY_NAME, REASONS
from service.schemas.around import KINDS

_OURS = ("unknown_field", "nesterov", "preset", "lazy", "clip", "schedule")
"""Findings whose sentence needs no reason added."""


def invalid(field: str, message: str) -> InvalidRequest:
    """One wrong field as a refusal."""
    where = f"{field}: " if field else ""
    return InvalidRequest(where + message, errors=[{"field": field, "message": message}])


def from_pydantic(error: ValidationError, under: Sequence[str] = ()) -> ServiceError:
    """Pydantic's findings as one of our refusals, with no input echoed that JSON can't carry.

    Args:
        error: The findings.
        under: Where in the document the validated part stands.
    """
    errors = []
    for item in error.errors(include_url=False, include_context=True, include_input=False):
        path, rule = _written([str(part) for part in item["loc"]])
        path = [*under, *path]
        context = item.get("ctx", {})
        if item["type"] in ("not_supported_yet", "unknown_field"):
            path.append(str(context.get("field", "")))
        elif item["type"].startswith("union_tag"):
            path.append("kind" if path[-1:] == ["schedule"] else "rule")
        elif item["type"] == "nesterov":
            path.append("nesterov")
        field = ".".join(path)
        if item["type"] == "not_supported_yet":
            return NotSupportedYet(f"{field}: {item['msg']}", field=field)
        message = _sentence(item["type"], path, item["msg"], rule)
        errors.append({"field": field[:200], "message": message})
    first = errors[0]
    return InvalidRequest(f"{first['field']}: {first['message']}", errors=errors[:20])


def _written(path: list[str]) -> tuple[list[str], str]:
    """The path without the tag that a discriminated union puts into it, and that tag."""
    at = 1 if path[:1] in (["optimizer"], ["schedule"]) else 0
    if len(path) > at and path[at] in (*BY_NAME, *KINDS):
        return path[:at] + path[at + 1 :], path[at]
    return path, ""


def _sentence(kind: str, path: list[str], message: str, rule: str) -> str:
    """What was wrong, and what to send instead."""
    name = next((part for part in reversed(path) if not part.isdigit()), "")
    if kind.startswith("union_tag"):
        if name == "kind":
            return f"Name the kind: one of {', '.join(KINDS)}."
        return f"Name the rule: one of {', '.join(BY_NAME)}."
    if kind in ("missing", "model_type", "model_attributes_type") and name == "optimizer":
        return 'Send an object that names the rule, such as {"rule": "adam"}.'
    if kind == "tuple_type" and name not in REASONS:
        return "Send a list."
    if kind == "model_type":
        return "Send an object, or leave it out."
    reason = REASONS.get(f"{rule}.{name}", REASONS.get(name))
    if reason and kind not in _OURS:
        return f"{message}: {reason}."
    return message if message.endswith((".", "?")) else message + "."
