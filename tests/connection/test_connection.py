import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time

import pytest
import urllib3

from .sockets import connect, eventually, read_all, read_answer, recv_until_closed

MB = 1 << 20
BODY = bytes(40 * MB)


# --- silence


@pytest.mark.parametrize(
    "sent", [b"", b"POST /echo HTTP/1.1\r\nHost: x\r\nConte", b"G", b"\r\n"], ids=repr
)
def test_a_connection_without_a_whole_head_is_cut(serve, sent):
    with connect(serve()) as sock:
        sock.sendall(sent)
        assert recv_until_closed(sock) == b""


@pytest.mark.parametrize("sent", [b"GET /ec", b"\r\n\r\n"], ids=repr)
def test_half_a_second_request_is_cut(serve, sent):
    with connect(serve()) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert read_answer(sock)[0] == 200
        sock.sendall(sent)
        assert recv_until_closed(sock) == b""


def test_half_a_pipelined_request_does_not_cost_the_answer_before_it(serve):
    with connect(serve()) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET /sl")
        assert read_answer(sock) == (200, b"slow")
        assert recv_until_closed(sock) == b""


def test_an_idle_connection_is_closed_by_the_keep_alive_timer(serve):
    with connect(serve(keep_alive=1)) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert read_answer(sock)[0] == 200
        assert recv_until_closed(sock) == b""


# --- uploads


def test_a_stalled_body_is_answered_408_and_the_connection_ends(serve):
    with connect(serve()) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        status, text = read_answer(sock)
        assert status == 408
        assert json.loads(text)["type"] == "/problems/request-timeout"
        assert recv_until_closed(sock) == b""


def test_a_dripping_body_is_cut_by_the_least_rate(serve):
    with connect(serve()) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        sock.settimeout(0.05)
        answer = b""
        for _ in range(200):
            sock.sendall(b"x")
            try:
                answer = sock.recv(65536)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_mid_upload_is_a_disconnect(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        eventually(lambda: server.seen.requests == 1)
    eventually(lambda: server.seen.disconnects == 1)


def test_chunked_without_length(serve):
    with connect(serve()) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"3\r\nabc\r\n4\r\nabcd\r\n0\r\n\r\n")
        assert read_answer(sock) == (200, b'{"size": 7}')


def test_pipelined_requests_are_answered_in_order(serve):
    with connect(serve()) as sock:
        for size in (3, 0, 5):
            head = f"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
            sock.sendall(head.encode() + b"x" * size)
        reader = sock.makefile("rb")
        sizes = [json.loads(read_answer(sock, reader)[1])["size"] for _ in range(3)]
        assert sizes == [3, 0, 5]


def test_expect_continue(serve):
    with connect(serve()) as sock:
        sock.sendall(
            b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert sock.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ab")
        assert read_answer(sock) == (200, b'{"size": 2}')


# --- refusals

WHERE = pytest.mark.parametrize("after", [0, 10 * MB], ids=["from the head", "after 10 MB"])


@WHERE
def test_http_client_sees_an_early_refusal(serve, after):
    server = serve()
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for _ in range(8):
        client.request("POST", f"/refuse?after={after}", body=BODY)
        answer = client.getresponse()
        assert (answer.status, json.loads(answer.read())["type"]) == (
            409,
            "/problems/stale-gradient",
        )
        sock = client.sock
        client.request("POST", "/echo", body=b"abc")
        assert client.getresponse().read() == b'{"size": 3}'
        assert client.sock is sock  # the same connection, used again
    client.close()


@WHERE
def test_urllib3_sees_an_early_refusal(serve, after):
    server = serve()
    with urllib3.HTTPConnectionPool("127.0.0.1", server.port, retries=False, timeout=20) as pool:
        for _ in range(8):
            answer = pool.request("POST", f"/refuse?after={after}", body=BODY)
            assert answer.status == 409
            assert pool.request("POST", "/echo", body=b"abc").json() == {"size": 3}
        assert pool.num_connections == 1


@WHERE
@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_httpx_sees_an_early_refusal(serve, after, library):
    httpx = pytest.importorskip(library)
    server = serve()
    with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        for _ in range(8):
            assert client.post(f"/refuse?after={after}", content=BODY).status_code == 409
            assert client.post("/echo", content=b"abc").json() == {"size": 3}


@WHERE
@pytest.mark.parametrize("expect", ["Expect:", "Expect: 100-continue"])
def test_curl_sees_an_early_refusal(serve, tmp_path, after, expect):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    server = serve()
    (tmp_path / "body").write_bytes(BODY)
    command = ["curl", "-s", "--noproxy", "*", "-H", expect, "--data-binary", f"@{tmp_path}/body"]
    command += ["-o", str(tmp_path / "out"), "-w", "%{http_code}"]
    for _ in range(4):
        done = subprocess.run(
            [*command, f"{server.url}/refuse?after={after}"],
            capture_output=True,
            timeout=30,
            check=True,
        )
        assert done.stdout == b"409"


def refused(server, length):
    sock = connect(server)
    sock.sendall(f"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
    assert read_answer(sock)[0] == 409
    return sock


def test_swallowing_is_bounded_in_bytes(serve):
    with refused(serve(), 1 << 40) as sock:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30:
                sent += sock.send(BODY[:MB])
        assert 64 * MB <= sent < 128 * MB


def test_swallowing_is_bounded_in_seconds(serve):
    with refused(serve(), 100) as sock:
        sock.sendall(b"abc")
        assert recv_until_closed(sock) == b""


def test_a_connection_idle_after_a_refusal_is_closed(serve):
    with refused(serve(keep_alive=1), 3) as sock:
        sock.sendall(b"abc")
        assert recv_until_closed(sock) == b""


# --- heads


def test_garbage_is_a_400_problem(serve, caplog):
    with connect(serve()) as sock:
        sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        status, text = read_answer(sock)
        assert (status, json.loads(text)["status"]) == (400, 400)
        assert recv_until_closed(sock) == b""
    assert [record for record in caplog.records if record.exc_info] == []  # no traceback


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 70000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 5000 + b"\r\n",
    ],
    ids=["target", "header", "many"],
)
def test_a_large_head_is_refused(serve, head):
    with connect(serve()) as sock:
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_a_head_that_never_ends_is_refused(serve):
    with connect(serve()) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nA: ")
        time.sleep(0.1)
        sock.sendall(b"a" * 70000)
        assert recv_until_closed(sock).startswith(b"HTTP/1.1 431 ")


def test_garbage_behind_a_request_does_not_cost_its_answer(serve):
    with connect(serve()) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01\r\n\r\n")
        assert read_answer(sock) == (200, b"slow")
        recv_until_closed(sock)


# --- answers


def arena(nbytes):
    return f"GET /arena?nbytes={nbytes} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_a_slow_reader_gets_untorn_bytes(serve):
    server = serve()
    sizes = [0, 1, 30_000, 34_000, 65_536, 100_000, 300_000, 1_000_000, 2_500_000, 5_000_000] * 4
    with connect(server) as sock:
        for count, nbytes in enumerate([*sizes, 40_000_000], 1):
            sock.sendall(arena(nbytes))
            time.sleep(0.01)
            status, data = read_all(sock, pause_s=0.002)
            assert (status, len(data), data.count(7)) == (200, nbytes, nbytes)
            eventually(lambda count=count: server.seen.released == count)


@pytest.mark.parametrize("nbytes", [5_000, 30_000, 60_000])
def test_small_answers_behind_a_full_socket_are_untorn(serve, nbytes):
    # Below uvicorn's 64 KiB mark nothing waits by default: the last answers would tear.
    server, sizes = serve(), [12_000_000, *[nbytes] * 60]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(b"".join(map(arena, sizes)))
        time.sleep(0.4)
        with sock.makefile("rb") as reader:
            for size in sizes:
                status, data = read_all(sock, 0.0, reader)
                assert (status, data.count(7)) == (200, size)
    eventually(lambda: server.seen.released == len(sizes))


def test_a_stalled_reader_is_cut_and_the_buffer_released(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(arena(40_000_000))
        eventually(lambda: server.seen.released == 1)
        with pytest.raises((ConnectionError, EOFError)):
            read_all(sock)
    assert server.seen.released == 1


def test_a_reader_that_leaves_releases_once(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(arena(40_000_000))
        sock.recv(1000)
    eventually(lambda: server.seen.released == 1)
    time.sleep(0.2)
    assert server.seen.released == 1


def test_tls(serve, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = serve(ssl_keyfile=str(key), ssl_certfile=str(certificate))
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain:
        with context.wrap_socket(plain) as sock:
            for nbytes in (1, 100_000, 3_000_000, 10_000_000):
                sock.sendall(arena(nbytes))
                status, data = read_all(sock, pause_s=0.001)
                assert (status, len(data), data.count(7)) == (200, nbytes, nbytes)
            sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
            sock.sendall(BODY[:4_000_000])
            assert read_answer(sock) == (200, b'{"size": 4000000}')
    eventually(lambda: server.seen.released == 4)
