"""Whatever arrives, nothing but a ServiceError comes out, and each says what to do."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ServiceError
from service.wire.compact import check, push_reader, write
from service.wire.json import fill, gradients, loads, tensors
from service.wire.media import check_encoding, choose_accept, parse_content_type
from service.wire.raw import raw_reader
from service.wire.safetensors import grads_reader, tensors_reader
from tests.wire.bodies import LAYOUT, Destination, body_of, feed, values
from tests.wire.test_compact import packed

SOUND = body_of(values(), "F32", {"a": "b"})
HEADER_END = 8 + int.from_bytes(SOUND[:8], "little")
DOCUMENT = json.dumps({name: array.tolist() for name, array in values().items()}).encode()
SMALL = packed(
    {name: ("F32", array) for name, array in values().items() if name not in ("w", "b", "deep")}
    | {
        "w#idx": ("I64", [1, 0, 1]),
        "w#rows": ("F32", [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        "b#q8": ("I8", [1, -2, 3, -4, 127]),
        "b#scale": ("F32", [0.5]),
        "deep#topk": ("I64", [3, 0]),
        "deep#values": ("F32", [2.0, -3.0]),
    },
    {"q8_block": "16"},
)
SMALL_DOCUMENT = json.dumps(
    {name: array.tolist() for name, array in values().items() if name != "w"}
    | {"w": {"idx": [1, 0, 1], "rows": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}}
).encode()

WORDS = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"0", b"9" * 30, b"1e999", b"null", b"true",
     b"F64", b"BF16", b"I64", b"I8", b"#idx", b"#q8", b"#topk", b"-1", b'"w"', b'"b"',
     b"\\u0000", b"\\ud800", b"\x00", b"\xff", b" ", b"NaN"]
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, sound: bytes, upto: int) -> bytes:
    """A sound body with a few bytes replaced, removed or put in, mostly in its first part."""
    body = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(upto, len(body))))
        cut = draw(st.integers(0, 12))
        body[at : at + cut] = draw(st.one_of(WORDS, st.binary(max_size=8), st.just(b"")))
    return bytes(body)


def contained(call: Callable[[], Any]) -> None:
    """Runs it; a refusal must be one of ours and must be presentable."""
    refusal = None
    try:
        call()
    except ServiceError as error:
        refusal = error
    if refusal is not None:
        assert 400 <= refusal.status < 500
        assert refusal.detail.endswith(".")
        assert len(json.dumps(refusal.problem(), allow_nan=False)) < 50_000


def read_gradient(body: bytes, length: int, cuts: list[int]) -> None:
    destination = Destination()
    feed(
        grads_reader(LAYOUT, "F32", length, destination), body, [c % (len(body) + 1) for c in cuts]
    )


def read_document(body: bytes) -> None:
    came = tensors(loads(body), "F32")
    flat = np.empty(LAYOUT.size, np.float32)
    fill(LAYOUT, came, flat)
    assert np.isfinite(flat).all()


@settings(max_examples=400, deadline=None)
@given(body=mutated(SOUND, HEADER_END), off=st.integers(-2, 2), cuts=st.lists(st.integers(0, 999)))
def test_a_mutated_gradient_is_contained(body: bytes, off: int, cuts: list[int]) -> None:
    contained(lambda: read_gradient(body, len(body), cuts))
    contained(lambda: read_gradient(body, max(0, len(body) + off), cuts))


@settings(max_examples=200, deadline=None)
@given(body=mutated(SOUND, HEADER_END))
def test_a_mutated_upload_is_contained(body: bytes) -> None:
    def call() -> None:
        reader = tensors_reader(len(body), lambda n: np.empty(n, np.uint8))
        feed(reader, body)
        assert reader.data.size == reader.header.data_bytes == len(body) - reader.header.data_offset

    contained(call)


@settings(max_examples=400, deadline=None)
@given(body=mutated(DOCUMENT, len(DOCUMENT)))
def test_a_mutated_document_is_contained(body: bytes) -> None:
    contained(lambda: read_document(body))


def read_push(body: bytes, cuts: list[int]) -> None:
    plain = Destination()
    reader = push_reader(
        LAYOUT, "F32", len(body), plain, lambda plan: np.empty(plan.data_bytes, np.uint8)
    )
    feed(reader, body, [c % (len(body) + 1) for c in cuts])
    if reader.plan is not None:
        check(reader.plan, reader.data)
        flat = np.empty(LAYOUT.size, np.float32)
        found = write(reader.plan, reader.data, flat)
        assert found.came.keys() == LAYOUT.index.keys()


@settings(max_examples=600, deadline=None)
@given(body=mutated(SMALL, len(SMALL)), cuts=st.lists(st.integers(0, 999)))
def test_a_mutated_push_in_small_forms_is_contained(body: bytes, cuts: list[int]) -> None:
    contained(lambda: read_push(body, cuts))


@settings(max_examples=400, deadline=None)
@given(data=st.binary(min_size=len(SMALL), max_size=len(SMALL)))
def test_any_data_behind_a_sound_header_is_contained(data: bytes) -> None:
    end = 8 + int.from_bytes(SMALL[:8], "little")
    contained(lambda: read_push(SMALL[:end] + data[end:], []))


def read_rows(body: bytes) -> None:
    came, some = gradients(loads(body), "F32")
    flat = np.empty(LAYOUT.size, np.float32)
    fill(LAYOUT, came, flat, some=some)


@settings(max_examples=400, deadline=None)
@given(body=mutated(SMALL_DOCUMENT, len(SMALL_DOCUMENT)))
def test_a_mutated_document_of_rows_is_contained(body: bytes) -> None:
    contained(lambda: read_rows(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["w", "b", "scalar", "", "x"]), JSON) | JSON)
def test_any_value_is_contained(value: Any) -> None:
    contained(lambda: read_document(json.dumps(value).encode()))
    contained(lambda: read_rows(json.dumps(value).encode()))
    contained(lambda: gradients({"w": {"idx": value, "rows": value}}, "F64"))
    contained(lambda: tensors(value, "F64"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_contained(body: bytes) -> None:
    contained(lambda: read_gradient(body, len(body), []))
    contained(lambda: read_push(body, []))
    contained(lambda: read_document(body))
    contained(lambda: feed(raw_reader(LAYOUT, "F32", "F32", len(body), Destination()), body))


HEADERS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["application/", "*/*", "octet-stream", "json", ";", ",", "q=", "0.5", "dtype=",
             "dtype*=", "F32", '"', "=", "*", "utf-8''x", "vnd.safetensors", " ", "nan", "\\"]
        ),
        max_size=12,
    ).map("".join),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(HEADERS)
def test_any_header_is_contained(value: str) -> None:
    contained(lambda: parse_content_type(value))
    contained(lambda: choose_accept(value))
    contained(lambda: check_encoding(value))
