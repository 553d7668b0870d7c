"""The floors of a push_pull: the same bytes there and back, with no optimizer in between.

`python -m benchmarks.echoes tcp PORT` and `... asgi PORT` are the peers; `benchmarks.push_pull`
starts them.
"""

import ctypes
import socket
import sys
from typing import Any

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1


def tcp(port: int) -> None:
    """Blocking sockets: an 8-byte length, that many bytes, and the same back."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            link, _ = listener.accept()
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with link:
                while head := link.recv(8, socket.MSG_WAITALL):
                    body = _buffer(int.from_bytes(head, "little"))
                    receive(link, body)
                    link.sendall(body)


_buffers: dict[int, memoryview] = {}


def _buffer(size: int) -> memoryview:
    if size not in _buffers:
        _buffers[size] = memoryview(bytearray(size))
    return _buffers[size]


def receive(link: socket.socket, view: memoryview) -> None:
    """Fills the view from the socket."""
    done = 0
    while done < len(view):
        done += link.recv_into(view[done:])


def asgi(port: int) -> None:
    """Bare uvicorn and one FastAPI route: httptools, uvloop, tuned malloc, one copy per chunk."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_THRESHOLD, 32 << 20)
    mallopt(TRIM_THRESHOLD, 512 << 20)
    import uvicorn
    from fastapi import FastAPI, Request

    api = FastAPI()

    @api.post("/empty")
    async def empty() -> dict[str, Any]:
        return {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/echo":
            await api(scope, receive, send)
            return
        request = Request(scope, receive)
        view = _buffer(int(request.headers["content-length"]))
        at = 0
        async for chunk in request.stream():
            view[at : at + len(chunk)] = chunk
            at += len(chunk)
        length = str(at).encode()
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", length)]})  # fmt: skip
        await send({"type": "http.response.body", "body": view})

    uvicorn.run(app, port=port, http="httptools", loop="uvloop", ws="none", access_log=False,
                log_level="warning", timeout_keep_alive=600)  # fmt: skip


if __name__ == "__main__":
    {"tcp": tcp, "asgi": asgi}[sys.argv[1]](int(sys.argv[2]))
