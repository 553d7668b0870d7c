import asyncio
from collections.abc import AsyncIterator

import pytest

from service.errors import BadRequest, BodyTooLarge, InvalidTensors, LengthRequired
from service.wire.body import collect, content_length, largest_push, receive
from service.wire.raw import raw_reader
from tests.wire.bodies import LAYOUT, Destination, body_of, values


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


def reader(destination: Destination) -> object:
    return raw_reader(LAYOUT, "F32", "F32", LAYOUT.size * 4, destination)


def test_a_length_is_read() -> None:
    assert content_length("0", 10) == 0
    assert content_length(" 10 ", 10) == 10


def test_a_length_is_required() -> None:
    with pytest.raises(LengthRequired, match="Content-Length"):
        content_length(None, 10)


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.0", "ten", "1 2", "1_0", "٣", "9" * 400])
def test_a_length_is_a_number(value: str) -> None:
    with pytest.raises(BadRequest, match="digits only"):
        content_length(value, 10)


def test_a_length_has_a_limit() -> None:
    with pytest.raises(BodyTooLarge) as caught:
        content_length("11", 10)
    assert caught.value.context == {"limit": 10, "length": 11}


def test_every_form_of_a_push_is_within_the_largest() -> None:
    assert len(body_of(values(), "F32")) <= largest_push(LAYOUT, "F32")
    assert largest_push(LAYOUT, "F64") - largest_push(LAYOUT, "F32") == LAYOUT.size * 4


def test_a_stream_reaches_its_reader() -> None:
    destination = Destination()
    body = bytes(range(LAYOUT.size * 4))
    chunks = stream(body[:3], b"", body[3:], b"")
    asyncio.run(receive(chunks, len(body), reader(destination)))
    assert destination.bytes.tobytes() == body


@pytest.mark.parametrize("off", [-1, 1, 50])
def test_a_stream_of_another_length_is_refused(off: int) -> None:
    length = LAYOUT.size * 4
    with pytest.raises(InvalidTensors, match="send"):
        asyncio.run(receive(stream(bytes(length + off)), length, reader(Destination())))


def test_a_document_is_gathered() -> None:
    assert asyncio.run(collect(stream(b"[1", b"", b",2]"), 5, 5)) == b"[1,2]"
    assert asyncio.run(collect(stream(), 0, 5)) == b""


def test_a_document_has_a_limit_that_costs_nothing_to_break() -> None:
    async def untouched() -> AsyncIterator[bytes]:
        pytest.fail("read")
        yield b""

    with pytest.raises(BodyTooLarge, match="safetensors"):
        asyncio.run(collect(untouched(), 6, 5))


@pytest.mark.parametrize("chunks", [[b"1234"], [b"123456"], [b"12345", b"6" * 100], []])
def test_a_document_of_another_length_is_refused(chunks: list[bytes]) -> None:
    with pytest.raises(BadRequest, match="exactly"):
        asyncio.run(collect(stream(*chunks), 5, 10))
