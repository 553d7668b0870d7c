"""Answers that are not what they say: TransportError, so that the same bytes go again."""

import numpy as np
import pytest

from gradpost import TransportError
from gradpost.inprocess import MemoryAnswer
from gradpost.protocol.tensors import build_header
from gradpost.tensors import decode, encode

SMALL = {"w": np.float32([1, 2]), "s": np.float64(3), "e": np.float16([])}
LARGE = {"w": np.arange(50_000, dtype=np.float32)}


def body_of(tensors):
    return b"".join(encode(tensors, "F64", {"k": "v"}))


def answer(body, length=None):
    headers = {} if length is None else {"Content-Length": length}
    return MemoryAnswer(200, headers, body)


@pytest.mark.parametrize("tensors", [SMALL, LARGE, {}], ids=["small", "large", "none"])
@pytest.mark.parametrize("told", [True, False])
def test_what_is_encoded_is_decoded(tensors, told):
    body = body_of(tensors)
    received = decode(answer(body, str(len(body)) if told else None), None)
    assert received.metadata == {"k": "v"}
    assert list(received.tensors) == list(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(received.tensors[name], value, strict=True)


@pytest.mark.parametrize("tensors", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("length", ["sent", None, "²", "9" * 400, "-1"])
@pytest.mark.parametrize("change", [-1, -9, 1])
def test_a_body_of_another_length_is_a_transport_error(tensors, length, change):
    whole = body_of(tensors)
    body = whole[:change] if change < 0 else whole + b"x" * change
    length = str(len(body)) if length == "sent" else length
    with pytest.raises(TransportError, match="answer"):
        decode(answer(body, length), None)


@pytest.mark.parametrize("tensors", [SMALL, LARGE], ids=["small", "large"])
def test_a_body_that_breaks_off_is_a_transport_error(tensors):
    body = body_of(tensors)
    with pytest.raises(TransportError, match="broke off"):
        decode(answer(body[:-1], str(len(body))), None)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("size", range(0, 40, 3))
def test_a_body_cut_in_its_head_is_a_transport_error(size, told):
    body = body_of(SMALL)[:size]
    with pytest.raises(TransportError):
        decode(answer(body, str(size) if told else None), None)


@pytest.mark.parametrize("told", [True, False])
def test_a_header_of_exbytes_reserves_no_memory(told):
    head = build_header([("w", "F32", (1 << 60,))])
    with pytest.raises(TransportError):
        decode(answer(head, str(len(head)) if told else None), None)


def test_a_buffer_too_small_is_replaced():
    small = np.zeros(3, np.uint8)
    body = body_of(SMALL)
    received = decode(answer(body, str(len(body))), small)
    assert received.buffer is not small
    assert not small.any()
