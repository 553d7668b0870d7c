"""An answer whose bytes live in a buffer that somebody wants back.

`send()` returns before the bytes have left the process, and uvloop holds the view, not a copy: an
arena that is overwritten right after the last `send()` tears most large answers. Each part goes out
as the view that it is, and then an empty last message. With the write-buffer limit that
`service.connection` sets, that message waits until the transport holds nothing any more: only then
is the buffer released.
"""

from collections.abc import Callable, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.connection import abort

COPIED = 32_768
"""Bytes up to which an answer is copied out of its buffers."""


class TensorAnswer(Response):
    """Sends buffers without copying them, and gives them back exactly once.

    Args:
        parts: C-contiguous buffers of any item type, sent in this order. Not copied: their content
            must stay until `release` is called.
        status: The HTTP status.
        headers: Headers beside Content-Length, which is set here.
        release: Called once, when the last byte has left the process or the connection is lost.
    """

    def __init__(
        self,
        parts: Sequence[memoryview | bytes],
        status: int,
        headers: Mapping[str, str],
        release: Callable[[], None],
    ) -> None:
        # Bytes, as len() of a typed view counts items; a view with nothing in it can not be cast.
        self.parts = [_bytes_of(part) for part in parts if memoryview(part).nbytes]
        self.release = release
        self.released = False
        self.background = None
        self.status_code = status
        self.body = b""
        self.init_headers(dict(headers))
        self.headers["content-length"] = str(sum(part.nbytes for part in self.parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything, waits for the barrier, releases."""
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        if 0 < int(self.headers["content-length"]) <= COPIED:
            # One copy is cheaper than three messages and a barrier, and frees the buffers at once.
            body = b"".join(self.parts)
            self.close()
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return
        try:
            await send(start)
            for part in self.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except BaseException:
            # Cancelled or refused half way: the transport may still hold a view of a buffer that is
            # about to be reused. Torn bytes must not arrive as if they were an answer.
            abort(scope)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Releases the buffers now, if that has not happened; for an answer that is never sent."""
        self.parts = []
        if not self.released:
            self.released = True
            self.release()


def _bytes_of(part: memoryview | bytes) -> memoryview:
    view = memoryview(part)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
