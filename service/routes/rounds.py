"""A round of a session in mode sync: who has contributed, and how it ended."""

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from gradpost.protocol.versions import format_version
from service.errors import RoundUnknown
from service.routes.documents import PREFER, SESSION, refusals
from service.schemas import RoundAnswer, parse_count, parse_prefer
from service.sessions.records import Contribution
from service.sessions.rounds import KEPT, Closed, Part
from service.sessions.session import Session

router = APIRouter(prefix="/v1/sessions", tags=["rounds"])


@router.get(
    "/{id}/rounds/{number}",
    summary="Read a round, or wait for its end",
    responses={
        200: {"model": RoundAnswer},
        **refusals(*SESSION, "invalid-request", "round-unknown"),
    },
    openapi_extra={"parameters": [PREFER]},
)
async def read(id: str, number: str, request: Request) -> Response:
    """With `Prefer: wait` the answer waits until the round is over."""
    state = request.app.state
    session: Session = state.sessions.get(id)
    session.check_alive()
    wanted = parse_count("round", number, 1, (1 << 63) - 1)
    wait_s = parse_prefer(request.headers.get("prefer"), state.settings.wait_cap_s).wait_s
    if session.spec.update.mode == "sync" and wanted == session.rounds.number:
        await session.rounds.wait(wanted, wait_s or 0.0)
        session.check_alive()
    closed = session.rounds.get(wanted)
    if closed is not None:
        found = _closed(closed)
    elif session.spec.update.mode == "sync" and wanted == session.rounds.number:
        found = _open(session)
    else:
        raise RoundUnknown(
            f"Session {id!r} has no round {wanted}: it is at round {session.rounds.number}, and "
            f"the last {KEPT} that are over can be asked for."
            if session.spec.update.mode == "sync"
            else f"Session {id!r} is in mode {session.spec.update.mode}, which has no rounds.",
            round=session.rounds.number,
        )
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


def _open(session: Session) -> dict[str, Any]:
    found = session.rounds.open
    members = [] if found is None else list(found.contributions.values())
    counted = 0 if found is None else found.counted
    return {
        "round": session.rounds.number,
        "status": "open",
        "reason": None,
        "base_version": format_version(session.epoch, session.version),
        "step": session.step,
        "epoch": session.epoch,
        "version": session.version,
        "contributions": counted,
        "passes": len(members) - counted,
        "missing": session.rounds.missing(session.spec.update),
        "members": _members(members),
        "opened_at": None if found is None else found.opened_at,
        "closed_at": None,
        "deadline_in_s": session.rounds.deadline_in_s(),
        "summary": None,
    }


def _closed(one: Closed) -> dict[str, Any]:
    step, epoch, version = one.at
    return {
        "round": one.number,
        "status": one.status,
        "reason": one.reason,
        "base_version": format_version(*one.base),
        "step": step,
        "epoch": epoch,
        "version": version,
        "contributions": one.contributions,
        "passes": one.passes,
        "missing": 0,
        "members": None if one.members is None else _members(one.members),
        "opened_at": one.opened_at,
        "closed_at": one.closed_at,
        "deadline_in_s": None,
        "summary": None if one.summary is None else one.summary.answer(replayed=False),
    }


def _members(contributions: Iterable[Contribution | Part]) -> list[dict[str, Any]]:
    return [
        {
            "worker": one.worker,
            "sequence": one.sequence,
            "weight": one.weight,
            "lateness_s": one.lateness_s,
        }
        for one in contributions
    ]
