"""The last steps of a session, for people and plots."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.routes.documents import COUNT, SESSION, query, refusals
from service.schemas import HistoryAnswer, one_of_each, parse_count
from service.schemas.refusals import invalid

router = APIRouter(prefix="/v1/sessions", tags=["history"])


@router.get(
    "/{id}/history",
    summary="Read the last steps",
    responses={200: {"model": HistoryAnswer}, **refusals(*SESSION, "invalid-request")},
    openapi_extra={
        "parameters": [
            query(
                "limit",
                "Steps at most (1000).",
                {"type": "integer", "minimum": 1, "maximum": 1 << 31},
            ),
            query("after_step", "Only later steps, the oldest of them first.", COUNT),
            query("after", "Only records of a larger number, the oldest first.", COUNT),
        ]
    },
)
async def read(id: str, request: Request) -> Response:
    """The oldest first; kept in memory only."""
    session = request.app.state.sessions.get(id)
    asked = one_of_each(request.query_params.multi_items())
    unknown = sorted(asked.keys() - {"limit", "after_step", "after"})
    if unknown:
        raise invalid(
            unknown[0][:80], "Not known here; a history takes limit, after and after_step."
        )
    limit = parse_count("limit", asked.get("limit", "1000"), 1, 1 << 31)
    bounds = {
        name: parse_count(name, asked[name], 0, (1 << 63) - 1)
        for name in ("after_step", "after")
        if name in asked
    }
    return JSONResponse({"steps": session.history.page(limit, **bounds)})
