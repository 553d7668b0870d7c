"""Smaller gradients: what goes over the wire is what the codec says, and what is lost is kept."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradpost
from gradpost import Buffer, RetryPolicy, Rows, Session, compress
from gradpost.compress import ErrorFeedback, bf16, chosen, encoded, f16, int8, topk
from gradpost.errors import DeadlineExceeded, NotPulled, RefusedError, TransportError
from gradpost.protocol.dtypes import from_bf16, to_bf16
from service.sessions.layout import Layout
from service.wire.compact import check, push_reader, write
from tests.client.scripted import SUMMARY, Scripted, answer, done, problem

CODECS = {
    "int8": int8(), "int8:16": int8(16), "topk:0.1": topk(0.1), "topk:3": topk(3),
    "bf16": bf16(), "f16": f16(),
}  # fmt: skip
RNG = np.random.default_rng(0)
POLICY = RetryPolicy(deadline_s=5, base_s=0.001)


def served(parts, shapes, master="F32", dtypes=None):
    """What the server makes of a body: the tensors, as its dense vector has them."""
    layout = Layout.of([(name, "F32", shape) for name, shape in shapes.items()])
    body = b"".join(parts)
    taken = []

    def acquire(dtype):
        taken.append(dtype)
        return plain[: layout.size * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[dtype]]

    plain = np.empty(layout.size * 8, np.uint8)
    reader = push_reader(
        layout, master, len(body), acquire, lambda plan: np.empty(plan.data_bytes, np.uint8)
    )
    reader.feed(body)
    reader.finish()
    if reader.plan is None:
        raw = plain[: layout.size * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[taken[0]]]
        if taken[0] == "BF16":
            flat = from_bf16(raw.view(np.uint16))
        else:
            flat = raw.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[taken[0]])
    else:
        check(reader.plan, reader.data)
        flat = np.empty(layout.size, {"F32": np.float32, "F64": np.float64}[master])
        write(reader.plan, reader.data, flat)
    return {e.name: flat[e.offset : e.offset + e.size].reshape(e.shape) for e in layout.entries}


def header_of(body):
    whole = b"".join(body)
    return json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])


# What a codec sends


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(list(CODECS)),
    shape=st.lists(st.integers(0, 40), max_size=2).map(tuple),
    master=st.sampled_from(["F32", "F64"]),
    power=st.integers(-30, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_server_reads_what_the_codec_decodes(codec, shape, master, power, seed):
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal(shape) * 10.0**power).astype(np.float32)
    wire = CODECS[codec].encode("t", array)
    body = gradpost.tensors.encode({"t": wire}, master, one_dtype=True)
    found = served(body, {"t": shape}, master)["t"]
    expected = CODECS[codec].decode(wire, shape)
    if codec.startswith("int8") and master == "F64":
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-44)
    else:
        assert np.array_equal(found, expected)
    assert expected.shape == array.shape
    sent = sum(piece.nbytes for _, _, piece in wire.parts)
    assert sent == CODECS[codec].nbytes(array.size)


def test_int8_is_as_close_as_half_a_step():
    array = RNG.standard_normal(1000).astype(np.float32)
    array[300:512] = 0
    codec = int8(128)
    found = codec.decode(codec.encode("t", array), array.shape)
    for lo in range(0, 1000, 128):
        block = array[lo : lo + 128]
        bound = np.abs(block).max() / 127 / 2 * 1.0001
        assert np.abs(found[lo : lo + 128] - block).max() <= bound
    assert not found[384:512].any()


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 3e38])
def test_int8_at_the_ends_of_the_range(tiny):
    array = np.array([tiny, -tiny, 0.5 * tiny] * 10, np.float32)
    wire = int8(16).encode("t", array)
    assert np.isfinite(wire.parts[1][2]).all()
    assert np.isfinite(int8(16).decode(wire, array.shape)).all()


def test_topk_takes_the_largest_of_either_sign():
    array = np.array([[1, -9, 3], [0, 8, -2]], np.float32)
    (_, _, idx), (_, _, some) = topk(2).encode("t", array).parts
    assert (idx.tolist(), some.tolist()) == ([1, 4], [-9, 8])
    assert topk(0.34).encode("t", array).parts[0][2].size == 3
    assert topk(100).encode("t", array).parts[0][2].size == 6


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int8", int8), ("int8:64", int8), ("topk:0.01", topk), ("topk:5", topk), ("topk:1", topk),
    ],
)  # fmt: skip
def test_names_of_codecs_with_feedback(text, kind):
    found = chosen(text)
    assert isinstance(found, ErrorFeedback)
    assert isinstance(found.codec, kind)
    assert text in ("int8", f"int8:{getattr(found.codec, 'block', 0)}") or (
        text == f"topk:{found.codec.amount}"
    )


def test_names_of_codecs_without():
    assert chosen(None) is None
    assert chosen("bf16").floats == "BF16"
    assert chosen("f16").floats == "F16"
    codec = int8()
    assert chosen(codec) is codec


@pytest.mark.parametrize(
    "text",
    ["", "int4", "int8:", "int8:x", "int8:8", "topk", "topk:0", "topk:2.5", "topk:-1", "topk:nan",
     "bf16:2", "zip"],
)  # fmt: skip
def test_names_that_are_none(text):
    if text == "int8:":
        assert chosen(text).codec.block == 256
        return
    with pytest.raises(ValueError, match="compress="):
        chosen(text)


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5, True, float("nan"), "0.1"])
def test_amounts_that_are_none(amount):
    with pytest.raises(ValueError, match="Give a part"):
        topk(amount)
    with pytest.raises(ValueError, match="block"):
        int8(amount)


# The body of a push


def test_what_would_not_be_smaller_goes_whole():
    grads = {"w": np.ones((4, 100), np.float32), "b": np.ones(1, np.float32)}
    for codec in (int8(), topk(0.1)):
        names = header_of(encoded(codec, grads, "F32")[0]).keys()
        assert "b" in names
        assert "w" not in names
    header = header_of(encoded(bf16(), grads, "F32")[0])
    assert {header["w"]["dtype"], header["b"]["dtype"]} == {"BF16"}


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_goes_whole(codec, bad):
    grads = {"w": np.full(200, bad, np.float32), "v": np.ones(200, np.float32)}
    feedback = ErrorFeedback(CODECS[codec])
    body, settled = encoded(feedback, grads, "F32")
    assert header_of(body)["w"]["dtype"] == "F32"
    found = served(body, {"w": (200,), "v": (200,)})
    assert not np.isfinite(found["w"]).any()
    settled(None)
    assert feedback.state() == {}


def test_forms_and_rows_and_any_dtype_beside_each_other():
    idx, rows = [3, 0, 3], np.float64([[1, 2], [3, 4], [5, 6]])
    grads = {
        "e": Rows(idx, rows), "w": RNG.standard_normal(500), "h": np.ones(5, np.float16),
        "i": np.arange(3), "z": gradpost.bf16(to_bf16(np.float32([1.5]))), "s": 2.0,
    }  # fmt: skip
    shapes = {"e": (4, 2), "w": (500,), "h": (5,), "i": (3,), "z": (1,), "s": ()}
    for master in ("F32", "F64"):
        for codec in (None, *CODECS.values()):
            body, _ = encoded(codec, grads, master)
            found = served(body, shapes, master)
            assert found["e"].tolist() == [[3, 4], [0, 0], [0, 0], [6, 8]]
            assert found["s"] == 2
            if codec is None or codec.floats:
                np.testing.assert_allclose(found["w"], grads["w"], rtol=1e-2)
            header = header_of(body)
            for name, entry in header.items():
                if name != "__metadata__":
                    size = {"I64": 8, "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}
                    assert entry["data_offsets"][0] % size[entry["dtype"]] == 0


@pytest.mark.parametrize(
    ("idx", "rows", "error"),
    [
        ([0.5], [[1, 2]], TypeError), ([[0]], [[1, 2]], TypeError), (0, [1, 2], TypeError),
        ([0], [[1, 2], [3, 4]], ValueError), ([0, 1], 1.0, ValueError),
    ],
)  # fmt: skip
def test_rows_that_are_none(idx, rows, error):
    with pytest.raises(error):
        Rows(idx, rows)


def test_no_rows():
    found = served(encoded(None, {"e": Rows([], np.zeros((0, 2)))}, "F32")[0], {"e": (4, 2)})
    assert not found["e"].any()


# What is lost


@pytest.mark.parametrize("codec", list(CODECS))
def test_nothing_is_lost_for_ever(codec):
    feedback = ErrorFeedback(CODECS[codec])
    total, arrived = np.zeros(300), np.zeros(300)
    for _ in range(20):
        g = RNG.standard_normal(300).astype(np.float32)
        body, settled = encoded(feedback, {"w": g}, "F32")
        settled(gradpost.Summary.of(SUMMARY))
        total += g
        arrived += served(body, {"w": (300,)})["w"]
    left = feedback.state()["w"]
    assert left.dtype == np.float32
    np.testing.assert_allclose(arrived + left, total, atol=1e-4)


def test_its_state_goes_into_a_checkpoint():
    one, other = ErrorFeedback(topk(1)), ErrorFeedback(topk(1))
    grads = {"w": np.arange(4, dtype=np.float32), "v": np.arange(9, dtype=np.float32)}
    encoded(one, grads, "F32")[1](None)
    encoded(one, grads, "F32")[1](gradpost.Summary.of(SUMMARY))
    assert sorted(one.state()) == ["v", "w"]
    other.load(one.state())
    one.state()["w"][:] = 9  # a copy
    first, second = (b"".join(encoded(each, grads, "F32")[0]) for each in (one, other))
    assert first == second


def test_two_pushes_on_their_way_count_once():
    feedback = ErrorFeedback(topk(1))
    feedback.load({"w": np.float32([0, 5, 0, 0, 0, 0])})
    g = np.float32([1, 0, 0, 0, 0, 2])
    _, first = encoded(feedback, {"w": g}, "F32")  # takes the 5, sends 5, loses 1 and 2
    _, second = encoded(feedback, {"w": g}, "F32")  # sends 2, loses 1
    assert feedback.state() == {}
    second(gradpost.Summary.of(SUMMARY))
    first(None)
    assert feedback.state()["w"].tolist() == [1, 5, 0, 0, 0, 0]


def test_a_codec_that_fails_takes_nothing():
    class Broken(topk):
        def encode(self, name, array):
            if name == "v":
                raise RuntimeError("broken")
            return super().encode(name, array)

    feedback = ErrorFeedback(Broken(1))
    left = {"w": np.float32([1, 2, 3, 4]), "v": np.float32([5, 6, 7, 8])}
    feedback.load(left)
    grads = {name: np.ones(4, np.float32) for name in left}
    with pytest.raises(RuntimeError):
        encoded(feedback, grads, "F32")
    assert {name: array.tolist() for name, array in feedback.state().items()} == {
        name: array.tolist() for name, array in left.items()
    }


# Sessions


def scripted(*script):
    transport = Scripted(*script)
    session = Session(transport, "m", policy=POLICY, seed=0, compress="topk:1")
    session.version = (1, 1)
    session.compress.load({"w": np.float32([0, 4, 0, 0])})
    return session, transport


GRAD = {"w": np.float32([3, 0, 1, 0])}
SENT, LEFT = [0, 4, 0, 0], [3, 0, 1, 0]


def left(session):
    return session.compress.state()["w"].tolist()


def test_a_push_that_was_admitted_keeps_what_was_lost():
    session, _ = scripted(done())
    session.push(GRAD)
    assert left(session) == LEFT


@pytest.mark.parametrize("slug", ["stale-gradient", "epoch-changed"])
def test_a_push_that_was_refused_gives_back_what_it_took(slug):
    session, _ = scripted(problem(409, slug))
    with pytest.raises(RefusedError):
        session.push(GRAD)
    assert left(session) == SENT


def test_a_push_that_was_skipped_gives_back_what_it_took():
    skipped = SUMMARY | {"applied": False, "skipped": "nonfinite"}
    session, _ = scripted(answer(200, skipped, Content_Type="application/json"))
    session.push(GRAD)
    assert left(session) == SENT


def test_a_push_without_a_version_gives_back_what_it_took():
    session, transport = scripted(done())
    session.version = None
    with pytest.raises(NotPulled):
        session.push(GRAD)
    assert left(session) == SENT
    assert not transport.sent


def test_a_retry_sends_the_same_bytes_and_counts_once():
    session, transport = scripted(TransportError("lost"), problem(503, "internal"), done())
    session.push(GRAD)
    assert len({sent.body for sent in transport.sent}) == 1
    assert len(transport.sent) == 3
    assert left(session) == LEFT


@pytest.mark.parametrize(
    ("end", "expected"), [(done(), LEFT), (problem(409, "epoch-changed"), SENT)]
)
def test_a_pending_push_is_counted_when_it_is_settled(end, expected):
    session, transport = scripted(TransportError("lost"))
    session._retrier.policy = RetryPolicy(deadline_s=0.01, base_s=0.001)
    with pytest.raises(DeadlineExceeded):
        session.push(GRAD)
    assert session.compress.state() == {}
    session._retrier.policy = POLICY
    transport.script = [end]
    try:
        session.settle()
    except RefusedError:
        assert expected == SENT
    assert left(session) == expected
    assert len({sent.body for sent in transport.sent}) == 1


def test_sessions_are_created_and_attached_with_it(server):
    start = {"w": np.zeros((40, 50), np.float32), "e": np.zeros((100, 4), np.float32)}
    name = f"compress-{threading.get_ident()}-{RNG.integers(1 << 40)}"
    with (
        Session.create(server, name, rule="sgd", lr=1.0, params=start, compress="int8") as ours,
        Session.attach(server, name, compress=topk(0.01)) as theirs,
    ):
        buffer = Buffer()
        ours.pull()
        g = RNG.standard_normal((40, 50)).astype(np.float32)
        rows = Rows([7, 3, 7], np.ones((3, 4), np.float32))
        _, params = ours.push_pull({"w": g, "e": rows}, into=buffer)
        np.testing.assert_allclose(params["w"], -g, atol=np.abs(g).max() / 200)
        assert params["e"][[3, 7]].tolist() == [[-1] * 4, [-2] * 4]
        assert np.count_nonzero(params["e"]) == 8
        np.testing.assert_allclose(
            params["w"] - ours.compress.state()["w"], -g, rtol=1e-5, atol=1e-6
        )
        theirs.pull()
        theirs.push({"w": g, "e": rows})
        moved = ours.pull()["w"] != buffer.tensors["w"]
        assert np.count_nonzero(moved) == 20
        assert isinstance(theirs.compress, compress.topk)


def test_an_unknown_name_is_refused_before_anything_is_sent():
    transport = Scripted(done())
    with pytest.raises(ValueError, match="compress"):
        Session.create(transport, rule="sgd", lr=1.0, compress="zip")
    assert not transport.sent
