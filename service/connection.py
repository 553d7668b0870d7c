"""The uvicorn protocol of this server: what a slow, silent or rude peer may cost.

What stock uvicorn leaves open, and what stands here instead:

- A connection that says nothing, or half a request head: `header_timeout_s`, then cut.
- A head of any size: `head_bytes`, then 431 (uvicorn's own limit is for h11 only).
- A body that stops or drips: `body()` raises RequestTimeout, so that the client reads a 408.
- A reader that stops or drips: the connection is aborted. `transport.close()` would wait for the
  flush, and hold the parameters that are being sent.
- A refusal while the body is still coming: a plain answer, and the rest is swallowed, up to
  `drain_bytes` and `drain_timeout_s`. Closing with bytes unread sends a RST, and a client may never
  read why. Stock swallows without any bound, and forgets the keep-alive timer.
- The write barrier: a message sent after a body waits until the transport holds none of it.

This leans on internals of uvicorn (`cycle`, `flow`, `pipeline`, the parser's callbacks), so the
version is pinned; tests/connection is what to run on a bump.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gradpost.protocol import PROBLEM
from service.errors import BadRequest, RequestTimeout

TESTED_UVICORN = "0.54.0"
EXTENSION = "gradpost.connection"

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
    """

    header_timeout_s: float = 10.0
    body_idle_timeout_s: float = 30.0
    body_min_bytes_per_s: float = 4096.0
    reader_idle_timeout_s: float = 30.0
    reader_min_bytes_per_s: float = 4096.0
    drain_timeout_s: float = 10.0
    drain_bytes: int = 1 << 30
    head_bytes: ClassVar[int] = 65536  # request line and headers: no setting, as nothing needs more


class Pace:
    """Watches a byte counter; calls `late` once when it stops for `idle_s` or falls behind `least`.

    One lazy timer instead of one per chunk, which would cost a tenth of a large upload. So it is
    late itself, by half of `idle_s` at most.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        idle_s: float,
        least: float,
        count: Callable[[], int],
        late: Callable[[], None],
    ) -> None:
        self.loop, self.idle_s, self.least, self.count, self.late = loop, idle_s, least, count, late
        self.first = self.last = count()
        self.start = self.moved = loop.time()
        self.held_at: float | None = None
        self.timer = loop.call_later(idle_s / 2, self._tick)

    def _tick(self) -> None:
        now = self.loop.time()
        if self.held_at is None:
            if (done := self.count()) != self.last:
                self.last, self.moved = done, now
            owed = self.least * (now - self.start - self.idle_s)
            if now - self.moved >= self.idle_s or done - self.first < owed:
                return self.late()
        self.timer = self.loop.call_later(self.idle_s / 2, self._tick)

    def hold(self) -> None:
        """Stops the clock: the peer is not the one that is awaited."""
        self.held_at = self.loop.time()

    def go(self) -> None:
        """Lets the clock run again."""
        if self.held_at is not None:
            away = self.loop.time() - self.held_at
            self.start, self.moved, self.held_at = self.start + away, self.moved + away, None

    def stop(self) -> None:
        """Ends the watch."""
        self.timer.cancel()


class Connection(HttpToolsProtocol):
    """One client connection, with `limits`."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    deadline: asyncio.TimerHandle | None = None  # of the head, or of swallowing
    reader: Pace | None = None
    in_head = True  # between the first byte of a request and the end of its head; or nothing yet
    in_body = False  # the head is complete, the body is not
    swallowing = False  # the answer went out before the body was in
    too_large = False
    began = False  # a request began in the piece that was just fed
    head = 0  # bytes of the head that is being read, as they came
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Sets the barrier and starts the clock of the first head."""
        super().connection_made(transport)
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
        """Feeds the parser; refuses a head that grows without end."""
        self.began = False
        super().data_received(data)
        if self.transport.is_closing() or self.in_body:
            return
        # The parser keeps an unfinished header line to itself, so bytes are counted here too; not
        # those of the piece in which the request began, as a body before it may fill most of it.
        if self.in_head:
            self.head += 0 if self.began else len(data)
            if self.head > self.limits.head_bytes:
                self.too_large = True
                self.send_400_response("")
        elif not self._busy() and self.timeout_keep_alive_task is None:
            self._await_head()  # empty lines stop the keep-alive timer and begin no request

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]
        self.in_head = self.began = True
        self.head = self.parsed = self.received = 0
        self._await_head()

    def _grow(self, size: int) -> None:
        self.parsed += size
        if self.parsed > self.limits.head_bytes:
            self.too_large = True
            raise ValueError("request head too large")  # the parser stops; see send_400_response

    def on_url(self, url: bytes) -> None:
        """Takes a piece of the target."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; each counts 32 bytes more, as an object costs memory even when empty."""
        self._grow(len(name) + len(value) + 32)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete, the application starts."""
        self._arm(None)
        self.in_head, self.in_body = False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Counts, and passes on or swallows."""
        self.received += len(body)
        if self.swallowing:
            self.swallowed += len(body)
            if self.swallowed > self.limits.drain_bytes:
                self.transport.abort()
        super().on_body(body)

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
        early = self.in_body and not self.pipeline and self.cycle.response_complete
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if early:
            self._unset_keepalive_if_required()
            self.swallowing, self.swallowed = True, 0
            self._arm(self.limits.drain_timeout_s)
        elif self.in_head and self.deadline is not None:
            self._await_head()  # reading may have been paused until now: a whole term from here

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

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP with a problem, and ends the connection."""
        if self._busy() and not self.in_body:
            # Garbage behind a good request: that one is answered, then the connection ends.
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if not (self._busy() and self.cycle.response_started) and not self.swallowing:
            self.transport.write(_refusal(self.too_large, self.limits.head_bytes))
        self.transport.close()

    def watch_body(self, late: Callable[[], None]) -> Pace:
        """Watches the body of the current request."""
        limits = self.limits
        return Pace(
            self.loop,
            limits.body_idle_timeout_s,
            limits.body_min_bytes_per_s,
            lambda: self.received,
            late,
        )


def _refusal(too_large: bool, head_bytes: int) -> bytes:
    problem = BadRequest("This is not a valid HTTP/1.1 request; nothing was done.").problem()
    if too_large:
        problem["status"] = 431
        problem["detail"] = f"Request line and headers must be at most {head_bytes} bytes."
    text = json.dumps(problem).encode()
    head = f"content-type: {PROBLEM}\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[problem["status"]] + head.encode() + text


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

    pace: Pace | None = connection.watch_body(late) if connection is not None else None
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
