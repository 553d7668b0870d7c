import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidTensors, TensorMismatch
from service.sessions.layout import Layout
from service.wire import raw
from service.wire.raw import raw_reader
from tests.wire.bodies import LAYOUT, NUMPY, Destination, feed, flat_of, values


@given(dtype=st.sampled_from(list(NUMPY)), chunk=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_any_chunks_give_the_vector(dtype: str, chunk: int, seed: int) -> None:
    flat = flat_of(values(dtype, seed))
    body = flat.tobytes()
    destination = Destination()
    reader = raw_reader(LAYOUT, dtype, "F64", len(body), destination)
    feed(reader, body, list(range(0, len(body), chunk)))
    assert destination.bytes.tobytes() == body
    assert destination.asked == [dtype]
    assert reader.dtype == dtype
    assert reader.metadata == {}


@pytest.mark.parametrize("off", [-4, -1, 1, 4, 1000])
def test_the_length_must_be_exact(off: int) -> None:
    destination = Destination()
    with pytest.raises(InvalidTensors, match="whole vector in layout order"):
        raw_reader(LAYOUT, "F32", "F32", LAYOUT.size * 4 + off, destination)
    assert destination.asked == []


def test_the_length_that_was_said_must_come() -> None:
    length = LAYOUT.size * 4
    reader = raw_reader(LAYOUT, "F32", "F32", length, Destination())
    reader.feed(bytes(length - 1))
    with pytest.raises(InvalidTensors, match=f"{length - 1} of {length} bytes"):
        reader.finish()
    with pytest.raises(InvalidTensors, match="exactly what"):
        reader.feed(bytes(2))


def test_a_gradient_may_be_no_wider_than_the_session() -> None:
    with pytest.raises(TensorMismatch, match="send it as F32"):
        raw_reader(LAYOUT, "F64", "F32", LAYOUT.size * 8, Destination())


def test_a_session_without_tensors_takes_no_push() -> None:
    with pytest.raises(TensorMismatch, match="upload"):
        raw_reader(Layout(()), "F32", "F32", 0, Destination())


def test_a_session_of_empty_tensors_takes_an_empty_body() -> None:
    layout = Layout.of([("e", "F32", (0,))])
    destination = Destination(layout)
    raw_reader(layout, "F32", "F32", 0, destination).finish()
    assert destination.asked == ["F32"]


def test_an_answer_is_views_in_place() -> None:
    flat = flat_of(values())
    (whole,) = raw.parts(LAYOUT, flat, None)
    assert whole.readonly
    assert bytes(whole) == flat.tobytes()
    some = raw.parts(LAYOUT, flat, ["deep", "w"])
    want = np.concatenate([np.ravel(values()["w"]), np.ravel(values()["deep"])])
    assert b"".join(some) == want.tobytes()
    assert raw.parts(LAYOUT, flat, ["none"]) == []
    with pytest.raises(TensorMismatch, match="'x'"):
        raw.parts(LAYOUT, flat, ["x"])
