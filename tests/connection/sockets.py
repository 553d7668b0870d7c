"""What the tests do with raw sockets."""

import socket
import time


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def recv_until_closed(sock):
    """Everything until the server ends the connection, by close or reset; a timeout fails."""
    got = b""
    try:
        while piece := sock.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    return got


def read_all(sock, pause_s=0.0, reader=None):
    """Status and body of one answer, by its Content-Length, read slowly."""
    reader = reader or sock.makefile("rb", buffering=0)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = reader.read(1)
        if not piece:
            raise EOFError(head)
        head += piece
    length = next(
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    data = bytearray()
    while len(data) < length:
        piece = reader.read(min(length - len(data), 1 << 18))
        if not piece:
            raise EOFError(f"{len(data)} of {length}")
        data += piece
        time.sleep(pause_s)
    return int(head.split()[1]), bytes(data)


def read_answer(sock, reader=None):
    return read_all(sock, 0.0, reader)


def eventually(true, within_s=20.0):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
