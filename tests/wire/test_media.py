import pytest

from service.errors import NotAcceptable, UnsupportedEncoding, UnsupportedMediaType
from service.wire.media import Media, check_encoding, choose_accept, parse_content_type

ST = "application/vnd.safetensors"
RAW = "application/octet-stream"


@pytest.mark.parametrize(
    ("value", "media"),
    [
        (ST, Media("safetensors")),
        ("Application/VND.Safetensors", Media("safetensors")),
        ("application/json", Media("json")),
        ("application/json; charset=utf-8", Media("json")),
        ('application/json;charset="UTF-8"', Media("json")),
        (f"{RAW}; dtype=F32", Media("raw", "F32")),
        (f"{RAW};dtype=bf16", Media("raw", "BF16")),
        (f'{RAW} ; DTYPE="F64"', Media("raw", "F64")),
    ],
)
def test_content_types_are_read(value: str, media: Media) -> None:
    assert parse_content_type(value) == media


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "State the Content-Type"),
        ("", "State the Content-Type"),
        ("application/x-www-form-urlencoded", "send application/vnd.safetensors"),
        ("text/plain", "send application/vnd.safetensors"),
        ("application/x-pickle", "send application/vnd.safetensors"),
        ("multipart/form-data; boundary=x", "send application/vnd.safetensors"),
        (RAW, "dtype=F32"),
        (f"{RAW}; dtype=I64", "send one of"),
        (f"{RAW}; dtype=", "send one of"),
        ("application/json; charset=latin-1", "UTF-8"),
        ("json", "send application/vnd.safetensors"),
        ("\x00;;;=", "send application/vnd.safetensors"),
    ],
)
def test_other_content_types_are_refused(value: str | None, says: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=r"send|State|UTF-8") as caught:
        parse_content_type(value)
    assert says in caught.value.detail


@pytest.mark.parametrize("value", [None, "", "identity", " Identity "])
def test_identity_passes(value: str | None) -> None:
    check_encoding(value)


@pytest.mark.parametrize("value", ["gzip", "zstd", "identity, gzip", "br", "x" * 10_000])
def test_other_encodings_are_refused(value: str) -> None:
    with pytest.raises(UnsupportedEncoding, match="uncompressed") as caught:
        check_encoding(value)
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    ("value", "media"),
    [
        (None, Media("json")),
        ("", Media("json")),
        ("*/*", Media("json")),
        ("application/*", Media("json")),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Media("json")),
        (ST, Media("safetensors")),
        (RAW, Media("raw")),
        (f"{ST}, */*", Media("safetensors")),
        (f"*/*, {ST}", Media("safetensors")),
        (f"{ST};q=0.5, application/json", Media("json")),
        (f"{ST};q=0.5, */*;q=0.4", Media("safetensors")),
        (f"application/json;q=0.1, {RAW};q=0.2", Media("raw")),
        (f"{ST}, application/json", Media("safetensors")),
        (f"application/json, {ST}", Media("json")),
        ("application/json;q=0, */*", Media("safetensors")),
        (f"application/json;q=0, {ST};q=0, */*", Media("raw")),
        (f"{RAW}; dtype=BF16", Media("raw", "BF16")),
        (f"{RAW};dtype=F16;q=0.3, {RAW};dtype=F64;q=0.9", Media("raw", "F64")),
        (f"{ST};dtype=model", Media("safetensors", "model")),
        (f"{ST}; dtype=bf16; q=0.9, application/json;q=0.1", Media("safetensors", "BF16")),
        (f"{RAW};dtype=F16;q=0.3, {RAW};q=0.9", Media("raw")),
        (f"{ST};q=high, application/json;q=0.001", Media("json")),
        (f"{ST};q=nan, application/json", Media("json")),
        (f"text/html, {ST}", Media("safetensors")),
        (f"{RAW};dtype=I8, application/json;q=0.1", Media("json")),
        (f"{RAW};dtype=F16, */*;q=0.1", Media("raw", "F16")),
        (f"{RAW};dtype=F16;q=0, */*;q=0.1", Media("json")),
    ],
)
def test_the_form_of_an_answer_is_negotiated(value: str | None, media: Media) -> None:
    assert choose_accept(value) == media


@pytest.mark.parametrize(
    "value",
    [
        "text/html",
        "image/*",
        "application/problem+json",
        f"{ST};q=0",
        "*/*;q=0",
        "*/*;q=2",
        ", ,",
        f"{RAW};dtype=I8",
        "text/html;" + "x" * 10_000,
    ],
)
def test_what_we_do_not_have_is_not_acceptable(value: str) -> None:
    with pytest.raises(NotAcceptable, match="ask for") as caught:
        choose_accept(value)
    assert len(caught.value.detail) < 400


@pytest.mark.parametrize("filler", ["text/x", "", "*/*;q=0"])
def test_only_the_first_ranges_are_read(filler: str) -> None:
    assert choose_accept(",".join([filler] * 31 + [ST])) == Media("safetensors")
    with pytest.raises(NotAcceptable):
        choose_accept(",".join([filler] * 32 + [ST] * 30_000))


def test_a_media_names_its_content_type() -> None:
    assert Media("raw", "BF16").content_type == f"{RAW}; dtype=BF16"
    assert Media("raw").content_type == RAW
    assert Media("safetensors", "F32").content_type == ST
    assert Media("json").content_type == "application/json"
