"""A small application behind the front, and one way to call it without sockets."""

import asyncio
import io
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response

from service import errors, logs
from service.front import Front
from service.metrics import Metrics
from service.routes import health, server
from service.settings import Settings

SECRET = "correct-horse"


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for n, v in self.headers if n == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def slug(self) -> str:
        return self.json()["type"].removeprefix("/problems/")


class Site:
    """The application, its log, and `call`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.stream = io.StringIO()
        self.metrics = Metrics()
        app = self.app = FastAPI()
        app.add_middleware(
            Front,
            settings=self.settings,
            metrics=self.metrics,
            logger=logs.make(self.settings, self.stream),
        )
        errors.install(app)
        app.include_router(health.router)
        app.include_router(server.router)
        app.state.settings, app.state.metrics = self.settings, self.metrics
        app.state.ready = health.Readiness()
        app.state.pool = SimpleNamespace(threads=3)
        app.post("/v1/sessions/{id}/steps")(_step)
        app.get("/broken")(_broken)
        app.get("/half")(_half)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        client: tuple[str, int] | None = ("127.0.0.1", 4000),
        server: tuple[str, int | None] | None = ("127.0.0.1", 8000),
        query: bytes = b"",
        also: tuple[tuple[str, str], ...] = (),
    ) -> Answer:
        raw = {"host": "127.0.0.1:8000", **{k.lower(): v for k, v in (headers or {}).items()}}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query,
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in (*raw.items(), *also)],
            "client": client,
            "server": server,
        }
        return asyncio.run(self._run(scope, body))

    async def _run(self, scope: dict[str, Any], body: bytes) -> Answer:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start = next(m for m in sent if m["type"] == "http.response.start")
        return Answer(
            start["status"],
            [(k.decode(), v.decode()) for k, v in start["headers"]],
            b"".join(m.get("body", b"") for m in sent),
        )


async def _step(request: Request, id: str) -> Response:
    data = await request.body()
    if data == b"old":
        raise errors.StaleGradient("Pull again.", version=3)
    return Response(b"ok!")


async def _broken() -> Response:
    raise RuntimeError("wires crossed")


async def _half() -> Any:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ha", "more_body": True})
        raise RuntimeError("cut short")

    class Half(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await answer(scope, receive, send)

    return Half()
