import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.errors import (
    BodyTooLarge,
    InvalidJson,
    InvalidTensors,
    Nonfinite,
    NotAcceptable,
    ServiceError,
    TensorMismatch,
)
from service.sessions.layout import Layout
from service.wire.json import fill, gradients, loads, render, render_tensors, tensors
from service.wire.rows import ALL, Taking
from tests.wire.bodies import LAYOUT, SHAPES, flat_of, values

WORDS = {"F32": np.float32, "F64": np.float64}

# Documents


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text()
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_what_json_writes_is_read(value: Any) -> None:
    assert loads(json.dumps(value).encode()) == value


BAD = {
    "nothing": b"",
    "cut off": b'{"a": [1, 2',
    "a trailing comma": b"[1,]",
    "two documents": b"{} {}",
    "NaN": b'{"lr": NaN}',
    "Infinity": b'{"lr": Infinity}',
    "-Infinity": b'{"lr": [-Infinity]}',
    "a duplicate key": b'{"grads": {"w": [1], "w": [2]}}',
    "a duplicate key, spelt otherwise": b'{"w": 1, "\\u0077": 2}',
    "5,000 digits": b'{"sequence": ' + b"9" * 5000 + b"}",
    "nested 10,000 deep": b"[" * 10_000 + b"]" * 10_000,
    "nested 10,000 deep, objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "nested 10,000 deep, unclosed": b"[" * 10_000,
    "nested 65 deep": b"[" * 65 + b"]" * 65,
    "deep behind a string of brackets": b'["]]]]]]]\\"]]]]", ' + b"[" * 65 + b"]" * 66,
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "single quotes": b"{'a': 1}",
    "a control character": b'{"a\n": 1}',
    "an unclosed string": b'["' + b"[" * 1000,
    "a lone backslash": b'["\\',
    "leading zeros": b"[01]",
    "a comment": b"[1] // one",
    "NUL": b"\x00",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_json_is_refused(name: str) -> None:
    with pytest.raises(InvalidJson) as caught:
        loads(BAD[name])
    assert caught.value.detail.endswith((".", ")."))
    assert len(caught.value.detail) < 300


def test_nesting_of_64_is_read() -> None:
    value = loads(b"[" * 64 + b"]" * 64)
    for _ in range(63):
        (value,) = value
    assert value == []


def test_brackets_in_strings_are_no_nesting() -> None:
    text = "[{" * 500 + '"\\' + "]" * 3
    assert loads(json.dumps([text]).encode()) == [text]


def test_the_check_of_nesting_is_linear() -> None:
    # A pattern that backtracks would take hours on these.
    for body in (b'"\\' * 200_000, b'\\"' * 200_000, b'"' * 200_001, b'["' + b"\\" * 400_001):
        with pytest.raises(InvalidJson):
            loads(body)


def test_a_number_without_end_is_left_to_its_field() -> None:
    assert loads(b'{"lr": 1e999}') == {"lr": float("inf")}
    assert loads(b"9" * 400) == int("9" * 400)


# Tensors


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (1.5, ()),
        (0, ()),
        ([], (0,)),
        ([[], []], (2, 0)),
        ([[[]]], (1, 1, 0)),
        ([1], (1,)),
        ([[1, 2.5, -3]], (1, 3)),
        ([[[1], [2]], [[3], [4]]], (2, 2, 1)),
        ([[[1.0]] * 3] * 2, (2, 3, 1)),
    ],
)
@pytest.mark.parametrize("master", ["F32", "F64"])
def test_nested_lists_have_a_shape(value: Any, shape: tuple[int, ...], master: str) -> None:
    ((name, got, flat),) = tensors({"w": value}, master)
    assert name == "w"
    assert got == shape
    assert flat.dtype == WORDS[master]
    np.testing.assert_array_equal(flat, np.ravel(np.array(value, WORDS[master])))


UNREADABLE: dict[str, tuple[Any, type[ServiceError], str]] = {
    "a list of tensors": ([[1.0]], InvalidTensors, "object of names"),
    "null for all": (None, InvalidTensors, "null"),
    "text for all": ("w", InvalidTensors, "text"),
    "ragged": ({"w": [[1, 2], [3]]}, InvalidTensors, "equally long"),
    "ragged inside": ({"w": [[[1], [2]], [[3], []]]}, InvalidTensors, "equally long"),
    "a number beside a list": ({"w": [1, [2]]}, InvalidTensors, "side by side"),
    "a string": ({"w": "1.5"}, InvalidTensors, "text"),
    "strings": ({"w": ["1.5", "2"]}, InvalidTensors, "text"),
    "a string among numbers": ({"w": [1, "2"]}, InvalidTensors, "text"),
    "NaN as a string": ({"w": ["NaN"]}, InvalidTensors, "text"),
    "true": ({"w": True}, InvalidTensors, "true or false"),
    "truths": ({"w": [True, 1.0]}, InvalidTensors, "true or false"),
    "null": ({"w": None}, InvalidTensors, "null"),
    "nulls": ({"w": [1.0, None]}, InvalidTensors, "null"),
    "an object": ({"w": {"data": [1]}}, InvalidTensors, "an object"),
    "objects": ({"w": [{}]}, InvalidTensors, "an object"),
    "nested too deep": ({"w": json.loads("[" * 40 + "]" * 40)}, InvalidTensors, "32 dimensions"),
    "an empty name": ({"": 1.0}, InvalidTensors, "can not name"),
    "a long name": ({"w" * 1025: 1.0}, InvalidTensors, "can not name"),
    "NUL in a name": ({"w\0": 1.0}, InvalidTensors, "can not name"),
    "half a surrogate": ({"\ud800": 1.0}, InvalidTensors, "can not name"),
    "the name of the metadata": ({"__metadata__": 1.0}, InvalidTensors, "can not name"),
    "1e999": ({"w": [0.0, float("inf")]}, Nonfinite, "index 1"),
    "-1e999": ({"w": -float("inf")}, Nonfinite, "index 0"),
    "400 digits": ({"w": [[0, 1], [10**400, 2]]}, Nonfinite, "index 2"),
    "-400 digits": ({"w": -(10**400)}, Nonfinite, "index 0"),
    "above float32": ({"w": [1e38, 1e39]}, Nonfinite, "overflows F32"),
    "too many": ({"w": [0.0] * 60_000, "v": [0] * 40_001}, BodyTooLarge, "safetensors"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_tensor_is_refused(name: str) -> None:
    obj, kind, says = UNREADABLE[name]
    with pytest.raises(ServiceError) as caught:
        tensors(obj, "F32")
    assert type(caught.value) is kind
    assert says in caught.value.detail
    json.dumps(caught.value.problem(), allow_nan=False)


def test_float64_holds_what_float32_can_not() -> None:
    ((_, _, flat),) = tensors({"w": [1e39, 1e-320]}, "F64")
    assert flat.tolist() == [1e39, 1e-320]


def test_the_limit_counts_all_tensors() -> None:
    assert len(tensors({"w": [0.0] * 60_000, "v": [0] * 40_000}, "F32")) == 2
    with pytest.raises(BodyTooLarge):
        tensors({"w": [1, 2]}, "F32", limit=1)
    with pytest.raises(BodyTooLarge, match="2 tensors"):
        tensors({"w": [], "v": []}, "F32", limit=1)


# Filling a layout


def filled(grads: Any, layout: Layout = LAYOUT) -> np.ndarray:
    flat = np.full(layout.size, 7, np.float32)
    fill(layout, tensors(grads, "F32"), flat)
    return flat


def test_tensors_go_to_their_places_in_any_order() -> None:
    grads = {name: array.tolist() for name, array in reversed(values().items())}
    np.testing.assert_array_equal(filled(grads), flat_of(values()))


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((0,), []),
        ((0, 3), []),
        ((2, 0), [[], []]),
        ((2, 0), []),
        ((2, 0, 3), [[], []]),
        ((2, 0, 3), []),
        ((2, 3, 0), [[[], [], []], [[], [], []]]),
    ],
)
def test_empty_lists_stand_for_empty_tensors(shape: tuple[int, ...], value: Any) -> None:
    assert filled({"e": value}, Layout.of([("e", "F32", shape)])).size == 0


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((), [1.0]),
        ((1,), 1.0),
        ((1,), [[1.0]]),
        ((2,), []),
        ((2, 0), [[], [], []]),
        ((2, 0), [[]]),
        ((0, 3), [1.0]),
        ((2, 2), [1, 2, 3, 4]),
        ((0,), 0.0),
        ((0, 3), [[], []]),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...], value: Any) -> None:
    flat = np.full(8, 7, np.float32)
    layout = Layout.of([("first", "F32", (1,)), ("e", "F32", shape)])
    with pytest.raises(TensorMismatch, match="Wrong shape: 'e'"):
        fill(layout, tensors({"first": [1.0], "e": value}, "F32"), flat)
    assert (flat == 7).all()


def test_missing_and_unexpected_names_are_refused_together() -> None:
    with pytest.raises(TensorMismatch) as caught:
        filled({"w": [[0.0] * 3] * 2, "x": 1})
    assert caught.value.context["missing"] == [name for name in SHAPES if name != "w"]
    assert caught.value.context["unexpected"] == ["x"]
    with pytest.raises(TensorMismatch, match="no tensors"):
        filled({})


# Writing

TINY = {np.float32: 2.0**-149, np.float64: 5e-324, np.float16: 2.0**-24}


def round_trip(array: np.ndarray) -> np.ndarray:
    """Writes a tensor, and reads it as a client would: a double, rounded to the dtype."""
    text = render_tensors([("t", array.shape, np.ravel(array))])
    return np.array(json.loads(text)["t"]).astype(array.dtype).reshape(array.shape)


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1))
@example(0x80000000)
@example(0x00000001)
@example(0x7F7FFFFF)
@example(0x00800000)
def test_a_float32_round_trips(pattern: int) -> None:
    value = np.array([pattern], np.uint32).view(np.float32)
    if np.isfinite(value[0]):
        assert bits(round_trip(value)) == bits(value)


@settings(max_examples=300)
@given(st.floats(allow_nan=False, allow_infinity=False))
@example(-0.0)
@example(5e-324)
def test_a_float64_round_trips(value: float) -> None:
    array = np.array([value])
    assert bits(round_trip(array)) == bits(array)


def test_every_float16_round_trips() -> None:
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert bits(round_trip(finite)) == bits(finite)


def test_every_bfloat16_round_trips() -> None:
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    finite = every[np.isfinite(every.view(ml_dtypes.bfloat16).astype(np.float32))]
    text = render_tensors([("t", finite.shape, finite)])
    back = np.array(json.loads(text)["t"]).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert bits(back.view(np.uint16)) == bits(finite)


def test_many_float32_round_trip_in_every_magnitude() -> None:
    patterns = np.random.default_rng(5).integers(0, 2**32, 100_000, np.uint32)
    values_ = patterns.view(np.float32)
    finite = values_[np.isfinite(values_)]
    assert bits(round_trip(finite)) == bits(finite)


def test_numbers_are_short() -> None:
    array = np.array([0.1, 1.0, -0.0, 1e-8, 3e38], np.float32)
    assert render_tensors([("t", (5,), array)]) == b'{"t":[0.1,1.0,-0.0,1e-08,3e+38]}'


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((), "7.0"),
        ((1,), "[7.0]"),
        ((2, 1), "[[7.0],[7.0]]"),
        ((1, 2), "[[7.0,7.0]]"),
        ((0,), "[]"),
        ((2, 0), "[[],[]]"),
        ((0, 3), "[]"),
        ((2, 0, 3), "[[],[]]"),
        ((1, 1, 0), "[[[]]]"),
    ],
)
def test_shapes_are_written_as_nested_lists(shape: tuple[int, ...], text: str) -> None:
    flat = np.full(int(np.prod(shape)), 7.0)
    assert render_tensors([("t", shape, flat)]).decode() == '{"t":' + text + "}"


@settings(deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda n: "\0" not in n),
        st.lists(st.integers(0, 3), max_size=4).map(tuple),
        min_size=1,
        max_size=5,
    ),
    master=st.sampled_from(["F32", "F64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_fills_the_layout_again(
    shapes: dict[str, tuple[int, ...]], master: str, seed: int
) -> None:
    layout = Layout.of([(name, master, shape) for name, shape in shapes.items()])
    flat = np.random.default_rng(seed).standard_normal(layout.size).astype(WORDS[master])
    back = np.empty_like(flat)
    fill(layout, tensors(loads(render(layout, flat)), master), back)
    assert bits(back) == bits(flat)


def test_names_choose_tensors_and_are_escaped() -> None:
    layout = Layout.of([('"\n', "F32", (1,)), ("é", "F32", ()), ("c", "F32", (2,))])
    flat = np.arange(4, dtype=np.float32)
    assert json.loads(render(layout, flat, ["é", '"\n'])) == {'"\n': [0.0], "é": 1.0}
    assert list(json.loads(render(layout, flat))) == ['"\n', "é", "c"]
    with pytest.raises(TensorMismatch, match="no tensor 'd'"):
        render(layout, flat, ["d"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_what_is_not_finite_is_not_written(value: float, dtype: type) -> None:
    flat = np.array([0, value], dtype)
    with pytest.raises(NotAcceptable, match=r"index 1.*safetensors"):
        render_tensors([("t", (2,), flat)])
    with pytest.raises(NotAcceptable, match=r"index 0.*safetensors"):
        render_tensors([("t", (1,), np.array([0x7F80], np.uint16))])


def test_what_is_too_long_is_not_written() -> None:
    flat = np.zeros(100_001, np.float32)
    with pytest.raises(NotAcceptable, match="100001; ask for it with 'Accept: application/vnd"):
        render_tensors([("t", flat.shape, flat)])
    assert len(json.loads(render_tensors([("t", (100_000,), flat[1:])]))["t"]) == 100_000
    long = {f"{i}" * 1000: (0,) for i in range(1000)}
    pieces = [(name * 2, shape, flat[:0]) for name, shape in long.items()]
    with pytest.raises(NotAcceptable, match="4194304"):
        render_tensors(pieces)


def test_the_limits_of_an_answer_are_the_caller_s() -> None:
    flat = flat_of(values())
    text = render(LAYOUT, flat)
    assert render(LAYOUT, flat, max_elements=flat.size, max_bytes=len(text)) == text
    with pytest.raises(NotAcceptable, match=f"at most {flat.size - 1} numbers"):
        render(LAYOUT, flat, max_elements=flat.size - 1)
    with pytest.raises(NotAcceptable, match=f"above {len(text) - 1};"):
        render(LAYOUT, flat, max_bytes=len(text) - 1)
    many = np.zeros(100_001, np.float32)
    pieces = [("t", many.shape, many)]
    assert len(json.loads(render_tensors(pieces, max_elements=many.size))["t"]) == many.size


@pytest.mark.parametrize("shape", [(10**18, 0), (10**6, 10**6, 0, 5), (200_000, 0)])
def test_a_shape_of_many_empty_lists_is_not_written(shape: tuple[int, ...]) -> None:
    with pytest.raises(NotAcceptable, match="ask for"):
        render_tensors([("t", shape, np.zeros(0))])


# Some rows of a tensor

EMBEDDING = Layout.of([("e", "F32", (4, 2)), ("b", "F32", (2,)), ("s", "F32", ())])
B = {"b": [1.0, 2.0], "s": 3.0}


def gradient(grads: object, taking: Taking = ALL) -> tuple[np.ndarray, Any]:
    came, some = gradients(loads(json.dumps(grads).encode()), "F32")
    flat = np.full(EMBEDDING.size, np.nan, np.float32)
    return flat, fill(EMBEDDING, came, flat, taking, some)


def test_rows_are_summed_into_their_places() -> None:
    flat, rows = gradient(B | {"e": {"idx": [3, 0, 3], "rows": [[1, 2], [3, 4], [5, 6.5]]}})
    assert flat.tolist() == [3, 4, 0, 0, 0, 0, 6, 8.5, 1, 2, 3]
    assert rows == ()


def test_rows_may_be_kept() -> None:
    grads = B | {"e": {"idx": [3, 0, 3], "rows": [[1, 2], [3, 4], [5, 6.5]]}}
    flat, (rows,) = gradient(grads, Taking(lazy=lambda entry: True))
    assert flat[8:].tolist() == [1, 2, 3]
    assert (rows.entry, rows.width) == (0, 2)
    assert rows.idx.tolist() == [0, 3]
    assert rows.values.tolist() == [3, 4, 6, 8.5]


@pytest.mark.parametrize("rows", [[], [[]]])
def test_no_rows_at_all(rows: list[Any]) -> None:
    if rows:
        with pytest.raises(TensorMismatch):
            gradient(B | {"e": {"idx": [], "rows": rows}})
        return
    assert gradient(B | {"e": {"idx": [], "rows": rows}})[0].tolist() == [0] * 8 + [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "is an object"),
        ({"idx": [0]}, "is an object"),
        ({"idx": [0], "rows": [[1, 2]], "more": 1}, "is an object"),
        ({"idx": 0, "rows": [[1, 2]]}, "list of row numbers"),
        ({"idx": [[0]], "rows": [[1, 2]]}, "list of row numbers"),
        ({"idx": [0.0], "rows": [[1, 2]]}, "list of row numbers"),
        ({"idx": [-1], "rows": [[1, 2]]}, "list of row numbers"),
        ({"idx": [1 << 63], "rows": [[1, 2]]}, "list of row numbers"),
        ({"idx": [True], "rows": [[1, 2]]}, "true or false"),
        ({"idx": ["0"], "rows": [[1, 2]]}, "text"),
        ({"idx": {}, "rows": [[1, 2]]}, "an object"),
        ({"idx": [4], "rows": [[1, 2]]}, "index 4 at position 0 and 4 rows"),
        ({"idx": [0], "rows": [[1, 2], [3, 4]]}, "send one row for each index"),
        ({"idx": [0], "rows": [1, 2]}, "send one row for each index"),
        ({"idx": [0], "rows": [[1]]}, "send one row for each index"),
        ({"idx": [0], "rows": [[1, "2"]]}, "text"),
        ({"idx": [0], "rows": {"idx": []}}, "an object"),
    ],
)
def test_rows_that_are_none(value: Any, says: str) -> None:
    with pytest.raises((InvalidTensors, TensorMismatch), match=says):
        gradient(B | {"e": value})


def test_rows_of_a_scalar_and_of_an_unknown_tensor() -> None:
    whole = {"e": [[0, 0]] * 4, "b": [0, 0]}
    with pytest.raises(TensorMismatch, match="send it whole"):
        gradient(whole | {"s": {"idx": [0], "rows": [1]}})
    with pytest.raises(TensorMismatch, match="Unexpected: 'x'"):
        gradient(whole | {"s": 1, "x": {"idx": [0], "rows": [1]}})


def test_rows_count_as_numbers() -> None:
    rows = {"e": {"idx": [0, 1], "rows": [[1, 2], [3, 4]]}}
    assert len(gradients(B | rows, "F32", 9)[1]) == 1
    for limit in (8, 4, 2):
        with pytest.raises(BodyTooLarge):
            gradients(B | rows, "F32", limit)


def test_rows_are_no_parameters() -> None:
    with pytest.raises(InvalidTensors, match="an object"):
        tensors({"e": {"idx": [0], "rows": [[1, 2]]}}, "F32")
