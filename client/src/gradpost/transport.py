"""What a session asks of the way to its server."""

from collections.abc import Mapping, Sequence
from typing import Protocol

Part = bytes | memoryview


class Answer(Protocol):
    """One answer; `release` it whatever happens."""

    @property
    def status(self) -> int:
        """HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers, found in any case."""

    def readinto(self, view: memoryview) -> int:
        """Reads up to len(view) bytes of the body; 0 at its end. Raises TransportError."""

    def release(self) -> None:
        """Gives the connection back, or cuts it where bytes are left."""


class Transport(Protocol):
    """Sends requests; may be used by several threads."""

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Sequence[Part],
        timeout_s: float,
    ) -> Answer:
        """Sends one request, without retries.

        Raises:
            TransportError: No answer came.
        """

    def close(self) -> None:
        """Closes what is open."""


def read_all(answer: Answer) -> bytes:
    """The rest of a (small) body."""
    out = bytearray()
    chunk = memoryview(bytearray(1 << 16))
    while got := answer.readinto(chunk):
        out += chunk[:got]
    return bytes(out)
