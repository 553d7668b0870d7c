"""The bytes of pages: what was packed is parsed, and nothing else is."""

import itertools
import random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from service.storage import header
from service.storage.header import (
    META_BYTES,
    PAGE,
    Header,
    Key,
    Kind,
    Page,
    Shape,
    pack,
    pack_preamble,
    parse,
    parse_preamble,
)

U64 = st.integers(0, 2**64 - 1)
BYTES16 = st.binary(min_size=16, max_size=16)
KEYS = st.builds(Key, st.text(min_size=1, max_size=60), U64)
HEADERS = st.builds(
    Header, BYTES16, U64, U64, st.sampled_from(Kind), st.none() | KEYS, BYTES16, BYTES16, U64,
    st.binary(max_size=META_BYTES),
)  # fmt: skip
ONE = Header(
    bytes(range(16)), 7, 6, Kind.PUSH, Key("w0", 3), b"d" * 16, b"p" * 16, 4096, b"the meta"
)


@given(HEADERS)
@settings(max_examples=200)
def test_a_header_round_trips(one):
    page = pack(one)
    assert len(page) == PAGE
    assert parse(page) == one


def test_the_layout_does_not_move():
    page = pack(ONE)
    assert page[:16] == b"GRADRCRD" + b"\1\0\0\0" + b"\1\0" + b"\2\0"
    assert page[16:32] == bytes(range(16))
    assert page[32:56] == b"".join(n.to_bytes(8, "little") for n in (7, 6, 3))
    assert page[56:88] == b"d" * 16 + b"p" * 16
    assert page[88:104] == (4096).to_bytes(8, "little") + (8).to_bytes(8, "little")
    bare = page[:104] + bytes(8) + page[112:]
    assert page[104:112] == xxhash.xxh3_64_intdigest(bare).to_bytes(8, "little")
    assert page[112:122] == b"w0the meta"
    assert page[122:] == bytes(PAGE - 122)


def test_the_longest_worker_and_meta_fit_together():
    one = ONE._replace(key=Key("w" * header.WORKER_BYTES, 1), meta=bytes(META_BYTES))
    assert parse(pack(one)) == one


@pytest.mark.parametrize(
    "change",
    [{"key": Key("", 1)}, {"key": Key("w" * 256, 1)}, {"meta": bytes(META_BYTES + 1)}],
)
def test_what_does_not_fit_is_refused(change):
    with pytest.raises(ValueError, match="bytes"):
        pack(ONE._replace(**change))


def test_every_flipped_bit_shows():
    page = pack(ONE)
    rng = random.Random(1)
    bits = [*range(130 * 8), *rng.sample(range(130 * 8, PAGE * 8), 1000)]
    for bit in bits:
        flipped = bytearray(page)
        flipped[bit // 8] ^= 1 << bit % 8
        assert parse(flipped) is Page.TORN, bit


def test_a_page_of_old_and_new_sectors_is_torn():
    old, new = pack(ONE), pack(ONE._replace(number=8, meta=bytes(range(256)) * 14))
    for mask in range(1, 255):
        mixed = b"".join((new if mask >> i & 1 else old)[i * 512 : (i + 1) * 512] for i in range(8))
        assert mixed in (old, new) or parse(mixed) is Page.TORN


def test_pages_that_hold_no_record():
    assert parse(bytes(PAGE)) is Page.BLANK
    assert parse(b"") is Page.TORN
    assert parse(pack(ONE)[:-1]) is Page.TORN
    assert parse(pack_preamble(bytes(16), Shape(1, 1, 1))) is Page.TORN
    assert parse_preamble(pack(ONE)) is Page.TORN
    assert parse_preamble(bytes(PAGE)) is Page.TORN


def test_a_newer_format_is_told_from_damage(monkeypatch):
    monkeypatch.setattr(header, "FORMAT", 2)
    page, preamble = pack(ONE), pack_preamble(bytes(16), Shape(1, 1, 1))
    monkeypatch.undo()
    assert parse(page) is Page.NEWER
    assert parse_preamble(preamble) is Page.NEWER
    assert parse(pack(ONE._replace(kind=200))) is Page.NEWER


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**40), st.integers(0, 2**32 - 1))
def test_a_preamble_round_trips(slots, capacity, records):
    shape = Shape(slots, capacity, records)
    assert parse_preamble(pack_preamble(b"s" * 16, shape)) == (b"s" * 16, shape)


@given(st.integers(1, 9), st.integers(1, 20000), st.integers(0, 9))
def test_places_do_not_overlap(slots, capacity, records):
    shape = Shape(slots, capacity, records)
    offsets = [shape.offset(place) for place in range(shape.places + 1)]
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    assert offsets[0] == PAGE
    assert sizes[:records] == [PAGE] * records
    assert all(size % PAGE == 0 and size >= PAGE + capacity for size in sizes[records:])
    assert offsets[-1] == shape.size
