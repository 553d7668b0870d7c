"""A real uvicorn on loopback, in a thread, over a toy application."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from service.answers import TensorAnswer
from service.connection import EXTENSION, Connection, ConnectionLimits, body, connection_class
from service.errors import StaleGradient, install

LIMITS = ConnectionLimits(
    header_timeout_s=0.5,
    body_idle_timeout_s=0.5,
    body_min_bytes_per_s=1000,
    reader_idle_timeout_s=0.8,
    reader_min_bytes_per_s=1000,
    drain_timeout_s=0.6,
    drain_bytes=64 << 20,
)


@dataclass
class Seen:
    """What the application saw."""

    requests: int = 0
    released: int = 0
    disconnects: int = 0
    bytes: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_app(seen: Seen) -> FastAPI:
    app = FastAPI()
    install(app)

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        seen.requests += 1
        size = 0
        try:
            async for chunk in body(request):
                size += len(chunk)
        except ClientDisconnect:
            seen.disconnects += 1
            return Response(status_code=400)
        seen.bytes = size
        seen.headers = list(request.headers.raw)
        return Response(json.dumps({"size": size}), media_type="application/json")

    @app.post("/refuse")
    async def refuse(request: Request, after: int = 0) -> Response:
        size = 0
        if after:
            async for chunk in body(request):
                size += len(chunk)
                if size >= after:
                    break
        raise StaleGradient("refused early")

    @app.get("/slow")
    async def slow(request: Request, seconds: float = 1.2) -> Response:
        seen.requests += 1
        seen.connections.append(request.scope["extensions"][EXTENSION])
        await asyncio.sleep(seconds)
        return Response("slow")

    @app.get("/arena")
    async def arena(nbytes: int) -> Response:
        data = np.full(nbytes, 7, np.uint8)

        def release() -> None:
            seen.released += 1
            data.fill(9)  # what the next step does to a buffer that nobody reads

        half = nbytes // 2
        return TensorAnswer(
            [b"", memoryview(data)[:half], memoryview(data)[half:]], 200, {}, release
        )

    return app


@pytest.fixture
def serve() -> Iterator[Callable[..., SimpleNamespace]]:
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(limits: ConnectionLimits = LIMITS, keep_alive: int = 30, **options: Any):
        seen = Seen()
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            make_app(seen),
            http=connection_class(limits),
            loop="uvloop",
            ws="none",
            access_log=False,
            log_level="error",
            timeout_keep_alive=keep_alive,
            timeout_graceful_shutdown=1,
            **options,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        port = listener.getsockname()[1]
        scheme = "https" if options.get("ssl_certfile") else "http"
        return SimpleNamespace(port=port, seen=seen, url=f"{scheme}://127.0.0.1:{port}")

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(20)
        assert not thread.is_alive()
    gc.collect()
