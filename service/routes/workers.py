"""The workers of a session: join, where one stands, leave."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.errors import WorkerUnknown
from service.routes import reading
from service.routes.documents import SESSION, body, refusals
from service.schemas import WorkerAnswer, WorkerList, check_worker
from service.schemas.refusals import invalid
from service.sessions.contributions import told
from service.sessions.ledger import Contributed, Fate
from service.sessions.members import Member, Tally
from service.sessions.session import Session, ranges

router = APIRouter(prefix="/v1/sessions", tags=["workers"])
RANGES = 1024
"""As many as a window can have."""
LEASE_S = (1.0, 86_400.0)
_NEW = {"Cache-Control": "no-store"}


def brief(
    session: Session, name: str, member: Member | None, known: tuple[int, float] | None
) -> dict[str, Any]:
    """A worker as a list has it."""
    found = session.rounds.open
    mode = session.spec.update.mode
    one = member or Member(name, 0.0, 0.0, 0.0, live=False)
    return {
        "worker": name,
        "live": one.live,
        "lease_s": None if member is None else one.lease_s,
        "lease_left_s": session.members.left_s(one),
        "joined_at": None if member is None else one.joined_at,
        "next_sequence": 0 if known is None else known[0] + 1,
        "highest": -1 if known is None else known[0],
        "seen_at": None if known is None else known[1],
        "clock": one.clock if mode == "bounded" else None,
        "contributed": found is not None and name in found.contributions,
        "contributions": one.pushes,
        "passes": one.passes,
        "late": one.late,
        "staleness": _told(one.staleness),
        "lateness_s": _told(one.lateness_s),
    }


def _told(tally: Tally) -> dict[str, float | None]:
    return tally.told()


def whole(session: Session, name: str) -> dict[str, Any]:
    """Everything about a worker."""
    known = session.ledger.standing(name)
    admitted = {} if known is None else known.admitted
    last = None if not admitted else _last(session, admitted[max(admitted)].summary)
    return {
        **brief(session, name, session.members.get(name), session.ledger.glance(name)),
        "epoch": session.epoch,
        "version": session.version,
        "step": session.step,
        "round": session.rounds.number if session.spec.update.mode == "sync" else None,
        "ranges": ranges(admitted)[-RANGES:],
        "last": last,
    }


def _last(session: Session, fate: Fate) -> dict[str, Any]:
    if not isinstance(fate, Contributed):
        return fate.answer(replayed=True)
    if fate.reason is None:
        return told(session, fate, replayed=True)
    return {"applied": False, "round": fate.round, "abandoned": fate.reason}


@router.get(
    "/{id}/workers",
    summary="The workers of a session",
    responses={200: {"model": WorkerList}, **refusals(*SESSION)},
)
async def every(id: str, request: Request) -> Response:
    """Who takes part, live or not: leases, contributions, staleness, lateness."""
    session: Session = request.app.state.sessions.get(id)
    session.check_alive()
    await session.tick()  # whose lease ran out is live no more, and what waits for it goes on
    members = sorted(session.members.all(), key=lambda one: one.name)
    rows = [brief(session, one.name, one, session.ledger.glance(one.name)) for one in members]
    found = {"workers": rows, "live": sum(one.live for one in members)}
    return JSONResponse(found, headers=_NEW)


@router.get(
    "/{id}/workers/{worker}",
    summary="Where a worker stands",
    responses={
        200: {"model": WorkerAnswer},
        **refusals(*SESSION, "invalid-request", "worker-unknown", "worker-retired"),
    },
)
async def read(id: str, worker: str, request: Request) -> Response:
    """Which of its sequence numbers were admitted, of the last 1024; what the newest one did."""
    session: Session = request.app.state.sessions.get(id)
    session.check_alive()
    check_worker(worker)
    session.members.renew(worker)
    if session.members.get(worker) is None and session.ledger.standing(worker) is None:
        session.ledger.check_retired(worker)
        raise WorkerUnknown(
            f"Session {id!r} knows no push of worker {worker!r}, nor has it joined; all of its "
            "sequence numbers are free.",
            worker=worker,
        )
    return JSONResponse(whole(session, worker), headers=_NEW)


@router.put(
    "/{id}/workers/{worker}",
    summary="Join, or renew a lease",
    status_code=200,
    responses={
        200: {"model": WorkerAnswer, "description": "It had joined; its lease is renewed."},
        201: {"model": WorkerAnswer, "description": "It has joined, for the first time or again."},
        **refusals(
            *SESSION,
            *("invalid-request", "invalid-json", "worker-retired", "too-many-workers"),
            *("length-required", "body-too-large", "unsupported-media-type", "request-timeout"),
            *("unsupported-encoding", "overloaded"),
        ),
    },
    openapi_extra=body(
        {
            "type": "object",
            "properties": {
                "lease_s": {"type": "number", "minimum": LEASE_S[0], "maximum": LEASE_S[1]}
            },
        },
        tensors=False,
        required=False,
    ),
)
async def join(id: str, worker: str, request: Request) -> Response:
    """A round waits for those who have joined; any call that names the worker renews its lease."""
    session: Session = request.app.state.sessions.get(id)
    session.check_alive()
    check_worker(worker)
    lease_s = None
    if request.headers.get("content-length", "0") != "0":
        found = reading.checked_fields(await reading.document(request), ("lease_s",))
        lease_s = _lease(found["lease_s"]) if "lease_s" in found else None
    joined = await session.join(worker, lease_s)
    return JSONResponse(whole(session, worker), status_code=201 if joined else 200, headers=_NEW)


def _lease(value: Any) -> float:
    least, most = LEASE_S
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise invalid(
            "lease_s", f"Seconds from {least:g} to {most:g}; a worker renews it by any call."
        )
    return float(value)


@router.delete(
    "/{id}/workers/{worker}",
    summary="Leave",
    status_code=204,
    responses={
        204: {"description": "Nobody waits for it any more, and its id is not used again."},
        **refusals(*SESSION, "invalid-request", "worker-unknown", "worker-retired"),
    },
)
async def leave(id: str, worker: str, request: Request) -> Response:
    """What it has contributed stays; its sequence numbers are forgotten."""
    session: Session = request.app.state.sessions.get(id)
    check_worker(worker)
    session.check_alive()
    session.ledger.check_retired(worker)
    if not await session.leave(worker):
        raise WorkerUnknown(f"Session {id!r} knows no worker {worker!r}.", worker=worker)
    return Response(status_code=204)
