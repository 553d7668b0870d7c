"""The hot route: push gradients, get a summary, and the new parameters if wanted."""

import re
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gradpost.protocol import JSON
from service.errors import ServiceError, refused
from service.routes import reading
from service.routes.answering import (
    open_answer,
    params_answer,
    summary_answer,
    summary_text,
    wanted,
)
from service.routes.documents import (
    BODY,
    COUNT,
    DTYPE,
    NAMES,
    PREFER,
    SESSION,
    TENSOR_MEDIA,
    VERSION,
    WORKER,
    body,
    query,
    refusals,
)
from service.schemas import OpenContribution, StepSummary, one_of_each, parse_prefer
from service.sessions.ledger import Contributed, Summary
from service.sessions.session import Session
from service.wire.fit import select
from service.wire.media import choose_accept

router = APIRouter(prefix="/v1/sessions", tags=["steps"])

_SCALE = {"type": "number", "minimum": 1e-30, "maximum": 1e30}
_WEIGHT = {"type": "number", "minimum": 0, "maximum": 1e30}
_INCARNATION = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_PUSH = {
    "type": "object",
    "properties": {
        "grads": {
            "type": "object",
            "description": "Tensor name → nested lists of numbers, or some rows of it: "
            '`{"idx": [row numbers], "rows": [their values]}`. A safetensors body may hold '
            "`t#idx` and `t#rows`, `t#q8` and `t#scale`, or `t#topk` and `t#values` for `t`.",
        },
        "worker": WORKER,
        "sequence": COUNT,
        "base_version": {"oneOf": [VERSION, COUNT]},
        "loss": {"type": "number"},
        "grad_scale": _SCALE,
        "overrides": {"type": "object", "additionalProperties": {"type": "object"}},
        "incarnation": _INCARNATION,
        "weight": _WEIGHT,
    },
}


@router.post(
    "/{id}/steps",
    summary="Push gradients",
    responses={
        200: {
            "description": "Applied, skipped, or a replay; with parameters if they were asked for.",
            "model": StepSummary,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/StepSummary"}},
                **TENSOR_MEDIA,
            },
        },
        202: {
            "description": "Counted; the round is open. Its end is at Location.",
            "model": OpenContribution,
            "headers": {"Location": {"schema": {"type": "string"}, "description": "The round."}},
        },
        **refusals(
            *BODY,
            *SESSION,
            *("invalid-json", "not-acceptable", "in-flight", "too-old", "worker-retired"),
            *("epoch-changed", "version-unknown", "version-pending", "stale-gradient"),
            *("params-missing", "invalid-tensors", "tensor-mismatch", "nonfinite", "key-reused"),
            *("too-many-workers", "not-supported-yet", "structural", "log-full", "disk-full"),
            *("round-closed", "round-abandoned", "already-contributed", "overrides-differ"),
            *("norm-exceeded", "sparse-unsupported"),
        ),
    },
    openapi_extra={
        **body(_PUSH, tensors=True),
        "parameters": [
            query(
                "worker",
                "Who pushes; with `sequence` it identifies the push.",
                WORKER,
            ),
            query("sequence", "A number that this worker has not used.", COUNT),
            query("base_version", "The version the gradient was computed from.", VERSION),
            query("loss", "For the history.", {"type": "number"}),
            query("grad_scale", "The gradient is divided by it.", _SCALE),
            query(
                "overrides",
                "JSON: group name → hyperparameters of this update.",
                {"type": "string"},
            ),
            query("weight", "Of a contribution to a round; 0 is a pass, without a body.", _WEIGHT),
            query("incarnation", "Refused if the session was created anew since.", _INCARNATION),
            NAMES,
            DTYPE,
            PREFER,
        ],
    },
)
async def push(id: str, request: Request) -> Response:
    """Applied whole or not at all, and once for each (`worker`, `sequence`).

    In mode sync it joins the open round; with `Prefer: wait` the answer waits for the round's end.
    """
    state = request.app.state
    session: Session = state.sessions.get(id)
    headers = request.headers
    media = choose_accept(headers.get("accept"))
    prefers = parse_prefer(headers.get("prefer"), state.settings.wait_cap_s)
    names, dtype, control = None, None, {}
    if request.scope["query_string"]:
        pairs = request.query_params.multi_items()
        control = one_of_each(pairs, many=("names",))
        dtype = control.pop("dtype", None)
        names = tuple(value for name, value in pairs if name == "names") or None
    want = wanted(media, names, dtype)
    mode = session.spec.update.mode
    with_params = media.kind != "json" or prefers.representation
    if names is not None:
        select(session.ready.layout, names)  # after the push nothing may be refused any more
    with state.uploads:
        gradient = await reading.gradient(request, session, control)
        key = gradient.control.key
        # What waits for others pins no version meanwhile.
        outcome = await session.push(gradient, hold=with_params and mode == "async")
        del gradient
    summary, replayed, ahead = outcome.summary, outcome.replayed, None
    if mode == "sync" and key is not None:
        summary = await session.fate(summary, key, prefers.wait_s or 0.0)
        if isinstance(summary, Contributed):
            return open_answer(session, summary, replayed=replayed)
    elif mode == "bounded" and key is not None:
        cap_s = state.settings.wait_cap_s
        ahead = await session.turn(key[0], cap_s if prefers.wait_s is None else prefers.wait_s)
    assert isinstance(summary, Summary)
    if not with_params:
        return summary_answer(session, summary, replayed=replayed, ahead=ahead)
    try:
        held = outcome.held or await session.hold(None, state.settings.wait_cap_s)
        text = summary_text(summary, replayed=replayed, ahead=ahead)
        return await params_answer(session, held, want, text)
    except ServiceError:
        # A 4xx says that nothing changed. This push was applied, and only its parameters can't be
        # given in the form that was asked for: the summary alone says so, and a pull says why.
        return summary_answer(session, summary, replayed=replayed, ahead=ahead)


class _Template(NamedTuple):
    """What the log and the metrics read of a route."""

    path: str


_ROUTE = _Template("/v1/sessions/{id}/steps")
_PATH = re.compile(r"/v1/sessions/([^/]+)/steps")


def direct(scope: Scope) -> ASGIApp | None:
    """The same call past FastAPI's middleware, routers and exception handlers.

    They cost a small push an eighth to a sixth of its time, and one that waits for its round 5 kB
    for as long; the router above documents the call. None for any other request.
    """
    if scope["method"] != "POST" or scope.get("root_path"):
        return None
    found = _PATH.fullmatch(scope["path"])
    if found is None:
        return None
    scope["route"], scope["path_params"] = _ROUTE, {"id": found[1]}
    return _answered


async def _answered(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        response = await push(scope["path_params"]["id"], Request(scope, receive, send))
    except ServiceError as error:
        response = refused(scope, error)
    await response(scope, receive, send)
