import asyncio

import numpy as np
import pytest

from service import answers
from service.answers import TensorAnswer
from service.connection import EXTENSION


class Transport:
    def __init__(self):
        self.log = []

    def abort(self):
        self.log.append("abort")


class FakeConnection:
    def __init__(self):
        self.transport = Transport()


def run(answer, send, connection=None):
    extensions = {EXTENSION: connection} if connection else {}
    asyncio.run(answer({"extensions": extensions}, None, send))


@pytest.fixture
def uncopied(monkeypatch):
    monkeypatch.setattr(answers, "COPIED", 0)


def test_a_small_answer_is_copied_and_frees_its_buffers_before_it_is_sent():
    sent, log = [], []
    answer = TensorAnswer([b"head", b"data"], 200, {}, lambda: log.append(len(sent)))

    async def send(message):
        sent.append(message)

    run(answer, send)
    assert [message.get("body") for message in sent] == [None, b"headdata"]
    assert log == [0]


@pytest.mark.usefixtures("uncopied")
def test_parts_go_out_as_views_then_an_empty_last_message():
    sent, released = [], []
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    answer = TensorAnswer(
        [b"head", memoryview(values), memoryview(np.empty(0, np.float64))],
        200,
        {"ETag": "x"},
        lambda: released.append(len(sent)),
    )

    async def send(message):
        sent.append(message)

    run(answer, send)
    start, *parts = sent
    assert (b"content-length", b"28") in start["headers"]
    assert (b"etag", b"x") in start["headers"]
    assert [len(part["body"]) for part in parts] == [4, 24, 0]
    assert [part["more_body"] for part in parts] == [True, True, False]
    assert np.shares_memory(np.frombuffer(parts[1]["body"], np.uint8), values)
    assert released == [4]  # after the last message, once


@pytest.mark.usefixtures("uncopied")
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_failure_cuts_the_connection_before_the_release(fails_at):
    connection, count = FakeConnection(), 0
    log = connection.transport.log
    answer = TensorAnswer([b"abc"], 200, {}, lambda: log.append("release"))

    async def send(message):
        nonlocal count
        count += 1
        if count > fails_at:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(answer, send, connection)
    answer.close()
    assert log == ["abort", "release"]
