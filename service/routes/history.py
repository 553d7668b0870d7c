"""The last steps of a session, for people and plots."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.routes.documents import COUNT, SESSION, query, refusals
from service.schemas import HistoryAnswer, one_of_each, parse_count
from service.schemas.spec import invalid

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
            query("after_step", "Only later steps.", COUNT),
        ]
    },
)
async def read(id: str, request: Request) -> Response:
    """The oldest first; kept in memory only."""
    session = request.app.state.sessions.get(id)
    asked = one_of_each(request.query_params.multi_items())
    unknown = sorted(asked.keys() - {"limit", "after_step"})
    if unknown:
        raise invalid(unknown[0][:80], "Not known here; a history takes limit and after_step.")
    limit = parse_count("limit", asked.get("limit", "1000"), 1, 1 << 31)
    after = parse_count("after_step", asked.get("after_step", "0"), 0, (1 << 63) - 1)
    return JSONResponse({"steps": session.history.last(limit, after)})
