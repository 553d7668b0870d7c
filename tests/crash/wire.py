"""HTTP by hand: what is sent, and how much of it, is the test's to say."""

import json
import socket
from typing import NamedTuple

TIMEOUT_S = 30.0


class Lost(Exception):
    """There is no answer, and nobody knows what became of the request."""


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def slug(self):
        """The kind of a refusal; "" of an answer that is none."""
        if self.status < 400:
            return ""
        return self.json["type"].removeprefix("/problems/")


class Connection:
    """One connection to a server on this machine."""

    def __init__(self, port):
        self._buffer = b""
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise Lost(str(error)) from error

    def ask(self, method, path, body=b"", **headers):
        """One request and its answer.

        Raises:
            Lost: No answer, or only a part of one.
        """
        self.send(method, path, body, **headers)
        return self.receive()

    def send(self, method, path, body=b"", *, cut=None, **headers):
        """Sends a request, or only its head and the first `cut` bytes of its body."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("content_type", "application/json")
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode()
        try:
            self._socket.sendall(head + body[:cut])
        except OSError as error:
            raise Lost(str(error)) from error

    def receive(self):
        """The next answer."""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        status, length = int(first.split(" ")[1]), int(headers.get("content-length", 0))
        while len(self._buffer) < length:
            self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Answer(status, headers, body)

    def _more(self):
        try:
            part = self._socket.recv(1 << 16)
        except OSError as error:
            raise Lost(str(error)) from error
        if not part:
            raise Lost("the connection ended")
        self._buffer += part

    def close(self):
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
