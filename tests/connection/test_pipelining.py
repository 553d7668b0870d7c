"""Several requests on one connection, and what may stand between them."""

import http.client
import json
import time
from dataclasses import replace

import pytest

from .conftest import LIMITS
from .sockets import connect, eventually, read_all, read_answer, recv_until_closed

BAD_CHUNK = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


def post(body, target=b"/echo", headers=b""):
    head = b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n"
    return head % (target, headers, len(body)) + body


def slow(seconds):
    return f"GET /slow?seconds={seconds} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


# --- a broken request behind good ones


@pytest.mark.parametrize(
    "broken",
    [
        *(b"\x00\x01\r\n\r\n", BAD_CHUNK, b"GET http://localhost HTTP/1.1\r\nHost: x\r\n\r\n"),
        *(b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 5000, post(b"12345", headers=UPGRADE)),
    ],
    ids=["garbage", "chunk", "target", "head", "upgrade"],
)
@pytest.mark.parametrize("good", [1, 3])
def test_a_broken_request_is_refused_after_the_answers_before_it(serve, broken, good):
    server = serve()
    with connect(server) as sock:
        sock.sendall(post(b"abc") * (good - 1) + slow(0.2) + broken)
        with sock.makefile("rb") as reader:
            answers = [read_all(sock, 0.0, reader) for _ in range(good)]
            assert answers == [(200, b'{"size": 3}')] * (good - 1) + [(200, b"slow")]
            status, text = read_all(sock, 0.0, reader)
            assert status in (400, 431)
            assert json.loads(text)["status"] == status
            assert reader.read() == b""
    assert server.seen.requests == good


def test_a_request_that_breaks_in_its_own_body_is_refused_and_its_reader_told(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(BAD_CHUNK)
        assert read_answer(sock)[0] == 400
        assert recv_until_closed(sock) == b""
    eventually(lambda: server.seen.disconnects == 1)


def test_a_broken_request_does_not_tear_the_answer_that_is_being_read(serve):
    with connect(serve()) as sock:
        sock.sendall(b"GET /arena?nbytes=8000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.2)
        sock.sendall(BAD_CHUNK)
        with sock.makefile("rb") as reader:
            status, data = read_all(sock, 0.0, reader)
            assert (status, data.count(7)) == (200, 8_000_000)
            assert read_all(sock, 0.0, reader)[0] == 400
            assert reader.read() == b""


# --- upgrades


@pytest.mark.parametrize("token", ["websocket", "h2c", "x"])
@pytest.mark.parametrize("framing", ["Content-Length: %d", "Transfer-Encoding: chunked\r\nX: %d"])
def test_a_body_behind_an_upgrade_is_never_a_request(serve, caplog, token, framing):
    server = serve()
    hidden = post(b"abc")
    with connect(server) as sock:
        head = f"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {token}\r\n"
        sock.sendall(head.encode() + framing.encode() % len(hidden) + b"\r\n\r\n")
        time.sleep(0.1)
        sock.sendall(hidden)
        status, text = read_answer(sock)
        assert status == 400
        assert "without Upgrade" in json.loads(text)["detail"]
        assert recv_until_closed(sock) == b""
    assert server.seen.requests == 0
    assert "websockets" not in caplog.text


def test_an_upgrade_without_a_body_is_answered_and_closes(serve, caplog):
    server = serve()
    with connect(server) as sock:
        sock.sendall(b"GET /slow?seconds=0 HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n")
        sock.sendall(post(b"abc"))
        assert read_answer(sock) == (200, b"slow")
        assert recv_until_closed(sock) == b""
    assert server.seen.requests == 1
    assert "websockets" not in caplog.text


def test_a_client_that_is_still_sending_reads_why(serve):
    client = http.client.HTTPConnection("127.0.0.1", serve().port, timeout=20)
    for _ in range(8):
        client.request(
            "POST", "/echo", bytes(8_000_000), {"Connection": "Upgrade", "Upgrade": "h2c"}
        )
        answer = client.getresponse()
        assert (answer.status, json.loads(answer.read())["type"]) == (400, "/problems/bad-request")
    client.close()


def test_what_follows_a_refusal_is_swallowed_within_bounds(serve):
    with connect(serve()) as sock:
        sock.sendall(post(b"12345", headers=UPGRADE))
        assert read_answer(sock)[0] == 400
        with pytest.raises(ConnectionError):
            _drip(sock)


def _drip(sock):
    for _ in range(1000):
        sock.sendall(b"x")
        time.sleep(0.02)


# --- depth


def test_requests_beyond_the_queue_are_refused(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(post(b"") * 500)
        with sock.makefile("rb") as reader:
            answered = 0
            while (answer := read_all(sock, 0.0, reader))[0] == 200:
                answered += 1
            assert LIMITS.queued < answered < 200
            problem = json.loads(answer[1])
            assert (problem["type"], problem["status"]) == ("/problems/overloaded", 429)
            assert problem["retryable"]
            assert reader.read() == b""
    assert server.seen.requests == answered


def test_nothing_is_read_while_requests_are_queued(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(slow(0.7) * 3)
        with sock.makefile("rb") as reader:
            assert read_all(sock, 0.0, reader)[0] == 200
            sock.sendall(post(b"") * 20)
            time.sleep(0.1)
            assert len(server.seen.connections[0].pipeline) <= 1
            answers = [read_all(sock, 0.0, reader)[0] for _ in range(22)]
    assert answers == [200] * 22
    assert server.seen.requests == 23


# --- trailers

CHUNKED = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_trailers_are_no_headers(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(CHUNKED + b"3\r\nabc\r\n0\r\nAuthorization: Bearer x\r\nX-T: 1\r\n\r\n")
        assert read_answer(sock) == (200, b'{"size": 3}')
        assert [name for name, _ in server.seen.headers] == [b"host", b"transfer-encoding"]
        sock.sendall(post(b"abcd", headers=b"X-T: 2\r\n"))
        assert read_answer(sock) == (200, b'{"size": 4}')
    assert (b"x-t", b"2") in server.seen.headers


@pytest.mark.parametrize("trailers", [b"a:\r\n" * 5000, b"a: " + b"a" * 70_000])
def test_trailers_count_as_head(serve, trailers):
    server = serve()
    with connect(server) as sock:
        sock.sendall(CHUNKED + b"3\r\nabc\r\n0\r\n")
        time.sleep(0.1)
        sock.sendall(trailers)
        assert read_answer(sock)[0] == 431
        assert recv_until_closed(sock) == b""


# --- how many connections


def test_connections_beyond_the_bound_are_told_so_and_the_others_go_on(serve):
    server = serve(limits=replace(LIMITS, max_connections=2))
    first, second = connect(server), connect(server)
    for sock in (first, second):
        sock.sendall(post(b"abc"))
        assert read_answer(sock)[0] == 200
    with connect(server) as third:
        third.sendall(post(bytes(100_000)))
        status, text = read_answer(third)
        assert (status, json.loads(text)["type"]) == (503, "/problems/overloaded")
        assert json.loads(text)["retryable"]
        assert "GRADPOST_MAX_CONNECTIONS" in json.loads(text)["detail"]
        assert recv_until_closed(third) == b""
    with connect(server) as probe:  # an orchestrator must not take a full server for a dead one
        probe.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(probe)[0] == 404
        assert recv_until_closed(probe) == b""
    second.close()
    first.sendall(post(b"abc"))
    assert read_answer(first)[0] == 200
    eventually(lambda: _answers(server))
    first.close()
    assert server.seen.requests == 4


def _answers(server):
    with connect(server) as sock:
        sock.sendall(post(b"abc"))
        return read_answer(sock)[0] == 200


# --- how fast a long body must be


@pytest.mark.parametrize(("length", "status"), [(80_000, 200), (60_000_000, 408)])
def test_the_least_rate_grows_with_the_length(serve, length, status):
    # 40 kB/s is far above the least rate; but the longer body would hold its memory for 25 minutes.
    with connect(serve()) as sock:
        sock.sendall(f"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        sock.settimeout(0.05)
        answer = b""
        for _ in range(200):
            if length > 0:
                sock.sendall(b"x" * min(2000, length))
                length -= 2000
            try:
                answer = sock.recv(65536)
                break
            except TimeoutError:
                continue
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
