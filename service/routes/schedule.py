"""Learning rates of the updates to come."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.routes.documents import SESSION, query, refusals
from service.schemas import ScheduleAnswer, one_of_each, parse_count
from service.schemas.refusals import invalid
from service.sessions.schedule import factor
from service.sessions.session import Session

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

MOST = 10_000
NUMBERS = 50_000
"""Rates that one answer holds: some 50 ms of the event loop."""


@router.get(
    "/{id}/schedule",
    summary="Preview the learning rates of the next updates",
    responses={200: {"model": ScheduleAnswer}, **refusals(*SESSION, "invalid-request")},
    openapi_extra={
        "parameters": [
            query(
                "steps",
                "How many updates (100).",
                {"type": "integer", "minimum": 1, "maximum": MOST},
            )
        ]
    },
)
async def preview(id: str, request: Request) -> Response:
    """lr(group) times the factor of the schedule; overrides and staleness are the push's own."""
    session: Session = request.app.state.sessions.get(id)
    asked = one_of_each(request.query_params.multi_items())
    unknown = sorted(asked.keys() - {"steps"})
    if unknown:
        raise invalid(unknown[0][:80], "Not known here; a preview takes steps.")
    steps = parse_count("steps", asked.get("steps", "100"), 1, MOST)
    session.check_alive()
    if steps * len(session.terms) > NUMBERS:
        raise invalid(
            "steps", f"At most {NUMBERS // len(session.terms)} for {len(session.terms)} groups."
        )
    first = session.step
    factors = [factor(session.spec.schedule, first + k) for k in range(steps)]
    rates = {one.name: [float(one.hyper["lr"]) * f for f in factors] for one in session.terms}
    return JSONResponse({"step": first, "lr": rates})
