"""Versions as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpost.protocol.versions import etag, format_version, parse_version

_LAST = (1 << 63) - 1


@given(st.integers(1, _LAST), st.integers(0, _LAST))
def test_what_is_written_is_read(epoch, version):
    assert parse_version(format_version(epoch, version)) == (epoch, version)


def test_a_bare_number_is_of_the_first_epoch():
    assert parse_version("7") == parse_version(7) == parse_version("1-7") == (1, 7)
    assert parse_version(0) == (1, 0)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            "-",
            "1-",
            "-7",
            "1-2-3",
            " 1",
            "1 ",
            "1\n",
            "+1",
            "1.0",
            "1e3",
            "0x1",
            "a",
            "٣",
            "²",
        ),
        *("0-1", "9" * 20, "9" * 19, "9" * 400, f"{1 << 63}-1", "1_0"),
        *(-1, 1 << 63, True, 1.0, None, b"1", [1], (1, 7)),
    ],
    ids=repr,
)
def test_anything_else_is_a_value_error(value):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        parse_version(value)
    assert len(str(caught.value)) < 150


def test_etags_are_strong_and_quoted():
    assert etag(1, 7, "F32") == '"1-7-F32"'
