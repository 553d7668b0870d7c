"""An ASGI application as transport: no socket, for tests and notebooks."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import unquote

from gradpost.errors import TransportError
from gradpost.transport import Part

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


class _Headers(dict[str, str]):
    """Lower-cased names, found in any case."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class MemoryAnswer:
    """An answer that has arrived whole."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers: Mapping[str, str] = _Headers({k.lower(): v for k, v in headers.items()})
        self._left = memoryview(body)

    def readinto(self, view: memoryview) -> int:
        """Copies the next bytes."""
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def release(self) -> None:
        """Drops what is left."""
        self._left = memoryview(b"")


class InProcess:
    """Runs an application, its lifespan included, on an event loop in a thread of its own.

    Args:
        app: An ASGI 3 application.
        start_timeout_s: Seconds that its start and its stop may take.
    """

    def __init__(self, app: App, *, start_timeout_s: float = 60.0) -> None:
        self._app = app
        self._limit_s = start_timeout_s
        self._loop = asyncio.new_event_loop()
        self._state: dict[str, Any] = {}
        self._stop = asyncio.Event()
        self._started: Future[None] = Future()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gradpost-app", daemon=True)
        self._thread.start()
        self._started.result(start_timeout_s)

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Sequence[Part],
        timeout_s: float,
    ) -> MemoryAnswer:
        """Runs one request to its end."""
        if self._closed:
            raise TransportError("This in-process server was closed.")
        call = self._call(method, path, headers, body)
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise TransportError(f"{method} {path} took longer than {timeout_s} s.") from error
        except Exception as error:
            raise TransportError(f"The application failed: {error!r}") from error

    def close(self) -> None:
        """Runs the application's shutdown and ends the thread."""
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(self._limit_s)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._lifespan())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _lifespan(self) -> None:
        """Starts the application, waits for `close`, stops it."""
        delivered = False  # the startup

        async def receive() -> Message:
            nonlocal delivered
            if not delivered:
                delivered = True
                return {"type": "lifespan.startup"}
            await self._stop.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._started.set_result(None)
            elif message["type"] == "lifespan.startup.failed":
                raise RuntimeError(str(message.get("message", "the application did not start")))

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        await self._app(scope, receive, send)

    async def _call(
        self, method: str, path: str, headers: Mapping[str, str], body: Sequence[Part]
    ) -> MemoryAnswer:
        """One request through the application."""
        path, _, query = path.partition("?")
        fields = {"host": "in-process", **{k.lower(): v for k, v in headers.items()}}
        has_length = body or method not in ("GET", "HEAD", "DELETE")
        if has_length and "transfer-encoding" not in fields:
            fields.setdefault("content-length", str(sum(map(len, body))))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in fields.items()],
            "client": ("127.0.0.1", 1),
            "server": ("in-process", 80),
            "state": self._state.copy(),
        }
        parts = list(body)
        gone = asyncio.Event()
        status, names, out = 0, {}, bytearray()

        async def receive() -> Message:
            if parts:
                part = bytes(parts.pop(0))
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            if not body and not gone.is_set():
                gone.set()
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()  # the peer stays until it has its answer
            raise AssertionError("unreachable")

        async def send(message: Message) -> None:
            nonlocal status, names
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {k.decode("latin-1"): v.decode("latin-1") for k, v in message["headers"]}
            elif message["type"] == "http.response.body":
                out.extend(message.get("body", b""))

        await self._app(scope, receive, send)
        return MemoryAnswer(status, names, bytes(out))
