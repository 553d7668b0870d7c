"""What the OpenAPI document says of bodies, answers and refusals."""

from typing import Any

from gradpost.protocol import JSON, OCTET, PROBLEM, SAFETENSORS
from service.errors import BY_SLUG
from service.schemas import Problem

Responses = dict[int | str, dict[str, Any]]

ALWAYS = (
    *("bad-request", "key-missing", "key-required", "key-wrong", "origin-refused", "internal"),
    "shutting-down",
)
PROBE = ("origin-refused", "internal")
BODY = (
    "request-timeout",
    "length-required",
    "body-too-large",
    "unsupported-media-type",
    "unsupported-encoding",
    "invalid-request",
    "overloaded",
)
SESSION = ("session-unknown", "session-gone", "recovering", "session-damaged")
BINARY = {"schema": {"type": "string", "format": "binary"}}
TENSOR_MEDIA = {SAFETENSORS: BINARY, OCTET: BINARY}


def refusals(*slugs: str, always: tuple[str, ...] = ALWAYS) -> Responses:
    """The problem answers of an operation, by status, beside those that every operation has.

    Args:
        slugs: Its own.
        always: Those of every operation; a probe needs no key and has `PROBE` only.
    """
    by_status: dict[int | str, list[str]] = {}
    for slug in (*always, *slugs):
        by_status.setdefault(BY_SLUG[slug].status, []).append(slug)
    return {
        status: {
            "model": Problem,
            "description": "; ".join(f"`{s}`: {BY_SLUG[s].title}" for s in sorted(set(found))),
            "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, found in sorted(by_status.items(), key=lambda row: str(row[0]))
    }


def body(schema: dict[str, Any], *, tensors: bool, required: bool = True) -> dict[str, Any]:
    """The request body of an operation whose route reads it by hand."""
    content: dict[str, Any] = {JSON: {"schema": schema}}
    if tensors:
        content |= TENSOR_MEDIA
    return {"requestBody": {"required": required, "content": content}}


def query(name: str, description: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A query parameter that a route reads by hand."""
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": description,
        "schema": schema,
        **more,
    }


def header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A header that a route reads by hand."""
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": schema,
    }


VERSION = {"type": "string", "pattern": "^([0-9]{1,18}-)?[0-9]{1,18}$"}
COUNT = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}
WORKER = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"}
PREFER = header(
    "Prefer",
    "`wait=SECONDS`: how long to wait; `return=representation`: parameters in the answer.",
    {"type": "string"},
)
NAMES = query(
    "names",
    "Only these tensors; repeat the parameter.",
    {"type": "array", "items": {"type": "string"}},
    explode=True,
)
DTYPE = query(
    "dtype",
    "Of the answer; `model`: each tensor as it was uploaded.",
    {"type": "string", "enum": ["F64", "F32", "F16", "BF16", "model"]},
)
