"""Media types: what a body is, and which of our forms an answer takes.

Three forms carry tensors (DESIGN §4): `application/vnd.safetensors`, the flat vector alone as
`application/octet-stream; dtype=F32`, and `application/json` for `curl` and browsers.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from gradpost.protocol import JSON, OCTET, SAFETENSORS
from gradpost.protocol.dtypes import DTYPES
from service.errors import NotAcceptable, UnsupportedEncoding, UnsupportedMediaType

Kind = Literal["safetensors", "raw", "json"]

KINDS: dict[str, Kind] = {SAFETENSORS: "safetensors", OCTET: "raw", JSON: "json"}
TYPES: dict[Kind, str] = {kind: name for name, kind in KINDS.items()}
MAX_RANGES = 32
"""Ranges of an Accept header that are read."""
_NAMES = ", ".join(DTYPES)
_FORMS = f"{SAFETENSORS}, '{OCTET}; dtype=F32' (or another of {_NAMES}) or {JSON}"
_ASKABLE = frozenset({*DTYPES, "model"})  # model: each tensor as it was uploaded


class Media(NamedTuple):
    """A form of tensors on the wire; `dtype` is set where the media type names one."""

    kind: Kind
    dtype: str | None = None

    @property
    def content_type(self) -> str:
        """The Content-Type of a body in this form."""
        if self.kind == "raw" and self.dtype is not None:
            return f"{OCTET}; dtype={self.dtype}"
        return TYPES[self.kind]


_JSON = Media("json")
_PLAIN = {SAFETENSORS: Media("safetensors"), JSON: _JSON}


class _Range(NamedTuple):
    """One media range of an Accept header."""

    type: str
    dtype: str | None
    q: float

    def fits(self, kind: Kind) -> int:
        """How specifically this range names a form: 0 not at all, 1 `*/*`, 2 `application/*`, 3."""
        names = ("*/*", "application/*", TYPES[kind])
        return names.index(self.type) + 1 if self.type in names else 0


def parse_content_type(value: str | None) -> Media:
    """Reads the Content-Type of a request that carries tensors.

    Args:
        value: The header as it came, or None where it is absent.

    Returns:
        The form; `dtype` is set for the raw form, which must state it.

    Raises:
        UnsupportedMediaType: Absent, unknown, without the dtype it needs, or not UTF-8.
    """
    if value in _PLAIN:
        return _PLAIN[value]
    if value is None or not value.strip():
        raise UnsupportedMediaType(f"State the Content-Type of the body: {_FORMS}.")
    name, parameters = _split(value)
    kind = KINDS.get(name)
    if kind is None:
        raise UnsupportedMediaType(
            f"Bodies of type {_shown(name)} are not read here; send {_FORMS}.", accepted=list(KINDS)
        )
    if kind == "raw":
        return Media(kind, _raw_dtype(parameters.get("dtype")))
    if kind == "json" and parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(
            "JSON is read as UTF-8; encode the body so and drop the charset."
        )
    return Media(kind)


def check_encoding(value: str | None) -> None:
    """Refuses every Content-Encoding but identity.

    Raises:
        UnsupportedEncoding: The body is compressed. On gradients zstd saves 7 % and costs more
            than it saves; BF16 halves them.
    """
    if value is None or value.strip().lower() in ("", "identity"):
        return
    raise UnsupportedEncoding(
        f"Content-Encoding {_shown(value)} is not read here; send the body uncompressed "
        "(to halve a gradient, send it as BF16)."
    )


def choose_accept(value: str | None) -> Media:
    """Chooses the form of an answer from the Accept header (RFC 9110 §12.5.1).

    The highest q wins, then the form that was named most specifically, then the one named first.
    A `dtype` parameter on a tensor type (F64, F32, F16, BF16, or `model`) is carried along. JSON
    is what `*/*`, or no header, gives. Ranges after the 32nd are not read.

    Raises:
        NotAcceptable: No form that we have is acceptable.
    """
    if value is None or value == "*/*" or not value.strip():
        return _JSON
    if value in _PLAIN:
        return _PLAIN[value]
    ranges = list(_ranges(value))
    ranked = [(_rank(media, ranges), media) for media in _offers(ranges)]
    (q, _, _), chosen = max(ranked, key=lambda pair: pair[0])  # the first of equals
    if q == 0.0:
        raise NotAcceptable(
            f"Nothing in Accept {_shown(value)} is available; ask for {_FORMS}, or */*.",
            available=list(KINDS),
        )
    return chosen


def _offers(ranges: list[_Range]) -> list[Media]:
    """What we could answer: the three plain forms, and those that were asked for with a dtype."""
    named = [
        Media(KINDS[r.type], r.dtype)
        for r in ranges
        if r.dtype in _ASKABLE and KINDS.get(r.type, "json") != "json"
    ]
    return list(dict.fromkeys([_JSON, Media("safetensors"), Media("raw"), *named]))


def _rank(media: Media, ranges: list[_Range]) -> tuple[float, int, int]:
    """How well a form is liked: q, specificity and earliness of the range that governs it."""
    found = (0.0, 0, 0)
    for order, r in enumerate(ranges):
        specific = r.fits(media.kind)
        if specific == 3 and media.kind != "json" and r.dtype != media.dtype:
            specific = 0  # a plain form and one with a dtype are different things
        if specific < 3 and media.dtype is not None:
            specific = 0
        if specific > found[1]:
            found = (r.q, specific, -order)
    return found


def _ranges(value: str) -> Iterator[_Range]:
    """The media ranges of an Accept header; a malformed q counts as 0."""
    for item in value.split(",", MAX_RANGES)[:MAX_RANGES]:
        if not item.strip():
            continue
        name, parameters = _split(item)
        try:
            q = float(parameters.get("q", "1"))
        except ValueError:
            q = 0.0
        dtype = parameters.get("dtype")
        if dtype is not None:
            dtype = "model" if dtype.lower() == "model" else dtype.upper()
        yield _Range(name, dtype, q if 0.0 <= q <= 1.0 else 0.0)


def _split(value: str) -> tuple[str, dict[str, str]]:
    """Type/subtype in lower case, and the parameters, of one media type.

    No parameter that means something here has `;`, `,` or `=` in its value, so quotes need no more
    than to be taken off.
    """
    name, *rest = value.split(";")
    pairs = (item.partition("=") for item in rest)
    parameters = {key.strip().lower(): text.strip().strip('"') for key, _, text in pairs}
    return name.strip().lower(), parameters


def _raw_dtype(dtype: str | None) -> str:
    """The dtype of a raw body, in our spelling."""
    if dtype is None:
        raise UnsupportedMediaType(
            f"A raw body does not say what it holds: send '{OCTET}; dtype=F32' (one of {_NAMES})."
        )
    if dtype.upper() not in DTYPES:
        raise UnsupportedMediaType(
            f"dtype {_shown(dtype)} is not known here; send one of {_NAMES}.", accepted=list(DTYPES)
        )
    return dtype.upper()


def _shown(text: str) -> str:
    """A header value as it may stand in a message: short and printable."""
    return ascii(text[:80])
