"""The small forms of a push: what they mean, and what is refused before anything is written."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidTensors, ServiceError, TensorMismatch
from service.sessions.layout import Layout
from service.wire.compact import Compact, check, push_reader, write
from service.wire.digest import digest
from service.wire.rows import ALL, OFTEN, Taking
from tests.wire.bodies import LAYOUT, NUMPY, Destination, entry, feed, flat_of, framed, values

WIRE: dict[str, Any] = {**NUMPY, "I64": np.dtype(np.int64), "I8": np.dtype(np.int8)}
Tensors = dict[str, tuple[str, Any]]
BASE: Tensors = {name: ("F32", array) for name, array in values().items()}


def packed(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """A body of (dtype, values) by name."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, value) in tensors.items():
        array = np.asarray(value).astype(WIRE[dtype])
        raw = array.tobytes()
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    return framed(json.dumps(header).encode(), data)


def read(
    tensors: Tensors | bytes,
    metadata: dict[str, str] | None = None,
    *,
    layout: Layout = LAYOUT,
    master: str = "F32",
    taking: Taking = ALL,
    cuts: list[int] | None = None,
) -> tuple[np.ndarray, Compact]:
    """The dense vector of a body that must not be plain, and the rest of it."""
    body = tensors if isinstance(tensors, bytes) else packed(tensors, metadata)
    plain = Destination(layout)
    reader = push_reader(
        layout, master, len(body), plain, lambda plan: np.full(plan.data_bytes, 0xA5, np.uint8),
        taking,
    )  # fmt: skip
    feed(reader, body, cuts)
    assert not plain.asked
    assert reader.plan is not None
    check(reader.plan, reader.data)
    flat = np.full(layout.size, np.nan, WIRE[master])
    return flat, write(reader.plan, reader.data, flat)


def without(*names: str) -> Tensors:
    return {name: value for name, value in BASE.items() if name not in names}


def of(flat: np.ndarray, name: str, layout: Layout = LAYOUT) -> np.ndarray:
    found = layout.index[name]
    return flat[found.offset : found.offset + found.size].reshape(found.shape)


def summed(shape: tuple[int, ...], idx: Any, rows: np.ndarray, master: str) -> np.ndarray:
    """Slow and obvious: each row in turn, in float64, then one rounding."""
    total: dict[int, np.ndarray] = {}
    for at, row in zip(idx, np.asarray(rows), strict=True):
        wide = row.astype(np.float64)
        total[int(at)] = total[int(at)] + wide if int(at) in total else wide
    found = np.zeros(shape, WIRE[master])
    for at, row in total.items():
        found[at] = row.astype(WIRE[master])
    return found


def test_all_forms_beside_each_other() -> None:
    flat, found = read(
        {
            "deep#values": ("F32", [2.0, -3.0]),
            "b": BASE["b"],
            "w#rows": ("F32", [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
            "one#q8": ("I8", [-128]),
            "deep#topk": ("I64", [3, 0]),
            "w#idx": ("I64", [1, 0, 1]),
            "scalar": BASE["scalar"],
            "none": BASE["none"],
            "one#scale": ("F32", [0.5]),
        }
    )
    assert of(flat, "w").tolist() == [[4, 5, 6], [8, 10, 12]]
    assert of(flat, "one").tolist() == [-64]
    assert of(flat, "deep").ravel().tolist() == [-3, 0, 0, 2]
    assert of(flat, "b").tolist() == BASE["b"][1].tolist()
    assert found.came == {
        "w": "rows", "scalar": "plain", "none": "plain", "b": "plain", "one": "int8",
        "deep": "topk",
    }  # fmt: skip
    assert found.rows == ()
    assert found.wire == "int8+topk"


@pytest.mark.parametrize(
    ("form", "wire"),
    [
        ({"b#idx": ("I64", [1]), "b#rows": ("F32", [1])}, None),
        ({"b#q8": ("I8", [1] * 5), "b#scale": ("F32", [1])}, "int8"),
        ({"b#topk": ("I64", [1]), "b#values": ("F32", [1])}, "topk"),
    ],
)
def test_what_loses_something_is_named(form: Tensors, wire: str | None) -> None:
    assert read(without("b") | form)[1].wire == wire


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(NUMPY)),
    master=st.sampled_from(["F32", "F64"]),
    idx=st.lists(st.integers(0, 6), max_size=30),
    width=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    seed=st.integers(0, 2**32 - 1),
    chunk=st.integers(1, 50),
    lazy=st.booleans(),
)
def test_rows_are_summed_in_order_of_appearance(
    dtype: str, master: str, idx: list[int], width: tuple[int, ...], seed: int, chunk: int,
    lazy: bool,
) -> None:  # fmt: skip
    if dtype == "F64":
        master = "F64"
    layout = Layout.of([("a", "F32", (2,)), ("t", "F32", (7, *width))])
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((len(idx), *width)) * 10.0 ** rng.integers(-4, 4)).astype(
        NUMPY[dtype]
    )
    body = packed({"a": (dtype, [1, 2]), "t#idx": ("I64", idx), "t#rows": (dtype, rows)})
    flat, found = read(
        body, layout=layout, master=master, cuts=list(range(0, len(body), chunk)),
        taking=Taking(lazy=lambda entry: lazy),
    )  # fmt: skip
    expected = summed((7, *width), idx, rows, master)
    if not lazy:
        assert of(flat, "t", layout).tobytes() == expected.tobytes()
        return
    (kept,) = found.rows
    assert (kept.entry, kept.width, kept.idx.dtype) == (1, int(np.prod(width)), np.int64)
    assert kept.idx.tolist() == sorted(set(idx))
    assert kept.values.dtype == WIRE[master]
    assert kept.values.tobytes() == expected[sorted(set(idx))].tobytes()


@pytest.mark.parametrize("count", [2, OFTEN, OFTEN + 1, 5 * OFTEN])
@pytest.mark.parametrize("width", [1, 3, 200])
def test_a_row_that_comes_often(count: int, width: int) -> None:
    layout = Layout.of([("t", "F32", (9, width))])
    rng = np.random.default_rng(count)
    idx = rng.permutation(np.r_[np.full(count, 4), np.full(count // 2, 8), 0])
    rows = (rng.standard_normal((idx.size, width)) * 1e3).astype(np.float32)
    flat, _ = read({"t#idx": ("I64", idx), "t#rows": ("F32", rows)}, layout=layout)
    assert flat.tobytes() == summed((9, width), idx, rows, "F32").tobytes()


def test_a_lone_negative_zero_stays_one() -> None:
    flat, _ = read(without("b") | {"b#idx": ("I64", [2]), "b#rows": ("F32", [-0.0])})
    assert np.signbit(of(flat, "b")).tolist() == [False, False, True, False, False]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 700),
    block=st.sampled_from([None, 16, 17, 100, 256, 65_536]),
    master=st.sampled_from(["F32", "F64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_int8(size: int, block: int | None, master: str, seed: int) -> None:
    layout = Layout.of([("a", "F32", (3,)), ("t", "F32", (size,))])
    rng = np.random.default_rng(seed)
    q8 = rng.integers(-128, 128, size)
    scale = rng.random(-(-size // (block or 256))).astype(np.float32)
    tensors: Tensors = {"a": ("BF16", [1, 2, 3]), "t#q8": ("I8", q8), "t#scale": ("F32", scale)}
    metadata = None if block is None else {"q8_block": str(block)}
    flat, found = read(tensors, metadata, layout=layout, master=master)
    exact = q8 * np.repeat(scale.astype(np.float64), block or 256)[:size]
    assert of(flat, "t", layout).tobytes() == exact.astype(WIRE[master]).tobytes()
    assert found.wire == "int8"


def test_int8_of_many_blocks() -> None:
    size = 300_001
    layout = Layout.of([("t", "F32", (size,))])
    rng = np.random.default_rng(1)
    q8, scale = rng.integers(-127, 128, size), rng.random(-(-size // 48)).astype(np.float32)
    tensors: Tensors = {"t#q8": ("I8", q8), "t#scale": ("F32", scale)}
    flat, _ = read(tensors, {"q8_block": "48"}, layout=layout)
    assert flat.tobytes() == (q8 * np.repeat(scale, 48)[:size]).astype(np.float32).tobytes()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    size=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_topk(dtype: str, size: int, seed: int) -> None:
    layout = Layout.of([("t", "F32", (size,))])
    rng = np.random.default_rng(seed)
    idx = rng.permutation(size)[: rng.integers(0, size + 1)]
    some = rng.standard_normal(idx.size).astype(NUMPY[dtype])
    flat, _ = read({"t#topk": ("I64", idx), "t#values": (dtype, some)}, layout=layout)
    expected = np.zeros(size, np.float32)
    expected[idx] = some
    assert flat.tobytes() == expected.tobytes()


def test_the_digest_is_that_of_the_dense_push() -> None:
    dense = {name: np.zeros(array.shape, np.float32) for name, (_, array) in BASE.items()}
    dense["w"][1] = [1, 2, 3]
    dense["b"][[4, 2]] = [0.5, -0.5]
    dense["one"][:] = 12
    flat, _ = read(
        {
            **{name: ("F32", dense[name]) for name in ("scalar", "none", "deep")},
            "w#idx": ("I64", [1, 1]),
            "w#rows": ("F32", [[0.25, 1, 1], [0.75, 1, 2]]),
            "b#topk": ("I64", [4, 2]),
            "b#values": ("F32", [0.5, -0.5]),
            "one#q8": ("I8", [24]),
            "one#scale": ("F32", [0.5]),
        }
    )
    assert digest(flat, "F32", "F32", b"c") == digest(flat_of(dense), "F32", "F32", b"c")


def test_missing_tensors_are_zero() -> None:
    flat, found = read(
        {"b#topk": ("I64", [0]), "b#values": ("F32", [7])}, taking=Taking(lambda entry: True)
    )
    assert found.came == {"b": "topk"}
    assert np.flatnonzero(flat).tolist() == [LAYOUT.index["b"].offset]
    assert not np.isnan(flat).any()


def test_a_name_of_the_layout_wins_over_a_suffix() -> None:
    layout = Layout.of([("t", "F32", (2,)), ("t#idx", "F32", (1,)), ("t#rows", "F32", (1,))])
    body = packed({"t": ("F32", [1, 2]), "t#idx": ("F32", [3]), "t#rows": ("F32", [4])})
    destination = Destination(layout)
    reader = push_reader(layout, "F32", len(body), destination, lambda plan: np.empty(0, np.uint8))
    feed(reader, body)
    assert reader.plan is None
    assert destination.flat().tolist() == [1, 2, 3, 4]


def test_a_plain_body_streams_to_its_place() -> None:
    body = packed(BASE)
    destination = Destination()
    reader = push_reader(LAYOUT, "F32", len(body), destination, lambda plan: np.empty(0, np.uint8))
    feed(reader, body, [5, 70, len(body) - 3])
    assert destination.asked == ["F32"]
    assert reader.plan is None
    assert destination.flat().tobytes() == flat_of(values()).tobytes()


def test_rows_may_be_refused_and_only_rows() -> None:
    def refuse(entry: Any) -> None:
        raise InvalidTensors(f"{entry.name} takes no rows.")

    form: Tensors = {"b#idx": ("I64", [1]), "b#rows": ("F32", [1])}
    with pytest.raises(InvalidTensors, match="b takes no rows"):
        read(without("b") | form, taking=Taking(check_rows=refuse))
    read(
        without("b") | {"b#topk": ("I64", [1]), "b#values": ("F32", [1])},
        taking=Taking(check_rows=refuse),
    )


Q8: Tensors = {"w#q8": ("I8", [1] * 6), "w#scale": ("F32", [1.0])}
ROWS: Tensors = {"w#idx": ("I64", [0]), "w#rows": ("F32", [[1, 2, 3]])}
TOPK: Tensors = {"w#topk": ("I64", [0, 5]), "w#values": ("F32", [1, 2])}
HUGE = 2**63 - 1

BAD: dict[str, tuple[Tensors, str]] = {
    "idx alone": ({"w#idx": ROWS["w#idx"]}, "comes without 'w#rows'"),
    "rows alone": ({"w#rows": ROWS["w#rows"]}, "comes without 'w#idx'"),
    "q8 alone": ({"w#q8": Q8["w#q8"]}, "comes without 'w#scale'"),
    "scale alone": ({"w#scale": Q8["w#scale"]}, "comes without 'w#q8'"),
    "topk alone": ({"w#topk": TOPK["w#topk"]}, "comes without 'w#values'"),
    "values alone": ({"w#values": TOPK["w#values"]}, "comes without 'w#topk'"),
    "two forms": (ROWS | TOPK, "comes in 2 forms"),
    "halves of two forms": ({"w#idx": ROWS["w#idx"], "w#values": TOPK["w#values"]}, "in 2 forms"),
    "plain and rows": ({"w": BASE["w"]} | ROWS, "comes whole and as"),
    "plain and half a form": ({"w": BASE["w"], "w#idx": ROWS["w#idx"]}, "comes whole and as"),
    "idx of floats": (ROWS | {"w#idx": ("F64", [0])}, "send it as I64"),
    "rows of whole numbers": (ROWS | {"w#rows": ("I64", [[1, 2, 3]])}, "has the dtype I64; use"),
    "q8 of I64": (Q8 | {"w#q8": ("I64", [1] * 6)}, "send it as I8"),
    "scale of F64": (Q8 | {"w#scale": ("F64", [1])}, "send it as F32"),
    "topk of I8": (TOPK | {"w#topk": ("I8", [0, 5])}, "send it as I64"),
    "values of I8": (TOPK | {"w#values": ("I8", [1, 2])}, "has the dtype I8; use"),
    "another float dtype": (TOPK | {"w#values": ("F16", [1, 2])}, "A push has one dtype"),
    "plain whole numbers": (Q8 | {"b": ("I64", [1] * 5)}, "has the dtype I64; use"),
    "only plain whole numbers": ({"w": ("I8", [[1, 1, 1]] * 2)}, "has the dtype I8; use"),
    "rows too short": (ROWS | {"w#rows": ("F32", [[1, 2]])}, "send one row for each index"),
    "rows too many": (ROWS | {"w#rows": ("F32", [[1, 2, 3]] * 2)}, "send one row for each"),
    "rows flat": (ROWS | {"w#rows": ("F32", [1, 2, 3])}, "send one row for each"),
    "idx of two dimensions": (ROWS | {"w#idx": ("I64", [[0]])}, "send a list of row numbers"),
    "idx a scalar": (ROWS | {"w#idx": ("I64", 0)}, "send a list of row numbers"),
    "idx too large": (ROWS | {"w#idx": ("I64", [2])}, "index 2 at position 0 and 2 rows"),
    "idx negative": (ROWS | {"w#idx": ("I64", [-1])}, "index -1 at position 0"),
    "idx huge": (ROWS | {"w#idx": ("I64", [HUGE])}, f"index {HUGE}"),
    "idx least": (ROWS | {"w#idx": ("I64", [-HUGE - 1])}, f"index {-HUGE - 1}"),
    "q8 in shape": (Q8 | {"w#q8": ("I8", [[1] * 3] * 2)}, r"should have \[6\]"),
    "q8 too short": (Q8 | {"w#q8": ("I8", [1] * 5)}, r"should have \[6\]"),
    "scales too many": (Q8 | {"w#scale": ("F32", [1, 1])}, "one scale for each 256"),
    "no scales": (Q8 | {"w#scale": ("F32", [])}, "one scale for each 256"),
    "scale negative": (Q8 | {"w#scale": ("F32", [-1])}, r"scale -1.0 at position 0"),
    "scale NaN": (Q8 | {"w#scale": ("F32", [np.nan])}, "scale nan"),
    "scale infinite": (Q8 | {"w#scale": ("F32", [np.inf])}, "scale inf"),
    "topk twice": (TOPK | {"w#topk": ("I64", [5, 5])}, "the index 5 more than once"),
    "topk too large": (TOPK | {"w#topk": ("I64", [0, 6])}, "index 6 at position 1 and 6 elem"),
    "topk negative": (TOPK | {"w#topk": ("I64", [-1, 0])}, "index -1 at position 0"),
    "topk more than there are": (
        {"w#topk": ("I64", range(7)), "w#values": ("F32", range(7))}, "7 indices and the tensor 6"
    ),
    "topk of two dimensions": (TOPK | {"w#topk": ("I64", [[0, 5]])}, "send a list of flat ind"),
    "values too many": (TOPK | {"w#values": ("F32", [1, 2, 3])}, "one value for each index"),
    "values in shape": (TOPK | {"w#values": ("F32", [[1], [2]])}, "one value for each index"),
    "unknown tensor": (TOPK | {"x#topk": ("I64", [0]), "x#values": ("F32", [0])}, "Unexpected"),
    "unknown suffix": (TOPK | {"w#max": ("F32", [0])}, "Unexpected: 'w#max'"),
    "a suffix of a suffix": (TOPK | {"w#idx#idx": ("I64", [0])}, "Unexpected: 'w#idx#idx'"),
    "misshapen beside": (Q8 | {"b": ("F32", [1.0])}, "Wrong shape: 'b'"),
}  # fmt: skip


def refused(tensors: Tensors, metadata: dict[str, str] | None = None, **kinds: Any) -> ServiceError:
    with pytest.raises((InvalidTensors, TensorMismatch)) as caught:
        read(tensors, metadata, **kinds)
    assert caught.value.status == 422
    assert caught.value.detail.endswith(".")
    return caught.value


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused(name: str) -> None:
    tensors, says = BAD[name]
    with pytest.raises((InvalidTensors, TensorMismatch), match=says):
        read(without("w") | tensors)
    refused(without("w") | tensors)


def test_a_scalar_has_no_rows() -> None:
    rows: Tensors = {"scalar#idx": ("I64", [0]), "scalar#rows": ("F32", [1])}
    assert "send it whole" in refused(without("scalar") | rows).detail


def test_an_empty_tensor_has_no_indices() -> None:
    some: Tensors = {"none#idx": ("I64", [0]), "none#rows": ("F32", np.zeros((1, 3)))}
    assert "send no index" in refused(without("none") | some).detail
    none: Tensors = {"none#idx": ("I64", []), "none#rows": ("F32", np.zeros((0, 3)))}
    read(without("none") | none)


def test_missing_ones_are_named() -> None:
    assert refused(without("b", "one") | Q8 | {"w": BASE["w"]}).context["name"] == "w"
    assert refused(without("w", "b", "one") | Q8).context["missing"] == ["b", "one"]


def test_wider_than_the_session() -> None:
    tensors = {name: ("F64", array) for name, (_, array) in BASE.items() if name != "w"}
    wide: Tensors = {"w#idx": ("I64", [0]), "w#rows": ("F64", [[1, 2, 3]])}
    assert refused(tensors | wide).context["session_dtype"] == "F32"
    read(tensors | wide, master="F64")


@pytest.mark.parametrize("block", ["15", "65537", "0", "-256", "256.0", "", "١٦", "1" * 400, "abc"])
def test_blocks_that_are_none(block: str) -> None:
    assert "q8_block" in refused(without("w") | Q8, {"q8_block": block}).detail


def test_a_block_matters_to_int8_only() -> None:
    read(without("w") | TOPK, {"q8_block": "none"})


def test_nothing_is_kept_of_a_refused_header() -> None:
    body = packed(without("w") | TOPK | {"w#values": ("F32", [1])})

    def keep(plan: Any) -> np.ndarray:
        raise AssertionError("kept")

    reader = push_reader(LAYOUT, "F32", len(body), Destination(), keep)
    with pytest.raises(TensorMismatch):
        feed(reader, body)


def test_what_is_reserved_holds_what_lasts() -> None:
    body = packed(without("w") | {"w#idx": ("I64", [0, 1, 0]), "w#rows": ("F16", np.ones((3, 3)))})
    body = body.replace(b'"F32"', b'"F16"')  # sizes of the others no longer fit
    with pytest.raises(InvalidTensors):
        read(body)
    tensors = {name: ("F16", array) for name, (_, array) in without("w").items()}
    rows: Tensors = {"w#idx": ("I64", [0, 1, 0]), "w#rows": ("F16", np.ones((3, 3)))}
    plans = []

    def keep(plan: Any) -> np.ndarray:
        plans.append(plan)
        return np.empty(plan.data_bytes, np.uint8)

    body = packed(tensors | rows)
    taking = Taking(lazy=lambda entry: True)
    feed(push_reader(LAYOUT, "F32", len(body), Destination(), keep, taking), body)
    assert plans[0].lasting == 3 * (8 + 3 * 4)
    assert plans[0].nbytes >= plans[0].data_bytes + plans[0].lasting
