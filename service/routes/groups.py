"""Parameter groups of a session that has parameters: add one."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.routes import reading
from service.routes.documents import BODY, SESSION, body, query, refusals
from service.routes.sessions import describe
from service.schemas import SessionInfo, one_of_each
from service.schemas.refusals import invalid
from service.sessions.session import Session
from service.wire import json

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

_GROUP = {
    "type": "object",
    "description": "Its name and hyperparameters, as in groups of a creation but without params.",
}


@router.post(
    "/{id}/groups",
    summary="Add a parameter group with its tensors",
    status_code=201,
    responses={
        200: {"model": SessionInfo, "description": "It is there already, named and made alike."},
        201: {"model": SessionInfo, "description": "Added; the version grew by one."},
        **refusals(
            *BODY,
            *SESSION,
            *("invalid-json", "params-missing", "invalid-tensors", "tensor-mismatch"),
            *("nonfinite", "insufficient-memory", "disk-full", "spec-differs", "not-supported-yet"),
        ),
    },
    openapi_extra={
        **body(
            {
                "type": "object",
                "required": ["group", "params"],
                "properties": {"group": _GROUP, "params": {"type": "object"}},
            },
            tensors=True,
        ),
        "parameters": [
            query(
                "group",
                "The same as JSON, beside a safetensors body.",
                {"type": "string"},
            )
        ],
    },
)
async def add(id: str, request: Request) -> Response:
    """As add_param_group of torch: the other tensors keep parameters, state and counts."""
    state = request.app.state
    session: Session = state.sessions.get(id)
    session.ready  # noqa: B018 - refuses a session without parameters
    asked = one_of_each(request.query_params.multi_items())
    unknown = sorted(asked.keys() - {"group"})
    if unknown:
        raise invalid(unknown[0][:80], "Not known here; a group is stated as group.")
    with state.uploads:
        taken = await reading.upload(request, session, "params", ("group",), new=True)
        try:
            group = taken.facts.get("group", {})
            if "group" in asked:
                group = json.loads(asked["group"].encode())
            if not isinstance(group, dict) or "params" in group:
                raise invalid("group", "An object of name and hyperparameters, without params.")
            added = await session.add_group(group, taken.tensors)
        finally:
            if taken.reserved:
                state.budget.release(taken.reserved)
    return JSONResponse(
        describe(session),
        status_code=201 if added else 200,
        headers={"ETag": f'"spec-{session.revision}"'},
    )
