"""HTTP by urllib3: TCP, TLS, proxies and Unix sockets."""

import http.client
import os
import socket
import ssl
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from gradpost.errors import CertificateError, TransportError
from gradpost.transport import Part

_FAILURES = (urllib3.exceptions.HTTPError, OSError, http.client.HTTPException)
_UNIX = "http+unix://"
_CONNECT_S = 10.0
_JOINED = 1 << 16
"""Bytes up to which a body is sent as one piece: each piece is a wake-up of the server."""


class _UnixConnection(HTTPConnection):
    """A connection to a socket in the file system."""

    def __init__(self, *args: Any, path: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._path = path

    def _new_conn(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(_CONNECT_S)
            link.connect(self._path)
        except OSError as error:
            link.close()
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        return link


class _UnixPool(HTTPConnectionPool):
    ConnectionCls = _UnixConnection


class HttpAnswer:
    """An answer whose body is still on the wire."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response
        self._ended = False

    @property
    def status(self) -> int:
        """HTTP status."""
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers, found in any case."""
        return self._response.headers

    def readinto(self, view: memoryview) -> int:
        """Reads the next bytes in place."""
        try:
            got = self._response.readinto(view)
        except _FAILURES as error:
            raise TransportError(f"The answer broke off: {error}") from error
        self._ended = self._ended or got == 0
        return got

    def release(self) -> None:
        """Gives the connection back when the body was read to its end, else cuts it."""
        if self._ended or self._response.length_remaining == 0:
            self._response.release_conn()
        else:
            self._response.close()


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for this url."""
    parts = urlsplit(url)
    if parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _distrusted(error: BaseException) -> bool:
    """Whether a failure comes of a certificate that did not verify: no retry mends that."""
    causes: list[Any] = [error]
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        more = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args)
        causes += [c for c in more if isinstance(c, BaseException) and c not in causes]
    return False


class Http:
    """The transport to a url.

    Args:
        url: `http://…`, `https://…`, or `http+unix:///path/to.sock`.
        proxy: Url of an HTTP proxy; None: as the environment says; "": none.
        ca_certs: Path of the certificates to trust; None: the system's.
        connections: Connections kept open.

    Raises:
        ValueError: Another kind of url.
    """

    def __init__(
        self,
        url: str,
        *,
        proxy: str | None = None,
        ca_certs: str | None = None,
        connections: int = 4,
    ) -> None:
        options: dict[str, Any] = {"maxsize": connections, "retries": False}
        self._pool: urllib3.ProxyManager | HTTPConnectionPool
        if url.startswith(_UNIX):
            self._base = ""
            self._pool = _UnixPool("localhost", path=url.removeprefix(_UNIX), **options)
            return
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"{url!r} is no url; write http://host:port or {_UNIX}/path.")
        if ca_certs is not None and url.startswith("https"):
            options["ca_certs"] = os.fspath(ca_certs)
        proxy = _proxy_of(url) if proxy is None else proxy
        if proxy:
            self._base = url.rstrip("/")
            self._pool = urllib3.ProxyManager(proxy, **options)
        else:  # the pool of one host: a manager parses the url anew in each call
            self._base = urlsplit(url).path.rstrip("/")
            self._pool = urllib3.connection_from_url(url, **options)

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Sequence[Part],
        timeout_s: float,
    ) -> HttpAnswer:
        """Sends one request; the timeout bounds each wait for the network."""
        payload: Any = list(body) or None
        if payload and sum(map(len, body)) <= _JOINED:
            payload = [b"".join(body)]
        bodied = body or method not in ("GET", "HEAD", "DELETE")
        length = {"Content-Length": str(sum(map(len, body)))} if bodied else {}
        timeout = urllib3.Timeout(connect=min(timeout_s, _CONNECT_S), read=timeout_s)
        try:
            response = self._pool.urlopen(
                method,
                self._base + path,
                body=payload,
                headers={**headers, **length},
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
        except _FAILURES as error:
            if _distrusted(error):
                raise CertificateError(
                    f"The server's certificate is not trusted: {error}. Name the file of its "
                    "authority as ca_certs."
                ) from error
            raise TransportError(f"{method} {path.partition('?')[0]} failed: {error}") from error
        return HttpAnswer(response)

    def close(self) -> None:
        """Closes the idle connections."""
        if isinstance(self._pool, urllib3.ProxyManager):
            self._pool.clear()
        else:
            self._pool.close()
