"""Sessions as resources: create, attach, list, read, change, end."""

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.errors import PreconditionFailed
from service.routes import reading
from service.routes.documents import BODY, SESSION, body, header, query, refusals
from service.schemas import (
    PatchedSession,
    SessionInfo,
    SessionList,
    Spec,
    apply_patch,
    check_id,
    one_of_each,
    parse_count,
    parse_spec,
    with_room,
)
from service.schemas.around import stated
from service.schemas.refusals import invalid
from service.sessions.arena import Tensor, counts
from service.sessions.registry import Sessions, revision_of
from service.sessions.session import Session
from service.wire.body import largest_push

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

_EXAMPLE = {"$ref": "#/components/schemas/CreateSession"}
_CREATE = (
    *BODY,
    *("invalid-json", "not-supported-yet", "invalid-tensors", "nonfinite", "device-unavailable"),
    *("too-many-sessions", "insufficient-memory", "tensor-mismatch", "precondition-failed"),
    *("session-gone", "data-dir-missing", "disk-full", "in-flight", "recovering"),
    *("session-damaged",),
)
_TAG = '"spec-{}"'


def brief(session: Session) -> dict[str, Any]:
    """A session in a list: without its layout, which may be long."""
    found = describe(session, layout=False)
    del found["layout"]
    return found


def describe(session: Session, *, attached: bool = False, layout: bool = True) -> dict[str, Any]:
    """Everything about a session, as JSON."""
    arena = session.arena
    rows: list[dict[str, Any]] = []
    if arena is not None and layout:
        counted = counts(arena)
        rows = [
            {
                "name": e.name,
                "dtype": e.dtype,
                "shape": list(e.shape),
                "offset": e.offset,
                "group": session.terms[e.group].name,
                "count": counted[e.name],
            }
            for e in arena.layout.entries
        ]
    status = "broken" if session.broken else "empty" if arena is None else "ready"
    return {
        "id": session.id,
        "status": status,
        "attached": attached,
        "incarnation": session.incarnation,
        "revision": session.revision,
        "step": session.step,
        "epoch": session.epoch,
        "version": session.version,
        **session.spec.model_dump(mode="json", exclude={"groups", "clip"}),
        "clip": stated(session.spec.clip),
        "groups": [
            one.echo(group)
            for one, group in zip(session.terms[1:], session.spec.groups, strict=True)
        ],
        "layout": rows,
        "tensors": 0 if arena is None else len(arena.layout.entries),
        "workers": session.ledger.workers,
        "created_at": session.created_at,
        "bytes": session.bytes(),
        "max_push_bytes": None if arena is None else largest_push(arena.layout, session.spec.dtype),
    }


def _answer(session: Session, status: int, *, attached: bool = False) -> Response:
    return JSONResponse(
        describe(session, attached=attached),
        status_code=status,
        headers={
            "ETag": _TAG.format(session.revision),
            "Location": f"/v1/sessions/{session.id}",
            "Cache-Control": "no-cache",
        },
    )


async def _stated(request: Request) -> tuple[Spec, dict[str, Any], list[Tensor] | None]:
    """The specification of a creation, what it states, and the inline parameters."""
    document = await reading.document(request)
    params = None
    if isinstance(document, dict):
        document = dict(document)
        params = document.pop("params", None)
    spec, stated = parse_spec(document)
    settings = request.app.state.settings
    if "durability" not in stated:
        spec = with_room(spec.model_copy(update={"durability": settings.durability}))
    limit = settings.json_elements
    tensors = None
    if params is not None:
        tensors = await reading.inline_aside(request, params, spec.dtype, limit)
    return spec, stated, tensors


async def _make(
    sessions: Sessions, name: str | None, spec: Spec, tensors: list[Tensor] | None
) -> Session:
    session = await sessions.create(name, spec)
    if tensors is not None:
        try:
            await session.load(tensors, first_only=True)
        except BaseException:
            await asyncio.shield(sessions.forget(session))
            raise
    return session


async def _complete(session: Session, tensors: list[Tensor] | None) -> None:
    """Gives an empty session the parameters that came with its creation.

    The server may have ended between the two, and this be the same request again.
    """
    if tensors is not None and session.arena is None:
        with contextlib.suppress(PreconditionFailed):
            await session.load(tensors, first_only=True)


@router.put(
    "/{id}",
    summary="Create a session under an id of your choice, or attach to it",
    responses={
        200: {"model": SessionInfo, "description": "Attached."},
        201: {"model": SessionInfo, "description": "Created."},
        **refusals(*_CREATE, "spec-differs"),
    },
    openapi_extra=body(_EXAMPLE, tensors=False),
)
async def put(id: str, request: Request) -> Response:
    """201 when it was created; 200 with `attached` when every stated field is as it was created."""
    check_id(id)
    spec, stated, tensors = await _stated(request)
    sessions: Sessions = request.app.state.sessions
    found = await sessions.attach(id, stated)
    if found is not None:
        await _complete(found, tensors)
        return _answer(found, 200, attached=True)
    return _answer(await _make(sessions, id, spec, tensors), 201)


@router.post(
    "",
    summary="Create a session under a generated id",
    status_code=201,
    responses={201: {"model": SessionInfo, "description": "Created."}, **refusals(*_CREATE)},
    openapi_extra=body(_EXAMPLE, tensors=False),
)
async def create(request: Request) -> Response:
    """Not safe to retry: an answer that was lost leaves a session behind. PUT is."""
    spec, _, tensors = await _stated(request)
    return _answer(await _make(request.app.state.sessions, None, spec, tensors), 201)


@router.get(
    "",
    summary="List sessions",
    responses={200: {"model": SessionList}, **refusals("invalid-request")},
    openapi_extra={
        "parameters": [
            query("after", "The `next` of the page before.", {"type": "string"}),
            query(
                "limit",
                "Sessions on the page (100).",
                {"type": "integer", "minimum": 1, "maximum": 1000},
            ),
        ]
    },
)
async def index(request: Request) -> Response:
    """In order of their ids, page by page."""
    asked = one_of_each(request.query_params.multi_items())
    unknown = sorted(asked.keys() - {"after", "limit"})
    if unknown:
        raise invalid(unknown[0][:80], "Not known here; this list takes after and limit.")
    limit = parse_count("limit", asked.get("limit", "100"), 1, 1000)
    found, more = request.app.state.sessions.page(asked.get("after"), limit)
    return JSONResponse({"sessions": [brief(session) for session in found], "next": more})


@router.get(
    "/{id}",
    summary="Read everything about a session",
    responses={200: {"model": SessionInfo}, **refusals(*SESSION)},
)
async def read(id: str, request: Request) -> Response:
    """Its ETag names the revision of the specification."""
    return _answer(request.app.state.sessions.get(id), 200)


@router.patch(
    "/{id}",
    summary="Change hyperparameters and policies",
    responses={
        200: {"model": PatchedSession},
        **refusals(
            *BODY, *SESSION, "invalid-json", "not-supported-yet", "structural",
            "precondition-failed", "device-unavailable", "log-full", "disk-full",
        ),
    },
    openapi_extra={
        **body(
            {
                "type": "object",
                "minProperties": 1,
                "example": {"optimizer": {"lr": 0.0005}},
                "properties": {
                    "optimizer": {"type": "object"},
                    "groups": {
                        "type": "array",
                        "items": {"type": "object", "required": ["name"]},
                        "description": "By name; a field of null takes the session's value again.",
                    },
                    "clip": {"type": ["object", "null"]},
                    "schedule": {"type": ["object", "null"]},
                    "ema": {"type": ["object", "null"]},
                    "norms": {"type": "boolean"},
                    "update": {"type": "object"},
                    "missing": {"type": "string", "enum": ["refuse", "skip"]},
                    "on_nonfinite": {"type": "string", "enum": ["refuse", "skip"]},
                },
            },
            tensors=False,
        ),
        "parameters": [
            header("If-Match", 'The ETag of the revision that was read: `"spec-1"`.',
                   {"type": "string"})
        ],
    },
)  # fmt: skip
async def patch(id: str, request: Request) -> Response:
    """Acts from the next update on; what needs other arrays is 409 `structural`."""
    session: Session = request.app.state.sessions.get(id)
    change = await reading.document(request)
    revision = revision_of(request.headers.get("if-match"))
    step = await session.patch(lambda spec: apply_patch(spec, change), revision)
    answer = describe(session)
    answer["acts_from_step"] = step
    return JSONResponse(answer, headers={"ETag": _TAG.format(session.revision)})


@router.delete(
    "/{id}",
    summary="End a session",
    status_code=204,
    responses={
        204: {"description": "Ended; 410 from now on."},
        **refusals(*SESSION, "disk-full"),
    },
)
async def delete(id: str, request: Request) -> Response:
    """Pushes that were admitted run to their end first; a PUT creates it anew, an epoch later."""
    await request.app.state.sessions.delete(id)
    return Response(status_code=204)
