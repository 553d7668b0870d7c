"""Control values of a push, ids, Prefer and queries."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, InvalidRequest, NotSupportedYet
from service.schemas import (
    Prefer,
    PushControl,
    check_id,
    one_of_each,
    parse_base,
    parse_control,
    parse_count,
    parse_prefer,
)

GOOD = {"worker": "w-0.a_B", "sequence": 7, "base_version": "2-9", "loss": 0.5}


def field_of(values, *, text):
    with pytest.raises(InvalidRequest) as caught:
        parse_control(values, text=text)
    (error,) = caught.value.context["errors"]
    assert len(error["message"]) > 20
    return error["field"]


def test_a_whole_control():
    expected = PushControl("w-0.a_B", 7, (2, 9), 0.5)
    assert parse_control(GOOD, text=False) == expected
    assert parse_control({k: str(v) for k, v in GOOD.items()}, text=True) == expected
    assert expected.key == ("w-0.a_B", 7)


def test_the_same_push_is_the_same_in_every_encoding():
    as_json = parse_control({**GOOD, "base_version": 9, "loss": 2}, text=False)
    as_text = parse_control(
        {**GOOD, "sequence": "7", "base_version": "1-9", "loss": "2"}, text=True
    )
    assert as_json.canonical == as_text.canonical


def test_an_anonymous_push():
    nothing = parse_control({}, text=True)
    assert nothing == PushControl(None, None, None, None)
    assert nothing.key is None
    assert parse_control({"base_version": 3}, text=False).base_version == (1, 3)
    assert parse_control({"worker": None, "sequence": None}, text=False).key is None


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"worker": "w"}, "sequence"),
        ({"sequence": "1"}, "worker"),
        ({"worker": "w", "base_version": "1"}, "sequence"),
        ({"sequence": "1", "base_version": "1"}, "worker"),
        ({"worker": "w", "sequence": "1"}, "base_version"),
    ],
)
@pytest.mark.parametrize("text", [True, False])
def test_worker_sequence_and_base_come_together(values, field, text):
    assert field_of(values, text=text) == field


BAD_SEQUENCES = [-1, 1 << 63, 1 << 64, 10**400, 1.0, 1.5, "1", True, [], {}, math.inf, math.nan]
BAD_TEXTS = [
    *("-1", "+1", "1.0", "1e3", "", " 1", "1 ", "0x1", "1_0", "٣", "²", "true", "9" * 400),
    *(str(1 << 63), str(1 << 64)),
]


@pytest.mark.parametrize("value", BAD_SEQUENCES)
def test_bad_sequences_in_json(value):
    assert field_of({**GOOD, "sequence": value}, text=False) == "sequence"


@pytest.mark.parametrize("value", BAD_TEXTS)
def test_bad_sequences_in_a_query(value):
    assert field_of({**GOOD, "loss": "1", "sequence": value}, text=True) == "sequence"


@pytest.mark.parametrize("value", [0, 1, (1 << 63) - 1])
def test_sequences_at_their_edges(value):
    assert parse_control({**GOOD, "sequence": value}, text=False).sequence == value
    texts = {"worker": "w", "sequence": str(value), "base_version": "1"}
    assert parse_control(texts, text=True).sequence == value


@pytest.mark.parametrize(
    "value", ["", "a/b", "a b", "é", "\0", "w\n", "w" * 129, 1, True, ["w"], "\ud800"]
)
def test_bad_workers(value):
    assert field_of({**GOOD, "worker": value}, text=False) == "worker"


@pytest.mark.parametrize(
    "value", ["", "new", "1-", "-1", "0-1", "1-2-3", "1.0", "9" * 400, -1, 1.0, True, [], 10**400]
)
def test_bad_base_versions(value):
    assert field_of({**GOOD, "base_version": value}, text=False) == "base_version"


@pytest.mark.parametrize(("value", "found"), [(0, (1, 0)), ("7", (1, 7)), ("3-0", (3, 0))])
def test_base_versions(value, found):
    assert parse_base("base_version", value) == found


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, 10**400, "1", True, [], {}, "loss"]
)
def test_bad_losses_in_json(value):
    assert field_of({**GOOD, "loss": value}, text=False) == "loss"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", "", "x", "0x1p3"])
def test_bad_losses_in_a_query(value):
    assert field_of({"loss": value}, text=True) == "loss"


@pytest.mark.parametrize(
    ("wrong", "right"), [("workr", "worker"), ("seqence", "sequence"), ("base", "base_version")]
)
@pytest.mark.parametrize("text", [True, False])
def test_misspelt_controls(wrong, right, text):
    with pytest.raises(InvalidRequest, match=f"did you mean '{right}'"):
        parse_control({wrong: "1"}, text=text)


@pytest.mark.parametrize("name", ["found_inf"])
def test_controls_of_later_versions(name):
    with pytest.raises(NotSupportedYet, match=name) as caught:
        parse_control({name: "1"}, text=True)
    assert caught.value.context["field"] == name


@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "weight", "x"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    ),
    st.booleans(),
)
def test_whatever_comes_is_parsed_or_refused(values, text):
    if text:
        values = {name: str(value) for name, value in values.items()}
    try:
        control = parse_control(values, text=text)
    except (InvalidRequest, NotSupportedYet):
        return
    assert (control.worker is None) == (control.sequence is None)
    assert control.sequence is None or 0 <= control.sequence < 1 << 63
    assert control.loss is None or math.isfinite(control.loss)
    assert control.canonical


@pytest.mark.parametrize("name", ["a", "0", "a.b", "a-b_c.0", "x" * 128])
def test_ids(name):
    assert check_id(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a..b", "../a", ".a", "-a", "_a", "a/b", "a\0", "a\n", "a b", "é", "x" * 129,
     "x" * 10_000, "\ud800"],
)  # fmt: skip
def test_bad_ids(name):
    with pytest.raises(InvalidRequest, match="128") as caught:
        check_id(name)
    assert caught.value.context["errors"][0]["field"] == "id"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Prefer(None, False)),
        ("", Prefer(None, False)),
        ("wait=5", Prefer(5.0, False)),
        ("wait=0.25, return=representation", Prefer(0.25, True)),
        ("return=minimal", Prefer(None, False)),
        ("return=minimal, return=representation", Prefer(None, False)),
        ('WAIT="3"; x=1 , Return=Representation', Prefer(3.0, True)),
        ("wait=100000", Prefer(60.0, False)),
        ("wait=-1", Prefer(None, False)),
        ("wait=1e9", Prefer(None, False)),
        ("wait=nan", Prefer(None, False)),
        ("wait=٣", Prefer(None, False)),
        ("respond-async, wait = 2", Prefer(2.0, False)),
        ("=,;=,,", Prefer(None, False)),
    ],
)
def test_prefer(value, expected):
    assert parse_prefer(value, 60.0) == expected


@given(st.text())
def test_any_prefer_is_read(value):
    prefer = parse_prefer(value, 60.0)
    assert prefer.wait_s is None or 0 <= prefer.wait_s <= 60


def test_counts():
    assert parse_count("limit", "7", 1, 10) == 7
    for value in ("0", "11", "", "-1", "x", "1.0", "٣", "9" * 400):
        with pytest.raises(InvalidRequest, match="from 1 to 10"):
            parse_count("limit", value, 1, 10)


def test_a_query_names_each_thing_once():
    pairs = [("a", "1"), ("names", "x"), ("names", "y"), ("b", "2")]
    assert one_of_each(pairs, many=("names",)) == {"a": "1", "b": "2"}
    with pytest.raises(BadRequest, match="twice"):
        one_of_each([("a", "1"), ("a", "1")])


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e31", "1e-31", "x", ""])
def test_a_scale_is_a_positive_number(value):
    with pytest.raises(InvalidRequest, match="divided by it"):
        parse_control({"grad_scale": value}, text=True)


@pytest.mark.parametrize("value", [[], 1, "x", {"default": 1}, {"default": None}, {"default": []}])
def test_overrides_are_objects_by_group(value):
    with pytest.raises(InvalidRequest, match="group name"):
        parse_control({"overrides": value}, text=False)


def test_overrides_have_one_canonical_form():
    one = parse_control({"overrides": {"b": {"lr": 1, "eps": 2}, "a": {"lr": 3}}}, text=False)
    two = parse_control({"overrides": {"a": {"lr": 3}, "b": {"eps": 2, "lr": 1}}}, text=False)
    assert one.canonical == two.canonical
    assert parse_control({"overrides": {"a": {}}}, text=False).overrides is None
    plain = parse_control({}, text=False)
    assert one.canonical != plain.canonical
    assert parse_control({"grad_scale": 2}, text=False).canonical != plain.canonical


@pytest.mark.parametrize("value", ["", "x" * 32, "0" * 31, 1, "A" * 32])
def test_an_incarnation_is_32_digits(value):
    with pytest.raises(InvalidRequest, match="hexadecimal"):
        parse_control({"incarnation": value}, text=False)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 2e30, 1e300, 1e-31, "x", True, [], {}])
def test_bad_weights(value):
    assert field_of({"weight": value}, text=False) == "weight"
    if isinstance(value, float):
        assert field_of({"weight": repr(value)}, text=True) == "weight"


def test_a_weight_is_a_number_and_0_a_pass():
    assert parse_control({"weight": "2.5"}, text=True).weight == 2.5
    assert parse_control({"weight": 0}, text=False).is_pass
    assert parse_control({"weight": "-0.0"}, text=True).is_pass
    assert not parse_control({}, text=True).is_pass
    one, same = parse_control({"weight": 1}, text=False), parse_control({}, text=False)
    assert one.canonical == same.canonical
    assert parse_control({"weight": 2}, text=False).canonical != same.canonical
