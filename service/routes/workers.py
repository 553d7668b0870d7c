"""Where a worker stands: which of its pushes a session knows."""

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.errors import WorkerUnknown
from service.routes.documents import SESSION, refusals
from service.schemas import WorkerAnswer, check_worker
from service.sessions.session import Session, ranges

router = APIRouter(prefix="/v1/sessions", tags=["workers"])
RANGES = 1024
"""As many as a window can have."""


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
    known = session.ledger.standing(worker)
    if known is None:
        session.ledger.check_retired(worker)
        raise WorkerUnknown(
            f"Session {id!r} knows no push of worker {worker!r}; all of its sequence numbers are "
            "free.",
            worker=worker,
        )
    admitted = known.admitted
    last: dict[str, Any] | None = None
    if admitted:
        last = admitted[max(admitted)].summary.answer(replayed=True)
    return JSONResponse(
        {
            "worker": worker,
            "epoch": session.epoch,
            "version": session.version,
            "step": session.step,
            "next_sequence": known.highest + 1,
            "highest": known.highest,
            "ranges": ranges(admitted)[-RANGES:],
            "seen_at": known.seen_at,
            "last": last,
        },
        headers={"Cache-Control": "no-store"},
    )
