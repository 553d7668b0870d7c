"""Checkpoints as files: make, list, download, delete; and back into a session."""

import re
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse, JSONResponse

from gradpost.protocol import JSON, SAFETENSORS
from service.errors import BadRequest, UnsupportedMediaType
from service.routes import reading
from service.routes.documents import (
    BODY,
    SESSION,
    TENSOR_MEDIA,
    body,
    header,
    query,
    refusals,
)
from service.routes.params import IF_MATCH, expected
from service.routes.sessions import describe
from service.schemas import (
    CheckpointInfo,
    CheckpointList,
    SessionInfo,
    check_checkpoint,
    one_of_each,
)
from service.schemas.refusals import invalid
from service.sessions import checkpoints
from service.sessions.checkpoints import disk_of
from service.sessions.lane import in_pool
from service.sessions.session import Session
from service.storage.checkpoints import Checkpoint, owner_of
from service.wire import media

router = APIRouter(prefix="/v1/sessions", tags=["checkpoints"])

_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")
_SCOPES = ("full", "params")
_COMMON = (*SESSION, "data-dir-missing")


def _info(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "bytes": checkpoint.size,
        "digest": checkpoint.digest.hex(),
        "made_at": checkpoint.made_at,
    }


@router.post(
    "/{id}/checkpoints",
    summary="Make a checkpoint",
    status_code=201,
    responses={
        200: {"model": CheckpointInfo, "description": "This version has one of this name."},
        201: {"model": CheckpointInfo, "description": "Made; it is on the disk."},
        **refusals(
            *BODY, *_COMMON, "invalid-json", "params-missing", "checkpoint-exists", "overloaded",
            "disk-full",
        ),
    },
    openapi_extra=body(
        {"type": "object", "properties": {"name": _NAME}}, tensors=False, required=False
    ),
)  # fmt: skip
async def make(id: str, request: Request) -> Response:
    """Parameters and state as they are between two steps, which wait for the copy only."""
    session: Session = request.app.state.sessions.get(id)
    for asked in request.query_params:
        raise invalid(asked[:80], "Not known here; a name stands in the body.")
    name = None
    if request.headers.get("content-length", "0") != "0":
        found = await reading.document(request)
        fields = reading.checked_fields(found, ("name",))
        name = None if fields.get("name") is None else check_checkpoint(fields["name"], "name")
    made, new = await checkpoints.make(session, name)
    return JSONResponse(
        _info(made),
        status_code=201 if new else 200,
        headers={"Location": f"/v1/sessions/{id}/checkpoints/{made.name}"},
    )


@router.get(
    "/{id}/checkpoints",
    summary="List checkpoints",
    responses={200: {"model": CheckpointList}, **refusals(*_COMMON)},
)
async def index(id: str, request: Request) -> Response:
    """The oldest first."""
    session: Session = request.app.state.sessions.get(id)
    session.check_alive()
    found = disk_of(session).store.checkpoints.list(owner_of(session.id))
    return JSONResponse({"checkpoints": [_info(one) for one in found]})


@router.get(
    "/{id}/checkpoints/{name}",
    summary="Download a checkpoint",
    responses={
        200: {"description": "One safetensors file.", "content": dict(TENSOR_MEDIA)},
        206: {"description": "The part that Range asks for."},
        **refusals(*_COMMON, "invalid-request", "checkpoint-unknown"),
    },
)
async def download(id: str, name: str, request: Request) -> Response:
    """`params/<tensor>` and `<slot>/<tensor>`; any safetensors library opens it."""
    session: Session = request.app.state.sessions.get(id)
    session.check_alive()
    found, path = await checkpoints.verified(session, check_checkpoint(name))
    _check_range(request.headers.get("range"), found.size)
    return FileResponse(
        path,
        media_type=SAFETENSORS,
        filename=f"{name}.safetensors",
        headers={"ETag": f'"{found.digest.hex()}"', "Cache-Control": "no-cache"},
    )


def _check_range(text: str | None, size: int) -> None:
    """Refuses what the file can't give: the response would say so in plain text.

    Raises:
        BadRequest: Not one range inside the file.
    """
    match = _RANGE.fullmatch("bytes=0-" if text is None else text)
    if match is not None:
        first, last, tail = (int(one) if one else None for one in match.groups())
        if tail or (first is not None and first < size and (last is None or last >= first)):
            return
    raise BadRequest(
        f"A Range is bytes=FIRST-LAST inside the {size} bytes of the file, or bytes=-COUNT; leave "
        "it out to get all of it."
    )


@router.delete(
    "/{id}/checkpoints/{name}",
    summary="Delete a checkpoint",
    status_code=204,
    responses={
        204: {"description": "Gone."},
        **refusals(*_COMMON, "invalid-request", "checkpoint-unknown"),
    },
)
async def delete(id: str, name: str, request: Request) -> Response:
    """Its file is removed."""
    session: Session = request.app.state.sessions.get(id)
    found = checkpoints.find(session, check_checkpoint(name))
    disk = disk_of(session)
    await disk.run(partial(disk.store.checkpoints.delete, owner_of(session.id), found.name))
    return Response(status_code=204)


@router.post(
    "/{id}/restore",
    summary="Go back to a checkpoint, or take one that is sent",
    responses={
        200: {"model": SessionInfo, "description": "Taken; a new epoch has begun."},
        **refusals(
            *BODY,
            *SESSION,
            *("invalid-json", "precondition-failed", "invalid-tensors", "tensor-mismatch"),
            *("nonfinite", "insufficient-memory", "disk-full", "checkpoint-unknown"),
            *("data-dir-missing",),
        ),
    },
    openapi_extra={
        **body(
            {
                "type": "object",
                "required": ["checkpoint"],
                "properties": {"checkpoint": _NAME, "scope": {"enum": list(_SCOPES)}},
            },
            tensors=True,
        ),
        "parameters": [
            IF_MATCH,
            header("If-None-Match", "`*`: only into an empty session.", {"type": "string"}),
            query(
                "scope",
                "`full` (state too; fails without it) or `params`, beside a safetensors body.",
                {"type": "string", "enum": list(_SCOPES)},
            ),
        ],
    },
)
async def restore(id: str, request: Request) -> Response:
    """`full` takes parameters, state and counts, to the bit; `params` keeps the moments."""
    state = request.app.state
    session: Session = state.sessions.get(id)
    session.check_alive()
    base = expected(request, session)
    first_only = (request.headers.get("if-none-match") or "").strip() == "*"
    if first_only:
        session.check_first()
    with state.uploads:
        taken, scope = await _taken(request, session)
        try:
            parse = partial(checkpoints.parse, taken.tensors, taken.facts, scope)
            contents = await in_pool(state.pool, parse)  # milliseconds for many tensors
            await checkpoints.restore(session, contents, scope, base, first_only=first_only)
        finally:
            if taken.reserved:
                state.budget.release(taken.reserved)
    return JSONResponse(describe(session), headers={"ETag": f'"spec-{session.revision}"'})


async def _taken(request: Request, session: Session) -> tuple[reading.Upload, str]:
    """The tensors of the body, or of the checkpoint that it names; and the scope."""
    asked = one_of_each(request.query_params.multi_items())
    unknown = sorted(asked.keys() - {"scope"})
    if unknown:
        raise invalid(unknown[0][:80], "Not known here; a restore takes scope.")
    media.check_encoding(request.headers.get("content-encoding"))
    form = media.parse_content_type(request.headers.get("content-type"))
    if form.kind == "raw":
        raise UnsupportedMediaType(
            f"A checkpoint names its tensors; send it as {SAFETENSORS}, or name one in JSON.",
            accepted=[SAFETENSORS, JSON],
        )
    if form.kind != "json":
        return await reading.checkpoint(request), _scope(asked.get("scope", "full"))
    fields = reading.checked_fields(await reading.document(request), ("checkpoint", "scope"))
    scope = _scope(fields.get("scope", asked.get("scope", "full")))
    found, path = await checkpoints.verified(session, check_checkpoint(fields.get("checkpoint")))
    budget = request.app.state.budget
    budget.reserve(found.size)
    try:
        tensors, facts = await in_pool(request.app.state.pool, partial(checkpoints.read, path))
    except BaseException:
        budget.release(found.size)
        raise
    return reading.Upload(tensors, facts, found.size), scope


def _scope(value: Any) -> str:
    if value not in _SCOPES:
        raise invalid("scope", "full (parameters and state), or params.")
    return str(value)
