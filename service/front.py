"""The one middleware: request id, key and origin rules, metrics, access log, and the last resort.

Pure ASGI, and the only one: each further layer costs a small step 5 to 300 % (a Starlette
`BaseHTTPMiddleware` does), so what must see every request is done here in one pass.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradpost.protocol import EPOCH, REQUEST_ID, STEP, SUMMARY, VERSION
from service import auth, logs
from service.errors import Internal, ServiceError, problem_response
from service.metrics import Metrics
from service.settings import Settings

UNMATCHED = "(unmatched)"
CLIENT_GONE = 499  # nginx's number for a client that left; nothing was sent
# Scraped every few seconds: their lines appear at debug only.
_QUIET = ("/health/", "/metrics")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_ID_HEADER = REQUEST_ID.lower().encode()
_EXPOSED = ", ".join((EPOCH, VERSION, STEP, SUMMARY, REQUEST_ID, "ETag", "Location", "Retry-After"))
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": (
        f"Accept, Authorization, Content-Type, If-Match, If-None-Match, Prefer, {REQUEST_ID}"
    ),
    "Access-Control-Max-Age": "600",
}


def _none(scope: Scope) -> None:
    """Sends every request through the application."""


class Front:
    """Wraps the application.

    Args:
        app: What answers admitted requests.
        settings: Key, origins, log level and format.
        metrics: Where requests and refusals are counted.
        logger: Takes the access log; made from the settings if None.
        direct: Gives what answers a request that need not go through the application.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        logger: Any = None,
        direct: Callable[[Scope], ASGIApp | None] = _none,
    ) -> None:
        self._app = app
        self._direct = direct
        self._settings = settings
        self._metrics = metrics
        self._log = logger if logger is not None else logs.make(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; other kinds of connection pass untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        call = _Call(scope, headers, receive, send)
        try:
            answer: ASGIApp | None = self._admit(call, headers)
            answer = answer or self._direct(scope) or self._app
            await answer(scope, call.receive, call.send)
        except asyncio.CancelledError:
            call.status = call.status or CLIENT_GONE
            raise
        except ClientDisconnect:
            call.status = CLIENT_GONE
        except Exception as error:
            await self._fail(call, error)
        finally:
            self._account(call)

    def _admit(self, call: "_Call", headers: Mapping[bytes, bytes]) -> Response | None:
        """None for a request that may pass, else its answer: a refusal or a preflight."""
        scope = call.scope
        try:
            if len(headers) < len(scope["headers"]):
                auth.check_single(scope["headers"])
            origin = auth.allowed_origin(self._settings, headers)
            if origin is not None:
                call.cors = _cors(origin)
                if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                    return Response(status_code=204, headers=_PREFLIGHT)
            if not scope["path"].startswith("/health/"):
                auth.check_host(self._settings, headers)
                auth.check_key(self._settings, scope, headers)
        except ServiceError as error:
            return _refuse(scope, error)
        return None

    async def _fail(self, call: "_Call", error: Exception) -> None:
        """Logs what nobody expected, once, and answers 500 if nothing was sent yet."""
        self._write("error", "unexpected failure", request_id=call.request_id, exc_info=error)
        if call.status:
            # Part of the answer is out: returning with it unfinished makes the server cut the
            # connection, so that nobody takes the part for the whole.
            call.scope["gradpost.refusal"] = Internal.slug
            return
        sorry = Internal(
            "The server failed unexpectedly; its log has the reason under this request id."
            " Send the same bytes again to learn what became of them.",
            request_id=call.request_id,
        )
        await _refuse(call.scope, sorry)(call.scope, call.receive, call.send)

    def _account(self, call: "_Call") -> None:
        """Counts the request and writes its line."""
        scope, seconds = call.scope, time.perf_counter() - call.started
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.observe_request(
            scope["method"], route, call.status, call.received, call.sent, seconds
        )
        refusal = scope.get("gradpost.refusal")
        if refusal is not None:
            self._metrics.refusal(refusal)
        fields: dict[str, Any] = {
            "request_id": call.request_id,
            "method": scope["method"][:16],
            "route": route,
            "status": call.status,
            "ms": round(seconds * 1e3, 3),
            "received_bytes": call.received,
            "sent_bytes": call.sent,
        }
        session = scope.get("path_params", {}).get("id")
        if session is not None:
            fields["session"] = str(session)[:128]
        if refusal is not None:
            fields["refusal"] = refusal
        quiet = route.startswith(_QUIET) and call.status < 400
        self._write("debug" if quiet else "info", "request", **fields)

    def _write(self, level: str, event: str, **fields: Any) -> None:
        """Logs; a full disk or a closed pipe must not turn an answer into a failure."""
        try:
            getattr(self._log, level)(event, **fields)
        except (OSError, ValueError):
            pass


class _Call:
    """One request on its way: what is needed for its line in the log."""

    __slots__ = (
        *("_receive", "_send", "cors", "received", "request_id"),
        *("scope", "sent", "started", "status"),
    )

    def __init__(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        self._receive = receive
        self._send = send
        self.scope = scope
        self.cors: list[tuple[bytes, bytes]] | None = None
        self.received = self.sent = self.status = 0
        given = headers.get(_ID_HEADER)
        # A foreign id is kept only where it can't forge a log line or a header.
        well_formed = given is not None and _ID.fullmatch(given)
        self.request_id = given.decode() if given and well_formed else secrets.token_hex(8)
        scope["gradpost.request_id"] = self.request_id
        self.started = time.perf_counter()

    async def receive(self) -> Message:
        message = await self._receive()
        if body := message.get("body"):
            self.received += len(body)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [*message.get("headers", ()), (_ID_HEADER, self.request_id.encode())]
            message["headers"] = extra + self.cors if self.cors else extra
        elif body := message.get("body"):
            self.sent += body.nbytes if isinstance(body, memoryview) else len(body)
        await self._send(message)


def _refuse(scope: Scope, error: ServiceError) -> Response:
    scope["gradpost.refusal"] = error.slug
    response = problem_response(error)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="gradpost"'
    return response


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED.encode()),
        (b"vary", b"Origin"),
    ]
