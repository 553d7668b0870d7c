"""TLS and proxies: trusted, distrusted, and on the way through a CONNECT proxy."""

import contextlib
import gc
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading

import pytest

from gradpost import CertificateError, Http
from gradpost.transport import read_all

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"path": self.path}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Connect(http.server.BaseHTTPRequestHandler):
    """The least that a CONNECT proxy does."""

    asked: list

    def do_CONNECT(self):
        self.asked.append(self.path)
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port))) as far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=pump, args=(far, self.connection))
            back.start()
            pump(self.connection, far)
            back.join()
        self.close_connection = True

    def log_message(self, *_):
        pass


def pump(source, target):
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that distrusts us hangs up; that is what is tested."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def port(certificate):
    server = Quiet(("127.0.0.1", 0), Hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server) as port:
        yield port


def get(transport):
    answer = transport.request("GET", "/hello", {}, [], 10)
    try:
        return json.loads(read_all(answer))
    finally:
        answer.release()
        transport.close()


def test_a_trusted_certificate(port, certificate):
    found = get(Http(f"https://127.0.0.1:{port}", ca_certs=str(certificate / "cert.pem")))
    assert found == {"path": "/hello"}


def test_a_distrusted_certificate_is_final(port):
    with pytest.raises(CertificateError) as raised:
        get(Http(f"https://127.0.0.1:{port}"))
    assert not raised.value.retryable
    assert "ca_certs" in str(raised.value)
    del raised
    gc.collect()


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_proxy(port, certificate, monkeypatch, by):
    proxy = Quiet(("127.0.0.1", 0), type("Noted", (Connect,), {"asked": []}))
    with running(proxy) as proxy_port:
        address = f"http://127.0.0.1:{proxy_port}"
        options = {"ca_certs": str(certificate / "cert.pem")}
        if by == "argument":
            options["proxy"] = address
        else:
            monkeypatch.setenv("https_proxy", address)
        assert get(Http(f"https://localhost:{port}", **options)) == {"path": "/hello"}
        assert proxy.RequestHandlerClass.asked == [f"localhost:{port}"]
