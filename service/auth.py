"""Who may call: the key, the peer's address, and the origins of web pages. Pure functions.

Without a key only this machine is answered. What a page in a browser of this machine could do is
then bounded by two rules: a foreign `Origin` is refused, and so is a `Host` that is a public name
(DNS rebinding makes such a page same-origin, so that `Origin` alone does not show it).
`X-Forwarded-For` and its kin are never believed: they only ever make a caller *less* local. A proxy
on this machine that adds none of them can not be told from a local caller.
"""

import functools
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from service.errors import BadRequest, KeyMissing, KeyRequired, KeyWrong, OriginRefused
from service.settings import Settings

_FORWARDED = frozenset({b"forwarded", b"via", b"x-real-ip"})  # and every X-Forwarded-*
_SINGLE = frozenset({b"authorization", b"host", b"origin"})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOCAL_SUFFIXES = (".localhost", ".internal", ".local", ".test")


def is_local(scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> bool:
    """Whether the peer is a process of this machine: loopback, a Unix socket, or in-process.

    A forwarding header means that a proxy speaks for somebody else, who is not local.
    """
    if any(name in _FORWARDED or name.startswith(b"x-forwarded-") for name in headers):
        return False
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        # A TCP peer that reset its connection has no address left either: only a server without
        # a port is a Unix socket (or a transport within the process).
        return server is None or server[1] is None
    return is_loopback(client[0])


@functools.lru_cache(maxsize=1024)  # parsing an address costs more than the rest of the front
def is_loopback(host: str) -> bool:
    """Whether an address is 127.0.0.0/8 or ::1, also written as IPv4 in IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def check_single(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuses a second `Host`, `Authorization` or `Origin`.

    A proxy may read the first one and we the last; then each rule is one that nobody checked.

    Raises:
        BadRequest: One of them is there twice.
    """
    names = [name for name, _ in headers if name in _SINGLE]
    if len(names) > len(set(names)):
        raise BadRequest("Send Host, Authorization and Origin once each.")


def check_key(settings: Settings, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
    """Passes a caller that carries the key, or where no key is set, one of this machine.

    Raises:
        KeyMissing: A key is set and the request has none (or it is no Bearer one).
        KeyWrong: It has another one.
        KeyRequired: No key is set, and the peer is on another machine.
    """
    if settings.api_key is not None:
        sent = headers.get(b"authorization", b"")
        scheme, _, token = sent.partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise KeyMissing('Send the key of this server as "Authorization: Bearer KEY".')
        if not hmac.compare_digest(token.strip(), settings.api_key.get_secret_value().encode()):
            raise KeyWrong("The bearer key is not the one of this server (GRADPOST_API_KEY).")
    elif not settings.insecure and not is_local(scope, headers):
        raise KeyRequired(
            "This server has no key and answers its own machine only. Start it with"
            " GRADPOST_API_KEY=SECRET and send that as a bearer key, or with GRADPOST_INSECURE=1"
            " where everyone who reaches it may write."
        )


def check_host(settings: Settings, headers: Mapping[bytes, bytes]) -> None:
    """Where nothing but the peer's address guards the server, refuses public names in `Host`.

    Addresses, `localhost` and names without a dot pass: no stranger can make those resolve here.

    Raises:
        OriginRefused: `Host` is a public name.
    """
    if settings.api_key is not None or settings.insecure:
        return
    host = headers.get(b"host", b"").decode("latin-1")
    if not is_private_name(host) and host.partition(":")[0].lower() != settings.host:
        raise OriginRefused(
            f"A server without a key is not served under the name {host[:200]!r}. Call it as"
            " localhost or by its address, or set GRADPOST_API_KEY."
        )


@functools.lru_cache(maxsize=1024)
def is_private_name(authority: str) -> bool:
    """Whether a `Host` is an address or a name that can't be bought: no dot, or a local suffix."""
    host = _authority(authority, "http")[0].rstrip(".")
    if not host:
        return not authority  # HTTP/1.0 sends none; what can't be parsed is refused
    if "." not in host or host.endswith(_LOCAL_SUFFIXES):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def allowed_origin(settings: Settings, headers: Mapping[bytes, bytes]) -> str | None:
    """The foreign origin that gets CORS headers; None if there is none or it is our own.

    Raises:
        OriginRefused: A web page of another origin calls, and the settings do not name it.
    """
    raw = headers.get(b"origin")
    if raw is None:
        return None
    origin = raw.decode("latin-1")
    if origin in settings.cors_origins or "*" in settings.cors_origins:
        return origin
    parts = urlsplit_or_none(origin)
    if parts is not None:
        scheme, netloc = parts
        host = headers.get(b"host", b"").decode("latin-1")
        ours = _authority(netloc, scheme)
        if ours[0] and ours == _authority(host, scheme):
            return None
    raise OriginRefused(
        f"Pages of {origin[:200]!r} may not call this server. Name that origin in"
        " GRADPOST_CORS_ORIGINS to allow it.",
        origin=origin[:200],
    )


def urlsplit_or_none(url: str) -> tuple[str, str] | None:
    """Scheme and authority of a URL; None if it can not be parsed."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return parts.scheme, parts.netloc


def _authority(netloc: str, scheme: str) -> tuple[str, int]:
    """Host in lower case and port, the scheme's own where none is written; ("", 0) if malformed."""
    try:
        parts = urlsplit(f"{scheme}://{netloc}")
        return (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(scheme, 0)
    except ValueError:
        return "", 0
