"""Bodies as streams: into a reader, or, for JSON, gathered."""

from collections.abc import AsyncIterator

from gradpost.protocol import MAX_HEADER_BYTES, SAFETENSORS
from gradpost.protocol.dtypes import DTYPES
from service.errors import BadRequest, BodyTooLarge, LengthRequired
from service.wire.reader import LayoutLike, Reader, overlong, truncated


def content_length(value: str | None, limit: int) -> int:
    """Reads Content-Length, which every body must state.

    Args:
        value: The header as it came, or None.
        limit: Largest admissible body, in bytes.

    Raises:
        LengthRequired: Absent, as with chunked transfer.
        BadRequest: Not a whole number.
        BodyTooLarge: Above the limit.
    """
    if value is None:
        raise LengthRequired(
            "State Content-Length; a body in chunked transfer is not read here (give your HTTP "
            "client the whole body or its length)."
        )
    digits = value.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19):
        raise BadRequest(
            f"Content-Length {digits[:40]!a} is not a number of bytes; send digits only."
        )
    length = int(digits)
    if length > limit:
        raise BodyTooLarge(
            f"The body has {length} bytes and may have {limit} here; send the session's tensors "
            "once and nothing else.",
            limit=limit,
            length=length,
        )
    return length


def largest_push(layout: LayoutLike, master: str) -> int:
    """Bytes of the largest admissible gradient: a full header, then the vector in `master`."""
    return 8 + MAX_HEADER_BYTES + layout.size * DTYPES[master]


async def receive(stream: AsyncIterator[bytes], length: int, reader: Reader) -> None:
    """Feeds a body to its reader, chunk by chunk, and tells it the end.

    Args:
        stream: The chunks.
        length: Bytes the body is to have (Content-Length).
        reader: What takes them.

    Raises:
        InvalidTensors: The body is shorter or longer than `length`.
        ServiceError: Whatever the reader refuses.
    """
    got = 0
    async for chunk in stream:
        if not chunk:
            continue
        got += len(chunk)
        if got > length:
            raise overlong(length)
        reader.feed(chunk)
    if got < length:
        raise truncated(got, length)
    reader.finish()


async def collect(stream: AsyncIterator[bytes], length: int, limit: int) -> bytes:
    """Gathers a JSON body.

    Args:
        stream: The chunks.
        length: Bytes the body is to have (Content-Length).
        limit: Bytes it may have at most.

    Raises:
        BodyTooLarge: More than `limit`; nothing was read.
        BadRequest: The body is shorter or longer than `length`.
    """
    if length > limit:
        raise BodyTooLarge(
            f"A JSON body may have {limit} bytes and this one has {length}; send tensors as "
            f"{SAFETENSORS}.",
            limit=limit,
            length=length,
        )
    chunks: list[bytes] = []
    got = 0
    async for chunk in stream:
        got += len(chunk)
        if got > length:
            break
        chunks.append(chunk)
    if got != length:
        raise BadRequest(
            f"The body has {'more than ' if got > length else ''}{min(got, length)} bytes and "
            f"Content-Length says {length}; send exactly that many."
        )
    return b"".join(chunks)
