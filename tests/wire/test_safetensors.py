import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from service.errors import InvalidTensors, Overloaded, ServiceError, TensorMismatch
from service.sessions.layout import Layout
from service.wire.safetensors import (
    Piece,
    SafetensorsReader,
    answer_parts,
    grads_reader,
    parts,
    tensors_reader,
)
from tests.wire.bodies import (
    LAYOUT,
    NUMPY,
    SHAPES,
    Destination,
    body_of,
    entry,
    feed,
    flat_of,
    framed,
    values,
)

DTYPES = ["F64", "F32", "F16", "BF16"]


def read(body: bytes, cuts: list[int] | None = None, master: str = "F64") -> np.ndarray:
    destination = Destination()
    feed(grads_reader(LAYOUT, master, len(body), destination), body, cuts)
    assert len(destination.asked) == 1
    return destination.flat()


def joined(views: list[memoryview]) -> bytes:
    return b"".join(views)


# Reading a gradient


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(list(SHAPES)),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_order_and_any_chunks_give_layout_order(
    dtype: str, order: list[str], data: st.DataObject, seed: int
) -> None:
    tensors = values(dtype, seed)
    body = body_of({name: tensors[name] for name in order}, dtype, {"k": "v"})
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=12))
    assert read(body, cuts).tobytes() == flat_of(tensors).tobytes()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(
            lambda name: "\0" not in name and name != "__metadata__"
        ),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        min_size=1,
        max_size=8,
    ),
    dtype=st.sampled_from(["F64", "F32", "F16"]),
    chunk=st.integers(1, 64),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_the_safetensors_package_writes_is_read(
    shapes: dict[str, tuple[int, ...]], dtype: str, chunk: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        n: np.asarray(rng.standard_normal(s)).astype(NUMPY[dtype]) for n, s in shapes.items()
    }
    layout = Layout.of([(n, dtype, s) for n, s in shapes.items()])
    body = save(tensors)
    destination = Destination(layout)
    reader = grads_reader(layout, "F64", len(body), destination)
    feed(reader, body, list(range(0, len(body), chunk)))
    assert destination.flat().tobytes() == flat_of(tensors, layout).tobytes()
    assert reader.dtype == dtype


def test_a_body_may_be_split_at_every_byte() -> None:
    tensors = values("F16")
    body = body_of(dict(reversed(tensors.items())), "F16")
    want = flat_of(tensors).tobytes()
    for cut in range(len(body) + 1):
        assert read(body, [cut]).tobytes() == want
    assert read(body, list(range(len(body)))).tobytes() == want


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_chunks_may_be_any_bytes(kind: type) -> None:
    body = body_of(values(), "F32")
    destination = Destination()
    reader = grads_reader(LAYOUT, "F32", len(body), destination)
    reader.feed(kind(body))
    reader.finish()
    assert destination.flat().tobytes() == flat_of(values()).tobytes()


def test_neighbours_in_the_layout_are_copied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.wire import safetensors

    seen: list[Any] = []
    scatter = safetensors.Scatter
    monkeypatch.setattr(safetensors, "Scatter", lambda t, s: seen.append(s) or scatter(t, s))
    read(body_of(values(), "F32"))
    assert seen == [[(0, LAYOUT.size * 4)]]


def test_metadata_and_dtype_are_known_after_the_header() -> None:
    body = body_of(values("BF16"), "BF16", {"worker": "w0"})
    reader = grads_reader(LAYOUT, "F32", len(body), Destination())
    assert reader.dtype is None
    assert reader.metadata == {}
    feed(reader, body)
    assert reader.dtype == "BF16"
    assert reader.metadata == {"worker": "w0"}


def test_a_header_may_be_padded_with_spaces() -> None:
    body = body_of(values(), "F32")
    length = int.from_bytes(body[:8], "little")
    padded = framed(body[8 : 8 + length] + b" " * 13, body[8 + length :])
    assert read(padded).tobytes() == flat_of(values()).tobytes()


# Broken containers. The layout has two tensors so that the headers stay readable.

PAIR = Layout.of([("a", "F32", (2,)), ("b", "F32", (1,))])
A = entry("F32", [2], 0, 8)
B = entry("F32", [1], 8, 12)


def refuse(body: bytes, length: int | None = None, master: str = "F32") -> ServiceError:
    """The refusal of a body, which must come before a destination is asked for."""
    destination = Destination(PAIR)
    with pytest.raises(ServiceError) as caught:
        feed(grads_reader(PAIR, master, len(body) if length is None else length, destination), body)
    assert destination.asked == []
    assert caught.value.detail.endswith(".")
    json.dumps(caught.value.problem(), allow_nan=False)
    return caught.value


def header(*, data: int = 12, **tensors: Any) -> bytes:
    return framed(json.dumps(tensors).encode(), bytes(data))


BROKEN = {
    "overlapping": header(a=A, b=entry("F32", [1], 4, 8), data=8),
    "the same bytes": header(a=A, b=entry("F32", [1], 0, 4), data=8),
    "a hole": header(a=A, b=entry("F32", [1], 12, 16), data=16),
    "not from 0": header(a=entry("F32", [2], 4, 12), b=entry("F32", [1], 12, 16), data=16),
    "bytes behind the last": header(a=A, b=B, data=13),
    "data missing": header(a=A, b=B, data=11),
    "offsets reversed": header(a=entry("F32", [2], 8, 0), b=B),
    "offsets negative": header(a=entry("F32", [2], -8, 0), b=B),
    "offsets not numbers": header(a=entry("F32", [2], "0", "8"), b=B),
    "offsets fractional": header(a=entry("F32", [2], 0.0, 8.0), b=B),
    "offsets true": header(a=A, b=entry("F32", [1], True, 12)),
    "one offset": header(a={"dtype": "F32", "shape": [2], "data_offsets": [0]}, b=B),
    "a long offset": framed(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"9" * 400 + b"]}}", bytes(12)
    ),
    "an endless offset": framed(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"9" * 5000 + b"]}}", bytes(12)
    ),
    "a product that overflows": header(a=entry("F32", [2**62, 4, 2**62], 0, 8), b=B),
    "a product that wraps to 2": header(a=entry("F32", [2**63 + 1, 2], 0, 8), b=B),
    "a shape that does not fill": header(a=entry("F32", [3], 0, 8), b=B),
    "a negative shape": header(a=entry("F32", [-1, -2], 0, 8), b=B),
    "a fractional shape": header(a=entry("F32", [2.0], 0, 8), b=B),
    "a shape of truths": header(a=A, b=entry("F32", [True], 8, 12)),
    "a shape that is a number": header(a={"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, b=B),
    "no shape": header(a={"dtype": "F32", "data_offsets": [0, 8]}, b=B),
    "no dtype": header(a={"shape": [2], "data_offsets": [0, 8]}, b=B),
    "a stranger's field": header(a={**A, "device": "cuda"}, b=B),
    "an unknown dtype": header(a=entry("F31", [2], 0, 8), b=B),
    "integers": header(a=entry("I32", [2], 0, 8), b=B),
    "complex numbers": header(a=entry("C64", [1], 0, 8), b=B),
    "a dtype that is a number": header(a={**A, "dtype": 32}, b=B),
    "a tensor that is a list": header(a=[A], b=B),
    "a list": framed(b"[]"),
    "a number": framed(b"42"),
    "null": framed(b"null"),
    "duplicated tensors": framed(
        json.dumps({"a": A, "b": B}).replace('"b"', '"a"').encode(), bytes(12)
    ),
    "duplicated fields": framed(
        json.dumps({"a": A, "b": B}).replace('"dtype"', '"shape": [2], "dtype"', 1).encode(),
        bytes(12),
    ),
    "metadata of numbers": header(__metadata__={"x": 1}, a=A, b=B),
    "metadata that is a list": header(__metadata__=["x"], a=A, b=B),
    "an empty name": header(**{"": A, "b": B}),
    "a name with NUL": header(**{"a\0": A, "b": B}),
    "a long name": header(**{"a" * 1025: A, "b": B}),
    "half a surrogate": framed(json.dumps({"\ud800": A, "b": B}).encode(), bytes(12)),
    "not JSON": framed(b"{nonsense}"),
    "JSON cut off": framed(b'{"a":'),
    "NaN": framed(b'{"a": NaN}'),
    "not UTF-8": framed(b'{"\xff\xfe": 1}'),
    "a byte order mark": framed(b"\xef\xbb\xbf" + json.dumps({"a": A, "b": B}).encode(), bytes(12)),
    "deep": framed(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "deep objects": framed(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "a header of 2**60 bytes": (2**60).to_bytes(8, "little") + b"{}" + bytes(64),
    "a header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}" + bytes(64),
    "a header of no bytes": bytes(8) + bytes(64),
    "a header of one byte": framed(b"{", bytes(64)),
    "a header longer than the body": (1000).to_bytes(8, "little") + b"{}" + bytes(64),
    "a header above the limit": framed(b"{}" + b" " * (1 << 20)),
    "nothing": b"",
    "seven bytes": bytes(7),
    "a pickle": b"\x80\x04\x95" + bytes(64),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_container_is_refused(name: str) -> None:
    error = refuse(BROKEN[name])
    assert isinstance(error, InvalidTensors), error.detail


UNFIT = {
    "misnamed": (header(a=A, c=B), "Unexpected: 'c'"),
    "missing": (header(a=A, data=8), "Missing: 'b'"),
    "one too many": (header(a=A, b=B, c=entry("F32", [0], 12, 12)), "Unexpected: 'c'"),
    "misshapen": (header(a=entry("F32", [1, 2], 0, 8), b=B), "shape [2] here and came as [1, 2]"),
    "a scalar for one": (header(a=A, b=entry("F32", [], 8, 12)), "shape [1] here and came as []"),
    "transposed": (header(a=entry("F32", [2, 1], 0, 8), b=B), "Wrong shape: 'a'"),
    "too wide": (
        header(a=entry("F64", [2], 0, 16), b=entry("F64", [1], 16, 24), data=24),
        "send it as F32",
    ),
    "two dtypes": (header(a=A, b=entry("F16", [1], 8, 10), data=10), "one dtype"),
    "empty": (framed(b"{}"), "no tensors"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    body, says = UNFIT[name]
    error = refuse(body)
    assert isinstance(error, TensorMismatch)
    assert says in error.detail


def test_a_refusal_of_many_names_stays_short() -> None:
    tensors = {f"t{i}" * 40: entry("F32", [1], 4 * i, 4 * i + 4) for i in range(2000)}
    error = refuse(header(**tensors, data=8000))
    assert "and 1980 more" in error.detail
    assert error.context["unexpected_count"] == 2000
    assert len(json.dumps(error.problem())) < 20_000


def test_a_refusal_of_a_shape_without_end_stays_short() -> None:
    error = refuse(header(a=entry("F32", [1] * 100_000 + [2], 0, 8), b=B))
    assert len(json.dumps(error.problem())) < 2_000


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 40, -1])
def test_a_body_that_stops_is_refused(cut: int) -> None:
    body = header(a=A, b=B)
    reader = grads_reader(PAIR, "F32", len(body), Destination(PAIR))
    reader.feed(body[:cut])
    with pytest.raises(InvalidTensors, match=r"ended after \d+ of \d+ bytes; send all"):
        reader.finish()


def test_a_body_that_goes_on_is_refused() -> None:
    body = header(a=A, b=B)
    for extra in (b"x", bytes(100)):
        reader = grads_reader(PAIR, "F32", len(body), Destination(PAIR))
        with pytest.raises(InvalidTensors, match="exactly what"):
            reader.feed(body + extra)
        reader = grads_reader(PAIR, "F32", len(body), Destination(PAIR))
        reader.feed(body)
        with pytest.raises(InvalidTensors, match="exactly what"):
            reader.feed(extra)


def test_a_refusal_to_lend_a_buffer_reaches_the_caller() -> None:
    def acquire(dtype: str) -> np.ndarray:
        raise Overloaded("Come again.")

    body = header(a=A, b=B)
    with pytest.raises(Overloaded):
        feed(grads_reader(PAIR, "F32", len(body), acquire), body)


# Reading parameters and state


@settings(max_examples=40, deadline=None)
@given(chunk=st.integers(1, 80), seed=st.integers(0, 2**32 - 1))
def test_any_tensors_are_kept_together(chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        "exp_avg/w": rng.standard_normal((2, 3)).astype(np.float32),
        "w": rng.standard_normal((2, 3)).astype(np.float64),
        "e": np.zeros((0, 2), np.float16),
        "s": np.array(rng.standard_normal(), np.float32),
    }
    body = save(tensors, {"step": "7"})
    asked: list[int] = []
    reader = tensors_reader(len(body), lambda n: asked.append(n) or np.empty(n, np.uint8))
    feed(reader, body, list(range(0, len(body), chunk)))
    assert asked == [reader.header.data_bytes]
    assert reader.metadata == {"step": "7"}
    assert {tensor.name for tensor in reader.header.tensors} == set(tensors)
    for info in reader.header.tensors:
        came = reader.data[info.begin : info.end].view(NUMPY[info.dtype]).reshape(info.shape)
        np.testing.assert_array_equal(came, tensors[info.name])


def test_too_many_dimensions_are_refused_before_anything_is_allocated() -> None:
    body = header(a=entry("F32", [1] * 33, 0, 4), data=4)
    with pytest.raises(InvalidTensors, match="at most 32 dimensions"):
        feed(tensors_reader(len(body), np.empty), body)


def test_an_upload_of_empty_tensors_has_no_data() -> None:
    body = header(a=entry("F32", [0], 0, 0), data=0)
    reader = tensors_reader(len(body), lambda n: np.empty(n, np.uint8))
    feed(reader, body)
    assert reader.data.size == 0
    with pytest.raises(InvalidTensors, match="exactly"):
        feed(tensors_reader(len(body), lambda n: np.empty(n, np.uint8)), body + b"x")


# Writing


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_the_safetensors_package_reads_what_we_write(dtype: str) -> None:
    tensors = values(dtype)
    body = joined(parts(LAYOUT, flat_of(tensors), dtype, None, {"version": "1-7"}))
    came = load(body)
    assert set(came) == set(tensors)
    for name, array in tensors.items():
        assert came[name].dtype == array.dtype
        assert came[name].shape == array.shape
        np.testing.assert_array_equal(came[name], array)


def test_bf16_is_written_as_its_bits() -> None:
    flat = flat_of(values("BF16"))
    body = joined(parts(LAYOUT, flat.view(np.uint16), "BF16", None, {}))
    assert read(body).tobytes() == flat.tobytes()


def test_writing_copies_nothing_and_merges_neighbours() -> None:
    flat = flat_of(values())
    header_view, *views = parts(LAYOUT, flat, "F32", None, {})
    assert len(views) == 1
    assert views[0].readonly
    flat[0] = 12345.0
    assert bytes(views[0]) == flat.tobytes()
    assert all(view.format == "B" and view.itemsize == 1 for view in (header_view, *views))


@given(names=st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=8))
def test_names_choose_tensors(names: list[str]) -> None:
    tensors = values()
    body = joined(parts(LAYOUT, flat_of(tensors), "F32", names, {}))
    came = load(body)
    assert set(came) == set(names)
    for name in names:
        np.testing.assert_array_equal(came[name], tensors[name])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TensorMismatch, match="no tensor 'nope'"):
        parts(LAYOUT, flat_of(values()), "F32", ["w", "nope"], {})


def test_pieces_may_have_dtypes_and_vectors_of_their_own() -> None:
    wide, narrow = np.arange(4.0), np.arange(3, dtype=np.float32)
    views = answer_parts(
        [
            Piece("x", "F64", (2,), wide, 0, 2),
            Piece("y", "F64", (2, 1), wide, 2, 2),
            Piece("z", "F32", (), narrow, 1, 1),
        ],
        {"a": "b"},
    )
    assert len(views) == 3
    came = load(joined(views))
    np.testing.assert_array_equal(came["x"], [0.0, 1.0])
    np.testing.assert_array_equal(came["y"], [[2.0], [3.0]])
    assert came["z"] == np.float32(1)


def test_a_reader_can_be_built_on_its_own_placement() -> None:
    with pytest.raises(InvalidTensors, match="can not be safetensors"):
        SafetensorsReader(9, lambda header: pytest.fail("placed"))
