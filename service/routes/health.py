"""Probes and metrics."""

import threading
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from service.metrics import CONTENT_TYPE
from service.routes.documents import PROBE, refusals

router = APIRouter(tags=["health"])


class Readiness:
    """Whether work is welcome: not before the warm-up, and not once a stop was asked for.

    Args:
        pending: What must be done first, in words, e.g. "kernels of adam".
    """

    def __init__(self, pending: list[str] | None = None) -> None:
        self.pending = list(pending or [])
        self.stop_asked = threading.Event()
        self.recovering: Callable[[], list[str]] = list
        """Sessions that are still on the disk only."""
        self.damaged: Callable[[], list[dict[str, str]]] = list
        """Sessions that stay there, with why."""

    @property
    def stopping(self) -> bool:
        """True once a stop was asked for."""
        return self.stop_asked.is_set()

    @property
    def ready(self) -> bool:
        """True when nothing is pending and no stop was asked for."""
        return not self.pending and not self.stopping

    def done(self, what: str) -> None:
        """Strikes one item off."""
        if what in self.pending:
            self.pending.remove(what)

    def failed(self, what: str) -> None:
        """Says of one item that it will never be done."""
        self.pending.append(f"{what} failed, see the log")
        self.done(what)

    def stop(self) -> None:
        """From now on not ready, for good."""
        self.stop_asked.set()


@router.get("/health/live", summary="The process answers", responses=refusals(always=PROBE))
async def live() -> JSONResponse:
    """200 as long as the process answers at all. Needs no key."""
    return JSONResponse({"status": "live"}, headers={"Cache-Control": "no-store"})


@router.get(
    "/health/ready",
    summary="Work is welcome",
    responses={
        **refusals(always=PROBE),
        503: {"description": "Still warming up, or stopping; `pending` says what."},
    },
)
async def ready(request: Request) -> JSONResponse:
    """200 after the warm-up of the rules named in `warm_rules` and the recovery, else 503.

    Sessions that are damaged on the disk are named and do not count: the others serve.
    """
    state = request.app.state.ready
    pending = list(state.pending)
    pending += [f"recovery of session {name}" for name in state.recovering()[:100]]
    if state.stopping:
        pending.append("stopping")
    answer: dict[str, Any] = {"status": "ready" if state.ready else "not ready", "pending": pending}
    if damaged := state.damaged():
        answer["damaged"] = damaged
    headers = {"Cache-Control": "no-store"}
    if not state.ready:
        headers["Retry-After"] = "1"
    return JSONResponse(answer, status_code=200 if state.ready else 503, headers=headers)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **refusals(),
    },
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    return Response(request.app.state.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
