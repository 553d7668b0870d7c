"""The optimizer state under torch's names: read it, replace it."""

import json as plain_json
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from gradpost.protocol import EPOCH, JSON, SAFETENSORS, STEP, VERSION
from service.answers import TensorAnswer
from service.errors import NotAcceptable, Overloaded
from service.routes import reading
from service.routes.answering import render
from service.routes.documents import BINARY, BODY, SESSION, body, refusals
from service.routes.params import IF_MATCH, expected
from service.routes.sessions import describe
from service.schemas import SessionInfo, StateAnswer
from service.schemas.refusals import invalid
from service.sessions.image import rule_of
from service.sessions.session import Session
from service.wire import json, safetensors
from service.wire.media import choose_accept
from service.wire.safetensors import Piece

router = APIRouter(prefix="/v1/sessions", tags=["state"])

_STATE = {
    "type": "object",
    "required": ["state", "counts", "step"],
    "properties": {
        "state": {"type": "object"},
        "counts": {"type": "object"},
        "step": {"type": "integer", "minimum": 0},
        "scalars": {
            "type": "object",
            "description": "Tensor name → the numbers that some rules keep beside arrays.",
        },
    },
}


@router.get(
    "/{id}/state",
    summary="Read the optimizer state",
    responses={
        200: {
            "model": StateAnswer,
            "description": "Every `<slot>/<tensor>` of one step, with the counts of updates.",
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/StateAnswer"}},
                SAFETENSORS: BINARY,
            },
        },
        **refusals(*SESSION, "not-acceptable", "params-missing", "overloaded"),
    },
)
async def read(id: str, request: Request) -> Response:
    """A copy, so that steps go on while it is sent."""
    session: Session = request.app.state.sessions.get(id)
    media = choose_accept(request.headers.get("accept"))
    if media.kind == "raw":
        raise NotAcceptable(
            f"The state has names; ask for it as {SAFETENSORS} or JSON.",
            available=[SAFETENSORS, JSON],
        )
    budget = request.app.state.budget
    nbytes = session.bytes().get("state", 0)
    if not budget.try_reserve(nbytes):
        raise Overloaded(
            f"No memory for a copy of {nbytes} bytes now; ask again after the pause.",
            retry_after_s=1,
            bytes=nbytes,
        )
    try:
        facts, pieces = await session.export_state()
        headers = {
            EPOCH: str(facts["epoch"]),
            VERSION: str(facts["version"]),
            STEP: str(facts["step"]),
            "Vary": "Accept",
            "Cache-Control": "no-cache",
        }
        if media.kind == "json":
            rows = [(f"{p.slot}/{p.entry.name}", p.shape, p.flat) for p in pieces]
            rendered = await render(session.shared, rows)
            head = plain_json.dumps(facts)[:-1].encode()
            budget.release(nbytes)
            return Response(
                head + b', "state": ' + rendered + b"}", headers={**headers, "Content-Type": JSON}
            )
        answer = safetensors.answer_parts(
            [
                Piece(f"{p.slot}/{p.entry.name}", session.spec.dtype, p.shape,
                      p.array, p.offset, p.size)
                for p in pieces
            ],
            {key: value if isinstance(value, str) else plain_json.dumps(value)
             for key, value in facts.items()},
        )  # fmt: skip
    except BaseException:
        budget.release(nbytes)
        raise
    headers["Content-Type"] = SAFETENSORS
    return TensorAnswer(answer, 200, headers, lambda: budget.release(nbytes))


@router.put(
    "/{id}/state",
    summary="Replace the optimizer state",
    responses={
        200: {"model": SessionInfo, "description": "Taken; a new epoch has begun."},
        **refusals(
            *BODY,
            *SESSION,
            *("invalid-json", "params-missing", "precondition-failed", "invalid-tensors"),
            *("tensor-mismatch", "nonfinite", "insufficient-memory", "disk-full"),
        ),
    },
    openapi_extra={**body(_STATE, tensors=True), "parameters": [IF_MATCH]},
)
async def replace(id: str, request: Request) -> Response:
    """Whole, as GET answers it; the parameters stay."""
    state = request.app.state
    session: Session = state.sessions.get(id)
    session.ready  # noqa: B018 - refuses a session without parameters
    base = expected(request, session)
    with state.uploads:
        known = ("counts", "step", "epoch", "version", "rule", "scalars")
        taken = await reading.upload(request, session, "state", known)
        try:
            step, counted, scalars = _facts(taken.facts, session)
            await session.load_state(taken.tensors, step, counted, scalars, base)
        finally:
            if taken.reserved:
                state.budget.release(taken.reserved)
    return JSONResponse(describe(session), headers={"ETag": f'"spec-{session.revision}"'})


def _facts(facts: Any, session: Session) -> tuple[int, dict[str, int], dict[str, dict[str, float]]]:
    """Step, counts and scalars, out of JSON members or safetensors metadata."""
    step, counted, scalars = facts.get("step"), facts.get("counts"), facts.get("scalars") or {}
    if isinstance(step, str) and step.isascii() and step.isdigit() and len(step) < 20:
        step = int(step)
    if isinstance(counted, str):
        counted = json.loads(counted.encode())
    if isinstance(scalars, str):
        scalars = json.loads(scalars.encode())
    if not _is_count(step):
        raise invalid("step", "The state states its step, a whole number from 0.")
    if not isinstance(counted, dict) or not all(map(_is_count, counted.values())):
        raise invalid("counts", "The state states counts: each tensor's number of updates.")
    if not isinstance(scalars, dict) or not all(map(_are_numbers, scalars.values())):
        raise invalid("scalars", "Tensor name to an object of finite numbers, as GET state has it.")
    rule, ours = facts.get("rule"), rule_of(session.spec)
    if rule is not None and rule != ours:
        raise invalid("rule", f"This is state of another rule; the session's is {ours}.")
    return step, counted, scalars


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < 1e300
        for one in value.values()
    )
