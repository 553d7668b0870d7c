"""The safetensors header: what is taken, and that nothing else is, and how that is said."""

import json
import re
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpost.protocol import MAX_HEADER_BYTES
from gradpost.protocol.dtypes import DTYPES, NUMPY
from gradpost.protocol.tensors import (
    Header,
    HeaderError,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
)

LONG = "9" * 400
DEEP = "[" * 10_000 + "]" * 10_000


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def text(**fields):
    return json.dumps(fields).encode()


def written(dtype='"F32"', shape="[2]", offsets="[0,8]", name='"w"'):
    """A header whose parts are text, so that they may be what JSON writers refuse."""
    return f'{{{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


def test_a_sound_header_is_read_in_its_own_order():
    raw = text(b=entry(begin=8, end=16), a=entry("F16", (2, 2), 0, 8), __metadata__={"k": "v"})
    raw += b"   "
    assert parse_header(raw, 8 + len(raw) + 16) == Header(
        (TensorInfo("b", "F32", (2,), 8, 16), TensorInfo("a", "F16", (2, 2), 0, 8)),
        {"k": "v"},
        8 + len(raw),
        16,
    )


def test_scalars_and_empty_tensors_take_their_place():
    raw = text(e=entry(shape=(0, 7), end=0), s=entry(shape=(), end=4), f=entry("F64", (0,), 4, 4))
    header = parse_header(raw, 8 + len(raw) + 4)
    assert [t.shape for t in header.tensors] == [(0, 7), (), (0,)]
    assert header.data_bytes == 4


def test_no_tensors_are_a_header_too():
    assert parse_header(b"{}", 10) == Header((), {}, 10, 0)


BROKEN = {
    "empty": b"",
    "truncated": written()[:-1],
    "truncated in a string": written()[:4],
    "two objects": written() + b"{}",
    "text after it": written() + b" x",
    "zero padding": written() + b"\0\0",
    "an array": b"[]",
    "null": b"null",
    "space first": b" " + written(),
    "byte order mark": b"\xef\xbb\xbf" + written(),
    "not UTF-8": b'{"\xff":1}',
    "UTF-16": written().decode().encode("utf-16-le"),
    "a surrogate as name": written(name='"\\ud800"'),
    "a surrogate in the metadata": b'{"__metadata__":{"k":"\\ud800"}}',
    "empty name": written(name='""'),
    "NUL in a name": written(name='"a\\u0000b"'),
    "long name": written(name='"' + "n" * 1025 + '"'),
    "duplicate tensor": written()[:-1] + b"," + written()[1:],
    "duplicate field": written(dtype='"F32","dtype":"F32"'),
    "duplicate metadata key": b'{"__metadata__":{"a":"1","a":"2"}}',
    "duplicate metadata": b'{"__metadata__":{},"__metadata__":{}}',
    "metadata of numbers": b'{"__metadata__":{"step":1}}',
    "metadata of lists": b'{"__metadata__":["a"]}',
    "metadata null": b'{"__metadata__":null}',
    "NaN": written(shape="[NaN]"),
    "Infinity": written(offsets="[0,Infinity]"),
    "-Infinity": written(offsets="[-Infinity,8]"),
    "NaN in an unknown place": b'{"__metadata__":NaN}',
    "nested 10,000 deep": b'{"a":' + DEEP.encode() + b"}",
    "nested deep in the metadata": b'{"__metadata__":' + DEEP.encode() + b"}",
    "objects 10,000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "400-digit dimension": written(shape=f"[{LONG}]"),
    "400-digit offset": written(offsets=f"[0,{LONG}]"),
    "5,000-digit dimension": written(shape=f"[{'9' * 5000}]"),
    "400-digit dtype": written(dtype=LONG),
    "product beyond 64 bits": written(shape="[4294967296,4294967296,2]"),
    "product that wraps to what is there": written(shape="[4611686018427387904,4,2]"),
    "product of 64 large dimensions": written(shape=f"[{','.join(['9223372036854775807'] * 64)}]"),
    "65 dimensions": written(shape=f"[{','.join(['1'] * 65)}]", offsets="[0,4]"),
    "dimension 2**63": written(shape="[9223372036854775808,0]", offsets="[0,0]"),
    "negative dimension": written(shape="[-2]"),
    "two negative dimensions": written(shape="[-1,-2]"),
    "fraction as dimension": written(shape="[2.0]"),
    "exponent as dimension": written(shape="[2e0]"),
    "1e999 as dimension": written(shape="[1e999]"),
    "true as dimension": written(shape="[true,2]"),
    "text as dimension": written(shape='["2"]'),
    "shape null": written(shape="null"),
    "shape a number": written(shape="2"),
    "offsets backwards": written(shape="[0]", offsets="[8,0]"),
    "offsets one": written(offsets="[8]"),
    "offsets three": written(offsets="[0,8,8]"),
    "offsets null": written(offsets="null"),
    "offsets false": written(offsets="[false,8]"),
    "negative offset": written(offsets="[-8,0]"),
    "too few bytes": written(offsets="[0,7]"),
    "too many bytes": written(offsets="[0,9]"),
    "unknown dtype": written(dtype='"F8_E4M3"'),
    "lower-case dtype": written(dtype='"f32"'),
    "dtype null": written(dtype="null"),
    "dtype a list": written(dtype='["F32"]'),
    "entry a number": b'{"w":1}',
    "entry null": b'{"w":null}',
    "a field is missing": b'{"w":{"dtype":"F32","shape":[2]}}',
    "a field is extra": written(dtype='"F32","stride":1'),
    "overlapping": text(a=entry(), b=entry(begin=4, end=12)),
    "the same place": text(a=entry(), b=entry()),
    "hole": text(a=entry(), b=entry(begin=12, end=20)),
    "hole at the start": text(a=entry(begin=4, end=12)),
    "empty tensor beyond the end": text(a=entry(), b=entry(shape=(0,), begin=16, end=16)),
    "empty tensor inside another": text(a=entry(), b=entry(shape=(0,), begin=4, end=4)),
}


@pytest.mark.parametrize("raw", list(BROKEN.values()), ids=list(BROKEN))
def test_broken_headers_are_refused_in_a_sentence(raw):
    with pytest.raises(HeaderError) as caught:
        parse_header(raw, None)
    message = str(caught.value)
    assert re.fullmatch(r"(The|data_offsets|__metadata__) .*\.", message), message
    assert len(message) < 400
    message.encode()  # it goes into an answer


@pytest.mark.parametrize("where", ["dtype", "shape", "offsets"])
def test_no_depth_near_the_limit_is_a_recursion_error(where):
    limit = sys.getrecursionlimit()
    for depth in range(limit - 150, limit + 5):
        with pytest.raises(HeaderError):
            parse_header(written(**{where: "[" * depth + "]" * depth}), None)


def test_an_unknown_dtype_is_named():
    with pytest.raises(HeaderError, match="F8_E4M3"):
        parse_header(BROKEN["unknown dtype"], None)
    with pytest.raises(HeaderError, match="F64"):
        parse_header(written('"F64"', "[1]"), None, ("F32", "BF16"))


@pytest.mark.parametrize("off", [-8, -1, 1, 1 << 40])
def test_a_body_of_another_length_is_refused(off):
    raw = written()
    with pytest.raises(HeaderError, match="the body whole"):
        parse_header(raw, 8 + len(raw) + 8 + off)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 1 << 32, 1 << 60, (1 << 64) - 1])
def test_header_lengths_out_of_bounds_are_refused(length):
    with pytest.raises(HeaderError, match=str(length)):
        header_length(length.to_bytes(8, "little"))


def test_header_lengths():
    assert header_length((2).to_bytes(8, "little")) == 2
    assert header_length(MAX_HEADER_BYTES.to_bytes(8, "little")) == MAX_HEADER_BYTES
    for count in (0, 7, 9):
        with pytest.raises(HeaderError):
            header_length(bytes(count))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(0, 1 << 70))
def test_bytes_raise_nothing_but_header_errors(raw, length):
    for candidate in (raw, b"{" + raw):
        try:
            parse_header(candidate, length)
        except HeaderError:
            pass


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I8"]) | _JSON, "shape": _JSON, "data_offsets": _JSON}
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4))
def test_json_raises_nothing_but_header_errors(fields):
    try:
        parse_header(json.dumps(fields).encode(), None)
    except HeaderError:
        pass


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(0, 200), st.integers(0, 255))
def test_one_changed_byte_raises_nothing_but_header_errors(at, byte):
    raw = bytearray(text(a=entry(), b=entry("F16", (2, 2), 8, 16), __metadata__={"k": "v"}))
    raw[at % len(raw)] = byte
    try:
        parse_header(bytes(raw), 8 + len(raw) + 16)
    except HeaderError:
        pass


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
_TENSORS = st.dictionaries(
    _NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["F64", "F32", "F16"]), st.lists(st.integers(0, 4), max_size=4)),
    max_size=6,
)
_METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(_TENSORS, _METADATA)
def test_what_is_built_the_safetensors_package_reads(tensors, metadata):
    random = np.random.default_rng(7)
    arrays = {
        name: random.standard_normal(shape).astype(NUMPY[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    head = build_header(((name, *tensors[name]) for name in tensors), metadata)
    body = head + b"".join(array.tobytes() for array in arrays.values())
    assert len(head) % 8 == 0
    read = safetensors.numpy.load(body)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        assert read[name].dtype == array.dtype
        assert read[name].tobytes() == array.tobytes()
    header = parse_header(head[8:], len(body))
    assert header_length(head[:8]) == len(head) - 8
    assert [tuple(t[:3]) for t in header.tensors] == [
        (name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()
    ]
    assert header.metadata == metadata


@settings(max_examples=150, derandomize=True, deadline=None)
@given(_TENSORS, st.none() | _METADATA)
def test_what_the_safetensors_package_writes_is_read(tensors, metadata):
    random = np.random.default_rng(11)
    arrays = {
        name: random.standard_normal(shape).astype(NUMPY[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    body = safetensors.numpy.save(arrays, metadata or None)  # for {} and {} it writes no JSON
    size = header_length(body[:8])
    header = parse_header(body[8 : 8 + size], len(body))
    assert header.metadata == (metadata or {})
    assert {t.name for t in header.tensors} == arrays.keys()
    for name, dtype, shape, begin, end in header.tensors:
        data = body[header.data_offset + begin : header.data_offset + end]
        assert arrays[name].dtype == NUMPY[dtype]
        assert arrays[name].shape == shape
        assert arrays[name].tobytes() == data


def test_building_refuses_what_reading_would():
    for name in ("", "a\0", "n" * 1025, "\ud800", "__metadata__"):
        with pytest.raises(HeaderError):
            build_header([(name, "F32", (1,))])
    with pytest.raises(HeaderError, match="double"):
        build_header([("a", "F32", (1,)), ("a", "F32", (1,))])
    with pytest.raises(HeaderError, match="split"):
        build_header((f"{i:01000}", "F32", (1,)) for i in range(2000))
    with pytest.raises(HeaderError):
        build_header([], {"k": "\ud800"})


def test_every_dtype_has_its_size():
    for name, size in DTYPES.items():
        head = build_header([("w", name, (3, 5))])
        assert parse_header(head[8:], len(head) + 15 * size).data_bytes == 15 * size
