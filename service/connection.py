"""The uvicorn protocol of this server: what a slow, silent or rude peer may cost.

What stock uvicorn leaves open, and what stands here instead:

- A connection that says nothing, or half a request head: `header_timeout_s`, then cut.
- A head of any size: `head_bytes`, then 431 (uvicorn's own limit is for h11 only).
- A body that stops or drips: `body()` raises RequestTimeout, so that the client reads a 408.
- A reader that stops or drips: the connection is aborted. `transport.close()` would wait for the
  flush, and hold the parameters that are being sent.
- A body that holds memory for long: the least rate grows with its length, see `watch_body`.
- A refusal while the body is still coming: a plain answer, and the rest is swallowed, up to
  `drain_bytes` and `drain_timeout_s`. Closing with bytes unread sends a RST, and a client may never
  read why. Stock swallows without any bound, and forgets the keep-alive timer.
- What is no HTTP: the requests before it are answered, in order, then a 400 problem; nothing after
  it is parsed. Stock cuts in, so that a push that is applied reads 400.
- `Upgrade`: the parser takes the body behind it for another protocol, and would parse it as the
  next request. With a body it is refused; without one it is ignored, and the connection ends.
- Pipelining: nothing is read while a request is queued, and at most `queued` may be. Stock reads on
  after each answer, and queues all that one read holds.
- Trailers: counted as head, and dropped; stock adds them to the headers of the request.
- Connections beyond `max_connections`: 503, except for `/health/`.
- The write barrier: a message sent after a body waits until the transport holds none of it.

This leans on internals of uvicorn (`cycle`, `flow`, `pipeline`, the parser's callbacks), so the
version is pinned; tests/connection is what to run on a bump.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import httptools
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gradpost.protocol import PROBLEM
from service.errors import BadRequest, Overloaded, RequestTimeout, ServiceError
from service.flow import Flow, Pace

TESTED_UVICORN = "0.54.0"
EXTENSION = "gradpost.connection"
# A body may take this long at any length; a longer one must come at this many times the least rate.
BODY_TERM_S, LONG_BODY_RATE = 60, 256

_FRAMING = (b"content-length", b"transfer-encoding")
_NO_HTTP = "This is not a valid HTTP/1.1 request; what was answered before it holds."

if uvicorn.__version__ != TESTED_UVICORN:
    raise ImportError(
        f"service/connection.py leans on internals of uvicorn {TESTED_UVICORN}, but "
        f"{uvicorn.__version__} is installed. Install uvicorn=={TESTED_UVICORN}, or run "
        "tests/connection with the new version and change TESTED_UVICORN."
    )


@dataclass(frozen=True)
class ConnectionLimits:
    """What one peer may cost. Times in seconds, sizes in bytes; keep-alive is uvicorn's own.

    `drain_bytes` must be at least the largest body that is admitted anywhere, or a refusal of
    such a body does not reach every client. The least rates count once the idle time has passed.
    `head_bytes` is the request line and the headers.
    """

    header_timeout_s: float = 10.0
    body_idle_timeout_s: float = 30.0
    body_min_bytes_per_s: float = 4096.0
    reader_idle_timeout_s: float = 30.0
    reader_min_bytes_per_s: float = 4096.0
    drain_timeout_s: float = 10.0
    drain_bytes: int = 1 << 30
    head_bytes: int = 65536
    max_connections: int = 1000
    queued: ClassVar[int] = 64  # requests behind the one that is answered; no setting


class HeadTooLarge(BadRequest):
    """Request line and headers, or trailers, are too large."""

    status = 431


class Full(Overloaded):
    """The server has as many connections as it admits."""

    status = 503


class Connection(HttpToolsProtocol):
    """One client connection, with `limits`."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    flow: Flow
    deadline: asyncio.TimerHandle | None = None  # of the head, or of swallowing
    reader: Pace | None = None
    in_head = True  # between the first byte of a request and the end of its head; or nothing yet
    in_body = False  # the head is complete, the body is not
    swallowing = False  # the answer went out before the body was in
    surplus = False  # beyond `max_connections` when it was made
    ended = False  # nothing more is parsed
    refusal: ServiceError | None = None  # why, where it is not that the bytes are no HTTP
    began = False  # a request began in the piece that was just fed
    head = 0  # bytes of the head (or of trailers) that is being read, as they came
    parsed = 0  # the same, as the parser hands them out
    received = 0  # bytes of the body that is being read
    swallowed = 0

    def _arm(self, seconds: float | None, late: Callable[[], Any] | None = None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None
        if seconds is not None:
            self.deadline = self.loop.call_later(seconds, late or self.transport.abort)

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._arm(self.limits.header_timeout_s, self._head_late)

    def _head_late(self) -> None:
        # Half a pipelined request must not cost the answer to the one before it.
        self._await_head() if self._busy() else self.transport.abort()

    # asyncio types a protocol by BaseTransport and hands every TCP or Unix one a Transport.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Sets the barrier and starts the clock of the first head."""
        super().connection_made(transport)
        self.flow = Flow(transport)
        self.surplus = len(self.connections) > self.limits.max_connections
        # 0: any byte unsent pauses the writer. With TLS 0 pauses for ever (its layer tests 0 >= 0).
        transport.set_write_buffer_limits(high=int(self.scheme == "https"), low=0)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops every clock."""
        self._arm(None)
        self.resume_writing()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # stock leaves it running when there was an error

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, until something is no HTTP for us; refuses a head without end."""
        if self.ended:
            self._swallow(len(data))
            return
        self._unset_keepalive_if_required()
        self.began, received = False, self.received
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # It has no body and is answered; the parser dropped what came behind it.
            self.ended = True
            self.flow.hold()
        except httptools.HttpParserError:
            self._fail()
        if self.ended or self.transport.is_closing():
            return
        # The parser keeps an unfinished line of a head or a trailer to itself, so bytes are counted
        # here too; not those of a piece that holds a body, or in which the request began.
        if self.in_head or self.in_body:
            quiet = not self.began and self.received == received
            self.head = self.head + len(data) if quiet else 0
            if self.head > self.limits.head_bytes:
                self.refusal = self._too_large()
                self._fail()
        elif not self._busy() and self.timeout_keep_alive_task is None:
            self._await_head()  # empty lines stop the keep-alive timer and begin no request

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        # ASGI types an extension as a dict; the object itself is what `abort` and `body` need.
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]
        self.in_head = self.began = True
        self.head = self.parsed = self.received = 0
        self._await_head()

    def _grow(self, size: int) -> None:
        self.parsed += size
        if self.parsed > self.limits.head_bytes:
            self._refuse(self._too_large())

    def _too_large(self) -> ServiceError:
        return HeadTooLarge(
            f"Request line and headers must be at most {self.limits.head_bytes} bytes."
        )

    def _refuse(self, error: ServiceError) -> NoReturn:
        self.refusal = error
        raise error  # the parser stops: see data_received

    def on_url(self, url: bytes) -> None:
        """Takes a piece of the target."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; each counts 32 bytes more, as an object costs memory even when empty."""
        self._grow(len(name) + len(value) + 32)
        if not self.in_body:  # else a trailer, which must not become `Authorization`
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: the application starts, or the head is refused."""
        self._admit()
        super().on_headers_complete()  # may raise too: its request has not begun then
        self._arm(None)
        self.in_head, self.in_body = False, True
        if self.surplus or self.parser.should_upgrade():
            self.cycle.keep_alive = False
        if self.pipeline:
            self.flow.hold()

    def _admit(self) -> None:
        limits = self.limits
        if self.surplus and not self.url.startswith(b"/health/"):
            self._refuse(
                Full(
                    f"{limits.max_connections} connections are open, as many as this server admits"
                    " (GRADPOST_MAX_CONNECTIONS). Send the same request again on a new one.",
                    retry_after_s=1,
                )
            )
        if len(self.pipeline) >= limits.queued:
            self._refuse(
                Overloaded(
                    f"{limits.queued} requests wait on this connection, as many as may. Those up to"
                    " here are answered; read the answers before you send more.",
                    retry_after_s=1,
                )
            )
        if self.parser.should_upgrade() and any(name in _FRAMING for name, _ in self.headers):
            self._refuse(
                BadRequest("A request with a body is read without Upgrade only; send it so.")
            )

    def on_body(self, body: bytes) -> None:
        """Counts, and passes on or swallows."""
        self.received += len(body)
        if self.swallowing:
            self._swallow(len(body))
        super().on_body(body)

    def _swallow(self, size: int) -> None:
        self.swallowed += size
        if self.swallowed > self.limits.drain_bytes:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """The body is complete."""
        self.in_body = False
        super().on_message_complete()
        if self.swallowing and not self.transport.is_closing():
            self.swallowing = False
            self._arm(None)
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """An answer is out; if it came before its request was in, the rest is swallowed."""
        # A queued request is not the one answered; its body may be open with nothing refused.
        last = not self.pipeline
        early = self.in_body and last and self.cycle.response_complete
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.ended:
            if last:
                self._end()
            return
        if not self.pipeline:
            self.flow.let_go()
        if early:
            self._unset_keepalive_if_required()
            self.swallowing, self.swallowed = True, 0
            self._arm(self.limits.drain_timeout_s)
        elif self.in_head and self.deadline is not None:
            self._await_head()  # reading may have been paused until now: a whole term from here

    def _fail(self) -> None:
        """What came is no HTTP, or too much: what is owed is answered, then the refusal."""
        self.ended = True
        self._arm(None)
        if self.in_body and not self.pipeline:  # it is the running request that broke
            if self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True  # so that the application's answer is not a second one
            self.cycle.message_event.set()
            self._end()
        elif self.in_body or self._busy():
            if self.in_body:
                self.pipeline.popleft()  # its head was good, so it waits there
            self.flow.hold()
        else:
            self._end()

    def _end(self) -> None:
        """Sends the refusal, then swallows until the client has read it and closes."""
        refusal = self.refusal or BadRequest(_NO_HTTP)
        self.logger.warning("%s", refusal.detail)  # the application, which logs, never sees it
        self._unset_keepalive_if_required()
        self.transport.write(_rendered(refusal))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.swallowed = 0
        # close, not abort: an answer before this one may still be on its way to a slow reader
        self._arm(self.limits.drain_timeout_s, self.transport.close)
        self.flow.let_go()

    def pause_writing(self) -> None:
        """The transport holds bytes: from here on the peer is watched."""
        super().pause_writing()
        if self.reader is None:
            limits = self.limits
            self.reader = Pace(
                self.loop,
                limits.reader_idle_timeout_s,
                limits.reader_min_bytes_per_s,
                lambda: -self.transport.get_write_buffer_size(),
                self.transport.abort,
            )

    def resume_writing(self) -> None:
        """The transport holds nothing."""
        if self.reader is not None:
            self.reader.stop()
            self.reader = None
        super().resume_writing()

    def watch_body(self, length: int, late: Callable[[], None]) -> Pace:
        """Watches the body of the current request.

        A body holds memory from its head on, so one may not drip for days: it must be in within a
        minute, or come at 256 times the least rate, whichever asks less.

        Args:
            length: Its Content-Length.
            late: Called when it stops or is too slow.
        """
        limits, least = self.limits, self.limits.body_min_bytes_per_s
        return Pace(
            self.loop,
            limits.body_idle_timeout_s,
            max(least, min(length / BODY_TERM_S, LONG_BODY_RATE * least)),
            lambda: self.received,
            late,
        )


def _rendered(error: ServiceError) -> bytes:
    text = json.dumps(error.problem()).encode()
    headers = {"content-type": PROBLEM, "content-length": len(text), **error.headers()}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[error.status] + head.encode() + b"connection: close\r\n\r\n" + text


def connection_class(limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """The protocol class with these limits, for `uvicorn.Config(http=...)`."""
    return type("Connection", (Connection,), {"limits": limits})


def abort(scope: Scope) -> None:
    """Cuts the connection of a request at once, dropping what was not sent; a no-op elsewhere."""
    connection = scope.get("extensions", {}).get(EXTENSION)
    if connection is not None:
        connection.transport.abort()


async def body(request: Request) -> AsyncIterator[bytes]:
    """Yields the body as it arrives; the time that the consumer takes is not the client's.

    Under another server (or an in-process transport) there is no watch, and everything else holds.

    Raises:
        RequestTimeout: The body stopped, or came more slowly than the least rate.
        ClientDisconnect: The client went away before the end.
    """
    connection = request.scope.get("extensions", {}).get(EXTENSION)
    timed_out = False

    def late() -> None:
        nonlocal timed_out
        if connection.in_body:  # else this request's body is in, and `cycle` may be the next one's
            timed_out = True
            connection.cycle.message_event.set()  # receive() returns an empty chunk

    stated = request.headers.get("content-length", "0")  # the parser took it for a number
    pace: Pace | None = connection.watch_body(int(stated), late) if connection is not None else None
    try:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect()
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if timed_out and more and not chunk:
                raise RequestTimeout(
                    "The body stopped, or came too slowly, and was given up; nothing was changed. "
                    "Send the same request again."
                )
            if chunk:
                if pace is not None:
                    pace.hold()
                yield chunk
                if pace is not None:
                    pace.go()
    finally:
        if pace is not None:
            pace.stop()
