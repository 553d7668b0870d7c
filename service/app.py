"""The only wiring: settings in, an ASGI application out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kernels.pool import Pool
from service import errors, logs, warm
from service.front import Front
from service.limits import Budget, Uploads
from service.metrics import Metrics
from service.routes import (
    groups,
    health,
    history,
    params,
    schedule,
    server,
    sessions,
    state,
    steps,
)
from service.schemas import CreateSession
from service.sessions.registry import Sessions
from service.sessions.session import Shared
from service.settings import Settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """Builds the application.

    Args:
        settings: The server's settings; read from the environment where None.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="gradpost",
        version=server.VERSION,
        summary="Gradients are posted, parameters come back.",
        lifespan=_lifespan,
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,  # a redirect repeats the Host that the caller chose
    )
    metrics = Metrics()
    budget = Budget(settings.memory_bytes)
    pool = Pool(settings.threads)
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.pool = pool
    app.state.budget = budget
    app.state.uploads = Uploads(settings.max_uploads)
    app.state.ready = health.Readiness(["warm-up"])
    app.state.sessions = Sessions(Shared(settings, pool, budget, metrics))
    metrics.watch(lambda: len(app.state.sessions), lambda: budget.used, lambda: budget.total)
    errors.install(app)
    # The router matches in order: the hot routes come first.
    for module in (steps, params, state, history, schedule, groups, sessions, server, health):
        app.include_router(module.router)
    app.router.routes.insert(0, steps.plain)
    app.add_middleware(Front, settings=settings, metrics=metrics)
    # FastAPI's own way to another document is to replace the method.
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    warming = asyncio.create_task(asyncio.to_thread(_warm, app))
    try:
        yield
    finally:  # a second signal cancels the rest; the thread of the warm-up must end all the same
        app.state.ready.stop()
    try:
        await warming
    finally:
        await app.state.sessions.drain()
        app.state.pool.close()


def _warm(app: FastAPI) -> None:
    """Loads the kernels of the rules that ready waits for, until a stop is asked for."""
    settings, ready = app.state.settings, app.state.ready
    try:
        warm.warm(settings.warm_rules, ("F32",), ready.stop_asked)
    except Exception as error:
        # The reason first: whoever sees the failure at /health/ready finds it in the log.
        logs.make(settings).error("the warm-up failed; /health/ready stays 503", exc_info=error)
        ready.failed("warm-up")
    else:
        ready.done("warm-up")


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read by hand."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        created = CreateSession.model_json_schema(
            ref_template="#/components/schemas/{model}", mode="validation"
        )
        schemas |= created.pop("$defs", {})
        schemas["CreateSession"] = created
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path in document["paths"].values():
            for operation in path.values():
                found = operation["responses"].get("422", {})
                if "HTTPValidationError" in str(found):
                    del operation["responses"]["422"]
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        app.openapi_schema = document
    return app.openapi_schema
