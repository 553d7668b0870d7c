"""The only wiring: settings in, an ASGI application out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kernels.pool import Pool
from service import errors, logs, warm
from service.front import Front
from service.limits import Budget, Uploads
from service.metrics import Metrics
from service.routes import (
    checkpoints,
    groups,
    health,
    history,
    params,
    rounds,
    schedule,
    server,
    sessions,
    state,
    steps,
    workers,
)
from service.schemas import CreateSession
from service.sessions import recovery
from service.sessions.disk import Disk
from service.sessions.registry import Sessions
from service.sessions.session import Shared
from service.settings import Settings
from service.storage.failures import Damage, Damaged
from service.storage.files import Files
from service.storage.recovery import Pending


def create_app(settings: Settings | None = None, files: Files | None = None) -> FastAPI:
    """Builds the application, and opens the data folder if there is to be one.

    Args:
        settings: The server's settings; read from the environment where None.
        files: How the data folder is read and written; tests pass others.

    Raises:
        Refused: The data folder can't be opened: it is in use, newer, damaged, or not to be made.
        NoSpace: Its disk is full.
        StorageFailure: It can't be written.
    """
    settings = settings or Settings()
    disk = None
    if settings.data_dir is not None:
        disk = Disk(settings.data_dir, logs.make(settings), files)
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
    app.state.sessions = Sessions(Shared(settings, pool, budget, metrics, disk))
    app.state.ready.recovering = lambda: app.state.sessions.pending
    app.state.ready.damaged = lambda: [one._asdict() for one in app.state.sessions.damaged.values()]
    metrics.watch(lambda: len(app.state.sessions), lambda: budget.used, lambda: budget.total)
    metrics.watch_workers(*app.state.sessions.workers())
    errors.install(app)
    # The router matches in order: the hot routes come first.
    for module in (steps, params, state, history, schedule, groups, workers, rounds, checkpoints):
        app.include_router(module.router)
    for module in (sessions, server, health):
        app.include_router(module.router)
    app.add_middleware(Front, settings=settings, metrics=metrics, direct=steps.direct)
    # FastAPI's own way to another document is to replace the method.
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    sessions: Sessions = app.state.sessions
    disk = sessions.shared.disk
    begun = []
    if disk is not None:
        pending = await _survey(sessions, disk)  # before anyone can ask for a session in it
        app.state.ready.pending.append("recovery")
        begun.append(asyncio.create_task(_recover(app, disk, pending)))
    begun.append(asyncio.create_task(asyncio.to_thread(_warm, app)))
    if disk is not None:
        saving = asyncio.create_task(_save(sessions))
    try:
        yield
    finally:  # a second signal cancels the rest; the thread of the warm-up must end all the same
        app.state.ready.stop()
    try:
        await asyncio.gather(*begun)
        if disk is not None:
            saving.cancel()
            await asyncio.wait([saving])
    finally:
        await sessions.drain()
        if disk is not None:
            await sessions.finish()
        app.state.pool.close()
        if disk is not None:
            disk.close()


async def _survey(sessions: Sessions, disk: Disk) -> list[Pending]:
    """What the data folder holds, the small sessions first."""
    found = await disk.run(disk.store.recover)
    pending = sorted(found.pending, key=lambda one: one.row.size)
    sessions.expect([one.row.id for one in pending], found.damaged, found.tombstones)
    for damage in found.damaged.values():
        disk.log.error("a session can't be recovered", **damage._asdict())
    for note in (*found.notes, *(f"set aside: {name}" for name in found.orphans)):
        disk.log.warning("in the data folder", note=note)
    return pending


async def _recover(app: FastAPI, disk: Disk, pending: list[Pending]) -> None:
    """Takes up one session after another; those that are here serve meanwhile."""
    ready = app.state.ready
    try:
        for one in pending:
            if ready.stopping:
                break
            await _take_up(app.state.sessions, disk, one)
    except Exception as error:
        disk.log.error("the recovery failed; /health/ready stays 503", exc_info=error)
        ready.failed("recovery")
    else:
        ready.done("recovery")


async def _take_up(sessions: Sessions, disk: Disk, pending: Pending) -> None:
    """One session; one that can't be had stops no other."""
    name = pending.row.id
    try:
        found = await disk.run(partial(recovery.revive, sessions.shared, disk, pending))
    except (Damaged, MemoryError) as error:
        what, where = (error.what, error.where) if isinstance(error, Damaged) else (
            f"there is no memory for it ({error})", pending.row.snapshot
        )  # fmt: skip
        sessions.refuse(Damage(name, what, where))
        disk.log.error("a session can't be recovered", session=name, what=what, where=where)
    except Exception as error:
        sessions.refuse(Damage(name, f"unexpectedly: {error!r}; see the log", pending.row.snapshot))
        disk.log.error("a session can't be recovered", session=name, exc_info=error)
    else:
        session, is_cut = found
        sessions.adopt(session)
        tell = disk.log.warning if is_cut else disk.log.info
        tell(
            "recovered to an earlier snapshot, in a new epoch" if is_cut else "recovered",
            session=name, step=session.step, epoch=session.epoch,
            version=session.version,
        )  # fmt: skip


async def _save(sessions: Sessions) -> None:
    """Makes the snapshots that are due by time, for as long as the server runs."""
    interval = sessions.shared.settings.snapshot_interval_s
    while True:
        await asyncio.sleep(min(1.0, interval))
        await sessions.save()


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
